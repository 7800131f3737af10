"""Masks that are written: constants scattered at indices, over constants or over other masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.expr import Expr, fresh, label_of
from sfa_onnx.passes.axes.trace import Pieces, Ref, Stop, Tracer
from sfa_onnx.passes.bind.hits import pointed
from sfa_onnx.passes.bind.literals import HIDDEN, Kept, Literal, Selected, Visible
from sfa_onnx.passes.bind.union import bounded, either, place, put_on

__all__ = ["Read", "patched", "put", "scattered"]

Read = Callable[[Tracer, Visible], list[Literal]]  # how a mask below the written one is read


def scattered(
    read: Read,
    tracer: Tracer,
    node: onnx.NodeProto,
    ref: Ref,
    *,
    is_bool: bool,
    positive: bool = True,
) -> list[Literal] | None:
    """Constants written at indices along the key axis: the selection itself."""
    axis = int(attributes(node).get("axis", 0)) % len(ref.coords)
    base = tracer.fill(node.input[0])
    update = tracer.fill(node.input[2])
    rows = tracer.shape(node.input[1])
    if 0 in rows:  # nothing is written
        data = Ref(node.input[0], ref.coords)
        return read(tracer, Visible(data, positive, is_bool))
    for i, (own, size) in enumerate(zip(rows, tracer.shape(node.input[0]), strict=True)):
        if i != axis and own != size:
            tracer.unify(own, size)
    if label_of(ref.coords[axis]) is None and not ref.coords[axis].labels:
        return None
    slot = fresh("slot", rows[axis])
    at = tuple(Expr.of(slot) if i == axis else c for i, c in enumerate(ref.coords))
    valid = None
    if update is None and is_bool and base == 0 and positive:  # scatter(valid)
        valid, update = Ref(node.input[2], at), 1.0
    here, (block, exact) = Visible(ref, positive, is_bool), place(ref.coords[axis])
    width = tracer.shape(node.input[0])[axis]
    fixed = block > 1 and tracer.static(node.input[0], axis)  # so many blocks, however many keys
    if fixed and any(tracer.open(x.size) for x in ref.coords[axis].labels):
        return None
    chosen = Selected(
        Ref(node.input[1], at), slot, width, valid=valid, block=block, exact=exact, mask=here
    )
    if base is None or update is None:
        if base is not None or update is None:
            return None
        over = None if is_bool else _scatter_over(tracer, node, chosen, update)
        return over or _written_over(read, tracer, node, here, chosen, update)
    if is_bool:
        keeps = (update != 0) == positive and (base != 0) != positive
    else:
        keeps = update == 0 and base < HIDDEN
    if keeps:
        return [chosen]
    label = tracer.index.label(tracer.index.producer[ref.value])
    soft = [v for v in (base, update) if v != 0 and not v < HIDDEN and not is_bool]
    if soft:
        raise Stop(
            f"ScatterElements {label} adds {soft[0]:g} to scores, which neither leaves a key as"
            " it is nor hides it",
            ref.value,
            "expected a mask of 0 where a key is selected and -inf elsewhere",
        )
    return [replace(here, hides=label)]


def _written_over(
    read: Read, tracer: Tracer, node: onnx.NodeProto, here: Visible, chosen: Selected, update: float
) -> list[Literal] | None:
    """Constants written into a mask that hides some keys already."""
    if not here.is_bool and not (update == 0 or update < HIDDEN):
        return None
    below = Ref(node.input[0], here.ref.coords)
    shows = (update != 0) == here.positive if here.is_bool else update == 0
    known = _literals(read, tracer, replace(here, ref=below))
    if known is None:
        return None
    if not shows:
        return [*known, replace(here, among=(chosen,))]
    parts = (bounded(tracer, here, known), Kept(here, (chosen,)))
    whole = either(here, parts)
    return None if whole is None else [whole]


def _scatter_over(
    tracer: Tracer, node: onnx.NodeProto, chosen: Selected, update: float
) -> list[Literal] | None:
    """Zeros written over a float table, which must hide whatever is not selected."""
    table = tracer.index.mask_table(node.input[0])
    if update != 0 or table is None or not bool((table < HIDDEN).all()):
        return None
    return [chosen]


def put(
    read: Read,
    tracer: Tracer,
    node: onnx.NodeProto,
    ref: Ref,
    *,
    is_bool: bool,
    positive: bool = True,
) -> list[Literal] | None:
    """mask[batch, row, indices] = constant: the selection, as advanced indexing writes it."""
    base, update = tracer.fill(node.input[0]), tracer.fill(node.input[2])
    if update is None or attributes(node).get("reduction", "none") != "none":
        return None
    if base is None:
        return _rows_over(read, tracer, node, Visible(ref, positive, is_bool), update)
    keeps = (update != 0) == positive and (base != 0) != positive
    if not is_bool:
        keeps = update == 0 and base < HIDDEN
    selected = pointed(tracer, node, ref) if keeps else None
    return None if selected is None else [selected]


def _rows_over(
    read: Read, tracer: Tracer, node: onnx.NodeProto, here: Visible, update: float
) -> list[Literal] | None:
    """Constants written over a few positions of a mask's first axis: mask[..., :2] = True."""
    points, first = node.input[1], here.ref.coords[0]
    count, *width = tracer.shape(points)
    if width != [1] or not tracer.static(points, 0) or label_of(first) is None:
        return None
    known = _literals(read, tracer, replace(here, ref=Ref(node.input[0], here.ref.coords)))
    if known is None or not (here.is_bool or update == 0 or update < HIDDEN):
        return None
    shows = (update != 0) == here.positive if here.is_bool else update == 0
    few = bounded(tracer, here, known)
    if not shows:
        return None if few is None else [Kept(here, few.among, few.extra, few.over)]
    whole = either(here, (few, Kept(here, (), count, first.labels)))
    return None if whole is None or not whole.among else [whole]


def _literals(read: Read, tracer: Tracer, mask: Visible) -> list[Literal] | None:
    """What a part of a mask is; None where that cannot be told."""
    try:
        return read(tracer, mask)
    except Stop:
        return None


def patched(read: Read, tracer: Tracer, here: Visible, step: Pieces) -> list[Literal] | None:
    """A mask of which a range was overwritten."""
    parts = []
    for _, _, ref in step.parts:
        part = replace(here, ref=ref)
        known = None if tracer.fill(ref.value) is not None else _literals(read, tracer, part)
        parts.append(None if known is None else bounded(tracer, part, known))
    whole = put_on(tracer, here, step, parts)
    return None if whole is None or not whole.among else [whole]
