"""What an ordinary caller gives for the integers that masks and indices are made of."""

from __future__ import annotations

import re
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from sfa_onnx.passes.candidate import Role
from sfa_onnx.passes.verify.problem import Problem

__all__ = ["WAYS", "Way", "ordinary", "ranked", "selected"]

Array = NDArray[Any]
Way = Literal["any", "first", "last", "few padded", "many padded"]
# Which keys are selected; the last two: among the first ones, with padding (whatever marks it) that
# is rare or common, for rows may be padding as well as keys.
WAYS: Final[tuple[Way, ...]] = ("any", "first", "last", "few padded", "many padded")
_SHARES: Final[dict[Way, float]] = {"few padded": 0.9, "many padded": 0.1}
_FROM: Final = re.compile(r"pad|start|begin|offset|left", re.IGNORECASE)  # counts what is skipped


def ordinary(
    name: str, shape: tuple[int, ...], problem: Problem, way: Way, *, chosen: bool
) -> Array | None:
    """Integers for a value that enters; None where nobody could know what it is.

    Args:
        name: the value.
        shape: its shape.
        problem: the site at some sizes.
        way: which keys the caller selects: the verdict is that of the way that shows most.
        chosen: whether the indices of the site are computed from it.
    """
    dims, rng = problem.dims, np.random.default_rng(17)
    operand = next((o for o in problem.candidate.operands if o.value == name), None)
    if operand is not None and operand.role is Role.MASK:
        visible, hidden = (operand.domain.values or (1.0, 0.0))[:2]
        return np.where(rng.random(shape) < 0.75, visible, hidden)
    if operand is not None and operand.role is Role.BLOCK_TABLE:
        return np.resize(rng.permutation(dims.keys[0]), shape)
    if chosen and shape and shape[-1] == dims.slots:
        return selected(shape, dims.capacity, way)
    few = int(np.prod(shape, dtype=np.int64))
    if len(shape) > 1 and shape[-1] == dims.capacity:  # a key is there or padding, either way
        return rng.random(shape) < _SHARES.get(way, 0.5)
    if few in (1, dims.batches):
        return np.full(shape, 0 if _FROM.search(name) else dims.capacity)
    queries = dims.count // max(dims.batches, 1)
    if shape[-1:] == (queries,):
        return np.broadcast_to(dims.capacity - queries + np.arange(queries), shape)
    return None


def ranked(shape: tuple[int, ...]) -> Array:
    """The scores that a TopK found: finite, the best first."""
    return -np.sort(-np.random.default_rng(18).standard_normal(shape), axis=-1)


def selected(shape: tuple[int, ...], capacity: int, way: Way) -> Array:
    """Keys in range, neither the first nor the last one where there are others."""
    inner = np.arange(1, capacity - 1) if capacity > 2 else np.arange(capacity)
    if way == "first" or way in _SHARES:
        row = np.resize(inner, shape[-1])
    elif way == "last":
        row = np.resize(inner[::-1], shape[-1])
    else:
        line = np.resize(inner, max(len(inner), shape[-1]))
        rows = np.broadcast_to(line, (*shape[:-1], len(line)))
        return np.random.default_rng(19).permuted(rows, axis=-1)[..., : shape[-1]]
    return np.broadcast_to(row, shape)
