"""Sizes that the file leaves open must not end up as numbers in a replacement."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx
from onnx import numpy_helper

from sfa_onnx.passes.axes.trace import Stop

__all__ = ["check_open_sizes"]

_TABLE = 4096  # elements of a constant that are looked at
_INT_TYPES = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


def check_open_sizes(
    nodes: Iterable[onnx.NodeProto],
    initializers: Iterable[onnx.TensorProto],
    stands_for: Callable[[int], str],
    at: str,
) -> None:
    """Find the number that stands for an open size in attributes and constants.

    Args:
        nodes: the replacement.
        initializers: its constants.
        stands_for: the open size that a number is or is a multiple of; "" where it is none.
        at: the value the refusal points at.

    Raises:
        Stop: there is one.
    """
    for node in nodes:
        for a in node.attribute:
            for number in (a.i, *a.ints):
                _check(number, stands_for, f"attribute {a.name} of {node.op_type}", at)
    for tensor in initializers:
        if tensor.data_type in _INT_TYPES:
            array = numpy_helper.to_array(tensor).reshape(-1)[:_TABLE]
            for number in array.tolist():
                _check(number, stands_for, "a constant of the replacement", at)


def _check(number: int, stands_for: Callable[[int], str], where: str, at: str) -> None:
    if name := stands_for(number):
        raise Stop(
            f"the size {name} is open in the file, and {where} needs it as a number",
            at,
            f"fix {name} where the model is exported: only batch, tokens, keys and selected"
            " entries may be dynamic",
        )
