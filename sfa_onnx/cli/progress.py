"""What is being done, reported while it is being done: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final, Protocol

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sfa_onnx.guard.text import printable

__all__ = ["Bar", "Display", "Lines", "Watch"]

PATIENCE: Final = 1.0  # seconds of silence: what is done by then needs no report
_PAUSE: Final = 0.2  # seconds between two looks
_AGAIN: Final = 10.0  # seconds after which a stage that still runs is reported again


class Display(Protocol):
    """Where it is reported."""

    def show(self, text: str, fraction: float, seconds: float) -> None:
        """Report what is done, the fraction of the whole (0 to 1) and the seconds so far."""

    def close(self) -> None:
        """Nothing follows."""


class Bar:
    """A bar on a terminal that goes when the work is done."""

    def __init__(self, console: rich.console.Console) -> None:
        columns = TextColumn("[dim]{task.description}"), BarColumn(bar_width=28)
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self._task = self._bar.add_task("", total=1.0)

    def show(self, text: str, fraction: float, seconds: float) -> None:
        """Start the bar, or move it."""
        del seconds
        self._bar.update(self._task, description=escape(printable(text)), completed=fraction)
        self._bar.start()

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


class Lines:
    """A line on stderr for each stage, and every few seconds within one."""

    def __init__(self) -> None:
        self._last, self._when = "", 0.0

    def show(self, text: str, fraction: float, seconds: float) -> None:
        """Print a line, unless it was printed a moment ago."""
        del fraction
        if text == self._last and seconds - self._when < _AGAIN:
            return
        self._last, self._when = text, seconds
        print(f"{printable(text)} ({seconds:.0f} s)", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to take away."""


class Watch:
    """Looks at what was reported last and passes it on, from a thread of its own.

    A thread, because a stage that takes long reports nothing while it runs.
    """

    def __init__(self, label: str, display: Display) -> None:
        self._label, self._display = label, display
        self._stage, self._fraction = "", 0.0
        self._done = threading.Event()
        self._start = time.monotonic()

    def update(self, stage: str, fraction: float) -> None:
        """Report a stage, and the fraction of the whole that is done."""
        self._stage, self._fraction = stage, fraction

    @contextlib.contextmanager
    def running(self, *, quiet: bool = False) -> Iterator[None]:
        """Watch while the body runs."""
        thread = threading.Thread(target=self._look, name="progress", daemon=True)
        if not quiet:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            if thread.is_alive():
                thread.join()
            self._display.close()

    def _look(self) -> None:
        if self._done.wait(PATIENCE):
            return
        with contextlib.suppress(OSError, ValueError):  # a closed stderr silences, no more
            while True:
                text = f"{self._label}: {self._stage}" if self._stage else self._label
                self._display.show(text, self._fraction, time.monotonic() - self._start)
                if self._done.wait(_PAUSE):
                    return
