"""Where attention may be: every normalisation over keys, and whether a selection feeds it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from sfa_onnx.passes.axes_trace import Tracer
from sfa_onnx.passes.bind import Anchor
from sfa_onnx.passes.index import GraphIndex
from sfa_onnx.passes.shapes_rules import attributes

__all__ = ["anchors", "fed_by_selection"]

_PRODUCTS = frozenset(("MatMul", "Einsum", "FusedMatMul", "Gemm"))
# Behind the product of queries and keys only views, casts and dequantisation are followed.
_STRUCTURAL = (
    frozenset(
        ("Cast", "Concat", "DequantizeLinear", "Expand", "Flatten", "Gather", "GatherElements")
    )
    | frozenset(
        (
            "GatherND",
            "Identity",
            "IsNaN",
            "Mul",
            "Reshape",
            "ScatterND",
            "Slice",
            "Split",
            "Squeeze",
        )
    )
    | frozenset(("Tile", "Transpose", "Unsqueeze", "Where"))
)
_GATHERS = frozenset(("Gather", "GatherElements", "GatherND"))
_SCATTERS = frozenset(("ScatterElements", "ScatterND", "OneHot"))
_INT_TYPES = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


def anchors(index: GraphIndex) -> Iterator[Anchor]:
    """Every softmax of the graph, in any spelling, in graph order."""
    for i, node in enumerate(index.nodes):
        if node.op_type == "Softmax" and node.domain in ("", "ai.onnx"):
            axis = attributes(node).get("axis", -1 if index.opsets.get("", 18) >= 13 else 1)
            yield Anchor(i, node.input[0], int(axis), node.output[0])


def fed_by_selection(tracer: Tracer, scores: str) -> bool:
    """Whether selected indices reach the scores through a gather or a scattered mask.

    A quick look upstream, generous on purpose: binding decides.
    """
    index = tracer.index
    stack: list[tuple[str, int]] = [(scores, 0)]
    seen: set[tuple[str, int]] = set()
    while stack:
        value, depth = stack.pop()
        if (value, depth) in seen or len(seen) > 20_000:
            continue
        seen.add((value, depth))
        node = index.node_of(value)
        if node is None:
            continue
        op = node.op_type
        if depth and op in _GATHERS and _is_selection(tracer, node.input[1]):
            return True
        if (
            not depth
            and op in _SCATTERS
            and any(_is_selection(tracer, n) for n in node.input[: 2 if op == "OneHot" else 3])
        ):
            return True
        if not depth and op == "Equal" and any(_is_selection(tracer, n) for n in node.input):
            return True
        if op in _PRODUCTS:
            if depth < 2:
                stack += [(n, depth + 1) for n in node.input]
        elif op in ("TopK", "Softmax", "Shape", "Constant", "Size"):
            continue
        elif not depth or op in _STRUCTURAL:
            stack += [(n, depth) for n in node.input if n]
    return False


def _is_selection(tracer: Tracer, value: str) -> bool:
    """Whether an index tensor comes from TopK or from outside, and has a row of entries."""
    index = tracer.index
    stack, seen = [value], set[str]()
    while stack and len(seen) < 400:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        node = index.node_of(name)
        if node is None:
            if index.is_graph_input(name) and index.elem_type(name) in _INT_TYPES:
                shape = index.shape(name)
                if shape is None or len(shape) >= 2:
                    return True
            continue
        if node.op_type == "TopK" or node.domain in ("npu", "custom", "sfa_onnx"):
            return True
        if node.op_type in ("Shape", "Size", "Constant", "NonZero", "MatMul", "Softmax"):
            continue
        stack += [n for n in node.input if n]
    return False
