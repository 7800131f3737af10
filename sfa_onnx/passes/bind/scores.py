"""Scores to products and masks: scores = sum_i factor_i <Q_i, K_i>, hidden where a mask says so."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.trace import Dot, Move, Ref, Scaled, Stop, Tracer
from sfa_onnx.passes.bind.literals import Literal
from sfa_onnx.passes.bind.mask import HIDDEN, additive, boolean, scatters_where, unswitched
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["Scores", "Term", "read_scores", "sums_products"]

_CONTRACTIONS = frozenset(
    ("MatMul", "Einsum", "FusedMatMul", "Gemm", "Attention", "MatMulInteger", "QLinearMatMul")
)
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
    products: list[str] = field(default_factory=list)  # every value that holds part of a score


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
        raise Stop("no product of queries and keys leads to the scores", ref.value, _PRODUCT_HINT)
    return found


def _one(tracer: Tracer, ref: Ref, factor: float, found: Scores) -> list[tuple[Ref, float]]:
    """Peel one operation; returns what is to be peeled next."""
    node = tracer.index.node_of(ref.value)
    if node is None:
        raise Stop(f"the scores {ref.value} enter the graph ready-made", ref.value, _PRODUCT_HINT)
    if node.op_type in ("Add", "Sum", "Sub"):
        return _added(tracer, node, ref, factor, found)
    if node.op_type == "Where":
        step = tracer.step(ref)
        if isinstance(step, Move):  # a NaN guard
            return [(step.ref, factor)]
        return _where(tracer, node, ref, factor, found)
    if (
        node.op_type == "ScatterND"
        and factor > 0
        and (mask := scatters_where(tracer, node, ref)) is not None
    ):
        found.masks.extend(boolean(tracer, mask, positive=False))
        return [(Ref(node.input[0], ref.coords), factor)]
    step = tracer.step(ref)
    if isinstance(step, Move):
        return [(step.ref, factor)]
    if not isinstance(step, Dot | Scaled):
        step = _uniform(tracer, node, ref) or step
    if isinstance(step, Scaled):
        if step.factor == 0:
            raise Stop(
                "scores are multiplied by 0, which is not positive",
                ref.value,
                "expected a positive scale",
            )
        return [(step.ref, factor * step.factor)]
    if isinstance(step, Dot):
        found.terms.append(Term(step.a, step.b, step.label, factor * step.factor, ref.value))
        return []
    raise _unknown(tracer, node, ref)


def _uniform(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Scaled | None:
    """Scores times, or divided by, a constant tensor that holds one number everywhere."""
    if node.op_type not in ("Mul", "Div"):
        return None
    for own, other in ((0, 1), (1, 0))[: 1 if node.op_type == "Div" else 2]:
        number = tracer.fill(node.input[other])
        if number is None or not _leads_to_product(tracer, node.input[own]):
            continue
        again = tracer.other.value(node.input[other])
        if again is not None and not bool((again == number).all()):
            continue  # it depends on a size that differs from run to run
        factor = number if node.op_type == "Mul" or not number else 1 / number
        return Scaled(tracer.operand(node.input[own], ref.coords), factor)
    return None


_PRODUCT_HINT = "export the products of queries and keys together with the softmax"
_KNOWN = {
    "Tanh": "a soft-cap",
    "Clip": "a clip",
    "Min": "a clip",
    "Max": "a clip",
    "Gemm": "a product with a bias (its third input)",
    "Dropout": "active in this graph (training mode)",
    "MatMulInteger": "a product of rounded integers",
    "QLinearMatMul": "a product of rounded integers",
    "DequantizeLinear": "a product of rounded integers",
}


def _unknown(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Stop:
    where = tracer.index.label(tracer.index.producer[ref.value])
    if node.op_type in ("Mul", "Div"):
        others = [n for n in node.input if not _leads_to_product(tracer, n)]
        if not others:
            return Stop(
                f"scores are multiplied by scores ({where})",
                ref.value,
                "the operator's scores are linear in the query",
            )
        verb = "multiply" if node.op_type == "Mul" else "divide"
        return Stop(
            f"the scores are scaled by {others[0]}, which is not a constant number ({where})",
            ref.value,
            f"{verb} the query by {others[0]} in front of the product, or export with it fixed: the"
            " operator's scale_value is one number",
        )
    if node.op_type == "Concat":
        scores = [n for n in node.input if _leads_to_product(tracer, n)]
        if len(scores) == len(node.input):
            return Stop(
                f"Concat {where} joins the scores of {len(scores)} products",
                ref.value,
                "compute the scores of all heads and keys in one product",
            )
        return Stop(
            f"Concat on the score path is an extra column (a sink?) ({where})",
            ref.value,
            "the operator takes one sink per head, a tensor [N1], joined to the scores as it is",
        )
    what = _KNOWN.get(node.op_type, "not part of softmax(scale * q.k + mask)")
    return Stop(
        f"{node.op_type} on the score path is {what} ({where})",
        ref.value,
        "only products, constant factors, masks of 0 and -inf, casts and views may make the scores",
    )


def _added(
    tracer: Tracer, node: onnx.NodeProto, ref: Ref, factor: float, found: Scores
) -> list[tuple[Ref, float]]:
    operands = [tracer.operand(name, ref.coords) for name in node.input]
    scores = [o for o in operands if _leads_to_product(tracer, o.value)]
    if node.op_type == "Sub" and _less_maximum(tracer, node) and factor > 0:
        return [(operands[0], factor)]
    if not scores:
        raise Stop(f"no product of queries and keys leads to {ref.value}", ref.value, _PRODUCT_HINT)
    left = []
    for position, operand in enumerate(operands):
        own = -factor if node.op_type == "Sub" and position else factor
        if operand in scores:
            left.append((operand, own))
        else:
            found.masks.extend(additive(tracer, operand, negated=own < 0))
    return [(unswitched(tracer, operand, found.masks), own) for operand, own in left]


def _less_maximum(tracer: Tracer, node: onnx.NodeProto) -> bool:
    """S - max(s) over the last axis, which a softmax over that axis does not see."""
    index = tracer.index
    top = index.real_maker(node.input[1])
    if top is None or top.op_type != "ReduceMax" or not attributes(top).get("keepdims", 1):
        return False
    given = index.constant(top.input[1]) if len(top.input) > 1 and top.input[1] else None
    axes = attributes(top).get("axes") if given is None else np.asarray(given).reshape(-1).tolist()
    last = len(tracer.shape(node.input[0])) - 1
    same = index.unaliased(top.input[0]) == index.unaliased(node.input[0])
    return same and axes is not None and [int(a) % (last + 1) for a in axes] == [last]


def _where(
    tracer: Tracer, node: onnx.NodeProto, ref: Ref, factor: float, found: Scores
) -> list[tuple[Ref, float]]:
    condition, first, second = (tracer.operand(n, ref.coords) for n in node.input)
    for hidden, kept, positive in ((second, first, True), (first, second, False)):
        fill = tracer.fill(hidden.value)
        if fill is not None and math.copysign(fill, fill * factor) < HIDDEN:
            found.masks.extend(boolean(tracer, condition, positive=positive))
            return [(kept, factor)]
    where = tracer.index.label(tracer.index.producer[ref.value])
    numbers = [n for n in map(tracer.fill, node.input[1:]) if n is not None]
    if numbers:
        raise Stop(
            f"Where {where} puts {numbers[0]:g} in place of scores, which does not hide them",
            ref.value,
            f"hide scores by -inf, or by a number below {HIDDEN:g}",
        )
    raise Stop(
        f"Where {where} on the score path chooses between two scores",
        ref.value,
        "expected one branch to be -inf or a large negative constant",
    )


def sums_products(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether this is (a * b).sum(axis), a contraction written out."""
    made = index.real_maker(node.input[0]) if node.op_type == "ReduceSum" else None
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
