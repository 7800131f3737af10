"""Attributes of nodes as Python values."""

import onnx
from onnx import TensorProto, helper

from sfa_onnx.files.onnx_attrs import (
    attribute,
    attributes,
    constants,
    find_attribute,
    subgraphs,
    value_of,
)

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


def test_constants_of_a_body_are_its_own_and_what_it_does_not_name_again() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (bool c, float[1] x) => (float[1] y) <int64[1] a = {1}, int64[1] b = {2}> {
          k = Constant<value = int64[1] {3}>()
          y = If(c) <
            then_branch = t () => (float[1] z) { a = Constant<value = int64[1] {4}>()
                                                b = Shape(x)
                                                z = Identity(x) },
            else_branch = e () => (float[1] z) { z = Identity(x) }>
        }"""
    )
    outer = constants(model.graph, {})
    first, second = subgraphs(model.graph.node[1])

    def read(graph: onnx.GraphProto) -> dict[str, int]:
        known = constants(graph, outer)
        return {name: int(onnx.numpy_helper.to_array(t)[0]) for name, t in known.items()}

    assert read(second) == {"a": 1, "b": 2, "k": 3}
    assert read(first) == {"a": 4, "k": 3}
