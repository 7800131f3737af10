"""Already-int8 caches: pack the selected rows, then the int8 operator over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from sfa_onnx.operator.op import KV_CACHE_PACK
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION_ANTIQUANT as ANTIQUANT
from sfa_onnx.passes.axes.expr import Expr, Label, Quot
from sfa_onnx.passes.axes.trace import Ref, Stop
from sfa_onnx.passes.bind.paths import State
from sfa_onnx.passes.bind.rows import Columns
from sfa_onnx.passes.emit.emitter import Group
from sfa_onnx.passes.emit.plan import (
    Built,
    Plan,
    deliver,
    queries,
    query_rows,
    rope_rows,
    split_rows,
    unrounded,
    with_sinks,
)
from sfa_onnx.passes.emit.rows import cache, gathered
from sfa_onnx.passes.emit.select import gathered_entries, selected_entries

__all__ = ["antiquant", "build_int8", "joined_query"]

_T = onnx.TensorProto


def build_int8(plan: Plan) -> Built:
    """Pack the selected rows, then the operator over them: one row group per query token."""
    site, e = plan.site, plan.e
    nope, rope = queries(plan)
    tile = _tile(site.nope)
    pick = _dense_rows(plan) if site.selected else _gathered_rows(plan)
    tiles = Label("tiles", site.nope.label.size // tile)
    ints = pick.rows(site.nope.path[site.nope.behind :], site.nope.label, _T.INT8)
    scales = unrounded(site, _by_tile(site.nope, tile, tiles), _T.FLOAT)
    scale = e.cast(pick.rows(scales, tiles, 0), _T.FLOAT)
    if site.nope.inverse:
        scale = e.emit("Reciprocal", [scale], "scale", _T.FLOAT)
    inputs = [ints, "", scale]
    order: list[Group] = [pick.order, [], site.heads]
    query = query_rows(plan, nope, [*order, [site.nope.label]])
    if site.rope is not None and rope is not None:
        side = pick.rows(site.rope.path, site.rope.label, plan.elem_type)
        inputs[1] = e.cast(side, plan.elem_type)
        query = joined_query(plan, nope, rope, query, order)
    packed = e.emit(
        KV_CACHE_PACK.name, inputs, "packed", _T.INT8, domain=KV_CACHE_PACK.domain, tile_size=tile
    )
    rope_width = site.rope.label.size if site.rope is not None else 0
    out = antiquant(plan, [query, packed, packed, pick.entries], tile, rope_width)
    deliver(plan, out, [*order, [site.column]])
    family = "int8-dense" if site.selected else "int8"
    return Built(
        e, ANTIQUANT, family, plan.output, nope.ref, rope.ref if rope else None, plan.scale, []
    )


@dataclass(frozen=True)
class _Picked:
    """How selected rows are had.

    Attributes:
        entries: sparse_indices [R, 1, 1, K] over the picked rows.
        order: labels of R.
        rows: (path, column label, elem_type or 0) -> [R, K, 1, width].
    """

    entries: str
    order: list[Label]
    rows: Callable[[Sequence[State], Label, int], str]


def _gathered_rows(plan: Plan) -> _Picked:
    """The graph gathers them already."""
    site, e = plan.site, plan.e
    entries = gathered_entries(e, site, [site.rows])
    entries = e.emit("Unsqueeze", [entries, e.ints([1, 2])], "indices", _T.INT32)

    def rows(path: Sequence[State], column: Label, elem_type: int) -> str:
        return gathered(plan, path, [site.rows, [site.key], [], [column]], elem_type)

    return _Picked(entries, list(site.rows), rows)


def _dense_rows(plan: Plan) -> _Picked:
    """The graph dequantises the whole cache and masks: gather the selected tokens' rows instead."""
    site, e = plan.site, plan.e
    split_rows(plan)
    tokens = selected_entries(e, site, [plan.batch, plan.tokens])  # [B, S1, K], -1 last
    zero = e.constant(np.asarray(0, np.int32))
    safe = e.cast(e.emit("Max", [tokens, zero], "safe", _T.INT32), _T.INT64)
    count = e.emit("Shape", [tokens], "shape", _T.INT64)
    count = e.emit("Gather", [count, e.ints([2])], "count", _T.INT64, axis=0)
    if plan.batch:
        first = e.iota_of(plan.batch, 3)
        first = e.emit("Mul", [first, e.size([site.key])], "first", _T.INT64)
        safe = e.emit("Add", [safe, first], "row", _T.INT64)
    dims = e.emit("Concat", [e.ints([-1, 1, 1]), count], "dims", _T.INT64, axis=0)
    flat = e.emit("Reshape", [tokens, dims], "tokens", _T.INT32)
    valid = e.emit("GreaterOrEqual", [flat, zero], "valid", _T.BOOL)
    one = e.constant(np.asarray(1, np.int64))
    stop = e.emit("Squeeze", [count], "stop", _T.INT64)
    begin = e.constant(np.asarray(0, np.int64))
    slots = e.cast(e.emit("Range", [begin, stop, one], "slots", _T.INT64), _T.INT32)
    none = e.constant(np.asarray(-1, np.int32))
    entries = e.emit("Where", [valid, slots, none], "indices", _T.INT32)

    def rows(path: Sequence[State], column: Label, elem_type: int) -> str:
        stored = cache(plan, path, [plan.batch, [site.key], [column]], elem_type)
        kind = e.elem_type(stored)
        stored = e.emit("Reshape", [stored, e.ints([-1, column.size])], "flat", kind)
        picked = e.emit("Gather", [stored, safe], "rows", kind, axis=0)
        shape = [e.ints([-1]), count, e.ints([1, column.size])]
        dims = e.emit("Concat", shape, "dims", _T.INT64, axis=0)
        return e.emit("Reshape", [picked, dims], "rows", kind)

    return _Picked(entries, [*plan.batch, *plan.tokens], rows)


def antiquant(
    plan: Plan, inputs: list[str], tile: int, rope_width: int, layout_kv: str = "BSND"
) -> str:
    """The int8 operator with every attribute written."""
    attrs: dict[str, Any] = ANTIQUANT.complete(
        {
            "scale_value": float(plan.scale),
            "sparse_block_size": 1,
            "layout_query": "BSND",
            "layout_kv": layout_kv,
            "sparse_mode": 0,
            "tile_size": tile,
            "rope_head_dim": rope_width,
        }
    )
    return plan.e.emit(
        ANTIQUANT.name,
        with_sinks(plan, ANTIQUANT, inputs),
        "attention",
        plan.elem_type,
        domain=ANTIQUANT.domain,
        **attrs,
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


def joined_query(plan: Plan, nope: State, rope: State, query: str, groups: Sequence[Group]) -> str:
    """[.., C + R]: the tensor both parts were sliced from, or their Concat."""
    site, e = plan.site, plan.e
    assert site.rope is not None
    whole = _whole_query(plan, nope, rope)
    if whole is not None:
        ref, label = whole
        return query_rows(plan, State(ref), [*groups, [label]])
    side = rope_rows(plan, rope, [*groups, [site.rope.label]])
    return e.emit("Concat", [query, side], "query", plan.elem_type, axis=-1)


def _whole_query(plan: Plan, nope: State, rope: State) -> tuple[Ref, Label] | None:
    site = plan.site
    if (
        nope.ref.value != rope.ref.value
        or site.rope is None
        or plan.absorb is not None
        or plan.rope_by != 1
    ):
        return None
    a, b = site.nope.label, site.rope.label
    both = Label("columns", a.size + b.size)
    first = nope.ref.substitute({a: Expr.of(both)})
    second = rope.ref.substitute({b: Expr.of(both) + (-a.size)})
    return (first, both) if first == second else None
