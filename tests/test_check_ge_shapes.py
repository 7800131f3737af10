"""GE's shape rules replayed: what the parser loses shows in shapes, and sound files stay quiet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper

from sfa_onnx.ascend.cann import CANN_VERSIONS
from sfa_onnx.ascend.checks import Finding, check
from sfa_onnx.ascend.flavour import convert
from tests.check_models import pack, paged, sfa
from tests.test_flavour import build
from tests.test_flavour_norms import norm
from tests.test_flavour_reductions import reduction

N = helper.make_node


def clashes(model: ModelProto, line: str = "9.1") -> list[Finding]:
    return [f for f in check(model, cann=line).findings if f.rule == "shape-contradiction"]


def test_a_lost_mean_shows_in_the_declared_output() -> None:
    model = reduction("ReduceMean", (-1,), dims=(2, 3, 8))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, [2, 3, 1]))
    for line in ("8.5", "9.0", "9.1"):
        (found,) = clashes(model, line)
        assert "'y' is declared [2, 3, 1], GE will infer [2, 3, 8]" in found.message
        assert "it begins at ReduceMean r" in found.message
    assert not clashes(model, "9.2")
    for line in CANN_VERSIONS:
        assert not clashes(convert(model, cann=line).model, line)


def test_where_it_begins_is_said_for_outputs_far_behind() -> None:
    model = reduction("ReduceMax", (-1,), keep=0, dims=(2, 3, 8))
    model.graph.node[0].output[0] = "m"
    model.graph.node.extend([N("Neg", ["m"], ["n"], "neg"), N("Exp", ["n"], ["y"], "exp")])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, [2, 3]))
    (found,) = clashes(model, "8.5")
    assert found.nodes == ("r",)
    assert not clashes(model, "9.1")


@pytest.mark.parametrize("build_model", [sfa, paged, pack, lambda: sfa(int8=False)])
def test_our_operators_infer_what_their_files_declare(build_model: Any) -> None:
    model = build_model()
    for line in ("9.1", "9.2"):
        assert not clashes(model, line)
    assert not clashes(convert(model, cann="9.1").model)


def test_norms_and_everything_around_them_stay_quiet() -> None:
    for residual in (False, True):
        assert not clashes(convert(norm(residual=residual), cann="9.1").model)


CHAINS = {
    "matmul": ([N("MatMul", ["x", "w"], ["y"])], [("w", (8, 5))], [2, 3, 5]),
    "reshape": ([N("Reshape", ["x", "s"], ["y"])], [("s", np.array([0, -1]))], [2, 24]),
    "unsqueeze": ([N("Unsqueeze", ["x", "a"], ["y"])], [("a", np.array([-1, 0]))], [1, 2, 3, 8, 1]),
    "transpose": ([N("Transpose", ["x"], ["y"], perm=[2, 0, 1])], [], [8, 2, 3]),
    "gather": ([N("Gather", ["x", "i"], ["y"], axis=1)], [("i", np.array([[0, 1]]))], [2, 1, 2, 8]),
    "concat": ([N("Concat", ["x", "x"], ["y"], axis=-1)], [], [2, 3, 16]),
    "top_k": ([N("TopK", ["x", "k"], ["y", "j"])], [("k", np.array([4]))], [2, 3, 4]),
    "broadcast": ([N("Add", ["x", "w"], ["y"])], [("w", (4, 1, 3, 1))], [4, 2, 3, 8]),
}


def chain(name: str, declared: list[int]) -> ModelProto:
    nodes, inits, _ = CHAINS[name]
    given = [(n, np.zeros(v, np.float32) if isinstance(v, tuple) else v) for n, v in inits]
    return build(nodes, [("x", 1, [2, 3, 8])], [("y", 1, declared)], inits=given)


@pytest.mark.parametrize("name", CHAINS)
def test_rules_of_simple_operators(name: str) -> None:
    right = CHAINS[name][2]
    assert not clashes(chain(name, right))


def test_shapes_that_do_not_meet_are_refused() -> None:
    nodes = [N("Add", ["x", "w"], ["t"], "a"), N("Neg", ["t"], ["y"], "n")]
    model = build(nodes, [("x", 1, [2, 3]), ("w", 1, [2, 4])], [("y", 1, [2, 3])])
    messages = [f.message for f in clashes(model)]
    assert any("GE's shape rule of Add refuses: [2, 3], [2, 4] do not broadcast" in m
               for m in messages)  # fmt: skip


@pytest.mark.parametrize(
    ("op", "axes"), [("Unsqueeze", [1, 1]), ("Unsqueeze", [5]), ("Squeeze", [0, -3])]
)
def test_an_axis_that_is_named_twice_or_not_there_is_refused(op: str, axes: list[int]) -> None:
    nodes = [N(op, ["x", "a"], ["y"], "s")]
    dims = [2, 3, 8] if op == "Unsqueeze" else [1, 3, 8]
    given = [("a", np.array(axes))]
    found = clashes(build(nodes, [("x", 1, dims)], [("y", 1, None)], inits=given))
    assert [f"refuses: axes {axes} of a tensor of rank" in f.message for f in found] == [True]


@pytest.mark.parametrize("op", ["Unsqueeze", "Squeeze", "Reshape", "TopK"])
def test_a_constant_of_floats_where_whole_numbers_belong_tells_nothing(op: str) -> None:
    outputs = ["y", "j"] if op == "TopK" else ["y"]
    given = [("a", np.array([-np.inf, np.nan], np.float32)[: 1 if op == "TopK" else 2])]
    model = build([N(op, ["x", "a"], outputs)], [("x", 1, [2, 3, 8])], [("y", 1, None)],
                  inits=given)  # fmt: skip
    assert not clashes(model)


def test_open_dims_contradict_nothing() -> None:
    model = build([N("Neg", ["x"], ["y"])], [("x", 1, ["b", 3])], [("y", 1, ["other", 3])])
    assert not clashes(model)


def test_an_operator_of_another_domain_is_not_taken_for_onnx_own() -> None:
    for name in ("MatMul", "GatherND", "Softmax", "NPURmsNorm"):
        for given in (["x"], []):
            node = N(name, given, ["y"], "n0", domain="npu")
            model = build([node], [("x", 1, [2, 4])], [("y", 1, [3])])
            model.opset_import.append(helper.make_opsetid("npu", 1))
            assert bool(clashes(model)) == (name == "NPURmsNorm" and bool(given))
