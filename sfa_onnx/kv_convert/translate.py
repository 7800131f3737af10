"""Latent and rope streams -> one stream of packed rows, through concatenations and writes.

`Translator.packed` answers with a value [B, S, 1, D] (or pages) that holds, as packed int8 rows,
what the two float streams held. It stops at graph inputs (the cache comes in packed from now on)
and at anything that is not mere movement of rows (new rows: packed there by `KvCachePack`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import onnx

from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.kv_convert.emit import Emitter
from sfa_onnx.kv_convert.interface import PAGED_FORMS
from sfa_onnx.kv_convert.pages import write_pages
from sfa_onnx.kv_convert.trace import Stream, peel
from sfa_onnx.kv_convert.writes import Write, Writes
from sfa_onnx.operator.op import DOMAIN_OWN, KV_CACHE_PACK
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["CacheInput", "Translated", "Translator"]


@dataclass
class CacheInput:
    """A float cache among the graph inputs, and the packed input that takes its place."""

    latent: Stream
    rope: Stream | None
    packed: str
    elem_type: int
    writes: list[Write] = field(default_factory=list)  # scatters into it, in place


@dataclass(frozen=True)
class Translated:
    """One pair of float values with its packed counterpart."""

    latent: Stream
    rope: Stream | None
    packed: str
    cache: CacheInput | None  # where the rows come in, when they do


class RowLayout(Protocol):
    """What a row of the converted cache is made of."""

    @property
    def nope(self) -> int:
        """Columns of the latent."""

    @property
    def rope(self) -> int:
        """Columns of the rope."""

    @property
    def tile(self) -> int:
        """Columns that share a scale."""

    @property
    def bytes(self) -> int:
        """Elements of a row of the converted cache."""


class Translator:
    """Translates the key streams of any number of sites of one graph."""

    def __init__(
        self,
        index: GraphIndex,
        emitter: Emitter,
        row: RowLayout,
        form: str,
        query_type: int,
    ) -> None:
        self.index = index
        self.emit = emitter
        self.row = row
        self.form = form
        self.query_type = query_type  # of query and rope rows: onnx.TensorProto.DataType
        self.done: dict[tuple[str, str], Translated] = {}
        # How many rows one run appends, and for how many sequences, as far as the file says.
        self.fresh: dict[str, int | str | None] = {"B": None, "S": None}
        self.caches: dict[str, CacheInput] = {}
        self.writes = Writes(index, emitter)
        self.kind, self.page_type, self.suffix = "packed", int(onnx.TensorProto.INT8), "_packed"
        self.scales: dict[str, str] = {}  # value of rows -> that of their scales, where apart

    def packed(self, latent: Stream, rope: Stream | None) -> Translated:
        """The packed counterpart of two streams (memoised: sites share caches)."""
        lat = peel(self.index, latent)
        rot = None if rope is None else peel(self.index, rope)
        key = (lat.value, rot.value if rot else "")
        if key not in self.done:
            self.done[key] = self._translate(lat, rot)
        return self.done[key]

    def _fresh(self, latent: Stream, rope: Stream | None) -> Translated:
        """Rows appended to a cache: never a cache of their own, even when they are fed in."""
        lat = peel(self.index, latent)
        rot = None if rope is None else peel(self.index, rope)
        key = (lat.value, rot.value if rot else "")
        if key not in self.done:
            self._count(lat)
            self.done[key] = Translated(lat, rot, self.pack(lat, rot), None)
        return self.done[key]

    def _count(self, fresh: Stream) -> None:
        shape = self.index.shape(fresh.value)
        if shape is None or len(shape) != len(fresh.axes):
            return
        for label in self.fresh:
            axis = fresh.axis(label)
            self.fresh[label] = shape[axis] if axis >= 0 else 1

    def _translate(self, lat: Stream, rot: Stream | None) -> Translated:
        if self.index.is_graph_input(lat.value) and self._both_inputs(rot):
            return self._cache_input(lat, rot)
        node = self.index.maker(lat.value)
        other = self.index.maker(rot.value) if rot else None
        same_kind = rot is None or (
            node is not None and other is not None and node.op_type == other.op_type
        )
        if node is not None and same_kind:
            if node.op_type == "Concat":
                moved = self._concat(node, other, lat, rot)
            elif node.op_type in ("ScatterND", "ScatterElements"):
                moved = self._scatter(node, other, lat, rot)
            elif node.op_type == "Slice":
                moved = self._slice(node, other, lat, rot)
            else:
                moved = None
            if moved is not None:
                return moved
        return Translated(lat, rot, self.pack(lat, rot), None)

    def _both_inputs(self, rot: Stream | None) -> bool:
        return rot is None or self.index.is_graph_input(rot.value)

    # -- where rows come in -----------------------------------------------------------------------

    def _cache_input(self, lat: Stream, rot: Stream | None) -> Translated:
        known = self.caches.get(lat.value)
        if known is None:
            elem_type = self.index.elem_type(lat.value)
            known = CacheInput(lat, rot, f"{lat.value}{self.suffix}", elem_type)
            self.caches[lat.value] = known
        return Translated(lat, rot, known.packed, known)

    def pack(self, lat: Stream, rot: Stream | None) -> str:
        """New rows: one KvCachePack over [B, S, 1, C] (and [B, S, 1, R])."""
        inputs = [self._component(lat, self.row.nope)]
        if rot is not None:
            inputs.append(self._component(rot, self.row.rope))
        return self.emit.op(
            KV_CACHE_PACK.name, inputs, "packed", DOMAIN_OWN, tile_size=self.row.tile
        )

    def _component(self, stream: Stream, width: int) -> str:
        value = stream.value
        if stream.high is not None:
            column = stream.axis("C")
            value = self.emit.columns(value, column, stream.low, stream.low + width)
        return self.emit.to_canonical(self._cast(value, stream.value), stream.axes)

    def _cast(self, value: str, source: str) -> str:
        """Rows are packed in the query's type: casts peeled off on the way are made good."""
        wanted = self.query_type
        if self.index.elem_type(source) not in (0, wanted):
            return self.emit.op("Cast", [value], to=wanted)
        return value

    # -- movement ---------------------------------------------------------------------------------

    def _concat(
        self, node: onnx.NodeProto, other: onnx.NodeProto | None, lat: Stream, rot: Stream | None
    ) -> Translated | None:
        if not _on_sequence(node, lat) or (other and rot and not _on_sequence(other, rot)):
            return None
        ropes: list[Stream | None] = [None] * len(node.input)
        if rot is not None and other is not None:
            if len(other.input) != len(node.input):
                return None
            ropes = [replace(rot, value=name) for name in other.input]
        pairs = [
            (replace(lat, value=name), rope) for name, rope in zip(node.input, ropes, strict=True)
        ]
        parts = [self.packed(*pairs[0]), *(self._fresh(*pair) for pair in pairs[1:])]
        cache = next((part.cache for part in parts if part.cache), None)
        if self.form in PAGED_FORMS:
            if parts[0].cache is None:
                return None
            fresh = [part.packed for part in parts[1:]]
            return Translated(lat, rot, self._write(parts[0].packed, self._joined(fresh)), cache)
        return Translated(lat, rot, self._joined([part.packed for part in parts]), cache)

    def _joined(self, parts: list[str]) -> str:
        """Rows one after the other along the sequence."""
        return parts[0] if len(parts) == 1 else self.emit.op("Concat", parts, axis=1)

    def _scatter(
        self, node: onnx.NodeProto, other: onnx.NodeProto | None, lat: Stream, rot: Stream | None
    ) -> Translated | None:
        """Slice assignment, index_copy or scatter: the same write over packed rows."""
        found = self.writes.read(node, other, lat, rot)
        if found is None:
            return None
        data = self._pair(lat, rot, node.input[0], other.input[0] if other else "")
        updates = self._pair(lat, rot, node.input[2], other.input[2] if other else "")
        before, rows = self.packed(*data), self._fresh(*updates)
        if before.cache is not None:
            before.cache.writes.append(found)
        if self.form in PAGED_FORMS:
            if before.cache is None:
                return None
            written = self._write(before.packed, rows.packed)
        else:
            written = self.writes.emit(found, before.packed, rows.packed)
        return Translated(lat, rot, written, before.cache)

    def _slice(
        self, node: onnx.NodeProto, other: onnx.NodeProto | None, lat: Stream, rot: Stream | None
    ) -> Translated | None:
        """A Slice along the sequence, the same for both streams."""
        axes = self.index.constant(node.input[3]) if len(node.input) > 3 else None
        if axes is None or axes.size != 1 or lat.axes[int(axes.ravel()[0])] != "S":
            return None
        if other is not None and list(other.input[1:3]) != list(node.input[1:3]):
            return None
        source = self._pair(lat, rot, node.input[0], other.input[0] if other else "")
        whole = self.packed(*source)
        if self.form in PAGED_FORMS:
            start = self.index.constant(node.input[1])
            if start is None or int(start.ravel()[0]) != 0:
                return None
            return replace(whole, latent=lat, rope=rot)  # the lengths say how far rows are valid
        steps = [node.input[4]] if len(node.input) > 4 and node.input[4] else []
        bounds = [node.input[1], node.input[2], self.emit.constant([1]), *steps]
        return Translated(lat, rot, self.emit.op("Slice", [whole.packed, *bounds]), whole.cache)

    def _write(self, pages: str, rows: str) -> str:
        return write_pages(self.emit, pages, rows, self.row.bytes)

    @staticmethod
    def _pair(
        lat: Stream, rot: Stream | None, value: str, rope_value: str
    ) -> tuple[Stream, Stream | None]:
        return replace(lat, value=value), replace(rot, value=rope_value) if rot else None


def _on_sequence(node: onnx.NodeProto, stream: Stream) -> bool:
    axis = int(attribute(node, "axis", 0))
    return stream.axes[axis] == "S"
