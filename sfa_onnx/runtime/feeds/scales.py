"""Inputs that scale stored numbers: what a quantiser makes is never negative."""

from __future__ import annotations

from typing import Final

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from sfa_onnx.passes.assume import SCALES, assumed_inputs
from sfa_onnx.passes.axes.steps import is_float
from sfa_onnx.passes.graph.kinds import ONNX_DOMAINS
from sfa_onnx.passes.shapes.types import NARROW

__all__ = ["scale_inputs"]

_CODES: Final = NARROW | {TensorProto.UINT4}
_VIEWS: Final = frozenset(
    ("Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "ScatterElements",
     "ScatterND", "Slice", "Squeeze", "Transpose", "Unsqueeze")
)  # fmt: skip
_SLOTS: Final = {"DequantizeLinear": 1, "QuantizeLinear": 1}


def scale_inputs(model: ModelProto, fused: ModelProto | None = None) -> frozenset[str]:
    """Float inputs that are scales: taken or asserted to be, or multiplied with narrow numbers.

    Args:
        model: whose inputs are meant.
        fused: the same model after fusing, which carries what was assumed of them.
    """
    said = assumed_inputs(fused or model, SCALES)
    floats = [v.name for v in model.graph.input if is_float(v.type.tensor_type.elem_type)]
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    codes = _codes(model.graph)
    return said | {n for n in floats if "scale" in n.lower() or _scales(n, readers, codes)}


def _codes(graph: GraphProto) -> set[str]:
    """Values that hold the numbers of inputs in eight bits or fewer, whatever their type."""
    found = {v.name for v in graph.input if v.type.tensor_type.elem_type in _CODES}
    for node in graph.node:
        if _is_view(node) and node.input[0] in found:
            found.add(node.output[0])
    return found


def _is_view(node: NodeProto) -> bool:
    """Whether a node lays numbers out anew; one of another domain may have any inputs."""
    return node.op_type in _VIEWS and node.domain in ONNX_DOMAINS


def _scales(name: str, readers: dict[str, list[NodeProto]], codes: set[str]) -> bool:
    """Whether views of an input stand in the slot of a scale."""
    stack, seen = [name], {name}
    while stack:
        value = stack.pop()
        for node in readers.get(value, ()):
            slot = _SLOTS.get(node.op_type)
            if slot is not None and list(node.input).index(value) == slot:
                return True
            if node.op_type == "Mul" and any(n in codes for n in node.input):
                return True
            if _is_view(node) and node.output[0] not in seen:
                seen.add(node.output[0])
                stack.append(node.output[0])
    return False
