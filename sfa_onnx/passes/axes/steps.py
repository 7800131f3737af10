"""The vocabulary of tracing: an element of a tensor, and what one step back from it can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx

from sfa_onnx.passes.axes.expr import Expr, Label

__all__ = [
    "Causal",
    "Dot",
    "Joined",
    "Leaf",
    "Move",
    "Pieces",
    "Product",
    "Ref",
    "Scaled",
    "Step",
    "Stop",
    "is_float",
]

_T = onnx.TensorProto
_FLOATS: Final = (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16, _T.DOUBLE)


def is_float(elem_type: int) -> bool:
    """Whether a `TensorProto.DataType` is one of the floating types attention is computed in."""
    return elem_type in _FLOATS


class Stop(Exception):  # noqa: N818 - an early return through several frames
    """Recognition ends here: reason, the value it stopped at, and a hint.

    `addressing`: only how rows are addressed was not understood; see `bind/finished.py`.
    """

    def __init__(
        self, reason: str, at: str = "", hint: str = "", *, addressing: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.at, self.hint, self.addressing = reason, at, hint, addressing


@dataclass(frozen=True)
class Ref:
    """One element of `value`, as a function of labels."""

    value: str
    coords: tuple[Expr, ...]

    def substitute(self, swap: dict[Label, Expr]) -> Ref:
        """This with labels replaced."""
        return Ref(self.value, tuple(c.substitute(swap) for c in self.coords))

    @property
    def labels(self) -> frozenset[Label]:
        """Every label the coordinates depend on."""
        return frozenset().union(*(c.labels for c in self.coords))


@dataclass(frozen=True)
class Joined:
    """What chunks have apart, as one tensor that a replacement may make: a Concat along the keys.

    Attributes:
        parts: an element of every chunk, and the label that runs over its keys.
        rows: the other labels, one axis each, in front of the keys.
        whole: runs over all keys.
        last: labels behind the keys.
    """

    parts: tuple[tuple[Ref, Label], ...]
    rows: tuple[Label, ...]
    whole: Label
    last: tuple[Label, ...] = ()


@dataclass(frozen=True)
class Causal:
    """The mask that an operator makes itself: a key is seen up to the query's own `row`.

    Attributes:
        row: number of the query, from the start of the keys.
        rows: the labels of `row`, one axis each, in front of the keys.
        whole: runs over all keys.
    """

    row: Expr
    rows: tuple[Label, ...]
    whole: Label
    parts: tuple[tuple[Ref, Label], ...] = ()  # it is made of no tensor
    last: tuple[Label, ...] = ()


@dataclass(frozen=True)
class Move:
    """The element is an element of another tensor, perhaps in another float type."""

    ref: Ref


@dataclass(frozen=True)
class Scaled:
    """The element is `factor` times an element of another tensor."""

    ref: Ref
    factor: float


@dataclass(frozen=True)
class Product:
    """The element is the product of one element of each of two tensors (`inverse`: a / b)."""

    a: Ref
    b: Ref
    inverse: bool = False


@dataclass(frozen=True)
class Dot:
    """The element is `factor` * the sum over `label` of a * b."""

    a: Ref
    b: Ref
    label: Label
    factor: float = 1.0


@dataclass(frozen=True)
class Pieces:
    """Which tensor the element comes from depends on `label`: (low, high, element) per range."""

    label: Label
    parts: tuple[tuple[int, int, Ref], ...]


@dataclass(frozen=True)
class Leaf:
    """The element is computed here, or enters the graph here."""

    ref: Ref


Step = Move | Scaled | Product | Dot | Pieces | Leaf
