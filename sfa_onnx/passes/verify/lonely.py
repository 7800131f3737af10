"""Rows without a visible key: what becomes of them, and whether ordinary calls make them."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

from numpy.typing import NDArray

from sfa_onnx.passes.candidate import Refusal
from sfa_onnx.passes.verify.distance import empty_rows, mostly_empty, without_keys
from sfa_onnx.passes.verify.inputs import inputs
from sfa_onnx.passes.verify.natural import hides_all
from sfa_onnx.passes.verify.ordinary import WAYS, selected
from sfa_onnx.passes.verify.problem import LONELY, Draw, Problem

__all__ = ["mostly_hidden", "rows_without_keys"]

Array = NDArray[Any]
Run = Callable[[dict[str, Array]], tuple[Array, Array] | None]


def rows_without_keys(problem: Problem, run: Run) -> set[str]:
    """What becomes of rows in which the mask hides every key, where the operator does otherwise.

    Args:
        problem: the site at some sizes.
        run: the flat results of the original and of the fused form; None where one rejects.
    """
    found: set[str] = set()
    for lonely in LONELY:
        results = run(inputs(problem, Draw(91, lonely=lonely)))
        if results is not None:
            found |= empty_rows(*results)
    return found


def mostly_hidden(problem: Problem, run: Run, edges: Set[str]) -> Refusal | None:
    """The refusal of a site whose rows are empty for keys that an ordinary caller selects.

    Where such rows are averages, probes show it; NaN against zeros they take for an edge.

    Args:
        problem: the site at some sizes.
        run: as in `rows_without_keys`.
        edges: what was noted so far.
    """
    indices = problem.indices
    if without_keys("NaN") not in edges or indices.domain.along is not None:
        return None
    if indices.domain.apart:
        return None
    for way in WAYS:
        feeds = inputs(problem, Draw(93, lengths="full"))
        shape, kind = problem.shapes[indices.value], feeds[indices.value].dtype
        feeds[indices.value] = selected(shape, problem.dims.capacity, way).astype(kind)
        results = run(feeds)
        if results is None or not mostly_empty(*results):
            return None
    return hides_all([], "the selected keys of most rows", problem.candidate.outputs[0])
