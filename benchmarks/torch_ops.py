"""The torch operator against the same node in onnxruntime: one process, the two taking turns.

    python -m benchmarks.torch_ops [--heads 16 128] [--rounds 60]

Decode of one token, K = 2048, int8 rows of 656 bytes, bfloat16; the ratio is of medians. Neither
side's threads wait in a loop while the other has its turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

import sfa_onnx.torch
from sfa_onnx import runtime
from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION_ANTIQUANT
from sfa_onnx.torch.tensors import as_torch

BF16 = ml_dtypes.bfloat16
KEYS, COUNT = 8192, 2048
ATTRIBUTES = SPARSE_FLASH_ATTENTION_ANTIQUANT.complete(
    {"scale_value": 0.135, "sparse_block_size": 1, "tile_size": 128, "rope_head_dim": 64}
)


def inputs(heads: int) -> dict[str, np.ndarray]:
    r = np.random.default_rng(0)
    latent = r.standard_normal((1, KEYS, 1, 512)).astype(np.float32)
    key = kv_cache.pack(latent, r.standard_normal((1, KEYS, 1, 64)).astype(BF16))
    return {
        "query": r.standard_normal((1, 1, heads, 576)).astype(BF16),
        "key": key,
        "sparse_indices": r.permutation(KEYS)[:COUNT].astype(np.int32).reshape(1, 1, 1, COUNT),
    }


def session(heads: int, threads: int) -> ort.InferenceSession:
    names = ["query", "key", "key", "sparse_indices"]
    op = SPARSE_FLASH_ATTENTION_ANTIQUANT
    node = helper.make_node(op.name, names, ["out"], domain=op.domain, **ATTRIBUTES)
    shapes = {"query": (TensorProto.BFLOAT16, [1, 1, heads, 576]),
              "key": (TensorProto.INT8, [1, KEYS, 1, 656]),
              "sparse_indices": (TensorProto.INT32, [1, 1, 1, COUNT])}  # fmt: skip
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info(n, *shape) for n, shape in shapes.items()],
        [helper.make_tensor_value_info("out", TensorProto.BFLOAT16, [1, 1, heads, 512])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("npu", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Otherwise its threads keep a core busy for a while after a run, and whatever has its turn then
    # shares that core: with two threads on two cores the other side took 1.3 to 1.8 times as long.
    options.add_session_config_entry("session.force_spinning_stop", "1")
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


def compare(heads: int, threads: int, rounds: int, rounding: str) -> tuple[float, float]:
    """Median seconds of torch and of onnxruntime."""
    feeds = inputs(heads)
    tensors = {n: as_torch(a) for n, a in feeds.items()}
    query, key, indices = (tensors[n] for n in ("query", "key", "sparse_indices"))
    attributes = {n: v for n, v in ATTRIBUTES.items() if n != "scale_value"}
    call = torch.ops.sfa_onnx.npu_sparse_flash_attention_antiquant
    torch.set_num_threads(threads)
    sides = (
        lambda: call(query, key, key, indices, ATTRIBUTES["scale_value"], **attributes,
                     rounding=rounding),
        bound(session(heads, threads), feeds),
    )  # fmt: skip
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 5):
        for side, run in enumerate(sides):
            run()  # its threads awake, its caches warm
            start = time.perf_counter()
            run()
            if round_ >= 5:
                times[side].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rounding", default="exact", choices=["exact", "npu"])
    asked = parser.parse_args()
    assert sfa_onnx.torch is not None
    print(f"{runtime.kernel_isa()}, torch {torch.__version__}, onnxruntime {ort.__version__}")
    for threads in dict.fromkeys(asked.threads):
        for heads in asked.heads:
            ours, theirs = compare(heads, threads, asked.rounds, asked.rounding)
            print(
                f"{heads:4} heads, {threads} threads: torch {ours * 1e3:.3f} ms, onnxruntime"
                f" {theirs * 1e3:.3f} ms, ratio {ours / theirs:.3f}"
            )


if __name__ == "__main__":
    main()
