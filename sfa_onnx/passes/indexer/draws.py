"""Inputs that distinguish a selection from its look-alikes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sfa_onnx.passes.candidate import Candidate, Operand, Role

__all__ = ["Question", "draw"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Question:
    """One way to draw inputs.

    Attributes:
        name: for the record.
        reason: what is so where the answers differ.
        kind: "random", "ties" (small whole numbers), "short" (few keys visible), "open" (all
            visible), "nan" or "infinite" (some keys hold that), "lowest" (products of -inf).
        seed: of the generator.
    """

    name: str
    reason: str
    kind: str = "random"
    seed: int = 0


def draw(
    candidate: Candidate,
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
    question: Question,
) -> dict[str, Array]:
    """A tensor for every operand; floats in float64."""
    rng = np.random.default_rng(question.seed)
    return {o.value: _tensor(o, shapes[o.value], sizes, question, rng) for o in candidate.operands}


def _tensor(
    operand: Operand,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    question: Question,
    rng: np.random.Generator,
) -> Array:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(operand.elem_type)
    if operand.role is Role.SHAPE:
        return np.zeros(shape, np.float64 if dtype.kind not in "iub" else dtype)
    if operand.role is Role.MASK:
        return _mask(operand, shape, question, rng, dtype)
    if operand.role is Role.LENGTHS_KV:
        return _lengths(operand, shape, sizes, question, rng).astype(dtype)
    if question.kind == "ties":
        drawn = rng.integers(-2, 3, shape).astype(np.float64)
        drawn = _apart(operand, drawn)
        return np.abs(drawn) if operand.role is Role.SCALE else drawn
    found = _apart(operand, rng.standard_normal(shape))
    if operand.role is Role.SCALE:  # of keys: not negative
        return np.abs(found)
    if operand.role is Role.INDEX_KEY and question.kind in ("nan", "infinite"):
        rows = found.reshape(-1, shape[-1])
        rows[:: max(2, len(rows) // 3)] = np.nan if question.kind == "nan" else 1e300
    if question.kind == "lowest" and operand.role in (Role.QUERY, Role.INDEX_KEY):
        return _lowest(operand, found)
    return found


def _lowest(operand: Operand, drawn: Array) -> Array:
    """The first column below 0 in every query, and infinite in some keys: a relu makes that 0."""
    axis = next((i for i, name in enumerate(operand.axes) if name.startswith("Di")), None)
    if axis is None:
        return drawn
    first = np.moveaxis(drawn, axis, -1)[..., 0]  # a view
    if operand.role is Role.QUERY:
        first[...] = -1 - np.abs(first)
    else:
        first[(first > 0.5) & (np.abs(first) < 2)] = np.inf
    return drawn


def _apart(operand: Operand, drawn: Array) -> Array:
    """Numbers that are divided by: none of them near 0."""
    if operand.domain.low is None:
        return drawn
    return np.where(np.abs(drawn) < 0.5, 1.0, drawn)


def _mask(
    operand: Operand,
    shape: tuple[int, ...],
    question: Question,
    rng: np.random.Generator,
    dtype: Any,
) -> Array:
    share = {"short": 0.15, "open": 1.0}.get(question.kind, 0.7)
    visible = rng.random(shape) < share
    shown, hidden = operand.domain.values or (1.0, 0.0)
    if operand.elem_type == onnx.TensorProto.BOOL:
        return visible if shown else ~visible
    values = np.where(visible, shown, hidden)
    return values.astype(dtype if dtype.kind in "iu" else np.float64)


def _lengths(
    operand: Operand,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    question: Question,
    rng: np.random.Generator,
) -> Array:
    """The last visible key of every row: one after the other along query rows."""
    keys, rows = sizes.get("S2", 1), sizes.get("S1", 1)
    axes = operand.axes
    lead = tuple(1 if a == "S1" else n for a, n in zip(axes, shape, strict=True))
    span = shape[axes.index("S1")] if "S1" in axes else 1
    top = max(keys - span, 0)
    low = -1 if rows == 1 else 0
    start = rng.integers(low, max(top, low) + 1, lead)
    if question.kind == "short":
        start = np.full(lead, min(1, top))
    if question.kind == "open":
        start = np.full(lead, top)
    if "S1" not in axes:
        return start
    step = np.arange(span).reshape([-1 if a == "S1" else 1 for a in axes])
    return start + step
