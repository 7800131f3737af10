"""What leaves an attention besides its result: the largest score and the log-sum-exp of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from sfa_onnx.passes.axes.expr import Expr, Label, fresh, label_of
from sfa_onnx.passes.axes.reduced import reduced
from sfa_onnx.passes.axes.trace import Move, Ref, Scaled, Stop, Tracer
from sfa_onnx.passes.bind.site import AttentionRegion, Statistic
from sfa_onnx.passes.values.arithmetic import addends, coefficient, factors
from sfa_onnx.passes.values.attention import ALIKE, Weight
from sfa_onnx.passes.values.exponential import weighed
from sfa_onnx.passes.values.pointwise import POINTWISE
from sfa_onnx.passes.values.read import Reader
from sfa_onnx.passes.values.table import normal
from sfa_onnx.passes.values.terms import Term, number

__all__ = ["statistics"]

_EMPTY: Final = "empty row"  # the identity that drops guards of rows without keys
_NOTHING: Final = {"maximum": -math.inf, "log-sum-exp": -math.inf, "sum": 0.0}
_MOST: Final = 32  # values between a statistic and what is read outside


def statistics(
    tracer: Tracer, region: AttentionRegion, reader: Reader, total: Term
) -> tuple[list[Statistic], bool]:
    """Those of the region's other values that the operator returns as well; whether all are.

    What is read outside may be computed from them (a sign, another base, some of the heads): those
    nodes stay, and read what the replacement makes.

    Args:
        tracer: of the site.
        region: with the values that are read outside.
        reader: which has read the result.
        total: the sum of the exponentials.
    """
    found: dict[str, Statistic] = {}
    under = [_under(tracer, region, reader, total, value) for value in region.sides]
    for known in under:
        found |= known or {}
    return list(found.values()), None not in under


def _under(
    tracer: Tracer, region: AttentionRegion, reader: Reader, total: Term, value: str
) -> dict[str, Statistic] | None:
    """The statistics that `value` is, or is made of; None: of something else as well."""
    found: dict[str, Statistic] = {}
    stack, seen = [value], {value}
    products = {name for names in reader.products.values() for name in names}
    while stack and len(seen) < _MOST:
        here = stack.pop()
        ref = _placed(tracer, reader, here)
        told = None if ref is None else _told(reader, ref, total)
        if ref is not None and told is not None:
            kind, factor = told
            plain = Reader(tracer, normal(_EMPTY), region.inner)
            found[here] = Statistic(ref, kind, factor, _lonely(plain.term(ref), kind))
            continue
        node = tracer.index.maker(here)
        read = [] if node is None else [n for n in node.input if n in region.inner]
        if not read or here in products:
            return None
        stack += [n for n in read if n not in seen]
        seen.update(read)
    return found


def _told(reader: Reader, ref: Ref, total: Term) -> tuple[str, float] | None:
    """(kind, factor) of a value; None: it is no statistic."""
    n, term = reader.n, reader.term(ref)
    by, rest = coefficient(term)
    if rest == n.log(total):
        return "log-sum-exp", by
    if (factor := _of_largest(term, total)) is not None:
        return "maximum", factor
    shift = next((f.args[0] for f in factors(rest) if f.op == "exp"), None)
    if shift is not None:
        most = n.mul(number(-1), shift)
        factor = _of_largest(most, total)
        if factor is not None and abs(factor - 1) <= ALIKE and n.mul(rest, n.exp(most)) == total:
            return "sum", by
    return None


def _of_largest(term: Term, total: Term) -> float | None:
    """What a term is the largest exponent times, of those that `total` sums."""
    by, most = coefficient(term)
    summed = [Weight.of(a) for a in addends(total)]
    largest = [Weight.of(Term("sum", (exp,), label)) for label, exp in weighed(most) if label]
    if len(largest) != len(summed):
        return None
    ratio = None
    for own in summed:
        if own is None:
            return None
        found = (x.times(own) for x in largest if x is not None)
        factor = next((f for f in found if f is not None), None)
        if factor is None or (ratio is not None and abs(factor - ratio) > ALIKE * ratio):
            return None
        ratio = factor
    return None if ratio is None or ratio <= 0 else by * ratio


def _lonely(term: Term, kind: str) -> float:
    """What a guard gives in rows without keys; without one, the softmax of nothing: -inf."""
    if term.op == "where":
        numbers = [a.value for a in term.args[1:] if a.is_number()]
        return numbers[0] if len(numbers) == 1 else _NOTHING[kind]
    return _NOTHING[kind]


def _placed(tracer: Tracer, reader: Reader, value: str) -> Ref | None:
    """The element of `value` that belongs to the element of the result that was read."""
    try:
        labels = [fresh("p", size) for size in tracer.shape(value)]
    except Stop:  # as long as a mask says: what is written where rows see no key
        return None
    own = Ref(value, tuple(map(Expr.of, labels)))
    stack, seen = [own], {value}
    while stack and len(seen) < _MOST:
        here = stack.pop()
        if (known := reader.axes.get(here.value)) is not None:
            swap = _fitted(here.coords, known)
            return None if swap is None else own.substitute(swap)
        for ref in _behind(tracer, reader, here):
            if ref.value in reader.inner and ref.value not in seen:
                seen.add(ref.value)
                stack.append(ref)
    return None


def _fitted(own: Sequence[Expr], known: Sequence[Expr]) -> dict[Label, Expr] | None:
    """Labels of one reading by those of another; None: they do not run over the same elements."""
    swap = {}
    for mine, theirs in zip(own, known, strict=True):
        label, other = label_of(mine), label_of(theirs)
        if label is None and mine != theirs:
            return None
        if label is not None:
            if other is None or other.size != label.size:
                return None
            swap[label] = theirs
    return swap


def _behind(tracer: Tracer, reader: Reader, here: Ref) -> list[Ref]:
    """The elements that one is made of."""
    node = tracer.index.maker(here.value)
    if node is None:
        return []
    if node.op_type.startswith("Reduce"):
        under = reduced(tracer, node, here)
        return [] if under is None else [under[0]]
    step = tracer.step(here)
    if isinstance(step, Move | Scaled):
        return [step.ref]
    if node.op_type == "ScatterND":
        return [Ref(node.input[0], here.coords)]
    if node.op_type not in POINTWISE:
        return []
    names = [n for n in node.input if n in reader.inner]
    return [tracer.operand(n, here.coords) for n in names]
