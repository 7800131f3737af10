"""Rows that a mask picks, seen among all rows.

`x[mask]` has an axis whose length only a run shows: NonZero lists where the mask holds. Whatever is
summed over that axis is summed over all places of the mask, those left out where it does not hold.
So an element at a kept place `u` is read at the place `p` of the whole mask that `u` stands for:
an index `nonzero[.., u]` is `p`, and a tensor with an axis of kept places is what it would be,
were nothing left out. That tensor is none of the graph: it is looked through, or nothing is fused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sfa_onnx.passes.axes.asking import Tracing
from sfa_onnx.passes.axes.expr import Expr, Label, Quot, Read, Rem, fresh, split
from sfa_onnx.passes.axes.steps import Dot, Leaf, Move, Pieces, Product, Ref, Scaled, Step, Stop
from sfa_onnx.passes.shapes.kept import kept_mask

__all__ = ["among_all", "whole_step"]


def among_all(tracer: Tracing, ref: Ref, label: Label, place: Expr) -> Ref | None:
    """`ref` with the kept place `label` read at `place`, a position in the flattened mask.

    None: the label is used otherwise, such as for numbering what is kept.
    """
    mask = kept_mask(label.size)
    at = split(place, tracer.shape(mask))
    own = Expr.of(label)
    coords, axes = [], []
    for axis, coordinate in enumerate(ref.coords):
        if coordinate == own:
            axes.append(axis)
        found = place if coordinate == own else _read_at(tracer, coordinate, label, mask, at)
        if found is None:
            return None
        coords.append(found)
    moved = Ref(ref.value, tuple(coords))
    if not axes:
        return moved
    return replace(moved, value=tracer.whole(ref.value, axes[0])) if len(axes) == 1 else None


def _read_at(
    tracer: Tracing, expr: Expr, label: Label, mask: str, at: tuple[Expr, ...]
) -> Expr | None:
    """An expression with `nonzero[j, label]` replaced by `at[j]`."""
    if label not in expr.labels:
        return expr
    total = Expr(expr.const)
    for atom, by in expr.terms:
        own = Expr.of(atom)
        if label in own.labels:
            found = None
            if isinstance(atom, Quot | Rem):
                inner = _read_at(tracer, atom.expr, label, mask, at)
                whole = isinstance(atom, Quot)
                if inner is not None:
                    found = inner.floordiv(atom.by) if whole else inner.mod(atom.by)
            elif isinstance(atom, Read):
                found = _place(tracer, atom, label, mask, at)
            if found is None:
                return None
            own = found
        total = total + own * by
    return total


def _place(
    tracer: Tracing, read: Read, label: Label, mask: str, at: tuple[Expr, ...]
) -> Expr | None:
    node = tracer.index.maker(read.value)
    listed = node is not None and node.op_type == "NonZero"
    if node is not None and listed and tracer.index.unaliased(node.input[0]) == mask:
        which, kept = read.coords
        return at[which.const] if kept == Expr.of(label) and not which.terms else None
    inner = [_read_at(tracer, c, label, mask, at) for c in read.coords]
    coords = tuple(c for c in inner if c is not None)
    return Expr.of(Read(read.value, coords)) if len(coords) == len(inner) else None


def whole_step(tracer: Tracing, value: str, axis: int, ref: Ref) -> Step:
    """One step back from `ref`, an element of `value` were nothing left out along `axis`.

    Raises:
        Stop: `value` is computed of what is kept.
    """
    label = fresh("kept", tracer.shape(value)[axis])
    own = tuple(Expr.of(label) if i == axis else c for i, c in enumerate(ref.coords))
    step = tracer.step(Ref(value, own))
    found = (
        None
        if isinstance(step, Leaf)
        else _mapped(step, lambda r: among_all(tracer, r, label, ref.coords[axis]))
    )
    if found is None:
        raise Stop(
            f"{value} is computed of rows that the mask {kept_mask(label.size)} picks",
            value,
            "hide keys by the mask instead of picking those that it keeps",
        )
    return found


def _mapped(step: Step, elsewhere: Callable[[Ref], Ref | None]) -> Step | None:
    """A step with all its elements moved; None where one cannot be."""
    match step:
        case Move() | Scaled():
            ref = elsewhere(step.ref)
            return None if ref is None else replace(step, ref=ref)
        case Product() | Dot():
            a, b = elsewhere(step.a), elsewhere(step.b)
            return None if a is None or b is None else replace(step, a=a, b=b)
        case Pieces():
            parts = [(low, high, elsewhere(part)) for low, high, part in step.parts]
            known = tuple((low, high, part) for low, high, part in parts if part is not None)
            return replace(step, parts=known) if len(known) == len(parts) else None
    return None
