"""Which element of a leaf tensor an element of a view is: index expressions over named axes.

Tracing one contraction operand back through Reshape, Transpose, Slice, Gather ... turns its
coordinates (labels such as s, n, t) into coordinates of the tensors it was made from. An expression
is a constant plus integer multiples of atoms: a label, an index read from a tensor, or the quotient
or remainder of an expression. Splitting and merging views cancel out by algebra, so every spelling
of one view ends in the same expression.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property

__all__ = [
    "ZERO",
    "Atom",
    "Expr",
    "Label",
    "Quot",
    "Read",
    "Rem",
    "fresh",
    "label_of",
    "merge",
    "split",
]


@dataclass(frozen=True)
class Label:
    """An axis of the attention: a name (unique within a site) and its concrete size."""

    name: str
    size: int


@dataclass(frozen=True)
class Read:
    """An index read from integer tensor `value` at `coords`."""

    value: str
    coords: tuple[Expr, ...]


@dataclass(frozen=True)
class Quot:
    """`expr` // `by`."""

    expr: Expr
    by: int


@dataclass(frozen=True)
class Rem:
    """`expr` % `by`."""

    expr: Expr
    by: int


Atom = Label | Read | Quot | Rem


@dataclass(frozen=True)
class Expr:
    """`const` + the sum of coefficient * atom; build with the methods, which keep it canonical."""

    const: int = 0
    terms: tuple[tuple[Atom, int], ...] = field(default=())

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.const, self.terms))

    @staticmethod
    def of(atom: Atom) -> Expr:
        """The expression that is one atom; a label of size 1 is always 0."""
        return ZERO if isinstance(atom, Label) and atom.size == 1 else Expr(0, ((atom, 1),))

    def __add__(self, other: Expr | int) -> Expr:
        if isinstance(other, int):
            return Expr(self.const + other, self.terms)
        if not self.terms or not other.terms:
            return Expr(self.const + other.const, self.terms or other.terms)
        merged = dict(self.terms)
        for atom, coefficient in other.terms:
            merged[atom] = merged.get(atom, 0) + coefficient
        return _canonical(self.const + other.const, merged)

    def __mul__(self, factor: int) -> Expr:
        if factor == 0:
            return ZERO
        return Expr(self.const * factor, tuple((a, c * factor) for a, c in self.terms))

    def __sub__(self, other: Expr) -> Expr:
        return self + other * -1

    @cached_property
    def bounds(self) -> tuple[int, int] | None:
        """Smallest and largest value; None when an index read makes it unknown."""
        low = high = self.const
        for atom, coefficient in self.terms:
            own = _atom_bounds(atom)
            if own is None:
                return None
            a, b = own[0] * coefficient, own[1] * coefficient
            low, high = low + min(a, b), high + max(a, b)
        return low, high

    @cached_property
    def labels(self) -> frozenset[Label]:
        """Every label this depends on, those inside index reads included."""
        found: set[Label] = set()
        for atom, _ in self.terms:
            if isinstance(atom, Label):
                found.add(atom)
            elif isinstance(atom, Read):
                found.update(*(c.labels for c in atom.coords))
            else:
                found.update(atom.expr.labels)
        return frozenset(found)

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """Every index read this depends on."""
        found: list[Read] = []
        for atom, _ in self.terms:
            if isinstance(atom, Read):
                found.append(atom)
            elif isinstance(atom, Quot | Rem):
                found.extend(atom.expr.reads)
        return tuple(found)

    def floordiv(self, by: int) -> Expr:
        """This // `by`."""
        rest = self._rest(by)
        whole = {a: c // by for a, c in self.terms if c % by == 0}
        quotient = _canonical(self.const // by, whole)
        if self._stays(rest, by):
            return quotient
        if (parts := _nested(rest, by)) is not None:
            high, _, step = parts
            return quotient + high.floordiv(by // step)
        return quotient + _quotient(rest, by)

    def mod(self, by: int) -> Expr:
        """This % `by`."""
        rest = self._rest(by)
        if self._stays(rest, by):
            return rest
        if (parts := _nested(rest, by)) is not None:
            high, low, step = parts
            return high.mod(by // step) * step + low
        return _remainder(rest, by)

    def _rest(self, by: int) -> Expr:
        return Expr(self.const % by, tuple((a, c) for a, c in self.terms if c % by))

    def _stays(self, rest: Expr, by: int) -> bool:
        """Whether `rest` is known to lie in [0, by)."""
        bounds = rest.bounds
        if bounds is not None:
            return bounds[0] >= 0 and bounds[1] < by
        # `b * size + index`: an index that is in range for its own axis, of this very size, stays
        # inside it; so does the page of an index.
        above = any(c == by for _, c in self.terms)
        return above and rest.const == 0 and _is_read(rest)

    def substitute(self, swap: dict[Label, Expr]) -> Expr:
        """This with labels replaced, also inside reads, quotients and remainders."""
        if not self.labels & swap.keys():
            return self
        total = Expr(self.const)
        for atom, coefficient in self.terms:
            total = total + _substitute(atom, swap) * coefficient
        return total

    def __str__(self) -> str:
        parts = [_show(a) if c == 1 else f"{c}*{_show(a)}" for a, c in self.terms]
        if self.const or not parts:
            parts.append(str(self.const))
        return " + ".join(parts)


ZERO = Expr()


def _show(atom: Atom) -> str:
    match atom:
        case Label(name=name):
            return name
        case Read(value=value, coords=coords):
            return f"{value}[{', '.join(map(str, coords))}]"
        case Quot(expr=expr, by=by):
            return f"({expr})//{by}"
        case Rem(expr=expr, by=by):
            return f"({expr})%{by}"


def _is_read(expr: Expr) -> bool:
    atom = _only_atom(expr)
    return isinstance(atom, Read) or (isinstance(atom, Quot) and _is_read(atom.expr))


def _atom_bounds(atom: Atom) -> tuple[int, int] | None:
    match atom:
        case Label(size=size):
            return 0, size - 1
        case Rem(by=by):
            own = atom.expr.bounds
            return (0, by - 1) if own is None else (0, min(by - 1, max(own[1], 0)))
        case Quot(expr=expr, by=by):
            own = expr.bounds
            return None if own is None else (own[0] // by, own[1] // by)
    return None


def _nested(rest: Expr, by: int) -> tuple[Expr, Expr, int] | None:
    """(high, low, step) of high * step + low, 0 <= low < step, where `step` divides `by`."""
    for step in sorted({c for _, c in rest.terms if 1 < c < by and by % c == 0}, reverse=True):
        low = Expr(rest.const % step, tuple((a, c) for a, c in rest.terms if c % step))
        bounds = low.bounds
        if bounds is not None and bounds[0] >= 0 and bounds[1] < step and low != ZERO:
            high = tuple((a, c // step) for a, c in rest.terms if c % step == 0)
            return Expr(rest.const // step, high), low, step
    return None


def _quotient(rest: Expr, by: int) -> Expr:
    """Rest // by for what does not divide by itself, in a standard form."""
    small, by, _ = _reduced(rest, by)
    if by == 1:
        return small
    atom = _only_atom(small)
    if isinstance(atom, Quot):  # (e // a) // b = e // (a*b)
        small, by = atom.expr, atom.by * by
    own = small.bounds
    if own is not None and own[0] // by == own[1] // by:
        return Expr(own[0] // by)
    return Expr(0, ((Quot(small, by), 1),))


def _remainder(rest: Expr, by: int) -> Expr:
    """Rest % by for what does not divide by itself, in a standard form."""
    small, by, common = _reduced(rest, by)
    atom = _only_atom(small)
    if isinstance(atom, Rem) and atom.by % by == 0:  # (e % ab) % b = e % b
        return atom.expr.mod(by) * common
    return Expr(0, ((Rem(small, by), common),))


def _reduced(rest: Expr, by: int) -> tuple[Expr, int, int]:
    """Both divided by what they have in common, and that."""
    common = math.gcd(by, rest.const, *(c for _, c in rest.terms))
    small = Expr(rest.const // common, tuple((a, c // common) for a, c in rest.terms))
    return small, by // common, common


def _only_atom(expr: Expr) -> Atom | None:
    single = expr.const == 0 and len(expr.terms) == 1 and expr.terms[0][1] == 1
    return expr.terms[0][0] if single else None


def _canonical(const: int, merged: dict[Atom, int]) -> Expr:
    """Drop zeros, put quotient and remainder of one expression together again, and sort."""
    merged = {a: c for a, c in merged.items() if c}
    if len(merged) < 2:
        return Expr(const, tuple(merged.items()))
    _join_nested(merged)
    for atom in list(merged):
        if isinstance(atom, Quot) and merged.get(atom):
            remainder, inner = atom.expr.mod(atom.by), merged[atom]
            if inner % atom.by or not remainder.terms:
                continue
            scale = inner // atom.by
            if all(merged.get(a) == c * scale for a, c in remainder.terms):
                del merged[atom]
                for a, _ in remainder.terms:
                    del merged[a]
                whole = atom.expr + (remainder.const * -1)
                return _canonical(const, merged) + whole * scale
    return Expr(const, tuple(sorted(merged.items(), key=lambda t: _show(t[0]))))


def _join_nested(merged: dict[Atom, int]) -> None:
    """(e // ab) * b + (e // a) % b = e // a, in place."""
    for atom, coefficient in list(merged.items()):
        if not (isinstance(atom, Rem) and isinstance(inner := _only_atom(atom.expr), Quot)):
            continue
        outer = Quot(inner.expr, inner.by * atom.by)
        if merged.get(outer) == coefficient * atom.by:
            del merged[atom], merged[outer]
            merged[inner] = merged.get(inner, 0) + coefficient
            _join_nested(merged)
            return


def _substitute(atom: Atom, swap: dict[Label, Expr]) -> Expr:
    match atom:
        case Label():
            return swap.get(atom, Expr.of(atom))
        case Read(value=value, coords=coords):
            return Expr.of(Read(value, tuple(c.substitute(swap) for c in coords)))
        case Quot(expr=expr, by=by):
            return expr.substitute(swap).floordiv(by)
        case Rem(expr=expr, by=by):
            return expr.substitute(swap).mod(by)


def merge(coords: tuple[Expr, ...], shape: tuple[int, ...]) -> Expr:
    """Row-major position of `coords` in a tensor of `shape`."""
    total = ZERO
    for coordinate, size in zip(coords, shape, strict=True):
        total = total * size + (ZERO if size == 1 else coordinate)
    return total


def split(position: Expr, shape: tuple[int, ...]) -> tuple[Expr, ...]:
    """Coordinates in `shape` of the element at row-major `position`."""
    coords: list[Expr] = []
    for size in reversed(shape[1:]):
        coords.append(ZERO if size == 1 else position.mod(size))
        position = position if size == 1 else position.floordiv(size)
    if shape:
        coords.append(ZERO if shape[0] == 1 else position)
    return tuple(reversed(coords))


def label_of(expr: Expr) -> Label | None:
    """The label an expression is, when it is nothing but one."""
    atom = _only_atom(expr)
    return atom if isinstance(atom, Label) else None


_counter = itertools.count()


def fresh(name: str, size: int) -> Label:
    """A label unlike any other."""
    return Label(f"{name}#{next(_counter)}", size)
