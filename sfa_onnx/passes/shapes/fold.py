"""Evaluate the integer and constant arithmetic that exporters leave in graphs, with NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy
import numpy as np
import onnx
from onnx import numpy_helper

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.shapes.fold_open import OPEN, axes_of, keeps_open, numbers_of, plain
from sfa_onnx.passes.shapes.rules import slice_bounds

__all__ = ["FOLD", "fold"]

Arrays = list[Any]
_Fold = Callable[[dict[str, Any], Arrays], Any]


def fold(node: onnx.NodeProto, inputs: Arrays, limit: int) -> list[np.ndarray] | None:
    """The outputs of `node` on concrete inputs; None when unknown, failing, or above `limit`."""
    if any(x is not None and x.size > limit for x in inputs):
        return None
    function = FOLD[node.op_type]
    if any(x is not None and x.dtype == object for x in inputs):
        if keeps_open(node, inputs):
            function = OPEN.get(node.op_type, function)
        else:
            inputs = [None if x is None else numbers_of(x) for x in inputs]
    try:
        if _too_large(node, inputs, limit):
            return None
        with np.errstate(all="ignore"):
            result = function(attributes(node), inputs)
    except (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError):
        return None
    arrays = [plain(r) for r in (result if isinstance(result, list) else [result])]
    return None if any(a.size > limit for a in arrays) else arrays


_COMPARES = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Where")
_BROADCASTING = frozenset(
    (*_COMPARES, "Add", "And", "Div", "Max", "Min", "Mod", "Mul", "Or", "Pow", "Sub")
)


def _too_large(node: onnx.NodeProto, inputs: Arrays, limit: int) -> bool:
    """Whether the result would be above the limit, seen before it is made."""
    if node.op_type in ("ConstantOfShape", "Expand"):
        target = inputs[-1]
        return bool(math.prod(int(d) for d in target.reshape(-1)) > limit)
    if node.op_type == "Range":
        start, stop, step = (x.reshape(-1)[0] for x in inputs)
        return bool(abs((stop - start) / step) > limit) if step else True
    shapes = [x.shape for x in inputs if x is not None]
    if node.op_type in _BROADCASTING:
        return math.prod(np.broadcast_shapes(*shapes)) > limit
    if node.op_type == "OneHot":
        return bool(inputs[0].size * int(inputs[1].reshape(-1)[0]) > limit)
    return node.op_type == "Tile" and inputs[0].size * math.prod(inputs[1].tolist()) > limit


def _unsqueeze(a: dict[str, Any], x: Arrays) -> np.ndarray:
    axes = axes_of(a, x) or ()
    return np.asarray(np.expand_dims(x[0], axes))


def _reshape(a: dict[str, Any], x: Arrays) -> np.ndarray:
    target = [int(d) for d in x[1]]
    if not a.get("allowzero", 0):
        target = [x[0].shape[i] if d == 0 else d for i, d in enumerate(target)]
    return np.asarray(x[0].reshape(target))


def _slice(a: dict[str, Any], x: Arrays) -> np.ndarray:
    starts, ends, axes, steps = slice_bounds(a, x, x[0].ndim)
    where = [slice(None)] * x[0].ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x[0].shape[axis]
        low = max(start + size, 0) if start < 0 else start
        high: int | None = end + size if end < 0 else end
        if step < 0 and high is not None and high < 0:
            high = None
        where[axis] = slice(low, high, step)
    return np.asarray(x[0][tuple(where)])


def _cast(a: dict[str, Any], x: Arrays) -> np.ndarray:
    return np.asarray(x[0]).astype(onnx.helper.tensor_dtype_to_np_dtype(int(a["to"])))


def _constant_of_shape(a: dict[str, Any], x: Arrays) -> np.ndarray:
    tensor = a.get("value")
    fill = np.float32(0) if tensor is None else numpy_helper.to_array(tensor).reshape(-1)[0]
    return np.full([int(d) for d in x[0]], fill)


def _one_hot(a: dict[str, Any], x: Arrays) -> np.ndarray:
    """Indices along a new axis, whose length no open size may be; out of range are nowhere."""
    if x[1].dtype == object:
        raise ValueError("the depth is open")
    depth, rank = int(x[1].reshape(-1)[0]), x[0].ndim + 1
    axis = int(a.get("axis", -1)) % rank
    own = np.where(x[0] < 0, x[0] + depth, x[0])
    places = np.arange(depth).reshape([depth if i == axis else 1 for i in range(rank)])
    return np.asarray(np.where(np.expand_dims(own, axis) == places, x[2][1:], x[2][:1]))


def _divide(_: dict[str, Any], x: Arrays) -> np.ndarray:
    if np.asarray(x[0]).dtype.kind in "iu":  # ONNX truncates towards zero
        return np.asarray(np.trunc(np.true_divide(x[0], x[1])).astype(x[0].dtype))
    return np.asarray(x[0] / x[1])


def _reduce(function: Callable[..., Any]) -> _Fold:
    def run(a: dict[str, Any], x: Arrays) -> np.ndarray:
        axes = axes_of(a, x)
        if axes is None and a.get("noop_with_empty_axes", 0):
            return np.asarray(x[0])
        result = function(x[0], axis=axes, keepdims=bool(a.get("keepdims", 1)))
        return np.asarray(result).astype(x[0].dtype)

    return run


def _clip(_: dict[str, Any], x: Arrays) -> np.ndarray:
    low, high = (*x, None, None)[1:3]
    return np.asarray(np.clip(x[0], low, high)) if len(x) > 1 else np.asarray(x[0])


def _concat(a: dict[str, Any], x: Arrays) -> np.ndarray:
    return np.concatenate(x, axis=a["axis"])


def _split(a: dict[str, Any], x: Arrays) -> list[np.ndarray]:
    axis = int(a.get("axis", 0))
    sizes = x[1] if len(x) > 1 and x[1] is not None else a.get("split")
    if sizes is None:
        return list(np.split(x[0], int(a["num_outputs"]), axis=axis))
    return list(np.split(x[0], np.cumsum([int(s) for s in sizes])[:-1], axis=axis))


def _binary(function: Callable[[Any, Any], Any]) -> _Fold:
    return lambda _, x: function(x[0], x[1])


def _unary(function: Callable[[Any], Any]) -> _Fold:
    return lambda _, x: function(x[0])


def _variadic(function: Callable[[Any, Any], Any]) -> _Fold:
    def run(_: dict[str, Any], x: Arrays) -> np.ndarray:
        result = x[0]
        for other in x[1:]:
            result = function(result, other)
        return np.asarray(result)

    return run


FOLD: Final[dict[str, _Fold]] = {
    "Abs": _unary(np.abs),
    "Add": _binary(np.add),
    "And": _binary(np.logical_and),
    "Cast": _cast,
    "CastLike": lambda _, x: np.asarray(x[0]).astype(np.asarray(x[1]).dtype),
    "Ceil": _unary(np.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": lambda _, x: np.cumsum(x[0], axis=int(x[1].reshape(-1)[0])),
    "Div": _divide,
    "Equal": _binary(np.equal),
    "Exp": _unary(np.exp),
    "Expand": lambda _, x: np.broadcast_to(
        x[0], np.broadcast_shapes(x[0].shape, tuple(int(d) for d in x[1]))
    ),
    "Floor": _unary(np.floor),
    "Gather": lambda a, x: np.take(x[0], x[1], axis=a.get("axis", 0)),
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "Identity": _unary(np.asarray),
    "Less": _binary(np.less),
    "LessOrEqual": _binary(np.less_equal),
    "Log": _unary(np.log),
    "Max": _variadic(np.maximum),
    "Min": _variadic(np.minimum),
    "Mod": lambda a, x: np.fmod(x[0], x[1]) if a.get("fmod", 0) else np.mod(x[0], x[1]),
    "Mul": _binary(np.multiply),
    "Neg": _unary(np.negative),
    "Not": _unary(np.logical_not),
    "OneHot": _one_hot,
    "Or": _binary(np.logical_or),
    "Pow": lambda _, x: np.power(x[0], x[1]).astype(x[0].dtype),
    "Range": lambda _, x: np.arange(*(v.reshape(-1)[0] for v in x)).astype(x[0].dtype),
    "Reciprocal": _unary(np.reciprocal),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _unary(np.sqrt),
    "Squeeze": lambda a, x: np.squeeze(x[0], axes_of(a, x)),
    "Sub": _binary(np.subtract),
    "Tile": lambda _, x: np.tile(x[0], [int(r) for r in x[1]]),
    "Transpose": lambda a, x: np.transpose(x[0], a.get("perm")),
    "Unsqueeze": _unsqueeze,
    "Where": lambda _, x: np.where(x[0], x[1], x[2]),
}
