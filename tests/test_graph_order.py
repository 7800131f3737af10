"""Nodes in an order that runs, and what reaches the outputs of a graph."""

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sfa_onnx.errors import ModelError
from sfa_onnx.passes.graph.order import in_order, live_values, reads


def node(out, *inputs):
    return helper.make_node("Sum", list(inputs), [out])


def names(nodes):
    return [n.output[0] for n in nodes]


def test_late_nodes_move_to_their_first_reader():
    nodes = [node("a", "x"), node("b", "new"), node("c", "b"), node("new", "a", "", "x")]
    assert names(in_order(nodes)) == ["a", "new", "b", "c"]


@given(st.permutations(range(8)), st.data())
@settings(max_examples=60, deadline=None)
def test_any_order_becomes_one_that_runs(order, data):
    chosen = [data.draw(st.sets(st.integers(0, i - 1))) if i else set() for i in range(8)]
    nodes = [node(f"v{i}", "x", *(f"v{j}" for j in sorted(chosen[i]))) for i in range(8)]
    made = in_order([nodes[i] for i in order])
    seen = {"x"}
    for n in made:
        assert seen >= set(n.input)
        seen.update(n.output)
    assert len(made) == 8
    assert in_order(made) == made


@pytest.mark.parametrize("nodes", [[node("a", "a")], [node("a", "b"), node("b", "a")]])
def test_circles_are_named(nodes):
    with pytest.raises(ModelError, match="'a' depends on its own result"):
        in_order(nodes)


def test_what_a_body_captures_is_read():
    inner = helper.make_graph(
        [node("t", "outer", "own"), node("own", "x")],
        "body",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, [])],
    )
    branch = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    assert set(reads(branch)) == {"c", "outer", "x"}
    assert names(in_order([branch, node("outer", "x")])) == ["outer", "y"]
    graph = onnx.GraphProto(node=[node("outer", "x"), node("idle", "x"), branch])
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, []))
    assert {"y", "outer", "c", "x"} <= live_values(graph)
    assert "idle" not in live_values(graph)
