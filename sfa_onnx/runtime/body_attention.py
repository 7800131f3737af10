"""The attention operators as standard ONNX nodes: what a portable model ships as function body.

The body follows `docs/operator.md` step by step in float32. It cannot raise errors, so a usable
index after a negative one is skipped over instead of refused, and lengths are not checked.
"""

from __future__ import annotations

from typing import Any

from onnx import TensorProto

from sfa_onnx.op import SPARSE_FLASH_ATTENTION_ANTIQUANT, OpContract
from sfa_onnx.runtime.body import Body
from sfa_onnx.runtime.body_numbers import FORMATS, from_bytes

__all__ = ["attention_body"]


def attention_body(
    body: Body, op: OpContract, present: frozenset[str], attrs: dict[str, Any], elem_type: int
) -> str:
    """Write the body; values are named as the contract's inputs. Returns attention_out.

    Args:
        body: the writer.
        op: one of the two sparse attention operators.
        present: names of the inputs that the calling node has.
        attrs: its attributes (`scale_value` is read from the node at run time).
        elem_type: the query's onnx element type.
    """
    rows = _Rows(body, present, attrs)
    addresses, usable = rows.addresses()
    if op is SPARSE_FLASH_ATTENTION_ANTIQUANT:
        keys, values = _packed_rows(body, addresses, usable, attrs, elem_type)
        query = body.to_float(rows.flat_query("query"))
    else:
        values = _float_rows(body, "key", addresses, usable)
        keys, query = values, body.to_float(rows.flat_query("query"))
        if "query_rope" in present:
            key_rope = _float_rows(body, "key_rope", addresses, usable)
            query_rope = body.to_float(rows.flat_query("query_rope"))
            keys = body.op("Concat", values, key_rope, axis=-1)
            query = body.op("Concat", query, query_rope, axis=-1)
    scores = body.op("MatMul", query, body.op("Transpose", keys, perm=[0, 2, 1]))
    scores = body.op("Mul", scores, body.attribute("scale_value"))
    masked = body.op("Where", body.unsqueeze(usable, 1), scores, body.real(float("-inf")))
    out = body.op("MatMul", body.op("Softmax", masked, axis=-1), values)
    any_usable = body.to_bool(body.total(body.to_int(usable)))
    out = body.op("Where", body.unsqueeze(any_usable, 2), out, body.real(0))
    out = body.cast(out, elem_type) if elem_type != TensorProto.FLOAT else out
    return body.reshape(out, body.dims("query", 0, -1), body.dims(values, -1))


def _float_rows(body: Body, name: str, addresses: str, usable: str) -> str:
    """Rows of a float cache: [T, n, width] float32, zero where not usable."""
    flat = body.reshape(name, -1, body.dims(name, -1))
    rows = body.to_float(body.op("Gather", flat, addresses, axis=0))
    return body.op("Where", body.unsqueeze(usable, -1), rows, body.real(0))


def _packed_rows(
    body: Body, addresses: str, usable: str, attrs: dict[str, Any], elem_type: int
) -> tuple[str, str]:
    """Packed rows decoded to [T, n, C+R] and [T, n, C] float32, zero where not usable."""
    form = FORMATS[elem_type]
    rope, tile = attrs["rope_head_dim"], attrs["tile_size"]
    flat = body.reshape("key", -1, body.dims("key", -1))
    rows = body.op("Gather", flat, addresses, axis=0)
    width = body.op("Sub", body.dims("query", -1), body.ints(rope))
    rope_end = body.op("Add", width, body.ints(rope * form.bytes))
    nope = body.to_float(body.slice_last(rows, body.ints(0), width))
    end = body.dims("key", -1)
    scale = from_bytes(body, body.slice_last(rows, rope_end, end), FORMATS[TensorProto.FLOAT])
    tiles = body.reshape(nope, body.dims(rows, 0, -1), -1, tile)
    latent = body.op("Mul", tiles, body.unsqueeze(scale, -1))
    latent = body.reshape(latent, body.dims(rows, 0, -1), width)
    keep, zero = body.unsqueeze(usable, -1), body.real(0)
    latent = body.op("Where", keep, latent, zero)
    if not rope:
        return latent, latent
    key_rope = from_bytes(body, body.slice_last(rows, width, rope_end), form)
    key_rope = body.op("Where", keep, key_rope, zero)
    return body.op("Concat", latent, key_rope, axis=-1), latent


class _Rows:
    """Query rows [T]: their batch, their threshold, the key addresses they select."""

    def __init__(self, body: Body, present: frozenset[str], attrs: dict[str, Any]) -> None:
        self.body, self.present, self.attrs = body, present, attrs
        self.tnd = attrs["layout_query"] == "TND"
        lead = body.dims("query", 0, 1 if self.tnd else 2)
        self.row = body.range(body.op("ReduceProd", lead, keepdims=0))
        self.batch, self.position, self.length = self._tnd() if self.tnd else self._bsnd()

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
        body, layout = self.body, self.attrs["layout_kv"]
        if layout == "TND":
            sums = body.to_int("actual_seq_lengths_kv")
            first = body.op("Gather", self._starts(sums), self.batch)
            return body.op("Sub", body.op("Gather", sums, self.batch), first), first
        room = body.dim("key", 1)
        length = room
        if "actual_seq_lengths_kv" in self.present:
            length = self._of_batch("actual_seq_lengths_kv", self.batch)
        start = None if layout == "PA_BSND" else body.op("Mul", self.batch, room)
        return length, start

    def addresses(self) -> tuple[str, str]:
        """Key rows [T, K * sparse_block_size] and which of them are usable (others are row 0)."""
        body, size = self.body, self.attrs["sparse_block_size"]
        length, start = self._key_lengths()
        threshold = length
        if self.attrs["sparse_mode"] == 3:
            behind = body.op("Sub", length, self.length)
            threshold = body.op("Add", body.op("Add", behind, self.position), body.scalar(1))
        valid = body.op("Less", self.position, self.length)
        threshold = body.op("Where", valid, threshold, body.scalar(0))
        threshold = body.unsqueeze(threshold, 1, 2)  # [T, 1, 1]
        indices = body.reshape(body.to_int("sparse_indices"), -1, body.dims("sparse_indices", -1))
        blocks = body.unsqueeze(indices, 2)  # [T, K, 1]
        slots = body.range(body.dim("sparse_indices", -1))
        slots = body.op("Mul", body.unsqueeze(slots, 0, 2), body.scalar(size))
        looked_at = body.op("Less", slots, threshold)
        tokens = body.op(
            "Add", body.op("Mul", blocks, body.scalar(size)), body.range(body.scalar(size))
        )
        in_range = body.op("Less", tokens, threshold)
        chosen = body.op("GreaterOrEqual", blocks, body.scalar(0))
        usable = body.op("And", body.op("And", looked_at, chosen), in_range)
        flat = body.op("Mul", body.dims("sparse_indices", -1), body.ints(size))
        usable = body.reshape(usable, -1, flat)
        tokens = body.op("Where", usable, body.reshape(tokens, -1, flat), body.scalar(0))
        address = (
            self._paged(tokens)
            if start is None
            else body.op("Add", tokens, body.unsqueeze(start, 1))
        )
        return body.op("Where", usable, address, body.scalar(0)), usable

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
