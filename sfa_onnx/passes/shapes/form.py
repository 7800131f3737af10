"""What a size is, as an expression of the symbols that the inputs declare.

A `Form` is a sum of products of symbols and of calls (Min, Max, quotients), in one standard form:
two sizes are the same size exactly when their forms are equal, as far as sums and products go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

__all__ = ["ZERO", "Atom", "Call", "Form", "largest", "quotient", "smallest"]

Terms = tuple[tuple[int, tuple["Atom", ...]], ...]


@dataclass(frozen=True)
class Call:
    """A size that is no sum of products: Min(a, b), Max(a, b), a // b, or what only a run shows."""

    name: str
    arguments: tuple[Form, ...]

    def __call__(self, sizes: Mapping[str, int]) -> int:
        """The number at these sizes of the symbols."""
        return _FUNCTIONS[self.name](*(a(sizes) for a in self.arguments))

    @cached_property
    def symbols(self) -> frozenset[str]:
        """The symbols it depends on."""
        return frozenset(s for a in self.arguments for s in a.symbols)

    def substitute(self, swap: Mapping[Atom, Form]) -> Form:
        """This with symbols or calls replaced."""
        if self in swap:
            return swap[self]
        return _CALLS[self.name](*(a.substitute(swap) for a in self.arguments))

    def __str__(self) -> str:
        if self.name == "//":
            return f"({_operand(self.arguments[0])} // {_operand(self.arguments[1])})"
        return f"{self.name}({', '.join(map(str, self.arguments))})"


Atom = str | Call


@dataclass(frozen=True)
class Form:
    """The sum of products of atoms: terms ((coefficient, (atom, ...)), ...) and a constant."""

    terms: Terms = ()
    const: int = 0

    @staticmethod
    def of(atom: Atom) -> Form:
        """The form that is one atom."""
        return Form(((1, (atom,)),))

    def __call__(self, sizes: Mapping[str, int]) -> int:
        """The number at these sizes of the symbols.

        Raises:
            KeyError: a symbol has no size.
        """
        products = (c * math.prod(_at(a, sizes) for a in atoms) for c, atoms in self.terms)
        return sum(products) + self.const

    def __str__(self) -> str:
        """Such as "2*seq - 1" or "Min(8, past + seq)": what `size_of` reads as a dim."""
        parts = [_show(c, atoms) for c, atoms in self.terms]
        if self.const or not parts:
            parts.append(str(self.const))
        return " + ".join(parts).replace("+ -", "- ")

    @property
    def plain(self) -> str | None:
        """The symbol, where the form is nothing else."""
        atom = self.alone
        return atom if isinstance(atom, str) else None

    @property
    def alone(self) -> Atom | None:
        """The atom, where the form is nothing else."""
        if self.const or len(self.terms) != 1 or self.terms[0][0] != 1:
            return None
        atoms = self.terms[0][1]
        return atoms[0] if len(atoms) == 1 else None

    @property
    def fixed(self) -> bool:
        """Whether no size enters."""
        return not self.terms

    @cached_property
    def atoms(self) -> frozenset[Atom]:
        """The symbols and calls it is a sum of products of."""
        return frozenset(a for _, atoms in self.terms for a in atoms)

    @cached_property
    def symbols(self) -> frozenset[str]:
        """Every symbol it depends on, those inside calls included."""
        found: set[str] = set()
        for atom in self.atoms:
            found |= {atom} if isinstance(atom, str) else atom.symbols
        return frozenset(found)

    @cached_property
    def calls(self) -> frozenset[Call]:
        """Every call in it, nested ones included."""
        found: set[Call] = set()
        for atom in self.atoms:
            if isinstance(atom, Call):
                found |= {atom, *(c for a in atom.arguments for c in a.calls)}
        return frozenset(found)

    def plus(self, other: Form, sign: int = 1) -> Form:
        """The sum, or the difference for `sign` -1."""
        terms = self.terms + tuple((sign * c, a) for c, a in other.terms)
        return _standard(terms, self.const + sign * other.const)

    def times(self, other: Form) -> Form:
        """The product."""
        left, right = ((*f.terms, *([(f.const, ())] if f.const else [])) for f in (self, other))
        return _standard(tuple((a * b, (*x, *y)) for a, x in left for b, y in right), 0)

    def over(self, other: Form) -> Form | None:
        """The exact quotient by a number or a single product; None where it does not divide."""
        if len(other.terms) + bool(other.const) != 1:
            return None
        by, atoms = other.terms[0] if other.terms else (other.const, ())
        parts = []
        for c, own in (*self.terms, *([(self.const, ())] if self.const else [])):
            left = _without(own, atoms)
            if c % by or left is None:
                return None
            parts.append((c // by, left))
        return _standard(tuple(parts), 0)

    def substitute(self, swap: Mapping[Atom, Form]) -> Form:
        """This with symbols or calls replaced, also inside calls."""
        total = Form(const=self.const)
        for c, atoms in self.terms:
            product = Form(const=c)
            for atom in atoms:
                new = swap.get(atom, Form.of(atom)) if isinstance(atom, str) else None
                product = product.times(new or atom.substitute(swap))  # type: ignore[union-attr]
            total = total.plus(product)
        return total

    def exceeds(self, other: Form) -> bool:
        """Whether it is never less than another."""
        low = self.plus(other, -1).least
        return low is not None and low >= 0

    @property
    def least(self) -> int | None:
        """A number that it never falls below, symbols being 0 or more; None where none is known."""
        return _least(self)


ZERO = Form()


def _at(atom: Atom, sizes: Mapping[str, int]) -> int:
    return sizes[atom] if isinstance(atom, str) else atom(sizes)


def _operand(form: Form) -> str:
    return str(form) if form.fixed or form.plain else f"({form})"


def _show(c: int, atoms: tuple[Atom, ...]) -> str:
    product = "*".join(map(str, atoms))
    return product if c == 1 else f"-{product}" if c == -1 else f"{c}*{product}"


@lru_cache(maxsize=8192)
def _standard(terms: Terms, const: int) -> Form:
    merged: dict[tuple[Atom, ...], int] = {}
    for c, atoms in terms:
        key = tuple(sorted(atoms, key=str)) if len(atoms) > 1 else atoms
        merged[key] = merged.get(key, 0) + c
    const += merged.pop((), 0)
    kept = [(c, atoms) for atoms, c in merged.items() if c]
    return Form(tuple(sorted(kept, key=lambda t: "*".join(map(str, t[1])))), const)


def _without(own: tuple[Atom, ...], atoms: tuple[Atom, ...]) -> tuple[Atom, ...] | None:
    left = list(own)
    for atom in atoms:
        if atom not in left:
            return None
        left.remove(atom)
    return tuple(left)


@lru_cache(maxsize=8192)
def _least(form: Form, depth: int = 4) -> int | None:
    """As `Form.least`: a Min with a minus in front is at most each of its arguments, and so on."""
    for c, atoms in form.terms:
        atom = atoms[0]
        if len(atoms) > 1 or isinstance(atom, str) or not depth:
            continue
        if (atom.name == "Min" and c < 0) or (atom.name == "Max" and c > 0):
            rest = form.plus(Form(((c, atoms),)), -1)
            ends = (_least(rest.plus(a.times(Form(const=c))), depth - 1) for a in atom.arguments)
            known = [e for e in ends if e is not None]
            if known:
                return max(known)
    total = form.const
    for c, atoms in form.terms:
        low = math.prod(_atom_least(a) for a in atoms)
        if c < 0:
            return None
        total += c * low
    return total


def _atom_least(atom: Atom) -> int:
    if isinstance(atom, str) or atom.name not in ("Min", "Max"):
        return 0
    ends = [max(a.least or 0, 0) for a in atom.arguments]
    return min(ends) if atom.name == "Min" else max(ends)


def _extreme(name: str, arguments: Iterable[Form]) -> Form:
    """Min or Max without the arguments that never decide, in one order."""
    flat: dict[Form, None] = {}
    for argument in arguments:
        inner = argument.alone
        own = isinstance(inner, Call) and inner.name == name
        flat.update(dict.fromkeys(inner.arguments if own else [argument]))  # type: ignore[union-attr]
    kept = list(flat)
    for x in list(flat):
        pairs = ((x, y) if name == "Min" else (y, x) for y in kept if y != x)
        if any(high.exceeds(low) for high, low in pairs):
            kept.remove(x)  # another one is never on the wrong side of it
    if len(kept) == 1:
        return kept[0]
    return Form.of(Call(name, tuple(sorted(kept, key=lambda f: (bool(f.terms), str(f))))))


def smallest(*arguments: Form) -> Form:
    """Min of sizes."""
    return _extreme("Min", arguments)


def largest(*arguments: Form) -> Form:
    """Max of sizes."""
    return _extreme("Max", arguments)


def quotient(a: Form, b: Form) -> Form:
    """A // b: the part that divides, and a call for the rest."""
    if (whole := a.over(b)) is not None:
        return whole
    if not b.fixed or not b.const:
        return Form.of(Call("//", (a, b)))
    by = b.const
    even = Form(tuple((c // by, atoms) for c, atoms in a.terms if c % by == 0), a.const // by)
    odd = tuple((c, atoms) for c, atoms in a.terms if c % by)
    if not odd:
        return even
    rest = Form(odd, a.const % by)
    return even.plus(Form.of(Call("//", (rest, b))))


def _opaque(*_: int) -> int:
    raise KeyError("a size that only a run shows")


_FUNCTIONS: Final[dict[str, Callable[..., int]]] = {
    "Min": min,
    "Max": max,
    "//": lambda a, b: a // b,
    "size": _opaque,
    "kept": _opaque,
}
_CALLS: Final[dict[str, Callable[..., Form]]] = {
    "Min": smallest,
    "Max": largest,
    "//": quotient,
    "size": lambda *a: Form.of(Call("size", a)),
    "kept": lambda *a: Form.of(Call("kept", a)),
}
