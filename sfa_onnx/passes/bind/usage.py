"""What a value is for, judged by who reads it."""

from __future__ import annotations

import onnx

from sfa_onnx.passes.axes.one_hot import one_hot_node
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import GATHERS, ORDERS, PARTS
from sfa_onnx.passes.graph.walk import above, back

__all__ = ["counts_batches", "follows_itself", "kth_best", "measured", "prefix_sums", "reworked"]
__all__ += ["threshold"]

_MEASURE_STEPS, _REWORK_STEPS = 8, 64
_ENDS = frozenset(("Constant", "MatMul", "Shape", "Size", "Softmax", "TopK"))
_DATA = PARTS | {"Tile", "DequantizeLinear"}  # operators whose first input alone is data
_JOINS = frozenset(("Concat", "Mul", "Where"))
_CARRIERS = frozenset(("Cast", "Identity", "Not", "Reshape", "Squeeze", "Unsqueeze"))
_CUTS = PARTS | {"DequantizeLinear", "Gather", "ReduceMin"}
_LOGIC = _CARRIERS | {"And", "Expand", "Or", "Where", "Transpose"}
_PICKS = frozenset(("MatMul", "Einsum", "FusedMatMul"))


def measured(index: GraphIndex, inner: set[int], kept: set[str]) -> set[int]:
    """Nodes between an inner value and an inner `Shape`: they only lead to a size.

    `full_like(score[:, :, 0])` exports as a Gather of the scores whose shape alone is read.
    What makes a `kept` value, which the replacement reads, is not followed.
    """
    between: set[int] = set()
    for i in inner:
        if index.nodes[i].op_type not in ("Shape", "Size"):
            continue
        chain: list[int] = []
        for value in back(index, index.nodes[i].input[0], None, _MEASURE_STEPS):
            producer = index.producer.get(value)
            if producer is None or value in kept:
                break
            if producer in inner:
                between.update(chain)
                break
            chain.append(producer)
    return between


def counts_batches(index: GraphIndex, value: str) -> bool:
    """Whether tokens find their sequence by it: compared with positions, then summed."""
    frontier, compared = [value], False
    for _ in range(_MEASURE_STEPS):
        found = []
        for name in frontier:
            for i, _ in index.uses(name):
                kind = index.nodes[i].op_type
                if kind == "ReduceSum":
                    return compared
                compared = compared or kind in ORDERS
                if kind in ORDERS or kind in _CARRIERS:
                    found += [o for o in index.nodes[i].output if o]
        frontier = found
    return False


def follows_itself(index: GraphIndex, value: str) -> bool:
    """Whether it is laid behind a zero, shifted by one: `cat([0, ends[:-1]])` are starts."""
    frontier, cut = [value], False
    for _ in range(_MEASURE_STEPS):
        found = []
        for name in frontier:
            for i, position in index.uses(name):
                kind = index.nodes[i].op_type
                if kind in ("Concat", "Pad") and cut:
                    return not _summed(index, index.nodes[i].output[0])
                cut = cut or (kind == "Slice" and not position)
                if kind in _CARRIERS or (kind == "Slice" and not position):
                    found += [o for o in index.nodes[i].output if o]
        frontier = found
    return False


def _summed(index: GraphIndex, value: str) -> bool:
    """Whether running sums are taken of it: it holds counts, not yet prefix sums."""
    return any(index.nodes[i].op_type == "CumSum" for i, _ in index.uses(value))


def reworked(index: GraphIndex, value: str) -> list[int]:
    """Nodes between rows that are gathered and `value`, besides views, casts and products."""
    found: set[int] = set()
    known: dict[str, bool] = {}

    def gathers(name: str) -> bool:
        """Whether gathered rows lead to `name`; notes what they pass."""
        if name in known:
            return known[name]
        i = index.producer.get(name)
        known[name] = False
        if i is None or len(known) > _REWORK_STEPS:
            return False
        node = index.nodes[i]
        if node.op_type in GATHERS and index.constant(node.input[1]) is None:
            known[name] = True
        elif node.op_type in _PICKS and any(one_hot_node(index, n) for n in node.input[:2]):
            known[name] = True  # one-hot rows times stored ones
        elif node.op_type not in _ENDS:
            data = node.input[:1] if node.op_type in _DATA | GATHERS else node.input
            known[name] = True in [gathers(n) for n in data if n]  # all of them are looked at
            if known[name] and node.op_type not in _DATA | _JOINS | GATHERS:
                found.add(i)
        return known[name]

    gathers(value)
    return sorted(found)


def kth_best(index: GraphIndex, node: onnx.NodeProto) -> str:
    """The TopK whose values (not indices), or their views, a comparison meets; else ""."""
    if node.op_type not in ORDERS:
        return ""
    for value in node.input:
        *_, made = back(index, value, _CUTS, _MEASURE_STEPS)
        maker = index.maker(made)
        if maker is not None and maker.op_type == "TopK" and made == maker.output[0]:
            return index.label(index.producer[made])
    return ""


def threshold(index: GraphIndex, mask: str) -> tuple[str, str] | None:
    """(comparison, TopK) where a mask keeps what is at least the k-th best score."""
    for i in above(index, [mask], lambda n: n.op_type in _LOGIC, _REWORK_STEPS):
        if best := kth_best(index, index.nodes[i]):
            return f"{index.nodes[i].op_type} {index.label(i)}", best
    return None


def prefix_sums(index: GraphIndex, value: str) -> bool:
    """Whether it is used as the ends of sequences, or is their starts, `cat([0, ends[:-1]])`."""
    if counts_batches(index, value) or follows_itself(index, value):
        return True
    node = index.maker(value)
    if node is None or node.op_type not in ("Concat", "Pad") or _summed(index, value):
        return False
    for name in node.input:
        cut = index.real_maker(name)
        if cut is not None and cut.op_type == "Slice" and follows_itself(index, cut.input[0]):
            return True
    return False
