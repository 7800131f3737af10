"""Already-int8 caches: pack the selected rows, then the int8 operator over them."""

from __future__ import annotations

import onnx

from sfa_onnx.op import KV_CACHE_PACK
from sfa_onnx.op import SPARSE_FLASH_ATTENTION_ANTIQUANT as ANTIQUANT
from sfa_onnx.passes.axes import Expr, Label, Quot
from sfa_onnx.passes.axes_trace import Ref, Stop
from sfa_onnx.passes.bind_rows import Columns, State
from sfa_onnx.passes.build import Group
from sfa_onnx.passes.build_plan import Built, Plan, deliver, queries, query_rows
from sfa_onnx.passes.build_rows import gathered
from sfa_onnx.passes.build_select import gathered_entries

__all__ = ["build_int8"]

_T = onnx.TensorProto


def build_int8(plan: Plan) -> Built:
    """Pack the selected rows, then the operator over them: one row group per query token."""
    site, e = plan.site, plan.e
    nope, rope = queries(plan)
    width = site.nope.label.size
    tile = _tile(site.nope)
    if site.selected:
        raise Stop("whole-cache", site.nope.deep.ref.value)
    rows = [site.rows]
    lead: list[Group] = [*rows, [site.key], []]
    ints = gathered(plan, site.nope.path[site.nope.behind :], [*lead, [site.nope.label]], _T.INT8)
    tiles = Label("tiles", width // tile)
    scale = gathered(plan, _by_tile(site.nope, tile, tiles), [*lead, [tiles]], 0)
    scale = e.cast(scale, _T.FLOAT)
    inputs = [ints, "", scale]
    query = query_rows(plan, nope, [*rows, [], site.heads, [site.nope.label]])
    if site.rope is not None and rope is not None:
        side = gathered(plan, site.rope.path, [*lead, [site.rope.label]], plan.elem_type)
        inputs[1] = e.cast(side, plan.elem_type)
        query = _joined_query(plan, nope, rope, query)
    packed = e.emit(
        KV_CACHE_PACK.name, inputs, "packed", _T.INT8, domain=KV_CACHE_PACK.domain, tile_size=tile
    )
    entries = gathered_entries(e, site, rows)
    entries = e.emit("Unsqueeze", [entries, e.ints([1, 2])], "indices", _T.INT32)
    rope_width = site.rope.label.size if site.rope is not None else 0
    out = _antiquant(plan, query, packed, entries, tile, rope_width)
    deliver(plan, out, [site.rows, [], site.heads, [site.column]])
    return Built(
        e, ANTIQUANT, "int8", plan.output, nope.ref, rope.ref if rope else None, plan.scale, []
    )


def _antiquant(
    plan: Plan, query: str, packed: str, entries: str, tile: int, rope_width: int
) -> str:
    return plan.e.emit(
        ANTIQUANT.name,
        [query, packed, packed, entries],
        "attention",
        plan.elem_type,
        domain=ANTIQUANT.domain,
        scale_value=float(plan.scale),
        sparse_block_size=1,
        key_quant_mode=2,
        value_quant_mode=2,
        layout_query="BSND",
        layout_kv="BSND",
        sparse_mode=0,
        attention_mode=2,
        quant_scale_repo_mode=1,
        tile_size=tile,
        rope_head_dim=rope_width,
    )


def _tile(columns: Columns) -> int:
    """How many consecutive columns share one scale."""
    ref, label = columns.scale[-1].ref, columns.label
    over = [c for c in ref.coords if label in c.labels and not c.reads]
    if not over:
        return label.size
    if len(over) == 1:
        rest = [(a, c) for a, c in over[0].terms if label in Expr.of(a).labels]
        atom, factor = rest[0]
        plain = isinstance(atom, Quot) and atom.expr == Expr.of(label) and factor == 1
        if plain and len(rest) == 1 and isinstance(atom, Quot) and label.size % atom.by == 0:
            return atom.by
        if atom == label and factor == 1 and len(rest) == 1:
            return 1
    raise Stop(
        f"the scale {ref.value} is not one number per tile of consecutive columns"
        f" (column d is scaled by the entry at {', '.join(map(str, over))})",
        ref.value,
        "expected scales [.., C / tile]",
    )


def _by_tile(columns: Columns, tile: int, tiles: Label) -> list[State]:
    """The scale's path with the column label replaced by the tile's."""
    swap = {columns.label: Expr.of(tiles) * tile}
    return [State(s.ref.substitute(swap), s.factor) for s in columns.scale]


def _joined_query(plan: Plan, nope: State, rope: State, query: str) -> str:
    """[.., C + R]: the tensor both parts were sliced from, or their Concat."""
    site, e = plan.site, plan.e
    assert site.rope is not None
    groups: list[Group] = [site.rows, [], site.heads]
    whole = _whole_query(plan, nope, rope)
    if whole is not None:
        ref, label = whole
        return query_rows(plan, State(ref), [*groups, [label]])
    side = query_rows(plan, rope, [*groups, [site.rope.label]])
    return e.emit("Concat", [query, side], "query", plan.elem_type, axis=-1)


def _whole_query(plan: Plan, nope: State, rope: State) -> tuple[Ref, Label] | None:
    site = plan.site
    if nope.ref.value != rope.ref.value or site.rope is None or plan.absorb is not None:
        return None
    a, b = site.nope.label, site.rope.label
    both = Label("columns", a.size + b.size)
    first = nope.ref.substitute({a: Expr.of(both)})
    second = rope.ref.substitute({b: Expr.of(both) + (-a.size)})
    return (first, both) if first == second else None
