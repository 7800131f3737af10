"""Open and save models without touching their weights.

A 671B model is a 12 MB graph beside 1.5 TB of weights. `load_model` reads the graph only;
`save_model` writes atomically, next to the weights (`sfa_onnx.files.weights` knows other places).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import TensorProto

from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.files.external import is_lfs_pointer, iter_tensors
from sfa_onnx.files.names import escape_names, is_utf8
from sfa_onnx.files.sound import assert_sound
from sfa_onnx.files.weights import place_weights
from sfa_onnx.files.weights_file import WeightsFile
from sfa_onnx.files.writing import atomic_write, check_target
from sfa_onnx.guard.doors import door
from sfa_onnx.guard.text import printable

__all__ = [
    "atomic_write",
    "hash_message",
    "hash_tensors_and_nodes",
    "load_model",
    "paused_gc",
    "read_model",
    "save_model",
]

_log = logging.getLogger("sfa_onnx")
_HEAD = 256  # bytes that identify other formats
_OTHERS = {  # none of these begins a binary model, whose first byte is a small tag
    b"\x1f\x8b": "packed by gzip; unpack it (gunzip) and take the .onnx file",
    b"PK\x03\x04": "a zip archive (.npz, .pt, .zip), no model; unpack it, or export to ONNX",
    b"{": "text (JSON); convert it with google.protobuf.json_format.Parse and onnx.save",
    b"ir_version": "text; convert it with google.protobuf.text_format.Parse and onnx.save",
    b"<": "text; a model in onnx's own syntax is converted by onnx.parser.parse_model",
    **{
        bytes([0x80, protocol]): "a Python pickle, no model; export it to ONNX"
        for protocol in range(2, 6)
    },
    b"\x7fELF": "a program or library, no model",
}
_NAMES_LIMIT = 1 << 28  # bytes of a model in memory that is serialised to look at its names
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


@door
def load_model(source: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """Open a model without its external weights, and see that it is sound.

    Args:
        source: a path to a binary `.onnx` file, or a `ModelProto`, which is returned as it is
            (a copy, where names had to be escaped because they are not UTF-8).

    Raises:
        UsageError: there is no such file, or it cannot be read.
        ModelError: the file is not an ONNX model, is empty, is larger than protobuf allows, or
            breaks the format's rules.
        BudgetError: its functions would unfold into too many nodes.
    """
    model, data = _read(source)
    in_memory = isinstance(source, onnx.ModelProto)
    what = f"the model {model.graph.name!r}" if in_memory else str(source)
    with paused_gc():
        assert_sound(model, what, data)
    return model


def read_model(source: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """Open a model without its external weights; whether it is sound is for the caller to ask.

    Args:
        source: as in `load_model`.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        ModelError: the file is not an ONNX model, is empty, or is larger than protobuf allows.
    """
    return _read(source)[0]


def _read(
    source: str | os.PathLike[str] | onnx.ModelProto,
) -> tuple[onnx.ModelProto, bytes | None]:
    """The model and its serialised form, if that is at hand."""
    if isinstance(source, onnx.ModelProto):
        return _named(source, f"the model {source.graph.name!r}", source)
    if not isinstance(source, str | os.PathLike):
        raise UsageError(
            f"expected the path of an .onnx file or an onnx.ModelProto, got {type(source).__name__}"
        )
    path = Path(source)
    if not path.is_file():
        what = "this is a folder" if path.is_dir() else "no such file"
        raise UsageError(f"{path}: {what}; expected the path of an .onnx file")
    size = path.stat().st_size
    if size > _PROTO_LIMIT:
        raise ModelError(
            f"{path}: {size / 1e9:.1f} GB in one file, but protobuf reads at most 2 GB. Save the"
            " weights as external data (onnx.save(..., save_as_external_data=True)) and try again"
        )
    model = onnx.ModelProto()
    try:
        with paused_gc():
            data = path.read_bytes()
            _refuse_others(path, data[:_HEAD])
            model.ParseFromString(data)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    except DecodeError as error:
        raise ModelError(f"{path}: not a binary ONNX model ({error})") from error
    if not model.HasField("graph") or not model.graph.output:
        raise ModelError(
            f"{path}: this file parses but holds no ONNX graph with outputs; is it a truncated"
            " file, or another protobuf?"
        )
    with paused_gc():
        return _named(model, str(path), data)


def _refuse_others(path: Path, head: bytes) -> None:
    """Name what is often taken for an ONNX model and is none.

    Raises:
        ModelError: the file is a Git LFS pointer, onnxruntime's own format, packed, or text.
    """
    if is_lfs_pointer(head):
        raise ModelError(
            f"{path}: a Git LFS pointer, not the model itself: fetch it with `git lfs pull`"
            " (the weights beside it, too)"
        )
    if head[4:8] == b"ORTM":
        raise ModelError(
            f"{path}: a model in onnxruntime's own format (.ort), which cannot be rewritten; take"
            " the .onnx file that it was converted from"
        )
    for sign, told in _OTHERS.items():
        if head.startswith(sign):
            raise ModelError(f"{path}: {told}")


def _named(
    model: onnx.ModelProto, what: str, data: bytes | onnx.ModelProto
) -> tuple[onnx.ModelProto, bytes | None]:
    """The model, its names readable, and its serialised form, `data` as a rule."""
    if isinstance(data, onnx.ModelProto):
        data = data.SerializeToString() if data.ByteSize() < _NAMES_LIMIT else b""
    if not is_utf8(data):
        if what.startswith("the model "):
            model = onnx.ModelProto.FromString(data)
        spelled = escape_names(model)
        _log.warning(
            "%s: %d names are not UTF-8; they are written escaped: %s",
            printable(what), len(spelled), ", ".join(spelled[:3]),
        )  # fmt: skip
        data = b""
    return model, data or None


@door
def save_model(
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    *,
    source_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    weights: str | None = None,
    fresh: WeightsFile | None = None,
    keep_locations: bool = False,
    before_model: Callable[[], object] | None = None,
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
        keep_locations: refuse, instead of copying under another name, weights whose name is taken
            there by a file with other content.
        before_model: writes what belongs to the model, once its weights are in place.

    Raises:
        WeightsError: the weights would not be found beside the new file.
        UsageError: the file exists and `force` is not set.
        ModelError: the graph itself is larger than protobuf allows.
    """
    target = Path(path)
    check_target(target, force=force)
    _serialized(model, target)  # too large a graph is refused before weights are copied
    source = None if source_dir is None else Path(source_dir)
    name = "" if fresh is None else fresh.path.name
    renamed = place_weights(
        model, source, target, mode=weights, force=force, fresh=name, rename=not keep_locations
    )
    if fresh is not None:
        fresh.commit()
    if before_model is not None:
        before_model()
    # The model goes last: until then an older one and its weights are whole.
    atomic_write(target, _serialized(_relocated(model, renamed), target), force=force)
    return target


def _relocated(model: onnx.ModelProto, renamed: dict[str, str]) -> onnx.ModelProto:
    """The model itself; a copy whose tensors lie in other files where these were renamed."""
    if not renamed:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in iter_tensors(copy):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = renamed.get(entry.value, entry.value)
    return copy


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
