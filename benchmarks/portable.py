"""Our kernel against the portable function body: the same packed rows, both in onnxruntime.

    python -m benchmarks.portable [--heads 16 128] [--count 2048] [--rounds 15] [--check 3]

The one-node model of `NPUSparseFlashAttentionAntiquant` is run twice: with our library registered,
and as its body of standard operators, which onnxruntime inlines when the library is absent. One
query token, random rows of a cache far larger than the last-level cache, one thread, best of
interleaved rounds. `--check R` exits with 1 when the kernel is less than R times faster.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from sfa_onnx import runtime
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION_ANTIQUANT, PackedRow
from sfa_onnx.runtime.portable.model import make_portable

TYPES = {
    "float32": (np.float32, TensorProto.FLOAT),
    "float16": (np.float16, TensorProto.FLOAT16),
    "bfloat16": (ml_dtypes.bfloat16, TensorProto.BFLOAT16),
}


def model(heads: int, count: int, rows: int, row: PackedRow, element: int) -> onnx.ModelProto:
    """One node: query [1, 1, N1, C+R], key [1, S2, 1, D], sparse_indices [1, 1, 1, K]."""
    op = SPARSE_FLASH_ATTENTION_ANTIQUANT
    given = {"scale_value": 0.1, "sparse_block_size": 1, "tile_size": row.tile}
    attributes = op.complete(given | {"rope_head_dim": row.rope, "sparse_mode": 0})
    inputs = [
        helper.make_tensor_value_info("query", element, [1, 1, heads, row.nope + row.rope]),
        helper.make_tensor_value_info("key", TensorProto.INT8, [1, rows, 1, row.bytes]),
        helper.make_tensor_value_info("sparse_indices", TensorProto.INT32, [1, 1, 1, count]),
    ]
    output = helper.make_tensor_value_info("attention_out", element, [1, 1, heads, row.nope])
    names = ["query", "key", "key", "sparse_indices"]
    node = helper.make_node(op.name, names, ["attention_out"], domain=op.domain, **attributes)
    graph = helper.make_graph([node], "portable", inputs, [output])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(op.domain, op.version)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def cache(rows: int, row: PackedRow, dtype: Any) -> np.ndarray:
    """Packed rows [1, S2, 1, D] with sensible ropes and scales."""
    r = np.random.default_rng(0)
    key = r.integers(-127, 128, (1, rows, 1, row.bytes), np.int8)
    rope = r.standard_normal((rows, row.rope)).astype(dtype)
    if dtype is ml_dtypes.bfloat16:
        rope = rope.view(np.uint16)
    key[0, :, 0, row.rope_offset : row.scale_offset] = rope.view(np.int8)
    scale = (0.005 + 0.01 * r.random((rows, row.tiles))).astype(np.float32)
    key[0, :, 0, row.scale_offset :] = scale.view(np.int8)
    return key


def best_of(runs: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, float]:
    """Best wall time in microseconds of each, interleaved so that both see the same machine."""
    best = dict.fromkeys(runs, np.inf)
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(turn)
            spent = 1e6 * (time.perf_counter() - start)
            best[name] = min(best[name], spent) if turn else best[name]  # the first warms up
    return best


def measure(
    args: argparse.Namespace, heads: int, key: np.ndarray, row: PackedRow
) -> dict[str, Any]:
    """Times of both at one head count, and how far their answers lie apart."""
    dtype, element = TYPES[args.dtype]
    r = np.random.default_rng(heads)
    query = r.standard_normal((1, 1, heads, row.nope + row.rope)).astype(dtype)
    picks = [r.permutation(args.rows)[: args.count].astype(np.int32) for _ in range(8)]
    feeds = [
        {"query": query, "key": key, "sparse_indices": pick.reshape(1, 1, 1, -1)} for pick in picks
    ]
    source = model(heads, args.count, args.rows, row, element)
    options = ort.SessionOptions()
    options.intra_op_num_threads = args.threads
    body = make_portable(source).SerializeToString()
    portable = ort.InferenceSession(body, options, providers=["CPUExecutionProvider"])
    ours = runtime.session(source, options)
    runs = {
        "kernel_us": lambda turn: runtime.run(ours, feeds[turn % 8]),
        "portable_us": lambda turn: runtime.run(portable, feeds[turn % 8]),
    }
    a, b = (runtime.run(s, feeds[0])["attention_out"].astype(np.float64) for s in (ours, portable))
    times = best_of(runs, args.rounds)
    return {
        "heads": heads,
        **{name: round(value, 1) for name, value in times.items()},
        "ratio": round(times["portable_us"] / times["kernel_us"], 2),
        "difference": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--count", type=int, default=2048, help="selected rows per query token")
    parser.add_argument("--rows", type=int, default=1 << 17, help="rows of the cache")
    parser.add_argument("--dtype", choices=list(TYPES), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check", type=float, help="least ratio accepted")
    parser.add_argument("--json", help="also write the table to this file")
    args = parser.parse_args()
    dtype, _ = TYPES[args.dtype]
    row = PackedRow(itemsize=np.dtype(dtype).itemsize)
    key = cache(args.rows, row, dtype)
    table = [measure(args, heads, key, row) for heads in args.heads]
    print(
        f"kernel path {runtime.kernel_isa()}, K={args.count}, {args.dtype}, {args.threads} thread"
    )
    print(f"{'N1':>4} {'kernel us':>10} {'portable us':>12} {'ratio':>6} {'difference':>11}")
    for t in table:
        print(
            f"{t['heads']:>4} {t['kernel_us']:>10} {t['portable_us']:>12} {t['ratio']:>6}"
            f" {t['difference']:>11.1e}"
        )
    if args.json:
        report = {"isa": runtime.kernel_isa(), "rows": table}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    slow = [t for t in table if args.check and t["ratio"] < args.check]
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
