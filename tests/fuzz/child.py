"""The child's side of the fuzzer: run mutants one after the other and say what happens."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sfa_onnx.errors import FaultError, SfaError
from tests.fuzz.corpus import seeds
from tests.fuzz.mutate import mutant
from tests.fuzz.swift import be_swift
from tests.fuzz.verbs import VERBS, Behind, arguments

_MEMORY = Path("/dev/shm")  # a file system in memory, where there is one


class _Listen(logging.Handler):
    """Keeps what was logged with a traceback: faults that were caught on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Note the exception and the last line of ours that it passed."""
        if record.exc_info and record.exc_info[1]:
            self.faults.append(described(record.exc_info[1]))


def described(error: BaseException) -> str:
    """An exception, the last line of the package that it passed, and its text."""
    step, where = error.__traceback__, ""
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if "sfa_onnx" in name:
            where = f"{name.rpartition('sfa_onnx/')[2]}:{step.tb_lineno}"
        step = step.tb_next
    return f"{type(error).__name__} at {where}: {str(error)[:80]}"


def child(first: int, last: int, *, swift: bool) -> None:
    """Run mutants `first` to `last`; one JSON line before and after each verb."""
    report, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115, PTH123
    listen = _Listen()
    log = logging.getLogger("sfa_onnx")
    log.addHandler(listen)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    if swift:
        be_swift()
    models = list(seeds())
    for number in range(first, last):
        with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as name:
            path = Path(name) / "mutant.onnx"
            path.write_bytes(mutant(models, number))
            _one(number, path, report, listen, swift=swift)


def _one(number: int, path: Path, report: IO[str], listen: _Listen, *, swift: bool) -> None:
    run = _functions(path, number) if swift else _commands(path)
    for verb, code in run:
        line: dict[str, object] = {"n": number, "verb": verb}
        if code is not None:
            line |= {"code": code, "faults": list(listen.faults)}
        listen.faults.clear()
        print(json.dumps(line), file=report, flush=True)


def _commands(path: Path) -> Iterator[tuple[str, object]]:
    """Each verb twice: before, with None, and after, with its exit code."""
    from sfa_onnx.cli import main

    for verb in VERBS:
        yield verb, None
        code: object
        try:
            code = main(arguments(verb, path, path.parent))
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            code = described(error)
        yield verb, code


def _functions(path: Path, number: int) -> Iterator[tuple[str, object]]:
    for verb, call in Behind(path, path.parent, estimates=number % 10 == 0):
        yield verb, None
        code: object
        try:
            code = call() or "done"
        except FaultError as error:
            code = described(error.__cause__ or error)
        except SfaError as error:
            code = type(error).__name__
            with contextlib.suppress(AttributeError):
                code = "not sound" if "not a sound ONNX model" in str(error) else code
        except BaseException as error:
            code = described(error)
        yield verb, code
