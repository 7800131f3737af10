"""Run the product on one case and hold the outcome against what the case expects."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto

from tests.zoo.base import Case, Feeds

# Largest |fused - original| allowed, as a share of max|original|; both run in onnxruntime.
# bf16 is compared through float32 twins, "bf16 rows" (bytes that have no twin) as it is.
BOUND = {"f32": 2e-5, "f16": 1e-2, "bf16": 2e-5, "bf16 rows": 1e-2}


@dataclass
class Verdict:
    """What happened to one case."""

    name: str
    family: str
    expect: str
    ok: bool = False
    fused: int = 0
    ops: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    error: float | None = None
    stress_error: float | None = None
    seconds: float = 0.0
    failure: str = ""  # why ok is False
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def float32_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with bfloat16 replaced by float32 (onnxruntime lacks bfloat16 on CPU)."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    del twin.graph.value_info[:]
    graphs = [twin.graph]
    while graphs:
        graph = graphs.pop()
        for value in (*graph.input, *graph.output):
            kind = value.type.tensor_type
            kind.elem_type = _wide(kind.elem_type)
        for tensor in graph.initializer:
            _widen(tensor)
        for node in graph.node:
            for a in node.attribute:
                if a.type == onnx.AttributeProto.TENSOR:
                    _widen(a.t)
                elif a.type == onnx.AttributeProto.GRAPH:
                    graphs.append(a.g)
                elif node.op_type == "Cast" and a.name == "to":
                    a.i = _wide(a.i)
    return twin


def _wide(elem_type: int) -> int:
    return TensorProto.FLOAT if elem_type == TensorProto.BFLOAT16 else elem_type


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.BFLOAT16:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def widen_feeds(feeds: Feeds) -> Feeds:
    """bfloat16 arrays as float32."""
    bf16 = ml_dtypes.bfloat16
    return {k: v.astype(np.float32) if v.dtype == bf16 else v for k, v in feeds.items()}


def scaled_error(
    expected: list[np.ndarray], got: list[np.ndarray], nan_is_free: bool = False
) -> float:
    """Largest difference as a share of each output's largest value; inf: shapes or NaNs differ.

    nan_is_free: where NaN is expected (rows without keys), anything goes.
    """
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if a.size == 0:
            continue
        x, y = a.astype(np.float64), b.astype(np.float64)
        if nan_is_free:
            x, y = x[~np.isnan(x)], y[~np.isnan(x)]
        if not np.array_equal(np.isfinite(x), np.isfinite(y)):
            return float("inf")
        x, y = x[np.isfinite(x)], y[np.isfinite(y)]
        if x.size:
            worst = max(worst, np.abs(x - y).max() / max(np.abs(x).max(), 1e-30))
    return float(worst)


def run_original(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def run_fused(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    from sfa_onnx import runtime

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = runtime.session(model, options)
    return session.run(None, feeds)


def _all_of(_: Feeds, outs: list[np.ndarray]) -> list[np.ndarray]:
    return outs


def difference(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    feeds: Feeds,
    dtype: str,
    crop: Callable[[Feeds, list[np.ndarray]], list[np.ndarray]] = _all_of,
    nan_is_free: bool = False,
) -> float:
    """Scaled error of `after` against `before` on `feeds`, both in onnxruntime."""
    names = {value.name for value in before.graph.input}
    feeds = {k: v for k, v in feeds.items() if k in names}  # the tracer drops unused inputs
    if dtype == "bf16":
        before, after, feeds = float32_twin(before), float32_twin(after), widen_feeds(feeds)
    if dtype == "bf16 rows":
        return _native_difference(before, after, feeds)
    expected, got = run_original(before, feeds), run_fused(after, feeds)
    return scaled_error(crop(feeds, expected), crop(feeds, got), nan_is_free)


def _native_difference(before: onnx.ModelProto, after: onnx.ModelProto, feeds: Feeds) -> float:
    """As `difference`, with bfloat16 in and out of both models."""
    from sfa_onnx import runtime

    expected, got = (list(runtime.run(model, feeds).values()) for model in (before, after))
    return scaled_error(expected, got)


def judge(case: Case) -> Verdict:
    """Fuse, compare, decide. Never raises: a failure is part of the verdict."""
    verdict = Verdict(case.name, case.family, case.expect)
    try:
        _judge(case, verdict)
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        verdict.failure = verdict.failure or f"{type(error).__name__}: {text}"
    verdict.ok = not verdict.failure
    return verdict


def _judge(case: Case, v: Verdict) -> None:
    from sfa_onnx import fuse

    model = case.build()
    started = time.perf_counter()
    report = fuse(model)
    v.seconds = round(time.perf_counter() - started, 2)
    v.fused = len(report.fused)
    v.ops = sorted({s.op_type for s in report.fused})
    v.reasons = [s.reason for s in report.refused]
    v.stopped = [s.stopped_at for s in report.refused]
    if v.fused:
        _compare(case, model, report.model, v)
    if v.failure:
        return
    if case.expect == "either":
        return
    if case.expect == "fuse":
        if v.fused != case.sites:
            v.failure = f"fused {v.fused} of {case.sites} sites"
        elif case.op and v.ops != [case.op]:
            v.failure = f"became {v.ops}, expected {case.op}"
    elif v.fused and case.tags.get("or_right"):
        v.note = "a near miss fused into something equal"
    elif v.fused:
        v.failure = "FUSED A NEAR MISS"
    elif case.expect == "refuse":
        if not v.reasons:
            v.failure = "vanished silently: no candidate is listed"
        elif case.reason and not any(re.search(case.reason, r, re.I) for r in v.reasons):
            v.failure = f"reason does not match /{case.reason}/"


def _compare(case: Case, before: onnx.ModelProto, after: onnx.ModelProto, v: Verdict) -> None:
    dtype = case.tags.get("dtype", "f32")
    bound = case.tags.get("bound", BOUND[dtype])
    crop = case.tags.get("crop", _all_of)
    v.error = max(difference(before, after, case.feeds(seed), dtype, crop) for seed in (0, 1))
    if not v.error <= bound:
        v.failure = f"WRONG NUMBERS: {v.error:.2e} > {bound:.0e}"
        return
    if case.stress is None:
        return
    try:
        v.stress_error = difference(before, after, case.stress(7), dtype)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        v.failure = f"STRESS INPUT FAILS in the fused model: {text}"
        return
    if not v.stress_error <= bound:
        v.failure = f"WRONG NUMBERS ON STRESS INPUT: {v.stress_error:.2e}"
