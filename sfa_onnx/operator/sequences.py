"""Which keys a query row may see and where they lie: layouts, lengths, block tables.

Shared by the references of the attention and indexer ops. All values here are untrusted input: what
breaks the rules of `docs/operator.md` raises `ContractError` before anything is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sfa_onnx.errors import ContractError

__all__ = ["Sequences", "refuse"]

Ints = NDArray[np.int64]
_RANK = {"BSND": 4, "TND": 3, "PA_BSND": 4}


def refuse(what: str, expected: str, got: object) -> ContractError:
    """The error for `what` that is not as `expected`."""
    return ContractError(f"{what}: expected {expected}, got {got}")


@dataclass(frozen=True)
class Sequences:
    """Geometry of one call. Query rows are numbered row-major: b*S1 + s1, or t.

    `batch` [rows] is -1 for rows past the valid query length; `threshold` [rows] counts the keys
    visible to a row, 0 where there are none.
    """

    batch: Ints
    threshold: Ints
    key_start: Ints  # [B] first key row of a batch (contiguous layouts)
    block_table: Ints | None  # [B, M]
    block_num: int
    block_size: int

    @classmethod
    def of(
        cls,
        query: NDArray[Any],
        key: NDArray[Any],
        layout_query: str,
        layout_kv: str,
        sparse_mode: int,
        lengths_query: ArrayLike | None,
        lengths_kv: ArrayLike | None,
        block_table: ArrayLike | None,
        keys: str = "kv",
    ) -> Sequences:
        """Check the layouts and every length of one call.

        Args:
            query: [B, S1, N1, ..] (BSND) or [T, N1, ..] (TND).
            key: [B, S2, 1, D], [T2, 1, D] (TND) or [block_num, block_size, 1, D] (PA_BSND).
            layout_query: BSND or TND.
            layout_kv: BSND, TND or PA_BSND.
            sparse_mode: 0 all keys, 3 right-bottom causal.
            lengths_query: [B] valid counts (BSND, default S1) or prefix sums (TND, required).
            lengths_kv: [B] valid counts (BSND, default S2; PA_BSND, required) or prefix sums (TND).
            block_table: [B, M], PA_BSND only.
            keys: how the operator ends the names of its keys' layout and lengths: "kv" or "key".

        Raises:
            ContractError: a layout, rank, length or table breaks the contract.
        """
        _check_layouts(query, key, layout_query, layout_kv, sparse_mode, keys)
        starts, counts_q, slots = _query_lengths(query, layout_query, lengths_query)
        batches = len(counts_q)
        table = _block_table(block_table, batches, layout_kv, keys)
        key_start, counts_kv = _key_lengths(key, layout_kv, lengths_kv, batches, table, keys)
        rows = int(np.prod(query.shape[: _RANK[layout_query] - 2]))
        batch, threshold = np.full(rows, -1, np.int64), np.zeros(rows, np.int64)
        for b in range(batches):
            if counts_q[b] > slots[b]:
                raise refuse(f"actual_seq_lengths_query[{b}]", f"<= {slots[b]}", counts_q[b])
            span = slice(starts[b], starts[b] + counts_q[b])
            batch[span] = b
            causal = counts_kv[b] - counts_q[b] + 1 + np.arange(counts_q[b])
            threshold[span] = counts_kv[b] if sparse_mode == 0 else np.maximum(causal, 0)
        return cls(batch, threshold, key_start, table, key.shape[0], key.shape[1])

    def addresses(self, batch: int, tokens: Ints) -> Ints:
        """Rows of the key, seen as [rows, D], that hold these tokens of this batch.

        Raises:
            ContractError: a token's block_table entry lies outside [0, block_num).
        """
        if self.block_table is None:
            return np.asarray(self.key_start[batch] + tokens)
        columns = tokens // self.block_size
        blocks = self.block_table[batch, columns]
        bad = (blocks < 0) | (blocks >= self.block_num)
        if bad.any():
            where = f"block_table[{batch}][{columns[bad][0]}]"
            raise refuse(where, f"a page in [0, {self.block_num})", blocks[bad][0])
        return np.asarray(blocks * self.block_size + tokens % self.block_size)


def _check_layouts(
    query: NDArray[Any],
    key: NDArray[Any],
    layout_query: str,
    layout_kv: str,
    sparse_mode: int,
    keys: str,
) -> None:
    if layout_query not in ("BSND", "TND"):
        raise refuse("layout_query", "BSND or TND", layout_query)
    if layout_kv != "PA_BSND" and layout_kv != layout_query:
        raise refuse(f"layout_{keys}", f"PA_BSND or the query's layout {layout_query}", layout_kv)
    if query.ndim != _RANK[layout_query]:
        raise refuse(f"query ({layout_query})", f"rank {_RANK[layout_query]}", query.shape)
    if key.ndim != _RANK[layout_kv] or key.shape[-2] != 1:
        raise refuse(f"key ({layout_kv})", f"rank {_RANK[layout_kv]} with one head", key.shape)
    if layout_kv == "BSND" and key.shape[0] != query.shape[0]:
        raise refuse("key batch", f"the query's {query.shape[0]}", key.shape[0])
    if sparse_mode not in (0, 3):
        raise refuse("sparse_mode", "0 or 3", sparse_mode)


def _lengths(values: ArrayLike, name: str) -> Ints:
    lengths = np.asarray(values)
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu"):
        raise refuse(name, "a vector of int32", f"{lengths.dtype} {lengths.shape}")
    if (lengths < 0).any():
        b = int(np.argmax(lengths < 0))
        raise refuse(f"{name}[{b}]", "a length >= 0", lengths[b])
    return lengths.astype(np.int64)


def _prefix(sums: Ints, total: int, name: str) -> tuple[Ints, Ints]:
    """Starts and counts of a vector of inclusive prefix sums."""
    counts = np.diff(sums, prepend=0)
    if (counts < 0).any():
        b = int(np.argmax(counts < 0))
        raise refuse(f"{name}[{b}] (prefix sum)", f">= {sums[b - 1]}", sums[b])
    if len(sums) and sums[-1] > total:
        raise refuse(f"{name}[{len(sums) - 1}] (prefix sum)", f"<= {total}", sums[-1])
    return sums - counts, counts


def _query_lengths(
    query: NDArray[Any], layout: str, lengths: ArrayLike | None
) -> tuple[Ints, Ints, Ints]:
    """First row, valid rows and room of every batch."""
    name = "actual_seq_lengths_query"
    if layout == "TND":
        if lengths is None or np.size(lengths) == 0:
            raise refuse(name, "prefix sums [B], B >= 1 (layout TND)", "nothing")
        starts, counts = _prefix(_lengths(lengths, name), query.shape[0], name)
        return starts, counts, counts
    batches, room = query.shape[:2]
    counts = np.full(batches, room) if lengths is None else _lengths(lengths, name)
    if len(counts) != batches:
        raise refuse(name, f"[{batches}]", counts.shape)
    return np.arange(batches) * room, counts, np.full(batches, room)


def _block_table(table: ArrayLike | None, batches: int, layout: str, keys: str) -> Ints | None:
    if layout != "PA_BSND":
        if table is not None:
            raise refuse("block_table", f"nothing with layout_{keys} {layout}", np.shape(table))
        return None
    array = None if table is None else np.asarray(table)
    if array is None or array.ndim != 2 or array.dtype.kind not in "iu":
        got = "nothing" if array is None else f"{array.dtype} {array.shape}"
        raise refuse("block_table", f"int32 [{batches}, M] (layout_{keys} PA_BSND)", got)
    if array.shape[0] != batches or array.shape[1] < 1:
        raise refuse("block_table", f"[{batches}, M >= 1]", array.shape)
    return array.astype(np.int64)


def _key_lengths(
    key: NDArray[Any],
    layout: str,
    lengths: ArrayLike | None,
    batches: int,
    table: Ints | None,
    keys: str,
) -> tuple[Ints, Ints]:
    """First key row and valid keys of every batch."""
    name = f"actual_seq_lengths_{keys}"
    if lengths is None and layout != "BSND":
        raise refuse(name, f"[{batches}] (layout_{keys} {layout})", "nothing")
    room = key.shape[1] if table is None else table.shape[1] * key.shape[1]
    counts = np.full(batches, room) if lengths is None else _lengths(lengths, name)
    if len(counts) != batches:
        raise refuse(name, f"[{batches}]", counts.shape)
    if layout == "TND":
        return _prefix(counts, key.shape[0], name)
    if (counts > room).any():
        b = int(np.argmax(counts > room))
        limit = "S2" if table is None else f"{table.shape[1]} block_table columns of {key.shape[1]}"
        raise refuse(f"{name}[{b}]", f"<= {room} ({limit})", counts[b])
    return np.arange(batches) * room, counts
