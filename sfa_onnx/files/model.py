"""Open and save models without touching their weights.

A 671B model is a 12 MB graph beside 1.5 TB of weights. `load_model` reads the graph only;
`save_model` writes atomically, next to the weights (`sfa_onnx.files.weights` knows other places).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.files.weights import place_weights
from sfa_onnx.files.weights_file import WeightsFile

__all__ = [
    "atomic_write",
    "hash_message",
    "hash_tensors_and_nodes",
    "load_model",
    "paused_gc",
    "save_model",
]

_PROTO_LIMIT = (1 << 31) - 1  # protobuf's own limit for one message


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
    fresh: WeightsFile | None = None,
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
        fresh: new weights that this model reads; put beside it.

    Raises:
        WeightsError: the weights would not be found beside the new file.
        UsageError: the file exists and `force` is not set.
        ModelError: the graph itself is larger than protobuf allows.
    """
    target = Path(path)
    if target.exists() and not force:
        raise UsageError(f"{target} exists already; choose another name or pass force (--force)")
    data = _serialized(model, target)
    source = None if source_dir is None else Path(source_dir)
    name = "" if fresh is None else fresh.path.name
    place_weights(model, source, target, mode=weights, force=force, fresh=name)
    if fresh is not None:
        fresh.commit()
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
