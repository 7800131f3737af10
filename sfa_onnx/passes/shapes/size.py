"""Sizes of open axes: a number that stands in for the size, and the expression that it is.

Shape rules, views and index expressions compute with numbers. A `Size` is such a number that also
knows its `Form`; sums, products and quotients of sizes keep it. Every symbol, every Min and every
Max has a stand-in of its own, chosen so that sums and products of stand-ins differ where their
forms do; `StandIns.seen` watches that no two sizes of a graph share a number all the same.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np

from sfa_onnx.passes.shapes.form import Call, Form, largest, quotient, smallest

__all__ = [
    "CollisionError",
    "Size",
    "StandIns",
    "broadcast",
    "form_of",
    "greatest",
    "is_open",
    "least",
]

_APART: Final = 8  # sizes that are nearer to each other than this are taken for S2 and S2 - 1
_SMALLEST: Final = 10_007  # for Min: below every symbol, as Min(8, keys) is never above the keys
_SYMBOLS: Final = 14_009
_LARGEST: Final = 60_000  # for Max
_CAREFUL: Final = 100  # stand-ins of one kind that are chosen by all sums and differences
_GAP: Final = 1 << 11
_KEPT: Final = 90_000  # for what a mask keeps


class CollisionError(ValueError):
    """Two different sizes have one stand-in."""


class Size(int):
    """A size that is open in the file: its stand-in, and what it is.

    Attributes:
        form: the expression.
        home: where stand-ins come from.
    """

    form: Form
    home: StandIns

    @classmethod
    def of(cls, number: int, form: Form, home: StandIns) -> int:
        """The size; a plain number where the form is one."""
        if form.fixed:
            return form.const
        size = cls(number)
        size.form, size.home = form, home
        return size

    def __add__(self, other: Any) -> Any:
        if not _is_number(other):
            return NotImplemented
        return Size.of(int(self) + int(other), self.form.plus(form_of(other)), self.home)

    def __sub__(self, other: Any) -> Any:
        if not _is_number(other):
            return NotImplemented
        return Size.of(int(self) - int(other), self.form.plus(form_of(other), -1), self.home)

    def __rsub__(self, other: Any) -> Any:
        if not _is_number(other):
            return NotImplemented
        return Size.of(int(other) - int(self), form_of(other).plus(self.form, -1), self.home)

    def __mul__(self, other: Any) -> Any:
        if not _is_number(other):
            return NotImplemented
        return Size.of(int(self) * int(other), self.form.times(form_of(other)), self.home)

    def __neg__(self) -> int:
        return Size.of(-int(self), Form().plus(self.form, -1), self.home)

    def __floordiv__(self, other: Any) -> Any:
        return _quotient(self, other, self.home) if _is_number(other) else NotImplemented

    def __rfloordiv__(self, other: Any) -> Any:
        return _quotient(other, self, self.home) if _is_number(other) else NotImplemented

    __radd__ = __add__
    __rmul__ = __mul__


def _is_number(other: Any) -> bool:
    return isinstance(other, int | np.integer)


def _quotient(a: int, b: int, home: StandIns) -> int:
    number = int(a) // int(b)
    return Size.of(number, quotient(form_of(a), form_of(b)), home)


def is_open(size: int) -> bool:
    """Whether a size changes with the sizes of the inputs."""
    return isinstance(size, Size)


def form_of(size: int) -> Form:
    """The expression that a size is."""
    return size.form if isinstance(size, Size) else Form(const=int(size))


def least(*sizes: int) -> int:
    """Min of sizes: an expression where the sizes of the inputs decide."""
    return _extreme(sizes, min, smallest)


def greatest(*sizes: int) -> int:
    """Max of sizes, as `least`."""
    return _extreme(sizes, max, largest)


def broadcast(*sizes: int) -> int:
    """Max of sizes, as exporters write that of axes broadcast to each other: 1 gives way.

    Of 1 and a symbol it is the symbol: an axis without elements is broadcast to none.
    """
    wide = {size for size in sizes if size != 1}
    alone = wide.pop() if len(wide) == 1 else 1
    return alone if form_of(alone).plain is not None else greatest(*sizes)


def _extreme(sizes: tuple[int, ...], plain: Any, formal: Any) -> int:
    home = next((s.home for s in sizes if isinstance(s, Size)), None)
    if home is None:
        return int(plain(sizes))
    return home.size(formal(*map(form_of, sizes)))


class StandIns:
    """Numbers for the symbols, Mins and Maxes of one graph.

    Args:
        start: the first few candidates are left out; two graphs of stand-ins with other starts
            agree on numbers only.
    """

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._lines = {"": _line(_SYMBOLS, start)}
        self._numbers: dict[str | Call, int] = {}
        self._seen: dict[int, Form] = {}

    def symbol(self, name: str) -> int:
        """The size that a symbol is."""
        return self.size(Form.of(name))

    def size(self, form: Form) -> int:
        """The size with this form."""
        number = sum(c * math.prod(map(self._number, atoms)) for c, atoms in form.terms)
        return Size.of(number + form.const, form, self)

    def _number(self, atom: str | Call) -> int:
        if atom in self._numbers:
            return self._numbers[atom]
        if isinstance(atom, Call) and atom.name == "//":
            a, b = (int(self.size(x)) for x in atom.arguments)
            number = a // b
        else:
            kind = atom.name if isinstance(atom, Call) else ""
            if kind not in self._lines:
                first = {"Min": _SMALLEST, "kept": _KEPT}.get(kind, _LARGEST)
                self._lines[kind] = _line(first, self._start)
            number = next(self._lines[kind])
        self._numbers[atom] = number
        return number

    def seen(self, sizes: Iterable[int]) -> None:
        """Note the sizes of a value.

        Raises:
            CollisionError: one has the number of another.
        """
        for size in sizes:
            if size < _APART:
                continue
            form = form_of(size)
            if self._seen.setdefault(int(size), form) != form:
                raise CollisionError(f"{form} and {self._seen[int(size)]}")

    def told(self, number: int, value: str, axis: int, moves: bool = False) -> int:
        """A plain number, of an axis of a value, as the size it stands for, where it does.

        A number that `moves`, or is as large as stand-ins are, is open, whatever it is.
        """
        form = self._seen.get(number)
        if moves or (form is None and number >= _SMALLEST):
            form = Form.of(Call("size", (Form.of(value), Form(const=axis))))
        return number if form is None else Size.of(number, form, self)

    def within(self, number: int) -> str:
        """The open size that a number is, or is a multiple of; "" where it is none."""
        form = self._seen.get(number)
        if form is not None and not form.fixed:
            return str(form)
        found = (a for a, n in self._numbers.items() if n >= _SMALLEST and not number % n)
        return str(next(found, "")) if number else ""


def _line(first: int, start: int) -> Iterator[int]:
    """Primes whose sums of two, and differences of two, are all different.

    That is so for the first `_CAREFUL` of them, and costs the fourth power of their number. The
    others lie apart as if by chance; whoever meets a collision of theirs raises CollisionError.
    """
    chosen: list[int] = []
    apart: set[int] = set()
    for n in itertools.count(first + 2 * start * 997 | 1, 2):
        own = {n - c for c in chosen}
        if own & apart or (own and min(own) < _APART) or not _prime(n):
            continue
        apart |= own
        chosen.append(n)
        yield n
        if len(chosen) == _CAREFUL:
            break
    gaps = random.Random(first + start)
    n = chosen[-1]
    while True:
        n = next(m for m in itertools.count(n + 2 * gaps.randint(_APART, _GAP), 2) if _prime(m))
        yield n


def _prime(n: int) -> bool:
    """Whether an odd number above 17 and below 3e14 is prime (Miller and Rabin's test)."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_passes(n, pow(base, odd, n), twos) for base in (2, 3, 5, 7, 11, 13, 17))


def _passes(n: int, power: int, twos: int) -> bool:
    if power in (1, n - 1):
        return True
    return any((power := power * power % n) == n - 1 for _ in range(twos - 1))
