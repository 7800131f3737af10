"""The conversion of one model: new nodes in, old cache interface out, everything else untouched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
from onnx import TensorProto, helper

from sfa_onnx.errors import ModelError
from sfa_onnx.files.onnx_attrs import attribute, attributes
from sfa_onnx.guard.guarded import infer_shapes
from sfa_onnx.kv_convert.arrange import Arrangement, declare_domain
from sfa_onnx.kv_convert.boundary import Boundary
from sfa_onnx.kv_convert.emit import Emitter
from sfa_onnx.kv_convert.index_keys import IndexKeys, indexer_sites
from sfa_onnx.kv_convert.interface import BLOCK_TABLE, PAGED_FORMS, CacheEntry
from sfa_onnx.kv_convert.trace import Stream
from sfa_onnx.kv_convert.translate import Translator
from sfa_onnx.operator.contract import PackedRow
from sfa_onnx.operator.op import (
    DOMAIN_OWN,
    KV_CACHE_PACK,
    NPU,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
)
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["Conversion", "float_sites"]

_WIDTHS = ("query", "key", "key_rope")
_BSND = ("B", "S", "1", "C")
# What the packed row takes in; every other input must have its place in the int8 operator.
_PACKED_INPUTS = ("query", "key", "value", "query_rope", "key_rope")
_ITEM: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2}

_ONE_LENGTH = (
    "the model asks for the length of its cache as one number and gets that of the longest"
    " sequence: where it counts positions by it, feed sequences of one length (the shorter ones"
    " padded, and hidden by the mask), or export it with positions as an input"
)


def float_sites(graph: onnx.GraphProto) -> list[int]:
    """Indices of the float-cache operators of a graph."""
    op = SPARSE_FLASH_ATTENTION
    return [i for i, n in enumerate(graph.node) if (n.domain, n.op_type) == op.key]


def _input(node: onnx.NodeProto, name: str) -> str:
    position = SPARSE_FLASH_ATTENTION.input_index(name)
    return node.input[position] if position < len(node.input) else ""


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return attribute(node, name, SPARSE_FLASH_ATTENTION.attribute(name).default)


def _checked(node: onnx.NodeProto) -> str:
    """What a site is called.

    Raises:
        ModelError: its layouts are not those that are converted.
    """
    label = node.name or node.output[0]
    if _attribute(node, "layout_kv") != "BSND" or _attribute(node, "layout_query") != "BSND":
        raise ModelError(
            f"{label}: only sites with layout BSND for query and keys are converted; got"
            f" {_attribute(node, 'layout_query')} / {_attribute(node, 'layout_kv')}"
        )
    return str(label)


class Conversion:
    """Rewrites `model` in place; `run` returns the report's fields."""

    def __init__(
        self, model: onnx.ModelProto, form: str, block_size: int, tile: int, index_cache: str = ""
    ) -> None:
        self.model, self.graph = model, model.graph
        self.form, self.block_size, self.tile = form, block_size, tile
        self.index = _index_with_shapes(model)
        opset = self.index.opsets.get("", 13)
        taken = set(self.index.producer) | {v.name for v in self.graph.input}
        taken |= set(self.index.initializers)
        self.emit = Emitter(taken, opset)
        self.sites = float_sites(self.graph)
        self.entries: list[CacheEntry] = []
        self.translators: dict[PackedRow, Translator] = {}
        self.keys = IndexKeys(self.index, self.emit, int8=index_cache == "int8")
        self.indexers = indexer_sites(self.graph) if index_cache else []
        self.notes: list[str] = []

    def run(self) -> dict[str, Any]:
        """Convert all sites; afterwards the graph is sorted and has no dead nodes of ours."""
        before = _names(self.graph.input), _names(self.graph.output)
        arrange = Arrangement(self.graph)
        site = self._float_site if self.form == "paged" else self._site
        for position in self.sites:
            site(self.graph.node[position])
        for position in self.indexers:
            self.keys.convert(self.graph.node[position])
        if self.form != "int8":
            boundary = Boundary(self.graph, self.index, self.emit, self.form, self.block_size)
            translators = (*self.translators.values(), *self.keys.translators.values())
            self.entries = boundary.convert(list(translators))
            self._note_counters(sorted(boundary.counters))
            if boundary.one_length:
                self.notes.append(_ONE_LENGTH)
        arrange.settle(self.emit)
        if self.form != "int8":
            boundary.check_readers()
        declare_domain(self.model, DOMAIN_OWN, KV_CACHE_PACK.version)
        after = _names(self.graph.input), _names(self.graph.output)
        return {
            "removed_inputs": [n for n in before[0] if n not in after[0]],
            "added_inputs": [n for n in after[0] if n not in before[0]],
            "removed_outputs": [n for n in before[1] if n not in after[1]],
            "added_outputs": [n for n in after[1] if n not in before[1]],
            "bytes_per_token_before": sum(e.bytes_before for e in self.entries),
            "bytes_per_token_after": sum(e.bytes_after for e in self.entries),
            "notes": self.notes,
        }

    def _note_counters(self, names: list[str]) -> None:
        """What one `slot_mapping` takes for granted of a counter that each layer has."""
        if names:
            self.notes.append(
                f"one slot_mapping stands for {', '.join(names)}: they are taken to be equal"
            )

    @property
    def tokens(self) -> str:
        """New rows per sequence of one run, as far as the file says."""
        every = (*self.translators.values(), *self.keys.translators.values())
        told = (t.fresh["S"] for t in every)
        return next((str(n) for n in told if n is not None), "")

    # -- one site ---------------------------------------------------------------------------------

    def _float_site(self, node: onnx.NodeProto) -> None:
        """Latents and ropes in pages of their own; the operator stays."""
        label = _checked(node)
        latent = self.keys.pages(_input(node, "key"), label)[1].packed
        inputs = {
            t.name: n for t, n in zip(SPARSE_FLASH_ATTENTION.inputs, node.input, strict=False)
        }
        inputs |= {"key": latent, "value": latent, "block_table": BLOCK_TABLE}
        if inputs.get("key_rope"):
            inputs["key_rope"] = self.keys.pages(inputs["key_rope"], label)[1].packed
        own = inputs.get("actual_seq_lengths_kv", "")
        inputs["actual_seq_lengths_kv"] = self.keys.lengths(own)
        names = [inputs.get(tensor.name, "") for tensor in SPARSE_FLASH_ATTENTION.inputs]
        while not names[-1]:
            names.pop()
        given = attributes(node) | {"layout_kv": "PA_BSND"}
        del node.input[:], node.attribute[:]
        node.input.extend(names)
        given = SPARSE_FLASH_ATTENTION.complete(given)
        node.attribute.extend(helper.make_attribute(n, v) for n, v in given.items())

    def _site(self, node: onnx.NodeProto) -> None:
        label = _checked(node)
        translator = self._translator(node, label)
        latent = Stream(_input(node, "key"), _BSND)
        rope_name = _input(node, "key_rope")
        rope = Stream(rope_name, _BSND) if rope_name else None
        if self.form == "int8":
            packed = translator.pack(latent, rope)
        else:
            done = translator.packed(latent, rope)
            packed = done.packed
            if done.cache is None and self.form in PAGED_FORMS:
                raise ModelError(
                    f"{label}: its keys do not come from a cache among the inputs (a prefill, or a"
                    " cache that is changed in other ways than by writing rows), so there is"
                    " nothing to page; use --to int8 or packed-int8"
                )
            if not translator.caches and self.form == "packed-int8":
                self.notes.append(f"{label}: keys do not come from a cache input")
        assert isinstance(translator.row, PackedRow)
        self._note_bare_rows(translator.row)
        self._replace(node, packed, translator.row)

    def _note_bare_rows(self, row: PackedRow) -> None:
        """What rows without a rope become on the NPU, once."""
        wide = PackedRow(row.nope, NPU.rope, row.tile, 2)
        more = wide.bytes / row.bytes - 1
        note = (
            f"no rope, so rows have {row.bytes} bytes; `sfa-onnx atc` writes {wide.bytes} for the"
            f" NPU, with {NPU.rope} zero columns: exact, {more:.0%} more cache"
        )
        if not row.rope and note not in self.notes:
            self.notes.append(note)

    def _translator(self, node: onnx.NodeProto, label: str) -> Translator:
        nope = self._width(_input(node, "key"), label)
        rope_name = _input(node, "key_rope")
        rope = self._width(rope_name, label) if rope_name else 0
        elem_type = self.index.elem_type(_input(node, "query")) or self.index.elem_type(
            _input(node, "key")
        )
        if elem_type not in _ITEM:
            raise ModelError(
                f"{label}: the query's type is not known to the file, so the packed row cannot be"
                " laid out; run onnx shape inference on the model first"
            )
        tile = self.tile if nope % self.tile == 0 else nope
        row = PackedRow(nope, rope, tile, _ITEM[elem_type])
        if row not in self.translators:
            self.translators[row] = Translator(self.index, self.emit, row, self.form, elem_type)
        return self.translators[row]

    def _width(self, value: str, label: str) -> int:
        shape = self.index.shape(value)
        width = shape[-1] if shape else None
        if not isinstance(width, int):
            raise ModelError(
                f"{label}: the width of {value} is not known to the file; run onnx shape inference"
                " on the model first"
            )
        return width

    def _replace(self, node: onnx.NodeProto, packed: str, row: PackedRow) -> None:
        op = SPARSE_FLASH_ATTENTION_ANTIQUANT
        query, rope = _input(node, "query"), _input(node, "query_rope")
        if rope:
            query = self.emit.op("Concat", [query, rope], "query", axis=-1)
        paged = self.form in PAGED_FORMS
        inputs = dict.fromkeys((t.name for t in op.inputs), "")
        inputs |= {"query": query, "key": packed, "value": packed}
        for tensor in SPARSE_FLASH_ATTENTION.inputs:
            if tensor.name in _PACKED_INPUTS or not _input(node, tensor.name):
                continue
            if tensor.name not in inputs:
                raise ModelError(f"{node.name}: {op.name} has no input {tensor.name}")
            inputs[tensor.name] = _input(node, tensor.name)
        if paged:
            own = inputs.get("actual_seq_lengths_kv", "")
            inputs |= {"block_table": BLOCK_TABLE, "actual_seq_lengths_kv": self.keys.lengths(own)}
        given = attributes(node)
        SPARSE_FLASH_ATTENTION.carried_to(op, given)
        shared = ("scale_value", "sparse_block_size", "layout_query", "sparse_mode")
        values = {name: _attribute(node, name) for name in shared}
        values["layout_kv"] = "PA_BSND" if paged else "BSND"
        values |= {"tile_size": row.tile, "rope_head_dim": row.rope}
        node.op_type = op.name
        del node.input[:], node.attribute[:]
        names = list(inputs.values())
        while names and not names[-1]:
            names.pop()
        node.input.extend(names)
        node.attribute.extend(helper.make_attribute(n, v) for n, v in op.complete(values).items())


def _names(values: Iterable[onnx.ValueInfoProto]) -> list[str]:
    return [value.name for value in values]


def _index_with_shapes(model: onnx.ModelProto) -> GraphIndex:
    """An index over the graph; where the file declares no widths, onnx infers them (no weights).

    Widths are those of the operator's inputs, of what an indexer's keys are put together from, and
    of the indices that rows are written at.
    """
    index = GraphIndex.of(model)
    wanted = [_input(model.graph.node[i], n) for i in float_sites(model.graph) for n in _WIDTHS]
    wanted += [n.input[1] for n in model.graph.node if n.op_type == "ScatterND"]
    keys = (index.maker(model.graph.node[i].input[1]) for i in indexer_sites(model.graph))
    wanted += [v for node in keys if node and node.op_type == "Concat" for v in node.input]
    if all(index.shape(v) and isinstance(index.shape(v)[-1], int) for v in wanted if v):  # type: ignore[index]
        return index
    inferred, _ = infer_shapes(model)
    if inferred is None:
        return index
    known = {v.name for v in model.graph.value_info}
    model.graph.value_info.extend(v for v in inferred.graph.value_info if v.name not in known)
    return GraphIndex.of(model)
