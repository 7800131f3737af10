"""Masks as conjunctions: a key is visible when every literal holds.

A literal is either a selection (the key's position is in a row of an index tensor) or a tensor of
the graph that is read as it is: bool, or float with two values. Nothing is proved about the latter
(causal, padding, packing ...): it is evaluated in the graph at the selected positions.

What a graph computes from conditions is one term (`values/conditions.py`); here it is matched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from sfa_onnx.passes.assume import FLAGS, MASKS
from sfa_onnx.passes.axes.expr import Label
from sfa_onnx.passes.axes.trace import Ref, Stop, Tracer
from sfa_onnx.passes.bind.literals import Kept, Literal, Visible
from sfa_onnx.passes.bind.union import bound, selected
from sfa_onnx.passes.values.arithmetic import LOW, addends, all_flags, coefficient, factors
from sfa_onnx.passes.values.conditions import Conditions
from sfa_onnx.passes.values.terms import FALSE, ONE, TRUE, ZERO, Term, dot, number

__all__ = ["Masks", "additive", "boolean"]

_SCORE: Final = dot(Ref("", ()), Ref("", ()), Label("", 1))  # that a mask is added to
_MADE: Final = ("any", "all", "eq", "not")  # what selections and their negations are


def boolean(tracer: Tracer, ref: Ref, *, positive: bool) -> list[Literal]:
    """Literals whose conjunction is `ref` == positive (numbers are 0 or 1)."""
    masks = Masks(tracer)
    masks.take(*masks.shown(ref, positive=positive))
    return masks.literals()


def additive(tracer: Tracer, ref: Ref) -> list[Literal]:
    """The literals of a float tensor that is added to scores: 0 where visible, else very low."""
    masks = Masks(tracer)
    masks.take(*masks.added(ref))
    return masks.literals()


class Masks:
    """The conditions that keys are seen under, as they are met.

    Attributes:
        reader: of their tensors.
        found: every condition, and the mask that it is part of.
    """

    def __init__(self, tracer: Tracer) -> None:
        self.tracer, self.reader = tracer, Conditions(tracer)
        self.found: dict[Term, Visible] = {}
        self._whole: dict[Ref, Term] = {}  # what masks are made of

    def take(self, condition: Term, mask: Visible) -> None:
        """A condition that a mask is, or is made of."""
        self._whole.setdefault(mask.ref, condition)
        for part in condition.args if condition.op == "and" else (condition,):
            if part.op != "true":
                self.found.setdefault(part, mask)

    def shown(self, ref: Ref, *, positive: bool) -> tuple[Term, Visible]:
        """Where a mask shows: where it is `positive`; numbers are 0 or 1.

        Raises:
            Stop: it may hold other numbers.
        """
        self.tracer.spend(ref.value)
        n, term = self.reader.n, self.reader.term(ref)
        if not self.reader.is_bool(ref.value):
            flags = all_flags(n, term)
            if flags is None and term not in (ZERO, ONE):
                raise _unread(self.tracer, ref)
            term = flags or (FALSE if term == ZERO else TRUE)
        return term if positive else n.negate(term), Visible(ref, positive)

    def added(self, ref: Ref, *, negated: bool = False) -> tuple[Term, Visible]:
        """Where a mask shows that is added to scores (`negated`: taken from them).

        Raises:
            Stop: it may be something else.
        """
        self.tracer.spend(ref.value)
        n, mask = self.reader.n, self.reader.term(ref)
        found = []
        for f in factors(n.exp(n.add(_SCORE, n.mul(number(-1 if negated else 1), mask)))):
            if f.op == "flag":
                found.append(f.args[0])
                continue
            rest = [a for a in addends(f.args[0]) if a != _SCORE] if f.op == "exp" else [f]
            for addend in sorted(rest, key=lambda a: a.is_number()):
                raise _no_mask(self.tracer, addend, ref)
        return n.make("and", tuple(found)), Visible(ref, is_bool=False)

    def literals(self) -> list[Literal]:
        """The conjunction of all conditions.

        Raises:
            Stop: no tensor holds one of them.
        """
        found = [self._literal(term, mask) for term, mask in self.found.items()]
        for i, term in enumerate(self.found):
            here = found[i]
            if term.op != "or" or not isinstance(here, Visible):
                continue
            # a window is often written as row - 4 < key alone: the causal mask is its other end
            whole = bound(self.reader, term, [t for t in self.found if t != term])
            if whole is not None and whole.among:
                found[i] = Kept(here, whole.among, whole.extra, whole.over)
                for j, other in enumerate(found):  # no other mask would bound it
                    if isinstance(other, Visible):
                        found[j] = replace(other, among=whole.among)
        return found

    def _literal(self, term: Term, mask: Visible) -> Literal:
        reader = self.reader
        if (chosen := selected(reader, term)) is not None:
            held = reader.held(term)
            return chosen if held is None else replace(chosen, mask=Visible(*held))
        if term.op == "lt" and term.args[1].op == "element":  # above what hides
            own = term.args[1].ref
            return Visible(own, is_bool=False, assumed=_asserted(self.tracer, own))
        leaf, positive = (term.args[0], False) if term.op == "not" else (term, True)
        held = (leaf.ref, positive, True) if leaf.op == "element" else reader.held(term)
        if held is None:  # entries were taken out of a mask
            parts = [x for t in term.walk() if t.op in _MADE for x in (t, reader.n.negate(t))]
            parts += self._whole[mask.ref].args  # or keys were taken out of a selection
            among = tuple(s for x in parts if (s := selected(reader, x)) is not None)
            if not among:
                raise _unread(self.tracer, mask.ref)
            return replace(mask, among=among)
        here = Visible(*held, assumed=_asserted(self.tracer, held[0]))
        whole = bound(reader, term) if term.op == "or" else None
        if whole is not None and whole.among:
            return Kept(here, whole.among, whole.extra, whole.over)
        return replace(here, hides=selected(reader, reader.n.negate(term)) is not None)


def _asserted(tracer: Tracer, ref: Ref) -> str:
    """What the caller asserts of an input that `ref` is an element of; "" where it is of none."""
    for own in tracer.moves(ref):
        for kind, names in ((MASKS, tracer.masks), (FLAGS, tracer.flags)):
            if own.value in names:
                return f"{kind}:{own.value}"
    return ""


def _no_mask(tracer: Tracer, addend: Term, ref: Ref) -> Stop:
    """What is left of a mask `ref` when all conditions are taken off."""
    if addend.is_number():
        return Stop(
            f"the constant {addend.value:g} is added to every score ({ref.value})", ref.value
        )
    by, leaf = coefficient(addend)
    own = leaf.args[0] if leaf.op == "flag" else leaf
    numbers = [number(by)] if leaf.op == "flag" and own.op != "element" else list(leaf.args[1:])
    soft = [a.value for a in numbers if a.is_number() and a.value != 0 and a.value >= LOW]
    if soft and leaf.op in ("flag", "where"):
        return Stop(
            f"{ref.value} adds {soft[0]:g} to scores, which neither leaves a key as it is nor hides"
            " it",
            ref.value,
            "expected a mask of 0 where a key is selected and -inf elsewhere",
        )
    return _bias(tracer, own.ref if own.op == "element" else ref, abs(by))


def _bias(tracer: Tracer, ref: Ref, by: float) -> Stop:
    if ref.value in tracer.joined:  # one mask per chunk of keys, which the graph does not join
        ref = tracer.joined[ref.value].parts[0][0]
    if ref.value in tracer.wholes:  # it is of kept keys only
        ref = Ref(tracer.wholes[ref.value][0], ref.coords)
    hint = "build the mask from a bool tensor in the graph, or pass a bool mask"
    if by > 1:  # (1 - mask) * low
        hint = f"nothing tells that {ref.value} is 0 or 1: cast it to bool in the graph, and hide"
        hint += " keys where that is false"
        if tracer.index.is_given(ref.value):
            hint += f"; if it is, say so: --assume {FLAGS}:{ref.value}"
    elif tracer.index.is_given(ref.value):
        hint += f"; if it is a mask, say so: --assume {MASKS}:{ref.value}"
    return Stop(
        f"{ref.value} is added to the scores and cannot be shown to hold only 0 and -inf: it may be"
        " a bias",
        ref.value,
        hint,
    )


def _unread(tracer: Tracer, ref: Ref) -> Stop:
    maker = tracer.index.real_maker(ref.value)
    if maker is not None and maker.op_type.startswith("Reduce"):
        return Stop(
            f"the mask {ref.value} joins several flags by {maker.op_type}, and no selection is"
            " made that way",
            ref.value,
            "hide keys by a bool mask that has an entry for each of them",
        )
    return Stop(
        f"the mask {ref.value} is not bool and not made from one", ref.value, "use a bool mask"
    )
