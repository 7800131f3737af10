"""Packed cache rows in the one width that the NPU reads: 656 bytes, with a 16-bit rope.

`--npu-dtype` on a float32 model casts queries and ropes. Its packed cache rows then hold two bytes
a rope lane instead of four, so the cache inputs and outputs of the graph get narrower (784 -> 656
bytes). Rows without a rope get one of zeros (528 -> 656 bytes). Names and order stay.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto

from sfa_onnx.ascend.flavour.scope import Facts
from sfa_onnx.errors import ContractError
from sfa_onnx.files.onnx_attrs import find_attribute
from sfa_onnx.operator.contract import PackedRow
from sfa_onnx.operator.op import BINDINGS, KV_CACHE_PACK, KV_CACHE_WRITE

__all__ = ["narrow_rows", "wide_row", "widen_rows"]

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
    widths: dict[str, tuple[int, int]] = {}
    for start, row in starts.items():
        narrow = PackedRow(row.nope, row.rope, row.tile, 2).bytes
        for name in _carrying(model, start, facts, "width changes with --npu-dtype; export the"
                              " model in bf16 or fp16 instead"):  # fmt: skip
            widths.setdefault(name, (row.bytes, narrow))
    return _write(model, widths, "16-bit rope")


def widen_rows(
    model: ModelProto, starts: dict[str, PackedRow], facts: Facts
) -> tuple[list[str], set[str]]:
    """Write the width of rows with a rope into every value that carries rows without.

    Args:
        model: the ATC flavour in the making.
        starts: key inputs of our nodes, now of these layouts, and before without the rope.
        facts: element types and dims of values; the dims follow.

    Returns:
        Notes, and the values that carry the rows.

    Raises:
        ContractError: an operator on the way looks into the rows.
    """
    widths: dict[str, tuple[int, int]] = {}
    for start, row in starts.items():
        bare = PackedRow(row.nope, 0, row.tile, row.itemsize).bytes
        for name in _carrying(model, start, facts, "width changes for the rope that the NPU's"
                              " kernel wants; keep the cache in floats for it"):  # fmt: skip
            widths.setdefault(name, (bare, row.bytes))
            dims = facts.dims.get(name)
            if dims:
                facts.dims[name] = (*dims[:-1], row.bytes)
    return _write(model, widths, "a rope of zeros"), set(widths)


def _carrying(model: ModelProto, start: str, facts: Facts, hint: str) -> list[str]:
    """Every value that holds the rows `start` holds, up and down the graph."""
    readers: dict[str, list[NodeProto]] = {}
    producers = {out: node for node in model.graph.node for out in node.output}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, None] = {}
    queue = [start]
    while queue:
        name = queue.pop()
        if name in found or facts.types.get(name) != TensorProto.INT8:
            continue
        found[name] = None
        around = [*readers.get(name, ()), producers.get(name)]
        for node in (n for n in around if n is not None):
            queue += _beside(node, name, hint)
    return list(found)


def _write(model: ModelProto, widths: dict[str, tuple[int, int]], why: str) -> list[str]:
    graph, notes = model.graph, []
    outer = {v.name for v in (*graph.input, *graph.output)}
    for value in (*graph.input, *graph.output, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        old, new = widths.get(value.name, (0, 0))
        if old and dims and dims[-1].dim_value == old:
            dims[-1].dim_value = new
            if value.name in outer:
                notes.append(f"{value.name}: rows of {old} bytes become {new} ({why})")
    return notes


def _beside(node: NodeProto, name: str, hint: str) -> list[str]:
    if node.op_type in _OURS:
        return []
    if node.op_type not in _CARRIERS:
        raise ContractError(
            f"node {node.name!r} ({node.op_type}) looks into the packed rows of {name!r}, whose"
            f" {hint}"
        )
    return [*node.input, *node.output]
