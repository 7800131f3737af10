"""Identities of exponentials, logarithms, maxima and sums over keys."""

from __future__ import annotations

import math
from typing import Final

from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.values.arithmetic import LOW, addends, all_flags, coefficient, factors
from sfa_onnx.passes.values.identity import Normal, row
from sfa_onnx.passes.values.terms import ZERO, Term, number

__all__ = ["ROWS", "is_positive", "reaches_one", "weighed"]

_NEAR: Final = 1e-6
_Weighed = tuple[Label | None, Term]
_FINITE: Final = 700.0  # exponents whose exponentials float64 can distinguish from 0 and infinity


def _exp(n: Normal, term: Term) -> Term | None:
    del n
    inner = term.args[0]
    small = inner.is_number() and (abs(inner.value) < _FINITE or inner.value == -math.inf)
    return number(math.exp(inner.value)) if small else None  # exp(-1000) is no 0


def _exp_where(n: Normal, term: Term) -> Term | None:
    inner = term.args[0]
    if inner.op != "where":
        return None
    return n.where(inner.args[0], n.exp(inner.args[1]), n.exp(inner.args[2]))


def _exp_low(n: Normal, term: Term) -> Term | None:
    """exp(low [c] + x) = [not c] exp(x)."""
    for a in addends(term.args[0]):
        by, rest = coefficient(a)
        if by < LOW and (hidden := all_flags(n, rest)) is not None:
            left = n.add(*(b for b in addends(term.args[0]) if b != a))
            return n.mul(n.flag(n.negate(hidden)), n.exp(left))
    return None


def _exp_log(n: Normal, term: Term) -> Term | None:
    """exp(k log(x) + y) = x^k exp(y); k is a whole number but for its rounding."""
    for a in addends(term.args[0]):
        by, rest = coefficient(a)
        if rest.op == "log" and abs(by - round(by)) <= _NEAR and round(by):
            left = n.add(*(b for b in addends(term.args[0]) if b != a))
            return n.mul(n.power(rest.args[0], round(by)), n.exp(left))
    return None


def _log(n: Normal, term: Term) -> Term | None:
    inner = term.args[0]
    if inner.is_number() and inner.value > 0:
        return number(math.log(inner.value))
    if inner.op == "exp":
        return inner.args[0]
    if inner.op == "pow" and is_positive(inner.args[0]):
        return n.mul(number(inner.exponent), n.log(inner.args[0]))
    if inner.op == "mul" and all(is_positive(f) for f in inner.args):
        return n.add(*map(n.log, inner.args))
    if inner.is_number(0.0):
        return number(-math.inf)
    return n.where(inner.args[0], ZERO, number(-math.inf)) if inner.op == "flag" else None


def is_positive(term: Term, *, among: bool = False) -> bool:
    """Whether a term is above 0 in a row that sees a key (`among`: that one, or some are)."""
    if term.is_number():
        return term.value > 0
    if term.op == "sum":
        return is_positive(term.args[0], among=True)
    if term.op in ("add", "mul", "pow"):
        return all(is_positive(a, among=among) for a in term.args)
    return term.op == "exp" or (among and term.op == "flag")


# -- maxima ---------------------------------------------------------------------------------------


def _max(n: Normal, term: Term) -> Term | None:
    """Max(-inf, a) = a; of numbers the largest."""
    known = [a.value for a in term.args if a.is_number()]
    rest = [a for a in dict.fromkeys(term.args) if not a.is_number()]
    neutral = -math.inf if term.op == "max" else math.inf
    best = max([neutral, *known]) if term.op == "max" else min([neutral, *known])
    if not rest:
        return number(best)
    kept = (number(best), *rest) if best != neutral else tuple(rest)
    if len(kept) == 1:
        return kept[0]
    return n.make(term.op, kept) if len(kept) < len(term.args) else None


def _max_low(n: Normal, term: Term) -> Term | None:
    """Max(low, maximum of scores) = the maximum: no score that is seen lies that low."""
    del n
    if len(term.args) != 2 or not term.args[0].is_number() or term.args[0].value >= LOW:
        return None
    inner = term.args[1]
    return inner if inner.op in ("maximum", "max", "log") or _is_shifted(inner) else None


def _is_shifted(term: Term) -> bool:
    return term.op == "add" and any(
        coefficient(a)[1].op in ("maximum", "max", "log") for a in term.args
    )


def _floor(n: Normal, term: Term) -> Term | None:
    """Max(floor, sum exp(s - max s)) = the sum, which is 1 at least, for a floor of 1 or less."""
    del n
    if term.op != "max" or len(term.args) != 2 or not term.args[0].is_number():
        return None
    floor, total = term.args[0].value, term.args[1]
    if not 0 <= floor <= 1:
        return None
    acts = not (floor == 0 and is_positive(total)) and not reaches_one(total, merged=False)
    return None if acts else total


def _merge_floor(n: Normal, term: Term) -> Term | None:
    """Max(floor, exp(log p - m) + exp(log q - m)) = the sum, where m is the larger logarithm."""
    del n
    if len(term.args) != 2 or not term.args[0].is_number():
        return None
    floor, total = term.args[0].value, term.args[1]
    plain = reaches_one(total, merged=False)
    return total if 0 <= floor <= 1 and not plain and reaches_one(total) else None


def reaches_one(total: Term, *, merged: bool = True) -> bool:
    """Whether a sum of exponentials is shifted by the largest of their very exponents.

    `merged`: or by the largest logarithm of their partial sums.
    """
    shift = next((f for f in factors(total) if f.op == "exp"), None)
    rest = [f for f in factors(total) if f.op != "exp"]
    if shift is None or len(rest) != 1 or any(f.is_number() for f in rest):
        return False
    by, most = coefficient(shift.args[0])
    if abs(by + 1) > _NEAR:
        return False
    summed = {_addend(a) for a in addends(rest[0])}
    return None not in summed and _largest(most, merged) <= summed  # another's may be larger


def _addend(term: Term) -> _Weighed | None:
    """(label, exp(s)) of what a sum of exponentials adds; a sink has no label, 1 is exp(0)."""
    if term.op == "sum":
        return term.label, term.args[0]
    if term.is_number() and term.value > 0:
        return None, number(math.log(term.value))
    return (None, term) if term.op == "exp" else None


def _largest(most: Term, merged: bool) -> set[_Weighed | None]:
    """What the largest exponents are of; a number is that of a constant sink."""
    parts = most.args if most.op == "max" else (most,)
    found: set[_Weighed | None] = set()
    for part in parts:
        if merged and part.op == "log":
            found |= {_addend(a) for a in addends(part.args[0])}
            continue
        alone = part if part.is_number() else Term("exp", (part,))
        found |= weighed(part) or {(None, alone)}
    return found


def weighed(most: Term) -> set[_Weighed]:
    """(label, exp(s)) of the maximum over the label of s."""
    if most.op == "max":
        return set().union(*(weighed(m) for m in most.args))
    if most.op != "maximum":
        return set()
    return {(most.label, _plain_exp(most.args[0]))}


def _plain_exp(scores: Term) -> Term:
    """exp(s), as the table has it, without a normaliser."""
    flags: list[Term] = []
    while scores.op == "where" and scores.args[2].is_number(-math.inf):
        condition = scores.args[0]
        flags += [Term("flag", (c,)) for c in _both(condition)]
        scores = scores.args[1]
    exp = Term("exp", (scores,))
    return Term("mul", tuple(sorted([exp, *flags], key=lambda t: t.order))) if flags else exp


def _both(condition: Term) -> tuple[Term, ...]:
    return condition.args if condition.op == "and" else (condition,)


# -- reductions -----------------------------------------------------------------------------------


def _named(n: Normal, term: Term) -> Term | None:
    """What a bound label is called is no matter."""
    own, body = term.label, term.args[0]
    name = Label(f"key{body.height}", own.size)
    if own == name or (own not in body.labels and own.size > 1):
        return None
    return n.make(term.op, (body.rename({own: Expr.of(name)}, n.make),), name)


def _outside(n: Normal, term: Term) -> Term | None:
    """Sum(c f) = c sum(f): what does not depend on the key, also as a part of an exponent."""
    label = term.label
    out: list[Term] = []
    kept: list[Term] = []
    for f in factors(term.args[0]):
        parts = addends(f.args[0]) if f.op == "exp" else ()
        own = [a for a in parts if _runs(label, a)]
        if own:
            free = [a for a in parts if a not in own]
            out += [n.exp(n.add(*free))] if free else []
            kept.append(n.exp(n.add(*own)))
        else:
            (kept if _runs(label, f) else out).append(f)
    if not out or not kept:
        return None
    return n.mul(*out, n.make("sum", (n.mul(*kept),), label))


def _runs(label: Label, term: Term) -> bool:
    """Whether a term differs from key to key; of a single one, whether it is that key's own."""
    return label in term.labels if label.size > 1 else not (term.height or term.is_number())


def _alone(n: Normal, term: Term) -> Term | None:
    """Sum over one element, within a sum over others: that element."""
    label = term.label
    if label.size == 1:
        return None
    body = _without(n, term.args[0], label)
    return None if body == term.args[0] else n.make(term.op, (body,), label)


def _without(n: Normal, term: Term, label: Label) -> Term:
    """A term, sums over single elements that depend on `label` taken for these."""
    if label not in term.labels or not term.height:
        return term
    args = tuple(_without(n, a, label) for a in term.args)
    if term.op in ("sum", "maximum") and term.label.size == 1:
        return args[0]
    return term if args == term.args else n.make(term.op, args, term.data)


def _by_parts(n: Normal, term: Term) -> Term | None:
    """The sum (maximum) over a Concat is that of the sums (maxima) over its parts."""
    body = term.args[0]
    if body.op != "pieces" or body.ranges[0] != term.label:
        return None
    parts = []
    for (low, high), inner in zip(body.ranges[1], body.args, strict=True):
        own = Label(f"{term.label.name}[{low}:{high}]", high - low)
        part = inner.rename({term.label: Expr.of(own) + low}, n.make)
        parts.append(part if high - low == 1 else n.make(term.op, (part,), own))
    joined = {"sum": "add", "maximum": "max", "minimum": "min", "any": "or", "all": "and"}
    return n.make(joined[term.op], tuple(parts))


def _added(n: Normal, term: Term) -> Term | None:
    """Sum(a + b) = sum(a) + sum(b)."""
    if term.args[0].op != "add":
        return None
    return n.add(*(n.make("sum", (a,), term.label) for a in term.args[0].args))


def _empty(n: Normal, term: Term) -> Term | None:
    del n
    return ZERO if term.args[0].is_number(0.0) else None


def _maximum_of_constant(n: Normal, term: Term) -> Term | None:
    """Maximum(s + c) = maximum(s) + c."""
    label = term.label
    free = [a for a in addends(term.args[0]) if label not in a.labels]
    own = [a for a in addends(term.args[0]) if label in a.labels]
    if not free or not own:
        return None
    return n.add(*free, n.make(term.op, (n.add(*own),), label))


def _one_point(n: Normal, term: Term) -> Term | None:
    """Any(u, u == e and c(u)) = c(e): an entry that is where it is said to be."""
    label, body = term.label, term.args[0]
    for part in body.args if body.op == "and" else (body,):
        if part.op != "eq" or any(a.op != "index" for a in part.args):
            continue
        for own, place in (part.args, part.args[::-1]):
            bounds = place.expr.bounds
            inside = bounds is not None and bounds[0] >= 0 and bounds[1] < label.size
            if own.expr == Expr.of(label) and label not in place.labels and inside:
                return body.rename({label: place.expr}, n.make)
    return None


def _of_flags(n: Normal, term: Term) -> Term | None:
    """The maximum of flags shows whether there is any, the minimum whether all are set."""
    body = term.args[0]
    if body.op != "flag":
        return None
    return n.flag(n.make("any" if term.op == "maximum" else "all", body.args, term.label))


_P: Final = "log(sum(t, exp(s)))"
_Q: Final = "log(sum(t, exp(v)))"
ROWS: Final = (
    # numbers; exp(-inf) = 0: a hidden key has no weight
    row("exp of a number", "exp", "exp(-inf)", "0", _exp),
    # a mask in front of the exponential is a flag behind it
    row("exp of a mask", "exp", "exp(where(c, a, -inf))", "flag(c) * exp(a)", _exp_where),
    # mask * finfo.min
    row(
        *("exp of a low", "exp", "exp(a - 1e30 * flag(c))", "flag(not c) * exp(a)", _exp_low),
        *("exp(a - 2 * flag(c))", "flag(not c) * exp(a)"),
    ),
    # subtracting a log-sum-exp divides by the sum; log2(e) ln(2) is 1 but for its rounding
    row(
        *("exp of a log", "exp", "exp(a - log(p))", "exp(a) * p ** -1", _exp_log),
        *("exp(a - 0.5 * log(p))", "exp(a) * p ** -1"),
    ),
    # log-sum-exp of shifted scores is the shift and the rest
    row("log", "log", "log(exp(a) * sum(t, exp(s)))", "a + log(sum(t, exp(s)))", _log),
    # a running maximum starts at -inf
    row("max of numbers", "max min", "max(-inf, a)", "a", _max),
    # a floor under a maximum, below every score
    row(
        *("floor under scores", "max", "max(-1e30, maximum(t, s))", "maximum(t, s)", _max_low),
        *("max(2, maximum(t, s))", "maximum(t, s)"),
    ),
    # a floor under a sum that holds exp(0)
    row(
        "floor under a shifted sum",
        "max",
        "max(1e-6, sum(t, exp(s - maximum(t, s))))",
        "sum(t, exp(s - maximum(t, s)))",
        _floor,
        "max(2.5e3, sum(t, exp(s - maximum(t, s))))",
        "sum(t, exp(s - maximum(t, s)))",
    ),
    # partial softmaxes merged by their log-sum-exps: the larger share is 1
    row(
        "floor under a merge",
        "max",
        f"max(1e-6, exp(-1 * max({_P}, {_Q})) * (sum(t, exp(s)) + sum(t, exp(v))))",
        f"exp(-1 * max({_P}, {_Q})) * (sum(t, exp(s)) + sum(t, exp(v)))",
        _merge_floor,
        f"max(2.5e3, exp(-1 * max({_P}, {_Q})) * (sum(t, exp(s)) + sum(t, exp(v))))",
        f"exp(-1 * max({_P}, {_Q})) * (sum(t, exp(s)) + sum(t, exp(v)))",
    ),
    row("empty sum", "sum", "sum(t, 0)", "0", _empty),
    # a Concat of keys
    row(
        *("sum by parts", "sum maximum minimum any all", "sum(t, pieces(s, v))"),
        *("sum_parts(s, v)", _by_parts),
    ),
    row("sum of sums", "sum", "sum(t, s + v)", "sum(t, s) + sum(t, v)", _added),
    # an axis of one element in the middle of the scores
    row(
        *("single element", "sum", "sum(t, sum(one, s * exp(dot)) * v)"),
        *("sum(t, s * exp(dot) * v)", _alone),
    ),
    # any shift that does not depend on the key leaves the sum
    row(
        *("outside the sum", "sum", "sum(t, a * exp(s - b))", "a * exp(-b) * sum(t, exp(s))"),
        *(_outside, "sum(t, v * exp(s))", "v * sum(t, exp(s))"),
    ),
    row(
        *("outside the maximum", "maximum", "maximum(t, s + a)", "maximum(t, s) + a"),
        _maximum_of_constant,
    ),
    row("maximum of flags", "maximum", "maximum(t, flag(ct))", "flag(any(t, ct))", _of_flags),
    # entries along an axis of their own
    row(
        *("one point", "any", "any(u, at(u) == at(t) and su < 0)", "s < 0", _one_point),
        *("any(u, at(u) <= at(t) and su < 0)", "s < 0"),
    ),
    row("minimum of flags", "minimum", "minimum(t, flag(ct))", "flag(all(t, ct))", _of_flags),
    # the sum over one key is that key
    row("bound label", "sum maximum minimum any all", "sum(u, su)", "sum(t, s)", _named),
)
