"""Zero heads for CANN's indexer kernel: the same selection."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx import runtime
from sfa_onnx.ascend.checks import check
from sfa_onnx.ascend.flavour.model import convert as to_atc
from sfa_onnx.ascend.flavour.model import from_atc
from sfa_onnx.kv_convert import convert
from sfa_onnx.kv_convert.interface import adapt_feeds, read_interface
from sfa_onnx.operator import op
from sfa_onnx.passes.graph.cache_pairs import cache_pairs
from sfa_onnx.runtime.portable.model import unfuse
from tests.index_models import feeds_for, indexed
from tests.test_flavour import fused
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
    back = from_atc(made.model)
    assert not [n for n in back.graph.node if n.op_type == "Pad"]
    assert to_atc(back).model.graph.node == made.model.graph.node
    assert any("padded with zeros" in note for note in made.notes) == (heads < 64)
    source = indexed(1, elem=TensorProto.FLOAT16, heads=heads, tokens=tokens)
    feeds = feeds_for(source, 2, 21, tokens)
    mine = adapt_feeds(interface, feeds, new_tokens=tokens, start=np.array([20, 9]))
    want = runtime.run(model, mine)
    for other in (made.model, back, unfuse(model)):
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


INDEXERS = [op.LIGHTNING_INDEXER, op.QUANT_LIGHTNING_INDEXER]


def sized(contract: op.OpContract, heads: int | None, width: int | None) -> onnx.ModelProto:
    """One indexer over contiguous keys; None: a size that the model does not say."""
    model = fused(contract)
    sizes = {64: heads, 128: width}
    for value in model.graph.input:
        if value.name in ("query", "weights", "query_dequant_scale", "key"):
            first = len(value.type.tensor_type.shape.dim) - (2 if value.name == "query" else 1)
            for dim in value.type.tensor_type.shape.dim[first:]:
                size = sizes[dim.dim_value]
                dim.dim_param = "unknown"
                if size is not None:
                    dim.dim_value = size
    return model


@pytest.mark.parametrize("contract", INDEXERS, ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("heads", "width"), [(64, 128), (None, None), (64, None), (None, 128), (65, 129)]
)
def test_what_fits_and_what_is_unknown_gets_none(
    contract: op.OpContract, heads: int | None, width: int | None
) -> None:
    made = to_atc(sized(contract, heads, width))
    assert [n.op_type for n in made.model.graph.node] == [contract.name]
    assert not made.notes
    blind = sized(contract, 4, 16)
    for value in blind.graph.input:
        value.type.tensor_type.ClearField("shape")
    assert [n.op_type for n in to_atc(blind).model.graph.node] == [contract.name]


@pytest.mark.parametrize("contract", INDEXERS, ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("heads", "width", "padded"),
    [(4, 128, "qws"), (4, None, "qws"), (64, 16, "qk"), (None, 16, "qk"), (63, 127, "qkws")],
)
def test_the_way_back_takes_the_zeros_off(
    contract: op.OpContract, heads: int | None, width: int | None, padded: str
) -> None:
    model = sized(contract, heads, width)
    made = to_atc(model).model
    names = {"q": "query", "k": "key", "w": "weights", "s": "query_dequant_scale"}
    wanted = {names[c] for c in padded} & {t.name for t in contract.inputs}
    assert {n.input[0] for n in made.graph.node if n.op_type == "Pad"} == wanted
    assert from_atc(made) == model


@pytest.mark.parametrize(
    "case", ["other counts", "crop", "read elsewhere", "read below", "one missing"]
)
def test_zeros_that_are_not_ours_stay(case: str) -> None:
    made = to_atc(sized(op.LIGHTNING_INDEXER, 4, 16)).model
    pads = {n.input[0]: n for n in made.graph.node if n.op_type == "Pad"}
    counts = {t.name: t for t in made.graph.initializer}
    if case == "other counts":
        counts[pads["weights"].input[1]].CopyFrom(
            numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 61]), pads["weights"].input[1])
        )
    elif case == "crop":
        for name, ends in (("query", [0, 0, -1, 0]), ("weights", [0, 0, -1]), ("key", [0] * 4)):
            counts[pads[name].input[1]].CopyFrom(
                numpy_helper.from_array(np.array([0] * len(ends) + ends), pads[name].input[1])
            )
    elif case == "read elsewhere":
        made.graph.node.add(op_type="Neg", name="n", input=pads["key"].output, output=["more"])
    elif case == "read below":
        below = helper.make_node("Identity", [pads["key"].output[0]], ["b"])
        result = helper.make_tensor_value_info("b", TensorProto.BFLOAT16, None)
        made.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
        body = helper.make_graph([below], "body", [], [result])
        made.graph.node.append(
            helper.make_node("If", ["c"], ["more"], then_branch=body, else_branch=body)
        )
    else:
        made.graph.node[-1].input[2] = "weights"
        made.graph.node.remove(pads["weights"])
    left = [n.op_type for n in from_atc(made).graph.node]
    assert left == [n.op_type for n in made.graph.node]
    assert left.count("Pad") == (2 if case == "one missing" else 3)
