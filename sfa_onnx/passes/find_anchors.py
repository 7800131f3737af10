"""Where attention may be: every normalisation over keys, and whether a selection feeds it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx

from sfa_onnx.passes.axes_trace import Tracer
from sfa_onnx.passes.bind_scores import sums_products
from sfa_onnx.passes.bind_site import Anchor
from sfa_onnx.passes.index import GraphIndex
from sfa_onnx.passes.shapes_rules import attributes

__all__ = ["anchors", "fed_by_selection"]

_PRODUCTS = frozenset(("MatMul", "Einsum", "FusedMatMul", "Gemm"))
# Behind the product of queries and keys only views, casts, dequantisation and work on bytes are
# followed.
_STRUCTURAL = (
    frozenset(("BitCast", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mod"))
    | frozenset(("Cast", "Concat", "DequantizeLinear", "Expand", "Flatten", "Gather", "Identity"))
    | frozenset(("GatherElements", "GatherND", "IsNaN", "Mul", "Reshape", "ScatterND", "Slice"))
    | frozenset(("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"))
)
_GATHERS = frozenset(("Gather", "GatherElements", "GatherND"))
_SCATTERS = frozenset(("ScatterElements", "ScatterND", "OneHot"))
_INT_TYPES = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
_LOOSE = frozenset(
    ("Cast", "Mul", "Div", "Where", "ScatterND", "Identity", "Unsqueeze", "Reshape", "Log", "Add")
)


def anchors(index: GraphIndex) -> Iterator[Anchor]:
    """Every softmax of the graph, in any spelling, in graph order."""
    for i in index.own:
        node = index.nodes[i]
        op = node.op_type
        if op == "Softmax":
            axis = attributes(node).get("axis", -1 if index.opsets.get("", 18) >= 13 else 1)
            yield Anchor(i, node.input[0], int(axis), node.output[0])
        elif op == "Attention" and node.domain in ("", "ai.onnx"):
            yield Anchor(i, node.input[0], -1, node.output[0], form="Attention")
        elif op in ("Div", "Mul"):
            found = _divided(index, i) or _divided_afterwards(index, i)
            if found is not None:
                yield found
        elif op in ("Exp", "Pow"):
            found = _less_logsumexp(index, i)
            if found is not None:
                yield found


def _exponential(index: GraphIndex, value: str) -> tuple[int, str, float] | None:
    """(node, exponent, ln of the base) of Exp(x) or Pow(2, x), behind casts."""
    for _ in range(4):
        i = index.producer.get(value)
        if i is None:
            return None
        node = index.nodes[i]
        if node.op_type == "Exp":
            return i, node.input[0], 1.0
        if node.op_type == "Pow":
            base = index.constant(node.input[0])
            if base is None or base.size != 1 or float(base.reshape(-1)[0]) != 2:
                return None
            return i, node.input[1], math.log(2)
        if node.op_type not in ("Cast", "Identity"):
            return None
        value = node.input[0]
    return None


def _quotient(index: GraphIndex, node: onnx.NodeProto) -> tuple[str, str] | None:
    """(a, b) of a / b, also written as a * Reciprocal(b), or a * (1 / b)."""
    if node.op_type == "Div":
        return node.input[0], node.input[1]
    for own, other in ((0, 1), (1, 0)):
        inverse = index.origin(node.input[other])
        inverse = _behind(index, inverse, ("Cast", "Identity", "Unsqueeze", "Expand"))
        if inverse is None:
            continue
        if inverse.op_type == "Reciprocal":
            return node.input[own], inverse.input[0]
        if inverse.op_type == "Div" and _is_one(index, inverse.input[0]):
            return node.input[own], inverse.input[1]
    return None


def _is_one(index: GraphIndex, value: str) -> bool:
    number = index.constant(value)
    return number is not None and number.size == 1 and float(number.reshape(-1)[0]) == 1


def _divided(index: GraphIndex, i: int) -> Anchor | None:
    """exp(s - max) / sum(exp(s - max)), with or without the maximum."""
    node = index.nodes[i]
    quotient = _quotient(index, node)
    if quotient is None:
        return None
    above, mask = index.source(quotient[0]), ""
    exponential = _exponential(index, above)
    if exponential is None and (masked := _masked(index, above)) is not None:
        exponential, mask = masked
    total = index.node_of(quotient[1])
    while total is not None and total.op_type in ("Cast", "Identity", "Unsqueeze", "Expand"):
        total = index.node_of(total.input[0])
    added = ""
    if total is not None and total.op_type in ("Add", "Clip", "Max"):  # sum + eps: to be refused
        added = total.output[0]
        sums = (index.origin(n) for n in total.input if n)
        total = next((n for n in sums if n is not None and n.op_type == "ReduceSum"), None)
    if exponential is None or total is None or total.op_type != "ReduceSum":
        return None
    summed = _exponential(index, total.input[0])
    same = index.source(total.input[0]) == above
    if not same and (mask or summed is None or summed[0] != exponential[0]):
        return None
    axis = _axis(index, total)
    if axis is None:
        return None
    _, exponent, base = exponential
    shifted = index.origin(exponent)
    scores = exponent
    if shifted is not None and shifted.op_type == "Sub":
        source = index.source(shifted.input[0])
        if _reaches(index, shifted.input[1], ("ReduceMax",), source):
            scores = shifted.input[0]
    weights = node.output[0]
    return Anchor(i, scores, axis, weights, base, "exp / sum", mask=mask, padded=added)


def _masked(index: GraphIndex, value: str) -> tuple[tuple[int, str, float], str] | None:
    """The exponential and the mask of exp(x) * mask."""
    node = index.origin(value)
    if node is None or node.op_type != "Mul":
        return None
    for own, other in ((0, 1), (1, 0)):
        if (found := _exponential(index, node.input[own])) is not None:
            return found, node.input[other]
    return None


def _divided_afterwards(index: GraphIndex, i: int) -> Anchor | None:
    """(exp(s - max) @ v) / sum(exp(s - max))."""
    quotient = _quotient(index, index.nodes[i])
    if quotient is None or quotient[0] != index.nodes[i].input[0]:
        return None
    product, total = index.origin(quotient[0]), index.origin(quotient[1])
    product = _behind(index, product, ("Cast", "Reshape", "Transpose", "Squeeze"))
    total = _behind(index, total, ("Cast", "Identity", "Unsqueeze", "Reshape", "Transpose"))
    if product is None or total is None or total.op_type != "ReduceSum":
        return None
    summed = _exponential(index, total.input[0])
    axis = _axis(index, total)
    if product.op_type not in _PRODUCTS or summed is None or axis is None:
        return None
    if not any(_same_exponential(index, n, summed[0]) for n in product.input):
        return None
    exponential, exponent, base = summed
    shifted = index.origin(exponent)
    scores = exponent
    if shifted is not None and shifted.op_type == "Sub":
        source = index.source(shifted.input[0])
        if _reaches(index, shifted.input[1], ("ReduceMax",), source):
            scores = shifted.input[0]
    weights = index.nodes[exponential].output[0]
    return Anchor(exponential, scores, axis, weights, base, "exp, divided by its sum", i)


def _behind(
    index: GraphIndex, node: onnx.NodeProto | None, ops: tuple[str, ...]
) -> onnx.NodeProto | None:
    while node is not None and node.op_type in ops:
        node = index.origin(node.input[0])
    return node


def _same_exponential(index: GraphIndex, value: str, node: int) -> bool:
    found = _exponential(index, value)
    return found is not None and found[0] == node


def _less_logsumexp(index: GraphIndex, i: int) -> Anchor | None:
    """exp(s - logsumexp(s)), also in base 2 and with the log-sum patched where it is -inf."""
    node = index.nodes[i]
    exponential = _exponential(index, node.output[0])
    if exponential is None:
        return None
    _, exponent, base = exponential
    shifted = index.origin(exponent)
    if shifted is not None and shifted.op_type == "LogSoftmax" and base == 1:
        last = attributes(shifted).get("axis", -1 if index.opsets.get("", 18) >= 13 else 1)
        return Anchor(i, shifted.input[0], int(last), node.output[0], 1.0, "exp(log_softmax)")
    if shifted is None or shifted.op_type != "Sub":
        return None
    scores, normaliser = shifted.input
    total = _reaches(index, normaliser, ("ReduceLogSumExp", "ReduceLogSum", "ReduceSum"), "")
    if total is None:
        return None
    axis = _axis(index, total)
    if axis is None:
        return None
    return Anchor(i, scores, axis, node.output[0], base, "exp(s - logsumexp)")


def _reaches(
    index: GraphIndex, value: str, ops: tuple[str, ...], source: str
) -> onnx.NodeProto | None:
    """The reduction that `value` is made from (`source`: what it must reduce, if given)."""
    stack, seen = [value], set[str]()
    while stack and len(seen) < 64:
        name = stack.pop()
        node = index.node_of(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type in ops:
            return node if not source or index.source(node.input[0]) == source else None
        if node.op_type in _LOOSE:
            stack += node.input
    return None


def _axis(index: GraphIndex, node: onnx.NodeProto) -> int | None:
    """The one axis of a reduction."""
    given = index.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    axes = attributes(node).get("axes") if given is None else np.asarray(given).reshape(-1)
    return int(axes[0]) if axes is not None and len(axes) == 1 else None


def fed_by_selection(tracer: Tracer, anchor: Anchor) -> str:
    """Whether selected indices reach the scores through a gather or a scattered mask.

    A quick look upstream, generous on purpose: binding decides. Returns "surely", "perhaps" (only
    a comparison of indices was seen, as masks of packed sequences have it too) or "".
    """
    index = tracer.index
    stack: list[tuple[str, int]] = [(anchor.scores, 0), (anchor.mask, 0)]
    if anchor.form == "Attention":
        names = list(index.nodes[anchor.node].input)
        stack = [(n, 1) for n in names[:3]] + [(n, 0) for n in names[3:4]]
    seen: set[tuple[str, int]] = set()
    perhaps = ""
    while stack:
        value, depth = stack.pop()
        if not value or (value, depth) in seen or len(seen) > 20_000:
            continue
        seen.add((value, depth))
        node = index.node_of(value)
        if node is None:
            continue
        if _selects(tracer, node, depth):
            if node.op_type != "Equal":
                return "surely"
            perhaps = "perhaps"
        stack += _follow(index, node, depth)
    return perhaps


def _selects(tracer: Tracer, node: onnx.NodeProto, depth: int) -> bool:
    op = node.op_type
    if depth:
        return op in _GATHERS and _is_selection(tracer, node.input[1])
    if op in _SCATTERS:
        inputs = node.input[:2] if op == "OneHot" else node.input[:3]
        return any(_is_selection(tracer, n) for n in inputs)
    return op == "Equal" and any(_is_selection(tracer, n) for n in node.input)


def _follow(index: GraphIndex, node: onnx.NodeProto, depth: int) -> list[tuple[str, int]]:
    """What to look at behind a node: `depth` counts the products passed."""
    op = node.op_type
    if op in _PRODUCTS or sums_products(index, node):
        return [(n, depth + 1) for n in node.input] if depth < 2 else []
    if op in ("TopK", "Softmax", "Shape", "Constant", "Size"):
        return []
    return [(n, depth) for n in node.input if n] if not depth or op in _STRUCTURAL else []


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
