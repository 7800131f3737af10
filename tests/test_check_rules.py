"""One test per rule of the checker: what triggers it, its code, and the reason a person reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto

from sfa_onnx.ascend.cann import CANN_VERSIONS
from sfa_onnx.ascend.checks import (
    RULES,
    apply_fixes,
    check,
    parse_plugin,
)
from sfa_onnx.ascend.flavour.model import to_atc
from sfa_onnx.cli import main
from sfa_onnx.errors import UsageError
from sfa_onnx.report import to_json
from tests.check_models import (
    ATC_FUSED,
    BF16,
    CASES,
    I32,
    I64,
    K3,
    RECORDED,
    TOPK,
    F,
    N,
    X,
    branch,
    const,
    edit,
    external,
    find,
    indexer,
    mixed,
    model,
    one,
    pack,
    paged,
    sfa,
    weights,
    with_input,
)
from tests.test_estimate import ATTRS, fused
from tests.test_flavour_reductions import reduction

_OLDER = {"scatterelements-reduction": "9.0"}  # rules of other lines than 9.1


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "w.bin").write_bytes(bytes(16))
    (folder / "short.bin").write_bytes(bytes(16))
    return folder


@pytest.mark.parametrize(
    ("rule", "build", "severity", "code", "text"),
    CASES,
    ids=lambda c: c[0] if isinstance(c, tuple) else c if isinstance(c, str) else "",
)
def test_rule(rule: str, build, severity: str, code: str, text: str, weights_dir: Path) -> None:
    report = check(build(), cann=_OLDER.get(rule, "9.1"), base_dir=weights_dir)
    found = find(report, rule)
    assert found, [f.rule for f in report.findings]
    hit = [f for f in found if text in f.message or text in f.hint]
    assert hit, [f.message for f in found]
    assert (hit[0].severity, hit[0].code) == (severity, code)
    assert hit[0].message[-1] != "."
    assert hit[0].hint or severity == "info"


def test_every_rule_has_a_test_and_a_line() -> None:
    lacking, unknown = set(RULES) - {c[0] for c in CASES}, {c[0] for c in CASES} - set(RULES)
    assert not lacking, f"{lacking}: CASES of tests/check_models.py needs a model that breaks each"
    assert not unknown, f"{unknown}: enter them in RULES of sfa_onnx/ascend/checks/rules.py"


def test_every_finding_of_every_case_is_a_known_rule(weights_dir: Path) -> None:
    for _, build, *_ in CASES:
        for version in CANN_VERSIONS:
            report = check(build(), cann=version, base_dir=weights_dir)
            unknown = {f.rule for f in report.findings} - set(RULES)
            assert not unknown, f"{unknown}: enter them in sfa_onnx/ascend/checks/rules.py"


@pytest.mark.parametrize("build", [sfa, paged, indexer, pack, lambda: sfa(int8=False)])
def test_a_proper_node_breaks_no_host_check(build) -> None:
    report = check(build(), cann="9.2")
    assert not [f for f in report.findings if f.stage == "operator"]
    assert report.flavour == "canonical"


def test_the_a3_conflict_comes_first_and_only_there() -> None:
    for soc in (None, "Ascend910_9391", "Ascend950PR_9589"):
        assert check(sfa(), soc_version=soc).findings[0].rule == "custom-op-on-a3"
    assert not find(check(sfa(), soc_version="Ascend910B2"), "custom-op-on-a3")
    assert not find(check(one("Neg")), "custom-op-on-a3")


def test_the_canonical_flavour_is_told_the_way() -> None:
    report = check(mixed(), cann="9.1")
    assert (report.parser, report.code) == ("rejected", "E16005")
    assert "sfa-onnx atc" in find(report, "opset-imports")[0].hint


def test_many_domains_are_fine_from_9_2_on() -> None:
    assert check(mixed(), cann="9.2").parser == "accepted"


def test_unknown_is_never_clean() -> None:
    report = check(one("MatMul", "x", "x"))
    assert report.verdict == "unknown"
    assert report.passed
    assert not check(one("MatMul", "x", "x"), strict=True).passed


def test_clean_needs_a_declared_engine() -> None:
    report = check(one("Neg"), soc_version="Ascend950PR_9589", strict=True)
    assert (report.verdict, report.passed) == ("clean", True)
    assert report.support[0].engines == {"950": "AI Core"}


def test_names_as_the_parser_counts_them() -> None:
    nodes = [N("Neg", ["x"], ["t"]), N("Neg", ["t"], ["y"], name="Neg_0")]
    assert find(check(model(nodes)), "duplicate-name")
    nodes = [N("Neg", ["x"], ["t"]), N("Neg", ["t"], ["y"], name="Neg_1")]
    assert not find(check(model(nodes)), "duplicate-name")


def test_a_branch_node_may_not_be_named_like_an_outer_value() -> None:
    m = branch(N("Neg", ["x"], ["t"], name="x"), N("Neg", ["x"], ["e"], name="e"))
    assert find(check(m), "duplicate-name")
    m = branch(N("Neg", ["x"], ["t"], name="if0"), N("Neg", ["x"], ["e"], name="e"))
    assert not find(check(m), "duplicate-name")


def test_initializers_are_numbered_in_byte_order() -> None:
    init = [const("b", [1.0], np.float32), const("Z", [1.0], np.float32)]
    for name, clash in (("b_Initializer_1", True), ("b_Initializer_0", False)):
        nodes = [N("Sum", ["x", "b", "Z"], ["y"], name=name)]
        assert bool(find(check(model(nodes, init=init)), "duplicate-name")) is clash


def test_int4_is_known_from_9_2_on() -> None:
    ins = [("x", TensorProto.INT4, (4,))]
    assert check(one("Identity", ins=ins), cann="9.1").code == "E19999"
    assert check(one("Identity", ins=ins), cann="9.2").parser == "accepted"


@pytest.mark.parametrize(
    ("version", "code"),
    [("8.5", "E19999"), ("9.0", "E19999"), ("9.1", "E10001"), ("9.2", "E10001")],
)
def test_the_code_of_a_foreign_key_depends_on_the_release(version: str, code: str) -> None:
    assert check(external(location="w.bin", checksum="ab"), cann=version).code == code


def test_surplus_inputs_are_refused_by_9_2_only() -> None:
    assert check(one("Neg", "x", "x"), cann="9.2").code == "E19999"
    assert check(one("Neg", "x", "x"), cann="9.1").parser == "accepted"


@pytest.mark.parametrize("axis", [-1, 5])
def test_split_indexes_the_shape_as_it_is(axis: int) -> None:
    report = check(one("Split", outs=("y", "z"), num_outputs=2, axis=axis))
    assert report.parser == "crash"


def test_split_with_sizes_is_fine() -> None:
    m = one("Split", "x", "s", outs=("y", "z"), axis=1, init=[const("s", [2, 4])])
    assert check(m).parser == "accepted"


def test_user_plugins_open_keys() -> None:
    m = one("MyOp", "x", "x", "x")
    assert check(m).code == "E13010"
    assert check(m, user_plugins=["ai.onnx::18::MyOp"]).parser == "accepted"
    assert check(m, cann="9.2", user_plugins=["ai.onnx::11..18::MyOp(1,2)"]).code == "E19999"
    with pytest.raises(UsageError, match="domain::version::OpType"):
        parse_plugin("MyOp")


def test_a_dropped_input_that_means_something_is_an_error() -> None:
    ins = (X, ("p", I64, (2,)), ("a", I64, (1,)))
    found = find(check(one("Pad", "x", "p", "", "a", ins=ins)), "surplus-inputs")
    assert found[0].severity == "error"


def test_the_rest_is_checked_behind_the_opset_imports() -> None:
    m = mixed()
    m.graph.node.append(N("Gelu", ["q"], ["g1"], name="g1"))
    m.graph.node.append(N("Gelu", ["q"], ["g2"], name="g2"))
    report = check(m, cann="9.1")
    assert report.code == "E16005"
    assert find(report, "unregistered-op")[0].nodes == ("g1", "g2")


def test_keys_of_our_ops_bring_their_prototype() -> None:
    keys = ["ai.onnx::11..18::NPUSparseFlashAttentionAntiquant"]
    m = edit(ModelProto.FromString(ATC_FUSED.SerializeToString()), lambda m: m)
    assert check(m, user_plugins=keys).parser == "accepted"
    m.graph.node[0].attribute.remove(
        next(a for a in m.graph.node[0].attribute if a.name == "scale_value")
    )
    assert check(m, user_plugins=keys).code == "E19999"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_broken_models_are_reported_not_raised(data) -> None:
    file = data.draw(st.sampled_from(RECORDED))
    m = onnx.load(file, load_external_data=False)
    for node in m.graph.node:
        names = [*node.input, "", "ghost"]
        node.input[:] = data.draw(st.lists(st.sampled_from(names), max_size=4))
        if data.draw(st.booleans()):
            node.op_type = data.draw(st.sampled_from(["TopK", "Split", "Einsum", "If", "GatherND"]))
    for name in ("input", "output", "initializer"):
        if data.draw(st.integers(0, 4)) == 0:
            del getattr(m.graph, name)[:]
    report = check(m, cann=data.draw(st.sampled_from(["8.5", "9.2"])), base_dir=file.parent)
    apply_fixes(m, report)


def test_without_our_plugin_our_ops_have_none() -> None:
    report = check(ATC_FUSED, user_plugins=())
    assert report.code == "E13010"


def test_indices_never_negative_are_not_questioned() -> None:
    nodes = [
        N("TopK", ["x", "k"], ["v", "i"]),
        N("Unsqueeze", ["i", "a"], ["j"]),
        N("GatherND", ["x", "j"], ["y"], name="n0"),
    ]
    init = [K3, const("a", [-1])]
    assert not find(check(model(nodes, init=init)), "gathernd-negative")
    open_ones = one("GatherND", "x", "i", ins=(X, ("i", I64, (4, 1))))
    assert find(check(open_ones), "gathernd-negative")[0].severity == "unknown"


@pytest.mark.parametrize(
    "readers",
    [
        [N("Cast", ["i"], ["j"], to=I32)],
        [N("Gather", ["x", "i"], ["j"])],
        [N("Unsqueeze", ["i", "a"], ["u"]), N("GatherElements", ["x", "u"], ["j"])],
    ],
)
def test_topk_indices_used_as_indices_are_fine(readers) -> None:
    m = model([*TOPK, *readers], outs=[("j", F, None)], init=[K3, const("a", [0])])
    assert not find(check(m), "topk-int32-indices")


def test_embedding_tables_are_not_experts() -> None:
    table = TensorProto(name="w", data_type=F, dims=[8, 4], raw_data=bytes(128))
    m = model([N("Gather", ["w", "ids"], ["y"])], [("ids", I64, ("B",))], init=[table])
    assert not find(check(m), "expert-gather")


def test_rotary_tables_are_not_experts() -> None:
    table = TensorProto(name="w", data_type=F, dims=[1, 512, 64], raw_data=bytes(131072))
    nodes = [N("Gather", ["w", "ids"], ["y"], axis=1), N("TopK", ["x", "k"], ["v", "i"])]
    m = model(nodes, [X, ("ids", I64, ("B",))], init=[table, K3])
    assert not find(check(m), "expert-gather")


def test_weights_against_the_chip() -> None:
    report = check(weights(20000), soc_version="Ascend910B4")
    assert find(report, "device-memory")[0].severity == "error"
    assert not find(check(weights(10)), "device-memory")


def test_float32_queries_are_told_about_the_cast() -> None:
    found = find(check(with_input(sfa(), 0, "q", F, (1, 4, 16, 576))), "input-dtype")
    assert "npu-dtype" in found[0].hint


def test_open_dims_are_not_judged() -> None:
    m = with_input(sfa(), 0, "q", BF16, ("B", "S", "N", 576))
    m = with_input(m, 3, "i", I32, ("B", "S", 1, "K"))
    assert not [f for f in check(m).findings if f.stage == "operator"]


@pytest.mark.parametrize("call", [{"cann": "7.0"}, {"soc_version": "Ascend310P3"}])
def test_unknown_names_are_refused(call) -> None:
    with pytest.raises(UsageError, match="expected"):
        check(one("Neg"), **call)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        check(tmp_path / "none.onnx")


def test_the_report_as_json() -> None:
    data = to_json(check(mixed(), cann="8.5"))
    assert (data["parser"], data["code"], data["verdict"]) == ("rejected", "E16005", "errors")
    assert data["findings"][0]["rule"] == "custom-op-on-a3"
    assert {"rule", "severity", "stage", "node", "code", "message", "hint", "fixable"} <= set(
        data["findings"][0]
    )


def test_the_attributes_used_here_are_the_operators_own() -> None:
    assert set(ATTRS) == {a.name for a in fused(16, int8=True).graph.node[0].attribute}


REPAIRED = (
    *("clip-without-bounds", "constant-form", "constant-of-shape-value", "constant-output"),
    *("duplicate-name", "empty-output", "external-in-branch", "gathernd-batch-dims"),
    *("gathernd-negative", "gemm-alpha", "mod-sign", "opset-imports", "scatternd-reduction"),
    *("shape-slice", "sparse-initializer", "split-num-outputs", "transpose-without-perm"),
)


@pytest.mark.parametrize("rule", REPAIRED)
def test_the_atc_flavour_has_none_of_it(rule: str) -> None:
    build = next(c[1] for c in CASES if c[0] == rule)
    converted = to_atc(build())
    for version in ("8.5", "9.1", "9.2"):
        report = check(converted, cann=version)
        assert report.parser == "accepted", report.findings
        assert not [f for f in report.findings if f.stage == "meaning"], report.findings


def test_the_command_takes_plugin_keys(capsys) -> None:
    case = str(next(f for f in RECORDED if f.name.startswith("041")))
    key = "ai.onnx::11..18::AttrEcho(1,3)"
    assert main(["check", case, "--cann", "9.1", "--plugin", key]) == 0
    assert main(["check", case, "--cann", "9.1", "--plugin", key, "--strict"]) == 3
    capsys.readouterr()
    assert main(["check", case, "--cann", "9.2", "--plugin", key, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["code"] == "E19999"


def test_what_converts_to_something_else_is_told_as_that(tmp_path, capsys) -> None:
    """A mean of an older hand-over: the parser takes it, so nobody may read "would not convert"."""
    path = tmp_path / "old.atc.onnx"
    onnx.save(reduction("ReduceMean", (-1,)), path)
    assert main(["check", str(path), "--cann", "9.0"]) == 3
    said = capsys.readouterr().out
    assert "would convert, without an error, to something else than the file means" in said
    onnx.save(mixed(), path)
    assert main(["check", str(path), "--cann", "8.5"]) == 3
    assert "would not convert as it is" in capsys.readouterr().out
