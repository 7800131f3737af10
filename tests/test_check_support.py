"""The core table: op x dtype x SoC x line, and who says so. Unknown stays unknown."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from sfa_onnx.ascend.checks import CheckReport, check
from sfa_onnx.ascend.checks.engines import FAMILIES, cell
from sfa_onnx.cli import main
from tests.check_models import pack
from tests.test_estimate import fused
from tests.test_flavour import build

SFA = ("bf16", "int8", "int8", "int32")
CELLS = [
    # GE type, dtypes, family, line, engine, evidence
    ("KvQuantSparseFlashAttention", SFA, "A2", "9.1", "AI Core", "listing"),
    ("KvQuantSparseFlashAttention", SFA, "A3", "9.1", "AI Core", "opdef"),
    ("KvQuantSparseFlashAttention", SFA, "950", "9.0", "AI Core", "opdef"),
    ("KvQuantSparseFlashAttention", SFA, "950", "8.5", "unknown", "unknown"),
    ("SparseFlashAttentionAntiquant", SFA, "A3", "9.1", "AI Core", "opdef"),
    ("Add", ("bf16", "bf16"), "950", "9.1", "AI Core", "opdef"),
    ("Add", ("bf16", "bf16"), "A3", "9.1", "AI Core", "listing"),
    ("Add", ("int64", "int64"), "A2", "9.1", "AI Core", "listing"),
    ("Add", ("bf16", "fp16"), "A2", "9.1", "none", "listing"),  # no column has both
    ("GatherV2", ("bf16", "int64"), "A2", "9.1", "AI Core", "listing"),
    ("BatchMatMulV2", ("bf16", "bf16"), "A3", "9.1", "AI Core", "listing"),
    ("Mod", ("int64", "int64"), "A3", "9.1", "AI CPU", "listing"),
    ("RealDiv", ("int64", "int64"), "A2", "9.1", "AI CPU", "listing"),
    ("UnsqueezeV3", ("bf16",), "A2", "9.1", "GE", "source"),
    ("Reshape", ("bf16", "int64"), "A2", "9.0", "GE", "listing"),
    ("Reshape", ("bf16", "int64"), "A2", "9.1", "AI CPU", "source"),
    ("Einsum", ("fp32", "fp32"), "A3", "9.1", "none", "listing"),
    ("TopK", ("fp32", "int64"), "A3", "9.1", "AI CPU", "listing"),
    ("RmsNorm", ("bf16", "fp32"), "A2", "9.1", "AI Core", "listing"),
    ("RmsNorm", ("fp32", "bf16"), "A2", "9.1", "none", "listing"),
    ("NeverHeardOf", ("fp32",), "A3", "9.1", "unknown", "unknown"),
]


@pytest.mark.parametrize(("ge", "dtypes", "family", "line", "engine", "evidence"), CELLS)
def test_cell(
    ge: str, dtypes: tuple[str, ...], family: str, line: str, engine: str, evidence: str
) -> None:
    found = cell(ge, dtypes, family, line)
    assert (found.engine, found.evidence) == (engine, evidence)


def table() -> dict[str, Any]:
    text = resources.files("sfa_onnx.ascend").joinpath("data", "op_support.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def test_every_cell_says_where_it_was_read() -> None:
    for ge, entry in table()["ge"].items():
        for family, soc in FAMILIES.items():
            for line in ("8.5", "9.0", "9.1", "9.2"):
                found = cell(ge, (), family, line)
                known = found.engine in ("AI Core", "AI CPU", "GE", "none")
                assert not known or found.evidence in ("listing", "opdef", "source")
                assert not known or found.release
                assert known or soc not in entry or found.note


# ---- what a node runs as -------------------------------------------------------------------------


def one(op: str, inputs: list[Any], *, inits: Any = (), soc: str = "Ascend910B2", line: str = "9.1",
        outputs: int = 1, **attributes: Any) -> CheckReport:  # fmt: skip
    names = [n for n, *_ in inputs] + [n for n, _ in inits]
    outs = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, outs, "n0", **attributes)
    model = build([node], inputs, [(o, 1, None) for o in outs[:1]], inits=inits)
    return check(model, cann=line, soc_version=soc)


def engine(report: CheckReport) -> str:
    return next(iter(report.support[0].engines.values()))


X = ("x", TensorProto.FLOAT, [64, 64])
A3 = "Ascend910_9391"


def test_a_top_k_is_on_ai_core_when_sorted_with_a_constant_k() -> None:
    eight = [("k", np.array([8]))]
    assert engine(one("TopK", [X], inits=eight, outputs=2)) == "AI Core"
    assert engine(one("TopK", [X], inits=eight, outputs=2, sorted=0)) == "AI CPU"
    computed = one("TopK", [X, ("k", TensorProto.INT64, [1])], outputs=2)
    assert engine(computed) == "AI CPU"  # no AI Core kernel of A2 and A3 takes an int64 k
    few = [("k", np.array([4]))]
    wide = ("x", TensorProto.FLOAT, [64, 1024])
    report = one("TopK", [wide], inits=few, outputs=2)
    assert engine(report) == "AI CPU"
    assert "k below 8" in report.support[0].note


def test_scatters_run_on_ai_cpu_where_shapes_are_static() -> None:
    def scatter(rows: Any) -> list[Any]:
        return [("x", 1, [rows, 4]), ("i", 7, [rows, 2]), ("u", 1, [rows, 2])]

    report = one("ScatterElements", scatter(8), axis=1)
    assert engine(report) == "AI CPU"
    assert "static shapes are declined" in report.support[0].note
    assert engine(one("ScatterElements", scatter("n"), axis=1)) == "AI Core"
    assert engine(one("ScatterElements", scatter(8), axis=1, soc="Ascend950PR_9589")) == "AI Core"


def test_a_scatter_of_rows_is_moved_by_a_documented_pass_on_a2_only() -> None:
    inputs = [("x", 1, [8, 4]), ("i", 7, [2, 1]), ("u", 1, [2, 4])]
    assert engine(one("ScatterND", inputs)) == "AI Core"
    assert engine(one("ScatterND", inputs, line="8.5")) == "AI CPU"
    assert engine(one("ScatterND", inputs, soc=A3)) == "AI CPU"


def test_what_constants_decide_is_computed_while_compiling() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape"),
        helper.make_node("Gather", ["s", "zero"], ["d"], "gather"),
        helper.make_node("Mul", ["d", "two"], ["e"], "mul"),
        helper.make_node("Cast", ["e"], ["f"], "cast", to=1),
        helper.make_node("Mul", ["x", "f"], ["y"], "scale"),
    ]
    inits = [("zero", np.array(0)), ("two", np.array(2))]

    def of(dim: Any) -> str:
        model = build(nodes, [("x", 1, [dim, 4])], [("y", 1, None)], inits=inits)
        return check(model, soc_version="Ascend910B2").summary["A2"]

    assert of(8) == "5 nodes: 1 on AI Core, 0 on AI CPU, 4 resolved by GE, 0 unknown"
    assert of("n") == "5 nodes: 4 on AI Core, 0 on AI CPU, 1 resolved by GE, 0 unknown"


# ---- the report ----------------------------------------------------------------------------------


def costly() -> ModelProto:
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["v", "i"], "top", sorted=0),
        helper.make_node("Mod", ["i", "z"], ["m"], "mod"),
        helper.make_node("Neg", ["x"], ["y"], "neg"),
    ]
    inputs = [X, ("z", 7, [1])]
    outputs = [("m", 7, None), ("v", 1, None), ("y", 1, None)]
    return build(nodes, inputs, outputs, inits=[("k", np.array([8]))])


def test_the_summary_counts_every_node_once() -> None:
    report = check(costly(), soc_version=A3)
    assert report.summary == {
        "A3": "3 nodes: 1 on AI Core, 2 on AI CPU (Mod, TopK), 0 resolved by GE, 0 unknown"
    }
    assert list(check(costly()).summary) == ["A2", "A3", "950"]
    (found,) = [f for f in report.findings if f.rule == "engine-ai-cpu"]
    assert "Mod(int64; 8.1.RC1), TopK(fp32; 8.1.RC1)" in found.message


def test_what_costs_is_shown_first(tmp_path: Any, capsys: Any) -> None:
    import onnx

    onnx.save(costly(), tmp_path / "m.onnx")
    assert main(["check", str(tmp_path / "m.onnx"), "--soc-version", A3]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert "3 nodes: 1 on AI Core" in lines[1]
    assert "engine-ai-cpu" in lines[2]


def test_rows_group_equal_nodes() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (4,))
    nodes = [helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"]) for i in range(3)]
    nodes[0].input[0] = "x"
    y = helper.make_tensor_value_info("t3", TensorProto.FLOAT, (4,))
    graph = helper.make_graph(nodes, "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    (row,) = check(model, soc_version=A3).support
    assert (row.op_type, row.dtypes, row.count, row.ge_types) == ("Neg", ("fp32",), 3, ("Neg",))
    assert (row.engines, row.releases) == ({"A3": "AI Core"}, {"A3": "8.1.RC1"})


def test_the_fused_node_has_its_row() -> None:
    rows = check(fused(16, int8=True), cann="9.2", soc_version="Ascend910B2").support
    assert rows[0].ge_types == ("SparseFlashAttentionAntiquant",)
    assert (rows[0].engines, rows[0].evidence) == ({"A2": "AI Core"}, {"A2": "opdef"})
    assert "recipes package" in rows[0].note


def test_a_pack_has_the_row_of_what_it_expands_to() -> None:
    (row,) = check(pack(), cann="9.2", soc_version="Ascend910B2").support
    assert "Bitcast" in row.ge_types
    assert "no plug-in" not in row.note
    assert row.engines == {"A2": "AI Core"}  # its views cost nothing, its slices are static


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
    assert report.support[0].evidence["950"] == "opdef"


def test_an_identity_inside_an_expansion_costs_nothing() -> None:
    """A LayerNorm's inner Identity is dropped, as one in the model is: all stays on AI Core."""
    node = helper.make_node("LayerNormalization", ["x", "w"], ["y"], "ln")
    inits = [("w", np.ones(8, np.float32))]
    model = build([node], [("x", 1, [2, 8])], [("y", 1, [2, 8])], inits=inits)
    row = next(r for r in check(model, cann="9.2").support if r.op_type == "LayerNormalization")
    assert "Identity" in row.ge_types
    assert row.engines["A2"] == row.engines["A3"] == "AI Core"
