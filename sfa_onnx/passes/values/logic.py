"""Identities of conditions: flags, masks, and guards of rows that see no key."""

from __future__ import annotations

import math
from typing import Final

from sfa_onnx.passes.values.arithmetic import LOW, factors
from sfa_onnx.passes.values.exponential import is_positive, reaches_one
from sfa_onnx.passes.values.flags import COMPARE, truth
from sfa_onnx.passes.values.identity import Normal, row
from sfa_onnx.passes.values.terms import FALSE, ONE, TRUE, ZERO, Term, number

__all__ = ["ROWS", "seen"]

LINEAR: Final = 20.0  # above it log(1 + exp(x)) is x in float32
# -- conditions -----------------------------------------------------------------------------------


def _not(n: Normal, term: Term) -> Term | None:
    inner = term.args[0]
    if inner.op in ("true", "false"):
        return truth(inner.op == "false")
    if inner.op == "not":
        return inner.args[0]
    if inner.op in ("and", "or"):
        other = "or" if inner.op == "and" else "and"
        return n.make(other, tuple(map(n.negate, inner.args)))
    if inner.op in ("any", "all"):
        other = "all" if inner.op == "any" else "any"
        return n.make(other, (n.negate(inner.args[0]),), inner.data)
    return None


def _joined(n: Normal, term: Term) -> Term | None:
    absorbing, neutral = (FALSE, TRUE) if term.op == "and" else (TRUE, FALSE)
    inner = [b for a in term.args for b in (a.args if a.op == term.op else (a,))]
    kept = [a for a in dict.fromkeys(inner) if a != neutral]
    if absorbing in kept or any(n.negate(a) in kept for a in kept):
        return absorbing
    if not kept:
        return neutral
    args = tuple(sorted(kept, key=lambda t: t.order))
    if len(args) == 1:
        return args[0]
    return n.make(term.op, args) if args != term.args else None


def _known(n: Normal, term: Term) -> Term | None:
    """C or (not c and d) = c or d; c or (c and d) = c; and the same of and."""
    other, kept = "or" if term.op == "and" else "and", []
    for a in term.args:
        beside = [x for x in term.args if x is not a]
        parts = a.args if a.op == other else ()
        if any(p in beside for p in parts):
            continue
        left = tuple(p for p in parts if n.negate(p) not in beside)
        kept.append(n.make(other, left) if len(left) < len(parts) else a)
    return n.make(term.op, tuple(kept)) if tuple(kept) != term.args else None


def _compared(n: Normal, term: Term) -> Term | None:
    a, b = term.args
    if a.is_number() and b.is_number():
        return truth(COMPARE[term.op](a.value, b.value))
    if a == b and a.op == "index":
        return truth(term.op != "lt")
    if term.op == "eq" and a.is_number():
        return n.make("eq", (b, a))
    return None


def _hidden(n: Normal, term: Term) -> Term | None:
    """Where(c, a, -inf) == -inf, or below a low: exactly where c does not hold."""
    a, b = term.args
    if _masked(a) and b.is_number() and b.value < LOW:
        return n.negate(a.args[0])
    if term.op != "eq" and _masked(b) and a.is_number() and -math.inf < a.value < LOW:
        return b.args[0]
    if term.op == "eq" and b.is_number(math.inf) and a.op == "where" and _finite(a.args[1]):
        return FALSE if a.args[2].is_number() and a.args[2].value < math.inf else None
    return None


def _masked(term: Term) -> bool:
    return term.op == "where" and term.args[2].is_number(-math.inf) and _finite(term.args[1])


def _finite(term: Term) -> bool:
    """Whether a term is a finite number in a row that sees a key."""
    if term.is_number():
        return math.isfinite(term.value)
    if term.op in ("dot", "maximum", "sum", "exp", "flag"):
        return True
    if term.op == "log":
        return is_positive(term.args[0])
    if term.op in ("add", "mul", "pow", "max", "min"):
        return all(map(_finite, term.args))
    return False


def seen(term: Term) -> bool | None:
    """What a condition on scores says in every row that sees a key; None: that depends.

    Rows without keys are an edge: verification notes them, originals differ there by design.
    """
    if term.op in ("true", "false"):
        return term.op == "true"
    if term.op == "isnan":
        return False if _finite(term.args[0]) or _is_weight(term.args[0]) else None
    if term.op == "not":
        inner = seen(term.args[0])
        return None if inner is None else not inner
    if term.op in ("and", "or"):
        return _joint(term)
    if term.op in ("any", "all"):
        return None
    return _seen_compared(term) if term.op in COMPARE else None


def _joint(term: Term) -> bool | None:
    parts = [seen(a) for a in term.args]
    absorbing = term.op == "or"
    if absorbing in parts:
        return absorbing
    return None if None in parts else not absorbing


def _is_weight(term: Term) -> bool:
    """Whether it is built of exponentials, sums and rows: NaN only where the row sees no key."""
    inside = {t.op for t in term.walk()}
    return bool(inside & {"exp", "sum"}) and not inside & {"isnan", "lt", "le", "eq"}


def _seen_compared(term: Term) -> bool | None:
    a, b = term.args
    if a == b:
        return term.op != "lt"
    for low, (own, other) in enumerate((term.args, term.args[::-1])):
        if not other.is_number():
            continue
        limit = other.value
        if math.isinf(limit) or limit < LOW:
            if not _finite(own) and not _is_weight(own):
                return None
            if math.isinf(limit) or own.op in ("maximum", "max", "log") or _top(own):
                return term.op != "eq" and (limit > 0) != bool(low)
        if 0 <= limit < 1 and reaches_one(own):  # exponentials of others may vanish in a row
            return term.op != "eq" and bool(low)
    return None


def _top(term: Term) -> bool:
    return term.op == "add" and any(
        f.op in ("maximum", "max", "log") for a in term.args for f in factors(a)
    )


# -- choices --------------------------------------------------------------------------------------


def _of_conditions(n: Normal, term: Term) -> Term | None:
    """Where(c, d, false) = c and d; where(c, true, d) = c or d, and so on."""
    condition, then, other = term.args
    opposite = n.negate(condition)
    if other in (TRUE, FALSE):
        return n.make("or", (opposite, then)) if other == TRUE else n.make("and", (condition, then))
    if then in (TRUE, FALSE):
        return (
            n.make("or", (condition, other)) if then == TRUE else n.make("and", (opposite, other))
        )
    return None


def _chosen(n: Normal, term: Term) -> Term | None:
    condition, then, other = term.args
    if condition.op in ("true", "false"):
        return then if condition.op == "true" else other
    if then == other:
        return then
    fills = then.is_number() - other.is_number()  # a number comes last
    turned = fills > 0 or (not fills and condition.op == "not")
    if then.is_number() and other.is_number():
        turned = then.value < other.value  # the lower one last: it hides
    return n.where(n.negate(condition), other, then) if turned else None


def _guard(n: Normal, term: Term) -> Term | None:
    """A guard of rows without keys: what it gives in all the others."""
    value = seen(term.args[0])
    if value is None:
        return None
    kept, other = term.args[1:] if value else term.args[:0:-1]
    if other.is_number(0.0) or not _is_share(kept):
        return kept
    return kept if _never(n.negate(term.args[0]) if value else term.args[0]) else None


def _never(condition: Term) -> bool:
    """Whether a condition fails in rows without keys too: no share is infinite, NaN equals none."""
    if condition.op in ("and", "or"):
        parts = map(_never, condition.args)
        return any(parts) if condition.op == "and" else all(parts)
    own, other = condition.args if condition.op == "eq" else (condition, condition)
    infinite = other.is_number() and math.isinf(other.value)
    return infinite and _is_share(own) and _is_weight(own)


def _is_share(term: Term) -> bool:
    """Whether a term is divided by a sum: rows without keys must have none of it, as they do."""
    return any(t.op == "pow" and t.exponent < 0 for t in term.walk())


def _softplus(n: Normal, term: Term) -> Term | None:
    """Where(20 < x, x, log(1 + exp(x))) = log(1 + exp(x)), but for less than a rounding."""
    condition, then, other = term.args
    for own, smooth, holds in ((then, other, True), (other, then, False)):
        ends = condition.args if condition.op in ("lt", "le") else ()
        if not ends or n.log(n.add(ONE, n.exp(own))) != smooth:
            continue
        limit, tested = ends if holds else ends[::-1]
        if tested == own and limit.is_number() and limit.value >= LINEAR:
            return smooth
    return None


def _scrubbed(n: Normal, term: Term) -> Term | None:
    """Where(isnan(x), y, x) = x: weights are numbers in a row that sees a key."""
    del n
    condition, then, other = term.args
    if condition.op == "not":
        condition, then, other = condition.args[0], other, then
    if condition.op != "isnan" or condition.args[0] != other:
        return None
    return other if then.is_number(0.0) or not _is_share(other) else None


def _flagged(n: Normal, term: Term) -> Term | None:
    """Where(c, a, 0) = [c] a."""
    if not term.args[2].is_number(0.0):
        return None
    return n.mul(n.flag(term.args[0]), term.args[1])


def _low(n: Normal, term: Term) -> Term | None:
    """Where(c, a, low) = where(c, a, -inf): the exponential of either is nothing."""
    condition, then, other = term.args
    if not other.is_number() or not -math.inf < other.value < LOW:
        return None
    scores = any(t.op == "dot" for t in then.walk())
    return n.where(condition, then, number(-math.inf)) if scores else None


def _nested(n: Normal, term: Term) -> Term | None:
    """Where(c, where(d, a, b), b) = where(c and d, a, b)."""
    condition, then, other = term.args
    if then.op == "where" and then.args[2] == other:
        return n.where(n.make("and", (condition, then.args[0])), then.args[1], other)
    return None


def _either(n: Normal, term: Term) -> Term | None:
    """Where(c, a, where(d, a, b)) = where(c or d, a, b)."""
    condition, then, other = term.args
    if other.op == "where" and other.args[1] == then:
        return n.where(n.make("or", (condition, other.args[0])), then, other.args[2])
    return None


def _flag(n: Normal, term: Term) -> Term | None:
    condition = term.args[0]
    if condition.op in ("true", "false"):
        return ONE if condition.op == "true" else ZERO
    if condition.op == "and":
        return n.mul(*(n.flag(c) for c in condition.args))
    known = seen(condition)
    return None if known is None else ONE if known else ZERO


ROWS: Final = (
    row("not", "not", "not (c and d)", "(not c) or (not d)", _not),
    row("and, or", "and or", "c and c and true", "c", _joined),
    row("known beside", "and or", "c or ((not c) and d)", "c or d", _known),
    row("numbers compared", "eq lt le", "2 < 3", "true", _compared),
    # scores are tested where the mask hid them
    row(
        *("hidden score", "eq lt le", "where(c, dot, -inf) == -inf", "not c", _hidden),
        *("where(c, dot, 2) == 2", "c"),
    ),
    # choices among conditions are conditions
    row("choice of conditions", "where", "where(c, d, false)", "c and d", _of_conditions),
    row("choice", "where", "where(not c, a, b)", "where(c, b, a)", _chosen),
    # nan_to_num, x != x
    row("NaN scrubbed", "where", "where(isnan(a), b, a)", "a", _scrubbed),
    # softplus, as torch computes it
    row(
        *("softplus", "where", "where(20 < 40 * p, 40 * p, log(1 + exp(40 * p)))"),
        *("log(1 + exp(40 * p))", _softplus),
        *("where(0.1 < p, p, log(1 + exp(p)))", "log(1 + exp(p))"),
    ),
    # max == -inf, sum == 0, log-sum-exp == -inf: rows that see no key
    row(
        *("empty row", "where", "where(sum(t, exp(s - maximum(t, s))) == 0, a, b)", "b", _guard),
        *("where(sum(t, v) == 0, a, b)", "a"),
    ),
    row("low", "where", "where(c, dot, -1e30) <= -1e20", "not c", _low),
    row("mask twice", "where", "where(c, where(d, a, b), b)", "where(c and d, a, b)", _nested),
    row(
        *("either mask", "where", "where(c, a, where(d, a, b))", "where(c or d, a, b)", _either),
    ),
    # a choice between a value and nothing
    row("choice of 0", "where", "where(c, a, 0)", "flag(c) * a", _flagged),
    row("flag", "flag", "flag(c and d)", "flag(c) * flag(d)", _flag),
)
