"""The lightning indexers as standard ONNX nodes: float32 scores and a TopK.

Near-equal scores may come in another order than in the float64 reference; equal ones do not.
"""

from __future__ import annotations

from typing import Any

from onnx import TensorProto

from sfa_onnx.operator.contract import Rounding
from sfa_onnx.operator.op import QUANT_LIGHTNING_INDEXER, OpContract
from sfa_onnx.runtime.portable.body import Body
from sfa_onnx.runtime.portable.rows import Rows

__all__ = ["indexer_body"]


def indexer_body(
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
        op: one of the two indexers.
        present: names of the inputs that the calling node has.
        attrs: its attributes.
        elem_type: the query's onnx element type.
        rounding: "npu" takes the quantised indexer's two steps through float16.

    Returns:
        sparse_indices, and sparse_values for the float indexer.
    """
    rows = Rows(body, present, attrs)
    threshold = body.unsqueeze(rows.threshold(), 1)  # [T, 1]
    room = body.dim("key", 0 if rows.layout == "TND" else 1)
    if rows.layout == "PA_BSND":
        room = body.op("Mul", room, body.dim("block_table", 1))
    tokens = body.unsqueeze(body.range(room), 0)  # [1, L]
    usable = body.op("Less", tokens, threshold)  # [T, L]
    half = rounding == "npu" and op is QUANT_LIGHTNING_INDEXER
    scores = _scores(body, rows, op, rows.addresses(tokens, usable), half)
    scores = body.op("Where", usable, scores, body.real(float("-inf")))
    count = attrs["sparse_count"]
    # K columns that never win, so that K may exceed the number of keys.
    padding = body.op("Expand", body.real(float("-inf")), _shape(body, scores, count))
    padded = body.op("Concat", scores, padding, axis=-1)
    values, indices = body.top(padded, count)
    found = body.op("Less", body.constant_range(count), threshold)  # ranks below the threshold
    indices = body.op("Where", found, indices, body.scalar(-1))
    lead = body.dims("query", 0, -2)
    shape = (lead, body.ints(1), body.ints(count))
    outputs = [body.reshape(body.cast(indices, TensorProto.INT32), *shape)]
    if op is not QUANT_LIGHTNING_INDEXER:
        outputs.append(body.reshape(body.cast(values, elem_type), *shape))
    return outputs


def _scores(body: Body, rows: Rows, op: OpContract, addresses: str, half: bool) -> str:
    """[T, L] float32; `half`: weights times scales, and relu / 1024, on float16's grid."""
    flat = body.reshape("key", -1, body.dims("key", -1))
    keys = body.to_float(body.op("Gather", flat, addresses, axis=0))  # [T, L, Di]
    query = body.to_float(rows.flat_query("query"))
    products = body.op("MatMul", query, body.op("Transpose", keys, perm=[0, 2, 1]))
    weights = body.to_float("weights")
    if op is QUANT_LIGHTNING_INDEXER:
        weights = body.op("Mul", weights, body.to_float("query_dequant_scale"))
    weights = body.reshape(weights, -1, 1, body.dims("weights", -1))
    products = body.op("Relu", products)
    if half:
        weights = _through_float16(body, weights)
        products = _through_float16(body, body.op("Div", products, body.real(1024)))
    scores = body.op("MatMul", weights, products)
    scores = body.op("Squeeze", scores, body.ints(1))
    if op is QUANT_LIGHTNING_INDEXER:
        scale = body.reshape(body.to_float("key_dequant_scale"), -1)
        scores = body.op("Mul", scores, body.op("Gather", scale, addresses))
    return scores


def _through_float16(body: Body, x: str) -> str:
    return body.to_float(body.cast(x, TensorProto.FLOAT16))


def _shape(body: Body, scores: str, count: int) -> str:
    return body.op("Concat", body.dims(scores, 0, 1), body.ints(count), axis=0)
