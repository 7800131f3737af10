"""Constant tables of positions, as index expressions."""

from __future__ import annotations

import numpy as np

from sfa_onnx.passes.axes.expr import Expr
from sfa_onnx.passes.axes.steps import Ref
from sfa_onnx.passes.shapes.concrete import Concrete

__all__ = ["known_index"]


def known_index(sizes: Concrete, ref: Ref) -> Expr | None:
    """A constant table that is linear in its coordinates: arange, batch offsets, a number."""
    array = sizes.value(ref.value)
    if array is None or array.dtype.kind not in "iu" or array.size == 0:
        return None
    at_number = [
        c.const if not c.terms and 0 <= c.const < n else None
        for c, n in zip(ref.coords, array.shape, strict=True)
    ]
    array = array[tuple(slice(None) if i is None else slice(i, i + 1) for i in at_number)]
    origin = int(array.reshape(-1)[0])
    wide, line = [i for i, n in enumerate(array.shape) if n > 1], array.reshape(-1)
    run = int((line == origin).sum()) if len(wide) == 1 else 0
    if run > 1 and bool((line == origin + np.arange(line.size) // run).all()):
        return ref.coords[wide[0]].floordiv(run) + origin  # 0 0 0 1 1 1 2 ..
    steps = []
    for axis, size in enumerate(array.shape):
        at = tuple(1 if i == axis else 0 for i in range(array.ndim))
        steps.append(int(array[at]) - origin if size > 1 else 0)
    grid = np.full(array.shape, origin, np.int64)
    for axis, by in enumerate(steps):
        shape = [-1 if i == axis else 1 for i in range(array.ndim)]
        grid = grid + (np.arange(array.shape[axis]) * by).reshape(shape)
    if not bool((grid == array).all()):
        return None
    total = Expr(origin)
    for coordinate, by in zip(ref.coords, steps, strict=True):
        total = total + coordinate * by
    return total
