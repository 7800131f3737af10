"""The lightning indexer's key cache, paged as its attention's: one table, one length, one slot.

The keys keep the model's type (16-bit pages in a 16-bit model), or become int8 with one float16
scale per token; then queries are quantised per token and head in front of the operator, which is
`NPUQuantLightningIndexer`. Everything is written by `KvCacheWrite`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import onnx
from onnx import TensorProto, helper

from sfa_onnx.errors import ModelError
from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.kv_convert.emit import Emitter
from sfa_onnx.kv_convert.interface import BLOCK_TABLE, LENGTHS_KV
from sfa_onnx.kv_convert.padded_keys import (
    PaddedKeys,
    finite_weights,
    gathered,
    only_hides,
    padded_keys,
    quantised_column,
    scores_by_column,
)
from sfa_onnx.kv_convert.pages import write_pages
from sfa_onnx.kv_convert.trace import Stream
from sfa_onnx.kv_convert.translate import Translated, Translator
from sfa_onnx.operator.contract import OpContract
from sfa_onnx.operator.op import LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import ONNX_DOMAINS

__all__ = ["INDEX_CACHES", "IndexKeys", "indexer_sites"]

INDEX_CACHES: Final = ("float", "int8")
_BSND: Final = ("B", "S", "1", "C")
_T = TensorProto
_FLOATS: Final = (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16)


@dataclass(frozen=True)
class IndexRow:
    """A row of float or int8 elements: `bytes` counts them, for pages have a type of their own."""

    nope: int
    rope: int = 0
    tile: int = 0

    @property
    def bytes(self) -> int:
        """Elements of a row of pages."""
        return self.nope


class RowTranslator(Translator):
    """Float rows -> rows of pages, as they are or (index keys) int8.

    With scales, each value of rows has one of scales beside it.
    """

    def __init__(
        self, index: GraphIndex, emitter: Emitter, width: int, elem_type: int, *, int8: bool
    ) -> None:
        super().__init__(index, emitter, IndexRow(width), "paged-int8", elem_type)
        self.int8 = int8
        self.kind = "int8" if int8 else "float"
        self.page_type = _T.INT8 if int8 else elem_type
        self.suffix = "_pages"

    def pack(self, lat: Stream, rot: Stream | None) -> str:
        """New rows [B, S, 1, Di], and their scales [B, S, 1, 1]."""
        assert rot is None, "these rows have no rope of their own"
        rows = self._component(lat, self.row.nope)
        if not self.int8:
            return rows
        rows, scales = quantised(self.emit, rows)
        self.scales[rows] = scales
        return rows

    def _cache_input(self, lat: Stream, rot: Stream | None) -> Translated:
        done = super()._cache_input(lat, rot)
        if self.int8:
            self.scales[done.packed] = f"{lat.value}_scales"
        return done

    def _joined(self, parts: list[str]) -> str:
        whole = super()._joined(parts)
        if self.int8 and len(parts) > 1:
            scales = [self.scales[part] for part in parts]
            self.scales[whole] = self.emit.op("Concat", scales, axis=1)
        return whole

    def _write(self, pages: str, rows: str) -> str:
        written = write_pages(self.emit, pages, rows, self.row.nope)
        if self.int8:
            self.scales[written] = write_pages(self.emit, self.scales[pages], self.scales[rows], 1)
        return written


def quantised(emit: Emitter, value: str) -> tuple[str, str]:
    """Rows [..., D] as int8 and one float16 scale each [..., 1], by the formula of `kv_cache`."""
    x = emit.op("Cast", [value], to=_T.FLOAT)
    limit = emit.largest(emit.op("Abs", [x]))
    by = emit.real(127.0)
    scale = emit.op("Cast", [emit.op("Div", [limit, by])], "scales", to=_T.FLOAT16)
    wide = emit.op("Cast", [scale], to=_T.FLOAT)
    usable = emit.op("Greater", [wide, emit.real(0.0)])
    divisor = emit.op("Where", [usable, wide, emit.real(1.0)])
    whole = emit.op("Round", [emit.op("Div", [x, divisor])])
    whole = emit.op("Clip", [whole, emit.real(-127.0), by])
    return emit.op("Cast", [whole], "int8", to=_T.INT8), scale


def indexer_sites(graph: onnx.GraphProto) -> list[int]:
    """Indices of the float indexers of a graph."""
    return [i for i, n in enumerate(graph.node) if (n.domain, n.op_type) == LIGHTNING_INDEXER.key]


class IndexKeys:
    """Converts the indexers of one graph, and caches of floats that become pages of floats.

    Attributes:
        translators: by width, type and whether they become int8.
    """

    def __init__(self, index: GraphIndex, emit: Emitter, *, int8: bool) -> None:
        self.index, self.emit, self.int8 = index, emit, int8
        self.translators: dict[tuple[int, int, bool], RowTranslator] = {}

    def convert(self, node: onnx.NodeProto) -> None:
        """Let an indexer read pages.

        Raises:
            ModelError: its keys are not a cache among the inputs, or its form is not handled.
        """
        label = node.name or node.output[0]
        inputs = {t.name: n for t, n in zip(LIGHTNING_INDEXER.inputs, node.input, strict=False)}
        rows = self._rows(node, inputs.get("block_table", ""), label)
        padded = padded_keys(self.index, node)
        scores = node.output[1] if len(node.output) > 1 else ""
        if self.int8 and scores and not (padded and only_hides(self.index, scores)):
            raise ModelError(f"{label}: the quantised indexer gives no scores (sparse_values)")
        value = padded.rows if padded is not None else node.input[1]
        translator, done = self.pages(value, label, int8=self.int8)
        own = inputs.get("actual_seq_lengths_key", "")
        inputs["actual_seq_lengths_key"] = self.lengths(own, self._of(rows, LENGTHS_KV))
        scales = translator.scales.get(done.packed, "")
        op = QUANT_LIGHTNING_INDEXER if self.int8 else LIGHTNING_INDEXER
        if padded is not None:
            inputs |= self._beside(padded, done.packed, translator.row.nope, scales)
            layout = str(attribute(node, "layout_key", "BSND"))
        else:
            inputs |= {"key": done.packed, "block_table": self._of(rows, BLOCK_TABLE)}
            layout = "PA_BSND"
        hidden = inputs.pop("hidden", "")
        if self.int8:
            inputs |= self._quantised_side(inputs, inputs.pop("scales", scales), bool(padded))
        _rewrite(node, op, inputs, layout)
        if self.int8 and padded is not None and scores:
            self._without_scores(node.output[0], scores, hidden, rows)

    def _beside(self, padded: PaddedKeys, pages: str, width: int, scales: str) -> dict[str, str]:
        """Gathered keys with the column that marks padding beside them."""
        emit = self.emit
        keys = gathered(emit, pages, width)
        column = padded.room(emit, keys)
        if not self.int8:
            kind = self.index.elem_type(padded.rows)
            wide = column if kind == _T.FLOAT else emit.op("Cast", [column], to=kind)
            return {"key": emit.op("Concat", [keys, wide], "key", axis=-1)}
        narrow, scaled = quantised_column(emit, column, gathered(emit, scales, 1))
        key = emit.op("Concat", [keys, narrow], "key", axis=-1)
        return {"key": key, "scales": scaled, "hidden": column}

    def _without_scores(self, indices: str, scores: str, hidden: str, rows: str) -> None:
        """Let readers of the scores see which keys the mask hides."""
        kind = self.index.elem_type(scores)
        found = scores_by_column(self.emit, indices, hidden, rows, kind)
        for i, place in list(self.index.uses(scores)):
            node = self.index.nodes[i]
            if node.domain not in ONNX_DOMAINS:  # perhaps a copy
                node = next(n for n in self.index.graph.node if n.output[:1] == node.output[:1])
            node.input[place] = found

    def lengths(self, own: str, there: str = LENGTHS_KV) -> str:
        """How many keys are there and, of those, how many the model lets a sequence see."""
        return self.emit.op("Min", [own, there], "lengths") if own else there

    def _rows(self, node: onnx.NodeProto, table: str, label: str) -> str:
        """The batch entry [n] of every query row that is a sequence of its own; "" for none.

        A cache [B, S, 1, Di] that is read as B pages of S keys has one page in each row of its
        table: the number of a batch entry.
        """
        layouts = [attribute(node, f"layout_{side}", "BSND") for side in ("query", "key")]
        if layouts == ["BSND", "BSND"]:
            return ""
        if layouts != ["BSND", "PA_BSND"] or not self._one_column(table):
            told = " / ".join(map(str, layouts))
            raise ModelError(f"{label}: layouts {told}, expected BSND for query and keys")
        return self.emit.squeeze(table, [1])

    def _one_column(self, table: str) -> bool:
        """Whether a block table is known to have one column."""
        shape = self.index.shape(table)
        if shape is not None and len(shape) == 2 and isinstance(shape[1], int):
            return shape[1] == 1
        maker = self.index.maker(table)
        while maker is not None and maker.op_type in ("Cast", "Identity"):
            maker = self.index.maker(maker.input[0])
        if maker is None or maker.op_type != "Reshape":
            return False
        told = self.index.constant(maker.input[1])
        return told is not None and told.size == 2 and int(told.ravel()[1]) == 1

    def _of(self, rows: str, value: str) -> str:
        """A value with one entry per sequence, for `rows` of sequences."""
        return self.emit.op("Gather", [value, rows], axis=0) if rows else value

    def pages(
        self, value: str, label: str, *, int8: bool = False
    ) -> tuple[RowTranslator, Translated]:
        """What holds the rows [B, S, 1, D] of `value` as pages.

        Raises:
            ModelError: they are no cache among the inputs, or the file does not declare their type.
        """
        shape, kind = self.index.shape(value), self.index.elem_type(value)
        width = shape[-1] if shape else None
        if not isinstance(width, int) or kind not in _FLOATS:
            raise ModelError(f"{label}: the width or type of {value} is not known to the file")
        key = (width, kind, int8)
        if key not in self.translators:
            self.translators[key] = RowTranslator(self.index, self.emit, width, kind, int8=int8)
        done = self.translators[key].packed(Stream(value, _BSND), None)
        if done.cache is None:
            raise ModelError(f"{label}: its keys do not come from a cache among the inputs")
        if done.latent.high is not None:
            raise ModelError(
                f"{label}: the cache {done.latent.value} holds more than {value}, side by side;"
                " float pages need a cache for each (paged-int8 takes joint ones)"
            )
        return self.translators[key], done

    def _quantised_side(self, inputs: dict[str, str], scales: str, padded: bool) -> dict[str, str]:
        """Query, weights and scales as the quantised operator takes them."""
        query, scale = quantised(self.emit, inputs["query"])
        if padded:
            weights = finite_weights(self.emit, inputs["weights"], self.index)
        else:
            weights = self.emit.op("Cast", [inputs["weights"]], to=_T.FLOAT16)
        return {
            "query": query,
            "weights": weights,
            "query_dequant_scale": self.emit.squeeze(scale, [3]),
            "key_dequant_scale": self.emit.squeeze(scales, [3]),
        }


def _rewrite(node: onnx.NodeProto, op: OpContract, inputs: dict[str, str], layout: str) -> None:
    """Make `node` the operator `op` over keys of that layout; its other attributes stay."""
    given: dict[str, Any] = {
        a.name: attribute(node, a.name, a.default) for a in LIGHTNING_INDEXER.attributes
    }
    given["layout_key"] = layout
    known = {a.name for a in op.attributes}
    values = op.complete({n: v for n, v in given.items() if n in known})
    names = [inputs.get(tensor.name, "") for tensor in op.inputs]
    while names and not names[-1]:
        names.pop()
    node.op_type = op.name
    del node.input[:], node.attribute[:]
    node.input.extend(names)
    if op is QUANT_LIGHTNING_INDEXER:
        del node.output[1:]
    node.attribute.extend(helper.make_attribute(n, v) for n, v in values.items())
