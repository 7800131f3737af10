"""The torch operator against the same node in onnxruntime: one process, the two taking turns.

    python -m benchmarks.torch_ops [--heads 16 128] [--rounds 15]

Decode of one token, K = 2048, int8 rows of 656 bytes, bfloat16; the ratio is of medians. A turn is
a pause, in which the other side's threads fall asleep, two calls that wake one's own, and some that
count. By default onnxruntime's threads watch for work in a loop for some 50 ms after each run
("spinning"), on a core that whatever else runs has to share; both settings are shown.

Before that, what stands around the core: a call over 4 keys and one head, on one thread; "hot" in a
loop, "cold" after reading what the caches hold, as a larger call leaves them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from sfa_onnx import runtime
from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION_ANTIQUANT
from sfa_onnx.torch import native
from sfa_onnx.torch.tensors import as_torch

BF16 = ml_dtypes.bfloat16
KEYS, COUNT = 8192, 2048
TINY, FEW = 16, 4
SWEEP = np.ones(1 << 20)  # 8 MB: more than a core's own caches
PAUSE, CALLS = 0.1, 8  # seconds, calls in a turn
ATTRIBUTES = SPARSE_FLASH_ATTENTION_ANTIQUANT.complete(
    {"scale_value": 0.135, "sparse_block_size": 1, "tile_size": 128, "rope_head_dim": 64}
)


def inputs(heads: int, keys: int = KEYS, count: int = COUNT) -> dict[str, np.ndarray]:
    r = np.random.default_rng(0)
    latent = r.standard_normal((1, keys, 1, 512)).astype(np.float32)
    key = kv_cache.pack(latent, r.standard_normal((1, keys, 1, 64)).astype(BF16))
    return {
        "query": r.standard_normal((1, 1, heads, 576)).astype(BF16),
        "key": key,
        "sparse_indices": r.permutation(keys)[:count].astype(np.int32).reshape(1, 1, 1, count),
    }


def session(feeds: dict[str, np.ndarray], threads: int, spinning: bool) -> ort.InferenceSession:
    names = ["query", "key", "key", "sparse_indices"]
    op = SPARSE_FLASH_ATTENTION_ANTIQUANT
    node = helper.make_node(op.name, names, ["out"], domain=op.domain, **ATTRIBUTES)
    types = (TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.INT32)
    shapes = {n: (t, list(feeds[n].shape)) for n, t in zip(feeds, types, strict=True)}
    out = [*feeds["query"].shape[:-1], 512]
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info(n, *shape) for n, shape in shapes.items()],
        [helper.make_tensor_value_info("out", TensorProto.BFLOAT16, out)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("npu", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return runtime.session(model, options)


def bound(sess: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    """A run without copies: everything bound once."""
    binding = sess.io_binding()
    for name, array in feeds.items():
        if array.dtype == BF16:
            kind: object = TensorProto.BFLOAT16
            binding.bind_input(name, "cpu", 0, kind, list(array.shape), array.ctypes.data)
        else:
            binding.bind_cpu_input(name, array)
    binding.bind_output("out", "cpu")
    return lambda: sess.run_with_iobinding(binding)


def both(
    feeds: dict[str, np.ndarray], threads: int, rounding: str, spinning: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The call in torch and in onnxruntime."""
    tensors = {n: as_torch(a) for n, a in feeds.items()}
    query, key, indices = (tensors[n] for n in ("query", "key", "sparse_indices"))
    attributes = {n: v for n, v in ATTRIBUTES.items() if n != "scale_value"}
    call = torch.ops.sfa_onnx.npu_sparse_flash_attention_antiquant
    torch.set_num_threads(threads)
    return (
        lambda: call(query, key, key, indices, ATTRIBUTES["scale_value"], **attributes,
                     rounding=rounding),
        bound(session(feeds, threads, spinning), feeds),
    )  # fmt: skip


def overhead(rounding: str, cold: bool, rounds: int = 20, calls: int = 50) -> tuple[float, float]:
    """Median seconds of torch and of onnxruntime over next to nothing."""
    sides = both(inputs(1, TINY, FEW), 1, rounding, spinning=False)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, run in enumerate(sides):
            for _ in range(calls):
                if cold:
                    SWEEP.sum()
                start = time.perf_counter()
                run()
                times[side].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def compare(
    heads: int, threads: int, rounds: int, rounding: str, spinning: bool
) -> tuple[float, float]:
    """Median seconds of torch and of onnxruntime."""
    sides = both(inputs(heads), threads, rounding, spinning)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, run in enumerate(sides):
            time.sleep(PAUSE)
            run()
            run()
            for _ in range(CALLS):
                start = time.perf_counter()
                run()
                times[side].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rounding", default="exact", choices=["exact", "npu"])
    asked = parser.parse_args()
    way = "C" if native.in_use() else "Python"
    print(
        f"{runtime.kernel_isa()}, torch {torch.__version__} ({way} kernels),"
        f" onnxruntime {ort.__version__}"
    )
    for cold in (False, True):
        ours, theirs = overhead(asked.rounding, cold)
        print(
            f"   next to nothing, {'cold' if cold else 'hot'}: torch {ours * 1e6:.1f} us,"
            f" onnxruntime {theirs * 1e6:.1f} us"
        )
    for threads, heads in itertools.product(dict.fromkeys(asked.threads), asked.heads):
        for spinning in (False, True):
            ours, theirs = compare(heads, threads, asked.rounds, asked.rounding, spinning)
            print(
                f"{heads:4} heads, {threads} threads, spinning {'on' if spinning else 'off'}:"
                f" torch {ours * 1e3:.3f} ms, onnxruntime {theirs * 1e3:.3f} ms,"
                f" ratio {ours / theirs:.3f}"
            )


if __name__ == "__main__":
    main()
