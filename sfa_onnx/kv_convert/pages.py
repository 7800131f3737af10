"""New rows into pages: where each goes, and what becomes of tokens that have no slot.

Serving engines pad a batch and give the padding a negative slot. A ScatterND would wrap it around
to the last row of a page, so padding is made to repeat a token that has a slot: the same row to the
same place, twice. When no token has one, the first row of the first page is written over itself.
"""

from __future__ import annotations

from onnx import TensorProto

from sfa_onnx.kv_convert.emit import Emitter
from sfa_onnx.kv_convert.interface import SLOT_MAPPING

__all__ = ["PageWriter"]

_NO_SLOT = -2  # ranks padding below the row that stands for "none has a slot", which is at -1


class PageWriter:
    """Emits the writes of one model; all caches share the arithmetic on slots."""

    def __init__(self, emit: Emitter, block_size: int) -> None:
        self._emit = emit
        self._block_size = block_size
        self._shared: tuple[str, str] | None = None

    def write(self, pages: str, rows: str, row_bytes: int) -> str:
        """Rows [B, S1, 1, D] into pages [block_num, block_size, 1, D] at `slot_mapping` [B * S1].

        Two-level indices write into the pages as they are: a run-time that gives input and output
        the same buffer then moves new rows only.
        """
        emit = self._emit
        if self._shared is None:
            self._shared = self._slots()
        source, places = self._shared
        new = emit.op("Reshape", [rows, emit.constant([-1, 1, row_bytes])])
        count = emit.columns(emit.op("Shape", [new]), 0, 0, 1)
        bounds = [emit.constant(b) for b in ([0, 0], [1, 1], [0, 1])]
        old = emit.squeeze(emit.op("Slice", [pages, *bounds]), [0])
        every = emit.op("Concat", [new, old], axis=0)
        one_each = emit.op("Reshape", [source, count])  # fails unless every row has one slot
        chosen = emit.op("Gather", [every, one_each], axis=0)
        return emit.op("ScatterND", [pages, places, chosen], "pages")

    def _slots(self) -> tuple[str, str]:
        """The row to write for each slot [T], and where to [T, 2].

        Row T is the row that stands at slot 0 already.
        """
        emit = self._emit
        slots = emit.op("Cast", [SLOT_MAPPING], to=TensorProto.INT64)
        zero, one = emit.constant(0), emit.constant(1)
        count = emit.squeeze(emit.op("Shape", [slots]), [0])
        own = emit.op("Range", [zero, count, one])
        absent = emit.op("Less", [slots, zero])
        rank = emit.op("Where", [absent, emit.constant(_NO_SLOT), slots])
        ranks = emit.op("Concat", [rank, emit.constant([-1])], axis=0)
        ranks = emit.op("Cast", [ranks], to=TensorProto.FLOAT)
        best = emit.op("ArgMax", [ranks], axis=0, keepdims=1)
        source = emit.op("Where", [absent, best, own])
        known = emit.op("Concat", [slots, emit.constant([0])], axis=0)
        places = emit.op("Gather", [known, source], axis=0)
        size = emit.constant(self._block_size)
        block = emit.op("Div", [places, size])
        offset = emit.op("Sub", [places, emit.op("Mul", [block, size])])
        pair = [emit.unsqueeze(value, [1]) for value in (block, offset)]
        return source, emit.op("Concat", pair, axis=1)
