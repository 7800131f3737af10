"""What a person sees: tables, progress, errors. Data goes to stdout, talk to stderr."""

from __future__ import annotations

import json as json_lib
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import rich.console
import rich.table
from rich.markup import escape
from rich.text import Text

from sfa_onnx.cli.progress import Bar, Lines, Watch
from sfa_onnx.guard.text import printable
from sfa_onnx.report import JSON_VERSION, to_json

__all__ = ["Console", "count", "human_bytes"]

_NO_WIDTH: Final = 1_000_000
_NUMBERS: Final = 3  # columns of numbers of which a table is more than a list of words


def human_bytes(count: float) -> str:
    """A byte count for people: '1.34 MB' (powers of 1000, as storage is sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def count(number: int, noun: str, plural: str = "s") -> str:
    """'1 site', '2 sites', '2 classes'."""
    return f"{number} {noun}{'' if number == 1 else plural}"


class _Stream(rich.console.Console):
    """One stream; where its reader goes away (`| head`), the command ends well."""

    def on_broken_pipe(self) -> None:
        """Say so to who called, instead of an exit code of rich's own."""
        raise BrokenPipeError


class Console:
    """Prints for a person on a terminal, or one JSON document for a program."""

    def __init__(self, *, json: bool = False, verbose: bool = False) -> None:
        self.is_json = json
        self.verbose = verbose
        self.piped = not sys.stdout.isatty()
        # A pipe has no width: nothing is wrapped there. A terminal has one, or COLUMNS sets it.
        width = _NO_WIDTH if self.piped else None
        self.out = _Stream(file=sys.stdout, highlight=False, width=width)
        self.err = _Stream(file=sys.stderr, highlight=False)

    def say(self, template: str = "", *values: object, style: str = "") -> None:
        """One line for a person; silent in JSON mode.

        `template` may hold markup; each `{}` is filled with a value taken literally, because
        shapes such as [batch, 4] would otherwise read as markup.
        """
        if not self.is_json:
            text = template.format(*(escape(printable(str(value))) for value in values))
            self.out.print(Text.from_markup(text, style=style), soft_wrap=True)

    def plain(self, text: str) -> None:
        """One line exactly as it is, for `$(...)` in a shell; silent in JSON mode."""
        if not self.is_json:
            sys.stdout.write(text + "\n")

    def title(self, text: str) -> None:
        """A section heading."""
        if self.is_json:
            return
        if self.piped:
            self.out.print(Text(text), soft_wrap=True)
        else:
            self.out.rule(f"[bold]{escape(text)}[/bold]", align="left", style="dim")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()
    ) -> None:
        """A table; `right` names the columns (by index) that are numbers.

        A table of many numbers that is wider than the terminal is shown row by row.
        """
        if self.is_json:
            return
        table = rich.table.Table(
            box=None,
            pad_edge=False,
            header_style="dim",
            padding=(0, 2, 0, 0),
            show_header=any(columns),
        )
        for index, name in enumerate(columns):
            table.add_column(name, justify="right" if index in right else "left", overflow="fold")
        cells = [[c if isinstance(c, Text) else Text(printable(str(c))) for c in r] for r in rows]
        for row in cells:
            table.add_row(*row)
        if self.piped:
            with self.out.capture() as lines:
                self.out.print(table)
            for line in lines.get().splitlines():
                self.plain(line.rstrip())
        elif len(right) >= _NUMBERS and self._too_wide(table):
            self._stacked(columns, cells, right)
        else:
            self.out.print(table)

    def _too_wide(self, table: rich.table.Table) -> bool:
        """Whether a table would have to break its cells."""
        free = self.out.options.update(max_width=_NO_WIDTH)
        return self.out.measure(table, options=free).maximum > self.out.width

    def _stacked(
        self, columns: Sequence[str], rows: Sequence[Sequence[Text]], right: Sequence[int]
    ) -> None:
        """Each row in a few lines: its words, and its numbers with their names; none is broken."""
        kept = "\u00a0"  # `textwrap` breaks no line there
        for row in rows:
            words = [cell for at, cell in enumerate(row) if at not in right and cell.plain]
            self.out.print(Text("  ").join(words), soft_wrap=True)
            numbers = [f"{columns[at]} {row[at].plain}" for at in right if row[at].plain]
            told = "  ".join(pair.replace(" ", kept) for pair in numbers)
            for line in textwrap.wrap(told, self.out.width, initial_indent="  ",
                                      subsequent_indent="  "):  # fmt: skip
                self.out.print(Text(line.replace(kept, " ")), soft_wrap=True)

    def result(self, kind: str, report: Any) -> None:
        """The machine-readable result; printed only in JSON mode."""
        if self.is_json:
            document = {"schema": f"sfa-onnx/{kind}", "version": JSON_VERSION, **to_json(report)}
            sys.stdout.write(json_lib.dumps(document, indent=2, default=str) + "\n")

    def error(self, error: Exception) -> None:
        """One readable paragraph on stderr, or a JSON document."""
        if self.is_json:
            document = {"schema": "sfa-onnx/error", "version": JSON_VERSION}
            document |= {"error": type(error).__name__, "message": str(error)}
            sys.stdout.write(json_lib.dumps(document, indent=2) + "\n")
        text = Text.assemble(("error: ", "bold red"), printable(str(error)))
        self.err.print(text, soft_wrap=True)

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[[str, float], None]]:
        """Report on stderr what is being done, once it takes more than a second.

        A bar on a terminal; elsewhere a line for each stage, and every few seconds within one.
        """
        watch = Watch(label, Bar(self.err) if self.err.is_terminal else Lines())
        quiet = self.is_json and not self.err.is_terminal
        with watch.running(quiet=quiet):
            yield watch.update
