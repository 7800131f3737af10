"""Key rows for the operator: a cache as it lies, or the rows a graph gathers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from sfa_onnx.passes.axes.expr import Label, Read, merge
from sfa_onnx.passes.axes.places import axis_labels, is_view
from sfa_onnx.passes.axes.trace import Ref, Stop
from sfa_onnx.passes.bind.paths import State
from sfa_onnx.passes.emit.emitter import Emitter, Group
from sfa_onnx.passes.emit.plan import Plan, unrounded

__all__ = ["cache", "gathered"]

_T = onnx.TensorProto


def cache(plan: Plan, path: Sequence[State], groups: Sequence[Group], elem_type: int) -> str:
    """A stored tensor with one axis per group, from the first on the path that is a plain view.

    Columns that a graph puts together for each head are rather taken where they lie alone: then
    nothing has to be put together any more. Cast to `elem_type` where the tensor has another (0: as
    it is; int8 must be int8).
    """
    e, sizes = plan.e, plan.site.tracer.sizes
    labels = {x for g in groups for x in g}
    path = [s for s in unrounded(plan.site, path, elem_type) if s.factor == path[-1].factor]
    ready = [s for s in path if is_view(s.ref) and s.ref.labels <= labels]
    if ready and _among_others(plan, ready[0].ref, groups[-1]):
        order = [x for g in groups for x in g]
        ready.sort(key=lambda s: (_among_others(plan, s.ref, groups[-1]), _moved(s.ref, order)))
    exact = [s for s in ready if sizes.elem_type(s.ref.value) == elem_type]
    last: Stop | None = None
    for state in exact[::-1] if elem_type == _T.INT8 else (*exact, *ready):  # int8: as stored
        try:
            value = e.arrange(state.ref, groups, "cache")
        except Stop as stop:
            last = stop
            continue
        value = e.broadcast(value, groups, state.ref.labels)
        return e.cast(value, elem_type) if elem_type else value
    raise last or Stop(
        f"{path[-1].ref.value} is not a cache of one row per key", path[-1].ref.value
    )


def _among_others(plan: Plan, ref: Ref, columns: Group) -> bool:
    """Whether these columns are a part of the tensor's columns."""
    for axis, coordinate in enumerate(ref.coords):
        labels = axis_labels(coordinate) or []
        if set(labels) & set(columns):
            width = plan.site.tracer.shape(ref.value)[axis]
            return bool(coordinate.const) or int(np.prod([x.size for x in labels])) != width
    return False


def _moved(ref: Ref, order: Sequence[Label]) -> bool:
    """Whether the tensor's axes stand in another order than these labels."""
    found = [x for c in ref.coords for x in axis_labels(c) or ()]
    return found != [x for x in order if x in found]


def gathered(plan: Plan, path: Sequence[State], groups: Sequence[Group], elem_type: int) -> str:
    """Rows of the selected keys as [rows, K, 1, width], in the stored type where possible.

    Takes the gathered tensor if the graph has it in that type, else gathers the stored one.
    """
    e, site = plan.e, plan.site
    sizes = site.tracer.sizes
    labels = {x for g in groups for x in g}
    path = [s for s in unrounded(plan.site, path, elem_type) if s.factor == path[-1].factor]
    ready = [s for s in path if is_view(s.ref) and s.ref.labels <= labels]
    exact = [s for s in ready if not elem_type or sizes.elem_type(s.ref.value) == elem_type]
    choice = exact or ([] if elem_type == _T.INT8 else ready)
    last: Stop | None = None
    for state in reversed(choice):
        try:
            value = e.arrange(state.ref, groups, "rows")
            return e.broadcast(value, groups, state.ref.labels)
        except Stop as stop:
            last = stop
    for state in reversed(path):
        if elem_type and elem_type == _T.INT8 and sizes.elem_type(state.ref.value) != elem_type:
            continue
        gathered = _gather_again(plan, state.ref, groups)
        if gathered:
            return gathered
    raise last or Stop(f"the gather of {path[-1].ref.value} is not understood", path[-1].ref.value)


def _gather_again(plan: Plan, ref: Ref, groups: Sequence[Group]) -> str:
    """Gather rows of a stored tensor by the graph's own index tensors; "" if it is no gather."""
    e, tracer = plan.e, plan.site.tracer
    column = groups[-1]
    where = [i for i, c in enumerate(ref.coords) if any(x in c.labels for x in column)]
    if where not in ([len(ref.coords) - 1], []) or not any(c.reads for c in ref.coords):
        return ""
    shape = tracer.made(ref)
    rank = len(ref.coords) - 1
    rows = e.emit("Reshape", [ref.value, e.ints([-1, shape[-1]])], "flat", e.elem_type(ref.value))
    if not tracer.static(ref.value, rank):
        return ""
    labels = axis_labels(ref.coords[-1])
    if labels is None:
        return ""
    lead: list[Group] = [[x] for g in groups[:-1] for x in g]
    position = ""
    flat = merge(ref.coords[:-1], shape[:-1])
    if all(isinstance(atom, Read) and c == 1 for atom, c in flat.terms) and not flat.const:
        size = e.emit("Shape", [rows], "shape", _T.INT64)
        size = e.emit("Gather", [size, e.ints([0])], "dim", _T.INT64, axis=0)
        position = _wrap(e, e.index(flat, lead), size)
        rank = 0
    dims = e.emit("Shape", [ref.value], "shape", _T.INT64)
    for axis in range(rank):
        own = e.index(ref.coords[axis], lead)
        size = e.emit("Gather", [dims, e.ints([axis])], "dim", _T.INT64, axis=0)
        if ref.coords[axis].reads:
            own = _wrap(e, own, size)
        if not position:
            position = own
            continue
        scaled = e.emit("Mul", [position, size], "row", _T.INT64)
        position = e.emit("Add", [scaled, own], "row", _T.INT64)
    position = e.broadcast(position, lead, ref.labels)
    rows = e.emit("Gather", [rows, position], "rows", e.elem_type(ref.value), axis=0)
    covered = int(np.prod([x.size for x in labels]))
    start = ref.coords[-1].const
    if (start, covered) != (0, shape[-1]):
        rows = e.slice(rows, len(lead), start, start + covered)
    return e.permute(rows, [*lead, column], groups, "rows")


def _wrap(e: Emitter, own: str, size: str) -> str:
    zero = e.constant(np.asarray(0, np.int64))
    negative = e.emit("Less", [own, zero], "negative", _T.BOOL)
    shifted = e.emit("Add", [own, size], "wrapped", _T.INT64)
    return e.emit("Where", [negative, shifted, own], "row", _T.INT64)
