"""What a rule for shapes may ask of the values around its node."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx

__all__ = ["Shape", "Shapes", "Sizes"]

Shape = tuple[int, ...]
Shapes = list[Shape | None]


class Sizes(Protocol):
    """What a rule may ask of the values around its node."""

    def look_up(self, value: str) -> Shape | None:
        """The shape of a value; None when it is unknown."""

    def value(self, value: str) -> np.ndarray | None:
        """A constant, or what a chain of sizes evaluates to."""

    def entries(self, value: str) -> list[int] | None:
        """The same, flat, with open sizes as what they are."""

    def meet(self, a: int, b: int) -> None:
        """Two sizes must be equal."""

    def kept(self, mask: str) -> int:
        """The size of what a mask keeps."""

    def broadcast(self, *shapes: Shape) -> Shape:
        """The common shape of operands."""

    def maker(self, value: str) -> onnx.NodeProto | None:
        """The node that makes a value, Identity nodes skipped."""
