"""The caches that GE may write in place.

GE copies a written cache as a whole in every step unless it is set that input and output may share
memory (`ge.exec.outputReuseInputMemIndexes`, pairs "input,output").
"""

from __future__ import annotations

from sfa_onnx.passes.graph.cache_pairs import CachePair

__all__ = ["reuse_option"]


def reuse_option(pairs: list[CachePair]) -> str:
    """The value of `ge.exec.outputReuseInputMemIndexes`: "input,output|input,output"."""
    return "|".join(f"{p.input_index},{p.output_index}" for p in pairs)
