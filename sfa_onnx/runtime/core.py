"""The C ABI of `kernels/core/sfa_core.h` through ctypes: the kernels without any framework.

Field names and order are the header's; ctypes lets go of the interpreter lock for every call.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

from sfa_onnx.errors import ContractError, MissingError
from sfa_onnx.runtime.ort import library_path

__all__ = [
    "DTYPES",
    "HOLES",
    "LAYOUTS",
    "ROUNDINGS",
    "Error",
    "IndexerParams",
    "PackParams",
    "Params",
    "core",
    "refuse_if",
]

# Numbers of sfa_core_dtype by the item's name as NumPy and torch spell it.
DTYPES: Final = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}
LAYOUTS: Final = {"BSND": 0, "TND": 1, "PA_BSND": 2}
HOLES: Final = {"error": 0, "skip": 1, "stop": 2}
ROUNDINGS: Final = {"exact": 0, "npu": 1}

_I32, _I64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class Params(ctypes.Structure):
    """sfa_core_params: one attention call."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        *_fields(_I32, "isa", "query_dtype", "cache_dtype", "layout_query", "layout_kv"),
        *_fields(_I32, "sparse_mode", "holes"),
        ("scale_value", ctypes.c_float),
        *_fields(_I32, "reserved", "num_heads", "nope_dim", "rope_dim", "tile_size"),
        *_fields(_I32, "sparse_block_size", "sparse_count"),
        *_fields(_I64, "batch", "query_s", "query_t", "kv_s", "block_num", "block_size"),
        *_fields(_I64, "block_table_cols"),
        *_fields(_PTR, "query", "query_rope", "key", "key_rope", "sparse_indices", "block_table"),
        *_fields(_PTR, "actual_seq_lengths_query", "actual_seq_lengths_kv", "out"),
        *_fields(_I32, "rounding", "reserved2"),
        *_fields(_PTR, "sinks", "softmax_max", "softmax_sum"),
    ]


class IndexerParams(ctypes.Structure):
    """sfa_core_indexer_params: one indexer call; `kv` for the header's `key` in sizes."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        *_fields(_I32, "isa", "dtype", "weights_dtype", "layout_query", "layout_key"),
        *_fields(_I32, "sparse_mode", "rounding", "num_heads", "head_dim", "sparse_count"),
        *_fields(_I32, "reserved"),
        *_fields(_I64, "batch", "query_s", "query_t", "kv_s", "block_num", "block_size"),
        *_fields(_I64, "block_table_cols"),
        *_fields(_PTR, "query", "key", "weights", "query_dequant_scale", "key_dequant_scale"),
        *_fields(_PTR, "block_table", "actual_seq_lengths_query", "actual_seq_lengths_key"),
        *_fields(_PTR, "sparse_indices", "sparse_values"),
    ]


class PackParams(ctypes.Structure):
    """sfa_core_pack_params: rows to be packed."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        *_fields(_I32, "nope_dtype", "rope_dtype", "nope_dim", "rope_dim", "tile_size"),
        ("clip", ctypes.c_float),
        ("reserved", _I32),
        ("rows", _I64),
        *_fields(_PTR, "nope", "rope", "scale", "out"),
    ]


class Error(ctypes.Structure):
    """sfa_core_error."""

    _fields_ = [
        *_fields(_I32, "status", "batch"),
        *_fields(_I64, "token", "slot", "value", "limit"),
        ("what", ctypes.c_char_p),
    ]


@functools.cache
def core() -> ctypes.CDLL:
    """The compiled library, its entry points declared.

    Raises:
        MissingError: it was not built, or is another version than this package.
    """
    path = library_path()
    library = ctypes.CDLL(str(path))
    try:
        library.sfa_core_run_threads.argtypes = [_PTR, _I32, _PTR]
        library.sfa_core_indexer_run_threads.argtypes = [_PTR, _I32, _PTR]
        library.sfa_core_pack.argtypes = [_PTR, _I64, _I64, _PTR]
        library.sfa_core_row_bytes.restype = _I64
    except AttributeError as error:
        raise _other_version(str(path), str(error)) from error
    found = Error()
    library.sfa_core_run_threads(ctypes.byref(Params()), 1, ctypes.byref(found))
    if found.limit != ctypes.sizeof(Params):
        sizes = f"its calls have {found.limit} bytes, expected {ctypes.sizeof(Params)}"
        raise _other_version(str(path), sizes)
    return library


def _other_version(path: str, what: str) -> MissingError:
    return MissingError(
        f"{path} belongs to another version of this package ({what}); rebuild it with"
        " `pip install --force-reinstall .`"
    )


def refuse_if(status: int, error: Error) -> None:
    """Raise what the core complains about.

    Raises:
        ContractError: `status` is not 0.
    """
    if not status:
        return
    buffer = ctypes.create_string_buffer(512)
    core().sfa_core_describe(ctypes.byref(error), buffer, len(buffer))
    raise ContractError(buffer.value.decode())
