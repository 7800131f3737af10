"""The worker's tasks in this very process: no pipe, and a death is this process's own.

Only for fuzzing: a process that dies or hangs here says nothing yet about the package, whose
worker is there to die. Such mutants are tried again with the worker that people have. Mutants of
one model share most of it, so what was found sound, and sites that were judged, are remembered:
by all their bytes, so that whatever a mutation touches is looked at again.
"""

from __future__ import annotations

import os
from typing import Any

from onnx import ModelProto

from sfa_onnx.files import sound
from sfa_onnx.guard import serve, worker
from sfa_onnx.passes.verify.classes import Classes


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


def _remember() -> None:
    """Give all graphs one memory of verdicts, and all models one of what is wrong with them."""
    begin, look = Classes.__init__, sound.problems
    verdicts: dict[str, Any] = {}
    faults: dict[bytes, list[str]] = {}

    def shared(self: Classes, *args: Any) -> None:
        begin(self, *args)
        self._known = verdicts

    def remembered(model: ModelProto, known: bytes | None = None) -> list[str]:
        data = model.SerializeToString()
        if data not in faults:
            if len(faults) > 64:  # a mutant and what is made of it
                faults.clear()
            faults[data] = look(model, known)
        return faults[data]

    Classes.__init__ = shared  # type: ignore[method-assign]
    sound.problems = remembered  # type: ignore[assignment]


def be_swift() -> None:
    """Run tasks in this process from now on, and trust the file system to keep what is written."""
    _remember()
    worker._worker = _Here()  # type: ignore[assignment]
    worker.stop = lambda: None
    os.fsync = lambda _handle: None  # type: ignore[assignment]
