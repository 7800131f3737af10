"""A small writer of standard ONNX nodes, for function bodies. Good for opset 14 and later."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["MIN_OPSET", "Body"]

MIN_OPSET: Final = 14
_F, _I64, _BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


class Body:
    """Nodes in order, with fresh value names. Methods return the name of what they compute."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One node with one output."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, value: NDArray[Any]) -> str:
        """A constant tensor; equal ones are shared."""
        value = np.asarray(value)
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=numpy_helper.from_array(value))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """int64 [n]."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        """int64 scalar."""
        return self.constant(np.array(value, np.int64))

    def real(self, value: float) -> str:
        """float32 scalar."""
        return self.constant(np.array(value, np.float32))

    def attribute(self, name: str) -> str:
        """The calling node's FLOAT attribute `name` as a float32 scalar."""
        value = self.op("Constant")
        reference = onnx.AttributeProto(
            name="value_float", ref_attr_name=name, type=onnx.AttributeProto.FLOAT
        )
        self.nodes[-1].attribute.append(reference)
        return value

    def cast(self, x: str, to: int) -> str:
        """Cast to an onnx element type."""
        return self.op("Cast", x, to=to)

    def to_float(self, x: str) -> str:
        """Cast to float32."""
        return self.cast(x, _F)

    def to_int(self, x: str) -> str:
        """Cast to int64."""
        return self.cast(x, _I64)

    def to_bool(self, x: str) -> str:
        """Cast to bool."""
        return self.cast(x, _BOOL)

    def reshape(self, x: str, *dims: str | int) -> str:
        """Reshape; dims are ints (-1 allowed once) or names of int64 [n] values."""
        parts = [self.ints(d) if isinstance(d, int) else d for d in dims]
        shape = parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)
        return self.op("Reshape", x, shape, allowzero=0)

    def dims(self, x: str, start: int, end: int | None = None) -> str:
        """int64 vector of x's dims [start:end]."""
        stop = np.iinfo(np.int64).max if end is None else end
        return self.op("Slice", self.op("Shape", x), self.ints(start), self.ints(stop))

    def dim(self, x: str, axis: int) -> str:
        """One dim of x as an int64 scalar."""
        return self.op("Gather", self.op("Shape", x), self.scalar(axis))

    def vector(self, scalar: str) -> str:
        """An int64 scalar as int64 [1]."""
        return self.op("Reshape", scalar, self.ints(1))

    def range(self, count: str) -> str:
        """0 .. count-1."""
        return self.op("Range", self.scalar(0), count, self.scalar(1))

    def unsqueeze(self, x: str, *axes: int) -> str:
        """Insert axes."""
        return self.op("Unsqueeze", x, self.ints(*axes))

    def slice_last(self, x: str, start: str, end: str) -> str:
        """x[..., start:end]; the bounds are int64 [1]."""
        return self.op("Slice", x, start, end, self.ints(-1))

    def total(self, x: str, keepdims: int = 1) -> str:
        """Sum over the last axis."""
        return self.op("ReduceSum", x, self.ints(-1), keepdims=keepdims)

    def maximum(self, x: str) -> str:
        """Maximum over the last axis, kept."""
        if self.opset >= 18:
            return self.op("ReduceMax", x, self.ints(-1), keepdims=1)
        return self.op("ReduceMax", x, axes=[-1], keepdims=1)

    def constant_range(self, count: int) -> str:
        """0 .. count-1 for a known count."""
        return self.range(self.scalar(count))

    def top(self, x: str, count: int) -> tuple[str, str]:
        """The `count` largest along the last axis, best first, ties by lower index."""
        values, indices = f"top_{len(self.nodes)}", f"at_{len(self.nodes)}"
        k = self.ints(count)
        self.nodes.append(helper.make_node("TopK", [x, k], [values, indices], axis=-1))
        return values, indices
