"""Whether a whole model may run: loops that never end are not begun."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.errors import ModelError
from sfa_onnx.runtime.compare import compare
from sfa_onnx.runtime.compare.room import check_end

INFO, NODE = helper.make_tensor_value_info, helper.make_node
ENDLESS = {
    "nothing said": ("", "", "given"),
    "from true on": ("", "true", "given"),
    "always true": ("", "true", "true"),
    "as while is written": ("most", "true", "true"),
}
ENDING = {
    "turns": ("three", "true", "true"),
    "computed turns": ("n", "true", "true"),
    "perhaps not begun": ("", "c", "true"),
    "not begun": ("", "false", "true"),
    "stopped by itself": ("most", "true", "computed"),
    "false at once": ("", "true", "false"),
}


def loop(turns: str, start: str, condition: str, inner: bool = False) -> onnx.ModelProto:
    values = {
        "most": np.int64(2**63 - 1),
        "three": np.int64(3),
        "true": np.array([True]),
        "false": np.array(False),
    }
    inits = [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()]
    less = NODE("Less", ["x_in", "x_in"], ["computed"])
    named = {"given": "cond_in"}.get(condition, condition)
    nodes = [
        less, NODE("Identity", [named], ["mid"]), NODE("Identity", ["mid"], ["cond_out"]),
        NODE("Add", ["x_in", "x_in"], ["x_out"]),
    ]  # fmt: skip
    body = helper.make_graph(
        nodes, "body",
        [INFO("i", 7, []), INFO("cond_in", 9, []), INFO("x_in", 1, [])],
        [INFO("cond_out", 9, []), INFO("x_out", 1, [])],
    )  # fmt: skip
    made = NODE("Loop", [turns, start, "x"], ["y"], "turn", body=body)
    if inner:
        branch = helper.make_graph([made], "branch", [], [INFO("y", 1, [])])
        made = NODE("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph(
        [made], "g",
        [INFO("x", 1, []), INFO("n", TensorProto.INT64, []), INFO("c", TensorProto.BOOL, [])],
        [INFO(made.output[0], 1, [])], inits,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", ENDLESS)
def test_a_loop_that_nothing_stops_is_not_begun(name: str, inner: bool) -> None:
    with pytest.raises(ModelError, match=r"turn \(Loop\) never ends"):
        check_end(loop(*ENDLESS[name], inner=inner))


@pytest.mark.parametrize("name", ENDING)
def test_a_loop_that_may_end_is_run(name: str) -> None:
    check_end(loop(*ENDING[name]))


def test_a_condition_is_not_the_constant_of_another_body() -> None:
    """Bodies side by side use the same names, as those of one exporter do."""
    model = loop("most", "true", "computed")
    branch = helper.make_graph(
        [NODE("Constant", [], ["computed"], value=numpy_helper.from_array(np.array(True)))],
        "branch", [], [INFO("computed", 9, [])],
    )  # fmt: skip
    model.graph.node.append(NODE("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
    check_end(model)


def test_a_comparison_says_that_it_did_not_wait() -> None:
    model = loop(*ENDLESS["as while is written"])
    report = compare(model, model)
    assert not report.passed
    assert "turn (Loop) never ends" in report.missing
    assert report.seconds < 60
