"""Rewrites that take nodes off AI CPU; `moves.py` says where they apply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from sfa_onnx.ascend.checks.ranges import value_range
from sfa_onnx.ascend.flavour.scatters import hits
from sfa_onnx.ascend.flavour.scope import Scope
from sfa_onnx.files.onnx_attrs import attribute, attributes

__all__ = ["fits_int32", "is_uniform", "narrow_int64", "sorted_top_k", "uniform_scatter"]

_T = TensorProto
_MOST_PAIRS: Final = 1 << 24  # comparisons of a mask written by Equal
_LARGEST_LOOK: Final = 1 << 20  # elements of a constant that is looked through
# Values below this are whole in float32, too: how the kernels divide is not public.
_EXACT: Final = 2**24
_INT32: Final = 2**31
_LIMITS: Final = {"Div": _EXACT, "Mod": _EXACT, "CumSum": _INT32, "Sign": _INT32}


def sorted_top_k(_: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """TopK, sorted = 0 -> 1: the operator promises no order, descending is one."""
    if node.op_type != "TopK" or attribute(node, "sorted", 1):
        return None
    new = NodeProto()
    new.CopyFrom(node)
    next(a for a in new.attribute if a.name == "sorted").i = 1
    return [new]


def fits_int32(scope: Scope, node: NodeProto) -> bool:
    """Whether an int64 node's numbers, its result included, fit what int32 kernels do exactly."""
    limit = _LIMITS.get(node.op_type, 0)
    if not limit:
        return False
    if scope.dtype(node.input[0]) != _T.INT64 or scope.array(node.output[0]) is not None:
        return False
    names = node.input[:1] if node.op_type == "CumSum" else node.input
    found = [value_range(scope, name) for name in names if name]
    if any(r is None or max(-r[0], r[1]) >= limit for r in found):
        return False
    if node.op_type != "CumSum":
        return True
    dims, axis = scope.dims(node.input[0]), scope.array(node.input[1])
    if dims is None or axis is None or axis.size != 1:
        return False
    place = int(axis.reshape(-1)[0])
    length = dims[place] if -len(dims) <= place < len(dims) else None
    largest = max((max(-r[0], r[1]) for r in found if r is not None), default=limit)
    return length is not None and largest * length < limit


def narrow_int64(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """An int64 node in int32, where nothing can overflow."""
    if not fits_int32(scope, node):
        return None
    label, nodes, inputs = node.name or node.op_type, [], list(node.input)
    for i, name in enumerate(inputs):
        if name and not (node.op_type == "CumSum" and i):
            cast = scope.node(
                "Cast", [name], f"{label}/int32", dtype=_T.INT32, dims=scope.dims(name), to=_T.INT32
            )
            nodes.append(cast)
            inputs[i] = cast.output[0]
    kept = attributes(node)
    inner = scope.node(node.op_type, inputs, f"{label}/narrow", dtype=_T.INT32, **kept)
    return [*nodes, inner, scope.replace(node, "Cast", [inner.output[0]], to=_T.INT64)]


def is_uniform(scope: Scope, node: NodeProto) -> bool:
    """Whether a static ScatterElements writes one constant value and is small enough to compare."""
    if str(attribute(node, "reduction", "none")) != "none" or len(node.input) != 3:
        return False
    data, index = (scope.dims(name) for name in node.input[:2])
    if not data or index is None or None in data or None in index or len(data) != len(index):
        return False
    axis = int(attribute(node, "axis", 0)) % max(len(data), 1)
    if any(data[i] != index[i] for i in range(len(data)) if i != axis):
        return False
    pairs = math.prod(d or 0 for d in index) * (data[axis] or 0)
    return pairs <= _MOST_PAIRS and _uniform(scope, node.input[2])


def _uniform(scope: Scope, name: str, depth: int = 8) -> bool:
    """Whether all elements of a value are one constant, as far as that is seen."""
    tensor = scope.initializer(name)
    node = scope.producer(name) if tensor is None else None
    if node is not None and node.op_type == "Constant":
        tensor = attribute(node, "value")
    if isinstance(tensor, TensorProto):
        return _all_equal(tensor)
    if node is None or depth == 0 or node.domain:
        return False
    if node.op_type == "ConstantOfShape":
        return True
    if node.op_type in ("Expand", "Identity", "Reshape", "Unsqueeze", "Cast", "Tile"):
        return _uniform(scope, node.input[0], depth - 1)
    return False


def _all_equal(tensor: TensorProto) -> bool:
    if tensor.data_location == TensorProto.EXTERNAL or math.prod(tensor.dims) > _LARGEST_LOOK:
        return False
    values = onnx.numpy_helper.to_array(tensor).reshape(-1)
    return bool(values.size) and bool(np.all(values == values[0]))


def uniform_scatter(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """ScatterElements of one value -> Where(some index is here, the value, data)."""
    if node.op_type != "ScatterElements" or not is_uniform(scope, node):
        return None
    label, dtype = node.name, scope.dtype(node.input[0])
    rank = len(scope.dims(node.input[0]) or ())
    axis = int(attribute(node, "axis", 0)) % rank
    nodes, hit = hits(scope, node, axis)
    count = scope.node("Cast", [hit], f"{label}/count", dtype=_T.INT32, to=_T.INT32)
    total = _summed(scope, count.output[0], axis, label)
    zero = scope.constant(0, f"{label}/none", np.int32)
    found = scope.node("Greater", [total.output[0], zero], f"{label}/found", dtype=_T.BOOL)
    starts = scope.constant([0] * rank, f"{label}/starts")
    ends = scope.constant([1] * rank, f"{label}/ends")
    first = scope.node("Slice", [node.input[2], starts, ends], f"{label}/value", dtype=dtype)
    chosen = _pick(scope, node, found.output[0], first.output[0])
    return [*nodes, count, total, found, first, *chosen]


def _pick(scope: Scope, node: NodeProto, found: str, value: str) -> list[NodeProto]:
    """Where(found, value, data); of bools by And and Or, since onnxruntime has no such Where."""
    data, label = node.input[0], node.name
    if scope.dtype(data) != _T.BOOL:
        return [scope.replace(node, "Where", [found, value, data])]
    new = scope.node("And", [found, value], f"{label}/new", dtype=_T.BOOL)
    other = scope.node("Not", [found], f"{label}/other", dtype=_T.BOOL)
    old = scope.node("And", [other.output[0], data], f"{label}/old", dtype=_T.BOOL)
    return [new, other, old, scope.replace(node, "Or", [new.output[0], old.output[0]])]


def _summed(scope: Scope, name: str, axis: int, label: str) -> NodeProto:
    base = f"{label}/total"
    if scope.opset < 13:
        return scope.node("ReduceSum", [name], base, dtype=_T.INT32, axes=[axis], keepdims=0)
    axes = scope.constant([axis], f"{label}/axes")
    return scope.node("ReduceSum", [name, axes], base, dtype=_T.INT32, keepdims=0)
