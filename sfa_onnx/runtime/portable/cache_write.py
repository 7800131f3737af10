"""`sfa_onnx::KvCacheWrite` as standard ONNX nodes."""

from __future__ import annotations

from sfa_onnx.runtime.portable.body import Body

__all__ = ["cache_write_body"]


def cache_write_body(body: Body) -> str:
    """Write the body; values are named as the contract's inputs. Returns the pages.

    ScatterND leaves open which of two rows for one slot stays, so rows that a later one replaces
    are taken out first, with those that have no slot. [n, n] comparisons: meant for checking.
    """
    slots = body.to_int("slot_mapping")  # [n]
    here, there = body.unsqueeze(slots, 1), body.unsqueeze(slots, 0)
    order = body.range(body.dim("slot_mapping", 0))
    later = body.op("Less", body.unsqueeze(order, 1), body.unsqueeze(order, 0))
    replaced = body.op("And", body.op("Equal", here, there), later)
    count = body.op("ReduceSum", body.to_int(replaced), body.ints(1), keepdims=0)
    last = body.op("Equal", count, body.scalar(0))
    kept = body.op("And", last, body.op("Not", body.op("Less", slots, body.scalar(0))))
    width = body.dims("pages", -1)
    flat = body.reshape("pages", -1, width)
    chosen = body.op("Compress", order, kept, axis=0)
    rows = body.op("Gather", body.reshape("rows", -1, width), chosen, axis=0)
    where = body.unsqueeze(body.op("Gather", slots, chosen, axis=0), 1)
    written = body.op("ScatterND", flat, where, rows)
    return body.op("Reshape", written, body.op("Shape", "pages"))
