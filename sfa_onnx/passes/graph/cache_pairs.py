"""Which outputs are an input with some rows replaced: caches that can be written in place.

Such an output may share its input's memory, and then a step moves the new rows only. The pairs are
read off the graph: an output made by a cache write whose data come from an input of the same type
and shape. An input that something else may read after the write is no such cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx

from sfa_onnx.passes.graph.kinds import RESHAPES, SIZES
from sfa_onnx.passes.graph.order import reads

__all__ = ["CachePair", "cache_pairs", "why_unpaired"]

# Operators that return their first input with some elements replaced.
_WRITES: Final = frozenset(("KvCacheWrite", "ScatterElements", "ScatterND", "ScatterUpdate"))
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
    found = _Pairs(model)
    pairs: list[CachePair] = []
    for j, output in enumerate(model.graph.output):
        source = found.source(output)
        if source is None or any(p.input == source for p in pairs):
            continue
        if not found.other_reader(source):
            pairs.append(CachePair(source, output.name, found.places[source], j))
    return pairs


def why_unpaired(model: onnx.ModelProto, name: str) -> str:
    """Why the input `name` is not among `cache_pairs`, in words."""
    found = _Pairs(model)
    if name not in found.places:
        return f"the model has no input {name!r}"
    if any(found.source(output) == name for output in model.graph.output):
        return f"{found.other_reader(name)} reads it too, and might see rows of the same step"
    for output in model.graph.output:
        path = found.path(output.name)
        if path[-1][0] != name:
            continue
        written = any(node is not None and node.op_type in _WRITES for _, node in path)
        if not written:
            return f"output {output.name} hands it on unchanged"
        return f"output {output.name} has another type or shape than it"
    grown = found.grown(name)
    if grown:
        return (
            f"{grown} makes a longer tensor of it in every step, which needs memory of its own;"
            " `sfa-onnx kv-cache` turns such caches into pages"
        )
    return "no output is this input with some rows replaced"


class _Pairs:
    """A graph's values by who makes and who reads them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        constants = {t.name for t in graph.initializer}
        self.inputs = [v for v in graph.input if v.name not in constants]
        self.places = {v.name: i for i, v in enumerate(self.inputs)}
        self.nodes = graph.node
        self.outputs = [v.name for v in graph.output]
        self._makers = {name: node for node in graph.node for name in node.output if name}

    def path(self, value: str) -> list[tuple[str, onnx.NodeProto | None]]:
        """Values from an output upwards through views and writes, each with its maker."""
        steps: list[tuple[str, onnx.NodeProto | None]] = []
        for _ in range(_MOST):
            node = None if value in self.places else self._makers.get(value)
            steps.append((value, node))
            if node is None or node.op_type not in _WRITES | RESHAPES or not node.input:
                break
            value = node.input[0]
        return steps

    def source(self, output: onnx.ValueInfoProto) -> str | None:
        """The input whose rows an output holds, where at least one write lies between them."""
        path = self.path(output.name)
        name, maker = path[-1]
        written = any(node is not None and node.op_type in _WRITES for _, node in path)
        if maker is not None or name not in self.places or not written:
            return None
        return name if _alike(self.inputs[self.places[name]], output) else None

    def other_reader(self, name: str) -> str:
        """What may read an input, or a view of it, after its rows are written; "" for nothing.

        What the write itself waits for has read before it.
        """
        write = self._write(name)
        before = self._above(write)
        names = {name}
        for node in self.nodes:  # in an order that runs, so views come before their readers
            places = [i for i, read in enumerate(reads(node)) if read in names]
            if not places or node.op_type in SIZES:
                continue
            if node.op_type in RESHAPES and places == [0]:
                names |= set(node.output)
            elif not (node is write and places == [0]) and not before & set(node.output):
                return f"{node.name or node.output[0]} ({node.op_type})"
        if handed := [n for n in self.outputs if n in names]:
            return f"output {handed[0]}"
        return ""

    def _write(self, name: str) -> onnx.NodeProto | None:
        """The write nearest to an input, of those that lead to an output."""
        for output in self.outputs:
            path = self.path(output)
            if path[-1][0] == name:
                writes = [n for _, n in path if n is not None and n.op_type in _WRITES]
                return writes[-1] if writes else None
        return None

    def _above(self, node: onnx.NodeProto | None) -> set[str]:
        """Every value that a node waits for."""
        found: set[str] = set()
        stack = [] if node is None else list(reads(node))
        while stack:
            name = stack.pop()
            if name not in found:
                found.add(name)
                maker = self._makers.get(name)
                stack += [] if maker is None else list(reads(maker))
        return found

    def grown(self, name: str) -> str:
        """The Concat that appends to an input; "" where there is none."""
        for node in self.nodes:
            if node.op_type == "Concat" and name in node.input:
                return f"{node.name or node.output[0]} (Concat)"
        return ""


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
