"""A cache far larger than L3, index sets that rotate through it, the ceilings of the machine."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import kernel_abi as core

K = 2048
NOPE, ROPE, TILE = 512, 64, 128
DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
# Rows ahead, and whether they go to L1 (0) or L2 (1).
GATHER_WAYS = ((8, 0), (16, 0), (32, 0), (16, 1), (32, 1))


class Abi(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("begin", "num_tasks", "run_task", "end")]

    @classmethod
    def of(cls, lib: ctypes.CDLL, prefix: str = "sfa_core") -> Abi:
        names = [f"{prefix}_{name}" for name, _ in cls._fields_]
        return cls(*(ctypes.cast(getattr(lib, name), ctypes.c_void_p) for name in names))


class Clock:
    """The compiled timers and ceilings of kernel_ceilings.cc."""

    def __init__(self) -> None:
        source = Path(__file__).with_name("kernel_ceilings.cc")
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "ceilings.so"
            flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-pthread"]
            subprocess.run(["g++", *flags, str(source), "-o", str(target)], check=True)
            self._lib = ctypes.CDLL(str(target))
        for name in ("bench_peak", "bench_gather", "bench_call", "bench_call_threads"):
            getattr(self._lib, name).restype = ctypes.c_double
        self._lib.bench_tasks.restype = ctypes.c_int64
        self._core = core.library()
        self._abi = Abi.of(self._core)
        self._error = core.Error()

    def peak(self, what: str, bursts: int = 40) -> float:
        """Best GFLOP/s of `bursts` short loops; 0 when the instruction is missing."""
        return max(self._lib.bench_peak(what.encode()) for _ in range(bursts))

    def gather(self, cache: Cache, index: np.ndarray, way: int) -> float:
        """Microseconds to read the rows of one index set once; `way` picks how it prefetches."""
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        took = 0.0
        for part in (cache.key, cache.key_rope):
            if part is not None:
                took += self._lib.bench_gather(
                    pointer(part.ctypes.data),
                    pointer(index.ctypes.data),
                    size(index.size),
                    size(part.shape[-1] * part.itemsize),
                    *GATHER_WAYS[way % len(GATHER_WAYS)],
                )
        return float(took) / 1e3

    def call(self, params: core.Params, threads: int = 1) -> float:
        """Microseconds of one call."""
        args = ctypes.byref(params), ctypes.byref(self._error)
        if threads == 1:
            took = self._lib.bench_call(self._core.sfa_core_run, *args)
        else:
            took = self._lib.bench_call_threads(ctypes.byref(self._abi), *args, threads)
        if took < 0:
            raise core.CoreError(self._error)
        return float(took) / 1e3

    def tasks(self, abi: Abi, params: ctypes.Structure, best: np.ndarray) -> None:
        """Run a call's tasks; `best` [tasks] float64 keeps the least nanoseconds of each."""
        where = ctypes.c_void_p(best.ctypes.data), ctypes.c_int64(len(best))
        calls = ctypes.byref(abi), ctypes.byref(params), ctypes.byref(self._error)
        if self._lib.bench_tasks(*calls, *where) < 0:
            raise core.CoreError(self._error)


class Cache:
    """`rows` cache rows, int8 packed or float latent + rope, and `sets` index sets of K rows."""

    def __init__(self, kind: str, dtype: str, rows: int, sets: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.kind, self.dtype, self.rows = kind, DTYPES[dtype], rows
        sample = rng.standard_normal((4096, NOPE)).astype(np.float32)
        rope = rng.standard_normal((4096, ROPE)).astype(self.dtype)
        if kind == "int8":
            block = core.pack(sample, rope)
            self.key, self.key_rope = self._fill(block)[None, :, None], None
        else:
            self.key = self._fill(sample.astype(self.dtype))[None, :, None]
            self.key_rope = self._fill(rope)[None, :, None]
        self.indices = [
            np.sort(rng.integers(0, rows, K, dtype=np.int32))[rng.permutation(K)]
            .reshape(1, 1, 1, K)
            .copy()
            for _ in range(sets)
        ]
        self.rng = rng
        self.keep: list[Any] = []

    def _fill(self, block: np.ndarray) -> np.ndarray:
        whole = np.empty((self.rows, block.shape[1]), block.dtype)
        for first in range(0, self.rows, len(block)):
            whole[first : first + len(block)] = block[: self.rows - first]
        return whole

    def calls(
        self, heads: int, isa: str, tokens: int = 1, rounding: str = "exact"
    ) -> list[core.Params]:
        """One call per index set (or per `tokens` sets); the arrays live as long as this cache."""
        width = NOPE + ROPE if self.kind == "int8" else NOPE
        query = self.rng.standard_normal((1, tokens, heads, width)).astype(self.dtype)
        extra: dict[str, Any] = {}
        if self.key_rope is not None:
            query_rope = self.rng.standard_normal((1, tokens, heads, ROPE)).astype(self.dtype)
            extra = {"query_rope": query_rope, "key_rope": self.key_rope}
        groups = [
            np.concatenate(self.indices[i : i + tokens], 1)
            for i in range(0, len(self.indices) - tokens + 1, tokens)
        ]
        keep: list[Any] = [query, groups, extra]
        self.keep.append(keep)
        calls = [
            core.build(
                query,
                self.key,
                group,
                scale=(NOPE + ROPE) ** -0.5,
                isa=isa,
                sparse_mode=0,
                rounding=rounding,
                **extra,
            )
            for group in groups
        ]
        keep.append([out for _, out in calls])
        return [params for params, _ in calls]


def flops(heads: int) -> int:
    """Floating-point operations of one query token."""
    return 2 * heads * K * (2 * NOPE + ROPE)


def machine() -> str:
    """Model name of the processor, as the operating system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
