"""Indexers smaller than CANN's kernel is built for: zero heads of weight zero, zero columns.

The kernel takes 64 heads of 128 columns. A head whose query and weight are zero adds nothing to any
score, and neither does a column that is zero in query and key, so the selection stays the same to
the bit. Columns are added to contiguous keys only: pages would be copied as a whole in every step.
"""

from __future__ import annotations

from typing import Final

from onnx import NodeProto

from sfa_onnx.ascend.flavour.scope import Scope
from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.operator.op import LIGHTNING_INDEXER, NPU, QUANT_LIGHTNING_INDEXER, find_op

__all__ = ["padded_indexer"]

# input -> its axes of heads and columns, from the end (0: none)
_AXES: Final = {
    "query": (2, 1),
    "key": (0, 1),
    "weights": (1, 0),
    "query_dequant_scale": (1, 0),
}


def padded_indexer(scope: Scope, node: NodeProto) -> list[NodeProto] | None:
    """Rule: an indexer with fewer heads or columns -> zeros appended to its operands."""
    op = find_op(node.domain, node.op_type)
    if op not in (LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER):
        return None
    dims = scope.dims(node.input[0])
    if dims is None or len(dims) < 3:
        return None
    paged = attribute(node, "layout_key", "BSND") == "PA_BSND"
    heads = _missing(dims[-2], NPU.indexer_heads)
    columns = 0 if paged else _missing(dims[-1], NPU.indexer_dim)
    if not heads and not columns:
        return None
    made = NodeProto()
    made.CopyFrom(node)
    nodes: list[NodeProto] = []
    for i, tensor in enumerate(op.inputs[: len(node.input)]):
        axes = _AXES.get(tensor.name, (0, 0)) if node.input[i] else (0, 0)
        rank = len(dims) - 1 if tensor.name in ("weights", "query_dequant_scale") else len(dims)
        pads = [0] * (2 * rank)
        for axis, count in zip(axes, (heads, columns), strict=True):
            if axis:
                pads[-axis] = count
        if not any(pads):
            continue
        by = scope.constant(pads, f"{node.name}/{tensor.name}_pads")
        kind = scope.dtype(node.input[i])
        pad = scope.node("Pad", [node.input[i], by], f"{node.name}/{tensor.name}_pad", dtype=kind)
        made.input[i] = pad.output[0]
        nodes.append(pad)
    return [*nodes, made]


def _missing(size: int | None, wanted: int) -> int:
    """How much a dim lacks; 0 for one that is unknown, or too large."""
    return wanted - size if size is not None and 0 < size < wanted else 0
