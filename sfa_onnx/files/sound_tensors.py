"""Stored tensors: a known type, a shape, and exactly the bytes that these need."""

from __future__ import annotations

import functools
import math
from typing import Final

import onnx
from onnx import SparseTensorProto, TensorProto

__all__ = ["DIGITS", "RANK", "sparse_problem", "tensor_problem"]

RANK: Final = 64  # axes that a tensor may have: NumPy's own limit
DIGITS: Final = 18  # of an external offset or length

_T = TensorProto
_PACKED: Final = {  # types with several elements to a byte: elements per byte
    **{getattr(_T, n): 2 for n in ("INT4", "UINT4", "FLOAT4E2M1") if hasattr(_T, n)},
    **{getattr(_T, n): 4 for n in ("INT2", "UINT2") if hasattr(_T, n)},
}
_DENSE: Final = (1 << 31) - 1  # bytes of one message
_COMPLEX: Final = (_T.COMPLEX64, _T.COMPLEX128)
_FIELDS: Final = {
    "float_data": (_T.FLOAT, _T.COMPLEX64),
    "double_data": (_T.DOUBLE, _T.COMPLEX128),
    "int64_data": (_T.INT64,),
    "uint64_data": (_T.UINT64, _T.UINT32),
    "string_data": (_T.STRING,),
}


def tensor_problem(tensor: TensorProto) -> str:
    """What is wrong with a stored tensor, as "holds 3 bytes, expected 8"; "" when nothing is."""
    kind = tensor.data_type
    if kind not in _KNOWN:
        return f"has the element type {kind}, which onnx {onnx.__version__} does not know"
    dims = tensor.dims[:]
    if dims and min(dims) < 0:
        return f"has the shape {list(dims)}, expected no negative size"
    if len(dims) > RANK:
        return f"has {len(dims)} axes, expected {RANK} at most"
    if tensor.data_location == _T.EXTERNAL:
        return _external_problem(tensor, kind, math.prod(dims))
    if tensor.HasField("segment"):
        return "is stored in segments, which no reader supports"
    count = math.prod(dims)
    if tensor.HasField("raw_data"):
        return _raw_problem(kind, count, len(tensor.raw_data))
    return _typed_problem(tensor, kind, count)


_KNOWN: Final = frozenset(_T.DataType.values()) - {_T.UNDEFINED}


@functools.cache
def _width(kind: int) -> int:
    """Bytes of one element of a type that is not packed."""
    return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _bytes(kind: int, count: int) -> int:
    per = _PACKED.get(kind)
    return count * _width(kind) if per is None else -(-count // per)


def sparse_problem(sparse: SparseTensorProto) -> str:
    """As `tensor_problem`; runtimes store such a tensor dense, so that has to be possible."""
    dims, values, indices = list(sparse.dims), sparse.values, sparse.indices
    if dims and min(dims) < 0:
        return f"has the shape {dims}, expected no negative size"
    for part, tensor in (("values", values), ("indices", indices)):
        if problem := tensor_problem(tensor):
            return f"keeps its {part} in a tensor that {problem}"
    given = list(indices.dims)
    count = math.prod(values.dims)
    if indices.data_type != _T.INT64 or given not in ([count], [count, len(dims)]):
        return f"has indices of the shape {given} for {count} values, expected int64 [{count}]"
    if (
        values.data_type != _T.STRING
        and (size := _bytes(values.data_type, math.prod(dims))) > _DENSE
    ):
        return f"takes {size} bytes when it is stored dense, and runtimes take at most {_DENSE}"
    return "" if indices.data_location == _T.EXTERNAL else _places_problem(indices, dims)


def _places_problem(indices: TensorProto, dims: list[int]) -> str:
    """Places of a sparse tensor that lie outside of it: in one number each, or one per axis."""
    places = onnx.numpy_helper.to_array(indices)
    ends = [math.prod(dims)] if places.ndim == 1 else dims
    for axis, (numbers, end) in enumerate(zip(places.reshape(-1, len(ends)).T, ends, strict=True)):
        bad = numbers[(numbers < 0) | (numbers >= end)]
        if bad.size:
            where = f" on axis {axis}" if places.ndim > 1 else ""
            return f"has a value at place {int(bad[0])}{where}, expected 0 to {end - 1}"
    return ""


def _raw_problem(kind: int, count: int, given: int) -> str:
    if kind == _T.STRING:
        return "stores strings as raw bytes, which the format does not allow"
    need = _bytes(kind, count)
    return "" if given == need else f"holds {given} bytes, expected {need} by its type and shape"


def _typed_problem(tensor: TensorProto, kind: int, count: int) -> str:
    field = next((name for name, kinds in _FIELDS.items() if kind in kinds), "int32_data")
    given = len(getattr(tensor, field))
    need = count * (2 if kind in _COMPLEX else 1)
    if kind in _PACKED:
        need = _bytes(kind, count)
    return "" if given == need else f"holds {given} values, expected {need} by its type and shape"


def _external_problem(tensor: TensorProto, kind: int, count: int) -> str:
    if kind == _T.STRING:
        return "holds strings in an external file, which the format does not allow"
    entries = {e.key: e.value for e in tensor.external_data}
    if not entries.get("location"):
        return "is external, but names no file"
    if "\0" in entries["location"]:
        return f"is external, and names the file {entries['location']!r}, which no system has"
    for key in ("offset", "length"):
        value = entries.get(key)
        if value is not None and not (value.isascii() and value.isdecimal()):
            return f"has the external {key} {value!r}, expected a number of bytes"
        if value is not None and len(value.lstrip("0")) > DIGITS:
            return f"has the external {key} {value[:DIGITS]}..., which no file has"
    length = entries.get("length")
    if length is not None and int(length) != (need := _bytes(kind, count)):
        return f"has {length} external bytes, expected {need} by its type and shape"
    return ""
