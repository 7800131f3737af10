"""The roundings of CANN's A2/A3 kernel, for `mode="npu"` of the reference, and of its goldens.

Keys are dequantised to the query's type, products accumulate in float32, the softmax runs over
chunks of 512 key slots with a running maximum, and the unnormalised weights are rounded to the
query's type with ties away from zero before they meet the values. One division at the end.

The goldens that the vendor publishes (`mode="golden"`) dequantise with ties to even, take one
float32 softmax and round its normalised weights, ties to even.
"""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["attend_golden", "attend_npu", "half_away", "npu_round", "sink_weight"]

Array = NDArray[Any]
_CHUNK: Final = 512  # key slots that share one running maximum
_START: Final = np.float32(-2e38)  # of the running maximum


def attend_npu(
    query: Array, keys: Array, values: Array, scale: float, slots: Array, sinks: Array | None
) -> tuple[Array, Array, Array]:
    """[N1, C+R], [n, C+R], [n, C] -> [N1, C] in float32 on the query type's grid.

    `slots` [n] are the positions in the row of `sparse_indices`, in tokens: they decide the chunk.
    `sinks` [N1] start the running maximum and sum. Also returns these two, [N1] each.
    """
    q = query.astype(np.float32)
    top, out = np.full((len(q), 1), _START), np.zeros((len(q), values.shape[-1]), np.float32)
    total = np.zeros_like(top)
    if sinks is not None:
        top = np.maximum(top, sinks.astype(np.float32)[:, None])
        total = sink_weight(sinks.astype(np.float32)[:, None], top)
    for chunk in np.unique(slots // _CHUNK):
        part = slots // _CHUNK == chunk
        scores = (q @ keys[part].T) * np.float32(scale)
        new_top = np.maximum(top, scores.max(-1, keepdims=True))
        shrink = np.where(top == new_top, np.ones_like(top), np.exp(top - new_top))
        weights = np.exp(scores - new_top)
        total = total * shrink + weights.sum(-1, keepdims=True)
        out = out * shrink + half_away(weights, query.dtype) @ values[part]
        top = new_top
    return npu_round(out / total, query.dtype), top[:, 0], total[:, 0]


def attend_golden(
    query: Array, keys: Array, values: Array, scale: float, _slots: Array, sinks: Array | None
) -> tuple[Array, Array, Array]:
    """As `attend_npu`, the way the vendor's CPU goldens do it."""
    scores = (query.astype(np.float32) @ keys.T) * np.float32(scale)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks.astype(np.float32)[:, None])
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + sink_weight(sinks.astype(np.float32)[:, None], top)
    rounded = (weights / total).astype(query.dtype).astype(np.float32)
    return rounded @ values, top[:, 0], total[:, 0]


def sink_weight(sinks: Array, top: Array) -> Array:
    """exp(sink - largest score); a sink of +infinity takes everything, as ever larger ones do."""
    return np.where(sinks == np.inf, np.ones_like(top), np.exp(sinks - top))


def npu_round(x: Array, dtype: Any) -> Array:
    """Float32 to a type's grid as the kernel casts: bfloat16 half-even, float16 half-away."""
    return half_away(x, dtype) if dtype == np.float16 else x.astype(dtype).astype(np.float32)


def half_away(x: Array, dtype: Any) -> Array:
    """Float32 rounded to the grid of a 16-bit type, ties away from zero; wider types unchanged."""
    if np.dtype(dtype).itemsize > 2:
        return x
    info = ml_dtypes.finfo(dtype)
    exponent = np.maximum(np.frexp(x)[1] - 1, info.minexp) - info.nmant
    grid = np.ldexp(np.floor(np.ldexp(np.abs(x).astype(np.float64), -exponent) + 0.5), exponent)
    rounded = np.where(np.isfinite(x), np.copysign(grid, x), x)
    with np.errstate(over="ignore"):
        return rounded.astype(dtype).astype(np.float32)
