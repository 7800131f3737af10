"""Packed cache rows in the one width that the NPU reads: 656 bytes, with a 16-bit rope.

`--npu-dtype` on a float32 model casts queries and ropes. Its packed cache rows then hold two bytes
a rope lane instead of four, so the cache inputs and outputs of the graph get narrower (784 -> 656
bytes). Rows without a rope get one of zeros (528 -> 656 bytes). Names and order stay.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from sfa_onnx.ascend.flavour.carriers import Carriers
from sfa_onnx.ascend.flavour.scope import Facts, Names
from sfa_onnx.errors import ContractError
from sfa_onnx.files.onnx_attrs import find_attribute
from sfa_onnx.operator.contract import PackedRow

__all__ = ["narrow_rows", "wide_row", "widen_rows"]

_FLOAT32 = 4  # bytes


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


def narrow_rows(
    model: ModelProto, starts: dict[str, PackedRow], facts: Facts, names: Names
) -> list[str]:
    """Write the narrow width into every value that carries the rows; returns notes.

    Args:
        model: the ATC flavour in the making.
        starts: key inputs of our nodes and their (wide) layout.
        facts: element types and dims of values; the dims follow.
        names: of its values and nodes.

    Raises:
        ContractError: an operator on the way looks into the rows, so their width cannot change.
    """
    changes = {
        start: (row.bytes, PackedRow(row.nope, row.rope, row.tile, 2).bytes)
        for start, row in starts.items()
    }
    hint = "width changes with --npu-dtype; export the model in bf16 or fp16 instead"
    return _resize(changes, Carriers(model, facts, names, hint), "16-bit rope")[0]


def widen_rows(
    model: ModelProto, starts: dict[str, PackedRow], facts: Facts, names: Names
) -> tuple[list[str], set[str]]:
    """Write the width of rows with a rope into every value that carries rows without.

    Args:
        model: the ATC flavour in the making.
        starts: key inputs of our nodes, now of these layouts, and before without the rope.
        facts: element types and dims of values; the dims follow.
        names: of its values and nodes.

    Returns:
        Notes, and the values that carry the rows.

    Raises:
        ContractError: an operator on the way looks into the rows.
    """
    changes = {
        start: (PackedRow(row.nope, 0, row.tile, row.itemsize).bytes, row.bytes)
        for start, row in starts.items()
    }
    hint = "width changes for the rope that the NPU's kernel wants; keep the cache in floats for it"
    return _resize(changes, Carriers(model, facts, names, hint), "a rope of zeros")


def _resize(
    changes: dict[str, tuple[int, int]], carriers: Carriers, why: str
) -> tuple[list[str], set[str]]:
    """Other widths for all that carries the rows of some values: value -> (old, new) bytes."""
    widths: dict[str, tuple[int, int]] = {}
    for change in dict.fromkeys(changes.values()):
        for start in (n for n, c in changes.items() if c == change):
            for name in carriers.of(start, change[0]):
                widths.setdefault(name, change)
        carriers.respell(change[1])
    dims = carriers.facts.dims
    for name, (_, new) in widths.items():
        if known := dims.get(name):
            dims[name] = (*known[:-1], new)
    return _write(carriers.model, widths, why), set(widths)


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
