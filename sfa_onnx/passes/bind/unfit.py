"""Why a term is not the operator's, said of the graph's own operator where it ceases to be.

A term shows what is too much, not which node made it. Values between products and result are asked
in graph order: the first that leaves the form of scores, or has no meaning, is named.
"""

from __future__ import annotations

from typing import Final

import onnx

from sfa_onnx.errors import BudgetError
from sfa_onnx.passes.axes.expr import Expr, fresh
from sfa_onnx.passes.axes.trace import Ref, Stop
from sfa_onnx.passes.bind.site import AttentionRegion
from sfa_onnx.passes.graph.kinds import PRODUCTS
from sfa_onnx.passes.graph.weights import is_weight
from sfa_onnx.passes.values.arithmetic import LOW, addends, coefficient
from sfa_onnx.passes.values.attention import UnclearError
from sfa_onnx.passes.values.read import Reader
from sfa_onnx.passes.values.terms import Term

__all__ = ["unfit"]

_EXPONENTIALS: Final = frozenset(("Exp", "LogSoftmax", "Pow", "Sigmoid", "Softmax", "Softplus"))
_ASIDE: Final = frozenset(
    ("ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMin", "ReduceSum", "Attention")
)  # statistics of scores, and what holds a softmax itself
_SHIFTS: Final = ("maximum", "log")
_KNOWN: Final = {
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


def unfit(reader: Reader, region: AttentionRegion, stop: Stop) -> Stop:
    """The reason of the first node that makes something else of scores or weights, else `stop`."""
    index = reader.tracer.index
    scores, weights = set[str](), set[str]()
    for i in sorted({index.producer[v] for v in region.inner}):
        node = index.nodes[i]
        own = [n for n in node.input if n in region.inner]
        behind = not weights.isdisjoint(own)
        if node.output[0] in reader.opaque:
            return _opaque(reader, node, behind=behind)
        if behind and (mixer := _mixer(reader, node, own)):
            return Stop(
                f"{index.label(i)} mixes the attention weights by {mixer} before the weighted sum",
                node.output[0],
                "only the weighted sum of values may use the weights",
            )
        if behind or node.op_type in _EXPONENTIALS:
            weights.update(node.output)
        elif isinstance(stop, UnclearError) and node.op_type not in _ASIDE and set(own) <= scores:
            term = _term(reader, node.output[0])
            if term is not None and _is_score(term):
                scores.add(node.output[0])
            elif term is not None and (found := _changed(reader, node, own, term)) is not None:
                return found
    return stop


def _mixer(reader: Reader, node: onnx.NodeProto, own: list[str]) -> str:
    """The stored weight that weights or rows are multiplied by."""
    others = [n for n in node.input if n not in own]
    stored = [n for n in others if is_weight(reader.tracer.index, n)]
    return stored[0] if node.op_type in PRODUCTS and stored else ""


def _term(reader: Reader, value: str) -> Term | None:
    try:
        shape = reader.tracer.shape(value)
        return reader.term(Ref(value, tuple(Expr.of(fresh("i", size)) for size in shape)))
    except (Stop, BudgetError):
        return None


def _is_score(term: Term) -> bool:
    """Whether it is a sum of products and tensors, shifted, or hidden by a condition."""
    parts = addends(term)
    known = all(by != 0 and _is_part(rest) for by, rest in map(coefficient, parts))
    return known and not all(a.is_number() for a in parts)


def _is_part(term: Term) -> bool:
    if term.op == "where":
        other = term.args[2]
        return other.is_number() and other.value < LOW and _is_score(term.args[1])
    if term.op == "max":
        return all(a.op in _SHIFTS for a in term.args)
    return term.op in ("dot", "element", "flag", "number", *_SHIFTS)


def _opaque(reader: Reader, node: onnx.NodeProto, *, behind: bool) -> Stop:
    """An operator without a meaning among scores or (`behind` the exponentials) weights."""
    kind, value = node.op_type, node.output[0]
    label = reader.tracer.index.label(reader.tracer.index.producer[value])
    if kind == "Dropout" and behind:
        return Stop(
            f"Dropout {label} drops attention weights (training mode)",
            value,
            "export the model in evaluation mode",
        )
    if behind:
        return Stop(
            f"the attention weights are also used by {kind} {label}, behind the softmax",
            value,
            "only the weighted sum of values may use them",
        )
    what = _KNOWN.get(kind, "not part of softmax(scale * q.k + mask)")
    return Stop(
        f"{kind} on the score path is {what} ({label})",
        value,
        "only products, constant factors, masks of 0 and -inf, casts and views may make the scores",
    )


def _changed(reader: Reader, node: onnx.NodeProto, own: list[str], term: Term) -> Stop | None:
    """What a node does to scores that the operator does not."""
    kind, value = node.op_type, node.output[0]
    label = reader.tracer.index.label(reader.tracer.index.producer[value])
    others = [n for n in node.input if n and n not in own]
    if kind in ("Mul", "Div"):
        return _scaled(kind, label, value, others, term)
    if kind == "Where":
        return _chosen(reader, label, value, node)
    if kind == "Concat":
        if not others:
            return Stop(
                f"Concat {label} joins the scores of {len(own)} products",
                value,
                "compute the scores of all heads and keys in one product",
            )
        return Stop(
            f"Concat on the score path is an extra column (a sink?) ({label})",
            value,
            "the operator takes one sink per head, a tensor [N1], joined to the scores as it is",
        )
    if kind in _KNOWN or kind == "Relu":
        return _opaque(reader, node, behind=False)
    return None


def _scaled(kind: str, label: str, value: str, others: list[str], term: Term) -> Stop:
    if not others:
        return Stop(
            f"scores are multiplied by scores ({label})",
            value,
            "the operator's scores are linear in the query",
        )
    if term.is_number(0.0):
        return Stop(
            f"scores are multiplied by 0, which is not positive ({label})",
            value,
            "expected a positive scale",
        )
    verb = "multiply" if kind == "Mul" else "divide"
    return Stop(
        f"the scores are scaled by {others[0]}, which is not a constant number ({label})",
        value,
        f"{verb} the query by {others[0]} in front of the product, or export with it fixed: the"
        " operator's scale_value is one number",
    )


def _chosen(reader: Reader, label: str, value: str, node: onnx.NodeProto) -> Stop:
    fills = [f for f in map(reader.tracer.fill, node.input[1:]) if f is not None]
    if fills:
        return Stop(
            f"Where {label} puts {fills[0]:g} in place of scores, which does not hide them",
            value,
            f"hide scores by -inf, or by a number below {LOW:g}",
        )
    return Stop(
        f"Where {label} on the score path chooses between two scores",
        value,
        "expected one branch to be -inf or a large negative constant",
    )
