"""How every verb of the command line is described: help with defaults, examples, exit codes."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any, Final

__all__ = [
    "Help",
    "Verb",
    "assume",
    "files",
    "forced",
    "indexer",
    "inputs",
    "model",
    "reported",
    "rounding",
    "seed",
]

_CODES: Final = "exit codes: 0 done, 1 error, 2 usage, {met}130 interrupted"


class Help(argparse.RawDescriptionHelpFormatter):
    """Every option's default stands behind its text, unless the text names it.

    Sentences are wrapped to the terminal; lines that are indented (commands) are not.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:  # noqa: ARG002 - argparse's
        paragraphs = (p if p.startswith("example") else _wrap(p, width) for p in text.split("\n\n"))
        return "\n\n".join(paragraphs)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        silent = action.default in (None, False, argparse.SUPPRESS) or action.default == []
        if silent or not action.option_strings or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


def _wrap(text: str, width: int) -> str:
    """Words, not names in hyphens, go to the next line."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


class Verb:
    """One verb while it is described."""

    def __init__(self, verbs: Any, name: str, text: str, *, action: str, what: str = "") -> None:
        """Start a verb.

        Args:
            verbs: the sub-parsers of the command.
            name: what is typed.
            text: one line for the list of verbs.
            action: "module:function" below `sfa_onnx.cli`, loaded when the verb runs.
            what: sentences for the verb's own help; default: `text`.
        """
        self.parser: argparse.ArgumentParser = verbs.add_parser(
            name, help=text, description=what or text, formatter_class=Help
        )
        self.parser.set_defaults(action=action)
        self.add = self.parser.add_argument

    def finish(self, *, example: str, met: str = "", verbose: str = "") -> None:
        """The options that end every verb's list, an example and the exit codes.

        Args:
            example: a command that runs.
            met: what exit code 3 means here; "" where it does not occur.
            verbose: what `-v` adds; "" where there is no such option.
        """
        self.add("--json", action="store_true", help="print the result as one JSON document")
        self.add("--debug", action="store_true", help="show tracebacks and debug logging")
        if verbose:
            self.add("-v", "--verbose", action="store_true", help=verbose)
        codes = _CODES.format(met=f"3 {met}, " if met else "")
        self.parser.epilog = f"example:\n  {example}\n\n{codes}"


def model(verb: Verb, text: str = "the ONNX model") -> None:
    """The model to read."""
    verb.add("model", type=Path, help=text)


def forced(verb: Verb, text: str = "overwrite the output") -> None:
    """Leave to overwrite."""
    verb.add("--force", action="store_true", help=text)


def files(verb: Verb, suffix: str) -> None:
    """A model to read and one to write, by default beside it under this suffix."""
    model(verb)
    text = f"where to write (default: beside the input, *{suffix})"
    verb.add("-o", "--output", type=Path, metavar="FILE", help=text)
    forced(verb)
    verb.parser.set_defaults(suffix=suffix)


def inputs(verb: Verb) -> None:
    """Arrays to feed."""
    verb.add(
        "--inputs",
        type=Path,
        metavar="NPZ",
        help="arrays by input name (default: drawn at random so that they fit together)",
    )


def seed(verb: Verb) -> None:
    """The seed of what is drawn."""
    verb.add("--seed", type=int, default=0, metavar="N", help="seed of the inputs that are drawn")


def rounding(verb: Verb, default: str | None, more: str = "") -> None:
    """How our operators round."""
    verb.add(
        "--rounding",
        choices=("exact", "npu"),
        default=default,
        help=f"npu: round dequantised values as CANN's kernels do{more}",
    )


def reported(verb: Verb) -> None:
    """A page about what was found."""
    verb.add("--report", type=Path, metavar="FILE", help="write a page for people (.html or .md)")


def assume(verb: Verb) -> None:
    """What no file can prove."""
    verb.add(
        "--assume",
        action="append",
        default=[],
        metavar="two-valued:NAME",
        help="assert that the float input NAME holds 0 and -1e4 or less only: a mask, no bias;"
        " zero-one:NAME: that an input holds 0 and 1 only; not-negative:NAME: that a scale of an"
        " indexer's keys holds no negative number",
    )


def indexer(verb: Verb) -> None:
    """What selects keys."""
    verb.add(
        "--no-indexer",
        action="store_true",
        help="leave selections alone: no NPULightningIndexer in their place",
    )
