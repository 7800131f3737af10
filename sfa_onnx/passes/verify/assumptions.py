"""What a verdict rests on beyond its probes, and who guarantees it."""

from __future__ import annotations

from sfa_onnx.passes.candidate import Candidate
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.verify.sizes.equal import assumed_equal

__all__ = ["assumptions_of"]

_NOBODY = "nobody: the caller of the model"


def assumptions_of(index: GraphIndex, candidate: Candidate) -> tuple[str, ...]:
    """Sizes that were taken for equal, what operands are trusted to hold, what is said besides."""
    equal = assumed_equal(index, candidate) if candidate.equal else []
    sizes = [f"the sizes {a} and {b} are equal: discharged by {_NOBODY}" for a, b in equal]
    domains = (o.domain for o in candidate.operands)
    trusted = [
        f"{d.assumption}: discharged by {d.discharged_by or _NOBODY}"
        for d in domains
        if d.assumption
    ]
    return (*sizes, *trusted, *candidate.said)
