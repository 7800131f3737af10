"""Query rows of a call as standard ONNX nodes: layouts, lengths, block tables."""

from __future__ import annotations

from typing import Any

from sfa_onnx.runtime.portable.body import Body

__all__ = ["Rows"]


class Rows:
    """Query rows [T]: their batch, how many keys they see, where a token's key lies."""

    def __init__(self, body: Body, present: frozenset[str], attrs: dict[str, Any]) -> None:
        """Write the nodes that compute each row's batch; `attrs` holds layouts and sparse_mode."""
        self.body, self.present, self.attrs = body, present, attrs
        kv = "layout_kv" in attrs
        self.layout = attrs["layout_kv" if kv else "layout_key"]
        self.lengths = "actual_seq_lengths_kv" if kv else "actual_seq_lengths_key"
        self.tnd = attrs["layout_query"] == "TND"
        lead = body.dims("query", 0, 1 if self.tnd else 2)
        self.row = body.range(body.op("ReduceProd", lead, keepdims=0))
        self.batch, self.position, self.length = self._tnd() if self.tnd else self._bsnd()
        self.keys = self._key_lengths()

    def flat_query(self, name: str) -> str:
        """[T, N1, width] of the query or its rope."""
        return self.body.reshape(name, -1, self.body.dims(name, -2))

    def _bsnd(self) -> tuple[str, str, str]:
        body = self.body
        size = body.dim("query", 1)
        batch = body.op("Div", self.row, size)
        position = body.op("Sub", self.row, body.op("Mul", batch, size))
        if "actual_seq_lengths_query" not in self.present:
            return batch, position, size
        return batch, position, self._of_batch("actual_seq_lengths_query", batch)

    def _tnd(self) -> tuple[str, str, str]:
        """A row belongs to the first batch whose prefix sum exceeds it; the rest to none."""
        body = self.body
        sums = body.to_int("actual_seq_lengths_query")
        passed = body.op("GreaterOrEqual", body.unsqueeze(self.row, 1), body.unsqueeze(sums, 0))
        batch = body.total(body.to_int(passed), keepdims=0)
        last = body.op("Sub", body.dim(sums, 0), body.scalar(1))
        batch = body.op("Min", batch, last)
        start = body.op("Gather", self._starts(sums), batch)
        length = body.op("Sub", body.op("Gather", sums, batch), start)
        return batch, body.op("Sub", self.row, start), length

    def _starts(self, sums: str) -> str:
        """Exclusive prefix sums of inclusive ones."""
        body = self.body
        return body.op("Concat", body.ints(0), body.op("Slice", sums, body.ints(0), body.ints(-1)),
                       axis=0)  # fmt: skip

    def _of_batch(self, name: str, batch: str) -> str:
        return self.body.op("Gather", self.body.to_int(name), batch)

    def _key_lengths(self) -> tuple[str, str | None]:
        """Per query row: keys of its batch, and the batch's first key row (None: paged)."""
        body, layout = self.body, self.layout
        if layout == "TND":
            sums = body.to_int(self.lengths)
            first = body.op("Gather", self._starts(sums), self.batch)
            return body.op("Sub", body.op("Gather", sums, self.batch), first), first
        room = body.dim("key", 1)
        length = room
        if self.lengths in self.present:
            length = self._of_batch(self.lengths, self.batch)
        start = None if layout == "PA_BSND" else body.op("Mul", self.batch, room)
        return length, start

    def sees_any(self) -> str:
        """Rows [T] whose mask lets a key through, if there is one."""
        body = self.body
        if self.attrs["sparse_mode"] == 3:
            return body.op("Greater", self.threshold(), body.scalar(0))
        return body.op("Less", self.position, self.length)

    def threshold(self) -> str:
        """Visible keys per query row, [T]; 0 (or less) where there are none."""
        body = self.body
        visible, _ = self.keys
        if self.attrs["sparse_mode"] == 3:
            behind = body.op("Sub", visible, self.length)
            visible = body.op("Add", body.op("Add", behind, self.position), body.scalar(1))
        valid = body.op("Less", self.position, self.length)
        return body.op("Where", valid, visible, body.scalar(0))

    def addresses(self, tokens: str, usable: str) -> str:
        """Key rows of tokens [T, n]; row 0 where not usable."""
        body, (_, start) = self.body, self.keys
        tokens = body.op("Where", usable, tokens, body.scalar(0))
        if start is None:
            address = self._paged(tokens)
        else:
            address = body.op("Add", tokens, body.unsqueeze(start, 1))
        return body.op("Where", usable, address, body.scalar(0))

    def _paged(self, tokens: str) -> str:
        """Tokens through the block table; a negative page becomes an address Gather refuses."""
        body = self.body
        size = body.dim("key", 1)
        columns = body.dim("block_table", 1)
        page = body.op("Div", tokens, size)
        entry = body.op("Add", body.unsqueeze(body.op("Mul", self.batch, columns), 1), page)
        table = body.reshape(body.to_int("block_table"), -1)
        block = body.op("Gather", table, entry)
        offset = body.op("Sub", tokens, body.op("Mul", page, size))
        address = body.op("Add", body.op("Mul", block, size), offset)
        refused = body.scalar(2**62)
        return body.op("Where", body.op("Less", block, body.scalar(0)), refused, address)
