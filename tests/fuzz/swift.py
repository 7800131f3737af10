"""The worker's tasks in this very process: no pipe, and a death is this process's own.

Only for fuzzing: a process that dies or hangs here says nothing yet about the package, whose
worker is there to die. Such mutants are tried again with the worker that people have.
"""

from __future__ import annotations

import os
from typing import Any

from sfa_onnx.guard import serve, worker


class _Here:
    """Stands where the worker's process stands."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.released: list[int] = []
        self.usable = True

    def ask(self, message: tuple[Any, ...], _seconds: float) -> Any:
        """Run the task."""
        for number in self.released:
            serve._kept.pop(number, None)
        self.released = []
        return serve._run(*message)

    def end(self) -> str:
        """Nothing to end."""
        return ""


def be_swift() -> None:
    """Run tasks in this process from now on, and trust the file system to keep what is written."""
    worker._worker = _Here()  # type: ignore[assignment]
    worker.stop = lambda: None
    os.fsync = lambda _handle: None  # type: ignore[assignment]
