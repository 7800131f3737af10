"""Rows picked by a product: the sum over t of [index == t] * rows[t] is rows[index].

Graphs write a gather as one-hot(indices) times rows. It is a gather exactly where every index is
one of a row: an index outside makes a row of zeros, which attention sees as a key of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx

from sfa_onnx.passes.axes.asking import Tracing
from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.named import axis_of
from sfa_onnx.passes.axes.steps import Dot, Move, Ref
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import PARTS, VIEWS
from sfa_onnx.passes.graph.walk import back

__all__ = ["Picked", "one_hot_node", "picked", "picks"]

_SAME_VALUES: Final = PARTS | {"Tile"}
_FAR: Final = 16
_INTS: Final = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


@dataclass(frozen=True)
class Picked:
    """A product with one-hot rows, summed over their only axis.

    Attributes:
        rows: the element of the other operand, at the index.
        indices: the tensor the index is read from.
        inside: whether every index is one of a row, whatever the inputs are.
    """

    rows: Ref
    indices: str
    inside: bool


def one_hot_node(index: GraphIndex, value: str) -> onnx.NodeProto | None:
    """The node that makes one-hot rows of integers, looked for behind views and casts."""
    *_, made = back(index, value, VIEWS | {"Concat"})
    node = index.maker(made)
    if node is None or node.op_type not in ("OneHot", "Equal"):
        return None
    whole = node.op_type == "OneHot" or index.elem_type(node.input[0]) in (*_INTS, 0)
    return node if whole else None


def picked(tracer: Tracing, dot: Dot) -> Move | None:
    """The gather that a product with one-hot rows is, where every index is one of a row."""
    if dot.factor != 1:
        return None
    found = picks(tracer, dot)
    return Move(found.rows) if found is not None and found.inside else None


def picks(tracer: Tracing, dot: Dot) -> Picked | None:
    """What a product picks when one of its operands holds one-hot rows along the summed axis."""
    for own, other in ((dot.a, dot.b), (dot.b, dot.a)):
        if one_hot_node(tracer.index, own.value) is None or dot.label not in other.labels:
            continue
        index = _index(tracer, own, dot.label)
        if index is not None:
            at, indices, size = index
            inside = size == dot.label.size and _inside(tracer, indices, size)
            return Picked(other.substitute({dot.label: at}), indices, inside)
    return None


def _index(tracer: Tracing, ref: Ref, label: Label) -> tuple[Expr, str, int] | None:
    """(the position along `label` where `ref` is 1, who holds it, number of positions)."""
    for _ in range(_FAR):
        node = tracer.index.maker(ref.value)
        if node is None:
            return None
        if node.op_type == "OneHot":
            return _of_one_hot(tracer, node, ref, label)
        if node.op_type == "Equal":
            return _of_equal(tracer, node, ref, label)
        if node.op_type == "Cast":  # of 0 and 1, to whatever type
            ref = Ref(node.input[0], ref.coords)
            continue
        step = tracer.step(ref)
        if not isinstance(step, Move):
            return None
        ref = step.ref
    return None


def _of_one_hot(
    tracer: Tracing, node: onnx.NodeProto, ref: Ref, label: Label
) -> tuple[Expr, str, int] | None:
    values = tracer.index.mask_table(node.input[2])  # 0 and 1, of whatever type
    if values is None or values.reshape(-1).tolist() != [0, 1]:
        return None
    axis = axis_of(node, len(ref.coords), -1)
    if ref.coords[axis] != Expr.of(label):
        return None
    own = Ref(node.input[0], (*ref.coords[:axis], *ref.coords[axis + 1 :]))
    if label in own.labels:
        return None
    return tracer.index_value(own), node.input[0], tracer.shape(ref.value)[axis]


def _of_equal(
    tracer: Tracing, node: onnx.NodeProto, ref: Ref, label: Label
) -> tuple[Expr, str, int] | None:
    for indices, positions in (node.input, node.input[::-1]):
        own = tracer.operand(indices, ref.coords)
        table = tracer.operand(positions, ref.coords)
        if label in own.labels or tracer.sizes.value(positions) is None:
            continue
        with tracer.following():  # constants are always read
            place = tracer.index_value(table)
        if place == Expr.of(label):
            return tracer.index_value(own), indices, label.size
    return None


def _inside(tracer: Tracing, value: str, size: int) -> bool:
    """Whether an integer tensor holds positions on an axis of this size: those of TopK, ArgMax."""
    index = tracer.index
    path = [*back(index, value, _SAME_VALUES)]
    made, node = path[-1], index.maker(path[-1])
    if node is None or node.op_type not in ("TopK", "ArgMax", "ArgMin"):
        return False
    if any(tracer.sizes.elem_type(v) not in _INTS for v in path):
        return False
    source, default = tracer.shape(node.input[0]), -1 if node.op_type == "TopK" else 0
    axis = axis_of(node, len(source), default)
    return source[axis] == size and (node.op_type != "TopK" or made == node.output[1])
