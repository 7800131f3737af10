"""The one question: is a term `sum_k softmax_k(scores) * value_k`?

What keeps a normal form from being one is said by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.trace import Ref, Stop
from sfa_onnx.passes.values.arithmetic import addends, coefficient, factors
from sfa_onnx.passes.values.lonely import is_lonely, shown_somewhere
from sfa_onnx.passes.values.terms import ONE, Term, number

__all__ = ["ALIKE", "Attention", "UnclearError", "Weight", "as_attention"]

ALIKE: Final = 1e-6  # roundings of log2(e), ln(2) and factors that are split
_EPSILON: Final = 1e-4  # what is added to a sum below this is no sink, but keeps it from being 0
_FLAGS: Final = ("flag", "element")
_SUM: Final = "expected exp(s) / sum(exp(s)): the operator's weights add up to 1"


class UnclearError(Stop):
    """The form does not show what is wrong: a node that makes something else of scores may."""


@dataclass(frozen=True)
class Weight:
    """The exponential of one key's score, before it is divided by the sum.

    Attributes:
        label: runs over the keys.
        exponent: the score.
        flags: conditions without which the key has no weight; also numbers, 0 or 1, that it is
            multiplied by.
    """

    label: Label
    exponent: Term
    flags: tuple[Term, ...]

    @classmethod
    def of(cls, total: Term) -> Weight | None:
        """What a sum of exponentials adds; None: it is no such sum."""
        if total.op != "sum":
            return None
        own = factors(total.args[0])
        exps = [f for f in own if f.op == "exp"]
        flags = tuple(f.args[0] if f.op == "flag" else f for f in own if f.op in _FLAGS)
        if len(exps) != 1 or len(flags) + 1 != len(own):
            return None
        return cls(total.label, exps[0].args[0], flags)

    def times(self, other: Weight) -> float | None:
        """What this exponent is the other one times, up to rounding; None: they differ."""
        if self.label != other.label or set(self.flags) != set(other.flags):
            return None
        mine, theirs = _linear(self.exponent), _linear(other.exponent)
        if mine.keys() != theirs.keys():
            return None
        first = next(iter(mine))
        by = mine[first] / theirs[first]
        alike = all(abs(mine[k] - by * theirs[k]) <= ALIKE * abs(mine[k]) for k in mine)
        return by if alike else None


@dataclass(frozen=True)
class Attention:
    """A term taken apart.

    Attributes:
        parts: weights and rows (with a scale each, or without), one pair per range of keys.
        total: what the exponentials are divided by.
        sinks: exponents of what takes part in the sum without a row.
        conditions: what has to hold for the row not to be zero.
    """

    parts: tuple[tuple[Weight, tuple[Ref, ...]], ...]
    total: Term
    sinks: tuple[Term, ...] = ()
    conditions: tuple[Term, ...] = ()


def as_attention(term: Term, at: str) -> Attention:
    """Take a normal form apart.

    Args:
        term: the element of the result.
        at: the value to which a refusal points.

    Raises:
        Stop: it is something else; the reason says what is missing or too much.
    """
    top, below, conditions = _fraction(term, at)
    summed = [b for b in addends(below) if _of_nobody(b) is None]
    masks = [f for b in summed if b.op == "sum" for f in factors(b.args[0])]
    rows = [_row(_of_one(part), masks, at) for part in addends(top) if _of_nobody(part) is None]
    weights = [w for w, _ in rows]
    _check_fill(top, below, weights, at)
    sinks = []
    for total in summed:
        weight = Weight.of(_of_one(total))
        match = next((w for w in weights if weight is not None and _alike(w, weight)), None)
        if match is not None:
            weights.remove(match)
        elif (sink := _sink(total)) is not None:
            sinks.append(sink)
        else:
            raise _too_much(total, weights, at)
    if weights:
        raise UnclearError("the exponentials are not divided by their sum", at, _SUM)
    return Attention(tuple(rows), below, tuple(sinks), tuple(conditions))


def _of_nobody(part: Term) -> Term | None:
    """The condition of a part that only rows without keys have; None: others have it as well."""
    own = [f for f in factors(part) if f.op == "flag"]
    own += [f for f in factors(part.args[0]) if f.op == "flag"] if part.op == "sum" else []
    label = part.label if part.op == "sum" else None
    told = (f.args[0] for f in own if is_lonely(f.args[0]) and label not in f.labels)
    return next(told, None)


def _check_fill(top: Term, below: Term, weights: list[Weight], at: str) -> None:
    """What is put in place of nothing: where no key is seen, and nowhere else.

    Raises:
        Stop: rows that see a key have it as well.
    """
    for part in (*addends(top), *addends(below)):
        condition = _of_nobody(part)
        lonely = None if condition is None else is_lonely(condition)
        if lonely and not all(shown_somewhere(*lonely, w.flags) for w in weights):
            raise Stop(
                f"scores are replaced where {_short(condition or part)}, and no such mask hides"
                " all keys there",
                at,
                "fill rows that see no key by the mask of the scores themselves",
            )


def _of_one(part: Term) -> Term:
    """What is not summed is the sum over a single key."""
    return part if part.op == "sum" else Term("sum", (part,), Label("key0", 1))


def _sink(total: Term) -> Term | None:
    """The exponent of what is added to the sum of exponentials: softmax1 adds exp(0)."""
    by, rest = (total.value, ONE) if total.is_number() else coefficient(total)
    if by < _EPSILON or rest.op not in ("exp", "number"):
        return None
    own = [] if rest.is_number() else list(addends(rest.args[0]))
    if by != 1 or not own:
        own.insert(0, number(math.log(by)))
    return own[0] if len(own) == 1 else Term("add", tuple(own))


def _fraction(term: Term, at: str) -> tuple[Term, Term, list[Term]]:
    """(numerator, divisor, conditions) of a quotient."""
    tops: list[Term] = []
    below: list[Term] = []
    conditions: list[Term] = []
    if term.op == "where":
        raise Stop(f"rows are replaced by {_short(term.args[2])} unless {_short(term.args[0])}", at)
    for f in factors(term):
        if f.op == "pow" and f.exponent == -1:
            below.append(f.args[0])
        elif f.op == "pow" and f.exponent < -1:
            raise Stop(
                f"the weights are a power ({-f.exponent}) of the softmax",
                at,
                "the operator's weights add up to 1: leave out the power",
            )
        elif f.op == "flag":
            conditions.append(f.args[0])
        else:
            tops.append(f)
    for divisor in below:
        _check_bound(divisor, at)
    if len(below) == 1 and len(tops) == 1 and tops[0].op in ("sum", "add"):
        return tops[0], below[0], conditions
    single = len(below) == 1 and all(f.op in ("exp", "element") for f in tops)
    if single and any(t.op == "sum" and t.label.size == 1 for t in addends(below[0])):
        return _product([*tops, *(Term("flag", (c,)) for c in conditions)]), below[0], []
    if not below:
        raise _undivided(tops, at)
    extra = [f for f in tops if f.op not in ("sum", "add")]
    if extra:
        for b in (b for d in below for b in addends(d) if b.op in ("number", "where")):
            raise _too_much(b, [], at)
        if extra[0].op == "exp" and extra[0].args[0].is_number():
            raise Stop(f"every score is {extra[0].args[0]}: no product is left of them", at, _HINT)
        raise Stop(
            f"the weighted sum is multiplied by {_short(extra[0])}",
            at,
            "scale the result behind the attention",
        )
    raise Stop("the weights are divided by more than one sum", at, _HINT)


def _undivided(tops: list[Term], at: str) -> Stop:
    """What is in place of a divisor behind the weighted sum."""
    if len(tops) == 1 and tops[0].op == "element":
        return Stop(
            "each query attends to a single key, whose weight is always 1",
            at,
            "select two keys or more",
        )
    for part in (p for top in tops for p in addends(top) if p.op == "sum"):
        for f in factors(part.args[0]):
            if f.op == "pow" and f.exponent < 0 and f.args[0].op == "sum":
                return Stop(
                    "the softmax runs along another axis than the weighted sum",
                    at,
                    "expected the softmax over the keys that are summed",
                )
            if f.op == "pow" and f.exponent < 0:
                return _sigmoid(f, at)
            if f.op == "where":
                return UnclearError(
                    f"{_short(f)} lies between softmax and weighted sum",
                    at,
                    "only casts, views and NaN guards that give 0 may",
                )
    return UnclearError("the exponentials are not divided by their sum", at, _SUM)


_HINT: Final = "the operator computes softmax(scale * q.k + mask) v over the selected keys only"


def _check_bound(below: Term, at: str) -> None:
    """Refuse a floor or a ceiling under the sum by its own name."""
    if below.op in ("max", "min"):
        bound = next((a for a in below.args if a.is_number()), None)
        what = "a floor" if below.op == "max" else "a ceiling"
        if bound is not None:
            raise Stop(
                f"the sum of the exponentials has {what} ({bound.value:g}) that can act", at, _SUM
            )


def _too_much(total: Term, weights: list[Weight], at: str) -> Stop:
    """What is wrong with a part of the divisor that none of `weights` is summed to."""
    if total.is_number():
        return Stop(
            f"the exponentials are divided by their sum and {total.value:g} (an epsilon or a sink)",
            at,
            _SUM,
        )
    if (other := Weight.of(total)) is not None:
        for w in weights:
            hidden = [f for f in w.flags if f not in other.flags]
            same = other.exponent.rename({other.label: Expr.of(w.label)})
            if hidden and _alike(replace(w, flags=()), Weight(w.label, same, ())):
                return Stop(
                    f"weights are set to zero unless {_short(hidden[0])} behind the softmax, and"
                    " the scores are not hidden by the same mask in front of it",
                    at,
                    "mask the scores instead of the weights: what remains then adds up to 1",
                )
        return Stop(
            "the exponentials are divided by a sum of others (another scale, mask or key)", at, _SUM
        )
    why = f"the exponentials are divided by {_short(total)} as well, not by their plain sum"
    return Stop(why, at, _SUM)


def _row(part: Term, masks: list[Term], at: str) -> tuple[Weight, tuple[Ref, ...]]:
    """(weight, element of the value) of a sum of rows; `masks` weigh in the divisor too."""
    if part.op == "sum":
        own = factors(part.args[0])
        elements = [f for f in own if f.op == "element" and f not in masks]
        rest = [f for f in own if f not in elements]
        weight = Weight.of(Term("sum", (_product(rest),), part.data))
        if weight is not None and 1 <= len(elements) <= 2:
            return weight, tuple(f.ref for f in elements)
        for f in rest:
            if f.op == "pow" and f.exponent < 0:
                raise _sigmoid(f, at)
    if any(f.op == "pow" and f.exponent > 1 for f in part.walk()):
        raise Stop(f"rows are weighted by a power of the scores: {_short(part)}", at, _HINT)
    why = f"{_short(part)} is no sum of rows that are weighted by exponentials"
    raise UnclearError(why, at, _HINT)


def _sigmoid(weight: Term, at: str) -> Stop:
    return Stop(f"rows are weighted by {_short(weight)} (a sigmoid?), not a softmax", at, _HINT)


def _product(terms: list[Term]) -> Term:
    return terms[0] if len(terms) == 1 else Term("mul", tuple(terms)) if terms else ONE


def _alike(a: Weight, b: Weight) -> bool:
    """Whether two weights are equal but for roundings of their factors."""
    by = a.times(b)
    return by is not None and abs(by - 1) <= ALIKE


def _linear(term: Term) -> dict[Term, float]:
    return {rest: by for by, rest in map(coefficient, addends(term))}


def _short(term: Term, most: int = 120) -> str:
    text = str(term)
    return text if len(text) <= most else text[: most - 3] + "..."
