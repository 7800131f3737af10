"""Arithmetic on arrays that hold open sizes: they pass through as the expressions they are.

Such arrays have dtype object. Where no size decides which of two is larger, a comparison holds an
`Order`, and Where makes a Min or a Max of it. What is computed otherwise (in floats, by tables) is
computed with the stand-ins; `Concrete` notes that its result is open.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx

from sfa_onnx.passes.shapes.size import broadcast, form_of, greatest, is_open, least

__all__ = ["OPEN", "axes_of", "counts", "keeps_open", "numbers_of", "plain"]

Arrays = list[Any]
_Fold = Callable[[dict[str, Any], Arrays], Any]

_FEW: Final = 64  # elements
_INTEGERS: Final = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
_KEEPING: Final = frozenset(
    (
        *("Add", "Cast", "Clip", "Concat", "Div", "Equal", "Expand", "Gather", "Greater"),
        *("GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg"),
        *("Not", "OneHot", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Slice"),
        *("Split", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where"),
    )
)


@dataclass(frozen=True)
class Order:
    """Whether `low` is below `high`: the sizes of the inputs decide. Equal ones do not matter."""

    low: int
    high: int

    def __bool__(self) -> bool:
        return int(self.low) < int(self.high)


def keeps_open(node: onnx.NodeProto, inputs: Arrays) -> bool:
    """Whether a node hands on open sizes as what they are."""
    few = all(x is None or x.size <= _FEW for x in inputs)
    if node.op_type == "Cast":
        kinds = [a.i for a in node.attribute if a.name == "to"]
        return few and kinds[0] in _INTEGERS
    return few and node.op_type in _KEEPING


def numbers_of(array: np.ndarray) -> np.ndarray:
    """An array of sizes as plain numbers, of orders as bools."""
    if array.dtype != object:
        return array
    if isinstance(next(array.flat, None), bool | Order):
        return array.astype(bool)
    return np.asarray([_wrapped(n) for n in array.flat], np.int64).reshape(array.shape)


def _wrapped(number: int) -> int:
    """A number as int64 holds it: what ONNX's own arithmetic leaves of a larger one."""
    return (int(number) + 2**63) % 2**64 - 2**63


def counts(array: np.ndarray) -> bool:
    """Whether an array holds integers and sizes only."""
    return not any(isinstance(x, bool | Order) for x in array.flat[:1])


def plain(result: Any) -> np.ndarray:
    """A result as an array; of plain numbers where nothing open is left in it."""
    array = np.asarray(result, object) if is_open(result) else np.asarray(result)
    moves = array.dtype == object and any(is_open(x) or isinstance(x, Order) for x in array.flat)
    return array if moves else numbers_of(array)


def axes_of(a: dict[str, Any], x: Arrays, position: int = 1) -> tuple[int, ...] | None:
    """The axes of an operator that has them as an input, or as an attribute."""
    if len(x) > position and x[position] is not None:
        return tuple(int(v) for v in x[position].reshape(-1))
    axes = a.get("axes")
    return None if axes is None else tuple(int(v) for v in axes)


def _each(function: Callable[..., Any]) -> _Fold:
    many = np.frompyfunc(function, 2, 1)
    return lambda _, x: functools.reduce(many, x)


def _below(low: int, high: int, *, strictly: bool) -> bool | Order:
    """Low < high (or <=), where that is certain whatever the sizes are."""
    if form_of(low).exceeds(form_of(high)) and (strictly or form_of(low) != form_of(high)):
        return not strictly and int(low) == int(high)
    if form_of(high).exceeds(form_of(low)):
        return not strictly or Order(low, high)
    return Order(low, high)


def _same(a: int, b: int) -> bool:
    """Sizes are taken to differ where their expressions do."""
    return form_of(a) == form_of(b)


def _not(x: bool | Order) -> bool | Order:
    return Order(x.high, x.low) if isinstance(x, Order) else not x


def _either(condition: bool | Order, yes: int, no: int) -> int:
    """Where: a Min or a Max, when the smaller or the larger of two is taken."""
    if not isinstance(condition, Order):
        return yes if condition else no
    if _same(yes, no):
        return yes
    low, high = condition.low, condition.high
    if _same(yes, low) and _same(no, high):
        return least(low, high)
    if _same(yes, high) and _same(no, low):
        return greatest(low, high)
    raise ValueError("which of two sizes is taken depends on the sizes")


def _clip(_: dict[str, Any], x: Arrays) -> Any:
    found = x[0]
    for bound, function in zip(x[1:], (greatest, least), strict=False):
        found = found if bound is None else np.frompyfunc(function, 2, 1)(found, bound)
    return found


def _reduce(function: Callable[..., Any]) -> _Fold:
    many = np.frompyfunc(function, 2, 1)

    def run(a: dict[str, Any], x: Arrays) -> np.ndarray:
        axes, keep = axes_of(a, x), bool(a.get("keepdims", 1))
        if axes is None and a.get("noop_with_empty_axes", 0):
            return np.asarray(x[0])
        return np.asarray(many.reduce(x[0], axis=axes, keepdims=keep), object)

    return run


OPEN: Final[dict[str, _Fold]] = {
    "Cast": lambda _, x: x[0],
    "Clip": _clip,
    "Div": _each(operator.floordiv),
    "Equal": _each(_same),
    "Greater": _each(lambda a, b: _below(b, a, strictly=True)),
    "GreaterOrEqual": _each(lambda a, b: _below(b, a, strictly=False)),
    "Less": _each(lambda a, b: _below(a, b, strictly=True)),
    "LessOrEqual": _each(lambda a, b: _below(a, b, strictly=False)),
    "Max": _each(broadcast),
    "Min": _each(least),
    "Mod": _each(lambda a, b: a - a // b * b),
    "Not": lambda _, x: np.frompyfunc(_not, 1, 1)(x[0]),
    "ReduceMax": _reduce(greatest),
    "ReduceMin": _reduce(least),
    "ReduceProd": _reduce(operator.mul),
    "ReduceSum": _reduce(operator.add),
    "Where": lambda _, x: np.frompyfunc(_either, 3, 1)(*x),
}
