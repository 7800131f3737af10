"""KvCacheWrite in GE: the expansion of the plug-in, evaluated, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from sfa_onnx.ascend.checks import check
from sfa_onnx.ascend.checks.plugin import EXPANSIONS
from sfa_onnx.ascend.estimate import estimate
from sfa_onnx.operator import kv_cache
from tests.ge_graph import evaluate, expand
from tests.plugin_double import needs_compiler, plugin
from tests.test_flavour_cache_writes import writes

__all__ = ["plugin"]  # the fixture

pytestmark = needs_compiler
A2 = "Ascend910B2"


def write_node(inputs=("pages", "rows", "slot_mapping"), **attributes):
    return helper.make_node("KvCacheWrite", list(inputs), ["written"], "write", **attributes)


def test_the_pages_are_written_in_place_and_never_copied(plugin):
    graph, done = expand(plugin, write_node())
    assert done["node"]["attrs"] == {"original_type": "string:ai.onnx::18::KvCacheWrite"}
    assert done["node"]["dynamic"] == "in:args:3 out:output:1 "
    assert done["inputs"] == 3
    assert {n["type"] for n in graph.values()} - {"Data", "Const"} == set(
        EXPANSIONS["KvCacheWrite"]
    )
    write = dict(graph["write"]["in"])
    assert write == {"var": "flat", "indices": "indices", "updates": "input1"}
    assert dict(graph["flat"]["in"])["x"] == "input0"  # nothing between the input and the write
    assert dict(graph["written"]["in"]) == {"x": "write", "shape": "shape"}


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
def test_the_expansion_means_what_the_reference_does(plugin, dtype):
    rng = np.random.default_rng(5)
    pages = rng.integers(-99, 99, (3, 4, 1, 6)).astype(dtype)
    rows = rng.integers(-99, 99, (4, 1, 6)).astype(dtype)
    slots = np.array([11, 0, 5, 11], np.int32)
    expected = kv_cache.write_slots(pages.copy(), rows, slots)
    buffer = pages.copy()
    graph, _ = expand(plugin, write_node())
    made = evaluate(graph, {0: buffer, 1: rows, 2: slots}, "written")
    np.testing.assert_array_equal(made, expected)
    assert np.shares_memory(made, buffer)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (write_node(("pages", "rows")), "required input 2 (slot_mapping)"),
        (write_node(("pages", "", "slots")), "required input 1 (rows)"),
        (write_node(("a", "b", "c", "d")), "4 inputs, KvCacheWrite has 3"),
        (write_node(tile_size=128), "unknown attribute tile_size"),
        (write_node(rope_dtype="float16"), "unknown attribute rope_dtype"),
    ],
)
def test_refusals(plugin, capfd, node, reason):
    """And `check` foresees them."""
    assert expand(plugin, node)[1] is None
    assert reason in capfd.readouterr().err
    names = [n for n in node.input if n]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, None) for n in names]
    output = helper.make_tensor_value_info("written", TensorProto.FLOAT16, None)
    graph = helper.make_graph([node], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    assert check(model).code == "E19999"


def test_a_missing_prototype_is_named(plugin, capfd):
    plugin.missing("ScatterNdUpdate")
    try:
        assert expand(plugin, write_node())[1] is None
    finally:
        plugin.all_there()
    assert "KvCacheWrite needs GE operator ScatterNdUpdate" in capfd.readouterr().err


def test_check_names_the_engine_and_estimate_counts_no_copy():
    report = check(writes(atc=True), cann="9.2", soc_version=A2)
    row = next(r for r in report.support if r.op_type == "KvCacheWrite")
    assert row.ge_types == EXPANSIONS["KvCacheWrite"]
    assert row.engines == {"A2": "AI Core"}
    assert "scatternd-copies-cache" not in {f.rule for f in report.findings}
    assert estimate(writes(atc=True), soc_version=A2, layer=False).copies == []
