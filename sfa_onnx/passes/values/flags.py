"""Identities of flags as numbers: sums, minima and choices of them, compared and counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

from sfa_onnx.passes.values.arithmetic import addends, coefficient, factors
from sfa_onnx.passes.values.identity import Normal, row
from sfa_onnx.passes.values.terms import FALSE, ONE, TRUE, Term

__all__ = ["COMPARE", "ROWS", "truth"]

COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    "eq": lambda a, b: a == b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}
_MANY: Final = 6  # flags whose truth table is looked at


def truth(value: bool) -> Term:
    """A condition that is settled."""
    return TRUE if value else FALSE


def _flag_compared(n: Normal, term: Term) -> Term | None:
    """A sum of flags, compared with a number: all of them, any of them, none, or settled."""
    for i, (own, other) in enumerate((term.args, term.args[::-1])):
        parts = [_flags_of(a) for a in addends(own)]
        conditions = [c for _, cs in filter(None, parts) for c in [_and(n, cs)] if cs]
        if not other.is_number() or None in parts or not 0 < len(conditions) <= _MANY:
            continue
        of, rest = COMPARE[term.op], sum(by for by, cs in filter(None, parts) if not cs)
        weights = [by for by, cs in filter(None, parts) if cs]
        said = []
        for chosen in itertools.product((False, True), repeat=len(weights)):
            total = rest + sum(by for by, is_set in zip(weights, chosen, strict=True) if is_set)
            said.append(of(other.value, total) if i else of(total, other.value))
        return _by_truth(n, conditions, said)
    return None


def _flags_of(term: Term) -> tuple[float, tuple[Term, ...]] | None:
    """(number, conditions) of number * flag * flag ..; None: it is something else."""
    by, rest = (term.value, ONE) if term.is_number() else coefficient(term)
    if rest == ONE:
        return by, ()
    own = factors(rest)
    return (by, tuple(f.args[0] for f in own)) if all(f.op == "flag" for f in own) else None


def _and(n: Normal, conditions: tuple[Term, ...]) -> Term:
    return n.make("and", conditions)


def _by_truth(n: Normal, conditions: list[Term], said: list[bool]) -> Term | None:
    """The condition that `said` is the truth table of, from none of them to all."""
    none, every = said[0], said[-1]
    if all(x == none for x in said):
        return truth(none)
    joined = None
    if all(x == none for x in said[:-1]):
        joined = _and(n, tuple(conditions))
    elif all(x == every for x in said[1:]):
        joined = n.make("or", tuple(conditions))
    return joined if joined is None or every else n.negate(joined)


def _choice_compared(n: Normal, term: Term) -> Term | None:
    """Where(c, x, y) compared with z, all of them numbers."""
    for i, (own, other) in enumerate((term.args, term.args[::-1])):
        known = own.op == "where" and all(a.is_number() for a in own.args[1:])
        if known and other.is_number():
            of = COMPARE[term.op]
            then, rest = (
                of(other.value, a.value) if i else of(a.value, other.value) for a in own.args[1:]
            )
            if then == rest:
                return truth(then)
            return own.args[0] if then else n.negate(own.args[0])
    return None


def _flags_bounded(n: Normal, term: Term) -> Term | None:
    """The least of flags is set where all are, the largest where any is; 1 is set, 0 is not."""
    parts = [_flags_of(a) for a in term.args]
    if not all(part and (part[0] == 1 or part == (0, ())) for part in parts):
        return None
    own = tuple(_and(n, cs) if by else FALSE for by, cs in filter(None, parts))
    return n.flag(n.make("and" if term.op == "min" else "or", own))


def _flag_chosen(n: Normal, term: Term) -> Term | None:
    """Where(c, [d], [e]) = [c and d or not c and e]; 1 is set, 0 is not."""
    condition, *own = term.args
    parts = [_flags_of(a) for a in own]
    if all(a.is_number() for a in own):
        return None
    if not all(part and (part[0] == 1 or part == (0, ())) for part in parts):
        return None
    then, other = (_and(n, cs) if by else FALSE for by, cs in filter(None, parts))
    first, second = n.make("and", (condition, then)), n.make("and", (n.negate(condition), other))
    return n.flag(n.make("or", (first, second)))


def _counted(n: Normal, term: Term) -> Term | None:
    """A count of flags, compared with 0 (or with 1): whether there is any."""
    for i, (own, other) in enumerate((term.args, term.args[::-1])):
        if own.op == "sum" and own.args[0].op == "flag" and other.is_number():
            of = COMPARE[term.op]
            none, one, two = (
                of(x, other.value) if not i else of(other.value, x) for x in (0.0, 1.0, 2.0)
            )
            if none != one and one == two:
                found = n.make("any", own.args[0].args, own.data)
                return found if one else n.negate(found)
    return None


ROWS: Final = (
    # flags that are added and compared: all of them, any of them
    row(
        *("flags compared", "eq lt le", "2 == flag(c) + flag(d)", "c and d", _flag_compared),
        *("1 == flag(c) + flag(d)", "c and d"),
    ),
    # a float mask is asked where it hides
    row("choice compared", "eq lt le", "where(c, 0, -5) < -1", "not c", _choice_compared),
    # min and max as and and or
    row("flags bounded", "min max", "min(flag(c), flag(d))", "flag(c and d)", _flags_bounded),
    # flags that are written over each other
    row(
        *("choice of flags", "where", "where(c, 1, flag(d)) * a"),
        *("flag(c or d) * a", _flag_chosen),
    ),
    # flags that are counted, cast and compared again
    row(
        *("count compared", "eq lt le", "0 < sum(t, flag(ct))", "any(t, ct)", _counted),
        *("1 < sum(t, flag(ct))", "any(t, ct)"),
    ),
)
