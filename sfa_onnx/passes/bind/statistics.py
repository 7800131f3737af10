"""What leaves an attention besides its result: the largest score and the log-sum-exp of a row."""

from __future__ import annotations

import math

from sfa_onnx.passes.axes.expr import Expr, fresh, label_of
from sfa_onnx.passes.axes.trace import Move, Ref, Tracer
from sfa_onnx.passes.axes.writes import assigned_where
from sfa_onnx.passes.bind.site import AttentionRegion, Statistic
from sfa_onnx.passes.values.arithmetic import addends, coefficient
from sfa_onnx.passes.values.exponential import weighed
from sfa_onnx.passes.values.read import Reader
from sfa_onnx.passes.values.table import normal
from sfa_onnx.passes.values.terms import Term

__all__ = ["statistics"]

_EMPTY = "empty row"  # the identity that drops guards of rows without keys


def statistics(
    tracer: Tracer, region: AttentionRegion, reader: Reader, total: Term
) -> list[Statistic]:
    """Those of the region's other values that the operator returns as well.

    Args:
        tracer: of the site.
        region: with the values that are read outside.
        reader: which has read the result.
        total: the sum of the exponentials.
    """
    found = []
    for value in region.sides:
        ref = _placed(tracer, reader, value)
        told = None if ref is None else _told(reader, ref, total)
        if ref is not None and told is not None:
            kind, factor = told
            plain = Reader(tracer, normal(_EMPTY), region.inner)
            found.append(Statistic(ref, kind, factor, _lonely(plain.term(ref))))
    return found


def _told(reader: Reader, ref: Ref, total: Term) -> tuple[str, float] | None:
    """("maximum" or "log-sum-exp", its factor) of a value; None: it is neither."""
    term = reader.term(ref)
    by, rest = coefficient(term)
    if rest == reader.n.log(total):
        return "log-sum-exp", by
    sums = {(a.label, a.args[0]) for a in addends(total) if a.op == "sum"}
    if len(sums) == len(addends(total)) and weighed(term) == sums:
        return "maximum", 1.0
    return None


def _lonely(term: Term) -> float:
    """What a guard gives in rows without keys; without one, the softmax of nothing: -inf."""
    if term.op == "where":
        numbers = [a.value for a in term.args[1:] if a.is_number()]
        return numbers[0] if len(numbers) == 1 else -math.inf
    return -math.inf


def _placed(tracer: Tracer, reader: Reader, value: str) -> Ref | None:
    """The element of `value` that belongs to the element of the result that was read."""
    labels = [fresh("p", size) for size in tracer.shape(value)]
    own = Ref(value, tuple(map(Expr.of, labels)))
    here = own
    for _ in range(16):
        if (known := reader.axes.get(here.value)) is not None:
            swap = {}
            for mine, theirs in zip(here.coords, known, strict=True):
                label = label_of(mine)
                if label is None and mine != theirs:
                    return None
                if label is not None:
                    swap[label] = theirs
            return own.substitute(swap)
        node = tracer.index.node_of(here.value)
        if node is None:
            return None
        if node.op_type.startswith("Reduce") and (under := reader.reduced_at(node, here)):
            here = under[0]
            continue
        step = tracer.step(here)
        if isinstance(step, Move):
            here = step.ref
        elif assigned_where(tracer, node, here) is not None:
            here = Ref(node.input[0], here.coords)
        elif node.op_type == "Where":
            data = next((n for n in node.input[1:] if n in reader.inner), "")
            here = tracer.operand(data, here.coords) if data else here
        else:
            return None
    return None
