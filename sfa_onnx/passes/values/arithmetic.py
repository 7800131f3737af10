"""Identities of sums, products and powers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

from sfa_onnx.passes.values.identity import Normal, row
from sfa_onnx.passes.values.terms import ONE, ZERO, Term, number

__all__ = ["LOW", "ROWS", "addends", "all_flags", "coefficient", "factors", "over_pieces"]

LOW: Final = -9e3  # a score this far below the others has weight 0 in every float type in use
_NEAR: Final = 1e-6  # roundings of log2(e), ln(2) and factors that are split


def factors(term: Term) -> tuple[Term, ...]:
    """What a product multiplies; the term itself where it is none."""
    return term.args if term.op == "mul" else (term,)


def addends(term: Term) -> tuple[Term, ...]:
    """What a sum adds; the term itself where it is none."""
    return term.args if term.op == "add" else (term,)


def coefficient(term: Term) -> tuple[float, Term]:
    """(number, rest) of number * rest."""
    own = factors(term)
    if own[0].is_number() and len(own) > 1:
        rest = own[1] if len(own) == 2 else Term("mul", own[1:])
        return own[0].value, rest
    return 1.0, term


def all_flags(n: Normal, term: Term) -> Term | None:
    """The condition of a flag, or of a product of flags; None: it is neither."""
    own = factors(term)
    if any(f.op != "flag" for f in own):
        return None
    return own[0].args[0] if len(own) == 1 else n.make("and", tuple(f.args[0] for f in own))


def _of(n: Normal, op: str, args: Iterable[Term]) -> Term:
    """A sum or product; one argument is itself."""
    own = tuple(args)
    if not own:
        return ZERO if op == "add" else ONE
    return own[0] if len(own) == 1 else n.make(op, own)


def _flat(n: Normal, term: Term) -> Term | None:
    if not any(a.op == term.op for a in term.args):
        return None
    inner = [b for a in term.args for b in (a.args if a.op == term.op else (a,))]
    return n.make(term.op, tuple(inner))


def _numbers(n: Normal, term: Term) -> Term | None:
    known = [a.value for a in term.args if a.is_number()]
    rest = [a for a in term.args if not a.is_number()]
    total, neutral = (sum(known), 0.0) if term.op == "add" else (math.prod(known), 1.0)
    if math.isnan(total):
        return None
    kept = [number(total)] if total != neutral or not rest else []
    args = tuple(kept + sorted(rest, key=lambda t: t.order))
    return None if args == term.args and len(args) > 1 else _of(n, term.op, args)


def _absorbed(n: Normal, term: Term) -> Term | None:
    del n
    low = any(a.is_number(-math.inf) for a in term.args)
    high = any(a.is_number(math.inf) for a in term.args)
    return number(-math.inf) if low and not high and len(term.args) > 1 else None


def _nothing(n: Normal, term: Term) -> Term | None:
    del n
    infinite = any(a.is_number() and math.isinf(a.value) for a in term.args)
    none = any(a.is_number(0.0) for a in term.args) and len(term.args) > 1
    return ZERO if none and not infinite else None


def _like(n: Normal, term: Term) -> Term | None:
    found: dict[Term, list[float]] = {}
    for by, rest in map(coefficient, term.args):
        found.setdefault(rest, []).append(by)
    if len(found) == len(term.args):
        return None
    left = {rest: sum(by) for rest, by in found.items()}
    kept = [r for r, by in found.items() if abs(left[r]) > _NEAR * max(map(abs, by))]
    return _of(n, "add", (n.mul(number(left[r]), r) for r in kept))


def _masked(n: Normal, term: Term) -> Term | None:
    for i, a in enumerate(term.args):
        if a.op == "where" and a.args[2].is_number() and a.args[2].value < LOW:
            rest = term.args[:i] + term.args[i + 1 :]
            return n.where(a.args[0], n.add(a.args[1], *rest), number(-math.inf))
    return None


def _opposite(n: Normal, term: Term) -> Term | None:
    """A - a[c] = a[not c]."""
    if len(term.args) != 2 or not term.args[0].is_number():
        return None
    by, rest = coefficient(term.args[1])
    shown = all_flags(n, rest)
    if shown is None or by != -term.args[0].value:
        return None
    return n.mul(term.args[0], n.flag(n.negate(shown)))


def _switched(n: Normal, term: Term) -> Term | None:
    """[c] x + low [not c] = where(c, x, -inf)."""
    if len(term.args) != 2:
        return None
    for low, kept in (term.args, term.args[::-1]):
        by, rest = coefficient(low)
        if rest.op == "flag" and by < LOW:
            flag = n.flag(n.negate(rest.args[0]))
            own = factors(kept)
            if flag in own:
                left = n.mul(*(f for f in own if f != flag))
                return n.where(flag.args[0], left, number(-math.inf))
    return None


def _common(n: Normal, term: Term) -> Term | None:
    """A c + b c = c (a + b); of powers the lowest, so that sums of quotients have one divisor."""
    parts = [_powers(a) for a in term.args]
    exponents = [_exponents(a) for a in term.args]
    outer: list[Term] = []
    inverse: list[Term] = []
    for base in dict.fromkeys(b for p in parts for b in p):
        least = min(p.get(base, 0) for p in parts)
        if least < 0 or (least > 0 and not base.is_number()):
            outer.append(n.power(base, least))
            inverse.append(n.power(base, -least))
    shared = []
    for atom, by in exponents[0].items():
        if all(abs(e.get(atom, 0.0) - by) <= _NEAR * abs(by) for e in exponents[1:]):
            shared.append(n.mul(number(by), atom))
    if shared:
        outer.append(n.exp(n.add(*shared)))
        inverse.append(n.exp(n.mul(number(-1), n.add(*shared))))
    if not outer:
        return None
    inner = n.add(*(n.mul(a, *inverse) for a in term.args))
    return n.mul(*outer, inner)


def _expanded(n: Normal, term: Term) -> Term | None:
    """(a + b) c - b c + d = a c + d: a product of a sum meets what takes a part of it away."""
    if not any(f.op == "add" for a in term.args if a.op == "mul" for f in a.args):
        return None
    parts: list[Term] = []
    for a in term.args:
        sums = [f for f in factors(a) if f.op == "add"]
        rest = [f for f in factors(a) if f.op != "add"]
        parts += [n.mul(*rest, b) for b in sums[0].args] if len(sums) == 1 else [a]
    left: dict[Term, float] = {}
    most: dict[Term, float] = {}
    for by, own in map(coefficient, parts):
        left[own] = left.get(own, 0.0) + by
        most[own] = max(most.get(own, 0.0), abs(by))
    gone = any(abs(by) <= _NEAR * most[own] for own, by in left.items())
    return n.add(*parts) if gone and len(parts) > len(term.args) else None


def _powers(term: Term) -> dict[Term, int]:
    """Base -> exponent, of every factor that is no exponential and no number."""
    found: dict[Term, int] = {}
    for f in factors(term):
        base, by = (f.args[0], f.exponent) if f.op == "pow" else (f, 1)
        if base.op not in ("exp", "number"):
            found[base] = found.get(base, 0) + by
    return found


def _exponents(term: Term) -> dict[Term, float]:
    """Addend -> coefficient, of what the exponential among the factors is of."""
    own = next((f.args[0] for f in factors(term) if f.op == "exp"), ZERO)
    return {rest: by for by, rest in map(coefficient, addends(own)) if not rest.is_number()}


def _collected(n: Normal, term: Term) -> Term | None:
    """x^a x^b = x^(a + b)."""
    found: dict[Term, int] = {}
    for f in term.args:
        base, by = (f.args[0], f.exponent) if f.op == "pow" else (f, 1)
        found[base] = found.get(base, 0) + by
    if len(found) == len(term.args):
        return None
    return _of(n, "mul", [n.power(base, by) for base, by in found.items() if by])


def _exponentials(n: Normal, term: Term) -> Term | None:
    exps = [f for f in term.args if f.op == "exp"]
    if len(exps) < 2:
        return None
    rest = [f for f in term.args if f.op != "exp"]
    return _of(n, "mul", [*rest, n.exp(n.add(*(e.args[0] for e in exps)))])


def _contrary(n: Normal, term: Term) -> Term | None:
    """[c] [not c] = 0."""
    flags = {f.args[0] for f in term.args if f.op == "flag"}
    return ZERO if any(n.negate(c) in flags for c in flags) else None


def _distributed(n: Normal, term: Term) -> Term | None:
    """A number times a sum, or times what a condition chooses."""
    if len(term.args) != 2 or not term.args[0].is_number():
        return None
    by, inner = term.args
    if inner.op == "add":
        return n.add(*(n.mul(by, a) for a in inner.args))
    if inner.op == "where" and not by.is_number(0.0):
        return n.where(inner.args[0], *(n.mul(by, a) for a in inner.args[1:]))
    return None


def over_pieces(n: Normal, term: Term) -> Term | None:
    """f(pieces(a, b), c) = pieces(f(a, c), f(b, c))."""
    first = next((a for a in term.args if a.op == "pieces"), None)
    if first is None:
        return None

    def part(i: int) -> Term:
        own = (a.args[i] if a.op == "pieces" and a.data == first.data else a for a in term.args)
        return n.make(term.op, tuple(own), term.data)

    if any(a.op == "pieces" and a.data != first.data for a in term.args):
        return None
    return n.make("pieces", tuple(part(i) for i in range(len(first.args))), first.data)


def _power(n: Normal, term: Term) -> Term | None:
    base, by = term.args[0], term.exponent
    if by == 1 or (base.op == "flag" and by > 0):
        return base
    if by == 0 or base.is_number(1.0):
        return ONE
    if base.is_number() and base.value:
        return number(base.value**by)
    if base.op == "pow":
        return n.power(base.args[0], base.exponent * by)
    if base.op == "exp":
        return n.exp(n.mul(number(by), base.args[0]))
    return n.mul(*(n.power(f, by) for f in base.args)) if base.op == "mul" else None


def _pieces(n: Normal, term: Term) -> Term | None:
    del n
    same = len(set(term.args)) == 1
    return term.args[0] if same and term.ranges[0] not in term.args[0].labels else None


_Rule = Callable[[Normal, Term], Term | None]
_EVERYWHERE: Final = (
    *("add", "mul", "pow", "exp", "log", "max", "min", "where", "flag", "not"),
    *("and", "or", "eq", "lt", "le", "isnan"),
)


ROWS: Final = (
    # what is computed from parts of a Concat is a Concat of what is computed from each
    row("pieces", _EVERYWHERE, "exp(pieces(x, y))", "pieces(exp(x), exp(y))", over_pieces),
    # parts that are all alike are no parts
    row("one piece", ("pieces",), "pieces(a, a)", "a", _pieces, "pieces(x, y)", "x"),
    # sums of sums and products of products have no order
    row("nested", ("add", "mul"), "(a + b) + c0", "a + (b + c0)", _flat),
    # an exponential of -inf is 0, whatever else is added to it (a number)
    row("-inf absorbs", ("add",), "-inf + a", "-inf", _absorbed, "-inf + inf", "inf"),
    # 0 x = 0: weights of hidden keys, accumulators before the first chunk
    row("0 absorbs", ("mul",), "0 * a", "0", _nothing, "0 * inf", "0"),
    # numbers are combined; 0 is no addend and 1 no factor
    row("numbers", ("add", "mul"), "2 * a * 3", "6 * a", _numbers),
    # what was added is taken away again: shifts and their inverse
    row("like terms", ("add",), "2 * a + b - 2 * a", "b", _like),
    # a mask in front of a shift or a second mask
    row("masked sum", ("add",), "where(c, a, -inf) + b", "where(c, a + b, -inf)", _masked),
    # 1 - mask
    row("opposite flag", ("add",), "2 - 2 * flag(c)", "2 * flag(not c)", _opposite),
    # x * visible + low * (not visible), as some exporters spell where
    row(
        *("switch", ("add",), "exp(flag(c) * a - 1e30 * flag(not c))", "flag(c) * exp(a)"),
        *(_switched, "exp(flag(c) * a - 2 * flag(not c))", "flag(c) * exp(a)"),
    ),
    # quotients are brought to one divisor, and shifts in front of the sum
    row("common factor", ("add",), "a * b + c0 * b", "b * (a + c0)", _common),
    # weights of partial softmaxes that are interpolated
    row(
        *("multiplied out", ("add",), "(a + b) * p + a * c0 - b * p", "a * (p + c0)", _expanded),
        *("(a + b) * p + a * c0 - 2 * b * p", "a * (p + c0)"),
    ),
    # a power once
    row("powers", ("mul",), "a * a * b", "a ** 2 * b", _collected),
    # e^a e^b = e^(a + b): a shift meets the next one
    row("exponentials", ("mul",), "exp(a) * exp(b)", "exp(a + b)", _exponentials),
    # a key is not visible and hidden
    row("contrary flags", ("mul",), "flag(c) * flag(not c)", "0", _contrary),
    # factors meet scores
    row("distribute", ("mul",), "2 * (a + b)", "2 * a + 2 * b", _distributed),
    # (a b^2)^-1 = a^-1 b^-2; flags are their own powers
    row("power", ("pow",), "(a * b ** 2) ** -1", "a ** -1 * b ** -2", _power),
)
