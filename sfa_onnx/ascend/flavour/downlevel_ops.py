"""Our own rewrites of newer operators in terms of opset <= 18.

Used where onnx has no function body, or where a body written for every case would leave dozens of
nodes for the compiler to fold away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from sfa_onnx.ascend.flavour.scope import Scope
from sfa_onnx.errors import ModelError
from sfa_onnx.files.onnx_attrs import attribute

__all__ = ["REWRITES"]

_WIDTH_PAIRS: dict[tuple[int, int], int] = {
    (TensorProto.UINT8, TensorProto.INT8): 8,
    (TensorProto.INT8, TensorProto.UINT8): 8,
    (TensorProto.UINT16, TensorProto.INT16): 16,
    (TensorProto.INT16, TensorProto.UINT16): 16,
    (TensorProto.UINT32, TensorProto.INT32): 32,
    (TensorProto.INT32, TensorProto.UINT32): 32,
}
# float type -> (exponent bits, mantissa bits)
_FORMATS: dict[int, tuple[int, int]] = {
    TensorProto.FLOAT: (8, 23),
    TensorProto.FLOAT16: (5, 10),
    TensorProto.BFLOAT16: (8, 7),
}
_FLOAT_PAIRS: set[tuple[int, int]] = {
    (TensorProto.INT32, TensorProto.FLOAT),
    (TensorProto.UINT32, TensorProto.FLOAT),
    *((i, f) for i in (4, 5) for f in (TensorProto.FLOAT16, TensorProto.BFLOAT16)),
}
_SIGNED = (TensorProto.INT8, TensorProto.INT16, TensorProto.INT32)


def _cast(scope: Scope, name: str, to: int, label: str) -> tuple[list[NodeProto], str]:
    """Cast `name` unless it has that type already."""
    if scope.dtype(name) == to:
        return [], name
    node = scope.node("Cast", [name], f"{label}/cast", dtype=to, dims=scope.dims(name), to=to)
    return [node], node.output[0]


def rms_normalization(scope: Scope, node: NodeProto) -> list[NodeProto]:
    """RMSNormalization-23: x / sqrt(mean(x^2) + epsilon) in the stash type, times scale."""
    x, scale = node.input[:2]
    rank, axis = scope.rank(x), int(attribute(node, "axis", -1))
    if rank is None and axis >= 0:
        raise ModelError(f"node {node.name!r}: RMSNormalization with axis {axis} of unknown rank")
    axes = list(range(axis if axis < 0 else axis - (rank or 0), 0))
    stash, own = int(attribute(node, "stash_type", 1)), scope.dtype(x)
    label, dims = node.name or "RMSNormalization", scope.dims(x)
    nodes, wide = _cast(scope, x, stash, label) if own else _always_cast(scope, x, stash, label)
    square = scope.node("Mul", [wide, wide], f"{label}/square", dtype=stash, dims=dims)
    mean = _reduce_mean(scope, square.output[0], axes, label, stash)
    epsilon = attribute(node, "epsilon", 1e-5)
    eps = scope.constant(epsilon, f"{label}/epsilon", np.float32)
    nodes += [square, mean]
    if stash != TensorProto.FLOAT:
        more, eps = _cast(scope, eps, stash, label)
        nodes += more
    plus = scope.node("Add", [mean.output[0], eps], f"{label}/plus_epsilon", dtype=stash)
    root = scope.node("Sqrt", [plus.output[0]], f"{label}/rms", dtype=stash)
    unit = scope.node("Div", [wide, root.output[0]], f"{label}/normalized", dtype=stash, dims=dims)
    nodes += [plus, root, unit]
    target = scope.dtype(scale) or own
    narrow = unit.output[0]
    if target and target != stash:
        more, narrow = _cast(scope, narrow, target, label)
        nodes += more
    elif not target:
        like = scope.node("CastLike", [narrow, scale], f"{label}/cast_like")
        nodes, narrow = [*nodes, like], like.output[0]
    return [*nodes, scope.replace(node, "Mul", [narrow, scale])]


def _always_cast(scope: Scope, x: str, to: int, label: str) -> tuple[list[NodeProto], str]:
    node = scope.node("Cast", [x], f"{label}/cast", dtype=to, to=to)
    return [node], node.output[0]


def _reduce_mean(scope: Scope, x: str, axes: list[int], label: str, dtype: int) -> NodeProto:
    if scope.opset >= 18:
        wanted = scope.constant(axes, f"{label}/axes")
        return scope.node("ReduceMean", [x, wanted], f"{label}/mean", dtype=dtype, keepdims=1)
    return scope.node("ReduceMean", [x], f"{label}/mean", dtype=dtype, axes=axes, keepdims=1)


def swish(scope: Scope, node: NodeProto) -> list[NodeProto]:
    """Swish-24: x * sigmoid(alpha * x)."""
    x, alpha, label = node.input[0], float(attribute(node, "alpha", 1.0)), node.name or "Swish"
    nodes, inner = [], x
    if alpha != 1.0:
        factor = scope.constant(alpha, f"{label}/alpha", np.float32)
        if scope.dtype(x) != TensorProto.FLOAT:
            like = scope.node("CastLike", [factor, x], f"{label}/alpha_like")
            nodes, factor = [like], like.output[0]
        scaled = scope.node("Mul", [x, factor], f"{label}/scaled")
        nodes, inner = [*nodes, scaled], scaled.output[0]
    gate = scope.node("Sigmoid", [inner], f"{label}/gate")
    return [*nodes, gate, scope.replace(node, "Mul", [x, gate.output[0]])]


def bit_cast(scope: Scope, node: NodeProto) -> list[NodeProto]:
    """BitCast-26 from integers, by exact arithmetic; reading a float's bits is refused."""
    source, target = scope.dtype(node.input[0]), int(attribute(node, "to", 0))
    label = node.name or "BitCast"
    if source == target and source:
        return [scope.replace(node, "Identity", [node.input[0]])]
    if (source, target) in _FLOAT_PAIRS:
        return bits_to_float(scope, node, target)
    width = _WIDTH_PAIRS.get((source, target))
    if width is None:
        kinds = [TensorProto.DataType.Name(t) if t else "unknown" for t in (source, target)]
        raise ModelError(
            f"node {label!r}: BitCast {kinds[0]} -> {kinds[1]} has no form at opset 18 (no standard"
            " operator reads a float's bits); move it out of the graph, or export this part as a"
            " graph input of the target type"
        )
    modulus = scope.constant(2**width, f"{label}/modulus")
    wide = scope.node("Cast", [node.input[0]], f"{label}/wide", to=TensorProto.INT64)
    to_signed = target in _SIGNED
    edge = scope.constant(2 ** (width - 1) if to_signed else 0, f"{label}/edge")
    below = scope.node("Less", [wide.output[0], edge], f"{label}/below")
    moved = scope.node("Sub" if to_signed else "Add", [wide.output[0], modulus], f"{label}/wrapped")
    picks = [wide.output[0], moved.output[0]] if to_signed else [moved.output[0], wide.output[0]]
    pick = scope.node("Where", [below.output[0], *picks], f"{label}/picked")
    narrow = scope.replace(node, "Cast", [pick.output[0]], to=target)
    return [wide, below, moved, pick, narrow]


def bits_to_float(scope: Scope, node: NodeProto, target: int) -> list[NodeProto]:
    """The float whose bits an integer holds: sign * mantissa * 2^exponent, every step exact.

    The power of two is applied in two halves, so that neither over- nor underflows before its time;
    a NaN loses its payload.
    """
    exponent_bits, mantissa_bits = _FORMATS[target]
    label, nodes = node.name or "BitCast", []

    def add(op_type: str, inputs: list[str], part: str, **attributes: Any) -> str:
        made = scope.node(op_type, inputs, f"{label}/{part}", **attributes)
        nodes.append(made)
        return str(made.output[0])

    def number(value: int, part: str) -> str:
        return scope.constant(value, f"{label}/{part}")

    width = 1 + exponent_bits + mantissa_bits
    wide = add("Cast", [node.input[0]], "wide", to=TensorProto.INT64)
    below = add("Less", [wide, number(0, "zero")], "negative")
    wrapped = add("Add", [wide, number(2**width, "modulus")], "wrapped")
    bits = add("Where", [below, wrapped, wide], "bits")
    unit = number(2**mantissa_bits, "unit")
    mantissa = add("Mod", [bits, unit], "mantissa")
    upper = add("Div", [bits, unit], "upper")
    spread = number(2**exponent_bits, "exponents")
    exponent = add("Mod", [upper, spread], "exponent")
    sign = add("Div", [upper, spread], "sign")
    normal = np.array([0] + [2**mantissa_bits] * (2**exponent_bits - 1), np.int64)
    hidden = add("Gather", [scope.constant(normal, f"{label}/hidden"), exponent], "hidden_bit")
    whole = add("Add", [mantissa, hidden], "whole")
    value = add("Cast", [whole], "value", to=TensorProto.FLOAT)
    steps = np.maximum(np.arange(2**exponent_bits - 1), 1) - (2 ** (exponent_bits - 1) - 1)
    steps = steps - mantissa_bits
    for half, power in (("low", steps // 2), ("high", steps - steps // 2)):
        table = np.append(np.exp2(power.astype(np.float64)), np.inf)
        scale = scope.constant(table, f"{label}/{half}", np.float32)
        value = add(
            "Mul", [value, add("Gather", [scale, exponent], f"{half}_power")], f"{half}_part"
        )
    top = add("Equal", [exponent, number(2**exponent_bits - 1, "special")], "is_special")
    odd = add("Greater", [mantissa, number(0, "none")], "has_payload")
    nan = add("And", [top, odd], "is_nan")
    value = add("Where", [nan, scope.constant(np.nan, f"{label}/nan", np.float32), value], "number")
    signs = scope.constant([1.0, -1.0], f"{label}/signs", np.float32)
    factor = add("Gather", [signs, sign], "factor")
    if target == TensorProto.FLOAT:
        return [*nodes, scope.replace(node, "Mul", [value, factor])]
    signed = add("Mul", [value, factor], "signed")
    return [*nodes, scope.replace(node, "Cast", [signed], to=target)]


def tensor_scatter(scope: Scope, node: NodeProto) -> list[NodeProto]:
    """TensorScatter-24: rows of the update go to write_indices[b] + i along the sequence axis."""
    cache, update = node.input[:2]
    starts = node.input[2] if len(node.input) > 2 else ""
    label, rank = node.name or "TensorScatter", scope.rank(cache)
    if rank is None:
        raise ModelError(f"node {label!r}: TensorScatter of a cache of unknown rank")
    axis = int(attribute(node, "axis", -2)) % rank
    shape = scope.node("Shape", [update], f"{label}/shape")
    zero, one = scope.constant(0, f"{label}/zero"), scope.constant(1, f"{label}/one")
    pick = scope.constant(axis, f"{label}/axis")
    rows = scope.node("Gather", [shape.output[0], pick], f"{label}/rows", axis=0)
    iota = scope.node("Range", [zero, rows.output[0], one], f"{label}/iota")
    along = scope.constant([-1 if i == axis else 1 for i in range(rank)], f"{label}/along")
    index = scope.node("Reshape", [iota.output[0], along], f"{label}/steps")
    nodes = [shape, rows, iota, index]
    if starts:
        front = scope.constant([-1] + [1] * (rank - 1), f"{label}/front")
        first = scope.node("Reshape", [starts, front], f"{label}/first")
        index = scope.node("Add", [first.output[0], index.output[0]], f"{label}/positions")
        nodes += [first, index]
    if attribute(node, "mode", "linear") == "circular":
        size = scope.node("Shape", [cache], f"{label}/cache_shape")
        length = scope.node("Gather", [size.output[0], pick], f"{label}/length", axis=0)
        index = scope.node("Mod", [index.output[0], length.output[0]], f"{label}/wrapped")
        nodes += [size, length, index]
    spread = scope.node("Expand", [index.output[0], shape.output[0]], f"{label}/index")
    args = [cache, spread.output[0], update]
    done = scope.replace(node, "ScatterElements", args, axis=axis)
    return [*nodes, spread, done]


REWRITES: dict[str, Callable[[Scope, NodeProto], list[NodeProto]]] = {
    "BitCast": bit_cast,
    "RMSNormalization": rms_normalization,
    "Swish": swish,
    "TensorScatter": tensor_scatter,
}
