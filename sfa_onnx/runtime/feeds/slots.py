"""Inputs that reach a slot of our operators: what the contract lets stand there.

Shapes are those at the node, not at the input: a query may come in two parts, a key may be a cache
with new rows behind it. Lengths are ragged, indices are legal for every row's own length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from sfa_onnx.errors import ContractError
from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.contract import PackedRow
from sfa_onnx.operator.op import find_op
from sfa_onnx.operator.sequences import Sequences

__all__ = ["Slots", "layout", "selection"]

Array = NDArray[Any]
Shape = tuple[int, ...]
_LENGTHS_KV = ("actual_seq_lengths_kv", "actual_seq_lengths_key")
_RAGGED = 8  # every further sequence is shorter by this part of the room


def layout(attrs: dict[str, Any], side: str) -> str:
    """The layout of the query's or the keys' side; indexers call the latter `layout_key`."""
    if side == "query":
        return str(attrs.get("layout_query", "BSND"))
    return str(attrs.get("layout_kv") or attrs.get("layout_key") or "BSND")


def selection(rng: np.random.Generator, counts: Array, width: int) -> Array:
    """Rows [n, width] of distinct entries below each row's count, -1 behind them."""
    rows = np.full((len(counts), width), -1, np.int64)
    for row, count in zip(rows, counts, strict=True):
        some = rng.permutation(int(count))[:width]
        row[: len(some)] = some
    return rows


@dataclass
class Slots:
    """Draws for the slots of one node.

    Attributes:
        node: one of our operators.
        shape: shapes of values of the node's graph.
        drawn: the array of a graph input that a value is a plain view of; None for others.
        elem_type: element types of values.
        rng: the generator.
        keys: how many keys a row may see where shapes and lengths do not say.
    """

    node: NodeProto
    shape: Callable[[str], Shape | None]
    drawn: Callable[[str], Array | None]
    elem_type: Callable[[str], int | None]
    rng: np.random.Generator
    keys: int

    def __post_init__(self) -> None:
        op = find_op(self.node.domain, self.node.op_type)
        slots = () if op is None else op.inputs
        given = zip((t.name for t in slots), self.node.input, strict=False)
        self.values = {slot: name for slot, name in given if name}
        self.attrs: dict[str, Any] = attributes(self.node)

    def draw(self, slot: str, shape: Shape, dtype: Any) -> Array | None:
        """A value for an input of this shape; None: any value of its type will do."""
        if not shape:
            return None  # no input of ours is a scalar: the model is wrong, and its run says so
        if slot == "key" and dtype == np.int8 and "tile_size" in self.attrs:
            return self._packed(shape)
        if slot == "sparse_indices":
            return self._indices(shape).astype(dtype)
        if slot == "block_table":
            blocks = (self._slot("key") or (int(np.prod(shape)),))[0]
            order = np.resize(self.rng.permutation(blocks), int(np.prod(shape)))
            return order.reshape(shape).astype(dtype)
        if slot.startswith("actual_seq_lengths"):
            return self._lengths(slot, shape).astype(dtype)
        if slot.endswith("_dequant_scale"):  # what a quantiser makes
            return np.abs(self.rng.standard_normal(shape)).astype(dtype)
        return None

    def _slot(self, slot: str) -> Shape | None:
        """The shape of another input; None: it has none that fits one of ours, of 2 to 4 axes."""
        found = self.shape(self.values[slot]) if slot in self.values else None
        return found if found is not None and len(found) > 1 else None

    def _packed(self, shape: Shape) -> Array | None:
        """Packed rows of plain numbers."""
        rope, tile = int(self.attrs["rope_head_dim"]), int(self.attrs["tile_size"])
        kind = self.elem_type(self.values["query"]) if "query" in self.values else None
        narrow = (2,) if kind is not None else (2, 4)
        for itemsize in (4,) if kind == TensorProto.FLOAT else narrow:
            for nope in range(tile, shape[-1], tile):
                if PackedRow(nope, rope, tile, itemsize).bytes == shape[-1]:
                    return self._rows(shape, nope, rope, tile, itemsize)
        return None

    def _rows(self, shape: Shape, nope: int, rope: int, tile: int, itemsize: int) -> Array:
        lead = shape[:-1]
        kind = np.dtype(np.float32 if itemsize == 4 else np.float16)
        latent = self.rng.standard_normal((*lead, nope)).astype(np.float32)
        key_rope = self.rng.standard_normal((*lead, rope)).astype(kind)
        if itemsize == 2:  # float16 or bfloat16, who knows: +-1 is a plain number in both
            key_rope = np.sign(key_rope)
        return kv_cache.pack(latent, key_rope if rope else None, tile_size=tile)

    def _lengths(self, slot: str, shape: Shape) -> Array:
        side = "query" if slot.endswith("query") else "key"
        kind, tensor = layout(self.attrs, side), self._slot(side) or (1, 1)
        if kind == "TND":
            return np.linspace(0, tensor[0], shape[0] + 1)[1:].astype(np.int64)
        if side == "query":
            return np.full(shape, tensor[1])
        table = self._slot("block_table")
        room = tensor[1] * table[1] if kind == "PA_BSND" and table else tensor[1]
        query = self._slot("query")
        least = query[1] if query and len(query) == 4 else 1
        steps = np.arange(int(np.prod(shape))) % _RAGGED
        return np.maximum(room - steps * room // _RAGGED, min(least, room)).reshape(shape)

    def _indices(self, shape: Shape) -> Array:
        """[..., K] legal entries: distinct blocks below every row's threshold, -1 behind them."""
        size = int(self.attrs.get("sparse_block_size", 1))
        visible = self._visible()
        rows = int(np.prod(shape[:-1]))
        if visible is None or len(visible) != rows:
            visible = np.full(rows, self.keys)
        counts = np.where(visible > 0, np.maximum(visible // size, 1), 0)
        return selection(self.rng, counts, shape[-1]).reshape(shape)

    def _visible(self) -> Array | None:
        """How many keys each query row may see [rows]; None where lengths are computed inside."""
        query, key = self._slot("query"), self._slot("key")
        if query is None or key is None:
            return None
        lengths: dict[str, Array | None] = {}
        for slot in ("actual_seq_lengths_query", *_LENGTHS_KV, "block_table"):
            if slot in self.values:
                lengths[slot] = self.drawn(self.values[slot])
                if lengths[slot] is None:
                    return None
        try:
            found = Sequences.of(
                np.broadcast_to(np.float32(0), query),
                np.broadcast_to(np.float32(0), key),
                layout(self.attrs, "query"),
                layout(self.attrs, "key"),
                int(self.attrs.get("sparse_mode", 0)),
                lengths.get("actual_seq_lengths_query"),
                next((lengths[s] for s in _LENGTHS_KV if s in lengths), None),
                lengths.get("block_table"),
            )
        except (ContractError, IndexError, ValueError):
            return None
        return found.threshold
