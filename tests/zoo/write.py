"""A few lines to write ONNX graphs by hand, in whatever style a case wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

KINDS = {
    "f32": TensorProto.FLOAT,
    "f16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "i8": TensorProto.INT8,
    "u8": TensorProto.UINT8,
    "i32": TensorProto.INT32,
    "i64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


class Graph:
    """Collects nodes; values are names. `const` decides whether constants are nodes."""

    def __init__(self, opset: int, constants: str = "initializer") -> None:
        self.opset, self.constants = opset, constants
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.count = 0

    def name(self, hint: str) -> str:
        self.count += 1
        return f"{hint.lower()}_{self.count}"

    def const(self, value: Any, dtype: Any = None) -> str:
        array = np.array(value, dtype=dtype)
        name = self.name("c")
        tensor = numpy_helper.from_array(array, name)
        if self.constants == "initializer":
            self.tensors.append(tensor)
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def ints(self, *values: int) -> str:
        return self.const(values, np.int64)

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attrs: Any) -> Any:
        names = [self.name(kind) for _ in range(outputs)]
        self.nodes.append(
            helper.make_node(kind, list(inputs), names, name=f"/{names[0]}", domain=domain, **attrs)
        )
        return names[0] if outputs == 1 else names

    # ---- ops whose form changed between opsets, and shorthands -------------------------------
    def cast(self, x: str, kind: str) -> str:
        return self.op("Cast", x, to=KINDS[kind])

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.ints(*shape))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.op("Unsqueeze", x, self.ints(*axes))

    def squeeze(self, x: str, *axes: int) -> str:
        return self.op("Squeeze", x, self.ints(*axes))

    def cut(self, x: str, start: int, end: int, axis: int = -1) -> str:
        return self.op("Slice", x, self.ints(start), self.ints(end), self.ints(axis))

    def reduce(self, kind: str, x: str, axis: int = -1, keep: int = 1) -> str:
        if self.opset >= 18 or kind == "ReduceSum":
            return self.op(kind, x, self.ints(axis), keepdims=keep)
        return self.op(kind, x, axes=[axis], keepdims=keep)

    def model(
        self,
        inputs: Mapping[str, tuple[str, Sequence[int | str]]],
        outputs: Mapping[str, tuple[str, Sequence[int | str]]],
        results: Sequence[str],
        extra_opsets: Sequence[tuple[str, int]] = (),
    ) -> onnx.ModelProto:
        """The finished model; `results` are renamed to the outputs' names."""
        names = list(outputs)
        for node in self.nodes:
            node.output[:] = [names[results.index(o)] if o in results else o for o in node.output]
            node.input[:] = [names[results.index(i)] if i in results else i for i in node.input]

        def info(table: Mapping[str, tuple[str, Sequence[int | str]]]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(n, KINDS[k], s) for n, (k, s) in table.items()]

        graph = helper.make_graph(
            self.nodes, "by_hand", info(inputs), info(outputs), initializer=self.tensors
        )
        opsets = [("", self.opset), *extra_opsets]
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(d, v) for d, v in opsets],
            ir_version=8 if self.opset < 21 else 10 if self.opset < 25 else 13,
            producer_name="by hand",
        )
