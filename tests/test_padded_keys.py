"""Padded selections in pages: hidden keys stay hidden, in ragged batches and in int8."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx import runtime
from sfa_onnx.errors import ModelError
from sfa_onnx.kv_convert import convert
from sfa_onnx.kv_convert.interface import adapt_feeds, read_interface
from sfa_onnx.runtime.portable.model import unfuse
from tests.index_models import DI, HI, Array, feeds_for, indexed
from tests.test_kv_convert import TILE, K, const, loss, vi

BLOCK = 8
HIDE = -1e30


def padded(tokens: int = 1, elem: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A decode layer as `fuse` leaves it where `kept` [b, total] says which keys are padding."""
    m = indexed(1, tokens=tokens, elem=elem)
    graph = m.graph
    at = next(i for i, n in enumerate(graph.node) if n.op_type == "NPULightningIndexer")
    node = graph.node[at]
    dtype = helper.tensor_dtype_to_np_dtype(elem)
    head, weight = np.zeros((1, 1, HI + 1, DI + 1), dtype), np.zeros((1, 1, HI + 1), np.float32)
    head[..., -1, -1], weight[..., -1] = 1, HIDE
    n, f32 = helper.make_node, TensorProto.FLOAT
    before = [
        n("Not", ["kept"], ["padding"]),
        n("Cast", ["padding"], ["hidden2"], to=elem),
        n("Unsqueeze", ["hidden2", "ax23"], ["hidden"]),
        n("Concat", ["l0.key_k", "hidden"], ["keyx"], axis=-1),
        n("Pad", ["l0.iq", "pad_q"], ["iq_wide"]),
        n("Add", ["iq_wide", "corner"], ["iqx"]),
        n("Cast", ["l0.iw"], ["iw32"], to=f32),
        n("Pad", ["iw32", "pad_w"], ["iw_wide"]),
        n("Add", ["iw_wide", "hide"], ["iwx"]),
    ]
    after = [
        n("Cast", ["scores"], ["scores32"], to=f32),
        n("Greater", ["scores32", "half"], ["visible"]),
        n("Where", ["visible", "raw", "none"], ["l0.idx"]),
    ]
    node.input[:3] = ["iqx", "keyx", "iwx"]
    node.output[:] = ["raw", "scores"]
    next(a for a in node.attribute if a.name == "return_values").i = 1
    nodes = [*graph.node[:at], *before, node, *after, *graph.node[at + 1 :]]
    del graph.node[:]
    graph.node.extend(nodes)
    arrays = {
        "corner": head, "hide": weight, "half": np.float32(HIDE / 2), "none": np.int32(-1),
    }  # fmt: skip
    graph.initializer.extend(numpy_helper.from_array(np.asarray(a), x) for x, a in arrays.items())
    graph.initializer.extend([const("ax23", [2, 3]), const("pad_q", [0] * 6 + [1, 1])])
    graph.initializer.append(const("pad_w", [0] * 5 + [1]))
    graph.input.append(vi("kept", ["b", "total"], TensorProto.BOOL))
    return m


def fed(source: onnx.ModelProto, batch: int, past: int, tokens: int) -> dict[str, Array]:
    plain = [v for v in source.graph.input if v.name != "kept"]
    bare = helper.make_model(helper.make_graph([], "g", plain, []))
    feeds = feeds_for(bare, batch, past, tokens)
    feeds["kept"] = np.random.default_rng(1).random((batch, past + tokens)) < 0.6
    feeds["kept"][:, -tokens:] = True
    feeds["kept"][0, K - 3 :] = False  # fewer keys than are selected
    return feeds


def alone(feeds: dict[str, Array], b: int, past: int, tokens: int) -> dict[str, Array]:
    own = {n: a[b : b + 1] for n, a in feeds.items()}
    own = {n: a[:, :past] if ".past_" in n else a for n, a in own.items()}
    return own | {"kept": own["kept"][:, : past + tokens]}


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("to", ["paged", "paged-int8"])
def test_padded_keys_lie_in_pages_and_stay_hidden(to: str, tokens: int) -> None:
    source = padded(tokens)
    report = convert(source, to=to, index_cache="float", block_size=BLOCK, tile_size=TILE)
    assert "l0.past_k_pages" in report.added_inputs
    interface = read_interface(report.model)
    assert interface is not None
    past = np.array([21, 9, 14])
    feeds = fed(source, 3, 21, tokens)
    mine = adapt_feeds(interface, feeds, new_tokens=tokens, start=past)
    mine["block_table"][1, 2:] = -5  # entries behind a sequence's last page hold anything
    for made in (report.model, unfuse(report.model)):
        got = runtime.run(made, mine)
        for b in range(3):
            want = runtime.run(source, alone(feeds, b, int(past[b]), tokens))
            np.testing.assert_array_equal(got["l0.idx"][b], want["l0.idx"][0])
            assert loss(got["l0.o"][b], want["l0.o"][0]) < (2e-2 if "int8" in to else 1e-5)
        assert (got["l0.idx"][0] == -1).any()


@pytest.mark.parametrize("elem", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_padded_keys_become_int8(elem: int) -> None:
    source = padded(1, elem)
    report = convert(source, to="paged-int8", index_cache="int8", block_size=BLOCK, tile_size=TILE)
    assert "NPUQuantLightningIndexer" in {n.op_type for n in report.model.graph.node}
    interface = read_interface(report.model)
    assert interface is not None
    past = np.array([21, 9, 14])
    feeds = fed(source, 3, 21, 1)
    feeds["l0.past_k"][1, 3:5] = 0  # a scale of 0 hides nothing
    mine = adapt_feeds(interface, feeds, new_tokens=1, start=past)
    for made in (report.model, unfuse(report.model)):
        got = runtime.run(made, mine)["l0.idx"]
        for b in range(3):
            own = alone(feeds, b, int(past[b]), 1)
            want = runtime.run(source, own)["l0.idx"][0]
            chosen, best = got[b][got[b] >= 0], want[want >= 0]
            assert len(chosen) == len(best) == min(K, int(own["kept"].sum()))
            assert own["kept"][0, chosen].all()
            assert np.isin(chosen, best).mean() > 0.7, "int8 flips a few keys near the threshold"


def test_padded_scores_that_are_read_forbid_int8() -> None:
    source = padded()
    source.graph.output.append(vi("scores", ["b", 1, 1, K]))
    with pytest.raises(ModelError, match="the quantised indexer gives no scores"):
        convert(source, to="paged-int8", index_cache="int8", tile_size=TILE)


def test_a_column_that_is_no_mask_is_no_padding() -> None:
    source = padded()
    at = next(i for i, node in enumerate(source.graph.node) if node.output[0] == "hidden2")
    source.graph.node[at].output[0] = "flag"
    source.graph.node.insert(at + 1, helper.make_node("Add", ["flag", "flag"], ["hidden2"]))
    with pytest.raises(ModelError, match="gives no scores"):
        convert(source, to="paged-int8", index_cache="int8", tile_size=TILE)
    report = convert(source, to="paged-int8", tile_size=TILE)
    assert "l0.past_k" not in report.removed_inputs
    assert any("index keys stay as they are" in note for note in report.notes)
