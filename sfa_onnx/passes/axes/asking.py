"""What a rule may ask of the tracer that it serves."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from sfa_onnx.passes.axes.expr import Expr
from sfa_onnx.passes.axes.steps import Ref, Step
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete, Shape

__all__ = ["Tracing"]


class Tracing(Protocol):
    """Sizes, constants and steps of the graph around a node."""

    index: GraphIndex
    sizes: Concrete

    def shape(self, value: str) -> Shape:
        """The concrete shape; stops recognition when it cannot be known."""

    def open(self, size: int) -> bool:
        """Whether a size changes with the sizes of the inputs."""

    def scalar(self, value: str) -> float | None:
        """The number in a one-element constant that does not depend on any dynamic size."""

    def fill(self, value: str) -> float | None:
        """The number a constant tensor holds everywhere."""

    def unify(self, a: int, b: int) -> None:
        """Sizes `a` and `b` meet on one axis."""

    def same_rows(self, indices: str, data: str, axis: int) -> None:
        """Every row of `data` has indices along `axis`."""

    def same_count(self, source: Shape, target: Shape) -> None:
        """A view keeps the number of elements."""

    def shown(self, condition: Ref, holds: bool) -> bool:
        """Whether keys are seen only where a condition says `holds`."""

    def whole(self, value: str, axis: int) -> str:
        """A name for `value`, were nothing left out along an axis of what a mask keeps."""

    def spend(self, value: str) -> None:
        """Count one step of the budget."""

    def step(self, ref: Ref) -> Step:
        """One step back from `ref`."""

    def operand(self, value: str, coords: tuple[Expr, ...]) -> Ref:
        """`value` as it is broadcast to the shape that `coords` address."""

    def following(self) -> AbstractContextManager[None]:
        """Index arithmetic is followed inside."""

    def index_value(self, ref: Ref, size: int = 0) -> Expr:
        """What an integer tensor holds at `ref`, on an axis of this size."""
