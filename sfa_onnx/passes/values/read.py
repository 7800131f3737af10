"""From the graph to terms: what an element of a tensor is, as far as scores decide it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.reduced import reduced
from sfa_onnx.passes.axes.trace import Dot, Move, Pieces, Ref, Scaled, Tracer
from sfa_onnx.passes.axes.writes import assigned_where
from sfa_onnx.passes.graph.kinds import LAYOUT
from sfa_onnx.passes.shapes.kept import kept_mask
from sfa_onnx.passes.values.arithmetic import LOW
from sfa_onnx.passes.values.attention_op import attention_term, is_attention
from sfa_onnx.passes.values.identity import Normal
from sfa_onnx.passes.values.kept import over_kept
from sfa_onnx.passes.values.pointwise import POINTWISE
from sfa_onnx.passes.values.terms import Term, dot, element, number

__all__ = ["INNER", "Reader"]

_T = onnx.TensorProto
INNER: Final = "inner"  # name of the label that a product of queries and keys is summed over
_REDUCE: Final = {
    "ReduceSum": "sum",
    "ReduceMax": "maximum",
    "ReduceMin": "minimum",
    "ReduceLogSumExp": "sum",
    "ReduceLogSum": "sum",
    "ReduceL1": "sum",
    "ReduceMean": "sum",
}
_KEYS: Final = ("sum", "maximum")
_COUNTS: Final = ("ReduceSum", "ReduceMax", "ReduceMin")  # of flags
_OF_COUNTS: Final = frozenset(("Cast", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"))


class Reader:
    """Reads elements of one attention as terms.

    Attributes:
        axes: every tensor between the products and the result, with what its axes run over.
        products: (query, key) -> the values that hold their product.
        opaque: operators that were met and have no meaning here: value -> operator.
    """

    def __init__(self, tracer: Tracer, normal: Normal, inner: Collection[str]) -> None:
        """`inner` names the values that depend on scores; all others are leaves."""
        self.tracer, self.n, self.inner = tracer, normal, inner
        self.axes: dict[str, tuple[Expr, ...]] = {}
        self.products: dict[Term, list[str]] = {}
        self.opaque: dict[str, str] = {}
        self.known: dict[Ref, Term] = {}
        self.turned = False  # the smallest are selected: large numbers hide as well

    def term(self, ref: Ref) -> Term:
        """What the element `ref` is.

        Raises:
            Stop: a shape on the way is not known, or the budget is used up.
        """
        if ref not in self.known:
            self.tracer.spend(ref.value)
            inner = ref.value in self.inner
            if inner:
                self.axes.setdefault(ref.value, ref.coords)
            fill = self.tracer.fill(ref.value)
            if fill is not None and self._fixed(ref.value, fill):
                self.known[ref] = self._number(ref, fill)
            else:
                self.known[ref] = self._inner(ref) if inner else self._outer(ref)
        return self.known[ref]

    def holder(self, term: Term, *, exactly: bool = False) -> tuple[Ref, bool] | None:
        """(element that holds a condition, whether as it is) among what was read, outermost first.

        Numbers that are 1 where it holds and else 0 are taken where no tensor of conditions is.
        What the key is called is no matter. `exactly`: not one that holds the opposite.
        """
        opposite = self.n.negate(term)
        for wanted, other in ((term, opposite), (self.n.flag(term), self.n.flag(opposite))):
            for ref, known in reversed(self.known.items()):
                swap = _renamed(known, wanted)
                own = known.rename(swap, self.n.make) if swap else known
                if own == wanted or (own == other and not exactly):
                    return ref.substitute(swap), own == wanted
        return None

    # -- values that scores do not decide -------------------------------------------------------

    def _outer(self, ref: Ref) -> Term:
        """A flag made of a condition, or a leaf."""
        tracer = self.tracer
        node = tracer.index.maker(ref.value)
        if node is None:
            return element(ref)
        if self.is_bool(ref.value):
            return self._condition(node, ref)
        if node.op_type == "Cast" and self.is_bool(node.input[0]):
            return self.n.flag(self.term(Ref(node.input[0], ref.coords)))
        if node.op_type in LAYOUT and isinstance(step := tracer.step(ref), Move):
            return self.term(step.ref)
        if node.op_type == "Exp":  # of a sink
            return self.n.exp(*self.operands(node, ref))
        found: Term | None = None
        if node.op_type in ("Add", "Sub", "Mul", "Neg"):
            found = POINTWISE[node.op_type](self, node, ref)
        elif node.op_type in _COUNTS:
            found = self._reduced(node, ref)
        return element(ref) if found is None or not self._of_conditions(found) else found

    def _of_conditions(self, term: Term) -> bool:
        """Whether all leaves are conditions, none a number that is not known."""
        leaves = [t for t in term.walk() if t.op in ("element", "dot")]
        return all(t.op == "element" and self.is_bool(t.ref.value) for t in leaves)

    def _condition(self, node: onnx.NodeProto, ref: Ref) -> Term:
        if node.op_type in ("Not", "And"):
            return POINTWISE[node.op_type](self, node, ref)
        views = node.op_type in LAYOUT or node.op_type == "Cast"
        step = self.tracer.step(ref) if views else None
        if isinstance(step, Move):
            return self.term(step.ref)
        if node.op_type == "Cast" and self.is_bool(node.input[0]):
            return self.term(Ref(node.input[0], ref.coords))
        return self._of_row(node, ref)

    def _of_row(self, node: onnx.NodeProto, ref: Ref) -> Term:
        """Whether a row sees any key, or all; a leaf where a condition says something else."""
        if node.op_type in _COUNTS:
            found = self._reduced(node, ref)
        elif node.op_type in _OF_COUNTS:
            found = POINTWISE[node.op_type](self, node, ref)
        else:
            return element(ref)
        own = found.args[0] if found.op == "not" else found
        return found if own.op in ("any", "all") and self._of_conditions(found) else element(ref)

    def _fixed(self, value: str, fill: float) -> bool:
        """Whether a number does not depend on the sizes of the inputs."""
        if self.tracer.fill(value, folded=False) is not None:
            return True
        again = self.tracer.other.value(value)
        return again is None or bool((again == fill).all())

    def _number(self, ref: Ref, fill: float) -> Term:
        if self.is_bool(ref.value):
            return Term("true" if fill else "false")
        self.hiding(fill)
        return number(fill)

    def hiding(self, fill: float) -> None:
        """Note a number that hides keys: rows that see none are NaN where it is -inf."""
        low = -abs(fill) if self.turned else fill
        if low < LOW:
            self.tracer.lows.add(low)

    def is_bool(self, value: str) -> bool:
        """Whether a tensor holds conditions."""
        return self.tracer.sizes.elem_type(value) == _T.BOOL

    # -- values between products and result -----------------------------------------------------

    def _inner(self, ref: Ref) -> Term:
        node = self.tracer.index.maker(ref.value)
        if node is None:
            return element(ref)
        if node.op_type in _REDUCE:
            step = self.tracer.step(ref) if node.op_type == "ReduceSum" else None
            return self._dot(step, ref) if isinstance(step, Dot) else self._reduced(node, ref)
        if (rule := POINTWISE.get(node.op_type)) is not None:
            return rule(self, node, ref)
        if (written := self._assigned(node, ref)) is not None:
            return written
        if node.op_type == "Pad" and (padded := self._padded(node, ref)) is not None:
            return padded
        step = self.tracer.step(ref)
        if isinstance(step, Move):
            return self.term(step.ref)
        if isinstance(step, Scaled):
            return self.n.mul(number(step.factor), self.term(step.ref))
        if isinstance(step, Dot):
            return self._dot(step, ref)
        if isinstance(step, Pieces):
            ranges = tuple((low, high) for low, high, _ in step.parts)
            parts = tuple(self.term(part) for _, _, part in step.parts)
            return self.n.make("pieces", parts, (step.label, ranges))
        if is_attention(node):
            return attention_term(self, node, ref)
        self.opaque[ref.value] = node.op_type
        return element(ref)

    def _dot(self, step: Dot, ref: Ref) -> Term:
        """A product of queries and keys, or a sum of rows that are weighted by scores."""
        sides = [r.value in self.inner for r in (step.a, step.b)]
        by = number(step.factor)
        if not any(sides):
            own = Label(INNER, step.label.size)
            swap = {step.label: Expr.of(own)}
            found = dot(step.a.substitute(swap), step.b.substitute(swap), own)
            self.products.setdefault(found, []).append(ref.value)
            return self.n.mul(by, found)
        terms = [self._factor(r) for r in (step.a, step.b)]
        return self.n.mul(by, self.over("sum", step.label, self.n.mul(*terms)))

    def _factor(self, ref: Ref) -> Term:
        """Weights, flags that are counted, or stored rows."""
        found = self.term(ref)
        kept = ref.value in self.inner or found.op == "element" or _of_flags(found)
        return found if kept else element(ref)

    def _assigned(self, node: onnx.NodeProto, ref: Ref) -> Term | None:
        """X[mask] = y: y where the mask says so, else x."""
        found = assigned_where(self.tracer, node, ref)
        if found is None:
            return None
        mask, update = found
        data = self.term(Ref(node.input[0], ref.coords))
        return self.n.where(self.term(mask), self.term(update), data)

    def _padded(self, node: onnx.NodeProto, ref: Ref) -> Term | None:
        """A number in front of or behind the elements of one axis: a Concat."""
        sizes, rank = self.tracer.sizes, len(ref.coords)
        pads = sizes.value(node.input[1]) if len(node.input) > 1 else None
        given = [n for n in node.input[2:3] if n]
        fill = self.tracer.fill(given[0]) if given else 0.0
        plain = attributes(node).get("mode", b"constant") in (b"constant", "constant")
        if pads is None or fill is None or not plain or any(node.input[3:]) or pads.min() < 0:
            return None
        wide = [i for i in range(rank) if pads[i] or pads[i + rank]]
        position = ref.coords[wide[0]] if len(wide) == 1 else Expr()
        if position.bounds is None or len(wide) != 1:
            return None
        self.hiding(fill)
        first, size = int(pads[wide[0]]), self.tracer.shape(node.input[0])[wide[0]]
        own = list(ref.coords)
        own[wide[0]] = position + -first
        inner = self.term(Ref(node.input[0], tuple(own)))
        parts = ((0, first, number(fill)), (first, first + size, inner))
        end = self.tracer.shape(ref.value)[wide[0]]
        return self._ranges(position, (*parts, (first + size, end, number(fill))))

    def _ranges(self, position: Expr, parts: Sequence[tuple[int, int, Term]]) -> Term | None:
        """The term of the range that a position lies in, or pieces along its label."""
        low, high = position.bounds or (0, 0)
        for start, stop, term in parts:
            if start <= low and high < stop:
                return term
        label = position.terms[0][0]
        if len(position.terms) != 1 or position.terms[0][1] != 1 or not isinstance(label, Label):
            return None
        shift, last = position.const, label.size
        cut = [(max(a - shift, 0), min(b - shift, last), term) for a, b, term in parts]
        kept = [(a, b, term) for a, b, term in cut if a < b]
        ranges = tuple((a, b) for a, b, _ in kept)
        return self.n.make("pieces", tuple(term for _, _, term in kept), (label, ranges))

    def _reduced(self, node: onnx.NodeProto, ref: Ref) -> Term:
        found = reduced(self.tracer, node, ref)
        if found is None:
            self.opaque[ref.value] = node.op_type
            return element(ref)
        inner, labels = found
        body, kind = self.term(inner), _REDUCE[node.op_type]
        if self.is_bool(inner.value):
            kind = {"maximum": "any", "minimum": "all"}[kind]
        if node.op_type == "ReduceLogSumExp":
            body = self.n.exp(body)
        if node.op_type == "ReduceMean":
            if any(self.tracer.open(label.size) for label in labels):
                self.opaque[ref.value] = node.op_type
                return element(ref)
            body = self.n.mul(number(1 / math.prod(label.size for label in labels)), body)
        for label in reversed(labels):
            body = self.over(kind, label, body)
        return self.n.log(body) if node.op_type in ("ReduceLogSumExp", "ReduceLogSum") else body

    def over(self, kind: str, label: Label, body: Term) -> Term:
        """A reduction over an axis; an axis of one element is that element.

        Unless it is that of the keys: where there is one, its weight is that of a softmax all the
        same.
        """
        if (mask := kept_mask(label.size)) and label in body.labels:
            found = over_kept(self, kind, label, mask, body)
            if found is not None:
                return found
        one = label.size == 1 or (label not in body.labels and kind != "sum")
        if one and not (label.size == 1 and kind in _KEYS and _of_one_key(body)):
            return body
        return self.n.make(kind, (body,), label)

    def operands(self, node: onnx.NodeProto, ref: Ref) -> list[Term]:
        """What a pointwise operator computes with."""
        return [self.term(self.tracer.operand(name, ref.coords)) for name in node.input if name]


def _renamed(term: Term, wanted: Term) -> dict[Label, Expr]:
    """What makes the labels of a term those of another, where one differs."""
    if term.op not in (wanted.op, "and", "or", "not"):
        return {}
    mine, theirs = term.labels - wanted.labels, wanted.labels - term.labels
    if len(mine) != 1 or len(theirs) != 1:
        return {}
    (own,), (other,) = mine, theirs
    return {own: Expr.of(other)} if own.size == other.size else {}


def _of_one_key(body: Term) -> bool:
    """Whether scores that nothing is summed of make a term."""
    return body.height == 0 and any(t.op == "dot" for t in body.walk())


def _of_flags(term: Term) -> bool:
    parts = term.args if term.op == "mul" else (term,)
    return all(p.op in ("flag", "number") for p in parts)
