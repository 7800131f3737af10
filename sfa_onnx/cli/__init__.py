"""The `sfa-onnx` command: parsing, calling the library, printing. No logic of its own.

Exit codes: 0 done, 1 error, 2 usage, 3 an expectation or a validation was not met, 130 interrupted.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sfa_onnx.cli.completion import offer
from sfa_onnx.cli.parser import build_parser
from sfa_onnx.guard.text import printable

if TYPE_CHECKING:
    from sfa_onnx.cli.console import Console

__all__ = ["build_parser", "main"]

DONE, ERROR, USAGE, NOT_MET, INTERRUPTED = 0, 1, 2, 3, 130


class _Plain(logging.Formatter):
    """Log lines without characters that could steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, names in it escaped."""
        return printable(super().format(record))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; errors become one readable paragraph and an exit code."""
    try:
        _open_streams()
        parser = build_parser()
        offer(parser)
        return _carry_out(parser.parse_args(argv))
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error of ours.
        _drop(sys.stdout)
        return DONE
    except KeyboardInterrupt:
        print("interrupted: nothing was left half-written", file=sys.stderr)
        return INTERRUPTED


def _carry_out(args: Any) -> int:
    from sfa_onnx.cli.console import Console

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain("%(message)s"))
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.WARNING, handlers=[handler])
    console = Console(json=args.json, verbose=getattr(args, "verbose", False))
    try:
        module, _, name = args.action.partition(":")
        action = getattr(importlib.import_module(f"sfa_onnx.cli.{module}"), name)
        code = int(action(args, console))
        sys.stdout.flush()  # a full disk behind a redirection shows only now
    except BrokenPipeError:
        raise
    except Exception as error:
        if args.debug:
            raise
        return _explain(console, error, args.verb)
    return code


def _explain(console: Console, error: Exception, verb: str) -> int:
    """Print what went wrong; the exit code that belongs to it."""
    from sfa_onnx.errors import SfaError, UsageError, VerificationError
    from sfa_onnx.guard.doors import as_ours

    ours = error if isinstance(error, SfaError) else as_ours(error, verb)
    if isinstance(error, OSError) and error.filename is None:
        # Standard output itself: what is still buffered for it must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    console.error(ours)
    if isinstance(ours, VerificationError):
        return NOT_MET
    return USAGE if isinstance(ours, UsageError) else ERROR


def _open_streams() -> None:
    """Stand in for standard streams that the caller closed (`>&-`) or that cannot spell `✓`."""
    for name, mode in (("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123 - lives on
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _drop(stream: Any) -> None:
    """Let what is still buffered for a stream go nowhere instead of failing again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
