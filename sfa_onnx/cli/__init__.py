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

__all__ = ["build_parser", "main"]

DONE, ERROR, USAGE, NOT_MET = 0, 1, 2, 3


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
    args = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.debug else logging.INFO if args.verbose else logging.WARNING,
        format="%(message)s",
        stream=sys.stderr,
    )
    console = Console(json=args.json, verbose=args.verbose)
    try:
        return int(args.action(args, console))
    except SfaError as error:
        if args.debug:
            raise
        console.error(error)
        if isinstance(error, VerificationError):
            return NOT_MET
        return USAGE if isinstance(error, UsageError) else ERROR
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.debug:
            raise
        console.unexpected(error)
        return ERROR
