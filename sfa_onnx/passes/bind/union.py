"""Conditions that keep few keys: selections, windows, and unions of them.

A union stays in the graph. What has to be shown is only how many keys it keeps in a row at most: as
many as the selections that it is made from have entries, and some positions besides. The operator's
indices are then read off the finished mask, so what the mask means is no matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sfa_onnx.passes.axes.expr import Expr, Label, Quot, fresh, label_of
from sfa_onnx.passes.axes.trace import Ref, Stop, Tracer, UnifyError
from sfa_onnx.passes.bind.literals import Selected
from sfa_onnx.passes.shapes.size import is_open
from sfa_onnx.passes.values.conditions import Conditions, positions_compared
from sfa_onnx.passes.values.terms import Term
from sfa_onnx.passes.values.written import is_hit

__all__ = ["Bound", "bound", "selected"]

_End = tuple[Expr, int, bool]  # (x, limit, True) of x <= limit, (x, limit, False) of x >= limit


@dataclass(frozen=True)
class Bound:
    """As many keys as `among` have entries, and `extra`, at most.

    `over`: labels one of which must run over the keys for `extra` to hold (none: any).
    """

    among: tuple[Selected, ...] = ()
    extra: int = 0
    over: frozenset[Label] = frozenset()


# -- selections -----------------------------------------------------------------------------------


def selected(reader: Conditions, term: Term) -> Selected | None:
    """any(slot, indices[.., slot] == key and valid), or of a single entry; None: it is not."""
    body = term.args[0] if term.op == "any" else term
    parts = body.args if body.op == "and" else (body,)
    hits = [p for p in parts if is_hit(p)]
    if len(hits) != 1 or (term.op != "any" and (hits[0].args[0].op != "mod" or len(parts) > 1)):
        return None
    own, place = hits[0].args
    rest, key = [p for p in parts if p != hits[0]], place.expr
    slot = fresh("slot", term.label.size if term.op == "any" else 1)
    swap = {term.label: Expr.of(slot)} if term.op == "any" else {}
    valid = None
    if rest:
        held = reader.holder(reader.n.make("and", tuple(rest)), exactly=True)
        if held is None and (len(rest) > 1 or rest[0].op != "element"):
            return None
        valid = (rest[0].ref if held is None else held[0]).substitute(swap)
    (label, *more), wraps = sorted(key.labels, key=str) or [Label("", 1)], own.op == "mod"
    block, exact = _place(key)
    width = own.width if wraps else label.size
    fixed = block > 1 and not reader.tracer.open(width)
    if more or not key.labels or (fixed and reader.tracer.open(label.size)):
        return None  # so many blocks, however many keys
    indices = (own.args[0] if wraps else own).ref.substitute(swap)
    return Selected(indices, slot, width, wraps, valid, block, exact)


def _place(coordinate: Expr) -> tuple[int, bool]:
    """(keys per position, whether positions are the keys themselves) of what is pointed at."""
    if len(coordinate.terms) != 1 or coordinate.terms[0][1] != 1:
        return 1, True
    atom = coordinate.terms[0][0]
    if isinstance(atom, Quot) and not coordinate.const:
        return atom.by, False
    return 1, coordinate.const == 0


# -- bounds ---------------------------------------------------------------------------------------


def bound(reader: Conditions, term: Term, others: Sequence[Term] = ()) -> Bound | None:
    """How many keys a condition keeps in a row; None: no bound is known.

    Args:
        reader: of the tensors that hold it.
        term: the condition.
        others: conditions that hold besides, the other ends of windows.
    """
    if term.op == "false":
        return Bound()
    if term.op == "or":
        return _either(bound(reader, part, others) for part in term.args)
    parts = term.args if term.op == "and" else (term,)
    for part in parts:
        if (chosen := selected(reader, part)) is not None:
            return Bound((chosen,))
        if part.op == "or" and (whole := bound(reader, part, others)) is not None:
            return whole
    return _table(reader, parts) or _interval(reader, [*parts, *others])


def _either(parts: Iterable[Bound | None]) -> Bound | None:
    """The bound of a union; None where a part has none."""
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
    return Bound(tuple(among), extra, over)


def _leaf(term: Term) -> tuple[Ref, bool] | None:
    """(element, whether it is set) of a condition that is not looked into."""
    own, positive = (term.args[0], False) if term.op == "not" else (term, True)
    return (own.ref, positive) if own.op == "element" else None


def _table(reader: Conditions, parts: Sequence[Term]) -> Bound | None:
    """Keys that a constant mask keeps in a row."""
    for ref, positive in filter(None, map(_leaf, parts)):
        table = reader.tracer.index.constant(ref.value)
        if table is None or table.dtype != np.bool_ or table.ndim < 1:
            continue
        label = label_of(ref.coords[-1] + -ref.coords[-1].const)
        if label is not None:
            shown = table if positive else ~table
            return Bound((), int(shown.sum(-1).max()), frozenset((label,)))
    return None


def _interval(reader: Conditions, parts: Sequence[Term]) -> Bound | None:
    """Keys between two ends, where their number is the same whatever the sizes of the inputs."""
    tracer = reader.tracer
    found = _span(tracer, parts)
    if found is None or is_open(found.extra):
        return None
    twin = Tracer(tracer.index, tracer.other, tracer.sizes, tracer.budget)
    try:
        again = _span(twin, parts)
    except (Stop, UnifyError):
        return None
    return found if again is not None and again.extra == found.extra else None


def _span(tracer: Tracer, parts: Sequence[Term]) -> Bound | None:
    """Keys between two ends that move together: row - 4 < key, key <= row; or 0 <= key < 4.

    An open tail is one: keys - 4 <= key, which ends where the keys do.
    """
    lows: dict[Expr, int] = {}
    highs: dict[Expr, int] = {}
    for at, limit, upper in filter(None, (_end(tracer, part) for part in parts)):
        if upper:
            highs[at] = min(limit, highs.get(at, limit))
        else:
            lows[at] = max(limit, lows.get(at, limit))
    for at, high in highs.items():
        low = lows.get(at)
        if low is None and at.bounds is not None and len(at.terms) == 1 and at.terms[0][1] > 0:
            low = 0
        if low is not None:
            return Bound((), max(high - low + 1, 0), at.labels)
    for at, low in lows.items():
        label = label_of(at)
        if label is not None:
            # a number that is compared in the graph has lost what it is: both assignments are asked
            size = label.size if is_open(low) else int(_size(tracer, label))
            return Bound((), max(size - low, 0), at.labels)
    return None


def _size(tracer: Tracer, label: Label) -> int:
    """The size of a label, which may be one of the other assignment of sizes."""
    symbols = tracer.other.symbols.items()
    name = next((name for name, size in symbols if size == label.size), "")
    return tracer.sizes.symbols.get(name, label.size)


def _end(tracer: Tracer, term: Term) -> _End | None:
    """An end of keys, x without a constant; None: it is none."""
    own, upper = (term.args[0], False) if term.op == "not" else (term, True)
    order = positions_compared(tracer, own)
    if order is None:
        return None
    difference = order.args[0].expr - order.args[1].expr
    if any(not isinstance(x, Label) or abs(c) != 1 for x, c in difference.terms):
        return None
    limit = -difference.const
    difference = difference + limit
    limit -= 1 if upper else 0  # a < b ends at b - 1; where that does not hold, a begins at b
    if difference.terms and difference.terms[0][1] < 0:  # one sign for both ends
        return difference * -1, -limit, not upper
    return difference, limit, upper
