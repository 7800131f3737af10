"""Constant tables as rules that hold at any size: one number, a staircase of numbers, a band.

A table is opened only where the rule gives back every entry at the size that the file has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Band", "Entries", "Fill", "Rule", "Stairs", "rule_of"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Entries:
    """Each entry for itself; `numbers` in row-major order."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Fill:
    """One value everywhere."""

    value: Any

    @property
    def numbers(self) -> tuple[int, ...]:
        """The value, where it is a number of a word."""
        return (int(self.value),) if np.asarray(self.value).dtype.kind in "iu" else ()


@dataclass(frozen=True)
class Stairs:
    """start + sum of steps[axis] * (index along axis)."""

    start: int
    steps: tuple[int, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Start and steps."""
        return (self.start, *self.steps)

    def at(self, shape: tuple[int, ...], start: int, steps: tuple[int, ...]) -> Array:
        """The table of another shape, start and steps."""
        table = np.full(shape, start, np.int64)
        for axis, (size, step) in enumerate(zip(shape, steps, strict=True)):
            line = step * np.arange(size)
            table = table + line.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        return table


@dataclass(frozen=True)
class Band:
    """`inside` where low <= column - row <= high (last two axes), else `outside`.

    None: no bound. A table of one axis, or of one row, has row 0 only.
    """

    inside: Any
    outside: Any
    low: int | None
    high: int | None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The bounds that there are."""
        return tuple(n for n in (self.low, self.high) if n is not None)

    def at(self, shape: tuple[int, ...], numbers: tuple[int, ...]) -> Array:
        """The table of another shape and bounds."""
        bounds = iter(numbers)
        rows = shape[-2] if len(shape) > 1 else 1
        distance = np.arange(shape[-1]) - np.arange(rows)[:, None]
        chosen = np.ones(distance.shape, bool)
        if self.low is not None:
            chosen &= distance >= next(bounds)
        if self.high is not None:
            chosen &= distance <= next(bounds)
        table = np.where(chosen, self.inside, self.outside)
        return np.broadcast_to(table if len(shape) > 1 else table[0], shape)


Rule = Entries | Fill | Stairs | Band


def rule_of(array: Array) -> Rule | None:
    """The rule behind a table; None where none is found."""
    flat = array.reshape(-1)
    if array.size and bool((flat == flat[0]).all()):
        return Fill(flat[0])
    if array.dtype.kind in "iu" and (stairs := _stairs(array)) is not None:
        return stairs
    return _band(array)


def _stairs(array: Array) -> Stairs | None:
    first = (0,) * array.ndim
    start = int(array[first])
    steps = []
    for axis, size in enumerate(array.shape):
        second = tuple(int(a == axis) for a in range(array.ndim))
        steps.append(int(array[second]) - start if size > 1 else 0)
    stairs = Stairs(start, tuple(steps))
    same = np.array_equal(stairs.at(array.shape, start, stairs.steps), array)
    return stairs if same else None


def _band(array: Array) -> Band | None:
    """Two values, chosen by column - row."""
    values = np.unique(array)
    if len(values) != 2 or array.ndim == 0:
        return None
    table = array.reshape((-1, *array.shape[-2:])) if array.ndim > 1 else array[None, None]
    if not (table == table[0]).all():
        return None
    distance = np.arange(table.shape[2]) - np.arange(table.shape[1])[:, None]
    for inside, outside in ((values[1], values[0]), (values[0], values[1])):
        chosen = distance[table[0] == inside]
        low, high = int(chosen.min()), int(chosen.max())
        if np.array_equal((distance >= low) & (distance <= high), table[0] == inside):
            return Band(
                inside,
                outside,
                None if low == distance.min() else low,
                None if high == distance.max() else high,
            )
    return None
