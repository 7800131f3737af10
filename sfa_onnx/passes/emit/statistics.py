"""What else a graph returns of its softmax: the largest score, the log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from sfa_onnx.passes.axes.places import axis_labels
from sfa_onnx.passes.axes.trace import Stop
from sfa_onnx.passes.bind.site import Statistic
from sfa_onnx.passes.emit.emitter import Group
from sfa_onnx.passes.emit.plan import Plan, make_sinks

__all__ = ["deliver_statistics", "sunk"]

_T = onnx.TensorProto


def deliver_statistics(plan: Plan, top: str, total: str, groups: Sequence[Group]) -> None:
    """Make every statistic of the site from the operator's softmax_max and softmax_sum.

    Args:
        plan: of the site.
        top: largest scores, one axis per group.
        total: sums of exp(score - largest); 0 in rows without keys.
        groups: labels of the axes of both.

    Raises:
        Stop: an axis of a statistic is no view of the operator's.
    """
    for statistic in plan.site.statistics:
        target = [axis_labels(c) for c in statistic.ref.coords]
        if any(t is None for t in target):
            raise Stop(f"the axes of {statistic.ref.value} are no view", statistic.ref.value)
        value = _value(plan, statistic, top, total)
        wanted = [t or [] for t in target]
        value = plan.e.permute(value, [list(g) for g in groups], wanted, "statistic")
        kind = plan.site.tracer.sizes.elem_type(statistic.ref.value)
        plan.e.finish(plan.e.cast(value, kind), statistic.ref.value)


def sunk(plan: Plan, out: str, top: str, total: str, groups: Sequence[Group]) -> str:
    """The result with sinks that the operator has left out: over 1 + exp(sink - log-sum-exp).

    Args:
        plan: of the site.
        out: [B, S1, N1, C].
        top: as in `deliver_statistics`.
        total: likewise.
        groups: likewise.
    """
    sinks, e = plan.site.sinks, plan.e
    if sinks is None or not sinks.behind:
        return out
    lse = e.emit("Add", [top, e.emit("Log", [total], "log", _T.FLOAT)], "lse", _T.FLOAT)
    more = e.emit("Sub", [make_sinks(plan, sinks), lse], "more", _T.FLOAT)
    one = e.constant(np.asarray(1, np.float32))
    below = e.emit("Add", [e.emit("Exp", [more], "more", _T.FLOAT), one], "below", _T.FLOAT)
    share = e.emit("Reciprocal", [below], "share", _T.FLOAT)
    rows = [list(groups[0]), list(groups[2]), list(groups[3]), []]
    share = e.permute(share, [list(g) for g in groups], rows, "share")
    wide = e.emit("Mul", [e.cast(out, _T.FLOAT), share], "out", _T.FLOAT)
    return e.cast(wide, plan.elem_type)


def _value(plan: Plan, statistic: Statistic, top: str, total: str) -> str:
    """The statistic, and what the graph gives in rows without keys."""
    e = plan.e
    value = top
    if statistic.kind == "sum":
        value = total
    if statistic.kind == "log-sum-exp":
        value = e.emit("Add", [top, e.emit("Log", [total], "log", _T.FLOAT)], "lse", _T.FLOAT)
    if statistic.factor != 1:
        by = e.constant(np.asarray(statistic.factor, np.float32))
        value = e.emit("Mul", [value, by], "statistic", _T.FLOAT)
    zero = e.constant(np.asarray(0, np.float32))
    empty = e.emit("Equal", [total, zero], "empty", _T.BOOL)
    lonely = e.constant(np.asarray(statistic.lonely, np.float32))
    return e.emit("Where", [empty, lonely, value], "statistic", _T.FLOAT)
