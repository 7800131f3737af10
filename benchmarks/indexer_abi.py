"""The indexer's part of kernels/core/sfa_core.h through ctypes, for tests and benchmarks."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import kernel_abi as core

_I32, _I64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_INTS = ["isa", "dtype", "weights_dtype", "layout_query", "layout_key", "sparse_mode", "rounding"]
_SIZES = ["num_heads", "head_dim", "sparse_count", "reserved"]
_LONGS = ["batch", "query_s", "query_t", "key_s", "block_num", "block_size", "block_table_cols"]
_INPUTS = {
    "query": "query",
    "key": "key",
    "weights": "weights",
    "query_scale": "query_dequant_scale",
    "key_scale": "key_dequant_scale",
    "block_table": "block_table",
    "actual_seq_lengths_query": "actual_seq_lengths_query",
    "actual_seq_lengths_key": "actual_seq_lengths_key",
}


class Params(ctypes.Structure):
    """sfa_core_indexer_params."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        *((name, _I32) for name in (*_INTS, *_SIZES)),
        *((name, _I64) for name in _LONGS),
        *((name, _PTR) for name in (*_INPUTS, "sparse_indices", "sparse_values")),
    ]


class Call:
    """One call: its parameters, and the arrays that they point at.

    Args:
        inputs: the operator's inputs by name, contiguous.
        attributes: layout_query, layout_key, sparse_count, sparse_mode; others are ignored.
        isa: a path's name.
        rounding: "exact" or "npu" (int8 only).
    """

    def __init__(
        self,
        inputs: Mapping[str, np.ndarray],
        attributes: Mapping[str, Any],
        isa: str = "auto",
        rounding: str = "exact",
    ):
        self.inputs = dict(inputs)
        query, key, count = inputs["query"], inputs["key"], attributes["sparse_count"]
        lead = query.shape[:-2]
        tnd, paged = attributes["layout_query"] == "TND", attributes["layout_key"] == "PA_BSND"
        self.indices = np.full((*lead, 1, count), 12345, np.int32)
        kind = np.float32 if query.dtype == np.int8 else query.dtype
        self.values = np.zeros((*lead, 1, count), kind)
        self.params = Params(
            struct_size=ctypes.sizeof(Params),
            isa=core.ISAS[isa],
            dtype=core.DTYPES[query.dtype],
            weights_dtype=core.DTYPES[inputs["weights"].dtype],
            layout_query=core.LAYOUTS[attributes["layout_query"]],
            layout_key=core.LAYOUTS[attributes["layout_key"]],
            sparse_mode=attributes["sparse_mode"],
            rounding=core.ROUNDINGS[rounding],
            num_heads=query.shape[-2],
            head_dim=query.shape[-1],
            sparse_count=count,
            batch=len(inputs["actual_seq_lengths_query"]) if tnd else lead[0],
            query_s=0 if tnd else lead[1],
            query_t=int(np.prod(lead)),
            key_s=0 if paged else key.shape[-3],
            block_num=key.shape[0] if paged else 0,
            block_size=key.shape[1] if paged else 0,
            block_table_cols=inputs["block_table"].shape[1] if paged else 0,
            sparse_indices=self.indices.ctypes.data,
            sparse_values=self.values.ctypes.data,
        )
        for field, name in _INPUTS.items():
            if name in inputs:
                setattr(self.params, field, inputs[name].ctypes.data)

    def run(self, threads: int = 1, order: list[int] | None = None) -> None:
        """All tasks; `order` runs them in that order, `threads` shares them out.

        Raises:
            CoreError: the core refused.
        """
        lib, error, call = library(), core.Error(), ctypes.c_void_p()
        if threads == 1 and order is None:
            if lib.sfa_core_indexer_run(ctypes.byref(self.params), ctypes.byref(error)):
                raise core.CoreError(error)
            return
        begun = ctypes.byref(self.params), ctypes.byref(call), ctypes.byref(error)
        if lib.sfa_core_indexer_begin(*begun):
            raise core.CoreError(error)
        todo = list(range(lib.sfa_core_indexer_num_tasks(call))) if order is None else order
        core.share(lib.sfa_core_indexer_run_task, call, todo, threads)
        if lib.sfa_core_indexer_end(call, ctypes.byref(error)):
            raise core.CoreError(error)

    def num_tasks(self) -> int:
        """Into how many tasks the core cuts this call."""
        lib, error, call = library(), core.Error(), ctypes.c_void_p()
        begun = ctypes.byref(self.params), ctypes.byref(call), ctypes.byref(error)
        if lib.sfa_core_indexer_begin(*begun):
            raise core.CoreError(error)
        count = lib.sfa_core_indexer_num_tasks(call)
        lib.sfa_core_indexer_end(call, None)
        return int(count)


def library() -> ctypes.CDLL:
    """The core with the indexer's functions declared."""
    lib = core.library()
    lib.sfa_core_indexer_num_tasks.restype = _I64
    lib.sfa_core_indexer_num_tasks.argtypes = [_PTR]
    lib.sfa_core_indexer_run_task.argtypes = [_PTR, _I64]
    lib.sfa_core_indexer_end.argtypes = [_PTR, _PTR]
    lib.sfa_core_pool_bytes.restype = _I64
    return lib


def random_call(
    rng: np.random.Generator,
    dtype: Any,
    *,
    heads: int = 64,
    width: int = 128,
    keys: int = 4096,
    count: int = 2048,
    rows: int = 1,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Inputs and attributes of a BSND call of one sequence."""
    shapes = {"query": (1, rows, heads, width), "key": (1, keys, 1, width)}
    attributes = {"layout_query": "BSND", "layout_key": "BSND", "sparse_count": count}
    attributes["sparse_mode"] = 0
    if np.dtype(dtype) != np.int8:
        inputs = {n: rng.standard_normal(s, np.float32).astype(dtype) for n, s in shapes.items()}
        inputs["weights"] = rng.standard_normal((1, rows, heads), np.float32).astype(dtype)
        return inputs, attributes
    inputs = {n: rng.integers(-127, 128, s, np.int8) for n, s in shapes.items()}
    inputs["weights"] = rng.standard_normal((1, rows, heads), np.float32).astype(np.float16)
    for name, shape in (("query", (1, rows, heads)), ("key", (1, keys, 1))):
        inputs[f"{name}_dequant_scale"] = rng.uniform(0.5, 1, shape).astype(np.float16)
    return inputs, attributes


BF16 = np.dtype(ml_dtypes.bfloat16)
