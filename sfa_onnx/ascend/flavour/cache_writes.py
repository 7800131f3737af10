"""Padding in front of `KvCacheWrite`: what GE's ScatterNdUpdate does not skip, it must not see.

Serving engines give padding tokens a negative slot, which our operator does not write; of
ScatterNdUpdate no document says so (aclnnScatterNd takes indices from 0 on only). So each padding
token repeats the last token that has a slot: the same row to the same place, twice. When no token
has one, the row that stands at slot 0 is written over itself. All caches of one `slot_mapping`
share the arithmetic on slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from sfa_onnx.ascend.flavour.indices import is_non_negative
from sfa_onnx.ascend.flavour.scope import Scope
from sfa_onnx.errors import ContractError
from sfa_onnx.operator.op import KV_CACHE_WRITE

__all__ = ["PaddedWrites", "writes_padding"]

_T = TensorProto


def writes_padding(scope: Scope, node: NodeProto) -> bool:
    """Whether negative slots may reach a KvCacheWrite."""
    _, rows, slots = node.input
    return not (is_non_negative(scope, slots) or _repeated(scope, rows, slots))


def _repeated(scope: Scope, rows: str, slots: str) -> bool:
    """Whether rows and slots are chosen as `PaddedWrites` does it."""
    chosen, places = scope.producer(rows), scope.producer(slots)
    if chosen is None or places is None or {chosen.op_type, places.op_type} != {"Gather"}:
        return False
    known, source = scope.producer(places.input[0]), scope.producer(places.input[1])
    if known is None or source is None or chosen.input[1] != places.input[1]:
        return False
    if (known.op_type, source.op_type) != ("Concat", "Where") or len(known.input) != 2:
        return False
    test, first = scope.producer(source.input[0]), scope.array(known.input[0])
    zero = first is not None and first.size == 1 and not first.any()
    return zero and test is not None and (test.op_type, test.input[0]) == ("Less", known.input[1])


class PaddedWrites:
    """Rule: rows and slots of an ATC KvCacheWrite without padding."""

    def __init__(self) -> None:
        self._shared: list[tuple[Scope, str, tuple[str, str]]] = []

    def __call__(self, scope: Scope, node: NodeProto) -> list[NodeProto] | None:
        """The node behind its arithmetic; None where no negative slot can reach it.

        Raises:
            ContractError: rows and slots are known to be of different numbers.
        """
        if node.domain or node.op_type != KV_CACHE_WRITE.name or not writes_padding(scope, node):
            return None
        pages, rows, slots = node.input
        _check_counts(scope, node)
        emit = _Nodes(scope, node.name)
        source, places = self._slots(emit, slots)
        ends = [emit.constant(v, n) for v, n in (([0, 0], "from"), ([1, 1], "to"), ([0, 1], "at"))]
        kind = scope.dtype(pages)
        old = emit.op("Slice", [pages, *ends], "first_slot", kind)  # [1, 1, 1, D]
        old = emit.op("Reshape", [old, emit.constant([1, 1, -1], "row")], "first_row", kind)
        every = emit.op("Concat", [old, rows], "every_row", kind, axis=0)
        chosen = emit.op("Gather", [every, source], "rows", kind, axis=0)
        write = NodeProto()
        write.CopyFrom(node)
        write.input[:] = [pages, chosen, places]
        return [*emit.nodes, write]

    def _slots(self, emit: _Nodes, slots: str) -> tuple[str, str]:
        """For each slot [n]: which row to write, 0 being the one at slot 0, and where to."""
        for scope, name, pair in self._shared:
            if scope is emit.scope and name == slots:
                return pair
        zero = emit.constant([0], "zero", np.int32)
        absent = emit.op("Less", [slots, zero], "no_slot", _T.BOOL)
        rank = emit.op("Where", [absent, zero, emit.count_from_one(slots)], "rank")
        last = emit.op(
            "ArgMax", [emit.op("Cast", [rank], "rank_float", _T.FLOAT, to=_T.FLOAT)], "last",
            _T.INT64, axis=0, keepdims=1,
        )  # fmt: skip
        best = emit.op("Gather", [rank, last], "best", axis=0)  # 0 when no token has a slot
        source = emit.op("Where", [absent, best, rank], "source")
        known = emit.op("Concat", [zero, slots], "known", axis=0)
        pair = source, emit.op("Gather", [known, source], "places", axis=0)
        self._shared.append((emit.scope, slots, pair))
        return pair


def _check_counts(scope: Scope, node: NodeProto) -> None:
    rows, slots = (scope.dims(name) for name in node.input[1:3])
    if rows and slots and None not in (rows[0], slots[0]) and rows[0] != slots[0]:
        raise ContractError(
            f"node {node.name!r}: {slots[0]} slots for {rows[0]} rows; expected one for each row"
        )


class _Nodes:
    """New nodes in front of one write."""

    def __init__(self, scope: Scope, label: str) -> None:
        self.scope, self.label, self.nodes = scope, label, list[NodeProto]()

    def constant(self, value: list[int], part: str, dtype: type = np.int64) -> str:
        return self.scope.constant(value, f"{self.label}/{part}", dtype)

    def op(
        self, op_type: str, inputs: list[str], part: str, dtype: int = _T.INT32, **attributes: Any
    ) -> str:
        made = self.scope.node(op_type, inputs, f"{self.label}/{part}", dtype=dtype, **attributes)
        self.nodes.append(made)
        return str(made.output[0])

    def count_from_one(self, slots: str) -> str:
        """1, 2, ... n as int32, for slots [n]."""
        dims = self.scope.dims(slots)
        if dims and dims[0] is not None:
            return self.constant(list(range(1, dims[0] + 1)), "order", np.int32)
        one, first = (self.scope.constant(1, f"{self.label}/one", np.int32),
                      self.scope.constant(0, f"{self.label}/first"))  # fmt: skip
        size = self.op("Gather", [self.op("Shape", [slots], "shape", _T.INT64), first], "size",
                       _T.INT64, axis=0)  # fmt: skip
        size = self.op("Cast", [size], "count", to=_T.INT32)
        return self.op("Range", [one, self.op("Add", [size, one], "end"), one], "order")
