"""Which outputs are an input with some rows replaced: caches that can be written in place.

GE copies such an input as a whole in every step unless it is told that input and output may share
memory (`ge.exec.outputReuseInputMemIndexes`, pairs "input,output"). The pairs are read off the
graph: an output made by a cache write whose data come from an input of the same type and shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx

__all__ = ["CachePair", "cache_pairs", "reuse_option"]

# Operators that return their first input with some elements replaced.
_WRITES: Final = frozenset(("KvCacheWrite", "ScatterElements", "ScatterND", "ScatterUpdate"))
_VIEWS: Final = frozenset(("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"))
_MOST: Final = 16  # views and writes between an output and its input


@dataclass(frozen=True)
class CachePair:
    """One cache: its name and position among the inputs, and among the outputs."""

    input: str
    output: str
    input_index: int
    output_index: int


def cache_pairs(model: onnx.ModelProto) -> list[CachePair]:
    """The caches of a model, in the order of its outputs; an input is paired once."""
    graph = model.graph
    constants = {t.name for t in graph.initializer}
    inputs = [v for v in graph.input if v.name not in constants]
    places = {v.name: i for i, v in enumerate(inputs)}
    makers = {name: node for node in graph.node for name in node.output if name}
    pairs: list[CachePair] = []
    taken: set[str] = set()
    for j, output in enumerate(graph.output):
        source = _written_input(output.name, makers, places)
        if source is None or source in taken or not _alike(inputs[places[source]], output):
            continue
        taken.add(source)
        pairs.append(CachePair(source, output.name, places[source], j))
    return pairs


def reuse_option(pairs: list[CachePair]) -> str:
    """The value of `ge.exec.outputReuseInputMemIndexes`: "input,output|input,output"."""
    return "|".join(f"{p.input_index},{p.output_index}" for p in pairs)


def _written_input(
    value: str, makers: dict[str, onnx.NodeProto], places: dict[str, int]
) -> str | None:
    """The input whose rows an output holds, where at least one write lies between them."""
    written = False
    for _ in range(_MOST):
        if value in places:
            return value if written else None
        node = makers.get(value)
        if node is None or node.op_type not in _WRITES | _VIEWS or not node.input:
            return None
        written = written or node.op_type in _WRITES
        value = node.input[0]
    return None


def _alike(a: onnx.ValueInfoProto, b: onnx.ValueInfoProto) -> bool:
    """Whether two values have one type and shape, as far as both are declared."""
    first, second = a.type.tensor_type, b.type.tensor_type
    if first.elem_type != second.elem_type:
        return False
    if not (first.HasField("shape") and second.HasField("shape")):
        return True
    mine, other = first.shape.dim, second.shape.dim
    return len(mine) == len(other) and all(
        x.dim_value == y.dim_value for x, y in zip(mine, other, strict=True)
    )
