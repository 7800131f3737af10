"""What is stored in the file, or made of what is: weights, and rows that are read from them."""

from __future__ import annotations

from typing import Final

from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import GATHERS, PRODUCTS, VIEWS
from sfa_onnx.passes.graph.walk import back

__all__ = ["is_table", "is_weight"]

_VIEWS: Final = VIEWS | {"DequantizeLinear"}
_MOST: Final = 64  # values that a table is made of


def is_weight(index: GraphIndex, value: str) -> bool:
    """Whether `value` is a constant, a view of one, or made of constants and sizes alone.

    Rows that are gathered from such a table are weights as well: those of chosen experts. So are
    stored tensors that a caller may replace: nobody reads a weight.
    """
    if value in index.initializers or index.is_default(value):
        return True
    *_, source = back(index, value, _VIEWS)
    node = index.maker(source)
    if source in index.initializers or node is None:
        return source in index.initializers or index.is_default(source)
    return node.op_type == "Constant" or is_table(index, value)


def is_table(index: GraphIndex, value: str) -> bool:
    """Whether a value is made of constants and sizes alone."""
    stack, seen = [value], set[str]()
    while stack:
        name = stack.pop()
        if name in seen or name in index.initializers or not name:
            continue
        seen.add(name)
        node = index.maker(name)
        if node is None or node.op_type in PRODUCTS or len(seen) > _MOST or index.is_given(name):
            return False
        if node.op_type not in ("Shape", "Size"):
            stack += node.input[:1] if node.op_type in GATHERS else node.input
    return True
