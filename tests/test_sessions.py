"""Many sessions and threads over one library, over and over, and on both sides of a fork."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import sfa_onnx
from sfa_onnx import runtime
from tests.op_models import needs_library

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "cycle-sessions.py"


def _cycles() -> Any:
    spec = importlib.util.spec_from_file_location("cycle_sessions", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_library
def test_sessions_come_and_go_in_flat_memory():
    """Before domains were shared every session left 3 kB behind: 2 MB more than this allows."""
    environment = {**os.environ, "PYTHONPATH": str(Path(sfa_onnx.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--count", "1500"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["at the end"] - report["after a tenth"] < 2500, report


@needs_library
def test_sessions_of_many_threads_share_the_library():
    cycles = _cycles()
    data, results = cycles.model(), []
    shared = runtime.session(data)

    def work() -> None:
        for _ in range(5):
            results.append(cycles.cycle(data))
            results.append(float(runtime.run(shared, cycles.FEEDS)["written"].sum()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [4.0] * 80


@needs_library
def test_both_roundings_and_one_option_for_several_sessions():
    cycles = _cycles()
    options = ort.SessionOptions()
    data = cycles.model()
    assert [cycles.cycle(data, options) for _ in range(3)] == [4.0] * 3
    other = runtime.session(data, rounding="npu")
    assert np.array_equal(
        runtime.run(other, cycles.FEEDS)["written"],
        runtime.run(runtime.session(data), cycles.FEEDS)["written"],
    )


def _in_child(opened: bool) -> int:
    """Exit code of a forked child that opens a session of its own; 0: it computed what it must."""
    cycles = _cycles()
    data = cycles.model()
    if opened:
        assert cycles.cycle(data) == 4.0

    def child() -> None:
        os._exit(0 if cycles.cycle(data) == 4.0 else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        return -1
    assert process.exitcode is not None
    return process.exitcode


@needs_library
def test_a_fork_before_and_after_the_first_session():
    assert _in_child(opened=False) == 0
    assert _in_child(opened=True) == 0
    assert _cycles().cycle(_cycles().model()) == 4.0, "the parent goes on"
