"""Constants and input types that CANN's ONNX parser refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx

from sfa_onnx.ascend.checks.context import Context
from sfa_onnx.ascend.checks.facts import DATA_TYPES, NO_CONSTANT, dtype_name
from sfa_onnx.ascend.checks.finding import Finding, refused
from sfa_onnx.ascend.checks.view import is_external

__all__ = ["constant", "input_dtype"]

_T = onnx.TensorProto
_NUMBER = re.compile(r"\s*[+-]?\d+")


def _dtype_known(ctx: Context, elem_type: int) -> bool:
    return elem_type in DATA_TYPES or (ctx.cann.int4 and elem_type == _T.INT4)


def input_dtype(ctx: Context, name: str, value: onnx.ValueInfoProto) -> Iterator[Finding]:
    """A graph input whose type the parser does not know."""
    elem = value.type.tensor_type.elem_type if value.type.HasField("tensor_type") else 0
    if not _dtype_known(ctx, elem):
        yield refused(
            "input-dtype",
            f"graph input {name!r} has dtype {dtype_name(elem)}, which the parser does not know",
            "E19999",
            name,
            hint="feed it in another dtype and Cast inside the graph",
        )


def constant(ctx: Context, tensor: onnx.TensorProto, name: str) -> Iterator[Finding]:
    """An initializer or Constant of which the parser makes nothing."""
    elem, empty = tensor.data_type, 0 in tensor.dims
    if not _dtype_known(ctx, elem) or (
        elem in NO_CONSTANT and not is_external(tensor) and not empty
    ):
        yield refused(
            "constant-dtype",
            f"constant {name!r} has dtype {dtype_name(elem)}: the parser makes no constant of it",
            "E19999",
            name,
            hint="store it in another dtype and Cast (or Bitcast) in the graph",
        )
    elif is_external(tensor):
        yield from _external(ctx, tensor, name)
    elif not empty and not _has_data(tensor):
        message = f"constant {name!r} has dims {list(tensor.dims)} but no data at all"
        hint = "write the tensor again, with its data"
        yield refused("constant-no-data", message, "E19999", name, hint=hint, evidence="source")


def _has_data(tensor: onnx.TensorProto) -> bool:
    fields = (tensor.raw_data, tensor.float_data, tensor.int32_data, tensor.int64_data)
    more = (tensor.string_data, tensor.double_data, tensor.uint64_data)
    return any(len(f) for f in (*fields, *more))


def _external(ctx: Context, tensor: onnx.TensorProto, name: str) -> Iterator[Finding]:
    entries = {e.key: e.value for e in tensor.external_data}
    for key, value in entries.items():
        if key != "location" and not _NUMBER.match(value):
            yield refused(
                "external-key",
                f"external data of {name!r}: {key} = {value!r}; the parser reads every key but"
                " location as a number",
                ctx.cann.bad_number_code,
                name,
                hint="keep location, offset and length only",
                fixable=key not in ("offset", "length"),
            )
    if not entries.get("location"):
        message = f"external data of {name!r} names no location"
        hint = "write the tensor again, with location, offset and length"
        yield refused("external-location", message, "E19999", name, hint=hint, evidence="source")
