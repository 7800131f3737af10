"""Timing a session as a user would: warm, repeated, median and best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from sfa_onnx.guard.doors import door

__all__ = ["Timing", "time_calls", "time_session"]

WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds per run."""

    runs: int
    median_ms: float
    best_ms: float


@door
def time_session(
    session: ort.InferenceSession, feeds: dict[str, np.ndarray[Any, Any]], runs: int
) -> Timing:
    """Time `runs` runs after a short warm-up; feeding and fetching arrays included."""
    from sfa_onnx.runtime import run

    return time_calls(lambda: run(session, feeds), runs)


def time_calls(call: Callable[[], object], runs: int) -> Timing:
    """Time `runs` calls after a short warm-up."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(max(1, runs)):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return Timing(len(times), statistics.median(times), min(times))
