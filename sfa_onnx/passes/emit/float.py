"""Float caches: the float operator over the cache itself, or over gathered rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx

from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION
from sfa_onnx.passes.axes.expr import Expr, Label, Read, label_of
from sfa_onnx.passes.axes.places import axis_labels
from sfa_onnx.passes.axes.trace import Ref
from sfa_onnx.passes.bind.paths import State
from sfa_onnx.passes.bind.rows import Columns
from sfa_onnx.passes.bind.sources import from_topk
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
from sfa_onnx.passes.emit.select import (
    gathered_entries,
    selected_entries,
    token_entries,
)
from sfa_onnx.passes.emit.statistics import deliver_statistics, sunk

__all__ = ["build_float", "dense_keys", "direct_keys", "gathered_keys"]

_T = onnx.TensorProto


def build_float(plan: Plan) -> Built | None:
    """The float operator over the cache itself, or over gathered rows."""
    site, e = plan.site, plan.e
    nope, rope = queries(plan)
    if site.selected:
        keys, entries, family = dense_keys(plan)
    elif (direct := direct_keys(plan)) is not None:
        keys, entries, family = (*direct, "float-gather")
    elif not site.tracer.opaque:
        return None
    else:
        keys, entries, family = gathered_keys(plan)
    query = [plan.batch, plan.tokens, site.heads]
    q = query_rows(plan, nope, [*query, [site.nope.label]])
    q_rope = ""
    if rope is not None and site.rope is not None:
        q_rope = rope_rows(plan, rope, [*query, [site.rope.label]])
    entries = e.emit("Unsqueeze", [entries, e.ints([2])], "indices", _T.INT32)
    out, *softmax = sparse_attention(plan, q, q_rope, keys, entries)
    if softmax:
        groups: list[Group] = [plan.batch, [], plan.tokens, site.heads]
        deliver_statistics(plan, softmax[0], softmax[1], groups)
        out = sunk(plan, out, softmax[0], softmax[1], groups)
    deliver(plan, out, [*query, [site.column]])
    return Built(
        e,
        SPARSE_FLASH_ATTENTION,
        family,
        plan.output,
        nope.ref,
        rope.ref if rope else None,
        plan.scale,
        [],
    )


def sparse_attention(
    plan: Plan, query: str, query_rope: str, keys: tuple[str, str], entries: str
) -> list[str]:
    """The float operator's outputs, every attribute written; absent tail inputs are left out."""
    key, key_rope = keys
    inputs = [query, key, key, entries]
    if query_rope:
        inputs += ["", "", "", query_rope, key_rope]
    attrs: dict[str, Any] = SPARSE_FLASH_ATTENTION.complete(
        {
            "scale_value": float(plan.scale),
            "sparse_block_size": 1,
            "layout_query": "BSND",
            "layout_kv": "BSND",
            "sparse_mode": 0,
        }
    )
    outputs = {"attention": plan.elem_type}
    if plan.site.statistics:
        outputs |= {"softmax_max": _T.FLOAT, "softmax_sum": _T.FLOAT}
        attrs["return_softmax_lse"] = 1
    return plan.e.several(
        SPARSE_FLASH_ATTENTION.name,
        with_sinks(plan, SPARSE_FLASH_ATTENTION, inputs),
        outputs,
        domain=SPARSE_FLASH_ATTENTION.domain,
        **attrs,
    )


def dense_keys(plan: Plan) -> tuple[tuple[str, str], str, str]:
    """Keys are the cache as it is; the selection comes from the mask."""
    site = plan.site
    split_rows(plan)
    keys = tuple(
        cache(plan, c.path, [plan.batch, [site.key], [], [c.label]], plan.elem_type) if c else ""
        for c in (site.nope, site.rope)
    )
    entries = selected_entries(plan.e, site, [plan.batch, plan.tokens])
    return (keys[0], keys[1]), entries, "float-dense"


def gathered_keys(plan: Plan) -> tuple[tuple[str, str], str, str]:
    """The rows that the graph gathers, one group of them per query token."""
    site, e = plan.site, plan.e
    plan.batch, plan.tokens = list(site.rows), []
    parts = []
    for columns in (site.nope, site.rope):
        if columns is None:
            parts.append("")
            continue
        groups: list[Group] = [site.rows, [site.key], [], [columns.label]]
        value = gathered(plan, columns.path, groups, plan.elem_type)
        parts.append(e.cast(value, plan.elem_type))
    entries = gathered_entries(e, site, [site.rows, []])
    return (parts[0], parts[1]), entries, "float-gathered-rows"


def direct_keys(plan: Plan) -> tuple[tuple[str, str], str] | None:
    """(keys, entries) over the cache itself when one index tensor addresses its token axis.

    A bare index (no mask, not from TopK) that is added to an offset into all sequences may leave
    its own one: then (`Tracer.opaque`) all rows are one sequence, addressed by the finished sum.
    """
    site, e = plan.site, plan.e
    if site.tracer.opaque and site.visible and not site.finished:
        return None
    columns = [c for c in (site.nope, site.rope) if c is not None]
    read = _common_read(columns, site.key)
    if read is None:
        return None
    key = None
    paths = []
    for c in columns:
        found = _behind_gather(plan, c, read)
        if found is None:
            return None
        size, states = found
        key = key or Label("token", size)
        if key.size != size:
            return None
        swapped = [_swap_read(s, read, key) for s in states]
        paths.append((swapped, c.label))
    indices = Ref(read.value, read.coords)
    if key is None or not _fits(plan, indices, key, paths[0][0][0]):
        return None
    bare = not site.visible and not from_topk(site.tracer, indices)
    if bare and any(_offset(c, read) for c in columns):
        return None
    batch = {x for states, label in paths for x in states[-1].ref.labels} - {key}
    plan.batch = [x for x in site.rows if x in batch]
    plan.tokens = [x for x in site.rows if x not in batch]
    keys = [
        cache(plan, states, [plan.batch, [key], [], [label]], plan.elem_type)
        for states, label in paths
    ]
    entries = token_entries(e, site, indices, [plan.batch, plan.tokens], key)
    return (keys[0], keys[1] if len(keys) > 1 else ""), entries


def _common_read(columns: Sequence[Columns], key: Label) -> Read | None:
    reads = []
    for c in columns:
        own = list(dict.fromkeys(r for x in c.deep.ref.coords for r in x.reads))
        if len(own) != 1 or not (key.size == 1 or any(label_of(x) == key for x in own[0].coords)):
            return None
        reads.append(own[0])
    return reads[0] if all(r == reads[0] for r in reads) else None


def _offset(columns: Columns, read: Read) -> bool:
    """Whether the gather itself reads at a sum of the index and something else."""
    at = next(s.ref for s in columns.path if any(c.reads for c in s.ref.coords))
    return Expr.of(read) not in at.coords


def _behind_gather(plan: Plan, columns: Columns, read: Read) -> tuple[int, list[State]] | None:
    """States that are addressed by the index alone on one axis, and that axis's size."""
    alone = Expr.of(read)
    found: list[State] = []
    size = 0
    for state in unrounded(plan.site, columns.path, plan.elem_type):
        coords = state.ref.coords
        if alone not in coords or state.factor != columns.deep.factor:
            continue
        others = [c for c in coords if c != alone]
        if any(c.reads or axis_labels(c) is None for c in others):
            continue
        inner = {x for c in read.coords for x in c.labels}
        used = {x for c in others for x in c.labels} - {columns.label}
        if used & (inner - _deep_labels(columns, read)):
            continue
        size = plan.site.tracer.shape(state.ref.value)[coords.index(alone)]
        found.append(state)
    return (size, found) if found else None


def _deep_labels(columns: Columns, read: Read) -> set[Label]:
    alone = Expr.of(read)
    return {x for c in columns.deep.ref.coords if c != alone for x in c.labels}


def _swap_read(state: State, read: Read, key: Label) -> State:
    alone = Expr.of(read)
    coords = tuple(Expr.of(key) if c == alone else c for c in state.ref.coords)
    return State(Ref(state.ref.value, coords), state.factor)


def _fits(plan: Plan, indices: Ref, key: Label, cache: State) -> bool:
    """Whether a row never has more entries than the cache has tokens (the op looks at no more)."""
    tracer = plan.site.tracer
    plan.e.learn(cache.ref)
    if from_topk(tracer, indices):
        return True
    static = plan.e.static(key) and plan.e.static(plan.site.key)
    return static and plan.site.key.size <= key.size
