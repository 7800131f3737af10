"""Narrow float32 cache rows to what the NPU reads: 16-bit rope in every packed row.

`--npu-dtype` on a float32 model casts queries and ropes. Its packed cache rows then hold two bytes
a rope lane instead of four, so the cache inputs and outputs of the graph get narrower (784 -> 656
bytes); names and order stay.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto

from sfa_onnx.ascend.flavour.scope import Facts
from sfa_onnx.errors import ContractError
from sfa_onnx.files.onnx_attrs import find_attribute
from sfa_onnx.operator.contract import PackedRow
from sfa_onnx.operator.op import BINDINGS, KV_CACHE_PACK, KV_CACHE_WRITE

__all__ = ["narrow_rows", "wide_row"]

_FLOAT32 = 4  # bytes
# What may lie between a cache input and our operator without looking into the rows.
_CARRIERS = frozenset(
    {"Concat", "ScatterND", "ScatterElements", "Identity", "Gather", KV_CACHE_WRITE.name}
)
_OURS = frozenset({b.atc_type for b in BINDINGS} | {KV_CACHE_PACK.name})


def wide_row(node: NodeProto, facts: Facts) -> PackedRow | None:
    """The row layout of a node that reads float32 rope lanes, else None."""
    query, key = facts.dims.get(node.input[0]), facts.dims.get(node.input[1])
    rope, tile = find_attribute(node, "rope_head_dim"), find_attribute(node, "tile_size")
    if not query or not key or rope is None or tile is None or not rope.i:
        return None
    if query[-1] is None or key[-1] is None:
        return None
    try:
        row = PackedRow.of(key[-1], query[-1], rope.i, tile.i)
    except ContractError:
        return None  # neither: `check` says what is wrong with it
    return row if row.itemsize == _FLOAT32 else None


def narrow_rows(model: ModelProto, starts: dict[str, PackedRow], facts: Facts) -> list[str]:
    """Write the narrow width into every value that carries the rows; returns notes.

    Args:
        model: the ATC flavour in the making.
        starts: key inputs of our nodes and their (wide) layout.
        facts: element types of values.

    Raises:
        ContractError: an operator on the way looks into the rows, so their width cannot change.
    """
    graph = model.graph
    widths: dict[str, tuple[int, int]] = {}
    readers: dict[str, list[NodeProto]] = {}
    producers = {out: node for node in graph.node for out in node.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for start, row in starts.items():
        narrow = PackedRow(row.nope, row.rope, row.tile, 2).bytes
        queue = [start]
        while queue:
            name = queue.pop()
            if name in widths or facts.types.get(name) != TensorProto.INT8:
                continue
            widths[name] = (row.bytes, narrow)
            around = [*readers.get(name, ()), producers.get(name)]
            for node in (n for n in around if n is not None):
                queue += _beside(node, name)
    return _write(model, widths)


def _write(model: ModelProto, widths: dict[str, tuple[int, int]]) -> list[str]:
    graph, notes = model.graph, []
    outer = {v.name for v in (*graph.input, *graph.output)}
    for value in (*graph.input, *graph.output, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        wide, narrow = widths.get(value.name, (0, 0))
        if wide and dims and dims[-1].dim_value == wide:
            dims[-1].dim_value = narrow
            if value.name in outer:
                notes.append(f"{value.name}: rows of {wide} bytes become {narrow} (16-bit rope)")
    return notes


def _beside(node: NodeProto, name: str) -> list[str]:
    if node.op_type in _OURS:
        return []
    if node.op_type not in _CARRIERS:
        raise ContractError(
            f"node {node.name!r} ({node.op_type}) looks into the packed rows of {name!r}, whose"
            " width changes with --npu-dtype; export the model in bf16 or fp16 instead"
        )
    return [*node.input, *node.output]
