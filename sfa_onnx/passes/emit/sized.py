"""Sizes that no tensor of the site shows, computed from the dims of the graph's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import onnx

from sfa_onnx.passes.axes.steps import Stop
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.form import Atom, Form

__all__ = ["sized"]

_INT64 = onnx.TensorProto.INT64
_OPERATORS = {"Min": "Min", "Max": "Max", "//": "Div"}


class Making(Protocol):
    """What is asked of an emitter."""

    stem: str

    def emit(self, op: str, inputs: Sequence[str], hint: str, elem_type: int) -> str:
        """Append a node; the name of its output."""

    def ints(self, values: Iterable[int]) -> str:
        """An int64 vector."""

    def dim_of(self, value: str, axis: int) -> str:
        """One dim of a value, as an int64 vector of one."""


def sized(e: Making, sizes: Concrete, form: Form) -> str:
    """An int64 [1] tensor with the size that `form` says.

    Raises:
        Stop: only a run can show it.
    """
    parts = []
    for c, atoms in form.terms:
        product = "" if c != 1 else _atom(e, sizes, atoms[0])
        product = product or e.ints([c])
        for atom in atoms[c == 1 :]:
            product = e.emit("Mul", [product, _atom(e, sizes, atom)], "size", _INT64)
        parts.append(product)
    if form.const or not parts:
        parts.append(e.ints([form.const]))
    total = parts[0]
    for part in parts[1:]:
        total = e.emit("Add", [total, part], "size", _INT64)
    return total


def _atom(e: Making, sizes: Concrete, atom: Atom) -> str:
    if isinstance(atom, str):
        return e.dim_of(*_shown(sizes, atom))
    operator = _OPERATORS.get(atom.name)
    if operator is None:
        raise Stop(f"the size {atom} can only be known by running the model", e.stem)
    return e.emit(operator, [sized(e, sizes, a) for a in atom.arguments], "size", _INT64)


def _shown(sizes: Concrete, symbol: str) -> tuple[str, int]:
    """(input, axis) that has a symbol as its size."""
    for name, dims in sizes.index.entering.items():
        for axis, dim in enumerate(dims or ()):
            if dim == symbol:
                return name, axis
    raise Stop(f"no input shows the size {symbol}", symbol)
