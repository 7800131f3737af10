"""Bounds of integer values, from constants, static shapes and what operators can give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from onnx import NodeProto, TensorProto

from sfa_onnx.ascend.flavour.scope import Scope
from sfa_onnx.files.onnx_attrs import attribute

__all__ = ["Range", "value_range"]

Range = tuple[int, int]
_T = TensorProto
_DEPTH: Final = 24
_LARGEST_DIM: Final = 2**31 - 1  # what a dim of a tensor in memory stays below
_NARROW: Final[dict[int, Range]] = {
    _T.BOOL: (0, 1),
    _T.INT8: (-(2**7), 2**7 - 1),
    _T.UINT8: (0, 2**8 - 1),
    _T.INT16: (-(2**15), 2**15 - 1),
    _T.UINT16: (0, 2**16 - 1),
}
_PASS: Final = frozenset(
    {
        "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Expand", "Flatten",
        "Gather", "GatherElements", "GatherND", "Tile", "Split", "ReduceMax", "ReduceMin", "Cast",
    }
)  # fmt: skip


def value_range(scope: Scope, name: str, depth: int = _DEPTH) -> Range | None:
    """The least and the largest element a value can have, or None where nothing bounds it."""
    known = scope.array(name)
    if known is not None:
        whole = known.dtype.kind in "iub" and known.size
        return (int(known.min()), int(known.max())) if whole else None
    if scope.dtype(name) in _NARROW:
        return _NARROW[scope.dtype(name)]
    node = scope.producer(name)
    if node is None or node.domain or depth == 0 or not node.input:
        return None
    if node.op_type in ("Shape", "Size"):
        return _of_shape(scope, node)
    if node.op_type in ("TopK", "ArgMax", "ArgMin"):
        return _of_index(scope, node, name)
    if node.op_type in _PASS:
        return _passed(scope, node, depth)
    rule = _RULES.get(node.op_type)
    if rule is None:
        return None
    parts = [value_range(scope, i, depth - 1) for i in _operands(node)]
    if any(p is None for p in parts):
        return None
    return rule([p for p in parts if p is not None])


def _operands(node: NodeProto) -> list[str]:
    return list(node.input[1:] if node.op_type == "Where" else node.input)


def _passed(scope: Scope, node: NodeProto, depth: int) -> Range | None:
    source = node.input[0]
    if node.op_type == "Cast" and scope.dtype(source) not in (
        *(_T.INT32, _T.INT64, _T.UINT32),
        *_NARROW,
    ):
        return None  # from a float: anything
    return value_range(scope, source, depth - 1)


def _of_shape(scope: Scope, node: NodeProto) -> Range | None:
    dims = scope.dims(node.input[0])
    if node.op_type == "Size":
        known = dims is not None and None not in dims
        size = int(np.prod([d or 0 for d in dims or ()], dtype=np.float64)) if known else 0
        return (0, size) if known else None
    sizes = [d for d in dims or () if d is not None]
    open_dims = dims is None or len(sizes) < len(dims)
    return (0, _LARGEST_DIM if open_dims or not sizes else max(sizes))


def _of_index(scope: Scope, node: NodeProto, name: str) -> Range | None:
    if node.op_type == "TopK" and (len(node.output) < 2 or name != node.output[1]):
        return None
    axis = int(attribute(node, "axis", -1 if node.op_type == "TopK" else 0))
    dims = scope.dims(node.input[0])
    size = dims[axis] if dims is not None and -len(dims) <= axis < len(dims) else None
    return (0, (_LARGEST_DIM if size is None else max(size, 1)) - 1)


def _product(parts: list[Range]) -> Range:
    low, high = parts[0]
    for other in parts[1:]:
        ends = [a * b for a in (low, high) for b in other]
        low, high = min(ends), max(ends)
    return low, high


def _quotient(parts: list[Range]) -> Range | None:
    (low, high), divisor = parts
    if divisor[0] <= 0:
        return None
    ends = [int(a / b) if abs(a) < 2**53 else a // b for a in (low, high) for b in divisor]
    return min(*ends, 0 if low <= 0 <= high else ends[0]), max(ends)


def _remainder(parts: list[Range]) -> Range | None:
    return None if parts[1][0] <= 0 else (min(0, 1 - parts[1][1]), parts[1][1] - 1)


def _counted(parts: list[Range]) -> Range | None:
    """Range(start, limit, step) upwards."""
    start, limit, step = parts
    return (start[0], max(limit[1] - 1, start[1])) if step[0] > 0 else None


_RULES: Final[dict[str, Callable[[list[Range]], Range | None]]] = {
    "Add": lambda p: (sum(a for a, _ in p), sum(b for _, b in p)),
    "Sub": lambda p: (p[0][0] - p[1][1], p[0][1] - p[1][0]),
    "Mul": _product,
    "Div": _quotient,
    "Mod": _remainder,
    "Neg": lambda p: (-p[0][1], -p[0][0]),
    "Abs": lambda p: (0, max(abs(p[0][0]), abs(p[0][1]))),
    "Max": lambda p: (max(a for a, _ in p), max(b for _, b in p)),
    "Min": lambda p: (min(a for a, _ in p), min(b for _, b in p)),
    "Where": lambda p: (min(a for a, _ in p), max(b for _, b in p)),
    "Concat": lambda p: (min(a for a, _ in p), max(b for _, b in p)),
    "Range": _counted,
}
