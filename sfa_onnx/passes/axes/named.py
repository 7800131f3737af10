"""The axes that a node names, counted from the front."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.steps import Stop

__all__ = ["axes_of", "axis_of"]


def axis_of(node: onnx.NodeProto, rank: int, default: int = 0) -> int:
    """The axis of a node's attribute in a tensor of this rank.

    Raises:
        Stop: there is no such axis; a single number has none at all.
    """
    return axes_of(node, [attributes(node).get("axis", default)], rank)[0]


def axes_of(node: onnx.NodeProto, named: Iterable[int], rank: int) -> list[int]:
    """Several axes of a tensor of this rank, in rising order.

    Raises:
        Stop: there is no such axis.
    """
    axes = [int(axis) for axis in named]
    if any(not -rank <= axis < rank for axis in axes):
        raise Stop(f"{node.op_type} names the axes {axes} of {rank}", node.output[0])
    return sorted(axis % rank for axis in axes)
