"""Axis labels of operands: from labelled arrays to the shapes the graph wants, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["arrange", "atoms", "shape_of"]

Array = NDArray[Any]


def atoms(axes: Sequence[str]) -> list[str]:
    """The single labels of an operand, merged axes split; broadcast axes left out.

    An unlabelled axis ("") gets a label of its own, from its position.
    """
    names = []
    for position, axis in enumerate(axes):
        parts = axis.split("*") if axis else [f"?{position}"]
        names += [part for part in parts if part != "1"]
    return names


def arrange(
    array: Array, labels: Sequence[str], axes: Sequence[str], sizes: Mapping[str, int]
) -> Array:
    """`array` with dims `labels`, brought into an operand's axis order and merging.

    A label that the operand lacks is taken at its first position; one that the array lacks is
    repeated.
    """
    wanted = atoms(axes)
    for position in reversed(range(len(labels))):
        if labels[position] not in wanted:
            array = array.take(0, axis=position)
    have = [label for label in labels if label in wanted]
    missing = [label for label in wanted if label not in have]
    array = array.reshape(array.shape + (1,) * len(missing))
    array = array.transpose([(have + missing).index(label) for label in wanted])
    array = np.broadcast_to(array, [sizes[label] for label in wanted])
    return array.reshape(shape_of(axes, sizes))


def shape_of(axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The concrete shape of an operand."""
    dims = []
    for position, axis in enumerate(axes):
        parts = axis.split("*") if axis else [f"?{position}"]
        dims.append(math.prod(1 if p == "1" else sizes[p] for p in parts))
    return tuple(dims)
