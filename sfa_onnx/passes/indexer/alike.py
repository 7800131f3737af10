"""Scores written out head by head, or by blocks of keys or of rows: one term for all of them.

Terms that are built alike differ in the elements they read. Where those are elements of one tensor
at positions that the head (or the key) decides, they are one element; else the replacement joins
what each of them has by a Concat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import onnx

from sfa_onnx.passes.axes.expr import Expr, Label, fresh
from sfa_onnx.passes.axes.places import is_view
from sfa_onnx.passes.axes.trace import Joined, Ref, Stop, Tracer
from sfa_onnx.passes.bind.joined import Join, starts
from sfa_onnx.passes.bind.paths import deepen, one_element
from sfa_onnx.passes.shapes.size import is_open
from sfa_onnx.passes.shapes.types import MANTISSA
from sfa_onnx.passes.values.arithmetic import addends
from sfa_onnx.passes.values.read import INNER, Reader
from sfa_onnx.passes.values.terms import Term, dot, element

__all__ = ["join_blocks", "join_heads", "written"]

_MOST: Final = 256  # heads or blocks that are written out
_WIDE: Final = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)  # hold what narrower types do
_ANY_ORDER: Final = frozenset(("add", "and", "max", "min", "mul", "or"))

_Element = Callable[[Sequence[Ref]], Ref | None]


def join_heads(reader: Reader, term: Term, keys: Label) -> Term | None:
    """A sum of terms with one relu each, as the sum over a new label of one term.

    Args:
        reader: of the scores.
        term: a sum.
        keys: runs over the keys; no element that it decides may differ by head.

    Returns:
        None where the addends are not built alike.
    """
    parts = addends(term)
    if not 1 < len(parts) <= _MOST or any(len(_relus(p)) != 1 for p in parts):
        return None
    tracer = reader.tracer
    labels = [fresh("head", 1) for _ in parts]
    queries = [next(t for t in p.walk() if t.op == "dot").factors for p in parts]
    sides = [next((r for r in (a, b) if keys not in r.labels), a) for a, b, _ in queries]
    numbers = starts(tracer, labels, sides)
    order = sorted(range(len(parts)), key=numbers.__getitem__)
    join = Join(tracer, labels, list(range(len(parts))), "", "head")

    def one(refs: Sequence[Ref]) -> Ref | None:
        whole = join.same(refs)
        if whole is not None and _has_view(tracer, whole):
            return whole
        if any(keys in r.labels for r in refs):
            return None
        return _concat(tracer, list(zip(refs, labels, strict=True)), join.whole)

    body = _Alike(reader, one).term([parts[i] for i in order])
    return None if body is None else reader.n.make("sum", (body,), join.whole)


def _has_view(tracer: Tracer, ref: Ref) -> bool:
    """Whether an element can be taken from a tensor as its axes are: every second head cannot."""
    if any(c.reads for c in ref.coords):
        return False
    return any(is_view(state.ref) for state in deepen(tracer, ref))


def _relus(term: Term) -> list[Term]:
    return [t for t in term.walk() if t.op == "max" and any(a.is_number(0.0) for a in t.args)]


def join_blocks(reader: Reader, term: Term, along: Label) -> Term:
    """A term without pieces along one label; pieces that are not built alike stay.

    Args:
        reader: of the scores.
        term: of an element of them.
        along: runs over the keys, over the sequences of a batch, or over other rows.
    """
    if not any(t.op == "pieces" for t in term.walk()):
        return term
    args = tuple(join_blocks(reader, a, along) for a in term.args)
    if term.op != "pieces" or not _covers(reader.tracer, term, along) or len(args) > _MOST:
        return reader.n.make(term.op, args, term.data) if term.args else term
    ranges = term.ranges[1]
    tracer = reader.tracer

    def one(refs: Sequence[Ref]) -> Ref | None:
        found = one_element(tracer, refs, _equal)
        if found is not None and not any(c.reads for c in found.coords):
            return found
        own = [fresh("block", high - low) for low, high in ranges]
        if any(x.size > 1 and along not in r.labels for r, x in zip(refs, own, strict=True)):
            return None
        swaps = [{along: Expr.of(x) + low} for x, (low, _) in zip(own, ranges, strict=True)]
        moved = [r.substitute(s) for r, s in zip(refs, swaps, strict=True)]
        join = Join(tracer, own, [low for low, _ in ranges], "", "block")
        whole = join.same(moved)
        if whole is not None and _has_view(tracer, whole):
            return whole.substitute({join.whole: Expr.of(along)})
        return _concat(tracer, list(zip(moved, own, strict=True)), along)

    joined = _Alike(reader, one).term(args)
    return term if joined is None else joined


def written(tracer: Tracer, value: str) -> str:
    """The tensor of the graph that a message may name: the first of those that would be joined."""
    while (made := tracer.joined.get(value)) is not None and made.parts:
        value = made.parts[0][0].value
    return value


def _covers(tracer: Tracer, term: Term, along: Label) -> bool:
    """Whether pieces follow each other from the first number to the last.

    Raises:
        UnifyError: they do where symbols are equal.
    """
    label, ranges = term.ranges
    ends = [0, *(high for _, high in ranges)]
    if label != along or [low for low, _ in ranges] != ends[:-1]:
        return False
    if ends[-1] != along.size and is_open(ends[-1]) and is_open(along.size):
        tracer.unify(ends[-1], along.size)
    return ends[-1] == along.size


def _equal(coords: list[Expr]) -> Expr | None:
    return coords[0] if all(c == coords[0] for c in coords) else None


def _concat(tracer: Tracer, parts: Sequence[tuple[Ref, Label]], whole: Label) -> Ref | None:
    """An element of what a replacement joins: rows in front, columns behind."""
    known = [_stored(tracer, ref) for ref, _ in parts]
    kinds = set(known[0]).intersection(*known[1:])
    if not kinds or any(x.size > 1 and x not in r.labels for r, x in parts):
        return None
    kind = min(kinds, key=lambda k: MANTISSA.get(k, 0))
    stored = tuple((own[kind], x) for own, (_, x) in zip(known, parts, strict=True))
    others = {x for ref, own in stored for x in ref.labels - {own}}
    ordered = sorted(others, key=lambda x: (len(x.name), x.name))
    last = tuple(x for x in ordered if x.name == INNER)
    rows = tuple(x for x in ordered if x.name != INNER)
    name = tracer.join(Joined(stored, rows, whole, last))
    return Ref(name, tuple(map(Expr.of, (*rows, whole, *last))))


def _stored(tracer: Tracer, ref: Ref) -> dict[int, Ref]:
    """By type, the last element behind views that is the same number, and a view itself."""
    kind = tracer.sizes.elem_type(ref.value)
    found = {kind: ref}
    for state in deepen(tracer, ref):
        own = tracer.sizes.elem_type(state.ref.value)
        wider = own in MANTISSA and kind in _WIDE and MANTISSA[own] <= MANTISSA[kind]
        if not (own == kind or wider) or state.factor != 1 or not is_view(state.ref):
            break
        found[own] = state.ref
        kind = own
    return found


def _sides(product: Term) -> tuple[Ref, Ref]:
    return product.factors[0], product.factors[1]


class _Alike:
    """Makes one term of several; `one` makes one element of theirs, or says that it cannot."""

    def __init__(self, reader: Reader, one: _Element) -> None:
        self.reader, self.one = reader, one

    def term(self, terms: Sequence[Term]) -> Term | None:
        """What all of them are; None: they are not built alike."""
        first = terms[0]
        if all(t == first for t in terms[1:]):
            return first
        kinds = {(t.op, len(t.args)) for t in terms}
        if len(kinds) > 1 or first.op == "number":
            return None
        if first.op == "element":
            whole = self._element([t.ref for t in terms])
            return None if whole is None else element(whole)
        if first.op == "dot":
            return self._product(terms)
        if any(t.data != first.data for t in terms) or not first.args:
            return None
        columns = list(zip(*(t.args for t in terms), strict=True))
        if first.op in _ANY_ORDER:
            columns = self._matched(terms)
        args = [self.term(column) for column in columns]
        known = tuple(a for a in args if a is not None)
        return self.reader.n.make(first.op, known, first.data) if len(known) == len(args) else None

    def _element(self, refs: Sequence[Ref]) -> Ref | None:
        if any(r.value in self.reader.opaque for r in refs):
            return None  # nobody knows what they are
        try:
            return self.one(refs)
        except Stop:
            return None

    def _product(self, terms: Sequence[Term]) -> Term | None:
        label = terms[0].factors[2]
        if any(t.factors[2] != label for t in terms):
            return None
        query, key = (self._element(list(side)) for side in zip(*map(_sides, terms), strict=True))
        return None if query is None or key is None else dot(query, key, label)

    def _matched(self, terms: Sequence[Term]) -> list[tuple[Term, ...]]:
        """Arguments of terms that have no order, side by side: those of one tensor together."""
        left = [list(t.args) for t in terms[1:]]
        columns = []
        for own in terms[0].args:
            column = [own]
            for rest in left:
                at = max(range(len(rest)), key=lambda i: self._nearness(own, rest[i]))
                column.append(rest.pop(at))
            columns.append(tuple(column))
        return columns

    def _nearness(self, a: Term, b: Term) -> int:
        if a == b:
            return 3
        if a.op != b.op or (a.op in ("pow", "sum") and a.data != b.data):
            return 0
        return 2 if self._stored(a) == self._stored(b) else 1

    def _stored(self, term: Term) -> set[str]:
        """The tensors that a term's elements are stored in."""
        refs = [t.ref for t in term.walk() if t.op == "element"]
        refs += [r for t in term.walk() if t.op == "dot" for r in _sides(t)]
        return {deepen(self.reader.tracer, r)[-1].ref.value for r in refs}
