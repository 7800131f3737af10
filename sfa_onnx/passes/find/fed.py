"""Whether a selection of keys feeds an attention: a quick look upstream; binding decides."""

from __future__ import annotations

import enum
from collections.abc import Iterable

import onnx

from sfa_onnx.passes.axes.trace import Tracer
from sfa_onnx.passes.bind.site import AttentionRegion
from sfa_onnx.passes.bind.usage import kth_best
from sfa_onnx.passes.find.bodies import gathered_in_body
from sfa_onnx.passes.find.products import operands
from sfa_onnx.passes.find.selections import INTEGERS, ROWS, chooses, picks_rows, selection
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import BITS, GATHERS, ORDERS, PARTS, PRODUCTS
from sfa_onnx.passes.graph.walk import below
from sfa_onnx.passes.graph.weights import is_table, is_weight
from sfa_onnx.passes.values.attention_op import is_attention

__all__ = ["Seen", "attention_roots", "fed_by_selection", "reaches_selection"]

# Behind the keys' own projection only views, casts, dequantisation and work on bytes are followed.
_STRUCTURAL = (BITS | GATHERS | PARTS) | (
    {"Concat", "DequantizeLinear", "IsNaN", "Mod", "Mul", "ScatterND", "Tile", "Where"}
)
_SCATTERS = frozenset(("ScatterElements", "ScatterND", "OneHot"))
_ENDS = frozenset(("Constant", "Shape", "Size", "Softmax", "TopK"))
_SEEN, _BEHIND = 20_000, 24

Root = tuple[str, int]  # a value, and how many products lie between it and the weights


class Seen(enum.Enum):
    """What was seen of a selection upstream of an attention."""

    NOTHING = "no selected indices"
    GATHER = "rows gathered by one row of indices from outside, as a beam search reorders caches"
    COMPARISON = "only a comparison of indices, as masks of packed sequences have it too"
    SELECTION = "selected indices, in a gather or a scattered mask"

    def __bool__(self) -> bool:
        return self is not Seen.NOTHING


def fed_by_selection(tracer: Tracer, region: AttentionRegion) -> Seen:
    """Whether selected indices reach the attention through a gather or a scattered mask."""
    node = tracer.index.nodes[region.anchor]
    if is_attention(node):
        return reaches_selection(tracer, attention_roots(node))
    roots = [(region.scores, 0), (region.weights, 0)]
    return reaches_selection(tracer, [*roots, *_after(tracer.index, region.weights)])


def attention_roots(node: onnx.NodeProto) -> list[Root]:
    """Where to look upstream of an operator that takes query, key, value and masks."""
    return [(n, 1) for n in node.input[:3]] + [(n, 0) for n in node.input[3:]]


def _after(index: GraphIndex, weights: str) -> list[Root]:
    """What the weights meet before and in the weighted sum: masks and values."""
    found: list[Root] = []
    inner = {weights}
    for i, position in below(
        index, [weights], lambda n: n.op_type not in _ENDS | PRODUCTS, _BEHIND
    ):
        node = index.nodes[i]
        if position < 0 or node.op_type in _ENDS:
            continue
        depth = 1 if node.op_type in PRODUCTS else 0
        found += [(n, depth) for n in node.input if n and n not in inner]
        if not depth:
            inner.update(node.output)
    return found


def reaches_selection(tracer: Tracer, roots: Iterable[Root]) -> Seen:
    """As `fed_by_selection`, upstream of `roots`."""
    index = tracer.index
    stack = list(roots)
    seen: set[Root] = set()
    weakly, met = Seen.NOTHING, set[bool]()  # whether products that make the scores have a weight
    surely = bounded = False
    while stack:
        value, depth = stack.pop()
        if not value or (value, depth) in seen or len(seen) > _SEEN:
            continue
        seen.add((value, depth))
        node = index.maker(value)
        if node is None:
            continue
        if depth and node.op_type == "Gather" and selection(index, node.input[1]) == "row":
            weakly = weakly or (Seen.NOTHING if is_table(index, node.input[0]) else Seen.GATHER)
        if not depth and node.op_type in PRODUCTS:
            met.add(any(is_weight(index, n) for n in node.input[:2]))
        if not depth and node.op_type in ORDERS:
            bounded = bounded or bool(kth_best(index, node)) or _orders_indices(tracer, node)
        if depth and gathered_in_body(node, value, lambda a, b: chooses(index, a, b)):
            surely = True
        if _selects(index, node, depth):
            surely = surely or node.op_type != "Equal"
            weakly = Seen.COMPARISON
        if not surely or not depth:
            stack += _follow(index, node, depth)
    if met == {True}:
        return Seen.NOTHING  # a projection and a mask of its best, as in a router
    return Seen.SELECTION if surely or (bounded and False in met) else weakly


def _orders_indices(tracer: Tracer, node: onnx.NodeProto) -> bool:
    """Whether selected indices are compared by order with positions."""
    integers = [n for n in node.input if tracer.sizes.elem_type(n) in INTEGERS]
    return any(selection(tracer.index, n) == "TopK" for n in integers)


def _selects(index: GraphIndex, node: onnx.NodeProto, depth: int) -> bool:
    op = node.op_type
    if depth:
        if op in PRODUCTS:
            return picks_rows(index, node)
        if op not in GATHERS:
            return False
        return chooses(index, node.input[0], node.input[1])
    if op in _SCATTERS:
        inputs = node.input[:2] if op == "OneHot" else node.input[:3]
        return any(selection(index, n) in ROWS for n in inputs)
    return op == "Equal" and any(selection(index, n) in ROWS for n in node.input)


def _follow(index: GraphIndex, node: onnx.NodeProto, depth: int) -> list[Root]:
    op = node.op_type
    if operands(index, node):
        return [(n, depth + 1) for n in node.input if n] if depth < 2 else []
    if op == "NonZero" and depth == 1:  # rows that a mask picks: it hides the others
        return [(node.input[0], 0)]
    if op in _ENDS or (depth > 1 and op not in _STRUCTURAL):
        return []
    return [(n, depth) for n in node.input if n]
