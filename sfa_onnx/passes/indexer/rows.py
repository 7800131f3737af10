"""Attention that reads a selection: entries which the operator's own rows can stand for.

In a fused graph, the entries of an attention are the selected keys that its masks show, compacted
to the front. Where those masks are the selection's own, that is what the indexer gives: hidden keys
lie behind every visible one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sfa_onnx.operator.op import (
    KV_QUANT_SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
)
from sfa_onnx.passes.axes.expr import Expr, Label, Read, fresh
from sfa_onnx.passes.axes.places import single
from sfa_onnx.passes.axes.trace import Move, Ref, Stop, Tracer
from sfa_onnx.passes.bind.literals import Literal, Visible
from sfa_onnx.passes.bind.mask import additive, boolean
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.indexer.masks import all_seen, compared, sort_masks
from sfa_onnx.passes.indexer.site import Selection
from sfa_onnx.passes.values.arithmetic import LOW

__all__ = ["Entries", "entries_of", "read_by_attention"]

_ATTENTION = {
    op.key: [t.name for t in op.inputs].index("sparse_indices")
    for op in (
        SPARSE_FLASH_ATTENTION,
        SPARSE_FLASH_ATTENTION_ANTIQUANT,
        KV_QUANT_SPARSE_FLASH_ATTENTION,
    )
}


_ABOVE = ("Greater", "GreaterOrEqual")
_BELOW = ("Equal", "IsInf", "Less", "LessOrEqual")


@dataclass(frozen=True)
class Entries:
    """Entries of an attention that the selection's rows are.

    Attributes:
        value: what the attention reads.
        axes: the selection's rows along its axes, the last one (slots) left out.
    """

    value: str
    axes: tuple[tuple[Label, ...], ...]


def read_by_attention(index: GraphIndex) -> list[str]:
    """What the attention operators of a graph read as their indices, in graph order."""
    found: dict[str, None] = {}
    for i in index.own:
        node = index.nodes[i]
        place = _ATTENTION.get((node.domain, node.op_type)) if node.domain else None
        if place is not None and node.input[place]:
            found[node.input[place]] = None
    return list(found)


def entries_of(site: Selection, values: Sequence[str]) -> list[Entries]:
    """Those of the values that attention reads which the operator's rows may replace."""
    found: list[Entries] = []
    for value in values:
        try:
            entries = _read(site, value)
        except (Stop, IndexError):
            continue
        found += [entries] if entries is not None else []
    return found


def _read(site: Selection, value: str) -> Entries | None:
    tracer = site.tracer
    labels = [fresh("e", size) for size in tracer.shape(value)]
    ref = _moved(tracer, Ref(value, tuple(Expr.of(x) for x in labels)))
    valid: Ref | None = None
    compacted = _compacted(tracer, ref)
    if compacted is not None:
        valid, ref = compacted
        ref = _moved(tracer, ref)
    if ref.value != site.node.output[1]:
        return None
    swap, slot = _places(site, ref)
    if swap is None or slot is None:
        return None
    if not _same_masks(site, valid, swap, slot):
        return None
    axes = tuple(
        tuple(site_label for site_label in swap.get(x, Expr()).labels) for x in labels[:-1]
    )
    if any(x.size > 1 and not a for x, a in zip(labels[:-1], axes, strict=True)):
        return None
    return Entries(value, axes)


def _moved(tracer: Tracer, ref: Ref) -> Ref:
    """The element behind views and casts that keep whole numbers."""
    while True:
        step = tracer.step(ref)
        if not isinstance(step, Move) or any(c.reads for c in step.ref.coords):
            return ref
        ref = step.ref


def _compacted(tracer: Tracer, ref: Ref) -> tuple[Ref, Ref] | None:
    """(which entries are valid, what is compacted) of entries as `emit/select` writes them."""
    index = tracer.index
    node = index.maker(ref.value)
    if node is None or node.op_type != "Where" or tracer.fill(node.input[2]) != -1:
        return None
    kept, picked = index.maker(node.input[0]), index.maker(node.input[1])
    if kept is None or picked is None:
        return None
    if (kept.op_type, picked.op_type) != ("Greater", "GatherElements"):
        return None
    first = index.maker(kept.input[0])
    if first is None or first.op_type != "TopK" or tracer.fill(kept.input[1]) != 0:
        return None
    if list(first.output) != [kept.input[0], picked.input[1]]:
        return None
    ranked = index.maker(first.input[0])
    if ranked is None or ranked.op_type != "Where" or tracer.fill(ranked.input[2]) != 0:
        return None
    slot = fresh("slot", tracer.shape(ranked.output[0])[-1])
    coords = (*ref.coords[:-1], Expr.of(slot))
    return tracer.operand(ranked.input[0], coords), tracer.operand(picked.input[0], coords)


def _places(site: Selection, ref: Ref) -> tuple[dict[Label, Expr] | None, Label | None]:
    """(label of the entries -> label of the selection's rows, label of the slots)."""
    swap: dict[Label, Expr] = {}
    own, slot = site.apart(ref.coords)
    for coordinate, row in zip(own, site.formula.rows, strict=True):
        label = single(coordinate)
        if label is None and coordinate.terms:
            return None, None
        if label is not None:
            if label.size != row.size or label in swap:
                return None, None
            swap[label] = Expr.of(row)
        elif row.size > 1:
            return None, None
    return swap, single(slot)


def _same_masks(site: Selection, valid: Ref | None, swap: dict[Label, Expr], slot: Label) -> bool:
    """Whether attention hides exactly what the selection hides."""
    if valid is None:
        return site.masks == type(site.masks)()
    tracer, keys = site.tracer, site.formula.keys
    literals: list[Visible] = []
    bounds: set[Expr] = set()
    by_scores = False
    for literal in boolean(tracer, valid.substitute(swap), positive=True):
        if _by_scores(site, literal):
            by_scores = True
            continue
        chosen = site.chosen(Expr.of(slot))
        if isinstance(literal, Visible):
            bound = compared(tracer, literal, slot, Expr.of(chosen))
            if bound is not None:
                if not all_seen(bound, keys):
                    bounds.add(bound.bound)
                continue
        for found in _at_keys(site, literal, slot):
            if not isinstance(found, Visible):
                return False
            literals.append(found)
    rows = [*site.batch, *site.tokens]
    masks = sort_masks(tracer, literals, rows, site.batch, keys)
    first = {p.bound for p in masks.prefixes} | bounds
    own = {p.bound for p in site.masks.prefixes}
    rest = set(masks.padding) | set(masks.rows)
    hidden = set(site.masks.padding) | set(site.masks.rows)
    if by_scores:  # the selection's own masks, and these besides
        return first <= own and rest <= hidden
    return first == own and rest == hidden


def _by_scores(site: Selection, literal: Literal) -> bool:
    """Whether keys count as visible whose selected score is none that hides: scores > -inf."""
    tracer = site.tracer
    if not isinstance(literal, Visible) or not literal.is_bool or site.region.sign < 0:
        return False
    node = tracer.index.maker(literal.ref.value)
    if node is None or node.op_type not in (_ABOVE if literal.positive else _BELOW):
        return False
    if len(node.input) > 1:
        limit = tracer.fill(node.input[1])
        if limit is None or limit > LOW:
            return False
    scores = _moved(tracer, tracer.operand(node.input[0], literal.ref.coords))
    return scores.value == site.node.output[0] and site.apart(scores.coords)[0] == rows_of(site)


def rows_of(site: Selection) -> tuple[Expr, ...]:
    """The selection's rows, as coordinates."""
    return tuple(Expr.of(x) for x in site.formula.rows)


def _at_keys(site: Selection, literal: Literal, slot: Label) -> Iterator[Literal]:
    """The literal of all keys that is read at the selected ones."""
    if not isinstance(literal, Visible) or slot not in literal.ref.labels:
        yield literal
        return
    tracer, ref = site.tracer, literal.ref
    while True:
        step = tracer.step(ref)
        if not isinstance(step, Move):
            break
        ref = step.ref
        if any(c.reads for c in ref.coords):
            break
    swapped = tuple(_key_for(site, c) for c in ref.coords)
    whole = Ref(ref.value, tuple(c for c in swapped if c is not None))
    if None in swapped or slot in whole.labels:
        raise Stop("a mask of the attention is not read at the selected keys", literal.ref.value)
    if literal.is_bool:
        yield from boolean(tracer, whole, positive=literal.positive)
    else:
        yield from additive(tracer, whole)


def _key_for(site: Selection, coordinate: Expr) -> Expr | None:
    """The coordinate with the selected key's number called the key."""
    if not coordinate.reads:
        return coordinate
    if len(coordinate.terms) != 1 or coordinate.const:
        return None
    atom, by = coordinate.terms[0]
    if by != 1 or not isinstance(atom, Read) or atom.value != site.node.output[1]:
        return None
    if site.apart(atom.coords)[0] != rows_of(site):  # another row's keys
        return None
    return Expr.of(site.formula.keys)
