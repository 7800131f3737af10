"""The model's interface: float caches out, packed ones in, and readers of shapes served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from sfa_onnx.errors import ModelError
from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.kv_convert.emit import Emitter
from sfa_onnx.kv_convert.interface import (
    BLOCK_TABLE,
    LENGTHS_KV,
    PAGED_FORMS,
    SLOT_MAPPING,
    CacheEntry,
)
from sfa_onnx.kv_convert.trace import Stream
from sfa_onnx.kv_convert.translate import CacheInput, Translated, Translator
from sfa_onnx.kv_convert.writes import position_input, same_value
from sfa_onnx.operator.op import KV_CACHE_WRITE
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["Boundary"]

_WRITES = frozenset((KV_CACHE_WRITE.name, "ScatterND", "ScatterElements"))
_VIEWS = frozenset(("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Cast"))


class Boundary:
    """Rewrites graph inputs and outputs once all sites are translated."""

    def __init__(
        self, graph: onnx.GraphProto, index: GraphIndex, emit: Emitter, form: str, block_size: int
    ) -> None:
        self.graph, self.index, self.emit = graph, index, emit
        self.form, self.block_size = form, block_size
        self.latents: dict[str, tuple[Translator, Translated]] = {}
        self.ropes: dict[str, tuple[Translator, Translated]] = {}
        self.old_inputs: set[str] = set()
        self.caches: list[CacheInput] = []
        self.counters: set[str] = set()  # inputs that count the same rows, one per layer
        self.one_length = False  # the model asks how long its cache is, as one number

    def convert(self, translators: list[Translator]) -> list[CacheEntry]:
        """Change inputs, outputs and shape readers; returns the new interface's entries."""
        for translator in translators:
            for done in translator.done.values():
                self.latents[done.latent.value] = translator, done
                if done.rope:
                    self.ropes[done.rope.value] = translator, done
        self.caches = [c for translator in translators for c in translator.caches.values()]
        if self.form in PAGED_FORMS:
            self._one_place()
        outputs = self._outputs()
        self._shapes()
        self._inputs(translators)
        self._written_to_outputs()
        return self._entries(outputs)

    def _one_place(self) -> None:
        """Pages have one `slot_mapping`: refuse caches that are written at places of their own.

        Raises:
            ModelError: naming two of them.
        """
        writes = [(cache.latent.value, write) for cache in self.caches for write in cache.writes]
        grown = [cache.latent.value for cache in self.caches if not cache.writes]
        if writes and grown:
            raise ModelError(
                f"the cache {grown[0]} grows and {writes[0][0]} is written at places of its own,"
                " and pages have one slot_mapping; use --to int8 or packed-int8"
            )
        for name, write in writes[1:]:
            first, known = writes[0]
            if write.kind == known.kind and same_value(
                self.index, write.places, known.places, self.counters
            ):
                continue
            raise ModelError(
                f"the caches {first} and {name} are written at places that are not seen to be the"
                " same, and pages have one slot_mapping. Write them with one tensor of indices, or"
                " use --to int8 or packed-int8"
            )

    # -- outputs ----------------------------------------------------------------------------------

    def _peeled(self, name: str) -> str:
        while name not in self.latents and name not in self.ropes:
            node = self.index.maker(name)
            if node is None or node.op_type not in _VIEWS:
                break
            name = node.input[0]
        return name

    def _outputs(self) -> dict[str, list[tuple[str, str]]]:
        """Packed outputs at the latents' places; (float name, kind) by base value."""
        kept: list[onnx.ValueInfoProto] = []
        found: dict[str, list[tuple[str, str]]] = {}
        for output in self.graph.output:
            base = self._peeled(output.name)
            if base in self.latents:
                translator, done = self.latents[base]
                kept.append(self._output(f"{output.name}{translator.suffix}", done.packed))
                self._describe(kept[-1], output.name, translator.page_type, translator.row.bytes)
                if done.packed in translator.scales:
                    kept.append(
                        self._output(f"{output.name}_scales", translator.scales[done.packed])
                    )
                    self._describe(kept[-1], output.name, TensorProto.FLOAT16, 1)
                found.setdefault(base, []).append((output.name, "latent"))
            elif base in self.ropes:
                found.setdefault(base, []).append((output.name, "rope"))
            else:
                kept.append(output)
        del self.graph.output[:]
        self.graph.output.extend(kept)
        return found

    def _output(self, name: str, value: str) -> onnx.ValueInfoProto:
        """A graph output that is `value`."""
        self.emit.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        return onnx.ValueInfoProto(name=name)

    def _written_to_outputs(self) -> None:
        """Let each cache write make its graph output itself: a copy behind it costs the place."""
        made = {n.output[0]: n for n in self.emit.nodes if n.op_type in _WRITES}
        given = {output.name for output in self.graph.output}
        for node in list(self.emit.nodes):
            write = made.pop(node.input[0], None) if node.op_type == "Identity" else None
            if write is None or node.output[0] not in given:
                continue
            self.emit.nodes.remove(node)
            old, new = write.output[0], node.output[0]
            write.output[0] = new
            for reader in (*self.graph.node, *self.emit.nodes):
                for place, name in enumerate(reader.input):
                    if name == old:
                        reader.input[place] = new

    def _describe(self, info: onnx.ValueInfoProto, prefix: str, kind: int, width: int) -> None:
        """Give a converted cache its type and shape; `prefix` starts its dims' names."""
        if self.form in PAGED_FORMS:
            dims: list[Any] = [f"{prefix}_block_num", self.block_size, 1, width]
        else:
            dims = [f"{prefix}_batch", f"{prefix}_length", 1, width]
        info.CopyFrom(helper.make_tensor_value_info(info.name, kind, dims))

    # -- inputs -----------------------------------------------------------------------------------

    def _inputs(self, translators: list[Translator]) -> None:
        caches = {c.latent.value: (t, c) for t in translators for c in t.caches.values()}
        ropes = {c.rope.value for _, c in caches.values() if c.rope} - set(caches)
        self.old_inputs = set(caches) | ropes
        kept: list[onnx.ValueInfoProto] = []
        for value in self.graph.input:
            if value.name in caches:
                translator, cache = caches[value.name]
                kept.append(self._packed_input(value, cache, translator))
                if cache.packed in translator.scales:
                    kept.append(onnx.ValueInfoProto(name=translator.scales[cache.packed]))
                    self._describe(kept[-1], value.name, TensorProto.FLOAT16, 1)
            elif value.name not in ropes:
                kept.append(value)
        if self.form in PAGED_FORMS:
            kept.extend(self._page_inputs(kept, translators[0].fresh))
        del self.graph.input[:]
        self.graph.input.extend(kept)

    def _packed_input(
        self, value: onnx.ValueInfoProto, cache: CacheInput, translator: Translator
    ) -> onnx.ValueInfoProto:
        info = onnx.ValueInfoProto(name=cache.packed)
        shape, width = self.index.shape(value.name), translator.row.bytes
        if self.form in PAGED_FORMS or shape is None:
            self._describe(info, value.name, translator.page_type, width)
            return info
        axes = [cache.latent.axis(label) for label in ("B", "S")]
        dims = [shape[axis] if axis >= 0 else 1 for axis in axes]
        return helper.make_tensor_value_info(cache.packed, TensorProto.INT8, [*dims, 1, width])

    def _page_inputs(
        self, present: list[onnx.ValueInfoProto], fresh: dict[str, int | str | None]
    ) -> list[onnx.ValueInfoProto]:
        names = {value.name for value in present}
        wanted: dict[str, list[Any]] = {
            BLOCK_TABLE: [fresh["B"] or "page_batch", "blocks_per_sequence"],
            LENGTHS_KV: [fresh["B"] or "page_batch"],
        }
        if any(SLOT_MAPPING in node.input for node in self.emit.nodes):
            wanted[SLOT_MAPPING] = [_product(fresh["B"], fresh["S"])]
        clash = [name for name in wanted if name in names]
        if clash:
            raise ModelError(f"the model already has an input called {clash[0]}; rename it first")
        return [
            helper.make_tensor_value_info(name, TensorProto.INT32, dims)
            for name, dims in wanted.items()
        ]

    # -- readers of shapes ------------------------------------------------------------------------

    def _shapes(self) -> None:
        """`Shape(float cache)` answers as before, from the packed tensor's dims."""
        for node in self.graph.node:
            if node.op_type != "Shape" or node.domain:
                continue
            known = self.latents.get(node.input[0]) or self.ropes.get(node.input[0])
            if known is None:
                continue
            translator, done = known
            is_latent = node.input[0] in self.latents
            stream = done.latent if is_latent or done.rope is None else done.rope
            if done.cache is not None:
                self._shape_of(node, stream, translator, done, is_latent)

    def _shape_of(
        self,
        node: onnx.NodeProto,
        stream: Stream,
        translator: Translator,
        done: Translated,
        is_latent: bool,
    ) -> None:
        row = translator.row
        declared = self.index.shape(stream.value)
        width = declared[-1] if declared and isinstance(declared[-1], int) else None
        columns = width if width is not None else row.nope if is_latent else row.rope
        attrs = attributes(node)
        start = attrs.get("start", 0)
        end = attrs.get("end", len(stream.axes))
        asked = self._asked(node.output[0], stream.axes[slice(start, end)])
        # A size that nobody reads is not looked up: it may be told by another layer's tensors.
        length = self._length(done) if "S" in asked else self.emit.constant([1])
        parts = {"B": self._batch(done), "S": length}
        parts |= {"1": self.emit.constant([1]), "C": self.emit.constant([columns])}
        whole = self.emit.op("Concat", [parts[label] for label in stream.axes], axis=0)
        sliced = self.emit.columns(whole, 0, start, end)
        node.op_type = "Identity"
        del node.input[:], node.attribute[:]
        node.input.append(sliced)

    def _asked(self, shape: str, axes: Sequence[str]) -> set[str]:
        """Labels of the sizes that are read of a shape with these axes; all unless it is seen."""
        found: set[str] = set()
        for i, place in self.index.readers(shape):
            reader = self.index.nodes[i]
            picked = self.index.constant(reader.input[1]) if reader.op_type == "Gather" else None
            if place != 0 or picked is None or picked.size == 0:
                return set(axes)
            found |= {axes[int(n)] for n in picked.ravel() if -len(axes) <= n < len(axes)}
        return set(axes) if self.index.is_graph_output(shape) else found

    def _batch(self, done: Translated) -> str:
        shape = BLOCK_TABLE if self.form in PAGED_FORMS else done.packed
        return self.emit.op("Gather", [self.emit.op("Shape", [shape]), self.emit.constant([0])])

    def _length(self, done: Translated) -> str:
        emit = self.emit
        if self.form not in PAGED_FORMS:
            return emit.op("Gather", [emit.op("Shape", [done.packed]), emit.constant([1])])
        if done.cache is not None and done.cache.writes:
            return self._capacity(done.cache)
        self.one_length = True
        longest = emit.op("ReduceMax", [emit.op("Cast", [LENGTHS_KV], to=7)], keepdims=1)
        if done.cache is None or done.packed != done.cache.packed:
            return longest
        fresh = emit.op("Shape", [SLOT_MAPPING])
        return emit.op("Sub", [longest, emit.op("Div", [fresh, self._batch(done)])])

    def _capacity(self, cache: CacheInput) -> str:
        """Rows per sequence of a cache that is written in place: what its float form declared."""
        emit, stream = self.emit, cache.latent
        shape = self.index.shape(stream.value)
        size = None if shape is None else shape[stream.axis("S")]
        if isinstance(size, int):
            return emit.constant([size])
        gone = {c.latent.value for c in self.caches} | {c.rope.value for c in self.caches if c.rope}
        for value in self.graph.input:
            dims = () if value.name in gone else self.index.shape(value.name) or ()
            if size is not None and size in dims:
                whole = emit.op("Shape", [value.name])
                return emit.op("Gather", [whole, emit.constant([dims.index(size)])])
        columns = emit.op("Gather", [emit.op("Shape", [BLOCK_TABLE]), emit.constant([1])])
        return emit.op("Mul", [columns, emit.constant([self.block_size])])

    # -- afterwards -------------------------------------------------------------------------------

    def check_readers(self) -> None:
        """Refuse when somebody still reads a float cache.

        Raises:
            ModelError: naming the reader.
        """
        for node in self.graph.node:
            for name in node.input:
                if name in self.old_inputs:
                    raise ModelError(
                        f"{node.name or node.op_type} ({node.op_type}) also reads the float cache"
                        f" {name}, so it cannot become packed rows; use --to int8, which keeps the"
                        " interface"
                    )

    def _entries(self, outputs: dict[str, list[tuple[str, str]]]) -> list[CacheEntry]:
        entries: dict[str, CacheEntry] = {}
        for base, names in outputs.items():
            if base not in self.latents:
                continue
            translator, done = self.latents[base]
            rope_base = done.rope.value if done.rope else ""
            rope_out = next((n for n, _ in outputs.get(rope_base, [])), "")
            key = done.cache.packed if done.cache else done.packed
            entries[key] = self._entry(translator, done, names[0][0], rope_out)
        for translator, done in self.latents.values():
            if done.cache and done.cache.packed not in entries:
                entries[done.cache.packed] = self._entry(translator, done, "", "")
        return list(entries.values())

    def _entry(
        self, translator: Translator, done: Translated, latent_out: str, rope_out: str
    ) -> CacheEntry:
        cache, row = done.cache, translator.row
        latent = cache.latent if cache else done.latent
        rope = cache.rope if cache else done.rope
        places = {position_input(self.index, w.places) for w in cache.writes} if cache else set()
        return CacheEntry(
            latent_in=latent.value if cache else "",
            rope_in=rope.value if cache and rope else "",
            packed_in=cache.packed if cache else "",
            latent_out=latent_out,
            rope_out=rope_out,
            packed_out=f"{latent_out}{translator.suffix}" if latent_out else "",
            latent_axes=latent.axes,
            rope_axes=rope.axes if rope else (),
            nope=row.nope,
            rope=row.rope,
            tile=row.tile,
            elem_type=translator.query_type,
            in_place=bool(cache and cache.writes),
            position=places.pop() if len(places) == 1 else "",
            ragged=any(w.ragged for w in cache.writes) if cache else False,
            kind=translator.kind,
            scales_in=translator.scales.get(cache.packed, "") if cache else "",
            scales_out=f"{latent_out}_scales" if latent_out and translator.scales else "",
        )


def _product(batch: int | str | None, rows: int | str | None) -> int | str:
    """B * S1 where one of them is 1 or both are numbers; a name of its own otherwise."""
    if isinstance(batch, int) and isinstance(rows, int):
        return batch * rows
    if batch == 1 and rows is not None:
        return rows
    return batch if rows == 1 and batch is not None else "new_rows"
