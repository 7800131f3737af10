"""Which stored bytes a value is computed from, without understanding the computation.

Rows that a graph decodes itself (BitCast, shifts, powers of two, tables) are followed by position
only: elementwise arithmetic keeps positions, reductions over bytes start at the first one. Whether
the arithmetic is the right one is for verification to decide, by execution.

No terms are read here: a term of a decoder would hold each shift, mask and table entry, no identity
makes two spellings of one equal, and where the bytes lie is all that binding asks.
"""

from __future__ import annotations

import math
from typing import Final

import onnx

from sfa_onnx.passes.axes.expr import ZERO, Expr
from sfa_onnx.passes.axes.reduced import reduced
from sfa_onnx.passes.axes.trace import Dot, Move, Pieces, Product, Ref, Scaled, Stop, Tracer
from sfa_onnx.passes.graph.kinds import ELEMENTWISE, REDUCTIONS, SIZES

__all__ = ["stored_bytes"]

_INT8: Final = onnx.TensorProto.INT8
_STEPS: Final = 400  # on the way back from one element
_NODES: Final = 2000  # looked at upstream of one value
_WEIGHTS: Final = 64


def stored_bytes(tracer: Tracer, ref: Ref) -> list[Ref]:
    """The int8 tensors that the element `ref` is computed from, the stored one last.

    Returns:
        References whose last coordinate is that of one byte of the element; [] when the element is
        not computed, position by position, from one int8 tensor.
    """
    known: dict[str, bool] = {}
    if not _holds(tracer, ref.value, known):
        read = [r for c in ref.coords for r in c.reads]  # a look-up table is a constant itself
        if not any(_holds(tracer, r.value, known) for r in read):
            return []
    with tracer.following():  # constants that pick bytes are always read
        try:
            return _follow(tracer, ref, known)
        except Stop:  # a shape on the way is not known
            return []


def _follow(tracer: Tracer, ref: Ref, known: dict[str, bool]) -> list[Ref]:
    found: list[Ref] = []
    here: Ref | None = ref
    for _ in range(_STEPS):
        if here is None:
            break
        if tracer.sizes.elem_type(here.value) == _INT8:
            found.append(here)
        step = tracer.step(here)
        if isinstance(step, Move):
            here = step.ref
        elif found:
            break
        elif isinstance(step, Scaled):
            here = step.ref
        elif isinstance(step, Dot | Product):
            here = _side(tracer, step, known)
        elif isinstance(step, Pieces):
            start, _, part = step.parts[0]
            here = part.substitute({step.label: Expr(start)})
        else:
            here = _behind(tracer, here, known)
    return found


def _side(tracer: Tracer, step: Dot | Product, known: dict[str, bool]) -> Ref | None:
    """The factor that holds bytes; a sum over bytes starts at the first."""
    for side, other in ((step.a, step.b), (step.b, step.a)):
        if _holds(tracer, side.value, known):
            if isinstance(step, Product):
                return side
            weights = _few(tracer, other.value)
            return side.substitute({step.label: ZERO}) if weights else None
    return None


def _few(tracer: Tracer, value: str) -> bool:
    """Whether a value is a little constant, such as the weights of the bytes of a number."""
    node = tracer.index.maker(value)
    fixed = value in tracer.index.initializers or (node is not None and node.op_type == "Constant")
    return fixed and math.prod(tracer.shape(value)) <= _WEIGHTS


def _behind(tracer: Tracer, ref: Ref, known: dict[str, bool]) -> Ref | None:
    """The operand behind an elementwise operator or a reduction, the index of a look-up table."""
    node = tracer.index.maker(ref.value)
    if node is None or node.op_type == "Constant":  # a table that is read at bytes
        reads = [r for c in ref.coords for r in c.reads if _holds(tracer, r.value, known)]
        return Ref(reads[0].value, reads[0].coords) if reads else None
    names = [n for n in node.input if n and _holds(tracer, n, known)]
    if not names:
        return None
    if node.op_type in REDUCTIONS:
        under = reduced(tracer, node, ref)
        return under[0].substitute(dict.fromkeys(under[1], ZERO)) if under is not None else None
    if node.op_type == "MatMul":  # bytes times a vector of weights
        if not _few(tracer, node.input[1]):
            return None
        wide = (*ref.coords, ZERO)
        return Ref(names[0], wide) if len(tracer.shape(names[0])) == len(wide) else None
    if node.op_type not in ELEMENTWISE or len(tracer.shape(names[0])) > len(ref.coords):
        return None
    return tracer.operand(names[0], ref.coords)


def _holds(tracer: Tracer, value: str, known: dict[str, bool]) -> bool:
    """Whether an int8 tensor that is no constant lies upstream of `value`."""
    index = tracer.index
    stack, seen = [value], set[str]()
    result = False
    while stack and not result and len(seen) < _NODES:
        name = stack.pop()
        if name in seen or not name or name in index.initializers:
            continue
        if name in known:
            result = known[name]
            continue
        seen.add(name)
        node = index.maker(name)
        if tracer.sizes.elem_type(name) == _INT8 and (node is None or node.op_type != "Constant"):
            result = True
        elif node is not None and node.op_type not in SIZES | {"Constant"}:
            stack += node.input
    known[value] = result
    return result
