"""Identities of a selection's scores: max(0, x), however it is written, and blocks of keys.

Those of the former hold for every finite x. An infinite x may give NaN in one spelling and 0 in
another (inf * 0, inf - inf): verification runs such scores and notes where they differ.
"""

from __future__ import annotations

import math
from typing import Final

from sfa_onnx.passes.values.arithmetic import addends, coefficient, factors
from sfa_onnx.passes.values.identity import Normal, row
from sfa_onnx.passes.values.terms import ZERO, Term, number

__all__ = ["ROWS"]


def _above_zero(condition: Term) -> Term | None:
    """X where a condition is x > 0 or x >= 0, however it is turned; None: it is something else."""
    turned = condition.op == "not"
    inner = condition.args[0] if turned else condition
    if inner.op not in ("lt", "le"):
        return None
    low, high = inner.args
    if low.is_number(0.0):
        return high if not turned else Term("mul", (number(-1), high))
    if high.is_number(0.0):
        return low if turned else Term("mul", (number(-1), low))
    return None


def _scaled(term: Term) -> tuple[float, Term]:
    """(number, rest) of a product whose own factors may be numbers times products."""
    total, rest = 1.0, term
    while True:
        by, inner = coefficient(rest)
        if inner == rest:
            return total, rest
        total, rest = total * by, inner


def _ratio(n: Normal, a: Term, b: Term) -> float:
    """C where b = c a for a number c; 0: there is none."""
    firsts = [_scaled(addends(x)[0]) for x in (a, b)]
    if not firsts[0][0] or firsts[0][1] != firsts[1][1]:
        return 0.0
    by = firsts[1][0] / firsts[0][0]
    same = n.add(b, n.mul(number(-by), a)) if a.op == "add" else ZERO
    return by if same.is_number(0.0) else 0.0


def _switched_on(n: Normal, term: Term) -> Term | None:
    """[x > 0] x = max(0, x); [x < 0] x = -max(0, -x)."""
    for flag in term.args:
        tested = _above_zero(flag.args[0]) if flag.op == "flag" else None
        if tested is None:
            continue
        sign, own = _scaled(tested)
        wanted = () if own.is_number() else factors(own)
        rest = [f for f in term.args if f is not flag]
        if own.op == "add":
            wanted = tuple(f for f in rest if f.op == "add" and _ratio(n, own, f))[:1]
        if not wanted or not all(f in rest for f in wanted):
            continue
        by = math.copysign(1.0, sign * (_ratio(n, own, wanted[0]) if own.op == "add" else 1.0))
        inner = n.mul(*wanted) if len(wanted) > 1 else wanted[0]
        kept = [f for f in rest if f not in wanted]
        return n.mul(*kept, number(by), n.make("max", (ZERO, n.mul(number(by), inner))))
    return None


def _least(n: Normal, term: Term) -> Term | None:
    """Min(0, x) = -max(0, -x)."""
    rest = [a for a in term.args if not a.is_number(0.0)]
    if len(rest) != 1 or len(term.args) != 2:
        return None
    return n.mul(number(-1), n.make("max", (ZERO, n.mul(number(-1), rest[0]))))


def _added(n: Normal, term: Term) -> Term | None:
    """X + max(y, -x) = max(x + y, 0): half the sum of a number and its size, and the like."""
    for a in term.args:
        by, own = coefficient(a)
        if own.op not in ("max", "min") or len(own.args) != 2:
            continue
        rest = [b for b in term.args if b is not a]
        sides = [n.add(*rest, n.mul(number(by), x)) for x in own.args]
        if any(s.is_number(0.0) for s in sides) and not all(s.is_number() for s in sides):
            largest = (own.op == "max") == (by > 0)
            return n.make("max" if largest else "min", tuple(sorted(sides, key=_numbers_first)))
    return None


def _size(n: Normal, term: Term) -> Term | None:
    """|x| = max(x, -x)."""
    own = term.args[0]
    return n.make("max", (own, n.mul(number(-1), own)))


def _pieces(n: Normal, term: Term) -> Term | None:
    """Parts that are put together of parts: each number of the label once."""
    label, ranges = term.ranges
    found: list[tuple[int, int, Term]] = []
    for (low, high), inner in zip(ranges, term.args, strict=True):
        if inner.op != "pieces" or inner.ranges[0] != label:
            found.append((low, high, inner))
            continue
        cut = zip(inner.ranges[1], inner.args, strict=True)
        found += [(max(a, low), min(b, high), x) for (a, b), x in cut if a < high and low < b]
    if len(found) == len(term.args) and all(
        a[2] == b for a, b in zip(found, term.args, strict=True)
    ):
        return None
    return n.make(
        "pieces", tuple(x for *_, x in found), (label, tuple((a, b) for a, b, _ in found))
    )


def _numbers_first(term: Term) -> bool:
    return not term.is_number()


ROWS: Final = (
    # blocks of keys that are written into a buffer, one after the other
    row("pieces of pieces", "pieces", "pieces(pieces(x, y), v)", "pieces(x, v)", _pieces),
    # what is above 0 is switched on
    row(
        *("switched on", "mul", "flag(0 < 2 * a) * a * b", "max(0, a) * b", _switched_on),
        *("flag(0.5 < a) * a * b", "max(0, a) * b"),
    ),
    # clamped from above, turned round twice
    row("least of 0", "min", "min(0, a)", "-1 * max(0, -1 * a)", _least, "min(1, a)",
        "-1 * max(0, -1 * a)"),
    row("size", "abs", "abs(a)", "max(a, -1 * a)", _size),
    # (x + |x|) / 2
    row(
        *("sum with a size", "add", "a + max(a, -1 * a)", "max(0, 2 * a)", _added),
        *("a + max(b, -1 * b)", "max(0, 2 * a)"),
    ),
)  # fmt: skip
