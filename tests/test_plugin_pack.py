"""KvCachePack in GE: the expansion of the plug-in, evaluated, against the reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from sfa_onnx.ascend.checks import check
from sfa_onnx.ascend.checks.plugin import EXPANSIONS
from sfa_onnx.ascend.flavour import model as flavour
from sfa_onnx.operator import kv_cache, op
from tests.ge_graph import evaluate, expand
from tests.plugin_double import needs_compiler, plugin
from tests.test_flavour import fused

__all__ = ["plugin"]  # the fixture

pytestmark = needs_compiler


def pack_node(rope="bfloat16", inputs=("nope", "rope"), tile=128):
    node = helper.make_node("KvCachePack", list(inputs), ["packed"], "pack", tile_size=tile)
    node.attribute.append(helper.make_attribute("rope_dtype", rope))
    return node


@pytest.mark.parametrize("rope", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "inputs", [("nope", "rope"), ("nope", "rope", "", "clip"), ("n", "r", "s")]
)
def test_kv_cache_pack_expands_to_rows(plugin, rope, inputs):
    graph, done = expand(plugin, pack_node(rope, inputs))
    assert done["node"]["attrs"]["original_type"] == "string:ai.onnx::18::KvCachePack"
    assert done["node"]["dynamic"] == f"in:args:{len(inputs)} out:output:1 "
    parts = dict(graph["packed"]["in"])
    first = "input0" if len(inputs) == 3 else "nope_rows"
    assert list(parts.values()) == [first, "rope_rows", "scale_rows"]
    assert graph["packed"]["attrs"]["concat_dim"] == "int:-1"
    bits = dict(graph["rope_bits" if rope == "bfloat16" else "rope_rows_bits"]["in"])["x"]
    assert bits == ("rope_float" if rope == "bfloat16" else "input1")
    data = sorted(n["attrs"]["index"] for n in graph.values() if n["type"] == "Data")
    assert data == [f"int:{i}" for i, name in enumerate(inputs) if name]
    assert done["inputs"] == len(data)
    assert ("Maximum" in {n["type"] for n in graph.values()}) == ("clip" in inputs)


def test_check_knows_what_a_pack_expands_to(plugin):
    """`check` reports the engines of exactly these operators."""
    made = set()
    for rope in ("bfloat16", "float16"):
        for inputs in (("n", "r"), ("n", "r", "", "c"), ("n", "r", "s")):
            graph, _ = expand(plugin, pack_node(rope, inputs))
            made |= {n["type"] for n in graph.values()}
    assert made - {"Data", "Const"} == set(EXPANSIONS["KvCachePack"])


@pytest.mark.parametrize("rope", ["bfloat16", "float16"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_expansion_means_what_the_reference_does(plugin, rope, clip):
    rng = np.random.default_rng(3)
    nope = rng.standard_normal((2, 3, 512)).astype(np.float32)
    nope[0, 1, 128:256] = 0  # an all-zero tile
    kind = ml_dtypes.bfloat16 if rope == "bfloat16" else np.float16
    lanes = rng.standard_normal((2, 3, 64)).astype(kind)
    names = ("nope", "rope", "", "clip") if clip else ("nope", "rope")
    graph, _ = expand(plugin, pack_node(rope, names))
    feeds = {0: nope, 1: lanes} | ({3: np.float32(clip)} if clip else {})
    rows = evaluate(graph, feeds, "packed")
    np.testing.assert_array_equal(rows, kv_cache.pack(nope, lanes, clip=clip))
    q, scale = kv_cache.quantise(nope)
    graph, _ = expand(plugin, pack_node(rope, ("nope", "rope", "scale")))
    rows = evaluate(graph, {0: q, 1: lanes, 2: scale}, "packed")
    np.testing.assert_array_equal(rows, kv_cache.pack(q, lanes, scale))


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (pack_node(inputs=("n", "r", "s", "c")), "has scale (int8 rows are copied) and clip"),
        (pack_node(inputs=("n",)), "without rope"),
        (pack_node(rope="float32"), "rope_dtype float32"),
        (pack_node(tile=0), "tile_size 0"),
        (helper.make_node("KvCachePack", ["n", "r"], ["y"], "pack"), "attribute tile_size"),
    ],
)
def test_kv_cache_pack_refusals(plugin, capfd, node, reason):
    """And `check` foresees them."""
    assert expand(plugin, node)[1] is None
    assert reason in capfd.readouterr().err
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [1, 512]) for n in node.input]
    output = helper.make_tensor_value_info(node.output[0], TensorProto.INT8, None)
    graph = helper.make_graph([node], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    assert check(model).code == "E19999"


def test_a_missing_prototype_is_named(plugin, capfd):
    plugin.missing("Bitcast")
    try:
        assert expand(plugin, pack_node())[1] is None
    finally:
        plugin.all_there()
    assert "needs GE operator Bitcast" in capfd.readouterr().err


def test_flavour_names_the_rope_type_for_the_plug_in():
    for kind, name in ((TensorProto.BFLOAT16, "bfloat16"), (TensorProto.FLOAT16, "float16")):
        node = flavour.to_atc(fused(op.KV_CACHE_PACK, qtype=kind)).graph.node[0]
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert given == {"tile_size": 128, "rope_dtype": name.encode()}
