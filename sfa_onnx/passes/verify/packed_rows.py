"""Packed rows as inputs: drawn numbers, written as the bytes that the operator reads.

Rows that may be read hold every kind of finite number: zeros of both signs, negative scales, the
whole range of int8, and, where a draw asks for it, numbers of one binade far from one.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.op import PackedRow
from sfa_onnx.passes.verify.problem import Draw

__all__ = ["draw_rows", "normal_powers", "row_layout", "subnormal_power"]

Array = NDArray[Any]
_ZEROS = 0.05  # share of ropes that are zero
_PALINDROME = float(np.array(0x3F80803F, np.uint32).view(np.float32))  # in any byte order, near 1


def row_layout(width: int, rope_dtype: Any, attributes: dict[str, Any]) -> PackedRow:
    """The layout of rows of `width` bytes, from the operator's attributes and its rope type."""
    rope, tile = int(attributes["rope_head_dim"]), int(attributes["tile_size"])
    size = np.dtype(rope_dtype).itemsize if rope else 2
    nope = (width - rope * size) * tile // (tile + 4)
    return PackedRow.of(width, nope + rope, rope, tile)


def normal_powers(dtype: Any) -> tuple[int, ...]:
    """Powers of two whose binades are normal in `dtype`: 1, near the least, near the largest."""
    info = ml_dtypes.finfo(dtype)
    return 0, int(info.minexp) + 4, int(info.maxexp) - 3


def subnormal_power(dtype: Any) -> int:
    """A power of two whose binade is subnormal in `dtype`, with a few bits left."""
    info = ml_dtypes.finfo(dtype)
    return int(info.minexp) - min(4, int(info.nmant) - 2)


def draw_rows(
    row: PackedRow,
    rope_dtype: Any,
    draw: Draw,
    hidden: Array,
    shift: float,
    rng: np.random.Generator,
) -> NDArray[np.int8]:
    """Rows [count, D] for one draw.

    Args:
        row: how a row is laid out.
        rope_dtype: type of the rope bytes.
        draw: the question.
        hidden: [count] rows that nobody may read; they are poisoned when the draw says so.
        shift: value of every row's last rope column, when the draw shifts scores.
        rng: source of randomness.
    """
    count, unit = len(hidden), 2.0**draw.power
    if draw.codes or draw.part == "rope":  # one column each: the output shows which rows were read
        nope = np.zeros((count, row.nope), np.int8)
        nope[np.arange(count), np.arange(count) % row.nope] = 1 + np.arange(count) // row.nope % 100
    else:
        nope = rng.integers(-128, 128, (count, row.nope)).astype(np.int8)
    scale = rng.uniform(0.25, 2.0, (count, row.tiles)) * rng.choice([-1, 1], (count, row.tiles))
    if draw.part == "nope":
        scale = np.full((count, row.tiles), _PALINDROME)
    elif not draw.part:
        scale *= draw.width / 64
    rope = draw.width * rng.standard_normal((count, row.rope))
    if draw.part == "rope":  # all of one binade, subnormal where the power is that low
        rope = rng.uniform(1.0, 1.99, (count, row.rope)) * rng.choice([-1, 1], rope.shape)
    rope = np.where(rng.random(rope.shape) < _ZEROS, rng.choice([0.0, -0.0], rope.shape), rope)
    scale, rope = scale * unit, rope * unit
    if shift and row.rope:
        rope[:, -1] = shift
    if draw.poison is not None:
        bad = hidden[:, None]
        scale = np.where(bad, draw.poison, scale)
        rope = np.where(bad, np.abs(draw.poison * rng.standard_normal(rope.shape)), rope)
    limit = float(ml_dtypes.finfo(rope_dtype).max)
    typed = np.clip(rope, -limit, limit).astype(rope_dtype)
    return kv_cache.pack(nope, typed, scale.astype(np.float32), tile_size=row.tile)
