"""The worker's side: read a task, run it, answer; until the pipe closes."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

__all__ = ["keep", "kept", "serve"]

_kept: dict[int, Any] = {}
_numbers = iter(range(1, 1 << 62))


def keep(thing: Any) -> int:
    """Hold on to something between tasks; the number by which `kept` finds it."""
    number = next(_numbers)
    _kept[number] = thing
    return number


def kept(number: int) -> Any:
    """What `keep` was given."""
    return _kept[number]


def serve() -> None:
    """Answer tasks from standard input until it closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # runtimes print; that is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as stream:  # noqa: PTH123
        stream.write("1000")  # when memory runs out, the worker goes first
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    for name in ("numpy", "ml_dtypes", "onnx.reference", "onnxruntime"):
        importlib.import_module(name)
    tasks = sys.stdin.buffer
    while header := tasks.read(8):
        task, args, memory, released = pickle.loads(
            _exactly(tasks, int.from_bytes(header, "little"))
        )
        for number in released:
            _kept.pop(number, None)
        _answer(answers, _run(task, args, memory))


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        os._exit(0)  # the caller is gone
    return data


def _watch(parent: int) -> None:
    """End with the caller, even in the middle of a task."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _run(task: str, args: tuple[Any, ...], memory: int | None) -> tuple[Any, ...]:
    module, _, name = task.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        with _at_most(memory):
            return "done", function(*args)
    except Exception as error:
        return "raised", type(error).__name__, str(error)


@contextlib.contextmanager
def _at_most(memory: int | None) -> Iterator[None]:
    """Let the address space grow by so many bytes and no more."""
    if memory is None:
        yield
        return
    with open("/proc/self/statm") as stream:  # noqa: PTH123
        pages = int(stream.read().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _answer(stream: IO[bytes], answer: tuple[Any, ...]) -> None:
    data = pickle.dumps(answer, 5)
    stream.write(len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()
