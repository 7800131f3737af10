"""What a mask is made of: a selection of keys, or a tensor that shows and hides them."""

from __future__ import annotations

from dataclasses import dataclass, field

from sfa_onnx.passes.axes.expr import Label
from sfa_onnx.passes.axes.steps import Ref

__all__ = ["Kept", "Literal", "Selected", "Visible"]


@dataclass(frozen=True)
class Visible:
    """Visible where the tensor says so: `ref` is bool (== positive) or float (> `LOW`).

    `among`: it is part of a selection and made from these as well, so it cannot be any mask;
    `hides`: it hides the keys that are selected;
    `assumed`: what the caller asserts of the input that it is, "two-valued:mask";
    """

    ref: Ref
    positive: bool = True
    is_bool: bool = True
    among: tuple[Selected, ...] = field(default=(), compare=False)
    hides: bool = field(default=False, compare=False)
    assumed: str = field(default="", compare=False)


@dataclass(frozen=True)
class Selected:
    """Visible where the key's position is among `indices` (over all values of `slot`).

    `valid` is a tensor over the same slots that switches entries off, if the graph has one;
    `width` the positions that indices may name (more than there are keys: the rest is thrown away);
    `wraps`: negative indices count from the end (scatter) or name nothing (comparison).
    `block`: an index names so many keys that follow each other; `exact`: and nothing else, so that
    no other tensor than the indices need be looked at; `mask`: the finished selection.
    """

    indices: Ref
    slot: Label
    width: int
    wraps: bool = True
    valid: Ref | None = None
    block: int = 1
    exact: bool = True
    mask: Visible | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Kept:
    """Visible where `mask` says so: as many keys as `among` have entries, and `extra`, at most.

    `over`: labels one of which must run over the keys for `extra` to hold (none: any).
    """

    mask: Visible
    among: tuple[Selected, ...]
    extra: int = 0
    over: frozenset[Label] = frozenset()


Literal = Visible | Selected | Kept
