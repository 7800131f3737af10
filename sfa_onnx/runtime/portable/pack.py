"""`sfa_onnx::KvCachePack` as standard ONNX nodes, step by step as `sfa_onnx.kv_cache` says."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from sfa_onnx.runtime.portable.body import Body
from sfa_onnx.runtime.portable.numbers import FORMATS, to_bytes

__all__ = ["pack_body"]


def pack_body(
    body: Body, present: frozenset[str], attrs: dict[str, Any], types: dict[str, int]
) -> str:
    """Write the body; values are named as the contract's inputs. Returns packed.

    Args:
        body: the writer.
        present: names of the inputs that the calling node has.
        attrs: its attributes.
        types: input name -> onnx element type.
    """
    if types["nope"] == TensorProto.INT8:
        q, scale = "nope", "scale"
    else:
        q, scale = _quantise(body, attrs["tile_size"], "clip" in present)
    parts = [q]
    if "rope" in present:
        parts.append(to_bytes(body, body.to_float("rope"), FORMATS[types["rope"]]))
    parts.append(to_bytes(body, scale, FORMATS[TensorProto.FLOAT]))
    return body.op("Concat", *parts, axis=-1)


def _quantise(body: Body, tile: int, clipped: bool) -> tuple[str, str]:
    lead, zero = body.dims("nope", 0, -1), body.real(0)
    x = body.reshape(body.to_float("nope"), lead, -1, tile)
    odd = body.op("Or", body.op("IsNaN", x), body.op("IsInf", x))
    poisoned = body.to_bool(body.total(body.to_int(odd)))
    x = body.op("Where", odd, zero, x)
    limit = body.maximum(body.op("Abs", x))
    if clipped:
        limit = body.op("Mul", limit, body.reshape("clip", 1))
    poisoned = body.op("Or", poisoned, body.op("IsInf", limit))
    scale = body.op("Mul", limit, body.real(float(np.float32(1) / np.float32(127))))
    reciprocal = body.op("Div", body.real(1), scale)
    flat = body.op("Or", poisoned, body.op("IsInf", reciprocal))
    clamped = body.op("Min", body.op("Max", x, body.op("Neg", limit)), limit)
    rounded = body.op("Round", body.op("Mul", clamped, reciprocal))
    q = body.cast(body.op("Where", flat, zero, rounded), TensorProto.INT8)
    scale = body.op("Where", flat, zero, scale)
    scale = body.op("Where", poisoned, body.real(np.nan), scale)
    width = body.dims("nope", -1)
    tiles = body.op("Div", width, body.ints(tile))
    return body.reshape(q, lead, width), body.reshape(scale, lead, tiles)
