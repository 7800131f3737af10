"""What each pointwise operator computes, as a term; softmax is exponentials over their sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Protocol

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.expr import Expr, Label, fresh
from sfa_onnx.passes.axes.named import axis_of
from sfa_onnx.passes.axes.trace import Ref, Tracer, is_float
from sfa_onnx.passes.values.identity import Normal
from sfa_onnx.passes.values.terms import ONE, ZERO, Term, element, number

__all__ = ["POINTWISE", "Reads"]

_T = onnx.TensorProto
_ALIKE: Final = ("Abs", "Exp", "Log", "Max", "Min", "Where", "And", "Or", "Not")  # named alike
_RATES: Final = {"LeakyRelu": 0.01, "Selu": 1.67326319217681884765625}  # where no alpha is given
_GAMMA: Final = 1.05070102214813232421875
_MOST: Final[dict[int, float]] = {
    _T.FLOAT16: 65504.0, _T.BFLOAT16: 3.38e38, _T.FLOAT: 3.4e38, _T.DOUBLE: 1.79e308,
}  # fmt: skip


class Reads(Protocol):
    """What the rules ask of a reader."""

    tracer: Tracer
    n: Normal
    opaque: dict[str, str]

    def term(self, ref: Ref) -> Term:
        """What an element is."""

    def operands(self, node: onnx.NodeProto, ref: Ref) -> list[Term]:
        """What a pointwise operator computes with."""

    def over(self, kind: str, label: Label, body: Term) -> Term:
        """A reduction over an axis."""


_Rule = Callable[[Reads, onnx.NodeProto, Ref], Term]


def _plain(op: str) -> _Rule:
    def rule(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
        return r.n.make(op, tuple(r.operands(node, ref)))

    return rule


def _difference(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    a, b = r.operands(node, ref)
    return r.n.add(a, r.n.mul(number(-1), b))


def _quotient(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    a, b = r.operands(node, ref)
    return r.n.mul(a, r.n.power(b, -1))


def _negative(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    return r.n.mul(number(-1), *r.operands(node, ref))


def _inverse(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    (x,) = r.operands(node, ref)
    return r.n.power(x, -1)


def _power(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    base, by = r.operands(node, ref)
    if base.is_number() and base.value > 0:
        # a rounded e counts as e
        rate = 1.0 if abs(base.value - math.e) < 1e-6 else math.log(base.value)
        return r.n.exp(r.n.mul(number(rate), by))
    if by.is_number() and by.value == int(by.value):
        return r.n.power(base, int(by.value))
    r.opaque[ref.value] = node.op_type
    return element(ref)


def _greater(op: str) -> _Rule:
    def rule(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
        a, b = r.operands(node, ref)
        return r.n.make(op, (b, a))

    return rule


def _equal(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    a, b = r.operands(node, ref)
    if a == b and not a.is_number():  # x == x, but for NaN
        return r.n.negate(r.n.make("isnan", (a,)))
    return r.n.make("eq", (a, b))


def _infinite(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    (x,), a = r.operands(node, ref), attributes(node)
    ends = [number(math.inf)] if a.get("detect_positive", 1) else []
    ends += [number(-math.inf)] if a.get("detect_negative", 1) else []
    return r.n.make("or", tuple(r.n.make("eq", (x, end)) for end in ends))


def _cast(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    source = r.tracer.sizes.elem_type(node.input[0])
    target = r.tracer.sizes.elem_type(ref.value)
    inner = r.term(Ref(node.input[0], ref.coords))
    if is_float(source) and not (is_float(target) or target == _T.BOOL) and _of_scores(inner):
        r.opaque[ref.value] = "a cast to whole numbers"
        return element(ref)
    if (source == _T.BOOL) == (target == _T.BOOL):
        return inner
    return r.n.flag(inner) if source == _T.BOOL else r.n.negate(r.n.make("eq", (inner, ZERO)))


def _of_scores(term: Term) -> bool:
    """Whether a number is made of products, which are no whole numbers."""
    return any(t.op == "dot" for t in term.walk())


def _clip(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    a = attributes(node)
    found = r.term(Ref(node.input[0], ref.coords))
    for i, (op, name) in enumerate((("max", "min"), ("min", "max")), 1):
        given = node.input[i] if len(node.input) > i else ""
        end = number(a[name]) if name in a else r.term(Ref(given, ())) if given else None
        if end is None or (op == "min" and end.is_number() and end.value >= _most(r, ref)):
            continue
        found = r.n.make(op, (end, found))
    return found


def _most(r: Reads, ref: Ref) -> float:
    """The largest finite number of a tensor's type: a ceiling that no finite number meets."""
    return _MOST.get(r.tracer.sizes.elem_type(ref.value), math.inf)


def _leaky(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    """An activation that lets nothing through below 0, as its attributes or its slope say."""
    a, rate = attributes(node), _RATES.get(node.op_type, 1.0)
    slope = a.get("alpha", rate) if node.op_type != "PRelu" else r.tracer.fill(node.input[1])
    if slope != 0.0 or a.get("gamma", 1.0) <= 0:
        r.opaque[ref.value] = node.op_type
        return element(ref)
    own = r.n.make("max", (ZERO, r.term(Ref(node.input[0], ref.coords))))
    gamma = a.get("gamma", _GAMMA) if node.op_type == "Selu" else 1.0
    return r.n.mul(number(gamma), own)


def _softmax(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    axis = _last(r, node, ref)
    if axis is None:
        r.opaque[ref.value] = node.op_type
        return element(ref)
    scores = r.term(Ref(node.input[0], ref.coords))
    label = fresh("r", r.tracer.shape(node.input[0])[axis])
    coords = (*ref.coords[:axis], Expr.of(label), *ref.coords[axis + 1 :])
    total = r.over("sum", label, r.n.exp(r.term(Ref(node.input[0], coords))))
    if node.op_type == "LogSoftmax":
        return r.n.add(scores, r.n.mul(number(-1), r.n.log(total)))
    return r.n.mul(r.n.exp(scores), r.n.power(total, -1))


def _last(r: Reads, node: onnx.NodeProto, ref: Ref) -> int | None:
    """The axis of a Softmax; before opset 13 only the last one is an axis of its own."""
    new, rank = r.tracer.index.opsets.get("", 18) >= 13, len(ref.coords)
    axis = axis_of(node, rank, -1 if new else 1)
    return axis if new or axis == rank - 1 else None


def _normalised(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    """Exponentials over their sum, as one node."""
    a, axis = attributes(node), axis_of(node, len(ref.coords), -1)
    if a.get("p", 2) != 1:
        r.opaque[ref.value] = node.op_type
        return element(ref)
    label = fresh("r", r.tracer.shape(node.input[0])[axis])
    coords = (*ref.coords[:axis], Expr.of(label), *ref.coords[axis + 1 :])
    total = r.over("sum", label, r.term(Ref(node.input[0], coords)))
    return r.n.mul(r.term(Ref(node.input[0], ref.coords)), r.n.power(total, -1))


def _sigmoid(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    (x,) = r.operands(node, ref)
    return r.n.power(r.n.add(ONE, r.n.exp(r.n.mul(number(-1), x))), -1)


def _softplus(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    return r.n.log(r.n.add(ONE, r.n.exp(*r.operands(node, ref))))


def _relu(r: Reads, node: onnx.NodeProto, ref: Ref) -> Term:
    return r.n.make("max", (ZERO, *r.operands(node, ref)))


POINTWISE: Final[dict[str, _Rule]] = {
    **{op: _plain(name) for op, name in (("Add", "add"), ("Sum", "add"), ("Mul", "mul"))},
    **{op: _plain(op.lower()) for op in _ALIKE},
    **{op: _plain(name) for op, name in (("Less", "lt"), ("LessOrEqual", "le"))},
    **{op: _greater(name) for op, name in (("Greater", "lt"), ("GreaterOrEqual", "le"))},
    "IsNaN": _plain("isnan"),
    "IsInf": _infinite,
    "Equal": _equal,
    "Sub": _difference,
    "Div": _quotient,
    "Neg": _negative,
    "Reciprocal": _inverse,
    "Pow": _power,
    "Cast": _cast,
    "Clip": _clip,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "LpNormalization": _normalised,
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Relu": _relu,
    **dict.fromkeys(("Elu", "LeakyRelu", "PRelu", "Selu", "ThresholdedRelu"), _leaky),
}
