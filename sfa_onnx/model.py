"""Open and save models without touching their weights.

A 671B model is a 12 MB graph beside 1.5 TB of weights. `load_model` reads the graph only;
`ConstantReader` fetches single structural constants by exact byte range and keeps a log of it;
`save_model` writes atomically, next to the weights (`sfa_onnx.weights` knows the other places).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, TensorProto, numpy_helper

from sfa_onnx.errors import ModelError, UsageError, WeightsError

__all__ = [
    "CONSTANT_LIMIT",
    "ConstantReader",
    "ExternalRange",
    "atomic_write",
    "external_range",
    "hash_message",
    "hash_tensors_and_nodes",
    "iter_tensors",
    "load_model",
    "paused_gc",
    "save_model",
]

CONSTANT_LIMIT = 1 << 20  # bytes of one structural constant that may be read from the weights
_PROTO_LIMIT = (1 << 31) - 1  # protobuf's own limit for one message
_INTEGERS = frozenset(
    (
        TensorProto.BOOL,
        TensorProto.INT8,
        TensorProto.INT16,
        TensorProto.INT32,
        TensorProto.INT64,
        TensorProto.UINT8,
        TensorProto.UINT16,
        TensorProto.UINT32,
        TensorProto.UINT64,
    )
)


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """Stop the cyclic garbage collector: it costs 40-50 % of the time on 100,000-node graphs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load_model(source: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """Open a model without its external weights.

    Args:
        source: a path to a binary `.onnx` file, or a `ModelProto`, which is returned as it is.

    Raises:
        UsageError: there is no such file.
        ModelError: the file is not an ONNX model, is empty, or is larger than protobuf allows.
    """
    if isinstance(source, onnx.ModelProto):
        return source
    path = Path(source)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"{path}: the model file {what}; expected a path to an .onnx file")
    size = path.stat().st_size
    if size > _PROTO_LIMIT:
        raise ModelError(
            f"{path}: {size / 1e9:.1f} GB in one file, but protobuf reads at most 2 GB. Save the"
            " weights as external data (onnx.save(..., save_as_external_data=True)) and try again"
        )
    model = onnx.ModelProto()
    try:
        with paused_gc():
            model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ModelError(f"{path}: not a binary ONNX model ({error})") from error
    if not model.HasField("graph") or not model.graph.output:
        raise ModelError(
            f"{path}: this file parses but holds no ONNX graph with outputs; is it a truncated"
            " file, a Git LFS pointer or another protobuf?"
        )
    return model


def atomic_write(path: Path, data: bytes, *, force: bool = False) -> None:
    """Write `data` to `path` through a temporary file in the same folder and a rename.

    Raises:
        UsageError: `path` exists and `force` is not set, or its folder does not exist.
    """
    if path.exists() and not force:
        raise UsageError(f"{path} exists already; choose another name or pass force (--force)")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist; create it first")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_model(
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    *,
    source_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    weights: str | None = None,
) -> Path:
    """Write a model where its external weights are found, atomically.

    Args:
        model: the model; tensors stored externally keep their location, offset and length.
        path: the file to write.
        source_dir: the folder that the external locations refer to today; None: unknown (a model
            that lives in memory), which is accepted when every weights file lies beside `path`.
        force: overwrite an existing file.
        weights: None: the weights must already lie beside `path`; "copy": copy them there
            (sharing blocks where the file system can).

    Raises:
        WeightsError: the weights would not be found beside the new file.
        UsageError: the file exists and `force` is not set.
        ModelError: the graph itself is larger than protobuf allows.
    """
    from sfa_onnx.weights import place_weights

    target = Path(path)
    if target.exists() and not force:
        raise UsageError(f"{target} exists already; choose another name or pass force (--force)")
    data = _serialized(model, target)
    source = None if source_dir is None else Path(source_dir)
    place_weights(model, source, target, mode=weights, force=force)
    atomic_write(target, data, force=force)
    return target


def _serialized(model: onnx.ModelProto, target: Path) -> bytes:
    """The model's bytes, or a readable error when protobuf cannot hold them."""
    try:
        return bytes(model.SerializeToString())
    except (EncodeError, ValueError) as error:
        raise ModelError(
            f"{target}: the graph without external weights is larger than protobuf's 2 GB; strip"
            " stack traces (metadata_props) or store embedded tensors as external data"
        ) from error


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
    if not location or offset < 0 or (length is not None and length < 0):
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
class ConstantReader:
    """Reads structural constants; external ones by exact byte range, each one logged.

    Only scalars and integer or bool tables up to `CONSTANT_LIMIT` bytes are read from external
    files: weights and float masks never are. Constants stored inside the model cost no file access.
    """

    base_dir: Path | None = None
    limit: int = CONSTANT_LIMIT
    log: list[str] = field(default_factory=list)
    bytes_read: int = 0

    def read(self, tensor: TensorProto) -> np.ndarray:
        """The value of a structural constant.

        Raises:
            WeightsError: the tensor is a weight, is too large, or its file cannot be read.
        """
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        where, length = self._check(tensor)
        data = self._pread(tensor.name, where, length)
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.ClearField("external_data")
        copy.ClearField("data_location")
        copy.raw_data = data
        return numpy_helper.to_array(copy)

    def __call__(self, location: str, offset: int, length: int) -> bytes:
        """`length` bytes of an external file at `offset`: the door `GraphIndex` reads through."""
        if length > self.limit:
            raise WeightsError(
                f"{location}: {length} bytes were asked for; at most {self.limit} bytes of a"
                " structural constant are read"
            )
        return self._pread("", ExternalRange(location, offset, length), length)

    def _check(self, tensor: TensorProto) -> tuple[ExternalRange, int]:
        """The byte range of `tensor`, when it is something we may read."""
        where = external_range(tensor)
        elements = int(np.prod(tuple(tensor.dims), dtype=np.int64))
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        length = elements * itemsize
        if tensor.data_type not in _INTEGERS and elements != 1:
            raise WeightsError(
                f"initializer {tensor.name!r} {list(tensor.dims)} lies in {where.location!r} and is"
                " not a structural constant (scalar, integer or bool table); weights are not read"
            )
        if length > self.limit:
            raise WeightsError(
                f"initializer {tensor.name!r}: {length} bytes in {where.location!r}; at most"
                f" {self.limit} bytes of a structural constant are read"
            )
        if where.length is not None and where.length != length:
            raise WeightsError(
                f"initializer {tensor.name!r}: external length is {where.length} bytes, but its"
                f" type and shape {list(tensor.dims)} need {length}"
            )
        return where, length

    def _pread(self, name: str, where: ExternalRange, length: int) -> bytes:
        """`length` bytes at the recorded offset, from a file inside the model's folder."""
        path = self._resolve(name, where.location)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise WeightsError(
                f"initializer {name!r}: the weights file {path} cannot be opened"
                f" ({error.strerror}); a constant that shapes the graph is stored there"
            ) from error
        try:
            data = os.pread(descriptor, length, where.offset)
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


def hash_message(message: onnx.NodeProto | TensorProto) -> str:
    """Hash of a message's serialised bytes (external tensors: the pointer, not the weights)."""
    return hashlib.blake2b(message.SerializeToString(), digest_size=16).hexdigest()


def hash_tensors_and_nodes(graph: onnx.GraphProto) -> tuple[dict[str, str], list[str]]:
    """Hashes of a graph's parts.

    Returns:
        initializer name -> hash, and the hash of every node in graph order.
    """
    with paused_gc():
        return (
            {t.name: hash_message(t) for t in graph.initializer},
            [hash_message(n) for n in graph.node],
        )
