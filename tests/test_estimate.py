"""The model of speed reproduces the published table it was built from, and says what it is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sfa_onnx.ascend.chips import chip_of
from sfa_onnx.ascend.estimate import LABEL, estimate
from sfa_onnx.errors import UsageError
from sfa_onnx.report import to_json
from tests.test_flavour import build

BF16, INT8, INT32, F = (
    TensorProto.BFLOAT16,
    TensorProto.INT8,
    TensorProto.INT32,
    TensorProto.FLOAT,
)
ATTRS = {
    "scale_value": 0.1,
    "sparse_block_size": 1,
    "key_quant_mode": 2,
    "value_quant_mode": 2,
    "layout_query": "BSND",
    "layout_kv": "BSND",
    "sparse_mode": 3,
    "attention_mode": 2,
    "quant_scale_repo_mode": 1,
    "tile_size": 128,
    "rope_head_dim": 64,
}


def info(name: str, elem: int, dims) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem, dims)


def fused(heads: int, *, int8: bool, tokens=24, keys: int = 4096) -> onnx.ModelProto:
    if int8:
        inputs = [
            info("q", BF16, (1, tokens, heads, 576)),
            info("kv", INT8, (1, keys, 1, 656)),
        ]
        op, names, attrs = "NPUSparseFlashAttentionAntiquant", ["q", "kv", "kv", "i"], ATTRS
    else:
        inputs = [info("q", BF16, (1, tokens, heads, 512)), info("kv", BF16, (1, keys, 1, 512))]
        inputs += [info("qr", BF16, (1, tokens, heads, 64)), info("kr", BF16, (1, keys, 1, 64))]
        op, names = "NPUSparseFlashAttention", ["q", "kv", "kv", "i", "", "", "", "qr", "kr"]
        keep = ("scale_value", "sparse_block_size", "layout_query", "layout_kv", "sparse_mode")
        attrs = {k: ATTRS[k] for k in keep} | {"attention_mode": 2}
    inputs.append(info("i", INT32, (1, tokens, 1, 2048)))
    node = helper.make_node(op, names, ["o"], name="sfa", domain="npu", **attrs)
    out = [info("o", BF16, (1, tokens, heads, 512))]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("npu", 1)]
    return helper.make_model(helper.make_graph([node], "g", inputs, out), opset_imports=opsets)


# Published roofline for 2048 keys: heads, int8?, gather, vector, cube, copy out, bound (us).
TABLE = [
    (16, False, 35.0, 1.8, 4.7, 3.7, 35.0),
    (16, True, 19.9, 21.7, 4.7, 3.7, 21.7),
    (64, True, 19.9, 27.1, 18.8, 15.0, 27.1),
    (128, False, 35.0, 14.3, 37.6, 30.0, 37.6),
    (128, True, 19.9, 34.3, 37.6, 30.0, 37.6),
]


@pytest.mark.parametrize(("heads", "int8", "gather", "vector", "cube", "out", "bound"), TABLE)
def test_reproduces_the_published_table(heads, int8, gather, vector, cube, out, bound) -> None:
    site = estimate(fused(heads, int8=int8), soc_version="Ascend910_9391").sites[0]
    got = [site.stages[n] for n in ("gather", "vector", "cube", "copy out")]
    assert got == pytest.approx([gather, vector, cube, out], abs=0.1)
    assert site.us_per_token == pytest.approx(bound, abs=0.15)


def test_int8_moves_fewer_bytes() -> None:
    packed, plain = (estimate(fused(16, int8=b)).sites[0] for b in (True, False))
    assert plain.bytes_per_token / packed.bytes_per_token == pytest.approx(1152 / 656, rel=0.02)
    assert plain.flops_per_token == packed.flops_per_token == 2 * 16 * 2048 * 1088


def test_tokens_fill_the_cores_in_rounds() -> None:
    one, full, more = (
        estimate(fused(16, int8=True, tokens=t), soc_version="Ascend910B2").sites[0]
        for t in (1, 24, 25)
    )
    assert one.us == full.us
    assert more.us == 2 * full.us
    assert "1 of 24 cores" in one.note


def test_a_smaller_chip_is_slower() -> None:
    model = fused(128, int8=True, tokens=240)
    big, small = (estimate(model, soc_version=s).us for s in ("Ascend910B1", "Ascend910B4-1"))
    assert small > big


def test_open_dims_give_no_total_until_bound() -> None:
    model = fused(16, int8=True, tokens="S")
    result = estimate(model)
    assert result.us is None
    assert any("open dims" in n for n in result.notes)
    assert estimate(model, dims={"S": 24}).us == estimate(fused(16, int8=True)).us


def test_keys_are_at_most_those_there_are() -> None:
    assert estimate(fused(16, int8=True, keys=512)).sites[0].keys == 512


def test_whole_cache_copies_are_counted() -> None:
    nodes = [helper.make_node("ScatterND", ["cache", "slot", "new"], ["cache_out"], name="w")]
    dims = (64, 128, 1, 656)
    inputs = [
        info("cache", INT8, dims),
        info("slot", TensorProto.INT64, (2, 2)),
        info("new", INT8, (2, 1, 656)),
    ]
    graph = helper.make_graph(nodes, "g", inputs, [info("cache_out", INT8, dims)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    result = estimate(model, soc_version="Ascend910_9391")
    assert [(c.input, c.output, c.bytes) for c in result.copies] == [
        ("cache", "cache_out", 2 * 64 * 128 * 656)
    ]
    assert result.copies[0].us == pytest.approx(2 * 64 * 128 * 656 / 1.6e12 * 1e6)
    assert any("copied whole" in n for n in result.notes)


def test_the_indexer_reads_all_keys() -> None:
    inputs = [
        info("q", BF16, (1, 8, 64, 128)),
        info("k", BF16, (1, 65536, 1, 128)),
        info("w", BF16, (1, 8, 64)),
    ]
    node = helper.make_node("NPULightningIndexer", ["q", "k", "w"], ["i"], name="li", domain="npu")
    graph = helper.make_graph([node], "g", inputs, [info("i", INT32, (1, 8, 1, 2048))])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("npu", 1)]
    site = estimate(helper.make_model(graph, opset_imports=opsets)).sites[0]
    assert (site.keys, site.heads, site.tokens) == (65536, 64, 8)
    assert site.flops_per_token == 2 * 64 * 65536 * 128
    assert site.bytes_per_token == 65536 * 256


def test_it_says_what_it_is() -> None:
    data = to_json(estimate(fused(16, int8=True)))
    assert data["label"] == LABEL
    assert "not a measurement" in LABEL


def test_chip_figures() -> None:
    chip = chip_of("Ascend910B2")
    assert chip is not None
    assert chip.flops == pytest.approx(363.7e12, rel=1e-3)
    assert chip.ridge == pytest.approx(222, rel=0.05)
    assert chip_of("Ascend950PR_9589") is None


@pytest.mark.parametrize("soc", ["Ascend310P3", "A3"])
def test_unknown_chips_are_refused(soc: str) -> None:
    with pytest.raises(UsageError, match="npu-smi"):
        estimate(fused(16, int8=True), soc_version=soc)


def test_chips_without_public_figures_are_refused() -> None:
    with pytest.raises(UsageError, match="no public figures"):
        estimate(fused(16, int8=True), soc_version="Ascend950PR_9589")


# ---- the whole layer -----------------------------------------------------------------------------


def layer() -> onnx.ModelProto:
    """A norm, a page and slot of selected tokens, a cache write: what sits around attention."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["sq"], "sq"),
        helper.make_node("ReduceMean", ["sq", "axes"], ["m"], "mean"),
        helper.make_node("Add", ["m", "eps"], ["inside"], "plus"),
        helper.make_node("Sqrt", ["inside"], ["root"], "root"),
        helper.make_node("Div", ["x", "root"], ["unit"], "unit"),
        helper.make_node("Mul", ["unit", "g"], ["normed"], "scale"),
        helper.make_node("TopK", ["normed", "k"], ["v", "i"], "top", sorted=0),
        helper.make_node("Div", ["i", "page"], ["pages"], "page_of"),
        helper.make_node("ScatterND", ["cache", "slots", "normed"], ["written"], "write"),
    ]
    inits = [
        ("axes", np.array([-1])), ("eps", np.float32(1e-6)), ("g", np.ones(64, np.float32)),
        ("k", np.array([8])), ("page", np.array(16)),
    ]  # fmt: skip
    inputs = [("x", 1, [2, 64]), ("cache", 1, [128, 64]), ("slots", 7, [2, 1])]
    outputs = [("pages", 7, None), ("written", 1, [128, 64])]
    return build(nodes, inputs, outputs, inits=inits)


def test_a_layer_is_counted_before_and_after_on_every_line() -> None:
    found = estimate(layer(), soc_version="Ascend910B2").layers
    assert [line.cann for line in found] == ["8.5", "9.0", "9.1", "9.2"]
    for line in found:
        assert line.after is not None
        assert line.before.on_ai_cpu.keys() >= {"Div", "TopK"}
        assert not {"Div", "TopK"} & line.after.on_ai_cpu.keys()
        assert ("ScatterND" in line.after.on_ai_cpu) == (line.cann == "8.5")
        assert line.before.nodes == 9
        assert sum(line.after.engines.values()) == line.after.nodes
        size = 2 * 128 * 64 * 4
        assert (line.before.copies, line.before.copied_bytes) == (1, size)
        assert (line.after.copies, line.after.copied_bytes) == (1, size)


def test_a_line_without_a_form_says_why() -> None:
    nodes = [helper.make_node("Mish", ["x"], ["t"]), helper.make_node("ReduceProd", ["t"], ["y"])]
    model = build(nodes, [("x", 1, [100, 2])], [("y", 1, None)])
    old, *_, new = estimate(model, soc_version="Ascend910B2").layers
    assert old.after is None
    assert "ReduceProd" in old.note
    assert new.after is not None
    assert not estimate(model, layer=False).layers
