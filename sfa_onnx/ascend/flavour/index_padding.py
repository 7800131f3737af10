"""Indexers smaller than CANN's kernel is built for: zero heads of weight zero, zero columns.

The kernel takes 64 heads of 128 columns. A head whose query and weight are zero adds nothing to any
score, and neither does a column that is zero in query and key, so the selection stays the same to
the bit. Columns are added to contiguous keys only: pages would be copied as a whole in every step.
Unknown sizes are left alone. On the way back the zeros go again.
"""

from __future__ import annotations

from typing import Final

from onnx import ModelProto, NodeProto

from sfa_onnx.ascend.flavour.scope import Facts, Names, Scope, apply, inner_graphs
from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.operator.op import LIGHTNING_INDEXER, NPU, QUANT_LIGHTNING_INDEXER, find_op
from sfa_onnx.passes.graph.sub_graphs import captured

__all__ = ["padded_indexer", "unpad_indexers"]

_INDEXERS: Final = (LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER)
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
    if op not in _INDEXERS or op is None:
        return None
    op.check_inputs(node.input)
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
        pads = _pads(tensor.name, len(dims), heads, columns)
        if not node.input[i] or not any(pads):
            continue
        by = scope.constant(pads, f"{node.name}/{tensor.name}_pads")
        kind = scope.dtype(node.input[i])
        pad = scope.node("Pad", [node.input[i], by], f"{node.name}/{tensor.name}_pad", dtype=kind)
        made.input[i] = pad.output[0]
        nodes.append(pad)
    return [*nodes, made]


def unpad_indexers(model: ModelProto, names: Names, opset: int) -> None:
    """Take off again what `padded_indexer` added; in place, nodes canonical.

    A site where a pad is missing or another one stands keeps all of them.
    """
    freed = _Freed()
    if apply(model, (freed,), Facts(), names, opset):
        apply(model, (freed.drop,), Facts(), names, opset)
        kept = [t for t in model.graph.initializer if t.name not in freed.constants]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)


class _Freed:
    """Rule: an indexer behind its zeros -> the same in front of them; which nodes that leaves."""

    def __init__(self) -> None:
        self.pads: set[str] = set()  # by their output
        self.constants: set[str] = set()
        self._inner: dict[int, set[str]] = {}  # graph -> what the graphs below it read of it

    def __call__(self, scope: Scope, node: NodeProto) -> list[NodeProto] | None:
        """Rewrite one padded indexer; others are left alone."""
        op = find_op(node.domain, node.op_type)
        if op not in _INDEXERS or op is None:
            return None
        given = [(i, t.name) for i, t in enumerate(op.inputs[: len(node.input)]) if node.input[i]]
        found = {i: pad for i, name in given if (pad := _own_pad(scope, node, i, name))}
        if 0 not in found or self._read_below(scope, [pad for pad, _ in found.values()]):
            return None
        query = found[0][1]
        rank = len(query) // 2
        if rank < 3:
            return None
        for i, name in given:
            wanted = _pads(name, rank, query[-2], query[-1])
            if (found[i][1] if i in found else [0] * len(wanted)) != wanted:
                return None
        made = NodeProto()
        made.CopyFrom(node)
        for i, (pad, _) in found.items():
            made.input[i] = pad.input[0]
            self.pads.add(pad.output[0])
            self.constants.add(pad.input[1])
        return [made]

    def _read_below(self, scope: Scope, pads: list[NodeProto]) -> bool:
        key = id(scope.graph)
        if key not in self._inner:
            holders = (n for n in scope.graph.node if any(inner_graphs(n)))
            self._inner[key] = {name for n in holders for name in captured(n)}
        return any({p.output[0], p.input[1]} & self._inner[key] for p in pads)

    def drop(self, _: Scope, node: NodeProto) -> list[NodeProto] | None:
        """Rule: a pad that nothing reads any more -> nothing."""
        return [] if node.op_type == "Pad" and node.output[0] in self.pads else None


def _own_pad(
    scope: Scope, node: NodeProto, index: int, tensor: str
) -> tuple[NodeProto, list[int]] | None:
    """The pad that `padded_indexer` put before an input, read by nothing else; its counts."""
    value = node.input[index]
    pad = scope.made_here(value)
    if pad is None or pad.op_type != "Pad" or len(pad.input) != 2 or pad.attribute:
        return None
    named = pad.name.startswith(f"{node.name}/{tensor}_pad")
    outputs = {v.name for v in scope.graph.output}
    readers = (scope.readers(value), scope.readers(pad.input[1]))
    pads = scope.array(pad.input[1])
    if (
        not named
        or {value, pad.input[1]} & outputs
        or any(len(r) != 1 for r in readers)
        or pads is None
    ):
        return None
    if pads.dtype.kind != "i" or pads.min(initial=0) < 0:  # a crop is not exact
        return None
    return pad, [int(n) for n in pads.reshape(-1)]


def _pads(tensor: str, rank: int, heads: int, columns: int) -> list[int]:
    """The `pads` of onnx's Pad for one input of an indexer whose query has `rank` axes."""
    pads = [0] * (2 * (rank - 1 if tensor in ("weights", "query_dequant_scale") else rank))
    for axis, count in zip(_AXES.get(tensor, (0, 0)), (heads, columns), strict=True):
        if axis:
            pads[-axis] = count
    return pads


def _missing(size: int | None, wanted: int) -> int:
    """How much a dim lacks; 0 for one that is unknown, or too large."""
    return wanted - size if size is not None and 0 < size < wanted else 0
