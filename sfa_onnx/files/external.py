"""Tensors that lie outside the model's file: where exactly, and how their bytes are read.

Nothing is read by default. `StorageReader` fetches single ranges, to the byte, and keeps a log.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy
import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

from sfa_onnx.errors import WeightsError

__all__ = [
    "CONSTANT_LIMIT",
    "ExternalRange",
    "StorageReader",
    "external_range",
    "is_lfs_pointer",
    "iter_tensors",
]

CONSTANT_LIMIT = 1 << 20  # bytes of one structural constant that may be read from the weights

_LFS = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins so is a Git LFS pointer, which stands for a file elsewhere."""
    return head.startswith(_LFS)


@dataclass(frozen=True)
class ExternalRange:
    """Where the bytes of one external tensor lie: file location, offset and length in bytes."""

    location: str
    offset: int
    length: int | None


def external_range(tensor: TensorProto) -> ExternalRange:
    """Parse the external-data entries of `tensor`.

    Raises:
        WeightsError: no location, or an offset or length that is not a number.
    """
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries["length"]) if "length" in entries else None
    except ValueError as error:
        raise WeightsError(
            f"initializer {tensor.name!r}: external offset/length must be numbers, got"
            f" {entries.get('offset')!r} and {entries.get('length')!r}"
        ) from error
    if not location or "\0" in location or offset < 0 or (length is not None and length < 0):
        raise WeightsError(
            f"initializer {tensor.name!r}: external data needs a location and a non-negative"
            f" offset and length, got {entries}"
        )
    return ExternalRange(location, offset, length)


def iter_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every stored tensor: initializers and tensor attributes, in sub-graphs and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        kind = attribute.type
        if kind == AttributeProto.TENSOR:
            yield attribute.t
        elif kind == AttributeProto.TENSORS:
            yield from attribute.tensors
        elif kind == AttributeProto.GRAPH:
            yield from _graph_tensors(attribute.g)
        elif kind == AttributeProto.GRAPHS:
            for graph in attribute.graphs:
                yield from _graph_tensors(graph)


@dataclass
class StorageReader:
    """Reads ranges of external files, to the byte; each one is logged.

    Attributes:
        base_dir: the model's folder; None: the model was given in memory.
        limit: the most bytes that are read of one structural constant.
        log: every range read, "w.bin[0:24]", with the tensor's name where it is known.
        bytes_read: their sum.
    """

    base_dir: Path | None = None
    limit: int = CONSTANT_LIMIT
    log: list[str] = field(default_factory=list)
    bytes_read: int = 0

    def __call__(self, location: str, offset: int, length: int) -> bytes:
        """`length` bytes of a structural constant: the door `GraphIndex` reads through.

        Raises:
            WeightsError: too many bytes, or the file cannot be read.
        """
        if length > self.limit:
            raise WeightsError(
                f"{location}: {length} bytes were asked for; at most {self.limit} bytes of a"
                " structural constant are read"
            )
        return self._pread("", ExternalRange(location, offset, length), length)

    def weight(self, tensor: TensorProto) -> np.ndarray:
        """The value of a stored tensor of any size: only what a caller asked for in so many words.

        Raises:
            WeightsError: its length does not fit its shape, or the file cannot be read.
        """
        if tensor.data_location != TensorProto.EXTERNAL:
            return np.asarray(numpy_helper.to_array(tensor))
        where = external_range(tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        length = int(np.prod(tuple(tensor.dims), dtype=np.int64)) * dtype.itemsize
        if where.length is not None and where.length != length:
            raise WeightsError(
                f"initializer {tensor.name!r}: external length is {where.length} bytes, but its"
                f" type and shape {list(tensor.dims)} need {length}"
            )
        data = self._pread(tensor.name, where, length)
        return np.frombuffer(data, dtype).reshape(tuple(tensor.dims))

    def _pread(self, name: str, where: ExternalRange, length: int) -> bytes:
        """`length` bytes at the recorded offset, from a file inside the model's folder."""
        path = self._resolve(name, where.location)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for ever
        except OSError as error:
            raise WeightsError(
                f"initializer {name!r}: the weights file {path} cannot be opened"
                f" ({error.strerror}); put it back beside the model"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise WeightsError(
                    f"initializer {name!r}: {path} is a folder, pipe or device, expected a file"
                    " of weights; put the weights there"
                )
            data = _read_all(descriptor, length, where.offset)
        finally:
            os.close(descriptor)
        if len(data) != length:
            raise WeightsError(
                f"initializer {name!r}: {path} ends before byte {where.offset + length}; the"
                " weights file is truncated or belongs to another model"
            )
        span = f"{where.location}[{where.offset}:{where.offset + length}]"
        self.log.append(f"{name}: {span}" if name else span)
        self.bytes_read += length
        return data

    def _resolve(self, name: str, location: str) -> Path:
        """The file a location names; a location may not lead out of the model's folder."""
        if self.base_dir is None:
            raise WeightsError(
                f"initializer {name!r} lies in the external file {location!r}, but the model was"
                " given in memory; pass the path of the model instead"
            )
        pure = Path(location)
        if pure.is_absolute() or ".." in pure.parts:
            raise WeightsError(
                f"initializer {name!r}: external location {location!r} leads out of the model's"
                f" folder {self.base_dir}; onnx and onnxruntime reject it too. Move the weights"
                " beside the model and store a plain relative location"
            )
        return self.base_dir / pure


def _read_all(descriptor: int, length: int, offset: int) -> bytes:
    """Up to `length` bytes; one call reads at most 2 GB."""
    parts = []
    while length > 0 and (part := os.pread(descriptor, min(length, 1 << 30), offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
