"""Writes into a cache of fixed length: what a scatter does to float rows, done to packed ones.

A latent and its rope become one row, so both must be written at the same places, and a row can only
be overwritten: bytes do not add up. What is not so is refused, never converted to something else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx

from sfa_onnx.errors import ModelError
from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.kv_convert.emit import Emitter
from sfa_onnx.kv_convert.trace import Stream
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["Write", "Writes", "position_input", "same_value"]

_NUMBER = re.compile(r"\d+")
_DEEP = 200  # nodes above two values that are compared
_SOURCE = {"B": 0, "S": 1, "1": 2, "C": 3}  # axes of packed rows [B, S, 1, D]


@dataclass(frozen=True)
class Write:
    """One write that packed rows can take.

    Attributes:
        kind: the scatter's operator.
        places: for ScatterND its indices; for ScatterElements the indices before they were spread
            over the columns, one column wide.
        axes: the labels of the float rows it was made for.
        ragged: whether each sequence has places of its own.
    """

    kind: str
    places: str
    axes: tuple[str, ...]
    ragged: bool


class Writes:
    """Reads scatters into float caches, and emits those into packed ones."""

    def __init__(self, index: GraphIndex, emit: Emitter) -> None:
        self.index, self._emit = index, emit

    def read(
        self, node: onnx.NodeProto, other: onnx.NodeProto | None, lat: Stream, rot: Stream | None
    ) -> Write | None:
        """The write of latent (`node`) and rope (`other`); None for one not along the sequence.

        Raises:
            ModelError: rows are not overwritten, or latent and rope go to different places.
        """
        for scatter in (node, *([other] if other is not None else [])):
            reduction = attribute(scatter, "reduction", "none")
            if reduction != "none":
                raise ModelError(
                    f"{_label(scatter)} combines new rows with the cache (reduction ="
                    f" {reduction}); packed rows can only be overwritten. Use --to int8, which"
                    " keeps the float cache"
                )
        found = self._places(node, lat)
        if found is None or other is None or rot is None or other is node:
            return found
        mate = self._places(other, rot)
        if mate is None or mate.axes[:-1] != found.axes[:-1] or not self._same(found, mate):
            raise ModelError(
                f"{_label(node)} and {_label(other)} write latent and rope at places that are not"
                " seen to be the same, and both become one packed row. Write them with one tensor"
                " of indices, or use --to int8"
            )
        return found

    def _places(self, node: onnx.NodeProto, stream: Stream) -> Write | None:
        if node.op_type == "ScatterND":
            shape = self.index.shape(node.input[1])
            depth = None if shape is None else shape[-1]
            if not isinstance(depth, int) or not depth or "S" not in stream.axes[:depth]:
                return None
            whole = "C" not in stream.axes[:depth] and _perm(stream.axes) is not None
            ragged = "B" in stream.axes[:depth]
            return Write("ScatterND", node.input[1], stream.axes, ragged) if whole else None
        axis = int(attribute(node, "axis", 0)) % len(stream.axes)
        if stream.axes[axis] != "S" or _perm(stream.axes) is None:
            return None
        column = self._column(node.input[1], len(stream.axes))
        return None if column is None else Write("ScatterElements", column, stream.axes, True)

    def _column(self, indices: str, rank: int) -> str | None:
        """What indices [.., C] are spread from over their columns: one column, of the same rank."""
        node = self.index.maker(indices)
        while node is not None and node.op_type in ("Identity", "Cast"):
            node = self.index.maker(node.input[0])
        if node is None or node.op_type != "Expand":
            return None
        shape = self.index.shape(node.input[0])
        if shape is None or not shape or shape[-1] != 1 or len(shape) != rank:
            return None
        return str(node.input[0])

    def _same(self, one: Write, other: Write) -> bool:
        return one.kind == other.kind and same_value(self.index, one.places, other.places)

    def emit(self, write: Write, before: str, rows: str) -> str:
        """`rows` [B, n, 1, D] written into `before` [B, S, 1, D]."""
        emit, perm = self._emit, _perm(write.axes) or [0, 1, 2, 3]
        moved = [emit.transpose(v, perm) for v in (before, rows)]
        if write.kind == "ScatterND":
            written = emit.op("ScatterND", [moved[0], write.places, moved[1]])
        else:
            units = [] if "1" in write.axes else [len(write.axes) - 1]
            places = emit.op(
                "Cast", [emit.unsqueeze(write.places, units)], to=onnx.TensorProto.INT64
            )
            spread = emit.op("Expand", [places, emit.op("Shape", [moved[1]])])
            axis = perm.index(1)
            written = emit.op("ScatterElements", [moved[0], spread, moved[1]], axis=axis)
        return emit.transpose(written, [perm.index(i) for i in range(4)])


def _perm(axes: tuple[str, ...]) -> list[int] | None:
    """Permutation of [B, S, 1, D] that brings it into the order of `axes` (C stands for D)."""
    if axes.count("1") > 1 or axes[-1] != "C" or "B" not in axes or "S" not in axes:
        return None
    perm = [_SOURCE[label] for label in axes]
    if "1" not in axes:
        perm.insert(-1, 2)
    return perm


def _label(node: onnx.NodeProto) -> str:
    return f"{node.name or node.output[0]} ({node.op_type})"


def same_value(index: GraphIndex, one: str, other: str, counters: set[str] | None = None) -> bool:
    """Whether two values are computed alike from the same values (an exporter repeats itself).

    Args:
        index: the graph.
        one: a value.
        other: another one.
        counters: takes the inputs that are one counter kept once per layer, which then are the
            same; None: other inputs are other values.
    """
    stack, seen = [(one, other)], set[tuple[str, str]]()
    while stack:
        pair = stack.pop()
        if pair[0] == pair[1] or pair in seen:
            continue
        if counters is not None and _one_counter(index, *pair):
            counters.update(pair)
            continue
        seen.add(pair)
        if len(seen) > _DEEP:
            return False
        a, b = (index.constant(name) if name else None for name in pair)
        if a is not None and b is not None:
            if a.dtype != b.dtype or not np.array_equal(a, b):
                return False
            continue
        mine, theirs = (index.maker(name) for name in pair)
        if mine is None or theirs is None or not _alike(mine, theirs, pair):
            return False
        stack += zip(mine.input, theirs.input, strict=True)
    return True


def _one_counter(index: GraphIndex, one: str, other: str) -> bool:
    """Whether two inputs differ by the layer's number in their names alone."""
    return (
        index.is_graph_input(one)
        and index.is_graph_input(other)
        and index.shape(one) == index.shape(other)
        and _NUMBER.sub("#", one) == _NUMBER.sub("#", other)
    )


def _alike(a: onnx.NodeProto, b: onnx.NodeProto, pair: tuple[str, str]) -> bool:
    """Whether two nodes do the same to their inputs, and `pair` are the same output of each."""
    if (a.domain, a.op_type, len(a.input)) != (b.domain, b.op_type, len(b.input)):
        return False
    if list(a.output).index(pair[0]) != list(b.output).index(pair[1]):
        return False
    if a.op_type.startswith("Random") or a.op_type in ("Bernoulli", "Multinomial"):
        return False
    return _told(a) == _told(b)


def _told(node: onnx.NodeProto) -> list[bytes]:
    """A node's attributes in a fixed order."""
    return sorted(attribute.SerializeToString() for attribute in node.attribute)


def position_input(index: GraphIndex, indices: str) -> str:
    """The one input of whole numbers that indices are made from; "" where there are none, or more.

    Sizes are no positions: what comes through a Shape is left out.
    """
    found, stack, seen = set[str](), [indices], set[str]()
    while stack:
        name = stack.pop()
        if not name or name in seen:
            continue
        seen.add(name)
        node = index.maker(name)
        if node is None:
            if index.is_graph_input(name):
                found.add(name)
        elif node.op_type not in ("Shape", "Size"):
            stack += node.input
    return found.pop() if len(found) == 1 else ""
