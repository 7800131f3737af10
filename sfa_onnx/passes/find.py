"""Find every attention over selected keys in a graph, and bind it or say why not."""

from __future__ import annotations

from dataclasses import dataclass

from sfa_onnx.passes.candidate import Candidate, RefusedSite
from sfa_onnx.passes.index import GraphIndex

__all__ = ["FindOptions", "find_candidates"]


@dataclass(frozen=True)
class FindOptions:
    """What a caller may decide about recognition.

    Attributes:
        max_steps: how many tracing steps one site may take before it is refused.
        absorb: whether per-head expanded (MHA) forms may be fused by absorption.
        materialize_absorbed: write W_UK and W_UV as initializers instead of slicing W in the graph.
    """

    max_steps: int = 200_000
    absorb: bool = True
    materialize_absorbed: bool = False


def find_candidates(
    index: GraphIndex, options: FindOptions | None = None
) -> list[Candidate | RefusedSite]:
    """All sites of `index.graph`, in graph order; none that is fed by a selection vanishes.

    Dense attention without a selection and routers (TopK after the softmax) are no candidates.
    """
    del index, options
    return []
