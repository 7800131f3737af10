"""Scores to products and masks: scores = sum_i factor_i <Q_i, K_i>, hidden where a mask says so."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx

from sfa_onnx.passes.axes import Expr, Label
from sfa_onnx.passes.axes_trace import Dot, Move, Ref, Scaled, Stop, Tracer
from sfa_onnx.passes.bind_mask import Literal, additive, boolean, is_hidden
from sfa_onnx.passes.index import GraphIndex
from sfa_onnx.passes.shapes_rules import attributes

__all__ = ["Scores", "Term", "read_scores", "scatters_where", "sums_products"]

_CONTRACTIONS = frozenset(("MatMul", "Einsum", "FusedMatMul", "Gemm", "Attention"))
_COMPARES = ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Not")
_NOT_FOLLOWED = frozenset(
    (*_COMPARES, "ScatterElements", "TopK", "Shape", "Constant", "ConstantOfShape", "Softmax")
)


@dataclass(frozen=True)
class Term:
    """`factor` * sum over `label` of q * k, one part of the scores."""

    q: Ref
    k: Ref
    label: Label
    factor: float
    product: str = ""  # the value that holds this part of the scores, before any mask


@dataclass
class Scores:
    """The scores in normal form: terms are added, masks hide."""

    terms: list[Term] = field(default_factory=list)
    masks: list[Literal] = field(default_factory=list)
    axes: dict[str, tuple[Expr, ...]] = field(default_factory=dict)  # every score tensor


def read_scores(tracer: Tracer, ref: Ref, factor: float = 1.0) -> Scores:
    """Take the scores at `ref` apart.

    Raises:
        Stop: an operation that is neither a product, a scaling, a mask, a cast nor a view.
    """
    found = Scores()
    todo = [(ref, factor)]
    while todo:
        ref, factor = todo.pop()
        found.axes.setdefault(ref.value, ref.coords)
        todo.extend(_one(tracer, ref, factor, found))
    if not found.terms:
        raise Stop("no product of queries and keys leads to the scores", ref.value)
    return found


def _one(tracer: Tracer, ref: Ref, factor: float, found: Scores) -> list[tuple[Ref, float]]:
    """Peel one operation; returns what is to be peeled next."""
    node = tracer.index.node_of(ref.value)
    if node is None:
        raise Stop(f"the scores {ref.value} enter the graph ready-made", ref.value)
    if node.op_type in ("Add", "Sum", "Sub"):
        return _added(tracer, node, ref, factor, found)
    if node.op_type == "Where":
        step = tracer.step(ref)
        if isinstance(step, Move):  # a NaN guard
            return [(step.ref, factor)]
        return _where(tracer, node, ref, factor, found)
    if node.op_type == "ScatterND" and (mask := scatters_where(tracer, node, ref)) is not None:
        found.masks.extend(boolean(tracer, mask, positive=False))
        return [(Ref(node.input[0], ref.coords), factor)]
    step = tracer.step(ref)
    if isinstance(step, Move):
        return [(step.ref, factor)]
    if isinstance(step, Scaled):
        if step.factor <= 0:
            raise Stop(
                f"scores are multiplied by {step.factor:g}, which is not positive", ref.value
            )
        return [(step.ref, factor * step.factor)]
    if isinstance(step, Dot):
        found.terms.append(Term(step.a, step.b, step.label, factor * step.factor, ref.value))
        return []
    raise _unknown(tracer, node, ref)


def _unknown(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Stop:
    where = tracer.index.label(tracer.index.producer[ref.value])
    if node.op_type in ("Mul", "Div"):
        return Stop(
            f"the scores are scaled by a tensor that is not a constant number ({where})",
            ref.value,
            "the operator has one scale_value attribute: scale the query instead",
        )
    known = {"Tanh": "a soft-cap", "Clip": "a clip", "Concat": "an extra column (a sink?)"}
    what = known.get(node.op_type, "not part of softmax(scale * q.k + mask)")
    return Stop(f"{node.op_type} on the score path is {what} ({where})", ref.value)


def _added(
    tracer: Tracer, node: onnx.NodeProto, ref: Ref, factor: float, found: Scores
) -> list[tuple[Ref, float]]:
    operands = [tracer.operand(name, ref.coords) for name in node.input]
    scores = [o for o in operands if _leads_to_product(tracer, o.value)]
    masks = [o for o in operands if o not in scores]
    if node.op_type == "Sub":
        if _less_maximum(tracer, node):
            return [(operands[0], factor)]
        if scores != operands[:1]:
            raise Stop(
                "scores are subtracted from something", ref.value, "expected scores plus mask"
            )
        found.masks.extend(additive(tracer, masks[0], negated=True))
        return [(scores[0], factor)]
    if not scores:
        raise Stop(f"no product of queries and keys leads to {ref.value}", ref.value)
    for mask in masks:
        found.masks.extend(additive(tracer, mask))
    return [(s, factor) for s in scores]


def _less_maximum(tracer: Tracer, node: onnx.NodeProto) -> bool:
    """S - max(s) over the last axis, which a softmax over that axis does not see."""
    index = tracer.index
    top = index.origin(node.input[1])
    if top is None or top.op_type != "ReduceMax" or not attributes(top).get("keepdims", 1):
        return False
    given = index.constant(top.input[1]) if len(top.input) > 1 and top.input[1] else None
    axes = attributes(top).get("axes") if given is None else np.asarray(given).reshape(-1).tolist()
    last = len(tracer.shape(node.input[0])) - 1
    same = index.source(top.input[0]) == index.source(node.input[0])
    return same and axes is not None and [int(a) % (last + 1) for a in axes] == [last]


def _where(
    tracer: Tracer, node: onnx.NodeProto, ref: Ref, factor: float, found: Scores
) -> list[tuple[Ref, float]]:
    condition, first, second = (tracer.operand(n, ref.coords) for n in node.input)
    for hidden, kept, positive in ((second, first, True), (first, second, False)):
        if is_hidden(tracer, hidden.value):
            found.masks.extend(boolean(tracer, condition, positive=positive))
            return [(kept, factor)]
    raise Stop(
        "Where on the score path chooses between two scores; expected one branch to be -inf"
        " or a large negative constant",
        ref.value,
    )


def scatters_where(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Ref | None:
    """The bool mask of `x[mask] = -inf`, exported as NonZero, Transpose, ScatterND."""
    index = tracer.index
    chain = index.origin(node.input[1])
    if chain is None or chain.op_type != "Transpose":
        return None
    nonzero = index.origin(chain.input[0])
    if nonzero is None or nonzero.op_type != "NonZero" or not is_hidden(tracer, node.input[2]):
        return None
    mask = nonzero.input[0]
    return Ref(mask, ref.coords) if tracer.shape(mask) == tracer.shape(ref.value) else None


def sums_products(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether this is (a * b).sum(axis), a contraction written out."""
    made = index.origin(node.input[0]) if node.op_type == "ReduceSum" else None
    return made is not None and made.op_type == "Mul"


def _leads_to_product(tracer: Tracer, value: str) -> bool:
    """Whether a contraction is upstream of `value`, not counting what only decides a mask."""
    seen: set[str] = set()
    stack = [value]
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        tracer.spend(name)
        node = tracer.index.node_of(name)
        if node is None or node.op_type in _NOT_FOLLOWED:
            continue
        if node.op_type in _CONTRACTIONS or sums_products(tracer.index, node):
            return True
        stack.extend(node.input[1:] if node.op_type == "Where" else node.input[:1])
        if node.op_type in ("Add", "Sub", "Mul", "Div", "Sum", "Concat", "Min", "Max"):
            stack.extend(node.input[1:])
    return False
