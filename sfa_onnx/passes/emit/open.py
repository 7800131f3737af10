"""Sizes that the file leaves open must not end up as numbers in a replacement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
from onnx import numpy_helper

from sfa_onnx.passes.axes.trace import Stop

__all__ = ["check_open_sizes"]

# Stand-ins are primes above; elements of a constant that are looked at.
_PRIME, _TABLE = 10_000, 4096
_INT_TYPES = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


def check_open_sizes(
    nodes: Iterable[onnx.NodeProto],
    initializers: Iterable[onnx.TensorProto],
    symbols: Mapping[str, int],
    at: str,
) -> None:
    """Find the number that stands for an open size in attributes and constants.

    Args:
        nodes: the replacement.
        initializers: its constants.
        symbols: open size -> the prime that stood for it.
        at: the value the refusal points at.

    Raises:
        Stop: there is one.
    """
    primes = {size: name for name, size in symbols.items() if size > _PRIME}
    if not primes:
        return
    for node in nodes:
        for a in node.attribute:
            for number in (a.i, *a.ints):
                _check(number, primes, f"attribute {a.name} of {node.op_type}", at)
    for tensor in initializers:
        if tensor.data_type in _INT_TYPES:
            array = numpy_helper.to_array(tensor).reshape(-1)[:_TABLE]
            for number in array.tolist():
                _check(number, primes, "a constant of the replacement", at)


def _check(number: int, primes: Mapping[int, str], where: str, at: str) -> None:
    for size, name in primes.items():
        if number and number % size == 0:
            raise Stop(
                f"the size {name} is open in the file, and {where} needs it as a number",
                at,
                f"fix {name} where the model is exported: only batch, tokens, keys and selected"
                " entries may be dynamic",
            )
