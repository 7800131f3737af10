"""Constants as nodes that compute them from the shapes of a site's operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.passes.shapes.form import Call, Form
from sfa_onnx.passes.verify.open.meaning import Decision
from sfa_onnx.passes.verify.sizes.tables import Band, Entries, Fill, Stairs

__all__ = ["Maker"]

Array = NDArray[Any]


class Maker:
    """Collects nodes and initializers that make constants of any size.

    Args:
        axes: operand -> forms of its dims, where sizes are read.
        prefix: of the values that are made.
    """

    def __init__(self, axes: Mapping[str, Sequence[Form]], prefix: str) -> None:
        self._axes, self._prefix = axes, prefix
        self._made: dict[Form, str] = {}
        self._words: dict[tuple[int, ...] | int, str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []

    def make(self, name: str, decision: Decision) -> None:
        """Let `name` hold the constant."""
        if not decision.opened:
            self.initializers.append(numpy_helper.from_array(decision.array, name))
            return
        kind = helper.np_dtype_to_tensor_dtype(decision.array.dtype)
        match decision.rule:
            case Entries():
                made = self._entries(decision)
            case Fill(value=value) if all(f.fixed for f in decision.numbers):
                one = numpy_helper.from_array(np.array([value], decision.array.dtype))
                shape = self._vector(decision.shape)
                self._node("ConstantOfShape", [shape], name, value=one)
                return
            case Fill():
                made = self._expand(self._number(decision.numbers[0]), decision.shape)
            case Stairs():
                made = self._stairs(decision)
            case Band():
                self._band(name, decision, decision.rule)
                return
            case _:
                raise TypeError(decision.rule)
        self._node("Cast", [made], name, to=kind)

    def _node(self, op: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        output = output or f"{self._prefix}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def _word(self, value: int | tuple[int, ...]) -> str:
        """An int64 constant."""
        if value not in self._words:
            name = f"{self._prefix}word_{len(self._words)}"
            self.initializers.append(numpy_helper.from_array(np.array(value, np.int64), name))
            self._words[value] = name
        return self._words[value]

    def _number(self, form: Form) -> str:
        """An int64 scalar."""
        if form.fixed:
            return self._word(form.const)
        if form not in self._made:
            if form.plain:
                self._made[form] = self._symbol(form.plain)
                return self._made[form]
            if isinstance(call := form.alone, Call):
                operator = "Div" if call.name == "//" else call.name
                parts = [self._number(a) for a in call.arguments]
                self._made[form] = self._node(operator, parts)
                return self._made[form]
            total = ""
            for coefficient, atoms in form.terms:
                term = self._word(coefficient)
                for atom in atoms:
                    term = self._node("Mul", [term, self._number(Form.of(atom))])
                total = self._node("Add", [total, term]) if total else term
            self._made[form] = self._node("Add", [total, self._word(form.const)])
        return self._made[form]

    def _symbol(self, symbol: str) -> str:
        """A size, read from the shape of an operand."""
        for value, forms in self._axes.items():
            for axis, form in enumerate(forms):
                if len(form.terms) == 1 and form.terms[0][1] == (symbol,):
                    shape = self._node("Shape", [value])
                    size = self._node("Gather", [shape, self._word(axis)], axis=0)
                    size = self._node("Sub", [size, self._word(form.const)])
                    return self._node("Div", [size, self._word(form.terms[0][0])])
        raise KeyError(symbol)

    def _vector(self, forms: Sequence[Form]) -> str:
        """An int64 vector."""
        if all(f.fixed for f in forms):
            return self._word(tuple(f.const for f in forms))
        parts = [self._node("Unsqueeze", [self._number(f), self._word((0,))]) for f in forms]
        return self._node("Concat", parts, axis=0)

    def _expand(self, value: str, shape: Sequence[Form]) -> str:
        return self._node("Expand", [value, self._vector(shape)])

    def _entries(self, decision: Decision) -> str:
        if not decision.shape:
            return self._number(decision.numbers[0])
        flat = self._vector(decision.numbers)
        return self._node("Reshape", [flat, self._vector(decision.shape)])

    def _line(self, size: Form, axis: int, rank: int) -> str:
        """0, 1, 2 ... along one of `rank` axes."""
        line = self._node("Range", [self._word(0), self._number(size), self._word(1)])
        shape = tuple(-1 if a == axis else 1 for a in range(rank))
        return self._node("Reshape", [line, self._word(shape)])

    def _stairs(self, decision: Decision) -> str:
        start, *steps = decision.numbers
        total = self._expand(self._number(start), decision.shape)
        for axis, (size, step) in enumerate(zip(decision.shape, steps, strict=True)):
            if step != Form():
                line = self._line(size, axis, len(decision.shape))
                total = self._node("Add", [total, self._node("Mul", [line, self._number(step)])])
        return total

    def _band(self, name: str, decision: Decision, band: Band) -> None:
        """`inside` where low <= column - row <= high."""
        shape = decision.shape if len(decision.shape) > 1 else (Form(const=1), *decision.shape)
        columns = self._line(shape[-1], 1, 2)
        distance = self._node("Sub", [columns, self._line(shape[-2], 0, 2)])
        bounds = iter(decision.numbers)
        chosen = []
        for op, bound in (("GreaterOrEqual", band.low), ("LessOrEqual", band.high)):
            if bound is not None:
                chosen.append(self._node(op, [distance, self._number(next(bounds))]))
        inside = self._node("And", chosen) if len(chosen) > 1 else chosen[0]
        values = []
        for n, value in enumerate((band.inside, band.outside)):
            array = np.array(value, decision.array.dtype)
            self.initializers.append(numpy_helper.from_array(array, f"{name}_{n}"))
            values.append(f"{name}_{n}")
        if decision.array.dtype == bool:
            table = inside if band.inside else self._node("Not", [inside])
        else:
            table = self._node("Where", [inside, *values])
        if len(decision.shape) == 1:
            table = self._node("Squeeze", [table, self._word((0,))])
        self._node("Expand", [table, self._vector(decision.shape)], name)
