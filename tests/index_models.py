"""Decode layers with a lightning indexer: its selection feeds an attention over a float cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.operator.op import DOMAIN_NPU, LIGHTNING_INDEXER
from tests.test_kv_convert import N1, C, K, R, attention, const, model, vi

__all__ = ["DI", "HI", "Array", "feeds_for", "indexed"]

HI, DI = 4, 32  # heads and width of the indexer
Array = NDArray[Any]


def indexer(prefix: str, key: str, out: list[str], mode: int, lengths: str) -> onnx.NodeProto:
    inputs = [f"{prefix}iq", key, f"{prefix}iw", "", lengths]
    node = helper.make_node(
        LIGHTNING_INDEXER.name,
        inputs[: 5 if lengths else 3],
        out,
        f"{prefix}indexer",
        domain=DOMAIN_NPU,
    )
    values = {"sparse_count": K, "sparse_mode": mode, "return_values": int(len(out) > 1)}
    filled = LIGHTNING_INDEXER.complete(values)
    node.attribute.extend(helper.make_attribute(n, v) for n, v in filled.items())
    return node


def indexed(
    layers: int = 1,
    *,
    tokens: int | str = 1,
    elem: int = TensorProto.FLOAT,
    heads: int = HI,
    lengths: bool = False,
    values: bool = False,
    by_row: bool = False,
) -> onnx.ModelProto:
    """Growing caches [b, past, C], [b, past, R] and index keys [b, past, DI], all returned.

    Args:
        layers: how many.
        tokens: new tokens of one run; more than one: causal.
        elem: type of everything that is not an integer.
        heads: of the indexer.
        lengths: the indexer gets `seen` [b], how many keys a sequence may see.
        values: scores are made and returned, too.
        by_row: every query row is a sequence of its own over one page, its batch entry's keys, and
            sees the keys up to `pos` [b, tokens], as masks by position are fused.
    """
    nodes, inputs, outputs, infos = [], [], [], []
    mode = 0 if tokens == 1 or by_row else 3
    inits = [const("two", [2])]
    if by_row:
        inputs.append(vi("pos", ["b", tokens], TensorProto.INT64))
        inits += [const("one", [1]), const("column", [-1, 1]), const("flat", [-1])]
        inits += [const("tail", [1, K])]
        inits += [const("heads", [-1, 1, heads]), const("queries", [-1, 1, heads, DI])]
        scalars = {"nil": 0, "step": 1, "first": 0}
        inits += [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in scalars.items()]
        nodes += _rows()
    if lengths:
        inputs.append(vi("seen", ["b"], TensorProto.INT32))
    for i in range(layers):
        p = f"l{i}."
        parts = (("c", C), ("r", R), ("k", DI))
        for n, width in parts:
            inputs += [vi(f"{p}past_{n}", ["b", "past", width], elem)]
            inputs += [vi(f"{p}new_{n}", ["b", tokens, width], elem)]
            outputs.append(vi(f"{p}{n}", ["b", "total", width], elem))
            infos.append(vi(f"{p}key_{n}", ["b", "total", 1, width], elem))
            pair = [f"{p}past_{n}", f"{p}new_{n}"]
            nodes.append(helper.make_node("Concat", pair, [f"{p}{n}"], f"{p}cat_{n}", axis=1))
            nodes.append(helper.make_node("Unsqueeze", [f"{p}{n}", "two"], [f"{p}key_{n}"]))
        inputs += [
            vi(f"{p}q", ["b", tokens, N1, C], elem), vi(f"{p}qr", ["b", tokens, N1, R], elem),
            vi(f"{p}iq", ["b", tokens, heads, DI], elem), vi(f"{p}iw", ["b", tokens, heads], elem),
        ]  # fmt: skip
        made = [f"{p}idx", *([f"{p}scores"] if values else [])]
        nodes.append(indexer(p, f"{p}key_k", made, mode, "seen" if lengths else ""))
        if by_row:
            before, after = _apart(nodes[-1], p)
            nodes[-1:-1] = before
            nodes += after
        site = attention(p, f"{p}key_c", f"{p}key_r", f"{p}o")
        next(a for a in site.attribute if a.name == "sparse_mode").i = mode
        nodes.append(site)
        infos += [vi(f"{p}idx", ["b", tokens, 1, K], TensorProto.INT32)]
        outputs += [vi(f"{p}o", ["b", tokens, N1, C], elem)]
        outputs += [vi(f"{p}idx", ["b", tokens, 1, K], TensorProto.INT32)]
        if values:
            outputs.append(vi(f"{p}scores", ["b", tokens, 1, K], elem))
    return model(nodes, inputs, outputs, inits, infos)


def _rows() -> list[onnx.NodeProto]:
    """For rows [b * tokens]: the batch entry as a table of one column, and the keys they see."""
    n = helper.make_node
    return [
        n("Shape", ["pos"], ["pos_shape"]),
        n("Gather", ["pos_shape", "first"], ["batch"]),
        n("Range", ["nil", "batch", "step"], ["entries"]),
        n("Unsqueeze", ["entries", "one"], ["entry"]),
        n("Expand", ["entry", "pos_shape"], ["entry_of"]),
        n("Reshape", ["entry_of", "column"], ["table64"]),
        n("Cast", ["table64"], ["table"], to=TensorProto.INT32),
        n("Add", ["pos", "one"], ["counts"]),
        n("Reshape", ["counts", "flat"], ["counts_flat"]),
        n("Cast", ["counts_flat"], ["counts32"], to=TensorProto.INT32),
    ]


def _apart(node: onnx.NodeProto, p: str) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Let an indexer take rows for sequences; the nodes before and behind it."""
    raw = f"{p}raw"
    query, key, weights = node.input[:3]
    out = node.output[0]
    node.input[:] = [f"{p}iq_rows", key, f"{p}iw_rows", "", "counts32", "table"]
    node.output[0] = raw
    next(a for a in node.attribute if a.name == "layout_key").s = b"PA_BSND"
    made = helper.make_node
    before = [
        made("Reshape", [query, "queries"], [f"{p}iq_rows"]),
        made("Reshape", [weights, "heads"], [f"{p}iw_rows"]),
    ]
    after = [
        made("Shape", [query], [f"{p}q_shape"], start=0, end=2),
        made("Concat", [f"{p}q_shape", "tail"], [f"{p}idx_shape"], axis=0),
        made("Reshape", [raw, f"{p}idx_shape"], [out]),
    ]
    return before, after


def feeds_for(
    m: onnx.ModelProto, batch: int, past: int, tokens: int = 1, seed: int = 0
) -> dict[str, Array]:
    """Plain numbers for every input of `indexed`, all sequences `past` tokens long."""
    rng = np.random.default_rng(seed)
    sizes = {"b": batch, "past": past, "s": tokens}
    feeds = {}
    for value in m.graph.input:
        kind = value.type.tensor_type
        dims = [d.dim_value or sizes[d.dim_param] for d in kind.shape.dim]
        if value.name == "pos":
            feeds[value.name] = np.broadcast_to(past + np.arange(dims[1]), dims).astype(np.int64)
        elif kind.elem_type == TensorProto.INT32:
            feeds[value.name] = rng.integers(K, past, dims).astype(np.int32)
        else:
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            feeds[value.name] = rng.standard_normal(dims).astype(dtype)
    return feeds
