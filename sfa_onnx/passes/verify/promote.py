"""Rewrite a small model so that all its floating-point arithmetic happens in float64.

Types, constants and casts become double; the mathematics stays. Then a site and its replacement
must agree to about 1e-15, so a tolerance of 1e-9 separates look-alikes that hide below any
tolerance in float32 or half precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.files.onnx_attrs import find_attribute
from sfa_onnx.passes.values.logic import LINEAR

__all__ = ["FLOAT_TYPES", "promote"]

FLOAT_TYPES = frozenset((TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16))
_DOUBLE = TensorProto.DOUBLE
_F32_MIN = float(np.finfo(np.float32).min)
_IRRATIONAL = (math.log2(math.e), math.log(2.0))  # base-2 softmax: the pair must multiply to one
_BITS = {"BitCast"}  # their output type is a fact about bits, not about precision


def promote(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` in float64; integer and boolean values keep their types.

    The lowest finite float16 and bfloat16, which masks use for "minus infinity", become float32's;
    roundings of log2(e) and ln(2) become the numbers they stand for, and so does a softplus that is
    the identity from a number on.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for value in graph.input:
        kind = value.type.tensor_type
        if kind.elem_type in FLOAT_TYPES:
            kind.elem_type = _DOUBLE
    tensors = [_double(t) for t in graph.initializer]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    nodes = [new for node in graph.node for new in _promote_node(node)]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    _complete_softplus(graph)
    return result


def _complete_softplus(graph: onnx.GraphProto) -> None:
    """Where(x > 20, x, Softplus(x)) becomes Softplus(x): in float32 the two are one number."""
    made = {o: node for node in graph.node for o in node.output}
    numbers = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for name, node in made.items():
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            numbers[name] = numpy_helper.to_array(node.attribute[0].t)
    for node in graph.node:
        if node.op_type != "Where":
            continue
        test, smooth = made.get(node.input[0]), made.get(node.input[2])
        if not test or not smooth or (test.op_type, smooth.op_type) != ("Greater", "Softplus"):
            continue
        same = test.input[0] == node.input[1] == smooth.input[0]
        limit = numbers.get(test.input[1])
        if same and limit is not None and bool((limit >= LINEAR).all()):
            node.CopyFrom(helper.make_node("Identity", [smooth.output[0]], node.output, node.name))


def _promote_node(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes that stand for `node` in double."""
    special = _SPECIAL.get(node.op_type)
    if special is not None and node.domain in ("", "ai.onnx"):
        return special(node)
    if node.op_type in _BITS:
        return _bits(node)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            attribute.t.CopyFrom(_double(attribute.t))
    return [node]


def _cast(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    to = find_attribute(node, "to")
    if to is not None and to.i in FLOAT_TYPES:
        to.i = _DOUBLE
    return [node]


def _constant(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    for attribute in node.attribute:
        if attribute.name == "value":
            attribute.t.CopyFrom(_double(attribute.t))
        elif attribute.name in ("value_float", "value_floats"):
            single = attribute.name == "value_float"
            array = np.array(attribute.f if single else list(attribute.floats), np.float32)
            value = _double(numpy_helper.from_array(array))
            return [helper.make_node("Constant", [], node.output, node.name, value=value)]
    return [node]


def _constant_of_shape(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    value = find_attribute(node, "value")
    if value is None:  # the default is a float32 zero
        zero = helper.make_tensor("value", _DOUBLE, [1], [0.0])
        node.attribute.append(helper.make_attribute("value", zero))
    else:
        value.t.CopyFrom(_double(value.t))
    return [node]


def _attention(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The softmax of the Attention op works in the type of its inputs."""
    kept = [a for a in node.attribute if a.name != "softmax_precision"]
    attributes = {a.name: a for a in kept}
    del node.attribute[:]
    node.attribute.extend(attributes.values())
    return [node]


def _bits(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Keep the bits and widen what they spell."""
    to = find_attribute(node, "to")
    if to is None or to.i not in FLOAT_TYPES:
        return [node]
    name = node.output[0]
    node.output[0] = f"{name}__bits"
    return [node, helper.make_node("Cast", [node.output[0]], [name], to=_DOUBLE)]


def _dequantize(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """(x - zero_point) * scale: runtimes have no DequantizeLinear in double."""
    data, scale, out = node.input[0], node.input[1], node.output[0]
    axis = find_attribute(node, "axis")
    block = find_attribute(node, "block_size")
    if block is not None and block.i:
        return [node]  # left as it is: running it fails, and the site is refused
    nodes = [helper.make_node("Cast", [data], [f"{out}__x"], to=_DOUBLE)]
    shaped = _per_axis(nodes, data, scale, axis.i if axis is not None else 1, out)
    value = f"{out}__x"
    if len(node.input) > 2 and node.input[2]:
        nodes.append(helper.make_node("Cast", [node.input[2]], [f"{out}__zp"], to=_DOUBLE))
        zero = _per_axis(nodes, data, f"{out}__zp", axis.i if axis is not None else 1, out + "__z")
        nodes.append(helper.make_node("Sub", [value, zero], [f"{out}__d"]))
        value = f"{out}__d"
    nodes.append(helper.make_node("Mul", [value, shaped], [out]))
    return nodes


def _one_hot(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Where(index == position, on, off): runtimes have no OneHot in double."""
    axis = find_attribute(node, "axis")
    if axis is not None and axis.i != -1:
        return [node]
    out = node.output[0]
    names = iter(f"{out}__h{i}" for i in range(20))
    nodes: list[onnx.NodeProto] = []

    def emit(op: str, *inputs: str, **attributes: Any) -> str:
        name = next(names)
        nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def const(*numbers: int, scalar: bool = True) -> str:
        array = np.array(numbers[0] if scalar else numbers, np.int64)
        return emit("Constant", value=numpy_helper.from_array(array))

    zero, one, last = const(0), const(1), const(-1, scalar=False)
    depth = emit("Squeeze", emit("Cast", node.input[1], to=TensorProto.INT64))
    index = emit("Cast", node.input[0], to=TensorProto.INT64)
    index = emit("Where", emit("Less", index, zero), emit("Add", index, depth), index)
    hit = emit("Equal", emit("Unsqueeze", index, last), emit("Range", zero, depth, one))
    off, on = (emit("Gather", node.input[2], i, axis=0) for i in (zero, one))
    return [*nodes, helper.make_node("Where", [hit, on, off], [out])]


def _per_axis(nodes: list[onnx.NodeProto], data: str, scale: str, axis: int, stem: str) -> str:
    """`scale` (a scalar or [n] along `axis`) reshaped so that it broadcasts against `data`.

    shape = ones with -1 at `axis`; a scalar reshapes to ones too (the -1 resolves to 1).
    """
    names = {k: f"{stem}__{k}" for k in ("shape", "rank", "ones", "minus", "pos", "target", "out")}
    one, minus = np.array([1], np.int64), np.array([-1], np.int64)

    def const(value: np.ndarray, name: str) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))

    nodes += [
        helper.make_node("Shape", [data], [names["shape"]]),
        helper.make_node("Shape", [names["shape"]], [names["rank"]]),
        helper.make_node(
            "ConstantOfShape", [names["rank"]], [names["ones"]], value=numpy_helper.from_array(one)
        ),
        const(minus, names["minus"]),
        const(np.array([axis], np.int64), names["pos"]),
        helper.make_node(
            "ScatterElements",
            [names["ones"], names["pos"], names["minus"]],
            [names["target"]],
            axis=0,
        ),
        helper.make_node("Reshape", [scale, names["target"]], [names["out"]]),
    ]
    return names["out"]


def _double(tensor: TensorProto) -> TensorProto:
    """`tensor` in double, when it is a float tensor; its name is kept."""
    if tensor.data_type not in FLOAT_TYPES:
        return tensor
    array = numpy_helper.to_array(tensor)
    wide = _adapt(np.asarray(array).astype(np.float64), np.dtype(array.dtype))
    return numpy_helper.from_array(wide, tensor.name)


def _adapt(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Replace what only makes sense in the narrow type: its lowest value, rounded irrationals."""
    lowest = float(ml_dtypes.finfo(dtype).min)
    array = np.where(array == lowest, _F32_MIN, array)
    for number in _IRRATIONAL:
        rounded = float(np.asarray(number).astype(dtype))
        array = np.where(array == rounded, number, array)
    return array


_SPECIAL: dict[str, Callable[[onnx.NodeProto], list[onnx.NodeProto]]] = {
    "Attention": _attention,
    "Cast": _cast,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DequantizeLinear": _dequantize,
    "OneHot": _one_hot,
}
