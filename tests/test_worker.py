"""The worker may die, hang or eat memory; the caller lives on and says what happened."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

import sfa_onnx
from sfa_onnx.errors import BudgetError, ContractError, CrashError
from sfa_onnx.guard import worker
from sfa_onnx.guard.budgets import INFERENCE, Budget
from sfa_onnx.guard.guarded import Stage, infer_shapes
from tests.hand_sites import several_sites


def small(op: str = "Add") -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, ["a", "b"], ["c"])],
        "small",
        [helper.make_tensor_value_info(n, TensorProto.DOUBLE, None) for n in "ab"],
        [helper.make_tensor_value_info("c", TensorProto.DOUBLE, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


FEEDS = {"a": np.arange(3.0), "b": np.ones(3)}


def test_a_death_is_an_error_and_the_next_call_works():
    stage = Stage(small())
    assert stage.run(["c"], FEEDS)[0].tolist() == [1, 2, 3]
    with pytest.raises(CrashError, match="crashed on this region \\(SIGABRT"):
        worker.call("os:abort", what="this region")
    with pytest.raises(CrashError, match="SIGSEGV"):
        worker.call("ctypes:string_at", 0)
    assert stage.run(["c"], FEEDS)[0].tolist() == [1, 2, 3], "opened again in the new worker"


def test_last_words_are_told_without_control_characters():
    with pytest.raises(CrashError) as caught:
        worker.call("tests.test_worker:last_words")
    assert "exit code 7: \\x1b[31mno more" in str(caught.value)


def last_words():
    """Runs in the worker."""
    sys.stderr.write("\x1b[31mno more\n")
    sys.stderr.flush()
    os._exit(7)


def test_a_task_that_does_not_come_back_is_ended():
    begin = time.monotonic()
    with pytest.raises(CrashError, match=r"did not come back.*SFA_ONNX_MAX_INFERENCE_SECONDS"):
        worker.call("time:sleep", 60, wait=INFERENCE, seconds=1.0)
    assert time.monotonic() - begin < 20
    assert worker.call("math:sqrt", 4.0) == 2.0


def test_the_reference_implementation_has_a_budget_of_its_own(monkeypatch):
    monkeypatch.setenv("SFA_ONNX_MAX_REFERENCE_SECONDS", "1")
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[N] x, int64[K,1] at) => (bool[K] y) { y = GatherND(x, at) }"""
    model = onnx.parser.parse_model(text)  # onnxruntime refuses the type of y
    stage = Stage(model)
    assert stage.engine == "onnx.reference"
    x = np.zeros(4, np.float32)
    assert len(stage.run(["y"], {"x": x, "at": np.zeros((2, 1), np.int64)})[0]) == 2
    with pytest.raises(CrashError, match="SFA_ONNX_MAX_REFERENCE_SECONDS"):
        stage.run(["y"], {"x": x, "at": np.zeros((8_000_000, 1), np.int64)})


def test_memory_has_a_budget_that_the_refusal_names():
    some = Budget("memory of one test", "SFA_ONNX_TEST", 1 << 28, "bytes")
    with pytest.raises(BudgetError, match="memory of one test"):
        worker.call("numpy:ones", 1 << 29, memory=some)
    assert worker.call("numpy:ones", 4, memory=some).tolist() == [1.0] * 4


def test_errors_come_back_as_what_they_are():
    with pytest.raises(worker.RemoteError, match=r"math domain error|nonnegative") as caught:
        worker.call("math:sqrt", -1.0)
    assert caught.value.kind == "ValueError"
    with pytest.raises(ContractError, match="by hand"):
        worker.call("tests.test_worker:refuse")


def refuse():
    """Runs in the worker."""
    raise ContractError("by hand")


def test_sessions_go_when_their_stages_go():
    before = worker.call("tests.test_worker:held")
    stages = [Stage(small()) for _ in range(5)]
    assert worker.call("tests.test_worker:held") == before + 5
    del stages
    worker.call("math:sqrt", 4.0)
    assert worker.call("tests.test_worker:held") <= before


def held():
    """Runs in the worker."""
    from sfa_onnx.guard import serve

    return len(serve._kept)


def test_many_threads_share_it():
    results = []

    def work():
        stage = Stage(small("Mul"))
        results.extend(
            stage.run(["c"], {"a": np.full(2, float(i)), "b": np.ones(2)})[0][0] for i in range(20)
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted([float(i) for i in range(20)] * 4)


def test_it_ends_with_its_caller():
    code = (
        "import os\nfrom sfa_onnx.guard import worker\n"
        "print(worker.call('os:getpid'), flush=True)\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            if not Path(f"/proc/{pid}/cmdline").read_text():
                return  # a zombie
        except OSError:
            return
        time.sleep(0.1)
    raise AssertionError("the worker outlived its caller")


def test_sizes_below_zero_never_reach_onnx():
    """onnx's inference aborts on them in front of Slice: std::clamp with bounds the wrong way."""
    graph = helper.make_graph(
        [helper.make_node("Slice", ["x", "s", "e"], ["y"])],
        "slice",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, -1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            helper.make_tensor("s", TensorProto.INT64, [2], [0, 0]),
            helper.make_tensor("e", TensorProto.INT64, [2], [1, 1]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    inferred, problem = infer_shapes(model, data_prop=True)
    assert inferred is not None, problem
    assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_value == -1


def test_one_site_that_kills_the_runtime_leaves_the_others(monkeypatch):
    """The region of one site brings the worker down; the two others fuse."""
    from sfa_onnx.guard import guarded

    whole = guarded.call

    def dying(task, *args, **kw):
        if task.endswith("open_stage") and b"l0_" in args[0]:
            return whole("os:abort", what=kw["what"])
        return whole(task, *args, **kw)

    monkeypatch.setattr(guarded, "call", dying)
    report = sfa_onnx.fuse(several_sites(3)[0])
    assert [s.status for s in report.sites].count("fused") == 2, [s.reason for s in report.sites]
    (refused,) = report.refused
    assert "the runtime crashed on this region (SIGABRT" in refused.reason
