"""The C ABI of kernels/core/sfa_core.h through ctypes, for tests and benchmarks.

`attention` runs one call on the calling thread (or on `threads` threads); arrays go in and out as
NumPy arrays (bfloat16: ml_dtypes). No ONNX Runtime is involved.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

F32, F16, BF16, I8 = 0, 1, 2, 3
DTYPES = {
    np.dtype(np.float32): F32,
    np.dtype(np.float16): F16,
    np.dtype(ml_dtypes.bfloat16): BF16,
    np.dtype(np.int8): I8,
}
LAYOUTS = {"BSND": 0, "TND": 1, "PA_BSND": 2}
ROUNDINGS = {"exact": 0, "npu": 1}
HOLES = {"error": 0, "skip": 1, "stop": 2}
ISAS = {
    "auto": 0,
    "scalar": 1,
    "avx2": 2,
    "avx512f": 3,
    "avx512_bf16": 4,
    "neon": 5,
    "neon_bf16": 6,
}

_I32, _I64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_ENUMS = ["isa", "query_dtype", "cache_dtype", "layout_query", "layout_kv", "sparse_mode", "holes"]
_SIZES = ["num_heads", "nope_dim", "rope_dim", "tile_size", "sparse_block_size", "sparse_count"]
_LONGS = ["batch", "query_s", "query_t", "kv_s", "block_num", "block_size", "block_table_cols"]
_TENSORS = [
    "query",
    "query_rope",
    "key",
    "key_rope",
    "sparse_indices",
    "block_table",
    "actual_seq_lengths_query",
    "actual_seq_lengths_kv",
    "out",
]


class Params(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        *((name, _I32) for name in _ENUMS),
        ("scale_value", ctypes.c_float),
        ("reserved", _I32),
        *((name, _I32) for name in _SIZES),
        *((name, _I64) for name in _LONGS),
        *((name, _PTR) for name in _TENSORS),
        ("rounding", _I32),
        ("reserved2", _I32),
        *((name, _PTR) for name in ["sinks", "softmax_max", "softmax_sum"]),
    ]


class PackParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        *(
            (name, _I32)
            for name in ["nope_dtype", "rope_dtype", "nope_dim", "rope_dim", "tile_size"]
        ),
        ("clip", ctypes.c_float),
        ("reserved", _I32),
        ("rows", _I64),
        *((name, _PTR) for name in ["nope", "rope", "scale", "out"]),
    ]


class Error(ctypes.Structure):
    _fields_ = [
        ("status", _I32),
        ("batch", _I32),
        *((name, _I64) for name in ["token", "slot", "value", "limit"]),
        ("what", ctypes.c_char_p),
    ]


class CoreError(RuntimeError):
    """A call that the core refused; `error` holds its details."""

    def __init__(self, error: Error):
        buffer = ctypes.create_string_buffer(512)
        library().sfa_core_describe(ctypes.byref(error), buffer, len(buffer))
        super().__init__(buffer.value.decode())
        self.error = error


def library_path() -> Path:
    """The installed library, or the one that SFA_ONNX_LIBRARY names."""
    if named := os.environ.get("SFA_ONNX_LIBRARY"):
        return Path(named)
    tail = Path("sfa_onnx/runtime/lib/libsfa_onnx_ops.so")
    roots = (Path(__file__).parents[1], Path(sysconfig.get_paths()["platlib"]))
    return next((root / tail for root in roots if (root / tail).exists()), roots[0] / tail)


_library: ctypes.CDLL | None = None


def library() -> ctypes.CDLL:
    global _library
    if _library is None:
        lib = ctypes.CDLL(str(library_path()))
        lib.sfa_core_num_tasks.restype = _I64
        lib.sfa_core_row_bytes.restype = _I64
        lib.sfa_core_isa.restype = ctypes.c_char_p
        lib.sfa_core_isa_available.restype = ctypes.c_char_p
        lib.sfa_core_run_task.argtypes = [_PTR, _I64]
        lib.sfa_core_num_tasks.argtypes = [_PTR]
        lib.sfa_core_end.argtypes = [_PTR, _PTR]
        lib.sfa_core_pack.argtypes = [_PTR, _I64, _I64, _PTR]
        _library = lib
    return _library


def isas() -> list[str]:
    """Names of the paths of this machine, best first."""
    return library().sfa_core_isa_available().decode().split(",")


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def build(
    query: np.ndarray,
    key: np.ndarray,
    indices: np.ndarray,
    *,
    scale: float,
    query_rope: np.ndarray | None = None,
    key_rope: np.ndarray | None = None,
    block_table: np.ndarray | None = None,
    actual_q: np.ndarray | None = None,
    actual_kv: np.ndarray | None = None,
    layout_query: str = "BSND",
    layout_kv: str = "BSND",
    sparse_mode: int = 3,
    sparse_block_size: int = 1,
    rope_dim: int = 64,
    tile_size: int = 128,
    holes: str = "error",
    isa: str = "auto",
    rounding: str = "exact",
    sinks: np.ndarray | None = None,
    softmax: tuple[np.ndarray, np.ndarray] | None = None,
    out: np.ndarray | None = None,
) -> tuple[Params, np.ndarray]:
    """Parameters of one call and its output array. The tensors must outlive the parameters.

    Args:
        query: [B, S1, N1, D] or [T, N1, D]; D holds the rope for packed keys only.
        key: int8 packed rows [.., 1, D], or the float latents [.., 1, C].
        indices: [B, S1, 1, K] or [T, 1, K] int32.
        sinks: [N1] float32.
        softmax: softmax_max and softmax_sum to be written, [.., N1] float32.
    """
    packed = key.dtype == np.int8
    rope = rope_dim if packed else (query_rope.shape[-1] if query_rope is not None else 0)
    nope = query.shape[-1] - rope if packed else query.shape[-1]
    lead = query.shape[:-2]
    if out is None:
        out = np.zeros((*lead, query.shape[-2], nope), query.dtype)
    batch = len(actual_q) if layout_query == "TND" else lead[0]
    paged = layout_kv == "PA_BSND"
    p = Params(
        struct_size=ctypes.sizeof(Params),
        isa=ISAS[isa],
        query_dtype=DTYPES[query.dtype],
        cache_dtype=DTYPES[key.dtype],
        layout_query=LAYOUTS[layout_query],
        layout_kv=LAYOUTS[layout_kv],
        sparse_mode=sparse_mode,
        holes=HOLES[holes],
        scale_value=scale,
        num_heads=query.shape[-2],
        nope_dim=nope,
        rope_dim=rope,
        tile_size=tile_size,
        sparse_block_size=sparse_block_size,
        sparse_count=indices.shape[-1],
        batch=batch,
        query_s=lead[1] if layout_query == "BSND" else 0,
        query_t=int(np.prod(lead)),
        kv_s=0 if paged else key.shape[1 if layout_kv == "BSND" else 0],
        block_num=key.shape[0] if paged else 0,
        block_size=key.shape[1] if paged else 0,
        block_table_cols=block_table.shape[1] if paged else 0,
        query=_address(query),
        query_rope=_address(query_rope),
        key=_address(key),
        key_rope=_address(key_rope),
        sparse_indices=_address(indices),
        block_table=_address(block_table),
        actual_seq_lengths_query=_address(actual_q),
        actual_seq_lengths_kv=_address(actual_kv),
        out=_address(out),
        rounding=ROUNDINGS[rounding],
        sinks=_address(sinks),
        softmax_max=_address(softmax[0] if softmax else None),
        softmax_sum=_address(softmax[1] if softmax else None),
    )
    return p, out


def run(params: Params, threads: int = 1, order: list[int] | None = None) -> None:
    """One call; `order` runs its tasks in that order, `threads` shares them out.

    Raises:
        CoreError: the core refused.
    """
    lib, error, call = library(), Error(), ctypes.c_void_p()
    if threads == 1 and order is None:
        if lib.sfa_core_run(ctypes.byref(params), ctypes.byref(error)):
            raise CoreError(error)
        return
    if lib.sfa_core_begin(ctypes.byref(params), ctypes.byref(call), ctypes.byref(error)):
        raise CoreError(error)
    todo = list(range(lib.sfa_core_num_tasks(call))) if order is None else list(order)
    share(lib.sfa_core_run_task, call, todo, threads)
    if lib.sfa_core_end(call, ctypes.byref(error)):
        raise CoreError(error)


def num_tasks(params: Params) -> int:
    lib, error, call = library(), Error(), ctypes.c_void_p()
    if lib.sfa_core_begin(ctypes.byref(params), ctypes.byref(call), ctypes.byref(error)):
        raise CoreError(error)
    count = lib.sfa_core_num_tasks(call)
    lib.sfa_core_end(call, None)
    return int(count)


def share(run_task: Any, call: ctypes.c_void_p, todo: list[int], threads: int) -> None:
    """Run the tasks of a call on some threads."""

    def work(part: list[int]) -> None:
        for task in part:
            run_task(call, task)

    workers = [threading.Thread(target=work, args=(todo[i::threads],)) for i in range(1, threads)]
    for worker in workers:
        worker.start()
    work(todo[::threads])
    for worker in workers:
        worker.join()


def attention(query: np.ndarray, key: np.ndarray, indices: np.ndarray, **kw: Any) -> np.ndarray:
    """`build` and `run` in one go."""
    params, out = build(query, key, indices, **kw)
    run(params)
    return out


def pack(
    nope: np.ndarray,
    rope: np.ndarray | None,
    scale: np.ndarray | None = None,
    clip: float = 1.0,
    tile_size: int = 128,
) -> np.ndarray:
    """KvCachePack of [rows, C], [rows, R] (and [rows, tiles] scales) -> int8 [rows, D]."""
    lib, error = library(), Error()
    rope_dim, rope_dtype = (0, BF16) if rope is None else (rope.shape[1], DTYPES[rope.dtype])
    width = lib.sfa_core_row_bytes(nope.shape[1], rope_dim, tile_size, rope_dtype)
    out = np.empty((len(nope), width), np.int8)
    p = PackParams(
        struct_size=ctypes.sizeof(PackParams),
        nope_dtype=DTYPES[nope.dtype],
        rope_dtype=rope_dtype,
        nope_dim=nope.shape[1],
        rope_dim=rope_dim,
        tile_size=tile_size,
        clip=clip,
        rows=len(nope),
        nope=_address(nope),
        rope=_address(rope),
        scale=_address(scale),
        out=_address(out),
    )
    if lib.sfa_core_pack(ctypes.byref(p), 0, len(nope), ctypes.byref(error)):
        raise CoreError(error)
    return out
