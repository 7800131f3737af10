"""A selection as the beginning of a sort: a TopK of all keys, of which the first are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.expr import Label
from sfa_onnx.passes.axes.named import axis_of
from sfa_onnx.passes.axes.trace import Stop, Tracer
from sfa_onnx.passes.shapes.size import form_of

__all__ = ["Cut", "first_of_all"]

_ALIKE: Final = frozenset(("Cast", "Identity"))


@dataclass(frozen=True)
class Cut:
    """The first `count` of all keys in order, as the tensor `value`."""

    value: str
    count: int


def first_of_all(tracer: Tracer, node: onnx.NodeProto, keys: Label) -> Cut | None:
    """What is used of a TopK that orders all keys; None: it selects fewer, or they are all used.

    Raises:
        Stop: parts of it are used in several places.
    """
    entries = tracer.sizes.entries(node.input[1])
    ordered = bool(attributes(node).get("sorted", 1))
    if not entries or not ordered or form_of(entries[0]) != form_of(keys.size):
        return None
    cuts: list[Cut] = []
    stack = [node.output[1]]
    axis = axis_of(node, len(tracer.shape(node.input[0])), -1)
    while stack:
        value = stack.pop()
        if tracer.index.is_graph_output(value):
            return None
        for user, _ in tracer.index.uses(value):
            made = tracer.index.nodes[user]
            if made.op_type in _ALIKE:
                stack.append(made.output[0])
            elif (count := _first(tracer, made, value, axis)) is not None:
                cuts.append(Cut(made.output[0], count))
            else:
                return None
    if len(cuts) > 1:
        raise Stop(
            f"the sorted keys are cut in {len(cuts)} places", node.output[1],
            "cut them once, and let all readers share that",
        )  # fmt: skip
    return cuts[0] if cuts else None


def _first(tracer: Tracer, node: onnx.NodeProto, value: str, axis: int) -> int | None:
    """How many a Slice or a Gather keeps from the first one on; None: it is something else."""
    if node.op_type == "Gather" and node.input[0] == value:
        return _counted(tracer, node, axis)
    if node.op_type != "Slice" or node.input[0] != value or len(node.input) < 4:
        return None
    given = [tracer.index.constant(n) for n in node.input[1:] if n]
    if any(g is None or g.size != 1 for g in given):
        return None
    start, end, along, *step = (int(g.reshape(-1)[0]) for g in given if g is not None)
    rank = len(tracer.shape(value))
    first = start == 0 and end > 0 and along % rank == axis and step in ([], [1])
    return end if first and end < 2**31 - 1 else None


def _counted(tracer: Tracer, node: onnx.NodeProto, axis: int) -> int | None:
    """How many of the numbers 0, 1, .. a Gather takes along the keys; None: others."""
    given = tracer.index.constant(node.input[1])
    if given is None or given.ndim != 1 or not given.size:
        return None
    along = axis_of(node, len(tracer.shape(node.input[0])))
    return given.size if along == axis and given.tolist() == list(range(given.size)) else None
