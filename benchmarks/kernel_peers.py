"""The same work by other means, each only where it is installed: NumPy, torch, ONNX Runtime.

Every peer is a function of (packed rows [K, 656], query [N1, 576]) that returns [N1, 512]; it gets
the rows already gathered, an advantage that our kernel does not have.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.kernel_data import NOPE, ROPE, TILE, Cache

Run = Callable[[np.ndarray, np.ndarray], Any]


def _parts(rows: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    nope = rows[:, :NOPE]
    rope = np.ascontiguousarray(rows[:, NOPE : NOPE + 2 * ROPE]).view(dtype)
    scale = np.ascontiguousarray(rows[:, NOPE + 2 * ROPE :]).view(np.float32)
    return nope, rope, scale


def _numpy(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    nope, rope, scale = _parts(rows, query.dtype)
    values = nope.astype(np.float32) * np.repeat(scale, TILE, axis=1)
    keys = np.concatenate([values, rope.astype(np.float32)], 1)
    scores = query.astype(np.float32) @ keys.T * np.float32((NOPE + ROPE) ** -0.5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ values / weights.sum(-1, keepdims=True)


def _torch(compiled: bool) -> Run:
    import torch

    def attend(nope: Any, rope: Any, scale: Any, query: Any) -> Any:
        tiles = nope.to(torch.bfloat16).reshape(len(nope), -1, TILE)
        values = (tiles * scale[..., None].to(torch.bfloat16)).reshape(len(nope), NOPE)
        keys = torch.cat([values, rope], 1)
        weights = torch.softmax((query @ keys.T).float() * (NOPE + ROPE) ** -0.5, -1)
        return weights.to(torch.bfloat16) @ values

    body = torch.compile(attend) if compiled else attend

    def run(rows: np.ndarray, query: np.ndarray) -> Any:
        nope, rope, scale = _parts(rows, np.dtype(np.int16))
        bf16 = torch.from_numpy(query.view(np.int16)).view(torch.bfloat16)
        tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in (nope, rope, scale)]
        tensors[1] = tensors[1].view(torch.bfloat16)
        with torch.inference_mode():
            return body(*tensors, bf16)

    return run


def _onnxruntime() -> Run:
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto as T
    from onnx import helper as h

    node = h.make_node
    graph = h.make_graph(
        [
            node("DequantizeLinear", ["nope", "scale"], ["v"], axis=1, block_size=TILE),
            node("Concat", ["v", "rope"], ["k"], axis=1),
            node("Transpose", ["k"], ["kt"]),
            node("MatMul", ["query", "kt"], ["s"]),
            node("Mul", ["s", "factor"], ["t"]),
            node("Softmax", ["t"], ["p"]),
            node("MatMul", ["p", "v"], ["out"]),
        ],
        "sparse_mla",
        [
            h.make_tensor_value_info("nope", T.INT8, ["K", NOPE]),
            h.make_tensor_value_info("scale", T.FLOAT, ["K", NOPE // TILE]),
            h.make_tensor_value_info("rope", T.FLOAT, ["K", ROPE]),
            h.make_tensor_value_info("query", T.FLOAT, ["N", NOPE + ROPE]),
        ],
        [h.make_tensor_value_info("out", T.FLOAT, ["N", NOPE])],
        [h.make_tensor("factor", T.FLOAT, [], [(NOPE + ROPE) ** -0.5])],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)

    def run(rows: np.ndarray, query: np.ndarray) -> Any:
        nope, rope, scale = _parts(rows, query.dtype)
        feeds = {"nope": nope, "scale": scale, "rope": rope.astype(np.float32)}
        return session.run(None, {**feeds, "query": query.astype(np.float32)})

    return run


def _installed() -> Iterator[tuple[str, Callable[[], Run]]]:
    yield "NumPy fp32", lambda: _numpy
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)
        yield "torch eager bf16", lambda: _torch(compiled=False)
        yield "torch.compile bf16", lambda: _torch(compiled=True)
    if importlib.util.find_spec("onnxruntime"):
        yield "ONNX Runtime, standard ops fp32", _onnxruntime


def measure(cache: Cache, heads: int, bursts: int) -> dict[str, float]:
    """Best microseconds per query token of every installed peer, one thread, gather included."""
    rows = cache.key.reshape(cache.rows, -1)
    query = cache.rng.standard_normal((heads, NOPE + ROPE)).astype(cache.dtype)
    best: dict[str, float] = {}
    for name, make in _installed():
        try:
            run = make()
            run(np.ascontiguousarray(rows[cache.indices[0].ravel()]), query)
        except Exception as problem:  # a peer that cannot run here is a line, not a failure
            print(f"{name}: left out ({type(problem).__name__}: {str(problem)[:100]})")
            continue
        times = []
        for index in cache.indices[:bursts]:
            start = time.perf_counter()
            run(rows[index.ravel()], query)
            times.append(time.perf_counter() - start)
        best[name] = 1e6 * min(times)
    return best
