"""Where index arithmetic starts: the given or selected indices, block tables and lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

from sfa_onnx.passes.axes import Expr, Read
from sfa_onnx.passes.axes_trace import Move, Ref, Tracer

__all__ = ["all_reads", "index_sources"]

_ARITHMETIC = ("Abs", "Add", "Cast", "Clip", "Div", "Floor", "Max", "Min", "Mod", "Mul", "Neg")
_LOGIC = ("And", "BitShift", "BitwiseAnd", "Equal", "Greater", "GreaterOrEqual", "Less", "Not")
_ELEMENTWISE = frozenset((*_ARITHMETIC, *_LOGIC, "LessOrEqual", "Or", "Sub", "Where"))


def all_reads(coords: Iterable[Expr]) -> Iterator[Read]:
    """Every index read of an element, those that address other reads included."""
    for coordinate in coords:
        for read in coordinate.reads:
            yield read
            yield from all_reads(read.coords)


def index_sources(tracer: Tracer, ref: Ref) -> dict[str, Ref]:
    """Value -> element, for what an index is computed from: graph inputs and TopK results."""
    found: dict[str, Ref] = {}
    stack, seen = [ref], set[Ref]()
    while stack and len(seen) < 256:
        here = stack.pop()
        if here in seen:
            continue
        seen.add(here)
        node = tracer.index.node_of(here.value)
        if node is None or node.op_type == "TopK":
            if here.value not in tracer.index.initializers:
                found.setdefault(here.value, here)
            continue
        stack += _behind(tracer, node, here)
    return found


def _behind(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> list[Ref]:
    if node.op_type in _ELEMENTWISE:
        rank = len(ref.coords)
        names = [n for n in node.input if n and len(tracer.shape(n)) <= rank]
        return [tracer.operand(n, ref.coords) for n in names]
    step = tracer.step(ref)
    if not isinstance(step, Move):
        return []
    inner = [Ref(r.value, r.coords) for r in all_reads(step.ref.coords)]
    return [step.ref, *inner]
