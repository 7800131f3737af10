"""Masks as terms: whatever a graph computes from conditions, moves, joins or writes.

A tensor of conditions, of numbers 0 and 1, or of numbers that are 0 or hide, is read down to what
cannot be looked into: masks that are fed, comparisons of positions, and indices that point at keys.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from sfa_onnx.passes.axes.trace import Move, Pieces, Ref, Stop, Tracer, is_float
from sfa_onnx.passes.graph.kinds import COMPARISONS, LAYOUT, ORDERS
from sfa_onnx.passes.values.arithmetic import LOW, factors
from sfa_onnx.passes.values.pointwise import POINTWISE
from sfa_onnx.passes.values.read import Reader
from sfa_onnx.passes.values.table import normal
from sfa_onnx.passes.values.terms import ZERO, Term, element, index, number
from sfa_onnx.passes.values.written import equal_positions, is_hit, ranges, written

__all__ = ["Conditions", "Held", "is_number_mask", "positions_compared"]

_NUMBERS: Final = frozenset(("Add", "Sum", "Sub", "Mul", "Neg", "Min", "Max", "Log", "Where"))
_LOGIC: Final = frozenset(("And", "Not", "Or", "IsInf", "Where"))
_REDUCED: Final = frozenset(("ReduceMax", "ReduceMin", "ReduceSum"))
_LOW: Final = number(LOW)

Held = tuple[Ref, bool, bool]  # element, whether it is as it is, whether it is 0 or 1 (else a mask)


def _hides_rows(table: NDArray[Any]) -> bool:
    """Whether all of a row along the last axis that has one is hidden, and not by -inf."""
    wide = [n for n in table.shape if n != 1]
    if len(wide) < 2 or 0 in wide:
        return False
    rows = table.reshape(-1, wide[-1])
    return bool(((rows < LOW) & np.isfinite(rows)).all(axis=-1).any())


class Conditions(Reader):
    """Reads masks: numbers that are 0 or 1 are flags, numbers that hide are 0 or very low."""

    def __init__(self, tracer: Tracer) -> None:
        """No tensor depends on scores."""
        super().__init__(tracer, normal(), ())

    def _outer(self, ref: Ref) -> Term:
        node = self.tracer.index.maker(ref.value)
        if node is None:
            return self._leaf(ref)
        if node.op_type in LAYOUT and isinstance(step := self.tracer.step(ref), Move):
            return self.term(step.ref)
        if node.op_type == "Cast":
            return self._cast(node, ref)
        if node.op_type == "ScatterND" and (assigned := self._assigned(node, ref)) is not None:
            return assigned
        found = self._logic(node, ref) if self.is_bool(ref.value) else self._numbers(node, ref)
        if found is None and node.op_type not in POINTWISE:
            found = self._moved(node, ref)
        return self._leaf(ref) if found is None else found

    def _cast(self, node: onnx.NodeProto, ref: Ref) -> Term:
        given = self.tracer.index.is_given(node.input[0])
        if given and self.is_bool(ref.value) and not self.is_bool(node.input[0]):
            return self._leaf(ref)  # numbers from outside are made conditions here
        inner = self.term(Ref(node.input[0], ref.coords))
        if self.is_bool(node.input[0]):
            return inner if self.is_bool(ref.value) else self.n.flag(inner)
        if self._is_float(node.input[0]) and self._is_float(ref.value):
            return inner
        found = POINTWISE["Cast"](self, node, ref)
        return found if _settled(found) else self._leaf(ref)

    def _logic(self, node: onnx.NodeProto, ref: Ref) -> Term | None:
        if node.op_type in _REDUCED:
            return self._reduced(node, ref)
        if node.op_type == "Equal" and (hit := equal_positions(self, node, ref)) is not None:
            return hit
        if node.op_type not in COMPARISONS | _LOGIC:
            return None
        found = POINTWISE[node.op_type](self, node, ref)
        return found if _settled(found) else None

    def _numbers(self, node: onnx.NodeProto, ref: Ref) -> Term | None:
        if node.op_type in _REDUCED:
            found = self._reduced(node, ref)
            return None if _raw(found) else self._named_once(found)
        if node.op_type not in _NUMBERS:
            return None
        if node.op_type == "Max":
            found = self.n.make("max", tuple(x for x in self.operands(node, ref) if not _low(x)))
        else:
            found = POINTWISE[node.op_type](self, node, ref)
        return found if self._is_float(ref.value) or not _raw(found) else None

    def _named_once(self, term: Term) -> Term:
        """Entries that point here, counted: one or none, as long as no key is named twice.

        Where keys may be, verification names some twice.
        """
        parts = [
            self.n.flag(self.n.make("any", f.args[0].args, f.data))
            if f.op == "sum" and f.args[0].op == "flag" and _hits(f.args[0])
            else f
            for f in factors(term)
        ]
        return self.n.mul(*parts)

    def _moved(self, node: onnx.NodeProto, ref: Ref) -> Term | None:
        """What is cut out, joined or written; None where it has to be read as it is."""
        step = self.tracer.step(ref)
        if isinstance(step, Move):
            inner = self.term(step.ref)
            if _bare(inner) and (self.is_bool(ref.value) or inner.op != "element"):
                return None
            reads = any(c.reads for c in step.ref.coords)
            return None if reads and self.is_bool(ref.value) else inner
        return ranges(self, step) if isinstance(step, Pieces) else written(self, node, ref)

    def _leaf(self, ref: Ref) -> Term:
        """What is not looked into: a condition, as a flag or a mask where numbers are such."""
        own = element(ref)
        if self.is_bool(ref.value):
            return own
        if self._is_float(ref.value) and self._hides(ref):
            return self.n.where(Term("lt", (_LOW, own)), ZERO, number(-math.inf))
        zero_one = ref.value in self.tracer.flags or self._is_table(ref.value)
        return self.n.flag(own) if zero_one else own

    def _is_float(self, value: str) -> bool:
        return is_float(self.tracer.sizes.elem_type(value))

    def _hides(self, ref: Ref) -> bool:
        """Whether a tensor holds 0 and numbers that hide only."""
        tracer = self.tracer
        if ref.value in tracer.masks:
            self.hiding(-math.inf)
            return True
        if ref.value in tracer.joined:  # one mask per chunk of keys
            parts = [part for part, _ in tracer.joined[ref.value].parts]
            return all(_is_mask(self.term(part)) for part in parts)
        node = tracer.index.maker(ref.value)
        if ref.value in tracer.index.initializers or (node and node.op_type == "Constant"):
            table = tracer.index.mask_table(ref.value)
            if table is None or not bool(((table == 0) | (table < LOW)).all()):
                return False
            if _hides_rows(table):
                raise Stop(
                    f"the table {ref.value} hides every key of a row by finite numbers: what was an"
                    " average of those keys would be zeros",
                    ref.value,
                    "hide such rows by -inf, or leave them out of the table",
                )
            self.hiding(float(table.min(initial=0.0)))
            return True
        if node is not None and node.op_type == "Trilu":
            fill = tracer.fill(node.input[0])  # the other triangle is 0
            self.hiding(fill or 0.0)
            return fill is not None and fill < LOW
        step = tracer.step(ref) if node is not None else None
        return isinstance(step, Move) and _is_mask(self.term(step.ref))

    def _is_table(self, value: str) -> bool:
        """Whether a tensor is a constant table of 0 and 1."""
        table = self.tracer.index.mask_table(value) if self.tracer.shape(value) else None
        return table is not None and table.size > 1 and bool(((table == 0) | (table == 1)).all())

    def held(self, term: Term) -> Held | None:
        """Who holds a condition: a tensor of conditions, of flags, or of numbers that hide."""
        if (found := self.holder(term)) is not None:
            return self._unviewed(found[0]), found[1], True
        for ref, known in reversed(self.known.items()):
            if is_number_mask(known) and known.args[0] == term:
                return self._unviewed(ref), True, False
        return None

    def _unviewed(self, ref: Ref) -> Ref:
        """The element that one is a view of, nothing cut."""
        node = self.tracer.index.maker(ref.value)
        step = self.tracer.step(ref) if node is not None and node.op_type in LAYOUT else None
        return self._unviewed(step.ref) if isinstance(step, Move) else ref


def positions_compared(tracer: Tracer, condition: Term) -> Term | None:
    """The a < b of two positions that a condition is; None: it is something else.

    A comparison that is kept as an element, so that the mask stays one tensor, is read here.
    """
    if condition.op == "lt" and all(a.op == "index" for a in condition.args):
        return condition
    node = tracer.index.maker(condition.ref.value) if condition.op == "element" else None
    if node is None or node.op_type not in ORDERS:
        return None
    a, b = (tracer.index_value(tracer.operand(n, condition.ref.coords)) for n in node.input)
    a, b = (b, a) if node.op_type.startswith("Greater") else (a, b)
    return Term("lt", (index(a), index(b + 1 if node.op_type.endswith("OrEqual") else b)))


def is_number_mask(term: Term) -> bool:
    """Whether it is 0 under a condition, and hides where that does not hold."""
    return term.op == "where" and term.args[1] == ZERO and _low(term.args[2])


def _is_mask(term: Term) -> bool:
    return is_number_mask(term) or term == ZERO or _low(term)


def _settled(term: Term) -> bool:
    """Whether nothing is compared or chosen any more: only conditions are left."""
    return not any(
        t.op in ("eq", "lt", "le", "isnan", "where") and not _is_leaf(t) for t in term.walk()
    )


def _is_leaf(term: Term) -> bool:
    """Whether a comparison is one that is not looked into."""
    positions = term.op == "lt" and all(a.op == "index" for a in term.args)
    return positions or is_hit(term) or (term.op == "lt" and term.args[0] == _LOW)


def _bare(term: Term) -> bool:
    """Whether a condition, a flag or a mask is that of a single element."""
    if term.op in ("flag", "not") or is_number_mask(term):
        term = term.args[0]
    if term.op == "lt" and term.args[0] == _LOW:
        term = term.args[1]
    return term.op == "element"


def _hits(term: Term) -> bool:
    return any(is_hit(t) for t in term.walk())


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
