"""The C++ parser plug-in, driven the way CANN's parser drives it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest

from sfa_onnx.ascend.checks import check
from sfa_onnx.ascend.flavour import model as flavour
from sfa_onnx.ascend.handover import package_tables
from sfa_onnx.operator import op
from tests.plugin_double import (
    ROOT,
    as_hex,
    atc_node,
    bound_node,
    given,
    key,
    needs_compiler,
    parser_text,
    plugin,
    typed,
)
from tests.test_flavour import fused, ours

__all__ = ["plugin"]  # the fixture
DATA = Path(__file__).parent / "data" / "atc"
# Cases our plug-in must refuse although the parser (or its demo plug-in) let them pass.
REFUSED = {
    "252-kvquant-ten-inputs",
    "253-kvquant-missing-required",
    "255-kvquant-no-scale",
    "256-kvquant-no-quant-mode",
    "257-kvquant-unknown-attr",
    "258-kvquant-wrong-type",
    "269-antiquant-defaults-only",
}

pytestmark = needs_compiler


# ---- tables ------------------------------------------------------------------------------------


def test_generated_tables_are_up_to_date():
    hint = "run: python -m sfa_onnx.ascend.handover.package_tables"
    assert (ROOT / package_tables.CPP_TABLE).read_text() == package_tables.cpp_table(), hint
    assert (ROOT / package_tables.PYTHON_TABLE).read_text() == package_tables.python_table(), hint


def test_keys_name_every_operator_at_every_opset(plugin):
    keys = plugin.keys()
    expected = {b.atc_type: b.ge_type for b in op.BINDINGS}
    expected |= {o.name: "PartitionedCall" for o in op.EXPANDED}
    wanted = {}
    for onnx_type, ge_type in expected.items():
        own = "sfa_onnx" if onnx_type.startswith("KvCache") else "npu"
        wanted[f"{own}::1::{onnx_type}"] = ge_type
        wanted |= {key(onnx_type, v): ge_type for v in range(11, 19)}
    assert keys == wanted


def test_no_string_of_either_abi_and_no_protobuf_crosses_the_border(plugin):
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", plugin._library._name], capture_output=True, text=True
    ).stdout
    border = [line for line in symbols.splitlines() if "ge::" in line or "domi::" in line]
    assert len(border) > 20
    assert not [line for line in border if "basic_string" in line or "cxx11" in line]
    assert "protobuf" not in symbols


# ---- one node in, one GE operator out ----------------------------------------------------------


@pytest.mark.parametrize("binding", op.BINDINGS, ids=lambda b: b.name)
@pytest.mark.parametrize("opset", [11, 18])
def test_every_attribute_is_set_explicitly_with_ges_type(plugin, binding, opset):
    node = bound_node(binding)
    done = plugin.parse(key(node.op_type, opset), parser_text(node), node.input)
    given = {a.name: a for a in node.attribute}
    expected = {a.name: typed(given[a.name], a) for a in binding.contract.attributes}
    assert {k: as_hex(v) for k, v in done["node"]["attrs"].items()} == expected


def test_zeros_and_empty_strings_are_written(plugin):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, scale_value=0.0, layout_kv="",
                    sparse_mode=0, attention_mode=0)  # fmt: skip
    text = parser_text(node)
    entry = next(e for e in json.loads(text)["attribute"] if e["name"] == "layout_kv")
    assert entry == {"name": "layout_kv", "type": 3}
    attrs = plugin.parse(key(node.op_type), text, node.input)["node"]["attrs"]
    assert as_hex(attrs["scale_value"]) == f"float:{(0.0).hex()}"
    assert (attrs["layout_kv"], attrs["sparse_mode"]) == ("string:", "int:0")
    assert attrs["attention_mode"] == "int:0"


@pytest.mark.parametrize(
    "scale",
    [0.1352337747812271, 1 / 3, 0.0041666669, 1e-30, 1.4e-45, 16777216.0, -0.04419417, 576**-0.5],
)
def test_the_scale_is_exact_to_the_last_bit(plugin, scale):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, scale_value=scale)
    attrs = plugin.parse(key(node.op_type), parser_text(node), node.input)["node"]["attrs"]
    assert as_hex(attrs["scale_value"]) == f"float:{float(np.float32(scale)).hex()}"


def test_without_the_companion_the_six_digits_are_used(plugin):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, scale_value=0.1352337747812271)
    node.attribute.remove(next(a for a in node.attribute if a.name == "scale_value_exact"))
    attrs = plugin.parse(key(node.op_type), parser_text(node), node.input)["node"]["attrs"]
    assert as_hex(attrs["scale_value"]) == f"float:{float(np.float32('0.135234')).hex()}"


@pytest.mark.parametrize("cann", ["8.5", "9.1", "9.2"])
def test_check_foresees_outputs_switches_and_repetitions(cann):
    def verdict(contract, change):
        model = flavour.to_atc(fused(contract, ours(contract)))
        change(model.graph.node[0])
        found = check(model, cann=cann)
        return found.parser, found.code

    for contract in (op.SPARSE_FLASH_ATTENTION_ANTIQUANT, op.QUANT_LIGHTNING_INDEXER):
        assert verdict(contract, lambda n: n.output.append("more")) == ("rejected", "E19999")
        assert verdict(contract, lambda n: n.attribute.append(n.attribute[0]))[0] == "rejected"
    three = verdict(op.SPARSE_FLASH_ATTENTION, lambda n: n.output.extend(["max", "sum"]))
    assert three == ("accepted", "")
    assert verdict(op.LIGHTNING_INDEXER, given(("return_values", 2)))[0] == "rejected"


def test_outputs_beyond_the_operator_are_refused(plugin, capfd):
    """Up to 9.1 the parser takes them, and drops whoever reads them without a word."""
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    call = key(node.op_type), parser_text(node), node.input
    assert plugin.parse(*call, outputs=["out", ""])
    assert plugin.parse(*call, outputs=["out", "lse"]) is None
    assert "2 outputs, NPUKvQuantSparseFlashAttention has 1" in capfd.readouterr().err
    node = atc_node(op.LIGHTNING_INDEXER)
    call = key(node.op_type), parser_text(node), node.input
    assert plugin.parse(*call, outputs=["", "values"])
    assert plugin.parse(*call, outputs=["indices", "values", "more"]) is None
    node = atc_node(op.SPARSE_FLASH_ATTENTION)
    call = key(node.op_type), parser_text(node), node.input
    assert plugin.parse(*call, outputs=["out", "max", "sum"])


def test_a_switch_of_ge_is_zero_or_one(plugin, capfd):
    node = atc_node(op.LIGHTNING_INDEXER, return_values=2)
    assert plugin.parse(key(node.op_type), parser_text(node), node.input) is None
    assert "attribute return_values is 2, expected 0 or 1" in capfd.readouterr().err


def test_trailing_inputs_may_be_left_out(plugin):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    assert plugin.parse(key(node.op_type), parser_text(node), list(node.input)[:4])


def _without(name):
    def change(node):
        node.attribute.remove(next(a for a in node.attribute if a.name == name))

    return change


def _inputs(change):
    return lambda node: change(node.input)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *((_without(a.name), f"attribute {a.name} of NPUKvQuantSparseFlashAttention is missing")
          for a in op.KV_QUANT_SPARSE_FLASH_ATTENTION.attributes),
        (given(("foo", 3)), "unknown attribute foo"),
        (given(("scale_value", 1)), "attribute scale_value is INT, expected FLOAT"),
        (given(("sparse_mode", 3.0)), "attribute sparse_mode is FLOAT, expected INT"),
        (given(("layout_kv", 1)), "attribute layout_kv is INT, expected STRING"),
        (given(("tile_size", [128])), "attribute tile_size is INTS, expected INT"),
        (given(("scale_value_exact", 0.5)), "scale_value_exact is FLOAT of 0 elements"),
        (given(("scale_value_exact", [0.5, 0.5])), "FLOATS of 2 elements, expected FLOATS of one"),
        (given(("scale_value_exact", [0.5])), "but scale_value_exact says 0.5"),
        (given(("scale_value_exact", [np.nan])), "but scale_value_exact says nan"),
        *((given(("scale_value", v), ("scale_value_exact", [v])), f"scale_value is {v}, expected a"
           " finite number") for v in (np.nan, np.inf, -np.inf)),
        (_inputs(lambda i: i.append("ten")), "10 inputs, NPUKvQuantSparseFlashAttention has 9"),
        (_inputs(lambda i: i.__setitem__(3, "")), r"required input 3 (sparse_indices)"),
        (_inputs(lambda i: i.__delitem__(slice(2, None))), "required input 2 (value)"),
        (_inputs(lambda i: i.__delitem__(slice(None))), "required input 0 (query)"),
    ],
)  # fmt: skip
def test_bad_nodes_fail_with_one_clear_line(plugin, capfd, change, reason):
    """And `check` knows that they do."""
    model = flavour.to_atc(fused(op.SPARSE_FLASH_ATTENTION_ANTIQUANT))
    node = model.graph.node[0]
    assert check(model, cann="8.5").parser == "accepted"
    change(node)
    foreseen = check(model, cann="8.5")
    assert (foreseen.parser, foreseen.code) == ("rejected", "E19999")
    assert plugin.parse(key(node.op_type), parser_text(node), node.input) is None
    err = capfd.readouterr().err
    assert err.startswith("[sfa_onnx plug-in] node sfa_0: ")
    assert reason in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ['{"attribute": [', "[]", '{"attribute": 3}', '{"attribute": [{"i": "x"}]}', "", "{} x"]
)
def test_broken_attribute_text_fails(plugin, capfd, text):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    assert plugin.parse(key(node.op_type), text, node.input) is None
    assert "attributes are not readable" in capfd.readouterr().err or text == ""


def test_no_attributes_at_all_and_an_attribute_twice(plugin, capfd):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    assert plugin.parse(key(node.op_type), None, node.input) is None
    assert "attribute scale_value" in capfd.readouterr().err
    node.attribute.append(node.attribute[0])
    assert plugin.parse(key(node.op_type), parser_text(node), node.input) is None
    assert "given twice" in capfd.readouterr().err


def test_the_experimental_namesake_is_recognised(plugin, capfd):
    node = atc_node(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, "recipes")
    text = parser_text(node)
    assert plugin.parse(key(node.op_type), text, node.input)
    assert plugin.parse(key(node.op_type), text, node.input, preset="sparse_shard_size") is None
    assert "experimental namesake" in capfd.readouterr().err


# ---- recorded texts of the real parser --------------------------------------------------------


def recorded(group):
    for case in json.loads((DATA / "cases.json").read_text())["cases"]:
        if case["group"] != group:
            continue
        model = onnx.load(DATA / "cases" / f"{case['id']}.onnx", load_external_data=False)
        want = "AttrEcho" if group == "attributes" else "SparseFlashAttention"
        node = next((n for n in model.graph.node if want in n.op_type), None)
        if node is not None and ("graph" in case or case["id"] in REFUSED):
            opset = next(i.version for i in model.opset_import if i.domain in ("", "ai.onnx"))
            nodes = case.get("graph", {}).get("nodes", [])
            graph = next((g for g in nodes if want in g["type"]), None)
            yield pytest.param(case["id"], opset, node, graph, id=case["id"])


@pytest.mark.parametrize(("case", "opset", "node", "graph"), list(recorded("fused")))
def test_recorded_fused_cases(plugin, case, opset, node, graph):
    """Same attributes as the recorded graph; the scale bit-exact when its companion is there."""
    origin = f"{node.domain or 'ai.onnx'}::{1 if node.domain else opset}::{node.op_type}"
    done = plugin.parse(origin, parser_text(node), node.input)
    if case in REFUSED:
        assert done is None
        return
    assert done["node"]["type"] == graph["type"]
    got = {k: v.partition(":")[2] for k, v in done["node"]["attrs"].items()}
    assert got.keys() == graph["attrs"].keys()
    for name, value in graph["attrs"].items():
        if name == "scale_value":
            assert float.fromhex(got[name]) == value
        else:
            assert got[name] == str(value)


def recorded_text(graph):
    text = graph["attrs"]["text"]
    return None if text.startswith("<") else text


@pytest.mark.parametrize(("case", "opset", "node", "graph"), list(recorded("attributes")))
def test_recorded_attribute_texts_are_readable(plugin, capfd, case, opset, node, graph):
    """The reader takes every recorded text: what fails then is the contract, not the reading."""
    text = recorded_text(graph)
    assert plugin.parse(key("NPUKvQuantSparseFlashAttention"), text, ["a"]) is None
    err = capfd.readouterr().err
    assert "not readable" not in err
    assert "unknown attribute" in err or "missing" in err


@pytest.mark.parametrize(("case", "opset", "node", "graph"), list(recorded("attributes")))
def test_our_printer_writes_what_the_parser_wrote(case, opset, node, graph):
    if not {a.type for a in node.attribute} <= {1, 2, 3, 6}:
        pytest.skip("TENSOR, INTS and STRINGS are not ours")
    text = recorded_text(graph)
    if text is None:
        assert parser_text(node) is None
        return
    mine = {e["name"]: e for e in json.loads(parser_text(node))["attribute"]}
    for entry in json.loads(text)["attribute"]:
        assert mine[entry["name"]] == entry
