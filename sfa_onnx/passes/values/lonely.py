"""Identities of rows that see no key: `all(t, not c)` where c is what shows a key."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.values.arithmetic import LOW, factors
from sfa_onnx.passes.values.identity import Normal, row
from sfa_onnx.passes.values.terms import FALSE, ZERO, Term, number

__all__ = ["ROWS", "is_lonely", "parts_of", "shown_somewhere"]


def parts_of(condition: Term) -> tuple[Term, ...]:
    """The conditions that one is the conjunction of."""
    return condition.args if condition.op == "and" else (condition,)


def is_lonely(condition: Term) -> tuple[Label, tuple[Term, ...]] | None:
    """(label, conditions of a key) where no key meets them all; None: it says something else."""
    if condition.op != "all":
        return None
    body = condition.args[0]
    hidden = body.args if body.op == "or" else (body,)
    return condition.label, tuple(h.args[0] if h.op == "not" else Term("not", (h,)) for h in hidden)


def shown_somewhere(label: Label, shown: tuple[Term, ...], known: Iterable[Term]) -> bool:
    """Whether `known` conditions say of a key that it meets `shown`, in which it is `label`."""
    every = frozenset(known)
    own = next((c for c in shown if label in c.labels), None)
    places = (_place(own, label, other) for other in every) if own is not None else ()
    return any(p is not None and {c.rename({label: p}) for c in shown} <= every for p in places)


def _place(pattern: Term, label: Label, term: Term) -> Expr | None:
    """What the label is in a term that may be the pattern's; the caller compares."""
    if pattern.op != term.op or len(pattern.args) != len(term.args):
        return None
    if pattern.op == "element":
        if pattern.ref.value != term.ref.value:
            return None
        for mine, theirs in zip(pattern.ref.coords, term.ref.coords, strict=True):
            if mine.terms == Expr.of(label).terms:
                return theirs + -mine.const
        return None
    found = (_place(a, label, b) for a, b in zip(pattern.args, term.args, strict=True))
    return next((p for p in found if p is not None), None)


def _excluded(known: Iterable[Term], condition: Term) -> bool:
    """Whether a condition fails where `known` ones hold: no key is seen, but this one is."""
    lonely = is_lonely(condition)
    return lonely is not None and shown_somewhere(*lonely, known)


def _any(condition: Term) -> tuple[Label, tuple[Term, ...]] | None:
    return (condition.label, parts_of(condition.args[0])) if condition.op == "any" else None


def _of_a_key(n: Normal, term: Term) -> Term | None:
    """[c] [no key has c] = 0, and [c] [a key has c] = [c]."""
    del n
    flags = [f for f in factors(term) if f.op == "flag"]
    conditions = [c for f in flags for c in parts_of(f.args[0])]
    if any(_excluded(conditions, c) for c in conditions):
        return ZERO
    told = [f for f in flags if _told(f.args[0], conditions)]
    left = tuple(f for f in term.args if f not in told)
    return None if not told else left[0] if len(left) == 1 else Term("mul", left)


def _kept(n: Normal, term: Term) -> Term | None:
    """[c] (a + [not c] b) = [c] a: what a flag takes away from a sum."""
    flags = [f for f in term.args if f.op == "flag"]
    sums = [f for f in term.args if f.op == "add"]
    if not flags or len(sums) != 1:
        return None
    left = [a for a in sums[0].args if not n.mul(*flags, a).is_number(0.0)]
    if len(left) == len(sums[0].args):
        return None
    return n.mul(*(f for f in term.args if f is not sums[0]), n.add(*left) if left else ZERO)


def _told(condition: Term, known: list[Term]) -> bool:
    some = _any(condition)
    return some is not None and shown_somewhere(*some, known)


def _joint(n: Normal, term: Term) -> Term | None:
    """C and no key has c: never; c and a key has c: c."""
    conditions = list(term.args)
    if any(_excluded(conditions, c) for c in conditions):
        return FALSE
    left = tuple(c for c in conditions if not _told(c, conditions))
    return None if len(left) == len(conditions) else n.make("and", left)


def _filled(n: Normal, term: Term) -> Term | None:
    """Where(a key has c, where(c, a, -inf), b) = where(c, a, where(no key has c, b, -inf))."""
    condition, then, other = term.args
    turned = condition.op == "all"
    some, scores, filling = (
        (n.negate(condition), other, then) if turned else (condition, then, other)
    )
    known = _any(some)
    if known is None or scores.op != "where" or not _low(scores.args[2]):
        return None
    if not shown_somewhere(*known, parts_of(scores.args[0])):
        return None
    low = number(-math.inf)
    return n.where(scores.args[0], scores.args[1], n.where(n.negate(some), filling, low))


def _low(term: Term) -> bool:
    return term.is_number() and term.value < LOW


def _apart(n: Normal, term: Term) -> Term | None:
    """Where(c, a, [no key has c] b) = [c] a + [no key has c] b."""
    condition, then, other = term.args
    flags = [f for f in factors(other) if f.op == "flag"]
    if not any(_excluded(parts_of(condition), c) for f in flags for c in parts_of(f.args[0])):
        return None
    return n.add(n.mul(n.flag(condition), then), other)


def _shifted(n: Normal, term: Term) -> Term | None:
    """Where(c, a, where(d, b, -inf)) + x: x is added to either."""
    for i, a in enumerate(term.args):
        if a.op == "where" and a.args[2].op == "where" and _low(a.args[2].args[2]):
            rest = term.args[:i] + term.args[i + 1 :]
            condition, then, other = a.args
            return n.where(condition, n.add(then, *rest), n.add(other, *rest))
    return None


_SEEN: Final = "any(t, ct)"
_NONE: Final = "all(t, not ct)"


ROWS: Final = (
    # weights of keys, in rows that have none
    row(
        *("key of an empty row", "mul", f"flag(ct) * flag({_NONE}) * a", "0", _of_a_key),
        *("flag(c) * flag(all(t, not ct))", "0"),
    ),
    row(
        *("flag of a sum", "mul", f"flag(ct) * (a + flag({_NONE}) * b)", "flag(ct) * a", _kept),
        *(f"flag(c) * (a + flag({_NONE}) * b)", "flag(c) * a"),
    ),
    row("key and empty row", "and", f"ct and {_NONE}", "false", _joint),
    # scores of rows without a key are made finite, so that the softmax is no NaN
    row(
        "empty row filled",
        "where",
        f"where({_SEEN}, where(ct, a, -inf), b)",
        f"where(ct, a, where({_NONE}, b, -inf))",
        _filled,
        f"where({_SEEN}, where(c, a, -inf), b)",
        f"where(c, a, where({_NONE}, b, -inf))",
    ),
    row(
        *("key or empty row", "where", f"where(ct, a, flag({_NONE}) * b)"),
        *(f"flag(ct) * a + flag({_NONE}) * b", _apart),
        *(f"where(c, a, flag({_NONE}) * b)", f"flag(c) * a + flag({_NONE}) * b"),
    ),
    row(
        *("shifted fill", "add", "where(c, a, where(d, b, -inf)) + p"),
        *("where(c, a + p, where(d, b + p, -inf))", _shifted),
    ),
)
