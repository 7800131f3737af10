"""Following a float cache back from the operator to the graph input it came in by.

A `Stream` is one component (latent or rope) at one point of the graph: a value, a label per dim
(B, S, C, or 1 for a unit dim) and, when the tensor is wider than the component, the columns taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx

from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["Stream", "peel", "slice_on"]

FLOAT_TYPES = frozenset(
    (
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.DOUBLE,
    )
)


@dataclass(frozen=True)
class Stream:
    """A component of the cache as one value of the graph."""

    value: str
    axes: tuple[str, ...]
    low: int = 0
    high: int | None = None  # None: up to the tensor's width

    def axis(self, label: str) -> int:
        """Position of the dim labelled `label`; -1 when there is none."""
        return self.axes.index(label) if label in self.axes else -1


def peel(index: GraphIndex, stream: Stream) -> Stream:
    """Walk back through views, casts and column slices while every label stays whole."""
    while True:
        position = index.producer.get(stream.value)
        if position is None:
            return stream
        step = _step(index, index.nodes[position], stream)
        if step is None:
            return stream
        stream = step


def _step(index: GraphIndex, node: onnx.NodeProto, stream: Stream) -> Stream | None:
    if node.op_type == "Identity":
        return replace(stream, value=node.input[0])
    if node.op_type == "Cast":
        source = index.elem_type(node.input[0])
        return replace(stream, value=node.input[0]) if source in FLOAT_TYPES else None
    if node.op_type == "Transpose":
        perm = attribute(node, "perm") or list(range(len(stream.axes)))[::-1]
        axes = [""] * len(perm)
        for out, source_dim in enumerate(perm):
            axes[source_dim] = stream.axes[out]
        return replace(stream, value=node.input[0], axes=tuple(axes))
    if node.op_type in ("Squeeze", "Unsqueeze"):
        return _unit_dims(index, node, stream)
    if node.op_type == "Reshape":
        return _reshape(index, node, stream)
    if node.op_type in ("Slice", "Split"):
        return _columns(index, node, stream)
    if node.op_type == "Expand":
        return _unchanged(index, node, stream)
    return None


def _unchanged(index: GraphIndex, node: onnx.NodeProto, stream: Stream) -> Stream | None:
    """An Expand that repeats nothing: to one head, as exporters write it for any number of them."""
    before, after = index.shape(node.input[0]), index.shape(node.output[0])
    if before is None or len(before) != len(stream.axes):
        return None
    if after is None or len(after) != len(before):
        return None
    pairs = zip(before, after, stream.axes, strict=True)
    kept = all(b is not None and (b == a or (label == "1" and b == 1)) for b, a, label in pairs)
    return replace(stream, value=node.input[0]) if kept else None


def _axes_input(index: GraphIndex, node: onnx.NodeProto) -> list[int] | None:
    listed: list[int] | None = attribute(node, "axes")
    if listed is None and len(node.input) > 1 and node.input[1]:
        constant = index.constant(node.input[1])
        listed = None if constant is None else [int(i) for i in np.ravel(constant)]
    return listed


def _unit_dims(index: GraphIndex, node: onnx.NodeProto, stream: Stream) -> Stream | None:
    listed = _axes_input(index, node)
    if listed is None:
        return None
    axes = list(stream.axes)
    if node.op_type == "Unsqueeze":
        where = {i % len(axes) for i in listed}
        if any(axes[i] == "C" or axes[i] == "S" for i in where):
            return None
        kept = tuple(label for i, label in enumerate(axes) if i not in where)
        return replace(stream, value=node.input[0], axes=kept)
    rank = len(axes) + len(listed)
    where = {i % rank for i in listed}
    rest = iter(axes)
    inserted = tuple("1" if i in where else next(rest) for i in range(rank))
    return replace(stream, value=node.input[0], axes=inserted)


def _reshape(index: GraphIndex, node: onnx.NodeProto, stream: Stream) -> Stream | None:
    """Only unit dims may come or go: the others keep their order and their sizes.

    A label whose dim is 1 (one new token, a batch of one) moves to a unit dim between the same
    neighbours; where there is none left it is dropped.
    """
    before, after = index.shape(node.input[0]), index.shape(node.output[0])
    if before is None:
        return None
    if after is None or len(after) != len(stream.axes):
        after = tuple(1 if label == "1" else None for label in stream.axes)
    solid = [[i for i, dim in enumerate(dims) if dim != 1] for dims in (before, after)]
    if len(solid[0]) != len(solid[1]):
        return None
    axes = ["1"] * len(before)
    for source, target in zip(*solid, strict=True):
        if not _may_be_same(before[source], after[target]) or stream.axes[target] == "1":
            return None
        axes[source] = stream.axes[target]
    _place_units(axes, set(solid[0]), stream.axes)
    return replace(stream, value=node.input[0], axes=tuple(axes))


def _may_be_same(one: int | str | None, other: int | str | None) -> bool:
    """Whether two declared dims may be one; names are the exporter's, numbers are facts."""
    numbers = [d for d in (one, other) if isinstance(d, int)]
    return len(numbers) < 2 or numbers[0] == numbers[1]


def _place_units(axes: list[str], solid: set[int], labels: tuple[str, ...]) -> None:
    """Give labels of unit dims a free unit dim in `axes`, in their order where that can be."""
    at = -1
    for label in labels:
        if label in axes and label != "1":
            at = max(at, axes.index(label))
        elif label != "1":
            later = [axes.index(n) for n in labels[labels.index(label) :] if n in axes and n != "1"]
            stop = min(later, default=len(axes))
            free = [i for i, here in enumerate(axes) if here == "1" and i not in solid]
            free.sort(key=lambda i: not at < i < stop)
            if free:
                axes[free[0]] = label
                at = max(at, free[0])


def _columns(index: GraphIndex, node: onnx.NodeProto, stream: Stream) -> Stream | None:
    """A Slice or Split of the last label C narrows the columns taken."""
    column = stream.axis("C")
    bounds: tuple[int, int] | None
    if node.op_type == "Split":
        bounds = _split_bounds(index, node, stream, column)
    else:
        taken = slice_on(index, node)
        if taken is None or taken[0] % len(stream.axes) != column or taken[3] != 1:
            return None
        bounds = _clip(index, node.input[0], column, taken[1], taken[2])
    if bounds is None:
        return None
    high = bounds[1] if stream.high is None else bounds[0] + stream.high
    return replace(stream, value=node.input[0], low=bounds[0] + stream.low, high=high)


def _clip(index: GraphIndex, value: str, axis: int, start: int, end: int) -> tuple[int, int] | None:
    shape = index.shape(value)
    width = None if shape is None else shape[axis]
    if not isinstance(width, int):
        return None
    return range(width)[start:end].start, range(width)[start:end].stop


def _split_bounds(
    index: GraphIndex, node: onnx.NodeProto, stream: Stream, column: int
) -> tuple[int, int] | None:
    if attribute(node, "axis", 0) % len(stream.axes) != column:
        return None
    sizes = attribute(node, "split")
    if sizes is None and len(node.input) > 1 and node.input[1]:
        constant = index.constant(node.input[1])
        sizes = None if constant is None else [int(i) for i in constant]
    if sizes is None:
        shape = index.shape(node.input[0])
        width = None if shape is None else shape[column]
        if not isinstance(width, int) or width % len(node.output):
            return None
        sizes = [width // len(node.output)] * len(node.output)
    position = list(node.output).index(stream.value)
    return sum(sizes[:position]), sum(sizes[: position + 1])


def slice_on(index: GraphIndex, node: onnx.NodeProto) -> tuple[int, int, int, int] | None:
    """(axis, start, end, step) of a Slice on one axis with constant bounds."""
    bounds = [index.constant(name) if name else None for name in node.input[1:]]
    if len(bounds) < 2 or bounds[0] is None or bounds[1] is None or np.size(bounds[0]) != 1:
        return None
    axis = 0 if len(bounds) < 3 or bounds[2] is None else int(np.ravel(bounds[2])[0])
    step = 1 if len(bounds) < 4 or bounds[3] is None else int(np.ravel(bounds[3])[0])
    return axis, int(np.ravel(bounds[0])[0]), int(np.ravel(bounds[1])[0]), step
