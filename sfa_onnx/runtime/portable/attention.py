"""The attention operators as standard ONNX nodes: what a portable model ships as function body.

The body follows `docs/operator.md` step by step in float32. It cannot raise errors, so a usable
index after a negative one is skipped over instead of refused, and lengths are not checked. With
rounding "npu" dequantised latents are cast to the query's type and back; that cast breaks float16's
ties to even where the kernel breaks them away from zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from sfa_onnx.operator.contract import Rounding
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION_ANTIQUANT, OpContract
from sfa_onnx.runtime.portable.body import Body
from sfa_onnx.runtime.portable.numbers import FORMATS, from_bytes
from sfa_onnx.runtime.portable.rows import Rows

__all__ = ["attention_body"]


def attention_body(
    body: Body,
    op: OpContract,
    present: frozenset[str],
    attrs: dict[str, Any],
    elem_type: int,
    rounding: Rounding = "exact",
) -> list[str]:
    """Write the body; values are named as the contract's inputs.

    Args:
        body: the writer.
        op: one of the two sparse attention operators.
        present: names of the inputs that the calling node has.
        attrs: its attributes (`scale_value` is read from the node at run time).
        elem_type: the query's onnx element type.
        rounding: what becomes of dequantised latents.

    Returns:
        attention_out, and of the float-cache operator softmax_max and softmax_sum.
    """
    rows = Rows(body, present, attrs)
    addresses, usable = _selected(body, rows, attrs["sparse_block_size"])
    if op is SPARSE_FLASH_ATTENTION_ANTIQUANT:
        keys, values = _packed_rows(body, addresses, usable, attrs, elem_type, rounding)
        query = body.to_float(rows.flat_query("query"))
    else:
        values = _float_rows(body, "key", addresses, usable)
        keys, query = values, body.to_float(rows.flat_query("query"))
        if "query_rope" in present:
            key_rope = _float_rows(body, "key_rope", addresses, usable)
            query_rope = body.to_float(rows.flat_query("query_rope"))
            keys = body.op("Concat", values, key_rope, axis=-1)
            query = body.op("Concat", query, query_rope, axis=-1)
    scores = body.op("MatMul", query, body.op("Transpose", keys, perm=[0, 2, 1]))
    scores = body.op("Mul", scores, body.attribute("scale_value"))
    masked = body.op("Where", body.unsqueeze(usable, 1), scores, body.real(float("-inf")))
    weights, top, total = _softmax(body, masked, "sinks" in present)
    out = body.op("MatMul", weights, values)
    any_usable = body.unsqueeze(body.to_bool(body.total(body.to_int(usable))), 2)
    out = body.op("Where", any_usable, out, body.real(0))
    out = body.cast(out, elem_type) if elem_type != TensorProto.FLOAT else out
    out = body.reshape(out, body.dims("query", 0, -1), body.dims(values, -1))
    if op is SPARSE_FLASH_ATTENTION_ANTIQUANT:
        return [out]
    return [out, *_statistics(body, rows, top, total, any_usable)]


def _softmax(body: Body, scores: str, sinks: bool) -> tuple[str, str, str]:
    """Weights, largest score and sum [T, N1, 1]; a row without a key has -inf and 0 (or a sink)."""
    top = body.maximum(scores)
    if sinks:
        top = body.op("Max", top, body.reshape("sinks", 1, -1, 1))
    lowest = body.op("Equal", top, body.real(float("-inf")))
    origin = body.op("Where", lowest, body.real(0), top)
    weights = body.op("Exp", body.op("Sub", scores, origin))
    total = body.total(weights)
    if sinks:
        sink = body.reshape("sinks", 1, -1, 1)
        own = body.op("Exp", body.op("Sub", sink, origin))
        all_of_it = body.op("Equal", sink, origin)  # also where both are +inf
        total = body.op("Add", total, body.op("Where", all_of_it, body.real(1), own))
    return body.op("Div", weights, total), top, total


def _statistics(body: Body, rows: Rows, top: str, total: str, any_usable: str) -> list[str]:
    """softmax_max and softmax_sum as CANN lays them out, or nothing when they are not asked for."""
    if not rows.attrs["return_softmax_lse"]:
        nothing = body.constant(np.zeros(0, np.float32))
        return [body.op("Identity", nothing) for _ in range(2)]
    lone_top, lone_total = body.real(0), body.real(0)
    if "sinks" in rows.present:
        visible = body.unsqueeze(rows.sees_any(), 1, 2)
        lone_top = body.op("Where", visible, body.reshape("sinks", 1, -1, 1), body.real(0))
        lone_total = body.op("Where", visible, body.real(1), body.real(0))
    lead: tuple[str | int, ...] = (1, body.dims("query", 0, 2))
    if not rows.tnd:
        lead = (body.dims("query", 0, 1), 1, body.dims("query", 1, 3))
    pairs = ((top, lone_top), (total, lone_total))
    return [body.reshape(body.op("Where", any_usable, x, lone), *lead) for x, lone in pairs]


def _float_rows(body: Body, name: str, addresses: str, usable: str) -> str:
    """Rows of a float cache: [T, n, width] float32, zero where not usable."""
    flat = body.reshape(name, -1, body.dims(name, -1))
    rows = body.to_float(body.op("Gather", flat, addresses, axis=0))
    return body.op("Where", body.unsqueeze(usable, -1), rows, body.real(0))


def _packed_rows(
    body: Body,
    addresses: str,
    usable: str,
    attrs: dict[str, Any],
    elem_type: int,
    rounding: Rounding,
) -> tuple[str, str]:
    """Packed rows decoded to [T, n, C+R] and [T, n, C] float32, zero where not usable."""
    form = FORMATS[elem_type]
    rope, tile = attrs["rope_head_dim"], attrs["tile_size"]
    flat = body.reshape("key", -1, body.dims("key", -1))
    rows = body.op("Gather", flat, addresses, axis=0)
    width = body.op("Sub", body.dims("query", -1), body.ints(rope))
    rope_end = body.op("Add", width, body.ints(rope * form.bytes))
    nope = body.to_float(body.slice_last(rows, body.ints(0), width))
    end = body.dims("key", -1)
    scale = from_bytes(body, body.slice_last(rows, rope_end, end), FORMATS[TensorProto.FLOAT])
    tiles = body.reshape(nope, body.dims(rows, 0, -1), -1, tile)
    latent = body.op("Mul", tiles, body.unsqueeze(scale, -1))
    latent = body.reshape(latent, body.dims(rows, 0, -1), width)
    if rounding == "npu" and elem_type != TensorProto.FLOAT:
        latent = body.to_float(body.cast(latent, elem_type))
    keep, zero = body.unsqueeze(usable, -1), body.real(0)
    latent = body.op("Where", keep, latent, zero)
    if not rope:
        return latent, latent
    key_rope = from_bytes(body, body.slice_last(rows, width, rope_end), form)
    key_rope = body.op("Where", keep, key_rope, zero)
    return body.op("Concat", latent, key_rope, axis=-1), latent


def _selected(body: Body, rows: Rows, size: int) -> tuple[str, str]:
    """Key rows [T, K * sparse_block_size] and which of them are usable (others are row 0)."""
    threshold = body.unsqueeze(rows.threshold(), 1, 2)  # [T, 1, 1]
    indices = body.reshape(body.to_int("sparse_indices"), -1, body.dims("sparse_indices", -1))
    blocks = body.unsqueeze(indices, 2)  # [T, K, 1]
    slots = body.range(body.dim("sparse_indices", -1))
    slots = body.op("Mul", body.unsqueeze(slots, 0, 2), body.scalar(size))
    looked_at = body.op("Less", slots, threshold)
    first = body.op("Mul", blocks, body.scalar(size))
    tokens = body.op("Add", first, body.range(body.scalar(size)))
    chosen = body.op("GreaterOrEqual", blocks, body.scalar(0))
    in_range = body.op("Less", tokens, threshold)
    usable = body.op("And", body.op("And", looked_at, chosen), in_range)
    flat = body.op("Mul", body.dims("sparse_indices", -1), body.ints(size))
    usable, tokens = body.reshape(usable, -1, flat), body.reshape(tokens, -1, flat)
    return rows.addresses(tokens, usable), usable
