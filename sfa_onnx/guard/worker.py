"""One process that runs third-party runtimes for us, and may die of an untrusted graph.

It is started when first needed (or early, by `warm`), fed through a pipe, and kept: a call costs a
fraction of a millisecond. When it dies the call raises `CrashError` and the next call starts
another one. Only bytes, numbers, strings and NumPy arrays cross the pipe.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO, Any, Final

from sfa_onnx import errors
from sfa_onnx.errors import CrashError, MissingError, SfaError
from sfa_onnx.guard.budgets import SECONDS, Budget
from sfa_onnx.guard.text import printable

__all__ = ["Handle", "RemoteError", "call", "stop", "warm"]

_START: Final = (
    "import sys; sys.path[:] = sys.argv[1:]; from sfa_onnx.guard.serve import serve; serve()"
)
_HEADER: Final = 8  # bytes of a message's length
_TAIL: Final = 300  # characters of a dead worker's last words
_OWN: Final = "SFA_ONNX_"  # environment variables that a running worker must share with us


class RemoteError(Exception):
    """What a task raised in the worker, as its text; `kind` is the class it had there."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Handle:
    """Something that lives in the worker, such as an open session; it goes when this object goes.

    Attributes:
        number: its number there.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._worker = _current()

    @property
    def alive(self) -> bool:
        """Whether the worker that holds it is still the one we talk to."""
        return self._worker is not None and self._worker is _current()

    def __del__(self) -> None:
        worker = getattr(self, "_worker", None)
        if worker is not None:
            worker.released.append(self.number)


class _Worker:
    """The process and its two pipes."""

    def __init__(self) -> None:
        if not sys.executable:
            raise MissingError(
                "Python does not say where its executable is (sys.executable is empty), so no"
                " worker can be started; set sys.executable to a Python that has this package"
            )
        self.owner = os.getpid()
        self.settings = _settings()
        self.released: list[int] = []
        self.words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as we do
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            bufsize=0,
        )

    @property
    def usable(self) -> bool:
        """Whether it is ours, runs, and was started under the settings that hold now."""
        mine = self.owner == os.getpid()
        return mine and self.process.poll() is None and self.settings == _settings()

    def ask(self, message: tuple[Any, ...], seconds: float) -> Any:
        """Send a task and wait for its answer."""
        deadline = time.monotonic() + seconds
        data = pickle.dumps((*message, self._take()), 5)
        self._write(len(data).to_bytes(_HEADER, "little") + data)
        size = int.from_bytes(self._read(_HEADER, deadline), "little")
        return pickle.loads(self._read(size, deadline))

    def _take(self) -> list[int]:
        released, self.released = self.released, []
        return released

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        view = memoryview(data)
        while view:
            view = view[self.process.stdin.write(view) :]

    def _read(self, count: int, deadline: float) -> bytearray:
        """Exactly `count` bytes of its answer."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        data = bytearray(count)
        view = memoryview(data)
        while view:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError
            got = os.readv(descriptor, [view])
            if not got:
                raise EOFError
            view = view[got:]
        return data

    def end(self) -> str:
        """Make sure that it is gone; how it ended, with its last words."""
        with contextlib.suppress(OSError):
            self.process.kill() if self.process.poll() is None and self._lingers() else None
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self.words.seek(0)
        lines = self.words.read().decode("utf-8", "replace").strip().splitlines()
        self.words.close()
        how = f"exit code {code}"
        if code < 0:
            how = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"{how}: {printable(lines[-1][-_TAIL:])}" if lines else how

    def _lingers(self) -> bool:
        """Whether it does not end by itself within a moment."""
        try:
            self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            return True
        return False


_lock = threading.RLock()
_worker: _Worker | None = None


def _settings() -> dict[str, str]:
    """The environment variables that decide what a worker does."""
    return {name: value for name, value in os.environ.items() if name.startswith(_OWN)}


def _current() -> _Worker | None:
    return _worker


def warm() -> None:
    """Start the worker without waiting for it: it gets ready while the caller does other things."""
    global _worker
    with _lock:
        if _worker is not None and not _worker.usable:
            stop()
        if _worker is None:
            _worker = _Worker()


def stop() -> None:
    """End the worker, if there is one; the next call starts another."""
    global _worker
    with _lock:
        worker, _worker = _worker, None
        if worker is not None and worker.owner == os.getpid():
            with contextlib.suppress(OSError):
                assert worker.process.stdin is not None
                worker.process.stdin.close()
            worker.end()


def call(
    task: str,
    *args: Any,
    what: str = "this model",
    memory: Budget | None = None,
    wait: Budget = SECONDS,
    seconds: float | None = None,
) -> Any:
    """Run a task in the worker and return its result.

    Args:
        task: "module:function", imported there.
        args: bytes, numbers, strings, NumPy arrays, and lists, tuples and dicts of them.
        what: the thing it runs on, for messages ("this region").
        memory: a budget of bytes that the task may take beyond what the worker holds already.
        wait: the budget that says how long to wait.
        seconds: how long, where that depends on more than the budget.

    Raises:
        CrashError: the worker died, or did not answer in time; it is gone, the caller lives on.
        RemoteError: the task raised something that is not ours.
        SfaError: what the task raised.
    """
    limit = wait.limit if seconds is None else seconds
    with _lock:
        warm()
        worker = _worker
        assert worker is not None
        try:
            answer = worker.ask((task, args, None if memory is None else memory.limit), limit)
        except TimeoutError:
            _drop(worker, kill=True)
            raise CrashError(
                f"the runtime did not come back on {what} within {limit:.0f} seconds, the budget"
                f" for {wait.name}; set {wait.variable} to wait longer"
            ) from None
        except (EOFError, OSError):
            how = _drop(worker, kill=False)
            raise CrashError(
                f"the runtime crashed on {what} ({how}); the model breaks a rule that the runtime"
                " does not check. Export it again, or leave that part out"
            ) from None
        except BaseException:  # Ctrl-C: its answer would be taken for that of the next call
            _drop(worker, kill=True)
            raise
    return _unpack(answer, memory)


def _drop(worker: _Worker, *, kill: bool) -> str:
    global _worker
    if worker is _worker:
        _worker = None
    if kill:
        with contextlib.suppress(OSError):
            worker.process.kill()
    return worker.end()


def _unpack(answer: tuple[Any, ...], memory: Budget | None) -> Any:
    kind, *rest = answer
    if kind == "done":
        return rest[0]
    name, text = rest
    ours = getattr(errors, name, None)
    if isinstance(ours, type) and issubclass(ours, SfaError):
        raise ours(text)
    if memory is not None and (
        name == "MemoryError" or "bad_alloc" in text or "Failed to allocate" in text
    ):
        raise errors.BudgetError(
            f"{text or name}: beyond the budget of {memory.limit} bytes for {memory.name}; set"
            f" {memory.variable} to raise it"
        )
    raise RemoteError(name, text)


atexit.register(stop)
