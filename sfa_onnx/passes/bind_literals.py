"""What a mask is made of: a selection of keys, or a tensor that shows and hides them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sfa_onnx.passes.axes import Expr, Label
from sfa_onnx.passes.axes_steps import Ref

__all__ = ["Literal", "Selected", "Visible", "alike"]


@dataclass(frozen=True)
class Visible:
    """Visible where the tensor says so: `ref` is bool (== positive) or float (> HIDDEN)."""

    ref: Ref
    positive: bool = True
    is_bool: bool = True


@dataclass(frozen=True)
class Selected:
    """Visible where the key's position is among `indices` (over all values of `slot`).

    `valid` is a tensor over the same slots that switches entries off, if the graph has one;
    `width` the positions that indices may name (more than there are keys: the rest is thrown away);
    `wraps`: negative indices count from the end (scatter) or name nothing (comparison).
    """

    indices: Ref
    slot: Label
    width: int
    wraps: bool = True
    valid: Ref | None = None


Literal = Visible | Selected


def alike(one: Literal, other: Literal) -> bool:
    """Whether two literals say the same; what the slots of a selection are called is no matter."""
    if not isinstance(one, Selected) or not isinstance(other, Selected):
        return one == other
    if one.slot.size != other.slot.size:
        return False
    swap = {other.slot: Expr.of(one.slot)}
    valid = other.valid.substitute(swap) if other.valid is not None else None
    return one == replace(other, slot=one.slot, indices=other.indices.substitute(swap), valid=valid)
