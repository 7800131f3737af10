"""`sfa-onnx completion`: what a shell needs to complete the command; argcomplete does the rest."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from sfa_onnx.errors import MissingError

if TYPE_CHECKING:
    from sfa_onnx.cli.console import Console

__all__ = ["completion", "offer"]


def completion(args: argparse.Namespace, console: Console) -> int:
    """Print the shell's script.

    Raises:
        MissingError: argcomplete is not installed.
    """
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as error:
        raise MissingError(
            "completion needs the package argcomplete: pip install argcomplete"
        ) from error
    script = shellcode(["sfa-onnx"], shell=args.shell)
    console.plain(script.rstrip("\n"))
    console.result("completion", {"shell": args.shell, "script": script})
    return 0


def offer(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, and end; return where none asks."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser)
