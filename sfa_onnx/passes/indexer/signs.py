"""Which factors of keys are never negative: they may pass a relu, max(0, x) s = max(0, x s)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.trace import Move, Ref, Tracer
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.types import NARROW

__all__ = ["assumed_positive", "given_signs", "stored_narrow"]

_T = onnx.TensorProto
_NEVER: Final = frozenset(
    ("Abs", "Exp", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Relu", "Sigmoid", "Softmax",
     "Softplus", "Sqrt")
)  # fmt: skip
_KEEPS: Final = frozenset(  # of what is not negative, by the first input
    ("Cast", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity",
     "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape",
     "Round", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze")
)  # fmt: skip
_ALL: Final = frozenset(("Add", "Concat", "Div", "Min", "Mul", "Sum"))
_WRAPS: Final = frozenset(  # where a positive number cast, added or negated may come out negative
    (_T.INT4, _T.INT8, _T.INT16, _T.INT32, _T.INT64)
)
_MOST_STEPS: Final = 64


def given_signs(tracer: Tracer, ref: Ref) -> list[str] | None:
    """As `assumed_positive`, of an element that a replacement may join from several tensors."""
    made = tracer.joined.get(ref.value)
    if made is None:
        return assumed_positive(tracer.sizes, ref.value)
    found: dict[str, None] = {}
    for part, _ in made.parts:
        needs = given_signs(tracer, part)
        if needs is None:
            return None
        found.update(dict.fromkeys(needs))
    return list(found)


def assumed_positive(sizes: Concrete, value: str) -> list[str] | None:
    """The graph inputs that must not be negative so that `value` is not; None: it may be."""
    found: dict[str, None] = {}
    seen: set[str] = set()
    stack = [value]
    while stack:
        here = stack.pop()
        if here in seen:
            continue
        seen.add(here)
        needs = _needs(sizes, here)
        if needs is None or len(seen) > _MOST_STEPS:
            return None
        if needs == [here]:
            found[here] = None
        else:
            stack += needs
    return list(found)


def _needs(sizes: Concrete, value: str) -> list[str] | None:
    """What must not be negative; the value itself: it is given; None: it may be, as far as seen."""
    index = sizes.index
    constant = index.constant(value)
    if constant is not None:
        return [] if constant.dtype.kind in "biuf" and bool((constant >= 0).all()) else None
    if sizes.elem_type(value) in _WRAPS:
        return None
    node = index.maker(value)
    if node is None:
        return None if value in index.initializers else [value]
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in _NEVER:
        return []
    if node.op_type in _KEEPS:
        return [node.input[0]]
    if node.op_type in _ALL:
        twice = node.op_type == "Mul" and node.input[0] == node.input[1]
        return [] if twice else list(node.input)
    rule = _RULES.get(node.op_type)
    return rule(index, node) if rule is not None else None


def _clip(index: GraphIndex, node: onnx.NodeProto) -> list[str] | None:
    low = index.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    told = attributes(node).get("min")
    floor = float(np.min(low)) if low is not None else None if told is None else float(told)
    if float(attributes(node).get("max", 0)) < 0:
        return None
    above = [n for n in node.input[2:] if n]  # what is below the floor comes out as this
    return above if floor is not None and floor >= 0 else [node.input[0], *above]


def _max(index: GraphIndex, node: onnx.NodeProto) -> list[str] | None:
    known = [index.constant(name) for name in node.input]
    floors = any(x is not None and x.dtype.kind in "uf" and bool((x >= 0).all()) for x in known)
    return [] if floors else list(node.input)


def _where(index: GraphIndex, node: onnx.NodeProto) -> list[str] | None:
    del index
    return list(node.input[1:])


def _written(index: GraphIndex, node: onnx.NodeProto) -> list[str] | None:
    del index
    return [node.input[0], node.input[2]]


def _pow(index: GraphIndex, node: onnx.NodeProto) -> list[str] | None:
    by = index.constant(node.input[1])
    even = by is not None and by.size == 1 and float(by.reshape(-1)[0]) % 2 == 0
    return [] if even else [node.input[0]]


_RULES: Final[dict[str, Callable[[GraphIndex, onnx.NodeProto], list[str] | None]]] = {
    "Clip": _clip, "Max": _max, "Pow": _pow, "Where": _where,
    "ScatterElements": _written, "ScatterND": _written,
}  # fmt: skip


def stored_narrow(tracer: Tracer, ref: Ref) -> bool:
    """Whether an element is stored in eight bits or fewer, and only cast on its way."""
    if (made := tracer.joined.get(ref.value)) is not None:
        return all(stored_narrow(tracer, part) for part, _ in made.parts)
    for _ in range(_MOST_STEPS):
        if tracer.sizes.elem_type(ref.value) in NARROW:
            return True
        step = tracer.step(ref)
        if not isinstance(step, Move) or any(c.reads for c in step.ref.coords):
            return False
        ref = step.ref
    return False
