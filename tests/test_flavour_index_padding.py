"""Zero heads for CANN's indexer kernel: the same selection."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from sfa_onnx import runtime
from sfa_onnx.ascend.checks import check
from sfa_onnx.ascend.flavour.model import convert as to_atc
from sfa_onnx.ascend.flavour.model import from_atc
from sfa_onnx.kv_convert import convert
from sfa_onnx.kv_convert.interface import adapt_feeds, read_interface
from sfa_onnx.passes.graph.cache_pairs import cache_pairs
from sfa_onnx.runtime.portable.model import unfuse
from tests.index_models import feeds_for, indexed
from tests.test_kv_convert import TILE


def paged(index_cache: str, heads: int, tokens: int = 1) -> onnx.ModelProto:
    source = indexed(1, elem=TensorProto.FLOAT16, heads=heads, tokens=tokens)
    return convert(
        source, to="paged-int8", block_size=16, tile_size=TILE, index_cache=index_cache
    ).model


@pytest.mark.parametrize("index_cache", ["float", "int8"])
@pytest.mark.parametrize(("heads", "tokens"), [(4, 1), (63, 3), (64, 1)])
def test_the_selection_is_the_same(index_cache: str, heads: int, tokens: int) -> None:
    model = paged(index_cache, heads, tokens)
    interface = read_interface(model)
    assert interface is not None
    made = to_atc(model)
    pads = [n for n in made.model.graph.node if n.op_type == "Pad"]
    per_head = 3 if index_cache == "int8" else 2
    assert len(pads) == (0 if heads == 64 else per_head)
    assert any("padded with zeros" in note for note in made.notes) == (heads < 64)
    source = indexed(1, elem=TensorProto.FLOAT16, heads=heads, tokens=tokens)
    feeds = feeds_for(source, 2, 21, tokens)
    mine = adapt_feeds(interface, feeds, new_tokens=tokens, start=np.array([20, 9]))
    want = runtime.run(model, mine)
    for other in (made.model, from_atc(made.model), unfuse(model)):
        got = runtime.run(other, mine)
        np.testing.assert_array_equal(got["l0.idx"], want["l0.idx"])
        np.testing.assert_array_equal(got["l0.k_pages"], want["l0.k_pages"])
    assert len(cache_pairs(made.model)) == (3 if index_cache == "int8" else 2)


def test_check_asks_for_heads_no_more() -> None:
    model = paged("float", 4)
    before, after = (
        [f.rule for f in check(m).findings if "index heads" in f.message]
        for m in (model, to_atc(model).model)
    )
    assert before == ["heads"]
    assert after == []


@pytest.mark.parametrize("elem", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_contiguous_keys_get_zero_columns_too(elem: int) -> None:
    source = indexed(1, elem=elem, tokens=3)
    made = to_atc(source).model
    node = next(n for n in made.graph.node if n.op_type == "NPULightningIndexer")
    padded = {n.output[0] for n in made.graph.node if n.op_type == "Pad"}
    assert set(node.input[:3]) == padded
    feeds = feeds_for(source, 3, 21, 3)
    got, want = (runtime.run(m, feeds)["l0.idx"] for m in (made, source))
    np.testing.assert_array_equal(got, want)
    assert not [
        f
        for f in check(made).findings
        if f.rule in ("heads", "row-size") and "Lightning" in f.message
    ]


def test_pages_get_none_and_check_says_so() -> None:
    made = to_atc(paged("float", 64)).model
    assert not [n for n in made.graph.node if n.op_type == "Pad"]
    assert [
        f.rule for f in check(made).findings if "key rows" in f.message and "Indexer" in f.message
    ]
