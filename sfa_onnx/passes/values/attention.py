"""The one question: is a term `sum_k softmax_k(scores) * value_k`?

What keeps a normal form from being one is said by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sfa_onnx.passes.axes.expr import Label
from sfa_onnx.passes.axes.trace import Ref, Stop
from sfa_onnx.passes.values.arithmetic import addends, coefficient, factors
from sfa_onnx.passes.values.terms import ONE, Term

__all__ = ["Attention", "Weight", "as_attention"]

_ALIKE: Final = 1e-6  # roundings of log2(e), ln(2) and factors that are split


@dataclass(frozen=True)
class Weight:
    """The exponential of one key's score, before it is divided by the sum.

    Attributes:
        label: runs over the keys.
        exponent: the score.
        flags: conditions without which the key has no weight.
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
        flags = tuple(f.args[0] for f in own if f.op == "flag")
        if len(exps) != 1 or len(flags) + 1 != len(own):
            return None
        return cls(total.label, exps[0].args[0], flags)


@dataclass(frozen=True)
class Attention:
    """A term taken apart.

    Attributes:
        parts: weights and rows, one pair per range of keys.
        total: what the exponentials are divided by.
        sinks: exponents of what takes part in the sum without a row.
        conditions: what has to hold for the row not to be zero.
    """

    parts: tuple[tuple[Weight, Ref], ...]
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
    rows: list[tuple[Weight, Ref]] = []
    for part in addends(top):
        rows.append(_row(part, at))
    weights = [w for w, _ in rows]
    sinks = []
    for total in addends(below):
        weight = Weight.of(total)
        match = next((w for w in weights if weight is not None and _alike(w, weight)), None)
        if match is not None:
            weights.remove(match)
        elif total.op == "exp":
            sinks.append(total.args[0])
        else:
            raise _too_much(total, at)
    if weights:
        raise Stop(
            "the exponentials are not divided by their sum",
            at,
            "expected exp(s) / sum(exp(s)): the operator's weights add up to 1",
        )
    return Attention(tuple(rows), below, tuple(sinks), tuple(conditions))


def _fraction(term: Term, at: str) -> tuple[Term, Term, list[Term]]:
    """(numerator, divisor, conditions) of a quotient."""
    tops: list[Term] = []
    below: list[Term] = []
    conditions: list[Term] = []
    for f in factors(term):
        if f.op == "pow" and f.exponent == -1:
            below.append(f.args[0])
        elif f.op == "flag":
            conditions.append(f.args[0])
        else:
            tops.append(f)
    for divisor in below:
        _check_bound(divisor, at)
    if len(below) == 1 and len(tops) == 1 and tops[0].op in ("sum", "add"):
        return tops[0], below[0], conditions
    if not below:
        raise Stop(
            "the exponentials are not divided by their sum",
            at,
            "expected exp(s) / sum(exp(s)): the operator's weights add up to 1",
        )
    extra = [f for f in tops if f.op not in ("sum", "add")]
    if extra:
        raise Stop(
            f"the weighted sum is multiplied by {_short(extra[0])}",
            at,
            "scale the result behind the attention",
        )
    raise Stop("the weights are divided by more than one sum", at, _HINT)


_HINT: Final = "the operator computes softmax(scale * q.k + mask) v over the selected keys only"


def _check_bound(below: Term, at: str) -> None:
    """Refuse a floor or a ceiling under the sum by its own name."""
    if below.op in ("max", "min"):
        bound = next((a for a in below.args if a.is_number()), None)
        what = "a floor" if below.op == "max" else "a ceiling"
        if bound is not None:
            raise Stop(
                f"the sum of the exponentials has {what} ({bound.value:g}) that can act",
                at,
                "expected exp(s) / sum(exp(s)): the operator's weights add up to 1",
            )


def _too_much(total: Term, at: str) -> Stop:
    if total.is_number():
        return Stop(
            f"the exponentials are divided by their sum and {total.value:g} (an epsilon)",
            at,
            "expected exp(s) / sum(exp(s)): the operator's weights add up to 1",
        )
    if Weight.of(total) is not None:
        return Stop(
            "the exponentials are divided by a sum of others (another scale, mask or key)",
            at,
            "expected exp(s) / sum(exp(s)): the operator's weights add up to 1",
        )
    return Stop(
        f"the exponentials are divided by {_short(total)}, which is not their sum", at, _HINT
    )


def _row(part: Term, at: str) -> tuple[Weight, Ref]:
    """(weight, element of the value) of a sum of weighted rows."""
    if part.op == "sum":
        own = factors(part.args[0])
        elements = [f for f in own if f.op == "element"]
        rest = [f for f in own if f.op != "element"]
        weight = Weight.of(Term("sum", (_product(rest),), part.data))
        if weight is not None and len(elements) == 1:
            return weight, elements[0].ref
    if any(f.op == "pow" and f.exponent > 1 for f in part.walk()):
        raise Stop(f"rows are weighted by a power of the scores: {_short(part)}", at, _HINT)
    raise Stop(f"{_short(part)} is no sum of rows that are weighted by exponentials", at, _HINT)


def _product(terms: list[Term]) -> Term:
    return terms[0] if len(terms) == 1 else Term("mul", tuple(terms)) if terms else ONE


def _alike(a: Weight, b: Weight) -> bool:
    """Whether two weights are equal but for roundings of their factors."""
    if a.label != b.label or set(a.flags) != set(b.flags):
        return False
    mine, other = (_linear(x.exponent) for x in (a, b))
    return mine.keys() == other.keys() and all(
        abs(mine[k] - other[k]) <= _ALIKE * max(abs(mine[k]), abs(other[k])) for k in mine
    )


def _linear(term: Term) -> dict[Term, float]:
    return {rest: by for by, rest in map(coefficient, addends(term))}


def _short(term: Term, most: int = 120) -> str:
    text = str(term)
    return text if len(text) <= most else text[: most - 3] + "..."
