"""What carries packed cache rows through a graph, and what looks into them.

A node carries rows when it moves them whole: their bytes, the last axis, arrive in its output as
they are. Where it spells the width (a Reshape), the spelling can be replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from sfa_onnx.ascend.flavour.scope import Facts, Names, Scope
from sfa_onnx.errors import ContractError
from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.operator.op import BINDINGS, KV_CACHE_PACK, KV_CACHE_WRITE

__all__ = ["Carriers"]

# Never look into rows, whatever their attributes say.
_CARRIERS: Final = frozenset(
    {"Concat", "ScatterND", "ScatterElements", "Identity", "Gather", KV_CACHE_WRITE.name}
)
# Carry rows when the last axis is what it was.
_VIEWS: Final = frozenset({"Transpose", "Squeeze", "Unsqueeze", "Slice", "Split"})
_OURS: Final = frozenset({b.atc_type for b in BINDINGS} | {KV_CACHE_PACK.name})


@dataclass
class Carriers:
    """The values that hold rows of one width, found from one of them; constants that spell it."""

    model: ModelProto
    facts: Facts
    names: Names
    hint: str  # what a refusal ends with
    spelled: list[tuple[NodeProto, int]] = field(default_factory=list)  # node, input: the width

    def __post_init__(self) -> None:
        self._scope = Scope(self.model.graph, self.names, self.facts, 18)

    def of(self, start: str, width: int) -> list[str]:
        """Every value that holds the rows `start` holds, up and down the graph.

        Raises:
            ContractError: an operator on the way looks into the rows.
        """
        found: dict[str, None] = {}
        queue = [start]
        while queue:
            name = queue.pop()
            if name in found or self.facts.types.get(name) != TensorProto.INT8:
                continue
            found[name] = None
            around = [*self._scope.readers(name), self._scope.producer(name)]
            for node in (n for n in around if n is not None):
                queue += self._beside(node, name, width)
        return list(found)

    def respell(self, new: int) -> None:
        """Write the new width where the nodes on the way spell the old one."""
        known: dict[str, str] = {}
        for node, index in self.spelled:
            source = node.input[index]
            if source not in known:
                sizes = np.array(self._scope.array(source))
                sizes.reshape(-1)[-1] = new
                known[source] = self._scope.constant(sizes, f"{source}/{new}_bytes")
            node.input[index] = known[source]
        self.spelled.clear()
        self._scope.changed()
        graph = self.model.graph
        still = {v.name for v in graph.output} | {n for n in known if self._scope.readers(n)}
        kept = [t for t in graph.initializer if t.name not in known.keys() - still]
        del graph.initializer[:]
        graph.initializer.extend(kept)

    def _beside(self, node: NodeProto, name: str, width: int) -> Iterable[str]:
        if node.op_type in _OURS:
            return ()
        if node.op_type == "Shape" and self._leaves_last(node, name):
            return ()
        if node.op_type == "Reshape":
            carried = self._reshapes(node, width)
        else:
            carried = node.op_type in _CARRIERS or self._views(node, width)
        if not carried:
            raise ContractError(
                f"node {node.name!r} ({node.op_type}) looks into the packed rows of {name!r}, whose"
                f" {self.hint}"
            )
        return (*node.input, *node.output)

    def _wide(self, name: str, width: int) -> bool:
        dims = self.facts.dims.get(name)
        return dims is not None and dims[-1:] == (width,)

    def _views(self, node: NodeProto, width: int) -> bool:
        """Whether a view's last axis is the row, whole, on both sides."""
        if node.op_type not in _VIEWS or not all(
            self._wide(n, width) for n in (node.input[0], *node.output)
        ):
            return False
        perm = list(attribute(node, "perm", ()))
        return node.op_type != "Transpose" or perm[-1:] == [len(perm) - 1]

    def _reshapes(self, node: NodeProto, width: int) -> bool:
        """Whether rows stay rows, and the width, where it is spelled, can be respelled."""
        if not all(self._wide(n, width) for n in (node.input[0], node.output[0])):
            return False
        last = self._last_size(node)
        if last is None:
            return False
        place, size = last
        if size == width:
            self.spelled.append(place)
        return size in (width, -1) or (size == 0 and not attribute(node, "allowzero", 0))

    def _last_size(self, node: NodeProto) -> tuple[tuple[NodeProto, int], int] | None:
        """Where a Reshape's last size is written, and that size: a constant, or a Concat of it."""
        sizes, place = self._scope.array(node.input[1]), (node, 1)
        if sizes is None:
            joined = self._scope.producer(node.input[1])
            if joined is None or joined.op_type != "Concat":
                return None
            place = (joined, len(joined.input) - 1)
            sizes = self._scope.array(joined.input[-1])
        if sizes is None or not sizes.size:
            return None
        return place, int(sizes.reshape(-1)[-1])

    def _leaves_last(self, node: NodeProto, name: str) -> bool:
        """Whether only other sizes than the last are taken from this Shape."""
        dims = self.facts.dims.get(name)
        output = node.output[0]
        if not dims or output in {v.name for v in self.model.graph.output}:
            return False
        places = range(len(dims))[attribute(node, "start", 0) : attribute(node, "end")]
        taken = [self._taken(reader, places) for reader in self._scope.readers(output)]
        return all(t is not None and len(dims) - 1 not in t for t in taken)

    def _taken(self, reader: NodeProto, places: Sequence[int]) -> Sequence[int] | None:
        """Which of the sizes a reader of a Shape takes; None where that is not seen."""
        given = [self._scope.array(n) for n in reader.input[1:]]
        numbers = [g.reshape(-1) for g in given if g is not None and g.dtype.kind == "i"]
        if len(numbers) < len(given):
            return None
        if reader.op_type == "Gather" and len(numbers) == 1:
            at = [int(i) for i in numbers[0]]
            inside = all(-len(places) <= i < len(places) for i in at)
            return [places[i] for i in at] if inside else None
        if reader.op_type == "Slice" and len(numbers) >= 2 and all(n.size == 1 for n in numbers):
            step = int(numbers[3][0]) if len(numbers) > 3 else 1
            return places[int(numbers[0][0]) : int(numbers[1][0]) : step] if step > 0 else None
        return None
