"""Shapes by onnx's own inference, one node at a time, for operators without a rule of ours."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx

from sfa_onnx.guard.guarded import infer_node
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.rules import Shape

__all__ = ["infer_by_schema"]

_LARGEST = 1 << 63  # sizes beyond are no sizes to onnx


class Known(Protocol):
    """What is asked of the values around a node."""

    index: GraphIndex

    def look_up(self, value: str) -> Shape | None:
        """The shape of a value; None when it is unknown."""

    def value(self, value: str) -> np.ndarray | None:
        """A constant, or what a chain of sizes evaluates to."""

    def elem_type(self, value: str) -> int:
        """The `TensorProto.DataType` of a value; 0 when it is not known."""


def infer_by_schema(sizes: Known, node: onnx.NodeProto) -> list[Shape | None]:
    """Ask onnx's own inference for one node; nothing when it knows nothing either."""
    nothing: list[Shape | None] = [None] * len(node.output)
    version = sizes.index.opsets.get(node.domain if node.domain != "ai.onnx" else "", 18)
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for name in node.input:
        if not name:
            continue
        shape = sizes.look_up(name)
        if shape is None or any(size >= _LARGEST for size in shape):
            return nothing
        elem = sizes.elem_type(name) or onnx.TensorProto.FLOAT
        types[name] = onnx.helper.make_tensor_type_proto(elem, shape)
        array = sizes.value(name)
        if array is not None and array.dtype.kind in "ib":
            data[name] = onnx.numpy_helper.from_array(array, name)
    inferred = infer_node(node, version, types, data, sizes.index.opsets)
    if inferred is None:
        return nothing
    return [_shape_of_type(inferred.get(name)) for name in node.output]


def _shape_of_type(proto: onnx.TypeProto | None) -> Shape | None:
    if proto is None or not proto.tensor_type.HasField("shape"):
        return None
    dims = proto.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None
