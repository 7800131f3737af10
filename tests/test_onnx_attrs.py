"""Attributes of nodes as Python values."""

import onnx
from onnx import TensorProto, helper

from sfa_onnx.files.onnx_attrs import attribute, attributes, find_attribute, subgraphs, value_of

NODE = helper.make_node(
    "Any", ["x"], ["y"], text="linear", number=3, real=0.5, many=[1, 2], empty=""
)


def test_values_are_pythons():
    expected = {"text": "linear", "number": 3, "real": 0.5, "many": [1, 2], "empty": ""}
    assert attributes(NODE) == expected
    assert attribute(NODE, "text") == "linear"
    assert attribute(NODE, "missing") is None
    assert attribute(NODE, "missing", 7) == 7
    assert attribute(NODE, "empty", "default") == ""
    assert find_attribute(NODE, "number").i == 3
    assert find_attribute(NODE, "missing") is None


def test_bytes_that_are_no_text_do_not_raise():
    proto = onnx.AttributeProto(name="s", type=onnx.AttributeProto.STRING, s=b"\xff")
    assert value_of(proto) == "\N{REPLACEMENT CHARACTER}"


def test_graphs_of_a_node():
    value = helper.make_tensor_value_info("v", TensorProto.FLOAT, [])
    graphs = [helper.make_graph([], name, [], [value]) for name in "abc"]
    node = helper.make_node("If", ["c"], ["y"], then_branch=graphs[0], more=graphs[1:])
    assert {g.name for g in subgraphs(node)} == {"a", "b", "c"}
    assert list(subgraphs(NODE)) == []
