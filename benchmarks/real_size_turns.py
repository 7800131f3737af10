"""Paged decoding at true size before and after, in one process, in turn.

Before: attention over int8 pages, the selection as exported, caches handed over in every step.
After: the indexer's operator over pages too, products with W_UK and W_UV head by head, and caches
bound in place (`runtime.bind_caches`). CPU time of one thread, the best of several runs, because
machines are shared; both sessions are open at once, which takes about 9 GB.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

__all__ = ["in_turn"]

Feeds = dict[str, np.ndarray[Any, Any]]


def in_turn(before: Path, after: Path, inputs: list[Path], runs: int) -> list[dict[str, float]]:
    """Time one decode token of two converted models.

    Args:
        before: with its caches handed over.
        after: with its caches in place.
        inputs: feeds of the float model, one file per length.
        runs: of each, in turn.

    Returns:
        Per length: CPU milliseconds before and after, and how far `hidden_out` differs.
    """
    sessions = [_session(path) for path in (before, after)]
    return [_one(sessions, (before, after), path, runs) for path in inputs]


def _session(path: Path) -> ort.InferenceSession:
    from sfa_onnx import runtime

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # then the caller's own thread does everything
    return runtime.session(path, options)


def _one(
    sessions: list[ort.InferenceSession], models: tuple[Path, Path], inputs: Path, runs: int
) -> dict[str, float]:
    from sfa_onnx import runtime

    first, second = (_feeds(path, inputs) for path in models)
    pages = {n: second.pop(n) for n in list(second) if n.endswith(("_packed", "_pages"))}
    bound = runtime.bind_caches(sessions[1], pages)
    calls: list[Callable[[], Any]] = [
        lambda: runtime.run(sessions[0], first, ["hidden_out", *_caches(sessions[0])]),
        lambda: bound.run(second),
    ]
    results = [call()["hidden_out"] for call in calls]
    best = [float("inf")] * 2
    for _ in range(runs):
        for i, call in enumerate(calls):
            start = time.thread_time()
            call()
            best[i] = min(best[i], 1e3 * (time.thread_time() - start))
    off = float(np.abs(results[0] - results[1]).max() / np.abs(results[0]).max())
    return {"before_ms": best[0], "after_ms": best[1], "off": off}


def _caches(session: ort.InferenceSession) -> list[str]:
    return [o.name for o in session.get_outputs() if o.name != "hidden_out"]


def _feeds(model: Path, inputs: Path) -> Feeds:
    """The feeds of a converted model, one new token per sequence."""
    from sfa_onnx.kv_convert.interface import adapt_feeds, read_interface

    with np.load(inputs) as archive:
        arrays = {name: archive[name] for name in archive.files}
    interface = read_interface(onnx.load(model, load_external_data=False))
    assert interface is not None
    return adapt_feeds(interface, arrays, new_tokens=1)
