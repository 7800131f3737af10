"""The `sfa-onnx` command: parsing, calling the library, printing. No logic of its own.

Exit codes: 0 done, 1 error, 2 usage, 3 an expectation or a validation was not met.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import sfa_onnx
from sfa_onnx.cli import demo, deploy, execute, rewrite
from sfa_onnx.cli.console import Console
from sfa_onnx.errors import SfaError, UsageError, VerificationError
from sfa_onnx.guard.doors import as_ours
from sfa_onnx.guard.text import printable

__all__ = ["build_parser", "main"]

DONE, ERROR, USAGE, NOT_MET = 0, 1, 2, 3


class _Plain(logging.Formatter):
    """Log lines without characters that could steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, names in it escaped."""
        return printable(super().format(record))


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each verb's module adds its own sub-parser."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    common.add_argument("--debug", action="store_true", help="show tracebacks and debug logging")
    common.add_argument("-v", "--verbose", action="store_true", help="say more on the way")
    parser = argparse.ArgumentParser(
        prog="sfa-onnx",
        description="DeepSeek sparse attention: exported ONNX -> fused, validated -> Ascend NPU.",
    )
    parser.add_argument("--version", action="version", version=f"sfa-onnx {sfa_onnx.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in (demo, rewrite, execute, deploy):
        module.add_verbs(verbs, common)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; errors become one readable paragraph and an exit code."""
    _open_streams()
    args = build_parser().parse_args(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain("%(message)s"))
    level = logging.DEBUG if args.debug else logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler])
    console = Console(json=args.json, verbose=args.verbose)
    try:
        code = int(args.action(args, console))
        sys.stdout.flush()  # a full disk behind a redirection shows only now
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.debug:
            raise
        return _told(console, error, args.verb)
    return code


def _told(console: Console, error: Exception, verb: str) -> int:
    """Print what went wrong; the exit code that belongs to it."""
    ours = error if isinstance(error, SfaError) else as_ours(error, verb)
    if isinstance(error, OSError) and error.filename is None:
        # Standard output itself: what is still buffered for it must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    console.error(ours)
    if isinstance(ours, VerificationError):
        return NOT_MET
    return USAGE if isinstance(ours, UsageError) else ERROR


def _open_streams() -> None:
    """Stand in for standard streams that the caller closed (`>&-`)."""
    for name, mode in (("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123 - lives on
