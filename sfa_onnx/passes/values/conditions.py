"""Masks as terms: whatever arithmetic a graph spells over conditions.

Leaves are what only other modules know: masks that are fed, comparisons of positions, selections
that are written or counted. All else (casts, sums, products, minima, choices, comparisons with
numbers) is left to the identities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import onnx

from sfa_onnx.passes.axes.trace import Move, Ref, Tracer, is_float
from sfa_onnx.passes.values.arithmetic import LOW
from sfa_onnx.passes.values.identity import Normal
from sfa_onnx.passes.values.pointwise import POINTWISE
from sfa_onnx.passes.values.read import LAYOUT, Reader
from sfa_onnx.passes.values.terms import Term, element

__all__ = ["Conditions"]

_COMPARED: Final = frozenset(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"))
_NUMBERS: Final = frozenset(("Add", "Sum", "Sub", "Mul", "Neg", "Min", "Max", "Log", "Where"))
_LOGIC: Final = frozenset(("And", "Not", "Or", "IsInf", "Where"))
_REDUCED: Final = frozenset(("ReduceMax", "ReduceMin", "ReduceSum"))


class Conditions(Reader):
    """Reads masks: numbers that are 0 or 1 are flags, numbers that hide are 0 or very low."""

    def __init__(
        self,
        tracer: Tracer,
        normal: Normal,
        counts: Callable[[str], bool],
        *,
        reduced: bool = False,
    ) -> None:
        """`counts`: whether a tensor of numbers is 0 or 1; `reduced`: any and all are read too."""
        super().__init__(tracer, normal, ())
        self.counts, self.reduced = counts, reduced

    def _outer(self, ref: Ref) -> Term:
        node = self.tracer.index.maker(ref.value)
        if node is None:
            return self._leaf(ref)
        step = self.tracer.step(ref) if node.op_type in LAYOUT else None
        if isinstance(step, Move):
            return self.term(step.ref)
        if node.op_type == "Cast":
            return self._cast(node, ref)
        if node.op_type == "ScatterND" and (written := self._assigned(node, ref)) is not None:
            return written
        found = self._logic(node, ref) if self.is_bool(ref.value) else self._numbers(node, ref)
        return self._leaf(ref) if found is None else found

    def _leaf(self, ref: Ref) -> Term:
        own = element(ref)
        numbers = not self.is_bool(ref.value) and self.counts(ref.value)
        return self.n.flag(own) if numbers else own

    def _cast(self, node: onnx.NodeProto, ref: Ref) -> Term:
        given = self.tracer.index.is_given(node.input[0])
        if given and self.is_bool(ref.value) and not self.is_bool(node.input[0]):
            return self._leaf(ref)  # numbers from outside are made conditions here
        inner = self.term(Ref(node.input[0], ref.coords))
        if self.is_bool(node.input[0]):
            return inner if self.is_bool(ref.value) else self.n.flag(inner)
        found = POINTWISE["Cast"](self, node, ref)
        return found if self._settled(found) else self._leaf(ref)

    def _logic(self, node: onnx.NodeProto, ref: Ref) -> Term | None:
        if self.reduced and node.op_type in _REDUCED:
            return self._reduced(node, ref)
        if node.op_type not in _COMPARED | _LOGIC:
            return None
        found = POINTWISE[node.op_type](self, node, ref)
        return found if self._settled(found) else None

    def _settled(self, term: Term) -> bool:
        """Whether nothing is compared or chosen any more: only conditions are left."""
        return not any(t.op in ("eq", "lt", "le", "isnan", "where") for t in term.walk())

    def _numbers(self, node: onnx.NodeProto, ref: Ref) -> Term | None:
        if self.reduced and node.op_type in _REDUCED:
            found = self._reduced(node, ref)
            return None if _raw(found) else found
        if node.op_type not in _NUMBERS:
            return None
        if node.op_type == "Max":
            found = self.n.make("max", tuple(x for x in self.operands(node, ref) if not _low(x)))
        else:
            found = POINTWISE[node.op_type](self, node, ref)
        floats = is_float(self.tracer.sizes.elem_type(ref.value))
        return found if floats or not _raw(found) else None


def _raw(term: Term) -> bool:
    """Whether numbers that are not known decide it, other than by conditions."""
    if term.op in ("element", "dot"):
        return True
    if term.op in ("flag", "any", "all"):
        return False
    return any(map(_raw, term.args[1:] if term.op == "where" else term.args))


def _low(term: Term) -> bool:
    """A floor that is as good as -inf, below what is added to scores."""
    return term.is_number() and term.value < LOW
