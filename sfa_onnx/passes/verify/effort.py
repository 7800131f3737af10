"""What running a site once in float64 takes, before it is run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sfa_onnx.passes.candidate import Candidate
from sfa_onnx.passes.cost import region_cost
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete

__all__ = ["Effort"]

# One thread of an ordinary machine, in float64; drawing a random number.
_FLOPS, _BYTES, _DRAWS = 5e9, 2e9, 5e7


@dataclass(frozen=True)
class Effort:
    """Peak memory in bytes and an estimate of seconds."""

    bytes: int
    seconds: float

    @classmethod
    def of(cls, index: GraphIndex, candidate: Candidate, symbols: Mapping[str, int]) -> Effort:
        """The effort at these sizes of the graph's symbols."""
        sizes = Concrete(index, symbols)
        order = sorted({*candidate.nodes, *candidate.support})
        cost = region_cost(sizes, (index.nodes[i] for i in order))
        drawn = sum(math.prod(sizes.shape(o.value) or ()) for o in candidate.operands)
        seconds = cost.flops / _FLOPS + 2 * cost.bytes / _BYTES + drawn / _DRAWS
        return cls(_peak(sizes, index, order), seconds)


def _peak(sizes: Concrete, index: GraphIndex, order: list[int]) -> int:
    """Bytes in use at most: a value lives until its last reader in the site."""
    last = {v: i for i in order for v in index.nodes[i].input if v}
    live: dict[str, int] = {}
    peak = 0
    for i in order:
        for name in index.nodes[i].output:
            shape = sizes.shape(name) if name else None
            live[name] = 8 * math.prod(shape) if shape is not None else 0
        peak = max(peak, sum(live.values()))
        for name in [n for n in live if last.get(n, i) <= i]:
            del live[name]
    return peak
