"""Indexers with fewer heads than CANN's kernel is built for: zero heads of weight zero.

The kernel takes 64 heads. A head whose query and weight are zero adds nothing to any score, so the
selection stays the same to the bit.
"""

from __future__ import annotations

from typing import Final

from onnx import NodeProto

from sfa_onnx.ascend.flavour.scope import Scope
from sfa_onnx.operator.op import LIGHTNING_INDEXER, NPU, QUANT_LIGHTNING_INDEXER, find_op

__all__ = ["padded_heads"]

# input -> axis of its heads, from the end
_PER_HEAD: Final = {"query": 2, "weights": 1, "query_dequant_scale": 1}


def padded_heads(scope: Scope, node: NodeProto) -> list[NodeProto] | None:
    """Rule: an indexer with fewer heads -> zeros appended to what it has per head."""
    op = find_op(node.domain, node.op_type)
    if op not in (LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER):
        return None
    dims = scope.dims(node.input[0])
    heads = dims[-2] if dims is not None and len(dims) > 2 else None
    if dims is None or heads is None or not 0 < heads < NPU.indexer_heads:
        return None
    made = NodeProto()
    made.CopyFrom(node)
    nodes: list[NodeProto] = []
    for i, tensor in enumerate(op.inputs[: len(node.input)]):
        if tensor.name not in _PER_HEAD or not node.input[i]:
            continue
        rank = len(dims) if tensor.name == "query" else len(dims) - 1
        pads = [0] * (2 * rank)
        pads[-_PER_HEAD[tensor.name]] = NPU.indexer_heads - heads
        by = scope.constant(pads, f"{node.name}/{tensor.name}_pads")
        kind = scope.dtype(node.input[i])
        pad = scope.node("Pad", [node.input[i], by], f"{node.name}/{tensor.name}_pad", dtype=kind)
        made.input[i] = pad.output[0]
        nodes.append(pad)
    return [*nodes, made]
