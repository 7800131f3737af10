"""Small node builders of the converted graph; every name is new and every node named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["Emitter"]


class Emitter:
    """Collects new nodes and initializers under one prefix."""

    def __init__(self, taken: set[str], opset: int, prefix: str = "sfa_kv") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._taken = taken
        self._opset = opset
        self._prefix = prefix
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}

    def name(self, hint: str) -> str:
        """A name nobody uses yet."""
        count, name = 0, f"{self._prefix}/{hint}"
        while name in self._taken:
            count += 1
            name = f"{self._prefix}/{hint}_{count}"
        self._taken.add(name)
        return name

    def constant(self, values: Sequence[int] | float, dtype: Any = np.int64) -> str:
        """An initializer with these numbers; equal ones are shared."""
        array = np.asarray(values, dtype)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._constants:
            name = self.name("const")
            self.initializers.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def real(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(value, np.float32)

    def largest(self, value: str) -> str:
        """The largest of the last axis, kept."""
        if self._opset >= 18:
            return self.op("ReduceMax", [value, self.constant([-1])], keepdims=1)
        return self.op("ReduceMax", [value], axes=[-1], keepdims=1)

    def op(
        self, op_type: str, inputs: Sequence[str], hint: str = "", domain: str = "", **attrs: Any
    ) -> str:
        """One node with one output; returns the output's name."""
        output = self.name(hint or op_type.lower())
        node = helper.make_node(
            op_type, list(inputs), [output], name=output, domain=domain, **attrs
        )
        self.nodes.append(node)
        return output

    def squeeze(self, value: str, axes: Sequence[int]) -> str:
        """Squeeze in the form this opset has; nothing for no axes."""
        return self._unit("Squeeze", value, axes)

    def unsqueeze(self, value: str, axes: Sequence[int]) -> str:
        """Unsqueeze in the form this opset has; nothing for no axes."""
        return self._unit("Unsqueeze", value, axes)

    def _unit(self, op_type: str, value: str, axes: Sequence[int]) -> str:
        if not axes:
            return value
        if self._opset >= 13:
            return self.op(op_type, [value, self.constant(list(axes))])
        return self.op(op_type, [value], axes=list(axes))

    def transpose(self, value: str, perm: Sequence[int]) -> str:
        """Transpose; nothing for the identity."""
        if list(perm) == list(range(len(perm))):
            return value
        return self.op("Transpose", [value], perm=list(perm))

    def columns(self, value: str, axis: int, low: int, high: int) -> str:
        """value[..., low:high] on `axis`."""
        bounds = [self.constant([i]) for i in (low, high, axis)]
        return self.op("Slice", [value, *bounds])

    def to_canonical(self, value: str, axes: Sequence[str]) -> str:
        """A labelled tensor -> [B, S, 1, C]."""
        if tuple(axes) == ("B", "S", "1", "C"):
            return value
        units = [i for i, label in enumerate(axes) if label == "1"]
        labels = [label for label in axes if label != "1"]
        flat = self.squeeze(value, units)
        for label in "SB":  # dropped where their size is one
            if label not in labels:
                flat, labels = self.unsqueeze(flat, [0]), [label, *labels]
        ordered = self.transpose(flat, [labels.index(label) for label in "BSC"])
        return self.unsqueeze(ordered, [2])
