"""Index keys with a column that marks padding: the rows come from pages, the column from the mask.

`fuse` hides padding by one column more, 1 at hidden keys, which one head more reads. The column is
made anew by every run and may differ between sequences that share a page, so it has no place in
pages: the rows of each sequence are gathered, and the column put beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto

from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.kv_convert.emit import Emitter
from sfa_onnx.kv_convert.interface import BLOCK_TABLE
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import CONDITIONS, VIEWS
from sfa_onnx.passes.indexer.build import HIDDEN_WEIGHT

__all__ = [
    "PaddedKeys",
    "finite_weights",
    "gathered",
    "only_hides",
    "padded_keys",
    "quantised_column",
    "scores_by_column",
]

_T = TensorProto
_LARGEST: Final = 65504.0  # of float16


@dataclass(frozen=True)
class PaddedKeys:
    """The two parts of padded keys [B, S2, 1, Di + 1].

    Attributes:
        rows: the keys [B, S2, 1, Di].
        column: [B, S2, 1, 1], 1 at hidden keys.
    """

    rows: str
    column: str

    def room(self, emit: Emitter, gathered: str) -> str:
        """The column for as many keys as the pages of a sequence have room for."""
        room = emit.columns(emit.op("Shape", [gathered]), 0, 1, 2)
        batch = emit.columns(emit.op("Shape", [self.column]), 0, 0, 1)
        dims = emit.op("Concat", [batch, room, emit.constant([1, 1])], axis=0)
        own = emit.op("Cast", [self.column], to=_T.FLOAT)
        more = emit.op("Concat", [own, emit.op("Expand", [emit.real(0.0), dims])], axis=1)
        return emit.op("Slice", [more, emit.constant([0]), room, emit.constant([1])], "hidden")


def padded_keys(index: GraphIndex, node: onnx.NodeProto) -> PaddedKeys | None:
    """The parts of an indexer's keys, where a column marks padding; None: they are plain."""
    joined = index.maker(node.input[1])
    if joined is None or joined.op_type != "Concat" or len(joined.input) != 2:
        return None
    shape = index.shape(joined.input[1])
    if attribute(joined, "axis", 0) not in (-1, 3) or shape is None or shape[-1:] != (1,):
        return None
    return PaddedKeys(*joined.input) if _marks(index, joined.input[1]) else None


def _marks(index: GraphIndex, value: str) -> bool:
    """Whether numbers are conditions, so that they are 0 or 1."""
    while index.elem_type(value) != _T.BOOL:
        node = index.maker(value)
        if node is None or node.op_type not in VIEWS:
            return node is not None and node.op_type in CONDITIONS
        value = node.input[0]
    return True


def gathered(emit: Emitter, pages: str, width: int) -> str:
    """The rows [B, room, 1, width] that the block table names, in the order of their keys."""
    count = emit.columns(emit.op("Shape", [pages]), 0, 0, 1)
    last = emit.op("Cast", [emit.op("Sub", [count, emit.constant([1])])], to=_T.INT32)
    table = emit.op("Max", [BLOCK_TABLE, emit.constant(0, np.int32)])
    table = emit.op("Min", [table, last], "table")  # entries without a page hold anything
    found = emit.op("Gather", [pages, table], axis=0)
    return emit.op("Reshape", [found, emit.constant([0, -1, 1, width])], "rows")


def quantised_column(emit: Emitter, column: str, scales: str) -> tuple[str, str]:
    """(the column as int8, the scales of the keys): a hidden key's own is the largest there is.

    The weight of the head that reads the column is a float16, and its query's scale 1 / 127.
    """
    wide = emit.op("Mul", [column, emit.real(127.0)])
    hidden = emit.op("Greater", [column, emit.real(0.5)])
    largest = emit.constant(_LARGEST, np.float16)
    return emit.op("Cast", [wide], to=_T.INT8), emit.op("Where", [hidden, largest, scales])


def finite_weights(emit: Emitter, weights: str, index: GraphIndex) -> str:
    """Weights as float16: that of hidden keys is past its range."""
    wide = weights
    if index.elem_type(weights) != _T.FLOAT:
        wide = emit.op("Cast", [weights], to=_T.FLOAT)
    return emit.op("Cast", [emit.op("Max", [wide, emit.real(-_LARGEST)])], to=_T.FLOAT16)


def only_hides(index: GraphIndex, scores: str) -> bool:
    """Whether scores serve only to tell hidden keys from others."""
    stack = [scores]
    while stack:
        value = stack.pop()
        if index.is_graph_output(value):
            return False
        for i, _ in index.uses(value):
            node = index.nodes[i]
            if node.op_type in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
                stack.append(node.output[0])
                continue
            limit = index.constant(node.input[1]) if node.op_type == "Greater" else None
            if limit is None or limit.size != 1 or float(limit.reshape(-1)[0]) > HIDDEN_WEIGHT / 4:
                return False
    return True


def scores_by_column(emit: Emitter, indices: str, column: str, rows: str, elem_type: int) -> str:
    """What stands for the scores [.., K] of selected keys: 0, or low where they are hidden."""
    flat = emit.op("Reshape", [column, emit.constant([0, -1])])
    if rows:  # every query row is a sequence of its own
        flat = emit.op("Gather", [flat, rows], axis=0)
    at = emit.op("Cast", [emit.op("Max", [indices, emit.constant(0, np.int32)])], to=_T.INT64)
    at = emit.op("Reshape", [at, emit.constant([0, -1, 1])])
    hidden = emit.op("GatherND", [flat, at], batch_dims=1)
    hidden = emit.op("Reshape", [hidden, emit.op("Shape", [indices])])
    shown = emit.op("Less", [hidden, emit.real(0.5)])
    low = emit.op("Where", [shown, emit.real(0.0), emit.real(HIDDEN_WEIGHT)], "scores")
    return low if elem_type in (0, _T.FLOAT) else emit.op("Cast", [low], "scores", to=elem_type)
