"""Masks that keep few keys without being one selection: unions, windows, selections changed later.

Such a mask stays in the graph. What has to be shown is only how many keys it keeps in a row at
most: as many as the selections that it is made from have entries, and some positions besides. The
operator's indices are then read off the finished mask, so what the mask means is no matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from sfa_onnx.passes.axes.expr import Expr, Label, Quot, label_of
from sfa_onnx.passes.axes.trace import Pieces, Ref, Stop, Tracer, UnifyError
from sfa_onnx.passes.bind.literals import Kept, Literal, Selected, Visible

__all__ = ["bounded", "either", "place", "put_on", "settled", "union"]

_ABOVE, _BELOW = ("Greater", "GreaterOrEqual"), ("Less", "LessOrEqual")


def place(coordinate: Expr) -> tuple[int, bool]:
    """(keys per position, whether positions are the keys themselves) of a scattered axis."""
    if len(coordinate.terms) != 1 or coordinate.terms[0][1] != 1:
        return 1, True
    atom = coordinate.terms[0][0]
    if isinstance(atom, Quot) and not coordinate.const:
        return atom.by, False
    return 1, coordinate.const == 0


def bounded(tracer: Tracer, here: Visible, literals: Sequence[Literal]) -> Kept | None:
    """`here`, the conjunction of `literals`, as a mask that keeps few keys; None: no bound."""
    for literal in literals:
        if isinstance(literal, Selected):
            return Kept(here, (literal,))
        if isinstance(literal, Kept):
            return Kept(here, literal.among, literal.extra, literal.over)
    counted = [v for v in literals if isinstance(v, Visible)]
    found = _table(tracer, counted) or _interval(tracer, counted)
    return None if found is None else Kept(here, (), *found)


def either(here: Visible, parts: Iterable[Kept | None]) -> Kept | None:
    """`here`, the union of `parts`; None where one of them has no bound."""
    among: list[Selected] = []
    extra, over = 0, frozenset[Label]()
    for part in parts:
        if part is None:
            return None
        among += part.among
        extra += part.extra
        if part.over:
            over = over & part.over if over else part.over
            if not over:
                return None
    return Kept(here, tuple(among), extra, over)


def union(
    tracer: Tracer, here: Visible, parts: Sequence[Sequence[Literal] | None]
) -> Literal | None:
    """`here`, which shows what any of `parts` shows, where all of them keep few keys."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    bounds = [bounded(tracer, here, part) for part in known]
    whole = either(here, bounds)
    if whole is not None:
        return whole if whole.among else None
    few = any(part and part.among for part in bounds)
    return replace(here, joins=tuple(map(tuple, known))) if few else None


def settled(tracer: Tracer, literals: Sequence[Literal]) -> list[Literal]:
    """`literals`, of which unions without a bound of their own are bounded by the others.

    A window is often written as row - 4 < key alone: the causal mask is its other end.
    """
    found = list(literals)
    for i, literal in enumerate(literals):
        if not isinstance(literal, Visible) or not literal.joins:
            continue
        others = [j for j, x in enumerate(found) if isinstance(x, Visible) and j != i]
        ends = [x for j in others if isinstance(x := found[j], Visible)]
        parts = [bounded(tracer, literal, [*part, *ends]) for part in literal.joins]
        whole = either(literal, parts)
        if whole is not None and whole.among:
            found[i] = whole
            for j, end in zip(others, ends, strict=True):  # no other mask would bound it
                found[j] = replace(end, among=whole.among)
    return found


def put_on(
    tracer: Tracer, here: Visible, step: Pieces, shown: Sequence[Kept | None]
) -> Kept | None:
    """`here`, a mask some range of which was overwritten: `shown` are the parts of `step`.

    A part that is visible everywhere counts with its length.
    """
    parts = []
    for (low, high, ref), kept in zip(step.parts, shown, strict=True):
        fill = tracer.fill(ref.value)
        if fill is None:
            parts.append(kept)
        elif (fill != 0) == here.positive:
            if not _fixed(tracer, ref.value, high - low):
                return None
            parts.append(Kept(here, (), high - low, frozenset((step.label,))))
        else:
            parts.append(Kept(here, ()))
    return either(here, parts)


def _fixed(tracer: Tracer, value: str, count: int) -> bool:
    """Whether a tensor has `count` entries along an axis, however large the inputs are."""
    sizes = enumerate(tracer.shape(value))
    return any(size == count and tracer.static(value, axis) for axis, size in sizes)


def _table(tracer: Tracer, masks: Sequence[Visible]) -> tuple[int, frozenset[Label]] | None:
    """Keys that a constant mask keeps in a row."""
    for mask in masks:
        table = tracer.index.constant(mask.ref.value) if mask.is_bool else None
        if table is None or table.dtype != np.bool_ or table.ndim < 1:
            continue
        terms = mask.ref.coords[-1].terms
        if len(terms) == 1 and isinstance(terms[0][0], Label):
            shown = table if mask.positive else ~table
            return int(shown.sum(-1).max()), frozenset((terms[0][0],))
    return None


def _interval(tracer: Tracer, masks: Sequence[Visible]) -> tuple[int, frozenset[Label]] | None:
    """Keys between two ends, where their number is the same whatever the sizes of the inputs."""
    found = _span(tracer, masks)
    if found is None:
        return None
    twin = Tracer(tracer.index, tracer.other, tracer.sizes, tracer.budget)
    try:
        again = _span(twin, masks)
    except (Stop, UnifyError):
        return None
    return found if again is not None and again[0] == found[0] else None


def _span(tracer: Tracer, masks: Sequence[Visible]) -> tuple[int, frozenset[Label]] | None:
    """Keys between two ends that move together: row - 4 < key, key <= row; or 0 <= key < 4.

    An open tail is one: keys - 4 <= key, which ends where the keys do.
    """
    lows: dict[Expr, int] = {}
    highs: dict[Expr, int] = {}
    for mask in masks:
        found = _end(tracer, mask)
        if found is None:
            continue
        at, limit, upper = found
        if upper:
            highs[at] = min(limit, highs.get(at, limit))
        else:
            lows[at] = max(limit, lows.get(at, limit))
    for at, high in highs.items():
        low = lows.get(at)
        if low is None and at.bounds is not None and len(at.terms) == 1 and at.terms[0][1] > 0:
            low = 0
        if low is not None:
            return max(high - low + 1, 0), at.labels
    for at, low in lows.items():
        label = label_of(at)
        if label is not None:
            return max(_size(tracer, label) - low, 0), at.labels
    return None


def _size(tracer: Tracer, label: Label) -> int:
    """The size of a label, which may be one of the other assignment of sizes."""
    symbols = tracer.other.symbols.items()
    name = next((name for name, size in symbols if size == label.size), "")
    return tracer.sizes.symbols.get(name, label.size)


def _end(tracer: Tracer, mask: Visible) -> tuple[Expr, int, bool] | None:
    """(x, limit, True) of x <= limit, (x, limit, False) of x >= limit, x without a constant."""
    node = tracer.index.maker(mask.ref.value)
    while node is not None and node.op_type in ("Unsqueeze", "Expand", "Cast", "Identity"):
        step = tracer.step(mask.ref)
        ref = getattr(step, "ref", None)
        if not isinstance(ref, Ref) or ref.value == mask.ref.value:
            return None
        mask = Visible(ref, mask.positive)
        node = tracer.index.maker(ref.value)
    if node is None or node.op_type not in (*_ABOVE, *_BELOW):
        return None
    a, b = (tracer.index_value(tracer.operand(n, mask.ref.coords)) for n in node.input)
    upper = (node.op_type in _BELOW) == mask.positive
    strict = (node.op_type in ("Greater", "Less")) == mask.positive
    difference = a - b  # compared with 0
    if any(not isinstance(x, Label) or abs(c) != 1 for x, c in difference.terms):
        return None
    limit = -difference.const
    difference = difference + limit
    limit += (-1 if upper else 1) if strict else 0
    if difference.terms and difference.terms[0][1] < 0:  # one sign for both ends
        return difference * -1, -limit, not upper
    return difference, limit, upper
