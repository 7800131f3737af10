"""The core table: op x dtype x SoC, and who says so. Unknown stays unknown."""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from sfa_onnx.ascend.checks import check
from sfa_onnx.ascend.checks.support import FAMILIES, cell
from tests.check_models import pack
from tests.test_estimate import fused

SFA = ("bf16", "int8", "int8", "int32")
CELLS = [
    # GE type, dtypes, family, engine, evidence
    ("KvQuantSparseFlashAttention", SFA, "A2", "AI Core", "declared"),
    ("KvQuantSparseFlashAttention", SFA, "A3", "AI Core", "declared"),
    ("KvQuantSparseFlashAttention", ("fp32", "int8"), "A3", "unknown", "unknown"),
    ("LightningIndexer", ("fp16", "fp16", "fp16"), "A2", "AI Core", "declared"),
    ("SparseFlashAttentionAntiquant", SFA, "A3", "AI Core", "declared"),
    ("SparseFlashAttentionAntiquant", SFA, "950", "unknown", "unknown"),
    ("Add", ("bf16", "bf16"), "950", "AI Core", "declared"),
    ("Add", ("bf16", "bf16"), "A3", "unknown", "documented"),
    ("Add", ("", ""), "950", "unknown", "unknown"),
    ("GatherV2", ("bf16", "int64"), "A2", "unknown", "unknown"),
    ("ScatterElements", ("bool", "int64", "bool"), "950", "unknown", "unknown"),
    ("BatchMatMulV2", ("bf16", "bf16"), "A3", "unknown", "unknown"),
    ("Einsum", ("fp32", "fp32"), "950", "unknown", "unknown"),
    ("TopK", ("fp32", "int32"), "A3", "AI CPU", "declared"),
    ("TopK", ("bf16", "int32"), "A3", "unknown", "unknown"),
    ("RmsNorm", ("bf16", "bf16"), "A2", "AI Core", "declared"),
    ("NeverHeardOf", ("fp32",), "A3", "unknown", "unknown"),
]


@pytest.mark.parametrize(("ge", "dtypes", "family", "engine", "evidence"), CELLS)
def test_cell(ge: str, dtypes: tuple[str, ...], family: str, engine: str, evidence: str) -> None:
    found = cell(ge, dtypes, family)
    assert (found.engine, found.evidence) == (engine, evidence)


def test_a_documented_no_is_said_and_stays_unconfirmed() -> None:
    assert "documented: no, unconfirmed" in cell("GatherV2", ("bf16", "int64"), "A2").note


def test_a_release_may_lack_what_later_ones_declare() -> None:
    assert cell("KvQuantSparseFlashAttention", SFA, "950", "9.1").engine == "AI Core"
    assert cell("KvQuantSparseFlashAttention", SFA, "950", "8.5").engine == "unknown"


def test_no_open_cell_claims_an_engine() -> None:
    """On A2 and A3 an engine is named only where a definition lists that SoC (or the AI CPU)."""
    import json
    from importlib import resources

    text = resources.files("sfa_onnx.ascend").joinpath("data", "op_support.json").read_text()
    for ge, entry in json.loads(text)["ge"].items():
        for family in ("A2", "A3"):
            dtypes = tuple(t[0] if t else "" for t in entry.get("dtypes", {}).values())
            found = cell(ge, dtypes, family)
            declared = entry["ai_core"][FAMILIES[family]] == "declared"
            declared |= FAMILIES[family] in entry.get("recipes_package", ())
            assert found.engine != "AI Core" or declared
            assert found.evidence != "declared" or declared or entry["ai_cpu"] == "declared"


def test_rows_group_equal_nodes() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (4,))
    nodes = [helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"]) for i in range(3)]
    nodes[0].input[0] = "x"
    y = helper.make_tensor_value_info("t3", TensorProto.FLOAT, (4,))
    graph = helper.make_graph(nodes, "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    (row,) = check(model, soc_version="Ascend910_9391").support
    assert (row.op_type, row.dtypes, row.count, row.ge_types) == ("Neg", ("fp32",), 3, ("Neg",))
    assert list(row.engines) == ["A3"]


def test_the_fused_node_has_its_row() -> None:
    rows = check(fused(16, int8=True), cann="9.2", soc_version="Ascend910B2").support
    assert rows[0].ge_types == ("SparseFlashAttentionAntiquant",)
    assert (rows[0].engines, rows[0].evidence) == ({"A2": "AI Core"}, {"A2": "declared"})
    assert "recipes package" in rows[0].note


def test_a_pack_has_the_row_of_what_it_expands_to() -> None:
    (row,) = check(pack(), cann="9.2", soc_version="Ascend910B2").support
    assert "Bitcast" in row.ge_types
    assert "no plug-in" not in row.note
    assert row.evidence == {"A2": "unknown"}


def test_the_canonical_node_goes_through_the_atc_flavour() -> None:
    model = fused(16, int8=True)
    assert check(model, cann="9.1").support[0].ge_types == ("KvQuantSparseFlashAttention",)
    rules = {f.rule for f in check(model, cann="9.1").findings}
    assert "recipes-package" not in rules
    assert "recipes-package" in {f.rule for f in check(model, cann="9.2").findings}


def test_ops_of_later_opsets_are_judged_as_what_they_will_become() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (4,))
    node = helper.make_node("Neg", ["x"], ["y"], name="n")
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (4,))
    graph = helper.make_graph([node], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    report = check(model)
    assert report.code == "E13010"
    assert report.support[0].evidence["950"] == "declared"
