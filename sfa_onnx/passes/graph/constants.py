"""Constants that structure a graph: numbers, positions and flags. Weights are none of them."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["READ_LIMIT", "byte_size", "constant_of", "is_structural"]

READ_LIMIT = 1 << 20  # bytes of one structural constant

_INTEGRAL = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
)


def is_structural(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor is one that recognition reads: small, and a number, integers or flags."""
    if tensor.data_type not in _INTEGRAL and math.prod(tensor.dims) != 1:
        return False
    return byte_size(tensor) <= READ_LIMIT


def byte_size(tensor: onnx.TensorProto) -> int:
    """Bytes of its elements, wherever they are stored."""
    try:
        item = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, TypeError, ValueError):
        item = 8
    return int(math.prod(tensor.dims)) * item


def constant_of(node: onnx.NodeProto) -> np.ndarray | None:
    """What a Constant node holds; None for what is no tensor of numbers."""
    for a in node.attribute:
        if a.name == "value":
            return np.asarray(numpy_helper.to_array(a.t))
        if a.name in ("value_int", "value_ints"):
            return np.asarray(a.i if a.name == "value_int" else list(a.ints), np.int64)
        if a.name in ("value_float", "value_floats"):
            return np.asarray(a.f if a.name == "value_float" else list(a.floats), np.float32)
    return None
