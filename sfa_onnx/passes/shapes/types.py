"""Element types of values whose type the file does not declare."""

from __future__ import annotations

from typing import Final

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["MANTISSA", "NARROW", "type_step"]

_T = onnx.TensorProto
# Bits of a number that each float type keeps.
MANTISSA: Final[dict[int, int]] = {_T.BFLOAT16: 8, _T.FLOAT16: 11, _T.FLOAT: 24, _T.DOUBLE: 53}
# Types of eight bits or fewer that caches keep numbers in, beside scales.
NARROW: Final = frozenset(
    (_T.INT8, _T.UINT8, _T.INT4, _T.FLOAT8E4M3FN, _T.FLOAT8E4M3FNUZ, _T.FLOAT8E5M2)
) | {_T.FLOAT8E5M2FNUZ}
_BOOL_OPS = frozenset(
    ("And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not")
)
_INT64_OPS = frozenset(("Shape", "Size", "NonZero", "ArgMax", "ArgMin"))


def type_step(index: GraphIndex, node: onnx.NodeProto, value: str) -> tuple[int, str]:
    """(the type if this node decides it, else 0; the input that has the same type)."""
    op = node.op_type
    if op in ("Cast", "BitCast"):
        return int(attributes(node)["to"]), ""
    if op in _BOOL_OPS or op in ("Or", "Xor"):
        return onnx.TensorProto.BOOL, ""
    if op in _INT64_OPS or (op == "TopK" and value == node.output[1]):
        return onnx.TensorProto.INT64, ""
    if op == "ConstantOfShape":
        tensor = attributes(node).get("value")
        return int(tensor.data_type) if tensor is not None else onnx.TensorProto.FLOAT, ""
    if op == "Constant":
        array = index.constant(value)
        return (0 if array is None else onnx.helper.np_dtype_to_tensor_dtype(array.dtype)), ""
    if op in ("If", "Loop", "Scan"):
        return 0, ""
    if op in ("DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "QuantizeLinear"):
        return _quantized_type(node, value)
    same = {"Where": 1, "OneHot": 2, "CastLike": 1, "DequantizeLinear": 1}.get(op, 0)
    return 0, node.input[same] if len(node.input) > same else ""


def _quantized_type(node: onnx.NodeProto, value: str) -> tuple[int, str]:
    """As `_type_step`, of operators that make integers."""
    if node.op_type == "MatMulInteger":
        return onnx.TensorProto.INT32, ""
    if node.op_type == "DynamicQuantizeLinear":
        scale = value == node.output[1]
        return (onnx.TensorProto.FLOAT if scale else onnx.TensorProto.UINT8), ""
    zero = 7 if node.op_type == "QLinearMatMul" else 2  # the zero point has the result's type
    if len(node.input) > zero and node.input[zero]:
        return 0, node.input[zero]
    return onnx.TensorProto.UINT8, ""
