"""sparse_indices for the operator: valid entries first, then -1, whatever the masks are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from sfa_onnx.passes.axes.expr import Label
from sfa_onnx.passes.axes.trace import Ref
from sfa_onnx.passes.bind.literals import Kept, Selected, Visible
from sfa_onnx.passes.bind.site import Site
from sfa_onnx.passes.bind.sources import from_topk
from sfa_onnx.passes.emit.emitter import Emitter, Group
from sfa_onnx.passes.values.arithmetic import LOW

__all__ = ["gathered_entries", "selected_entries", "token_entries"]

_T = onnx.TensorProto


def gathered_entries(e: Emitter, site: Site, rows: Sequence[Group]) -> str:
    """Entries for keys that are gathered already: slot numbers 0, 1 ... of visible slots.

    Returns an int32 tensor [*rows, K].
    """
    slots = e.iota(site.key, [[]] * len(rows) + [[site.key]])
    if not site.visible:
        wide = e.broadcast(e.cast(slots, _T.INT32), [*rows, [site.key]], [site.key])
        return wide
    valid = visible_at_rows(e, site.visible, [*rows, [site.key]])
    return _compact(e, valid, None, site.key, [*rows, [site.key]])


def token_entries(
    e: Emitter, site: Site, indices: Ref, rows: Sequence[Group], key: Label | None
) -> str:
    """Entries for keys gathered from a cache by `indices` [rows, K] of `site.key`: token numbers.

    `key` runs over the cache's tokens (negative indices count from its end, as the gather did);
    None: what is not masked is never negative.
    """
    groups = [*rows, [site.key]]
    tokens = e.cast(e.arrange(indices, groups, "tokens"), _T.INT64)
    if key is not None and not from_topk(e.tracer, indices):
        tokens = _wrapped(e, tokens, key)
    tokens = e.broadcast(tokens, groups, indices.labels)
    if not site.visible:
        return e.cast(tokens, _T.INT32)
    valid = visible_at_rows(e, site.visible, groups)
    return _compact(e, valid, tokens, site.key, groups)


def selected_entries(e: Emitter, site: Site, rows: Sequence[Group]) -> str:
    """Entries for a dense attention whose mask keeps selected tokens.

    Indices straight from TopK are used as they are, other masks evaluated at them; indices from
    elsewhere may repeat or wrap, so they are read off the finished mask instead.
    """
    if site.kept is not None:
        return _tokens_of_union(e, site, site.kept, rows)
    selected = site.selected[0]
    if from_topk(e.tracer, selected.indices) and selected.valid is None:
        return _masked_tokens(e, site, selected, rows)
    return _tokens_of_mask(e, site, selected, rows)


def _masked_tokens(e: Emitter, site: Site, selected: Selected, rows: Sequence[Group]) -> str:
    slot = selected.slot
    groups = [*rows, [slot]]
    tokens = e.cast(e.arrange(selected.indices, groups, "tokens"), _T.INT64)
    tokens = e.broadcast(tokens, groups, selected.indices.labels)
    if not site.visible:
        return e.cast(tokens, _T.INT32)
    valid = ""
    for literal in site.visible:
        at = _mask_at(e, site, literal, tokens, rows, groups)
        valid = at if not valid else e.emit("And", [valid, at], "valid", _T.BOOL)
    return _compact(e, valid, tokens, slot, groups)


def _mask_at(
    e: Emitter,
    site: Site,
    literal: Visible,
    tokens: str,
    rows: Sequence[Group],
    groups: Sequence[Group],
) -> str:
    """A mask over tokens, read at the selected ones: bool [*rows, K]."""
    mask = e.arrange(literal.ref, [*rows, [site.key]], "mask")
    if site.key in literal.ref.labels:
        have = literal.ref.labels
        mask = e.broadcast(mask, [*rows, [site.key]], have)
        mask = e.emit("GatherElements", [mask, tokens], "mask_at", e.elem_type(mask), axis=-1)
    else:
        mask = e.broadcast(mask, groups, literal.ref.labels)
    return _as_bool(e, mask, literal)


def _tokens_of_mask(e: Emitter, site: Site, selected: Selected, rows: Sequence[Group]) -> str:
    """The tokens that the finished mask keeps, in ascending order, at most K of them."""
    groups = [*rows, [site.key]]
    valid = _scattered(e, site, selected, rows)
    if site.visible:
        others = visible_at_rows(e, site.visible, groups)
        valid = e.emit("And", [valid, others], "valid", _T.BOOL)
    return _first(e, valid, None, site.key, len(groups), _slots(e, site.key, [selected], 0))


def _tokens_of_union(e: Emitter, site: Site, kept: Kept, rows: Sequence[Group]) -> str:
    """The tokens that a mask of the graph keeps, in ascending order, as many as it keeps."""
    groups = [*rows, [site.key]]
    valid = visible_at_rows(e, [kept.mask, *site.visible], groups)
    count = _slots(e, site.key, kept.among, kept.extra)
    return _first(e, valid, None, site.key, len(groups), count)


def _slots(e: Emitter, key: Label, among: Sequence[Selected], extra: int) -> str:
    """How many entries a row needs: those of all selections and `extra`, no more than keys."""
    if e.static(key) and all(e.static(s.slot) for s in among):
        return e.ints([min(key.size, sum(s.slot.size * s.block for s in among) + extra)])
    total = e.ints([extra]) if extra else ""
    for s in among:
        own = e.size([s.slot])
        if s.block > 1:
            own = e.emit("Mul", [own, e.ints([s.block])], "slots", _T.INT64)
        total = own if not total else e.emit("Add", [total, own], "slots", _T.INT64)
    return e.emit("Min", [e.size([key]), total], "slots", _T.INT64)


def _scattered(e: Emitter, site: Site, selected: Selected, rows: Sequence[Group]) -> str:
    """Bool [*rows, S2]: which tokens the indices name, as the graph's own mask has it."""
    groups = [*rows, [selected.slot]]
    tokens = e.cast(e.arrange(selected.indices, groups, "tokens"), _T.INT64)
    tokens = e.broadcast(tokens, groups, selected.indices.labels)
    switch = "" if selected.valid is None else e.arrange(selected.valid, groups, "switch")
    if switch:  # an entry that is switched off may hold anything
        zero = e.constant(np.asarray(0, np.int64))
        tokens = e.emit("Where", [e.cast(switch, _T.BOOL), tokens, zero], "tokens", _T.INT64)
    size, extra = e.size([site.key]), selected.width - site.key.size
    if not selected.wraps:
        tokens, extra = _outside_last(e, tokens, size), 1
    width = size
    if extra:
        width = e.emit("Add", [size, e.ints([extra])], "width", _T.INT64)
    lead = [e.size(g) for g in rows]
    dims = e.emit("Concat", [*lead, width], "dims", _T.INT64, axis=0)
    zero = helper.make_tensor("value", _T.FLOAT, [1], [0.0])
    base = e.emit("ConstantOfShape", [dims], "nobody", _T.FLOAT, value=zero)
    adding = {}
    if selected.valid is not None:
        adding["reduction"] = "add"  # one valid mention is enough; opset 16 and newer
        hits = e.broadcast(e.cast(switch, _T.FLOAT), groups, selected.valid.labels)
    else:
        one = e.constant(np.asarray(1, np.float32))
        hits = e.emit(
            "Expand", [one, e.emit("Shape", [tokens], "shape", _T.INT64)], "hits", _T.FLOAT
        )
    named = e.emit("ScatterElements", [base, tokens, hits], "named", _T.FLOAT, axis=-1, **adding)
    if extra:
        axis = e.ints([len(groups) - 1])
        named = e.emit("Slice", [named, e.ints([0]), size, axis], "named", _T.FLOAT)
    return e.emit("Greater", [named, e.constant(np.asarray(0, np.float32))], "named", _T.BOOL)


def _outside_last(e: Emitter, tokens: str, size: str) -> str:
    """Indices that name no token name the column behind the last one."""
    zero = e.constant(np.asarray(0, np.int64))
    low = e.emit("Less", [tokens, zero], "outside", _T.BOOL)
    high = e.emit("GreaterOrEqual", [tokens, size], "outside", _T.BOOL)
    outside = e.emit("Or", [low, high], "outside", _T.BOOL)
    return e.emit("Where", [outside, size, tokens], "tokens", _T.INT64)


def visible_at_rows(e: Emitter, literals: Sequence[Visible], groups: Sequence[Group]) -> str:
    """The conjunction of masks, broadcast to `groups`: bool."""
    total = ""
    have: set[Label] = set()
    for literal in literals:
        mask = _as_bool(e, e.arrange(literal.ref, groups, "mask"), literal)
        total = mask if not total else e.emit("And", [total, mask], "valid", _T.BOOL)
        have |= literal.ref.labels
    return e.broadcast(total, groups, have)


def _as_bool(e: Emitter, mask: str, literal: Visible) -> str:
    if not literal.is_bool:
        low = e.constant(np.asarray(LOW, np.float32))
        return e.emit("Greater", [e.cast(mask, _T.FLOAT), low], "visible", _T.BOOL)
    mask = e.cast(mask, _T.BOOL)
    return mask if literal.positive else e.emit("Not", [mask], "visible", _T.BOOL)


def _compact(
    e: Emitter, valid: str, tokens: str | None, slot: Label, groups: Sequence[Group]
) -> str:
    return _first(e, valid, tokens, slot, len(groups), e.size([slot]))


def _first(e: Emitter, valid: str, tokens: str | None, along: Label, rank: int, count: str) -> str:
    """`count` entries of each row: the valid ones in their order, then -1; int32.

    TopK over (size - position) where valid and 0 elsewhere keeps the order and gives the position
    of what it kept, exactly in float32 up to 2**24 entries.
    """
    size = e.emit("Cast", [e.size([along])], "size_f", _T.FLOAT, to=_T.FLOAT)
    place = e.cast(e.iota(along, [[]] * (rank - 1) + [[along]]), _T.FLOAT)
    rank_key = e.emit("Sub", [size, place], "rank", _T.FLOAT)
    zero = e.constant(np.asarray(0, np.float32))
    keyed = e.emit("Where", [valid, rank_key, zero], "rank", _T.FLOAT)
    best, at = e.two(
        "TopK", [keyed, count], "first", (_T.FLOAT, _T.INT64), axis=-1, largest=1, sorted=1
    )
    kept = e.emit("Greater", [best, zero], "kept", _T.BOOL)
    entries = at
    if tokens is not None:
        entries = e.emit("GatherElements", [tokens, at], "entries", _T.INT64, axis=-1)
    none = e.constant(np.asarray(-1, np.int64))
    chosen = e.emit("Where", [kept, entries, none], "entries", _T.INT64)
    return e.cast(chosen, _T.INT32)


def _wrapped(e: Emitter, tokens: str, key: Label) -> str:
    """Negative indices count from the end, as they do in Gather."""
    zero = e.constant(np.asarray(0, np.int64))
    negative = e.emit("Less", [tokens, zero], "negative", _T.BOOL)
    shifted = e.emit("Add", [tokens, e.size([key])], "wrapped", _T.INT64)
    return e.emit("Where", [negative, shifted, tokens], "tokens", _T.INT64)
