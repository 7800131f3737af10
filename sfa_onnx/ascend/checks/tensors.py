"""Constants whose bytes the parser does not find where the file says, without an error."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from sfa_onnx.ascend.checks.context import Context
from sfa_onnx.ascend.checks.finding import Finding, misread
from sfa_onnx.ascend.checks.view import Scope, is_external
from sfa_onnx.files.onnx_attrs import attribute

__all__ = ["nbytes", "tensors"]

_T = onnx.TensorProto


def tensors(ctx: Context, scope: Scope) -> Iterator[Finding]:
    """Initializers and Constant nodes of one graph whose bytes are not where the file says."""
    for tensor in scope.graph.initializer:
        yield from _tensor(ctx, scope, tensor, tensor.name)
    for node in ctx.nodes_of(scope):
        value = attribute(node.proto, "value") if node.op_type == "Constant" else None
        if isinstance(value, onnx.TensorProto):
            yield from _tensor(ctx, scope, value, node.name)


def _tensor(ctx: Context, scope: Scope, tensor: onnx.TensorProto, name: str) -> Iterator[Finding]:
    size = nbytes(tensor)
    if is_external(tensor):
        yield from _external(ctx, scope, tensor, name, size)
    elif tensor.raw_data and size is not None and len(tensor.raw_data) < size:
        yield misread(
            "raw-data-short",
            "error",
            f"{name!r} holds {len(tensor.raw_data)} bytes, its dims say {size}: not compared",
            name,
            "write the tensor again",
        )


def nbytes(tensor: onnx.TensorProto) -> int | None:
    """Bytes of a dense tensor by dtype and dims; None for strings and unknown dtypes."""
    special: dict[int, int] = {_T.INT4: 4, _T.UINT4: 4, _T.STRING: 0, _T.UNDEFINED: 0}
    bits = special.get(tensor.data_type)
    if bits is None:
        try:
            bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        except (KeyError, TypeError):
            return None
    count = int(np.prod([int(d) for d in tensor.dims], dtype=object)) if tensor.dims else 1
    return -(-count * bits // 8) if bits else None


def _external(
    ctx: Context, scope: Scope, tensor: onnx.TensorProto, name: str, size: int | None
) -> Iterator[Finding]:
    entries = {e.key: e.value for e in tensor.external_data}
    location, length = entries.get("location", ""), entries.get("length")
    foreign = [k for k in entries if k not in ("location", "offset", "length")]
    foreign = [k for k in foreign if entries[k][:1].isdigit()]
    if foreign:
        message = f"external data of {name!r}: {', '.join(foreign)} is read as the length"
        hint = "keep location, offset and length only"
        yield misread("external-key", "error", message, name, hint, fixable=True)
    if scope is not ctx.view.root:
        yield misread(
            "external-in-branch",
            "error",
            f"external data of {name!r} lies in a branch, where its path stays relative to wherever"
            " atc is run",
            name,
            "move the initializer to the outer graph",
            fixable=True,
        )
    if location.startswith("/"):
        message = f"external data of {name!r}: absolute location {location!r} gets the model's"
        message += " directory in front of it"
        yield misread("external-absolute", "error", message, name, "use a relative location")
    elif length is not None and length.isdigit() and size is not None and int(length) != size:
        message = f"external data of {name!r}: length {length}, but its dims say {size} bytes"
        yield misread("external-length", "error", message, name, "write the tensor again")
    elif ctx.view.base_dir is not None and location:
        yield from _external_file(ctx, entries, name, size)


def _external_file(
    ctx: Context, entries: dict[str, str], name: str, size: int | None
) -> Iterator[Finding]:
    assert ctx.view.base_dir is not None
    path = ctx.view.base_dir / entries["location"]
    offset = entries.get("offset", "0")
    start = int(offset) if offset.isdigit() else 0
    if not path.is_file():
        message = f"external data of {name!r}: no file {entries['location']!r} beside the model"
        hint = "put the weight file back; the parser does not look for it"
        yield misread("external-missing", "error", message, name, hint)
    elif size is not None and path.stat().st_size < start + size:
        message = f"external data of {name!r} ends at byte {start + size}, the file before"
        yield misread("external-short", "error", message, name, "copy the whole weight file")
