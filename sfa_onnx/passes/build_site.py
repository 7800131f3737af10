"""The replacement of one bound site: the operator and what it needs before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from sfa_onnx.contract import OpContract
from sfa_onnx.op import INT64_MAX, KV_CACHE_PACK, SPARSE_FLASH_ATTENTION
from sfa_onnx.op import SPARSE_FLASH_ATTENTION_ANTIQUANT as ANTIQUANT
from sfa_onnx.passes.axes import Expr, Label, Read, label_of, merge
from sfa_onnx.passes.axes_trace import Move, Ref, Scaled, Stop, is_float
from sfa_onnx.passes.bind import Query, Site
from sfa_onnx.passes.bind_rows import Columns, State
from sfa_onnx.passes.build import Emitter, Group, axis_labels
from sfa_onnx.passes.build_select import (
    from_topk,
    gathered_entries,
    selected_entries,
    token_entries,
)

__all__ = ["Built", "build_site"]

_T = onnx.TensorProto


@dataclass
class Built:
    """A replacement and what it says about the site."""

    emitter: Emitter
    op: OpContract
    family: str
    output: str
    query: Ref
    query_rope: Ref | None
    scale: float
    notes: list[str]


@dataclass
class _Plan:
    """Decisions shared by the steps: axes of the operator's query, types, scale."""

    e: Emitter
    site: Site
    batch: list[Label]
    tokens: list[Label]
    elem_type: int
    output: str
    scale: float = 1.0


def build_site(site: Site, stem: str) -> Built | None:
    """Emit the replacement of `site`; every new name starts with `stem`.

    None: the rows have to be gathered by the graph's own index tensors; bind the anchor again with
    `Tracer.opaque` set.

    Raises:
        Stop: the form is understood but has no replacement.
    """
    e = Emitter(site.tracer, stem)
    elem_type, output = _working_type(site)
    plan = _Plan(e, site, [], list(site.rows), elem_type, output)
    kind = site.nope.kind
    if kind == "int8":
        return _int8(plan) if site.tracer.opaque or site.selected else None
    if kind == "expanded":
        from sfa_onnx.passes.build_absorb import absorbed

        return absorbed(plan)
    return _float(plan)


# -- types and scale ------------------------------------------------------------------------------


def _working_type(site: Site) -> tuple[int, str]:
    """The operator's float type, and the value its output replaces.

    The weighted sum's own type, or the one it is cast to when query and keys come from that type
    (a graph that computes in float32 over 16-bit tensors: so does the operator).
    """
    index, sizes = site.tracer.index, site.tracer.sizes
    own = sizes.elem_type(site.out.value)
    uses = index.uses(site.out.value)
    if len(uses) == 1 and uses[0][1] == 0 and not index.is_graph_output(site.out.value):
        node = index.nodes[uses[0][0]]
        if node.op_type == "Cast":
            target = sizes.elem_type(node.output[0])
            if target == own or (is_float(target) and _all_have(site, target)):
                return target, node.output[0]
    if own not in (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16):
        raise Stop(
            f"the attention is computed in {_T.DataType.Name(own)}",
            site.out.value,
            "the operator takes float32, float16 and bfloat16",
        )
    return own, site.out.value


def _all_have(site: Site, elem_type: int) -> bool:
    """Whether query and key exist in this type in the graph."""

    def has(states: Sequence[State]) -> bool:
        return any(site.tracer.sizes.elem_type(s.ref.value) == elem_type for s in states)

    queries = [q for q in (site.nope_query, site.rope_query) if q is not None]
    if not all(has(_query_path(site, q)) for q in queries):
        return False
    keys = [c.path for c in (site.nope, site.rope) if c is not None and c.kind == "float"]
    return all(has(path) for path in keys)


def _query_path(site: Site, query: Query) -> list[State]:
    path = [State(query.ref)]
    while True:
        step = site.tracer.step(path[-1].ref)
        if isinstance(step, Move):
            path.append(State(step.ref, path[-1].factor))
        elif isinstance(step, Scaled):
            path.append(State(step.ref, path[-1].factor * step.factor))
        else:
            return path


def _queries(plan: _Plan) -> tuple[State, State | None]:
    """Where to take the query from, behind constant factors and casts from the operator's type."""
    site = plan.site
    nope = _pick_query(plan, site.nope_query)
    rope = _pick_query(plan, site.rope_query) if site.rope_query is not None else None
    scale = site.scale * nope.factor * _row_factor(site.nope)
    plan.scale = scale
    _learn(plan, [nope, *([rope] if rope is not None else [])])
    if rope is not None and site.rope is not None:
        other = site.rope_factor * rope.factor * _row_factor(site.rope)
        if abs(other - scale) > 1e-6 * abs(scale):
            raise Stop(
                f"rope scores are scaled by {other:.8g}, nope scores by {scale:.8g}",
                rope.ref.value,
                "the operator has one scale_value",
            )
    if _row_factor(site.value) != 1:
        raise Stop(
            f"the value is {_row_factor(site.value):g} times the stored rows",
            site.value.path[0].ref.value,
            "expected the key's nope part unscaled",
        )
    return nope, rope


def _learn(plan: _Plan, queries: Sequence[State]) -> None:
    """Sizes are read off tensors that stay in the graph: queries, stored rows, selections."""
    site = plan.site
    refs = [q.ref for q in queries]
    refs += [c.deep.ref for c in (site.nope, site.rope) if c is not None]
    refs += [s.indices for s in site.selected] + [v.ref for v in site.visible]
    refs += [Ref(r.value, r.coords) for c in site.nope.deep.ref.coords for r in c.reads]
    for ref in refs:
        plan.e.learn(ref)


def _row_factor(columns: Columns) -> float:
    factor = columns.deep.factor
    if columns.scale:
        factor *= columns.scale[-1].factor
    return factor


def _pick_query(plan: _Plan, query: Query) -> State:
    path = _query_path(plan.site, query)
    first = max(
        (i for i, s in enumerate(path) if s.factor != path[max(i - 1, 0)].factor), default=0
    )
    sizes = plan.site.tracer.sizes
    for state in path[first:]:
        if sizes.elem_type(state.ref.value) == plan.elem_type and _is_view(state.ref):
            return state
    return next(s for s in reversed(path[: first + 1]) if _is_view(s.ref))


def _is_view(ref: Ref) -> bool:
    return all(axis_labels(c) is not None for c in ref.coords)


# -- int8 -----------------------------------------------------------------------------------------


def _int8(plan: _Plan) -> Built:
    """Pack the selected rows, then the operator over them: one row group per query token."""
    site, e = plan.site, plan.e
    nope, rope = _queries(plan)
    width = site.nope.label.size
    tile = _tile(site.nope)
    if site.selected:
        raise Stop("whole-cache", site.nope.deep.ref.value)
    rows = [site.rows]
    lead: list[Group] = [*rows, [site.key], []]
    ints = _gathered(plan, site.nope.path[site.nope.behind :], [*lead, [site.nope.label]], _T.INT8)
    tiles = Label("tiles", width // tile)
    scale = _gathered(plan, _by_tile(site.nope, tile, tiles), [*lead, [tiles]], 0)
    scale = e.cast(scale, _T.FLOAT)
    inputs = [ints, "", scale]
    query = _query_rows(plan, nope, [*rows, [], site.heads, [site.nope.label]])
    if site.rope is not None and rope is not None:
        side = _gathered(plan, site.rope.path, [*lead, [site.rope.label]], plan.elem_type)
        inputs[1] = e.cast(side, plan.elem_type)
        query = _joined_query(plan, nope, rope, query)
    packed = e.emit(
        KV_CACHE_PACK.name, inputs, "packed", _T.INT8, domain=KV_CACHE_PACK.domain, tile_size=tile
    )
    entries = gathered_entries(e, site, rows)
    entries = e.emit("Unsqueeze", [entries, e.ints([1, 2])], "indices", _T.INT32)
    rope_width = site.rope.label.size if site.rope is not None else 0
    out = _antiquant(plan, query, packed, entries, tile, rope_width)
    _deliver(plan, out, [site.rows, [], site.heads, [site.column]])
    return Built(
        e, ANTIQUANT, "int8", plan.output, nope.ref, rope.ref if rope else None, plan.scale, []
    )


def _antiquant(
    plan: _Plan, query: str, packed: str, entries: str, tile: int, rope_width: int
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
    """How many columns share one scale."""
    ref = columns.scale[-1].ref
    label = columns.label
    found = {a.by for c in ref.coords for a, _ in c.terms if hasattr(a, "by") and label in c.labels}
    whole = label not in ref.labels
    if whole:
        return label.size
    if len(found) != 1 or label.size % next(iter(found)):
        raise Stop(
            f"the scale {ref.value} is not one number per tile of columns"
            f" (read at {', '.join(map(str, ref.coords))})",
            ref.value,
            "expected [.., C / tile] scales, each for a tile of consecutive columns",
        )
    return next(iter(found))


def _by_tile(columns: Columns, tile: int, tiles: Label) -> list[State]:
    """The scale's path with the column label replaced by the tile's."""
    swap = {columns.label: Expr.of(tiles) * tile}
    return [State(s.ref.substitute(swap), s.factor) for s in columns.scale]


def _gathered(plan: _Plan, path: Sequence[State], groups: Sequence[Group], elem_type: int) -> str:
    """Rows of the selected keys as [rows, K, 1, width], in the stored type where possible.

    Takes the gathered tensor if the graph has it in that type, else gathers the stored one.
    """
    e, site = plan.e, plan.site
    sizes = site.tracer.sizes
    labels = {x for g in groups for x in g}
    path = [s for s in path if s.factor == path[-1].factor]
    ready = [s for s in path if _is_view(s.ref) and s.ref.labels <= labels]
    exact = [s for s in ready if not elem_type or sizes.elem_type(s.ref.value) == elem_type]
    choice = exact or ([] if elem_type == _T.INT8 else ready)
    last: Stop | None = None
    for state in reversed(choice):
        try:
            value = e.arrange(state.ref, groups, "rows")
            return e.broadcast(value, groups, state.ref.labels)
        except Stop as stop:
            last = stop
    for state in reversed(path):
        if elem_type and elem_type == _T.INT8 and sizes.elem_type(state.ref.value) != elem_type:
            continue
        gathered = _gather_again(plan, state.ref, groups)
        if gathered:
            return gathered
    raise last or Stop(f"the gather of {path[-1].ref.value} is not understood", path[-1].ref.value)


def _gather_again(plan: _Plan, ref: Ref, groups: Sequence[Group]) -> str:
    """Gather rows of a stored tensor by the graph's own index tensors; "" if it is no gather."""
    e, tracer = plan.e, plan.site.tracer
    column = groups[-1]
    where = [i for i, c in enumerate(ref.coords) if any(x in c.labels for x in column)]
    if where not in ([len(ref.coords) - 1], []) or not any(c.reads for c in ref.coords):
        return ""
    shape = tracer.shape(ref.value)
    rank = len(ref.coords) - 1
    rows = e.emit("Reshape", [ref.value, e.ints([-1, shape[-1]])], "flat", e.elem_type(ref.value))
    if not tracer.static(ref.value, rank):
        return ""
    labels = axis_labels(ref.coords[-1])
    if labels is None:
        return ""
    lead: list[Group] = [[x] for g in groups[:-1] for x in g]
    position = ""
    flat = merge(ref.coords[:-1], shape[:-1])
    if all(isinstance(atom, Read) and c == 1 for atom, c in flat.terms) and not flat.const:
        size = e.emit("Shape", [rows], "shape", _T.INT64)
        size = e.emit("Gather", [size, e.ints([0])], "dim", _T.INT64, axis=0)
        position = _wrap(e, e.index(flat, lead), size)
        rank = 0
    dims = e.emit("Shape", [ref.value], "shape", _T.INT64)
    for axis in range(rank):
        own = e.index(ref.coords[axis], lead)
        size = e.emit("Gather", [dims, e.ints([axis])], "dim", _T.INT64, axis=0)
        if ref.coords[axis].reads:
            own = _wrap(e, own, size)
        if not position:
            position = own
            continue
        scaled = e.emit("Mul", [position, size], "row", _T.INT64)
        position = e.emit("Add", [scaled, own], "row", _T.INT64)
    position = e.broadcast(position, lead, ref.labels)
    rows = e.emit("Gather", [rows, position], "rows", e.elem_type(ref.value), axis=0)
    covered = int(np.prod([x.size for x in labels]))
    start = ref.coords[-1].const
    if (start, covered) != (0, shape[-1]):
        rows = e.slice(rows, len(lead), start, start + covered)
    return e.permute(rows, [*lead, column], groups, "rows")


def _wrap(e: Emitter, own: str, size: str) -> str:
    zero = e.constant(np.asarray(0, np.int64))
    negative = e.emit("Less", [own, zero], "negative", _T.BOOL)
    shifted = e.emit("Add", [own, size], "wrapped", _T.INT64)
    return e.emit("Where", [negative, shifted, own], "row", _T.INT64)


# -- float ----------------------------------------------------------------------------------------


def _float(plan: _Plan) -> Built | None:
    """The float operator over the cache itself, or over gathered rows."""
    site, e = plan.site, plan.e
    nope, rope = _queries(plan)
    if site.selected:
        keys, entries, family = _dense_keys(plan)
    elif (direct := None if site.tracer.opaque else _direct(plan)) is not None:
        keys, entries, family = (*direct, "float-gather")
    elif not site.tracer.opaque:
        return None
    else:
        keys, entries, family = _gathered_keys(plan)
    query = [plan.batch, plan.tokens, site.heads]
    q = _query_rows(plan, nope, [*query, [site.nope.label]])
    q_rope = ""
    if rope is not None and site.rope is not None:
        q_rope = _query_rows(plan, rope, [*query, [site.rope.label]])
    entries = e.emit("Unsqueeze", [entries, e.ints([2])], "indices", _T.INT32)
    out = sparse_attention(plan, q, q_rope, keys, entries)
    _deliver(plan, out, [*query, [site.column]])
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
    plan: _Plan, query: str, query_rope: str, keys: tuple[str, str], entries: str
) -> str:
    """The float operator with every attribute written; absent tail inputs are left out."""
    key, key_rope = keys
    inputs = [query, key, key, entries]
    if query_rope:
        inputs += ["", "", "", query_rope, key_rope]
    return plan.e.emit(
        SPARSE_FLASH_ATTENTION.name,
        inputs,
        "attention",
        plan.elem_type,
        domain=SPARSE_FLASH_ATTENTION.domain,
        scale_value=float(plan.scale),
        sparse_block_size=1,
        layout_query="BSND",
        layout_kv="BSND",
        sparse_mode=0,
        pre_tokens=INT64_MAX,
        next_tokens=INT64_MAX,
        attention_mode=2,
        return_softmax_lse=0,
    )


def _dense_keys(plan: _Plan) -> tuple[tuple[str, str], str, str]:
    """Keys are the cache as it is; the selection comes from the mask."""
    site, e = plan.site, plan.e
    batch = {x for c in (site.nope, site.rope) if c is not None for x in _own(c, site.key)}
    plan.batch = [x for x in site.rows if x in batch]
    plan.tokens = [x for x in site.rows if x not in batch]
    keys = tuple(
        _cache(plan, c.path, site.key, c.label) if c is not None else ""
        for c in (site.nope, site.rope)
    )
    entries = selected_entries(e, site, [plan.batch, plan.tokens])
    return (keys[0], keys[1]), entries, "float-dense"


def _own(columns: Columns, key: Label) -> set[Label]:
    return set(columns.deep.ref.labels) - {key, columns.label}


def _cache(plan: _Plan, path: Sequence[State], key: Label, column: Label) -> str:
    """[B, S2, 1, width] from the first tensor on the path that is a plain cache."""
    e = plan.e
    groups: list[Group] = [plan.batch, [key], [], [column]]
    labels = {x for g in groups for x in g}
    path = [s for s in path if s.factor == path[-1].factor]
    ready = [s for s in path if _is_view(s.ref) and s.ref.labels <= labels]
    sizes = plan.site.tracer.sizes
    exact = [s for s in ready if sizes.elem_type(s.ref.value) == plan.elem_type]
    last: Stop | None = None
    for state in (*exact, *ready):
        try:
            value = e.arrange(state.ref, groups, "cache")
        except Stop as stop:
            last = stop
            continue
        return e.cast(e.broadcast(value, groups, state.ref.labels), plan.elem_type)
    raise last or Stop(
        f"{path[-1].ref.value} is not a cache of one row per key", path[-1].ref.value
    )


def _gathered_keys(plan: _Plan) -> tuple[tuple[str, str], str, str]:
    """The rows that the graph gathers, one group of them per query token."""
    site, e = plan.site, plan.e
    plan.batch, plan.tokens = list(site.rows), []
    parts = []
    for columns in (site.nope, site.rope):
        if columns is None:
            parts.append("")
            continue
        groups: list[Group] = [site.rows, [site.key], [], [columns.label]]
        value = _gathered(plan, columns.path, groups, plan.elem_type)
        parts.append(e.cast(value, plan.elem_type))
    entries = gathered_entries(e, site, [site.rows, []])
    return (parts[0], parts[1]), entries, "float-gathered-rows"


def _direct(plan: _Plan) -> tuple[tuple[str, str], str] | None:
    """(keys, entries) over the cache itself when one index tensor addresses its token axis."""
    site, e = plan.site, plan.e
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
    batch = {x for states, label in paths for x in states[-1].ref.labels} - {key}
    plan.batch = [x for x in site.rows if x in batch]
    plan.tokens = [x for x in site.rows if x not in batch]
    keys = [_cache(plan, states, key, label) for states, label in paths]
    entries = token_entries(e, site, indices, [plan.batch, plan.tokens], key)
    return (keys[0], keys[1] if len(keys) > 1 else ""), entries


def _common_read(columns: Sequence[Columns], key: Label) -> Read | None:
    reads = []
    for c in columns:
        own = [r for x in c.deep.ref.coords for r in x.reads]
        if len(own) != 1 or not any(label_of(x) == key for x in own[0].coords):
            return None
        reads.append(own[0])
    return reads[0] if all(r == reads[0] for r in reads) else None


def _behind_gather(plan: _Plan, columns: Columns, read: Read) -> tuple[int, list[State]] | None:
    """States that are addressed by the index alone on one axis, and that axis's size."""
    alone = Expr.of(read)
    found: list[State] = []
    size = 0
    for state in columns.path:
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


def _fits(plan: _Plan, indices: Ref, key: Label, cache: State) -> bool:
    """Whether a row never has more entries than the cache has tokens (the op looks at no more)."""
    tracer = plan.site.tracer
    plan.e.learn(cache.ref)
    if from_topk(tracer, indices):
        return True
    static = plan.e.static(key) and plan.e.static(plan.site.key)
    return static and plan.site.key.size <= key.size


# -- query and output -----------------------------------------------------------------------------


def _query_rows(plan: _Plan, state: State, groups: Sequence[Group]) -> str:
    e = plan.e
    value = e.broadcast(e.arrange(state.ref, groups, "query"), groups, state.ref.labels)
    return e.cast(value, plan.elem_type)


def _joined_query(plan: _Plan, nope: State, rope: State, query: str) -> str:
    """[.., C + R]: the tensor both parts were sliced from, or their Concat."""
    site, e = plan.site, plan.e
    assert site.rope is not None
    groups: list[Group] = [site.rows, [], site.heads]
    whole = _whole_query(site, nope, rope)
    if whole is not None:
        ref, label = whole
        return _query_rows(plan, State(ref), [*groups, [label]])
    side = _query_rows(plan, rope, [*groups, [site.rope.label]])
    return e.emit("Concat", [query, side], "query", plan.elem_type, axis=-1)


def _whole_query(site: Site, nope: State, rope: State) -> tuple[Ref, Label] | None:
    if nope.ref.value != rope.ref.value or site.rope is None:
        return None
    a, b = site.nope.label, site.rope.label
    both = Label("columns", a.size + b.size)
    first = nope.ref.substitute({a: Expr.of(both)})
    second = rope.ref.substitute({b: Expr.of(both) + (-a.size)})
    return (first, both) if first == second else None


def _deliver(plan: _Plan, out: str, groups: Sequence[Group]) -> None:
    """Bring the operator's output to the axes of the value it replaces."""
    e, site = plan.e, plan.site
    target = [axis_labels(c) for c in site.out.coords]
    if any(t is None for t in target):
        raise Stop("the output's axes are no view of the operator's", site.out.value)
    value = e.permute(out, [list(g) for g in groups], [t or [] for t in target], "out")
    e.finish(value, plan.output)
