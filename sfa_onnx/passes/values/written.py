"""What is written into a mask, and what indices point at: conditions over entries and keys.

`ScatterElements` and `ScatterND` at indices are the update where some entry points here, else what
was there; so are one-hot rows. An entry points at a key where `indices[.., slot] == key`; negative
indices of a scatter count from the end: `indices[.., slot] mod width`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.expr import Expr, Label, fresh, label_of
from sfa_onnx.passes.axes.named import axis_of
from sfa_onnx.passes.axes.trace import Pieces, Ref
from sfa_onnx.passes.shapes.kept import kept_mask
from sfa_onnx.passes.values.arithmetic import LOW, all_flags
from sfa_onnx.passes.values.identity import Normal
from sfa_onnx.passes.values.pointwise import Reads
from sfa_onnx.passes.values.terms import FALSE, ONE, TRUE, ZERO, Term, element, index, number

__all__ = ["WRITES", "equal_positions", "is_hit", "ranges", "written"]

_INTS: Final = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
_KINDS: Final = ((TRUE, FALSE), (ONE, ZERO), (ZERO, number(-math.inf)))  # of masks
_JOINED: Final = {"add": "add", "mul": "mul", "max": "max", "min": "min"}


class Asks(Reads, Protocol):
    """What is asked of a reader of masks."""

    def is_bool(self, value: str) -> bool:
        """Whether a tensor holds conditions."""


def is_hit(term: Term) -> bool:
    """Whether a condition says that an entry points at a key."""
    if term.op != "eq" or term.args[1].op != "index":
        return False
    own = term.args[0].args[0] if term.args[0].op == "mod" else term.args[0]
    return own.op == "element"


def equal_positions(r: Asks, node: onnx.NodeProto, ref: Ref) -> Term | None:
    """Indices compared with the numbers of keys; None: it is another comparison."""
    sides = [r.tracer.operand(name, ref.coords) for name in node.input]
    if any(r.tracer.sizes.elem_type(side.value) not in _INTS for side in sides):
        return None
    for own, other in (sides, sides[::-1]):
        key = r.tracer.index_value(other)
        if label_of(key) is None or key.labels & own.labels or not own.labels:
            continue
        if r.tracer.index_value(own).reads:
            return r.n.make("eq", (element(own), index(key)))
    return None


def written(r: Asks, node: onnx.NodeProto, ref: Ref) -> Term | None:
    """An element of what a scatter or a OneHot makes; None: that is not known."""
    rule = WRITES.get(node.op_type)
    return None if rule is None else rule(r, node, ref)


def _one_hot(r: Asks, node: onnx.NodeProto, ref: Ref) -> Term | None:
    values = r.tracer.index.constant(node.input[2])
    if values is None:
        values = r.tracer.index.mask_table(node.input[2])  # 0.0 and 1.0
    if values is None or values.size != 2:
        return None
    axis = axis_of(node, len(ref.coords), -1)
    own = Ref(node.input[0], (*ref.coords[:axis], *ref.coords[axis + 1 :]))
    hit = _points(r, own, r.tracer.shape(ref.value)[axis], ref.coords[axis])
    off, on = (number(float(x)) for x in values.flat)
    return r.n.where(hit, on, off)


def _elements(r: Asks, node: onnx.NodeProto, ref: Ref) -> Term | None:
    data, indices, update = node.input
    axis = axis_of(node, len(ref.coords))
    rows, shape = r.tracer.shape(indices), r.tracer.shape(data)
    if 0 in rows:  # nothing is written
        return r.term(Ref(data, ref.coords))
    r.tracer.same_rows(indices, data, axis)
    if not ref.coords[axis].labels:
        return None
    slot = fresh("slot", rows[axis])
    at = tuple(Expr.of(slot) if i == axis else c for i, c in enumerate(ref.coords))
    hit = _points(r, Ref(indices, at), shape[axis], ref.coords[axis])
    return _put(r, node, hit, [slot], Ref(update, at), ref)


def _nd(r: Asks, node: onnx.NodeProto, ref: Ref) -> Term | None:
    """Where points lie that name the first axes, or all of them."""
    data, points, update = node.input
    sizes = r.tracer.sizes.shape(points)  # unknown where they come from NonZero
    if sizes is None or 0 in sizes:
        return None
    along = [fresh("slot", size) for size in sizes[:-1]]
    at, shape = tuple(map(Expr.of, along)), r.tracer.shape(data)
    hits = []
    for axis in range(sizes[-1]):
        column = Ref(points, (*at, Expr(axis)))
        if shape[axis] == 1:
            continue
        own = label_of(r.tracer.index_value(column, shape[axis]))
        if own in along and own.size <= shape[axis]:
            hits.append(r.n.make("eq", (index(Expr.of(own)), index(ref.coords[axis]))))
        else:
            hits.append(_points(r, column, shape[axis], ref.coords[axis]))
    if not hits:
        return None
    hit = r.n.make("and", tuple(hits))
    return _put(r, node, hit, along, Ref(update, (*at, *ref.coords[sizes[-1] :])), ref)


def _points(r: Asks, indices: Ref, width: int, place: Expr) -> Term:
    """Whether an index of a scatter points at a place of an axis."""
    own = Term("mod", (element(indices),), width)
    return r.n.make("eq", (own, index(place)))


def _put(
    r: Asks, node: onnx.NodeProto, hit: Term, slots: Sequence[Label], update: Ref, ref: Ref
) -> Term | None:
    """The update where some entry points here, else what was there."""
    base, own = r.term(Ref(node.input[0], ref.coords)), r.term(update)
    kind = attributes(node).get("reduction", "none")
    joined = _JOINED.get(kind.decode() if isinstance(kind, bytes) else str(kind))
    if joined is not None:
        own = r.n.make(joined, (base, own))
    if own.labels & set(slots):  # entries may be switched off
        switch, then, other = _choice(r.n, own)
        if other != base:
            return None
        hit, own = r.n.make("and", (hit, switch)), then
    for slot in slots:
        hit = r.over("any", slot, hit)
    if any(t.op == "any" and kept_mask(t.label.size) for t in hit.walk()):
        return None  # entries that a mask picks, and not known which
    return r.n.where(hit, own, base)


def _choice(n: Normal, term: Term) -> tuple[Term, Term, Term]:
    """(condition, then, else) of a condition, a flag or a choice."""
    if (shown := all_flags(n, term)) is not None:
        return shown, ONE, ZERO
    if term.op == "where":
        return term.args[0], term.args[1], term.args[2]
    return term, TRUE, FALSE


WRITES: Final = {"OneHot": _one_hot, "ScatterElements": _elements, "ScatterND": _nd}


# -- ranges ---------------------------------------------------------------------------------------


def ranges(r: Asks, step: Pieces) -> Term | None:
    """A Concat of masks, or a window written into one: what each range of keys has.

    None: the parts are no masks of one kind.
    """
    parts = [r.term(part) for _, _, part in step.parts]
    conditions = r.is_bool(step.parts[0][2].value)
    for then, other in _KINDS[:1] if conditions else _KINDS[1:]:
        shown = [_shown(r.n, part, then, other) for part in parts]
        known = [c for c in shown if c is not None]
        if len(known) == len(parts):
            break
    else:
        return None
    position, here, last = index(Expr.of(step.label)), [], _last(r, step)
    for (low, high, _), condition in zip(step.parts, known, strict=True):
        low, high = last.get(low, low), last.get(high, high)
        ends = [r.n.make("lt", (position, index(Expr(high))))] if high < step.label.size else []
        ends += [r.n.negate(r.n.make("lt", (position, index(Expr(low)))))] if low else []
        here.append(r.n.make("and", (*ends, condition)))
    return r.n.where(r.n.make("or", tuple(here)), then, other)


def _last(r: Asks, step: Pieces) -> dict[int, int]:
    """Where a last part of fixed length begins, counted from an end that may be open."""
    found = {}
    for low, high, part in step.parts:
        own = [i for i, c in enumerate(part.coords) if step.label in c.labels]
        length = r.tracer.shape(part.value)[own[0]] if len(own) == 1 else step.label.size
        if high == step.label.size and high - low == length and not r.tracer.open(length):
            found[low] = step.label.size - length
    return found


def _shown(n: Normal, term: Term, then: Term, other: Term) -> Term | None:
    """The condition of which a term is `then` where it holds, else `other`; None: of none."""
    if term == then:
        return TRUE
    if term == other or (_is_low(other) and _is_low(term)):
        return FALSE
    if then == TRUE:
        return term
    if then == ONE:
        return all_flags(n, term)
    chosen = term.op == "where" and term.args[1] == then and _is_low(term.args[2])
    return term.args[0] if chosen else None


def _is_low(term: Term) -> bool:
    return term.is_number() and term.value < LOW
