"""Models that break one rule each, made from a sound one that holds a site."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import AttributeProto, ModelProto, TensorProto, helper

from tests.hand_sites import GATHER_INT8, model_of

__all__ = ["BROKEN", "doubling", "sound"]


def sound() -> ModelProto:
    """A small model with one site."""
    return model_of(GATHER_INT8)


def _node(model: ModelProto, op_type: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op_type)


def _cycle(m: ModelProto) -> None:
    node = _node(m, "Softmax")
    maker = next(n for n in m.graph.node if node.input[0] in n.output)
    maker.input[0] = node.output[0]


def _external(key: str, value: str) -> Callable[[ModelProto], None]:
    def change(m: ModelProto) -> None:
        tensor = m.graph.initializer[0]
        data = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for k, v in {"location": "w.bin", "offset": "0", "length": str(data), key: value}.items():
            tensor.external_data.add(key=k, value=v)

    return change


def _strings(m: ModelProto) -> None:
    _external("offset", "0")(m)
    m.graph.initializer[0].data_type = TensorProto.STRING


def _recursion(m: ModelProto) -> None:
    call = helper.make_node("Again", ["x"], ["y"], domain="local")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    m.functions.append(helper.make_function("local", "Again", ["x"], ["y"], [call], opsets))
    m.opset_import.append(helper.make_opsetid("local", 1))


def _drop_attribute(m: ModelProto) -> None:
    del _node(m, "Cast").attribute[:]


def _retype(m: ModelProto) -> None:
    attribute = _node(m, "Softmax").attribute
    del attribute[:]
    attribute.append(helper.make_attribute("axis", b"last"))


def _not_text(m: ModelProto) -> None:
    bad = AttributeProto(name="equation", type=AttributeProto.STRING, s=b"\xff\xfe")
    m.graph.node.add(op_type="Einsum", input=["q"], output=["odd"]).attribute.append(bad)


def _body(m: ModelProto) -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["nowhere"], ["r"])],
        "branch",
        [],
        [helper.make_tensor_value_info("r", 1, None)],
    )
    m.graph.node.append(
        helper.make_node("If", ["q"], ["z"], then_branch=branch, else_branch=branch)
    )


def _rename(old: str, new: str) -> Callable[[ModelProto], None]:
    def change(m: ModelProto) -> None:
        node = next(n for n in m.graph.node if old in n.input)
        node.input[list(node.input).index(old)] = new

    return change


def _twice(m: ModelProto) -> None:
    m.graph.node.add().CopyFrom(m.graph.node[0])


def _set(op_type: str, name: str, value: int) -> Callable[[ModelProto], None]:
    def change(m: ModelProto) -> None:
        node = _node(m, op_type)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def _add(op: str, outputs: int, name: str, value: object) -> Callable[[ModelProto], None]:
    def change(m: ModelProto) -> None:
        names = [f"new{i}" for i in range(outputs)]
        m.graph.node.append(helper.make_node(op, ["q"], names, **{name: value}))

    return change


def _nameless(m: ModelProto) -> None:
    m.graph.node[0].op_type = ""


def _short(m: ModelProto) -> None:
    m.graph.initializer[0].raw_data = b"\0\0\0"


def _negative(m: ModelProto) -> None:
    m.graph.initializer[0].dims.append(-3)


def _sparse(size: int, width: int = 1) -> Callable[[ModelProto], None]:
    """Two values in a tensor of `size`, their places in rows of `width`."""

    def change(m: ModelProto) -> None:
        values = helper.make_tensor("thin", TensorProto.FLOAT, [2], [1.0, 2.0])
        places = helper.make_tensor("at", TensorProto.INT64, [2, width], [0] * 2 * width)
        sparse = onnx.SparseTensorProto(values=values, indices=places, dims=[size])
        m.graph.sparse_initializer.append(sparse)

    return change


def _far_place(m: ModelProto) -> None:
    _sparse(4)(m)
    m.graph.sparse_initializer[0].indices.int64_data[1] = 4


def _empty_branches(m: ModelProto) -> None:
    branch = helper.make_graph([], "branch", [], [])
    m.graph.node.append(
        helper.make_node("If", ["q"], ["z"], then_branch=branch, else_branch=branch)
    )


def _unknown_tensor(m: ModelProto) -> None:
    m.graph.initializer[0].data_type = 99


def _unknown_input(m: ModelProto) -> None:
    m.graph.input[0].type.tensor_type.elem_type = 99


def _opset(m: ModelProto) -> None:
    m.opset_import[0].version = -4


def _fewer(m: ModelProto) -> None:
    del _node(m, "Sub").input[1:]


def _more(m: ModelProto) -> None:
    _node(m, "Softmax").input.append("q")


def _empty(m: ModelProto) -> None:
    _node(m, "Einsum").input[1] = ""


def _no_outputs(m: ModelProto) -> None:
    m.graph.node.add(op_type="Relu", input=["q"])


def _output(m: ModelProto) -> None:
    m.graph.output.add(name="nothing")


def doubling(depth: int) -> ModelProto:
    """A chain of functions, each calling the next one twice: 2^depth nodes when unfolded."""
    model = sound()
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    for level in range(depth):
        inner = f"F{level + 1}" if level + 1 < depth else "Softmax"
        domain = "local" if level + 1 < depth else ""
        nodes = [
            helper.make_node(inner, ["x"], ["m"], domain=domain),
            helper.make_node(inner, ["m"], ["y"], domain=domain),
        ]
        model.functions.append(
            helper.make_function("local", f"F{level}", ["x"], ["y"], nodes, opsets)
        )
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("F0", ["q"], ["folded"], domain="local"))
    return model


# name -> (what breaks the model, what the refusal says)
BROKEN: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "sparse beyond any memory": (_sparse(1 << 61), "when it is stored dense"),
    "sparse below zero": (_sparse(-4), "expected no negative size"),
    "sparse places of another rank": (_sparse(4, 3), "has indices of the shape [2, 3]"),
    "sparse place outside": (_far_place, "has a value at place 4 on axis 0, expected 0 to 3"),
    "branches without outputs": (_empty_branches, "of 0 outputs, expected 1"),
    "cycle": (_cycle, "depends on itself"),
    "unmade": (_rename("q", "nowhere"), "'nowhere', which nothing makes"),
    "unmade in a body": (_body, "'nowhere'"),
    "unmade output": (_output, "output 'nothing' reads 'nothing'"),
    "made twice": (_twice, "is made twice"),
    "no operator": (_nameless, "has no operator"),
    "offset of letters": (_external("offset", "12kb"), "external offset '12kb'"),
    "offset below zero": (_external("offset", "-1"), "external offset '-1'"),
    "length of letters": (_external("length", "all"), "external length 'all'"),
    "wrong length": (_external("length", "7777"), "7777 external bytes"),
    "no location": (_external("location", ""), "names no file"),
    "weights of strings": (_strings, "holds strings in an external file"),
    "too few bytes": (_short, "holds 3 bytes, expected"),
    "negative size": (_negative, "expected no negative size"),
    "unknown element type": (_unknown_tensor, "element type 99"),
    "unknown input type": (_unknown_input, "element type 99"),
    "missing attribute": (_drop_attribute, "lacks the attribute 'to'"),
    "ill-typed attribute": (_retype, "'axis' of type STRING, expected INT"),
    "attribute that is no text": (_not_text, "not UTF-8 text"),
    "fewer inputs": (_fewer, "has 1 inputs, expected 2"),
    "more inputs": (_more, "has 2 inputs, expected 1"),
    "empty input": (_empty, "leaves input 1 empty"),
    "no outputs": (_no_outputs, "has 0 outputs, expected 1"),
    "recursive function": (_recursion, "calls itself"),
    "axis of no tensor": (_set("Softmax", "axis", 1 << 31), "expected an axis"),
    "batch below zero": (_set("GatherND", "batch_dims", -1), "leading axes"),
    "cast to no type": (_set("Cast", "to", 1 << 31), "an element type that onnx"),
    "axes twice": (_add("Transpose", 1, "perm", [0, 0]), "expected every axis once"),
    "other number of parts": (_add("Split", 2, "num_outputs", 1 << 31), "number of outputs, 2"),
    "opset below one": (_opset, "imports opset -4"),
}
