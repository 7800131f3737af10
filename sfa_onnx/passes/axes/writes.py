"""Windows written into a tensor at constant positions: `rows[b] = ...`, `cache[:, 4:8] = ...`."""

from __future__ import annotations

from typing import Final

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.asking import Tracing
from sfa_onnx.passes.axes.expr import ZERO, Expr, fresh
from sfa_onnx.passes.axes.named import axis_of
from sfa_onnx.passes.axes.steps import Ref

__all__ = ["all_written", "assigned_where", "window"]

_MOST: Final = 256  # windows of one tensor, one written after the other


def window(tracer: Tracing, node: onnx.NodeProto) -> tuple[int, int, int] | None:
    """(axis, low, high) of what a ScatterND or ScatterElements node overwrites as a whole.

    None: it is no such window, or adds to what is there.
    """
    if attributes(node).get("reduction", "none") != "none":
        return None
    if node.op_type == "ScatterElements":
        return _slice_of_elements(tracer, node)
    first = _first_positions(tracer, node)
    if first is None:
        return None
    shape, update = tracer.shape(node.input[0]), tracer.shape(node.input[2])
    cut = [i for i, (d, u) in enumerate(zip(shape, update, strict=True)) if d != u]
    if len(cut) > 1:
        return None
    axis = cut[0] if cut else 0
    low = first[axis] if axis < len(first) else 0
    return axis, low, low + update[axis]


def _slice_of_elements(tracer: Tracing, node: onnx.NodeProto) -> tuple[int, int, int] | None:
    """One position along the axis, everything along the others (`torch.select_scatter`)."""
    shape, table, update = (tracer.sizes.shape(name) for name in node.input)
    if shape is None:
        return None
    axis = axis_of(node, len(shape))
    own = tuple(1 if i == axis else d for i, d in enumerate(shape))
    if update != own or table != own:
        return None
    at = tracer.fill(node.input[1])
    if at is None or at != int(at) or not -shape[axis] <= at < shape[axis]:
        return None
    low = int(at) % shape[axis]
    return axis, low, low + 1


def _first_positions(tracer: Tracing, node: onnx.NodeProto) -> list[int] | None:
    """First position of the written window on each indexed axis; None if it is no window."""
    table = tracer.sizes.shape(node.input[1])  # unknown where it comes from NonZero
    if table is None or len(table) - 1 != table[-1]:
        return None
    labels = [fresh("w", d) for d in table[:-1]]
    first = []
    for j, label in enumerate(labels):
        with tracer.following():
            at = tracer.index_value(Ref(node.input[1], (*map(Expr.of, labels), Expr(j))))
        offset = at - Expr.of(label)
        if offset.terms:
            return None
        size = tracer.shape(node.input[0])[j]
        first.append(offset.const + size if offset.const < 0 else offset.const)
    return first


def all_written(tracer: Tracing, node: onnx.NodeProto) -> list[str]:
    """The updates that fill a tensor along one axis, in order; empty when not all of it is written.

    Windows of one size, written one after the other; a later one hides an earlier one.
    """
    parts: dict[int, str] = {}
    own = window(tracer, node)
    here: onnx.NodeProto | None = node
    for _ in range(_MOST):
        step = None if here is None else _window_of(tracer, here)
        if own is None or here is None or step is None or step[0] != own[0]:
            return []
        axis, low, high = step
        size = own[2] - own[1]
        if high - low != size or low % size:
            return []
        parts.setdefault(low, here.input[2])
        if len(parts) * size == tracer.shape(node.input[0])[axis]:
            return [parts[at] for at in sorted(parts)]
        here = tracer.index.real_maker(here.input[0])
    return []


def _window_of(tracer: Tracing, node: onnx.NodeProto) -> tuple[int, int, int] | None:
    tracer.spend(node.output[0])
    return window(tracer, node) if node.op_type in ("ScatterND", "ScatterElements") else None


def assigned_where(tracer: Tracing, node: onnx.NodeProto, ref: Ref) -> tuple[Ref, Ref] | None:
    """(mask, update) of `x[mask] = update`, read at the element `ref` of what ScatterND makes.

    Boolean assignment is exported as NonZero, Transpose, ScatterND: where the mask holds, the
    update, else what was there. The update is one number, or is read at the same positions.
    """
    index = tracer.index
    if node.op_type != "ScatterND" or attributes(node).get("reduction", "none") != "none":
        return None
    chain = index.real_maker(node.input[1])
    if chain is None or chain.op_type != "Transpose":
        return None
    nonzero = index.real_maker(chain.input[0])
    if nonzero is None or nonzero.op_type != "NonZero":
        return None
    mask = nonzero.input[0]
    shape, whole = tracer.shape(mask), tracer.shape(node.input[0])
    if whole[: len(shape)] != shape:
        return None
    at = Ref(mask, ref.coords[: len(shape)])
    update = node.input[2]
    if tracer.fill(update) is not None:
        return at, Ref(update, (ZERO,) * len(whole))
    return (at, source) if (source := _picked(tracer, update, node.input[1], ref)) else None


def _picked(tracer: Tracing, update: str, points: str, ref: Ref) -> Ref | None:
    """The element of which `y[mask]` (GatherND at the same points) is made."""
    gather = tracer.index.real_maker(update)
    if gather is None or gather.op_type != "GatherND" or attributes(gather).get("batch_dims", 0):
        return None
    same = tracer.index.unaliased(gather.input[1]) == tracer.index.unaliased(points)
    whole = tracer.shape(gather.input[0])
    return Ref(gather.input[0], ref.coords) if same and len(whole) == len(ref.coords) else None
