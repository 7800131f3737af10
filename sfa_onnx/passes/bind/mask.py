"""Masks as conjunctions: a key is visible when every literal holds.

A literal is either a selection (the key's position is in a row of an index tensor) or a tensor of
the graph that is read as it is: bool, or float with two values. Nothing is proved about the latter
(causal, padding, packing ...): it is evaluated in the graph at the selected positions.
"""

from __future__ import annotations

from dataclasses import replace

import onnx

from sfa_onnx.passes.axes.trace import Move, Pieces, Ref, Stop, Tracer, is_float
from sfa_onnx.passes.axes.writes import assigned_where
from sfa_onnx.passes.bind.flags import counts, flags, is_table, less_one, line, summands
from sfa_onnx.passes.bind.hits import reduced
from sfa_onnx.passes.bind.literals import HIDDEN, Kept, Literal, Selected, Visible, alike
from sfa_onnx.passes.bind.written import patched, put, scattered, union

__all__ = [
    "HIDDEN",
    "Kept",
    "Literal",
    "Selected",
    "Visible",
    "additive",
    "boolean",
    "is_hidden",
    "scatters_where",
    "unswitched",
]

_BOTH, _EITHER = frozenset(("And", "Mul", "Min")), frozenset(("Or", "Max"))


def is_hidden(tracer: Tracer, value: str) -> bool:
    """Whether `value` is a constant that hides a score."""
    fill = tracer.fill(value)
    return fill is not None and fill < HIDDEN


def additive(tracer: Tracer, ref: Ref, *, negated: bool = False) -> list[Literal]:
    """The literals of a float tensor that is added to scores: 0 where visible, else very low."""
    tracer.spend(ref.value)
    if ref.value in tracer.joined and not negated:  # one mask per chunk of keys
        for part, _ in tracer.joined[ref.value].parts:
            additive(tracer, part)
        return [Visible(ref, is_bool=False)]
    fill = tracer.fill(ref.value)
    if fill is not None:
        return _constant_mask(-fill if negated else fill, ref)
    node = tracer.index.node_of(ref.value)
    if node is not None:
        found = _scaled(tracer, ref, negated) or _additive_node(tracer, node, ref, negated)
        if found is not None:
            return found
        step = tracer.step(ref)
        if isinstance(step, Move) and is_float(tracer.sizes.elem_type(step.ref.value)):
            inner = additive(tracer, step.ref, negated=negated)
            return inner if negated else _at_view(node, ref, inner, True, is_bool=False)
    if not negated and _two_valued_table(tracer, ref.value):
        return [Visible(ref, is_bool=False)]
    if not negated and ref.value in tracer.masks:
        return [Visible(ref, is_bool=False, assumed=ref.value)]
    hint = "build the mask from a bool tensor in the graph, or pass a bool mask"
    if tracer.index.is_given(ref.value):
        hint += f"; if it is a mask, say so: --assume two-valued:{ref.value}"
    raise Stop(
        f"{ref.value} is added to the scores and cannot be shown to hold only 0 and -inf: it may be"
        " a bias",
        ref.value,
        hint,
    )


def _scaled(tracer: Tracer, ref: Ref, negated: bool) -> list[Literal] | None:
    """The literals of a * flag + b."""
    flag, a, b = line(tracer, ref)
    if flag == ref or not counts(tracer, flag.value):
        return None
    sign = -1.0 if negated else 1.0
    off, on = sign * b, sign * (a + b)
    if on == 0 and off < HIDDEN:
        return boolean(tracer, flag, positive=True)
    if off == 0 and on < HIDDEN:
        return boolean(tracer, flag, positive=False)
    return None


def _constant_mask(fill: float, ref: Ref) -> list[Literal]:
    if fill == 0:
        return []
    raise Stop(f"the constant {fill:g} is added to every score ({ref.value})", ref.value)


def _additive_node(
    tracer: Tracer, node: onnx.NodeProto, ref: Ref, negated: bool
) -> list[Literal] | None:
    op = node.op_type
    if op in ("Add", "Max", "Min") and len(node.input) == 2:
        return _combined(tracer, node, ref, negated)
    if op == "Neg":
        return additive(tracer, Ref(node.input[0], ref.coords), negated=not negated)
    if op == "Where":
        return _additive_where(tracer, node, ref, negated)
    if op == "Mul":
        return _weighted(tracer, node, ref, negated)
    if op == "Log" and not negated and counts(tracer, node.input[0]):  # ln 1, ln 0
        return boolean(tracer, Ref(node.input[0], ref.coords), positive=True)
    if op == "ScatterElements" and not negated:
        return scattered(_read, tracer, node, ref, is_bool=False)
    if op == "ScatterND" and not negated:
        return _scatter_where(tracer, node, ref) or put(_read, tracer, node, ref, is_bool=False)
    if op == "Trilu" and not negated and is_hidden(tracer, node.input[0]):
        return [Visible(ref, is_bool=False)]  # the other triangle is 0
    return None


def _combined(
    tracer: Tracer, node: onnx.NodeProto, ref: Ref, negated: bool
) -> list[Literal] | None:
    operands = [tracer.operand(n, ref.coords) for n in node.input]
    if node.op_type == "Max":  # max(mask, finfo.min): a floor for sums of masks
        kept = [o for o in operands if not is_hidden(tracer, o.value)]
        return additive(tracer, kept[0], negated=negated) if len(kept) == 1 else None
    first = [i for i, o in enumerate(operands) if not _switched(tracer, o)]
    masks = [lit for i in first for lit in additive(tracer, operands[i], negated=negated)]
    for i, operand in enumerate(operands):
        if i not in first:
            operand = unswitched(tracer, operand, masks)
            masks += additive(tracer, operand, negated=negated)
    return masks


def unswitched(tracer: Tracer, ref: Ref, masks: list[Literal]) -> Ref:
    """The x of x * visible, where `masks` hide what is not visible anyway; else `ref`.

    Some exporters spell Where(visible, x, low) as x * visible + low * (not visible).
    """
    for value, switch in _switched(tracer, ref):
        shown = boolean(tracer, switch, positive=True)
        if all(any(alike(one, mask) for mask in masks) for one in shown):
            return value
    return ref


def _switched(tracer: Tracer, ref: Ref) -> list[tuple[Ref, Ref]]:
    """(x, visible) of x * visible, for either order; empty where `ref` is no such product."""
    node = tracer.index.node_of(ref.value)
    if node is None or node.op_type != "Mul":
        return []
    a, b = (tracer.operand(n, ref.coords) for n in node.input)
    if any(tracer.fill(x.value) is not None for x in (a, b)):
        return []
    return [(x, switch) for x, switch in ((a, b), (b, a)) if flags(tracer, switch.value)]


def _additive_where(
    tracer: Tracer, node: onnx.NodeProto, ref: Ref, negated: bool
) -> list[Literal] | None:
    condition, first, second = (tracer.operand(n, ref.coords) for n in node.input)
    sign = -1.0 if negated else 1.0
    for branch, other, positive in ((second, first, True), (first, second, False)):
        fill = tracer.fill(branch.value)
        if fill is not None and fill * sign < HIDDEN:
            rest = additive(tracer, other, negated=negated)
            return [*boolean(tracer, condition, positive=positive), *rest]
    return None


def _weighted(
    tracer: Tracer, node: onnx.NodeProto, ref: Ref, negated: bool
) -> list[Literal] | None:
    """Cast(mask) * finfo.min: hidden where the mask is 1; or a mask times a positive number."""
    operands = [tracer.operand(n, ref.coords) for n in node.input]
    for mask, weight in (operands, operands[::-1]):
        factor = tracer.fill(weight.value)
        if factor is None:
            continue
        factor = -factor if negated else factor
        if factor < HIDDEN:
            return boolean(tracer, mask, positive=False)
        if factor > -HIDDEN and (flag := less_one(tracer, mask)) is not None:
            return boolean(tracer, flag, positive=True)
        if factor > 0:
            return additive(tracer, mask)
        if factor == 0 and flags(tracer, mask.value):
            return []
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
    node = tracer.index.node_of(ref.value)
    if node is None:
        return [_leaf(tracer, ref, positive)]
    found = _boolean_node(tracer, node, ref, positive)
    if found is not None:
        return found
    if _given_numbers(tracer, node):  # made true and false here
        return [_leaf(tracer, ref, positive)]
    step = tracer.step(ref) if node.op_type != "Where" else None
    if isinstance(step, Move) and not any(c.reads for c in step.ref.coords):
        inner = boolean(tracer, step.ref, positive=positive)
        return _at_view(node, ref, inner, positive, is_bool=True)
    if isinstance(step, Pieces):
        found = patched(_read, tracer, Visible(ref, positive), step)
        if found is not None:
            return found
    if node.op_type == "Cast":
        return boolean(tracer, Ref(node.input[0], ref.coords), positive=positive)
    source, by, more = line(tracer, ref)
    if source != ref and by != 0 and more == 0:
        return boolean(tracer, source, positive=positive)
    if source != ref and by == -more and counts(tracer, source.value):  # 1 - mask
        return boolean(tracer, source, positive=not positive)
    return [_leaf(tracer, ref, positive)]


def _given_numbers(tracer: Tracer, node: onnx.NodeProto) -> bool:
    """Whether numbers from outside become bools here."""
    if node.op_type != "Cast" or not tracer.index.is_given(node.input[0]):
        return False
    return _is_bool(tracer, node.output[0]) and not _is_bool(tracer, node.input[0])


def _is_bool(tracer: Tracer, value: str) -> bool:
    return tracer.sizes.elem_type(value) == onnx.TensorProto.BOOL


def _at_view(
    node: onnx.NodeProto, ref: Ref, inner: list[Literal], positive: bool, *, is_bool: bool
) -> list[Literal]:
    """Literals found behind a view; where it cuts a tensor, they are read from the cut one."""
    if len(inner) == 1 and isinstance(inner[0], Selected | Kept):
        return [replace(inner[0], mask=Visible(ref, positive, is_bool))]
    cuts = ("Slice", "Split", "Concat", "ScatterND", "Gather", "GatherElements", "GatherND")
    if node.op_type not in cuts:
        return inner
    if len(inner) == 1 and isinstance(inner[0], Visible):
        return [Visible(ref, positive, is_bool, assumed=inner[0].assumed)]
    return inner


def _leaf(tracer: Tracer, ref: Ref, positive: bool) -> Visible:
    if not _is_bool(tracer, ref.value) and not is_table(tracer, ref.value):
        maker = tracer.index.real_maker(ref.value)
        if maker is not None and maker.op_type.startswith("Reduce"):
            raise Stop(
                f"the mask {ref.value} joins several flags by {maker.op_type}, and no selection is"
                " made that way",
                ref.value,
                "hide keys by a bool mask that has an entry for each of them",
            )
        raise Stop(
            f"the mask {ref.value} is not bool and not made from one", ref.value, "use a bool mask"
        )
    return Visible(ref, positive)


def _boolean_node(
    tracer: Tracer, node: onnx.NodeProto, ref: Ref, positive: bool
) -> list[Literal] | None:
    op = node.op_type
    if op == "Not":
        return boolean(tracer, Ref(node.input[0], ref.coords), positive=not positive)
    if op in (_BOTH if positive else _EITHER) and _joins_flags(tracer, node):
        operands = [tracer.operand(n, ref.coords) for n in node.input]
        return [lit for o in operands for lit in boolean(tracer, o, positive=positive)]
    if op in (_EITHER if positive else _BOTH) and _joins_flags(tracer, node):
        return union(_read, tracer, node, Visible(ref, positive))
    if op == "Where":
        return _boolean_where(tracer, node, ref, positive)
    if op == "IsInf" and not positive:
        return _hides(tracer, tracer.operand(node.input[0], ref.coords))
    if op == "Sub" and tracer.fill(node.input[0]) == 1:  # 1 - mask
        return boolean(tracer, tracer.operand(node.input[1], ref.coords), positive=not positive)
    if op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        return _compared(tracer, node, ref, positive)
    if op == "ScatterElements":
        return scattered(_read, tracer, node, ref, is_bool=True, positive=positive)
    if op == "ScatterND":
        return put(_read, tracer, node, ref, is_bool=True, positive=positive)
    if op in ("ReduceMax", "ReduceSum") and positive:
        return reduced(tracer, node, ref)
    return None


def _joins_flags(tracer: Tracer, node: onnx.NodeProto) -> bool:
    """Whether an operator joins bools, or numbers that count as such."""
    return node.op_type in ("And", "Or") or all(counts(tracer, n) for n in node.input)


def _boolean_where(
    tracer: Tracer, node: onnx.NodeProto, ref: Ref, positive: bool
) -> list[Literal] | None:
    """Where(c, x, False) is c and x; where(c, True, x) is not: not c and not x."""
    condition, first, second = (tracer.operand(n, ref.coords) for n in node.input)
    for fixed, other, shows in ((second, first, True), (first, second, False)):
        fill = tracer.fill(fixed.value)
        if fill is not None and (fill != 0) != positive:
            chosen = boolean(tracer, condition, positive=shows)
            return [*chosen, *boolean(tracer, other, positive=positive)]
    return None


def _hides(tracer: Tracer, mask: Ref) -> list[Literal] | None:
    """A float mask that is asked where it is not -inf."""
    try:
        return additive(tracer, mask)
    except Stop:
        return None


def _compared(
    tracer: Tracer, node: onnx.NodeProto, ref: Ref, positive: bool
) -> list[Literal] | None:
    """Count > 0, flag > 0.5, mask == 0, mask > -1: comparisons that only read a mask."""
    limit = tracer.fill(node.input[1])
    source = tracer.operand(node.input[0], ref.coords)
    if limit is None:
        return None
    if is_float(tracer.sizes.elem_type(source.value)) and limit <= 0:
        hides = {"Greater": limit < 0, "GreaterOrEqual": True, "Equal": limit == 0}
        low = {"Less": True, "LessOrEqual": limit < 0, "Equal": limit < HIDDEN}
        if (hides.get(node.op_type, False) and positive) or (
            low.get(node.op_type, False) and not positive
        ):
            return _hides(tracer, source)
    if parts := summands(tracer, source):
        return _all_of(tracer, node.op_type, limit, parts, positive)
    source, limit, op = _shifted(tracer, source, limit, node.op_type)
    if not counts(tracer, source.value):
        return None
    if (op == "Equal" and limit == 0) or (op == "Less" and 0 < limit <= 1):
        return boolean(tracer, source, positive=not positive)
    if op == "Equal" and limit == 1:  # where entries repeat, the check tells
        return boolean(tracer, source, positive=positive)
    if (op == "Greater" and 0 <= limit < 1) or (op == "GreaterOrEqual" and 0 < limit <= 1):
        return boolean(tracer, source, positive=positive)
    return None


def _shifted(tracer: Tracer, source: Ref, limit: float, op: str) -> tuple[Ref, float, str]:
    """The comparison of x that a * x + b, compared with `limit`, is."""
    x, a, b = line(tracer, source)
    if x == source or a == 0:
        return source, limit, op
    if a < 0:
        op = op.replace("Less", "-").replace("Greater", "Less").replace("-", "Greater")
    return x, (limit - b) / a, op


def _all_of(
    tracer: Tracer, op: str, limit: float, parts: list[Ref], positive: bool
) -> list[Literal] | None:
    """Of flag + flag == 2, > 1, or not < 2: all of them."""
    few, many = len(parts) - 1, len(parts)
    reaches = {
        "Equal": limit == many,
        "Greater": few <= limit < many,
        "GreaterOrEqual": few < limit <= many,
    }
    misses = {"Less": few < limit <= many, "LessOrEqual": few <= limit < many}
    if not (reaches if positive else misses).get(op, False):
        return None
    return [lit for part in parts for lit in boolean(tracer, part, positive=True)]


def _scatter_where(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> list[Literal] | None:
    mask = scatters_where(tracer, node, ref)
    if mask is None:
        return None
    rest = additive(tracer, Ref(node.input[0], ref.coords))
    return [*boolean(tracer, mask, positive=False), *rest]


def scatters_where(tracer: Tracer, node: onnx.NodeProto, ref: Ref) -> Ref | None:
    """The bool mask of `x[mask] = -inf`."""
    found = assigned_where(tracer, node, ref)
    return found[0] if found is not None and is_hidden(tracer, found[1].value) else None
