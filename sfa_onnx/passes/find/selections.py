"""Where indices come from, and whether what they pick is a selection of keys."""

from __future__ import annotations

from typing import Final

import onnx

from sfa_onnx.passes.axes.one_hot import one_hot_node
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import PRODUCTS
from sfa_onnx.passes.graph.weights import is_table, is_weight

__all__ = ["INTEGERS", "ROWS", "chooses", "picks_rows", "selection"]

INTEGERS: Final = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
ROWS: Final = ("TopK", "input")  # what `selection` says of rows of indices
_ENDS: Final = ("Shape", "Size", "Constant", "NonZero", "MatMul", "Softmax")
_MOST: Final = 400  # values that indices are made of


def selection(index: GraphIndex, value: str) -> str:
    """Where indices come from: "TopK", "input", "row" (an input of rank 1) or nowhere, ""."""
    stack, seen, found = [value], set[str](), ""
    while stack and len(seen) < _MOST:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        node = index.maker(name)
        if node is None or index.is_given(name):
            if index.is_given(name) and index.elem_type(name) in INTEGERS:
                shape = index.shape(name)
                rows = shape is None or len(shape) >= 2
                found = "input" if rows else found or ("row" if shape else "")
            continue
        if node.op_type in ("ArgMax", "TopK") or node.domain in ("npu", "custom", "sfa_onnx"):
            return "TopK"
        if node.op_type in _ENDS:
            continue
        stack += [n for n in node.input if n]
    return found


def chooses(index: GraphIndex, data: str, indices: str) -> bool:
    """Whether rows of `data` are read at selected indices."""
    kind = selection(index, indices)
    return kind == "TopK" or (kind == "input" and not is_table(index, data))


def picks_rows(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether a product picks stored rows: one-hot rows of a selection times no weight."""
    for own, other in (node.input[:2], node.input[1::-1]):
        made = one_hot_node(index, own) if node.op_type in PRODUCTS and other else None
        if made is not None and not is_weight(index, other):
            names = made.input[:1] if made.op_type == "OneHot" else made.input
            return any(selection(index, n) in ROWS for n in names)
    return False
