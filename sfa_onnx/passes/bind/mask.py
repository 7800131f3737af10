"""Masks as conjunctions: a key is visible when every literal holds.

A literal is either a selection (the key's position is in a row of an index tensor) or a tensor of
the graph that is read as it is: bool, or float with two values. Nothing is proved about the latter
(causal, padding, packing ...): it is evaluated in the graph at the selected positions.

What a graph computes from conditions is one term (`values/conditions.py`); here its leaves are told
apart.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

import onnx

from sfa_onnx.passes.axes.expr import Label
from sfa_onnx.passes.axes.trace import Move, Pieces, Ref, Stop, Tracer, is_float
from sfa_onnx.passes.bind.hits import counts, is_table, reduced
from sfa_onnx.passes.bind.literals import HIDDEN, Kept, Literal, Selected, Visible
from sfa_onnx.passes.bind.union import union
from sfa_onnx.passes.bind.written import patched, put, scattered
from sfa_onnx.passes.values.arithmetic import addends, coefficient, factors
from sfa_onnx.passes.values.conditions import Conditions
from sfa_onnx.passes.values.table import normal
from sfa_onnx.passes.values.terms import ZERO, Term, dot, number

__all__ = ["HIDDEN", "Kept", "Literal", "Selected", "Visible", "additive", "boolean", "conditions"]

_SCORE: Final = dot(Ref("", ()), Ref("", ()), Label("", 1))  # that a mask is added to
_CUTS: Final = frozenset(
    ("Slice", "Split", "Concat", "ScatterND", "Gather", "GatherElements", "GatherND")
)


def conditions(tracer: Tracer, *, reduced: bool = False) -> Conditions:
    """A reader of masks; `reduced`: through any and all as well."""
    return Conditions(tracer, normal(), partial(counts, tracer), reduced=reduced)


def additive(tracer: Tracer, ref: Ref, *, negated: bool = False) -> list[Literal]:
    """The literals of a float tensor that is added to scores: 0 where visible, else very low."""
    tracer.spend(ref.value)
    if ref.value in tracer.joined and not negated:  # one mask per chunk of keys
        for part, _ in tracer.joined[ref.value].parts:
            additive(tracer, part)
        return [Visible(ref, is_bool=False)]
    reader = conditions(tracer)
    n, mask = reader.n, reader.term(ref)
    found: list[Literal] = []
    for f in factors(n.exp(n.add(_SCORE, n.mul(number(-1 if negated else 1), mask)))):
        if f.op == "flag":
            found += _literals(reader, f.args[0], ref)
            continue
        rest = [a for a in addends(f.args[0]) if a != _SCORE] if f.op == "exp" else [f]
        for addend in rest:
            found += _added(tracer, addend, ref)
    return found


def _added(tracer: Tracer, addend: Term, ref: Ref) -> list[Literal]:
    """What is left of a mask `ref` when all conditions are taken off."""
    by, leaf = coefficient(addend)
    if addend.is_number():
        raise Stop(
            f"the constant {addend.value:g} is added to every score ({ref.value})", ref.value
        )
    own = leaf.args[0] if leaf.op == "flag" else leaf
    if own.op == "element" and by > 0:
        return _leaf_added(tracer, own.ref)
    raise _bias(tracer, ref)


def _leaf_added(tracer: Tracer, ref: Ref) -> list[Literal]:
    """A tensor that is added to scores, and not computed from conditions."""
    node = tracer.index.maker(ref.value)
    if ref.value in tracer.joined:
        return additive(tracer, ref)
    if node is not None:
        found = _written_mask(tracer, node, ref)
        if found is not None:
            return found
        step = tracer.step(ref)
        if isinstance(step, Move) and is_float(tracer.sizes.elem_type(step.ref.value)):
            return _at_view(node, Visible(ref, is_bool=False), additive(tracer, step.ref))
    if _two_valued_table(tracer, ref.value):
        return [Visible(ref, is_bool=False)]
    if ref.value in tracer.masks:
        return [Visible(ref, is_bool=False, assumed=ref.value)]
    raise _bias(tracer, ref)


def _bias(tracer: Tracer, ref: Ref) -> Stop:
    hint = "build the mask from a bool tensor in the graph, or pass a bool mask"
    if tracer.index.is_given(ref.value):
        hint += f"; if it is a mask, say so: --assume two-valued:{ref.value}"
    return Stop(
        f"{ref.value} is added to the scores and cannot be shown to hold only 0 and -inf: it may be"
        " a bias",
        ref.value,
        hint,
    )


def _written_mask(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> list[Literal] | None:
    if node.op_type == "ScatterElements":
        return scattered(_read, tracer, node, ref, is_bool=False)
    if node.op_type == "ScatterND":
        return put(_read, tracer, node, ref, is_bool=False)
    fill = tracer.fill(node.input[0]) if node.op_type == "Trilu" else None
    if fill is not None and fill < HIDDEN:
        return [Visible(ref, is_bool=False)]  # the other triangle is 0
    return None


def _two_valued_table(tracer: Tracer, value: str) -> bool:
    tensor = tracer.index.initializers.get(value)
    if tensor is None:
        return False
    table = tracer.index.mask_table(value)
    return table is not None and bool(((table == 0) | (table < HIDDEN)).all())


def _read(tracer: Tracer, mask: Visible) -> list[Literal]:
    """A mask of either kind."""
    own = mask.positive
    return boolean(tracer, mask.ref, positive=own) if mask.is_bool else additive(tracer, mask.ref)


def boolean(tracer: Tracer, ref: Ref, *, positive: bool) -> list[Literal]:
    """Literals whose conjunction is `ref` == positive (numbers count as true when not 0)."""
    tracer.spend(ref.value)
    reader = conditions(tracer)
    n, term = reader.n, reader.term(ref)
    if not reader.is_bool(ref.value):
        term = n.negate(n.make("eq", (term, ZERO)))
    return _literals(reader, term if positive else n.negate(term), ref)


def _literals(reader: Conditions, term: Term, ref: Ref) -> list[Literal]:
    """The literals of a condition; `ref` is the mask that it is part of."""
    tracer = reader.tracer
    if term.op == "true":
        return []
    if term.op == "and":
        return [literal for a in term.args for literal in _literals(reader, a, ref)]
    own, positive = (term.args[0], False) if term.op == "not" else (term, True)
    if own.op == "element":
        return _leaf_literals(tracer, own.ref, positive)
    held = reader.holder(term)
    here = Visible(*held) if held is not None else Visible(ref)
    if held is None:
        raise _unread(tracer, ref)
    if term.op == "or":
        parts = [_union_part(reader, a, ref) for a in term.args]
        whole = union(tracer, here, parts)
        if whole is not None:
            return [whole]
    return [here]


def _union_part(reader: Conditions, term: Term, ref: Ref) -> list[Literal] | None:
    """The literals of a part of a union; None where that cannot be told."""
    try:
        return _literals(reader, term, ref)
    except Stop:
        return None


def _leaf_literals(tracer: Tracer, ref: Ref, positive: bool) -> list[Literal]:
    """A condition that is not computed from others."""
    node = tracer.index.maker(ref.value)
    if node is None or _given_numbers(tracer, node):
        return [_leaf(tracer, ref, positive)]
    found = _selection(tracer, node, ref, positive)
    if found is not None:
        return found
    step = tracer.step(ref) if node.op_type != "Where" else None
    if isinstance(step, Move) and not any(c.reads for c in step.ref.coords):
        return _at_view(node, Visible(ref, positive), boolean(tracer, step.ref, positive=positive))
    if isinstance(step, Pieces):
        found = patched(_read, tracer, Visible(ref, positive), step)
        if found is not None:
            return found
    if node.op_type == "Cast":
        return boolean(tracer, Ref(node.input[0], ref.coords), positive=positive)
    return [_leaf(tracer, ref, positive)]


def _selection(
    tracer: Tracer, node: onnx.NodeProto, ref: Ref, positive: bool
) -> list[Literal] | None:
    op = node.op_type
    if op == "ScatterElements":
        return scattered(_read, tracer, node, ref, is_bool=True, positive=positive)
    if op == "ScatterND":
        return put(_read, tracer, node, ref, is_bool=True, positive=positive)
    if op in ("ReduceMax", "ReduceSum") and positive:
        return reduced(tracer, node, ref)
    if _asks_mask(tracer, node, positive):
        try:
            return additive(tracer, tracer.operand(node.input[0], ref.coords))
        except Stop:
            return None
    return None


def _asks_mask(tracer: Tracer, node: onnx.NodeProto, positive: bool) -> bool:
    """Whether a float mask of 0 and -inf is asked where it is 0: mask == 0, mask > -1, not -inf."""
    op = node.op_type
    if op == "IsInf":
        return not positive
    limit = tracer.fill(node.input[1]) if len(node.input) > 1 else None
    if limit is None or limit > 0 or not is_float(tracer.sizes.elem_type(node.input[0])):
        return False
    shows = {"Greater": limit < 0, "GreaterOrEqual": True, "Equal": limit == 0}
    hides = {"Less": True, "LessOrEqual": limit < 0, "Equal": limit < HIDDEN}
    return (shows if positive else hides).get(op, False)


def _given_numbers(tracer: Tracer, node: onnx.NodeProto) -> bool:
    """Whether numbers from outside become bools here."""
    if node.op_type != "Cast" or not tracer.index.is_given(node.input[0]):
        return False
    return _is_bool(tracer, node.output[0]) and not _is_bool(tracer, node.input[0])


def _is_bool(tracer: Tracer, value: str) -> bool:
    return tracer.sizes.elem_type(value) == onnx.TensorProto.BOOL


def _at_view(node: onnx.NodeProto, here: Visible, inner: list[Literal]) -> list[Literal]:
    """Literals found behind a view; where it cuts a tensor, they are read from the cut one."""
    if len(inner) != 1:
        return inner
    if isinstance(inner[0], Selected | Kept):
        return [replace(inner[0], mask=here)]
    return [replace(here, assumed=inner[0].assumed)] if node.op_type in _CUTS else inner


def _leaf(tracer: Tracer, ref: Ref, positive: bool) -> Visible:
    if not _is_bool(tracer, ref.value) and not is_table(tracer, ref.value):
        raise _unread(tracer, ref)
    return Visible(ref, positive)


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
