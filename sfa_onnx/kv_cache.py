"""The packed int8 KV cache in NumPy, under its public name."""

from __future__ import annotations

from sfa_onnx.operator.kv_cache import (
    dequantise,
    pack,
    page,
    quantise,
    quantise_keys,
    unpack,
    unpage,
    write_slots,
)

__all__ = [
    "dequantise",
    "pack",
    "page",
    "quantise",
    "quantise_keys",
    "unpack",
    "unpage",
    "write_slots",
]
