"""One test per rule of the checker: what triggers it, its code, and the reason a person reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sfa_onnx.ascend.checks import (
    RULES,
    CheckReport,
    Finding,
    apply_fixes,
    check,
    parse_plugin,
)
from sfa_onnx.ascend.flavour import to_atc
from sfa_onnx.cli import main
from sfa_onnx.errors import UsageError
from sfa_onnx.report import to_json
from tests.test_estimate import ATTRS, fused

F, F16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
I8, I32, I64, BOOL = TensorProto.INT8, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL
N = helper.make_node
X = ("x", F, (4, 6))


def value(name: str, elem: int = F, dims: Sequence[int | str] | None = (4, 6)):
    return helper.make_tensor_value_info(name, elem, dims)


def const(name: str, data, dtype=np.int64) -> TensorProto:
    return numpy_helper.from_array(np.asarray(data, dtype), name)


def model(nodes, ins=(X,), outs=(("y", F, None),), init=(), opset=18, more=()) -> ModelProto:
    graph = helper.make_graph(
        list(nodes), "g", [value(*i) for i in ins], [value(*o) for o in outs], list(init)
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(*m) for m in more)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def one(op: str, *inputs: str, ins=(X,), init=(), opset=18, outs=("y",), **attrs) -> ModelProto:
    """A model of one node called n0."""
    node = N(op, list(inputs) or ["x"], list(outs), name="n0", **attrs)
    return model([node], ins, [(o, F, None) for o in outs if o], init, opset)


def edit(m: ModelProto, change: Callable[[ModelProto], object]) -> ModelProto:
    change(m)
    return m


def external(**entries: str) -> ModelProto:
    tensor = TensorProto(name="w", data_type=F, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, text in entries.items():
        tensor.external_data.add(key=key, value=text)
    return model([N("Add", ["x", "w"], ["y"], name="n0")], [("x", F, (2, 4))], init=[tensor])


def branch(then: NodeProto, other: NodeProto, ins=(X, ("c", BOOL, ())), init=()) -> ModelProto:
    graphs = [
        helper.make_graph([n], name, [], [value(n.output[0], F, None)], list(init))
        for n, name in ((then, "t"), (other, "e"))
    ]
    cond = N("If", ["c"], ["y"], name="if0", then_branch=graphs[0], else_branch=graphs[1])
    return model([cond], ins)


def sfa(heads: int = 16, int8: bool = True, **attrs) -> ModelProto:
    m = fused(heads, int8=int8, tokens=attrs.pop("tokens", 4))
    for name, new in attrs.items():
        attribute = next((a for a in m.graph.node[0].attribute if a.name == name), None)
        if attribute is not None:
            m.graph.node[0].attribute.remove(attribute)
        if new is not None:
            m.graph.node[0].attribute.append(helper.make_attribute(name, new))
    return m


def mixed() -> ModelProto:
    """The fused node beside a standard one: the usual canonical file."""
    m = sfa()
    m.graph.node.append(N("Neg", ["q"], ["other"], name="neg"))
    return m


def with_input(m: ModelProto, position: int, name: str, elem: int, dims) -> ModelProto:
    """Connect input `position` of the first node, as graph input `name` (or change it)."""
    node = m.graph.node[0]
    old = [v for v in m.graph.input if v.name == name]
    for v in old:
        m.graph.input.remove(v)
    m.graph.input.append(value(name, elem, dims))
    while len(node.input) <= position:
        node.input.append("")
    node.input[position] = name
    return m


def paged(page: int = 128, table=(1, 8), **attrs) -> ModelProto:
    m = sfa(layout_kv="PA_BSND", **attrs)
    m = with_input(m, 1, "kv", I8, (16, page, 1, 656))
    m = with_input(m, 8, "akv", I32, (1,))
    return m if table is None else with_input(m, 6, "bt", I32, table)


def indexer(heads: int = 64, dim: int = 128, **attrs) -> ModelProto:
    ins = [
        ("q", BF16, (1, 4, heads, dim)),
        ("k", BF16, (1, 256, 1, dim)),
        ("w", BF16, (1, 4, heads)),
    ]
    node = N("NPULightningIndexer", ["q", "k", "w"], ["i"], name="li", domain="npu", **attrs)
    return model([node], ins, [("i", I32, (1, 4, 1, 64))], more=[("npu", 1)])


def pack(nope=(1, 4, 512), rope_type: int = BF16, nope_type: int = F) -> ModelProto:
    ins = [("n", nope_type, nope), ("r", rope_type, (1, 4, 64))]
    node = N("KvCachePack", ["n", "r"], ["p"], name="kp", domain="sfa_onnx", tile_size=128)
    return model([node], ins, [("p", I8, None)], more=[("sfa_onnx", 1)])


def weights(count: int) -> ModelProto:
    m = external(location="w.bin")
    m.graph.initializer[0].dims[:] = [count, 1 << 20]
    return m


RECORDED = sorted((Path(__file__).parent / "data" / "atc" / "cases").glob("*.onnx"))
K3 = const("k", [3])
TOPK = [N("TopK", ["x", "k"], ["v", "i"], name="n0")]
ATC_FUSED = edit(
    fused(16, int8=True),
    lambda m: (m.graph.node[0].ClearField("domain"), m.opset_import.pop()),
)

Case = tuple[str, Callable[[], ModelProto], str, str, str]
CASES: list[Case] = [
    # rule, model, severity, CANN code, text
    ("arg-last-index", lambda: one("ArgMax", select_last_index=1), "error", "EZ9999", "last_index"),
    ("bitshift-direction", lambda: one("BitShift", "x", "x"), "error", "EZ9999", "LEFT or RIGHT"),
    ("cast-to", lambda: one("Cast"), "error", "EZ9999", "no attribute to"),
    ("clip-without-bounds", lambda: one("Clip"), "error", "EZ9999", "neither min nor max"),
    ("concat-axis", lambda: one("Concat"), "error", "EZ9999", "no attribute axis"),
    ("constant-dtype", lambda: model([N("Add", ["x", "w"], ["y"])], init=[
        TensorProto(name="w", data_type=TensorProto.FLOAT8E5M2, dims=[1], raw_data=b"1")
    ]), "error", "E19999", "float8_e5m2"),
    ("constant-no-data", lambda: model([N("Add", ["x", "w"], ["y"])], init=[
        TensorProto(name="w", data_type=F, dims=[4])
    ]), "error", "E19999", "no data at all"),
    ("duplicate-name", lambda: model([
        N("Neg", ["x"], ["t"], name="a"), N("Neg", ["t"], ["y"], name="a")
    ]), "error", "E13009", "'a'"),
    ("einsum-equation", lambda: one("Einsum"), "error", "EZ9999", "no equation"),
    ("external-key", lambda: external(location="w.bin", checksum="ab"), "error", "E10001",
     "checksum = 'ab'"),
    ("external-location", lambda: external(offset="0"), "error", "E19999", "no location"),
    ("gap-in-branch", lambda: branch(
        N("Clip", ["x", "", "x"], ["t"], name="t"), N("Neg", ["x"], ["e"], name="e")
    ), "error", "E19999", "inside a branch of an If"),
    ("gathernd-batch-dims", lambda: one(
        "GatherND", "x", "i", ins=(X, ("i", I64, (4, 1))), batch_dims=1
    ), "error", "EZ9999", "batch_dims = 1"),
    ("if-attributes", lambda: edit(branch(
        N("Neg", ["x"], ["t"]), N("Neg", ["x"], ["e"])
    ), lambda m: m.graph.node[0].attribute.pop()), "error", "E19999", "else_branch"),
    ("input-dtype", lambda: one("Neg", ins=[("x", TensorProto.UINT4, (4,))]), "error", "E19999",
     "uint4"),
    ("isinf-one-sign", lambda: one("IsInf", detect_negative=0), "error", "EZ9999", "both signs"),
    ("no-graph-input", lambda: model([N("Neg", ["w"], ["y"])], [], init=[const("w", [1.0])]),
     "error", "E16001", "no input"),
    ("no-graph-output", lambda: model([N("Neg", ["x"], ["y"])], outs=[]), "error", "E16001",
     "no output"),
    ("opset-imports", mixed, "error", "E16005", "2 opset imports"),
    ("opset-missing", lambda: model([N("Foo", ["x"], ["y"], domain="other")]), "error", "E19999",
     "'other'"),
    ("output-without-producer", lambda: model([N("Neg", ["x"], ["y"])], outs=[("z", F, None)]),
     "error", "E19999", "'z'"),
    ("plugin-attributes", lambda: edit(edit(sfa(scale_value=None), lambda m: m.opset_import.pop()),
     lambda m: m.graph.node[0].ClearField("domain")), "error", "E19999", "scale_value is missing"),
    ("plugin-not-open", lambda: one("Gemm", "x", "x"), "unknown", "", "not in the open sources"),
    ("prototype-not-open", lambda: one("Dropout"), "unknown", "", "E10501"),
    ("reduce-inputs", lambda: one("ReduceSum", "x", "x", "x"), "error", "EZ9999", "3 inputs"),
    ("split-num-outputs", lambda: model([
        N("Neg", ["x"], ["t"]), N("Split", ["t"], ["y", "z"], name="n0", num_outputs=2)
    ]), "error", "", "signal 11"),
    ("split-output-count", lambda: one("Split", outs=("y", "z"), num_outputs=3), "error", "EZ9999",
     "2 outputs"),
    ("surplus-inputs", lambda: one("Neg", "x", "x"), "warning", "", "drops the rest"),
    ("transpose-without-perm", lambda: one("Transpose"), "error", "EZ9999", "reverses all axes"),
    ("trilu-inputs", lambda: one("Trilu", "x", "x", "x"), "error", "EZ9999", "one or two inputs"),
    ("unregistered-op", lambda: one("Gelu"), "error", "E13010", "ai.onnx::18::Gelu"),
    ("qdq-op", lambda: one("DequantizeLinear", "x", "x"), "error", "E13010", "no plug-in"),
    ("com-microsoft", lambda: edit(one("FusedMatMul", "x", "x", domain="com.microsoft"), lambda m: (
        m.opset_import.pop(), m.opset_import.add(domain="com.microsoft", version=1)
    )), "error", "E13010", "com.microsoft::1"),
    ("function-call", lambda: edit(one("Twice", domain="local"), lambda m: (
        m.opset_import.pop(), m.opset_import.add(domain="local", version=1), m.functions.append(
            helper.make_function("local", "Twice", ["a"], ["b"], [N("Neg", ["a"], ["b"])], []))
    )), "error", "E13010", "local::1::Twice"),
    ("unsqueeze-axes", lambda: one("Unsqueeze", opset=11), "error", "EZ9999", "axes"),
    # accepted, but something else
    ("attribute-ignored", lambda: one("Unique", axis=0), "warning", "", "never reads axis"),
    ("nested-branch-value", lambda: branch(branch(
        N("Neg", ["x"], ["t"]), N("Neg", ["x"], ["e"])
    ).graph.node[0], N("Neg", ["z"], ["o"], name="o"), ins=(X, ("z", F, (4,)), ("c", BOOL, ()))),
     "error", "", "two graphs further out"),
    ("cast-dtype", lambda: one("Cast", to=TensorProto.FLOAT8E4M3FN), "warning", "", "undefined"),
    ("constant-form", lambda: model([
        N("Constant", [], ["c"], name="n0", value_float=1.0), N("Add", ["x", "c"], ["y"])
    ]), "error", "", "the value is lost"),
    ("constant-of-shape-value", lambda: one("ConstantOfShape", ins=[("x", I64, (2,))], value=(
        helper.make_tensor("v", BOOL, [1], [1])
    )), "error", "", "raw_data only"),
    ("constant-output", lambda: model([N("Neg", ["x"], ["y"]), N("Neg", ["w"], ["z"])], outs=[
        ("y", F, None), ("z", F, None)
    ], init=[const("w", [1], np.float32)]), "error", "", "constants alone"),
    ("empty-output", lambda: edit(with_input(sfa(), 8, "akv", I32, (1,)), lambda m: (
        m.graph.node.append(N("TopK", ["q", "kk"], ["v", ""], name="top")),
        m.graph.input.append(value("kk", I64, (1,))))), "error", "", "unnamed output of top"),
    ("external-absolute", lambda: external(location="/data/w.bin"), "error", "", "absolute"),
    ("external-in-branch", lambda: branch(
        N("Add", ["x", "w"], ["t"]), N("Neg", ["x"], ["e"]),
        init=[external(location="w.bin").graph.initializer[0]],
    ), "error", "", "stays relative"),
    ("external-length", lambda: external(location="w.bin", length="12"), "error", "", "16 bytes"),
    ("external-missing", lambda: external(location="gone.bin"), "error", "", "no file"),
    ("external-short", lambda: external(location="short.bin", offset="8"), "error", "", "byte 24"),
    ("gathernd-negative", lambda: one("GatherND", "x", "i", init=[const("i", [[-1]])]), "error", "",
     "does not wrap"),
    ("gemm-alpha", lambda: one("Gemm", "x", "x", alpha=0.5, transB=1), "error", "",
     "drops alpha = 0.5"),
    ("missing-input", lambda: one("Add", "x"), "error", "", "required input 1"),
    ("missing-producer", lambda: one("Add", "x", "ghost"), "error", "", "'ghost'"),
    ("mod-sign", lambda: one("Mod", "x", "x", fmod=1), "warning", "", "sign of the result"),
    ("raw-data-short", lambda: model([N("Add", ["x", "w"], ["y"])], init=[
        TensorProto(name="w", data_type=F, dims=[4], raw_data=b"12345678")
    ]), "error", "", "8 bytes, its dims say 16"),
    ("scatternd-reduction", lambda: one("ScatterND", "x", "i", "u", reduction="add", ins=(
        X, ("i", I64, (1, 1)), ("u", F, (1, 6))
    )), "error", "", "reduction is ignored"),
    ("shape-slice", lambda: one("Shape", start=1), "error", "", "the whole shape comes out"),
    ("softmax-coercion", lambda: one("Softmax", opset=12), "warning", "", "flattens to 2-D"),
    ("sparse-initializer", lambda: edit(one("Add", "x", "s"), lambda m: (
        m.graph.sparse_initializer.append(helper.make_sparse_tensor(
            const("s", [1.0], np.float32), const("si", [0]), [4])))), "error", "", "sparse"),
    ("two-producers", lambda: model([
        N("Neg", ["x"], ["y"], name="a"), N("Abs", ["x"], ["y"], name="b")
    ]), "error", "", "written twice"),
    # host checks
    ("attribute-missing", lambda: sfa(key_quant_mode=None), "error", "", "key_quant_mode"),
    ("attribute-value", lambda: sfa(sparse_block_size=3), "error", "", "1, 2, 4, 8, 16"),
    ("block-table", lambda: paged(table=None), "error", "", "needs block_table"),
    ("empty", lambda: with_input(sfa(), 0, "q", BF16, (1, 0, 16, 576)), "error", "", "may be 0"),
    ("heads", lambda: sfa(heads=48), "error", "", "48 query heads"),
    ("indices-shape", lambda: with_input(sfa(), 3, "i", I32, (1, 4, 2, 64)), "error", "",
     "sparse_indices has shape [1, 4, 2, 64]"),
    ("key-heads", lambda: with_input(sfa(), 1, "kv", I8, (1, 64, 2, 656)), "error", "",
     "exactly 1"),
    ("layout", lambda: sfa(layout_kv="TND"), "error", "", "must agree"),
    ("lengths", lambda: with_input(sfa(), 8, "akv", I32, (3,)), "error", "", "3 entries"),
    ("lengths-missing", lambda: sfa(layout_query="TND", layout_kv="TND"), "error", "",
     "actual_seq_lengths_query"),
    ("output", lambda: edit(sfa(), lambda m: m.graph.output[0].CopyFrom(
        value("o", F16, (1, 4, 16, 512))
    )), "error", "", "is fp16"),
    ("page-size", lambda: paged(page=100), "error", "", "multiple of 16"),
    ("rank", lambda: with_input(sfa(), 0, "q", BF16, (4, 16, 576)), "error", "", "rank 3"),
    ("reserved-input", lambda: with_input(sfa(), 4, "ks", F, (1,)), "error", "", "ignores it"),
    ("rope-missing", lambda: edit(sfa(int8=False), lambda m: m.graph.node[0].input.pop()), "error",
     "", "key_rope is not given"),
    ("row-size", lambda: with_input(sfa(), 1, "kv", I8, (1, 64, 1, 576)), "error", "", "656"),
    ("scale-missing", lambda: pack(nope_type=I8), "error", "", "needs its scales"),
    ("value-shape", lambda: with_input(sfa(), 2, "v", I8, (1, 64, 1, 656)), "warning", "",
     "pass the key twice"),
    # the rest of the way
    ("custom-op-on-a3", lambda: sfa(), "unknown", "", "not supported on Atlas A3"),
    ("data-dependent-shape", lambda: one("NonZero"), "warning", "", "depends on values"),
    ("device-memory", lambda: weights(20000), "warning", "", "an .om lives"),
    ("einsum", lambda: one("Einsum", "x", "x", equation="ab,cb->ac"), "unknown", "", "'ab,cb->ac'"),
    ("expert-gather", lambda: model([
        N("TopK", ["x", "k"], ["v", "i"]), N("Gather", ["w", "i"], ["y"], name="n0")
    ], init=[K3, TensorProto(name="w", data_type=F, dims=[8, 64, 32], raw_data=bytes(65536))]),
     "warning", "", "0.1 MB a call"),
    ("input-dtype-documented", lambda: one("Neg", ins=[("x", I64, (4,))]), "info", "", "manual"),
    ("input-shape", lambda: one("Neg", ins=[("x", F, ("B", 4))]), "info", "E10001", "input_shape"),
    ("int64-hot", lambda: one("Add", "x", "x", ins=[("x", I64, (1024, 128))]), "warning", "",
     "int64 tensors"),
    ("int8-input-dynamic", lambda: one("Neg", ins=[("x", I8, ("B", 4))]), "warning", "", "DT_INT8"),
    ("precision-mode", lambda: one("Neg", ins=[("x", BF16, (4,))]), "warning", "",
     "turns that into float16"),
    ("recipes-package", lambda: ATC_FUSED, "warning", "E10501", "no longer published"),
    ("scatter-dtype", lambda: one("ScatterElements", "x", "i", "x", ins=(
        ("x", BOOL, (4,)), ("i", I64, (4,))
    )), "warning", "", "over bool"),
    ("scatternd-copies-cache", lambda: one("ScatterND", "x", "i", "u", ins=(
        ("x", F, (1000, 1000)), ("i", I64, (1, 1)), ("u", F, (1, 1000))
    )), "warning", "", "4.0 MB a call"),
    ("topk-bf16", lambda: model(TOPK, [("x", BF16, (4, 6))], [("v", BF16, None)], [K3]), "unknown",
     "", "bfloat16"),
    ("topk-computed-k", lambda: model(TOPK, [X, ("k", I64, (1,))], [("v", F, None)]), "warning", "",
     "computed at run time"),
    ("topk-int32-indices", lambda: model(TOPK, outs=[("i", I64, None)], init=[K3]), "warning", "",
     "graph output 'i'"),
    ("engine-unknown", lambda: one("MatMul", "x", "x"), "unknown", "", "no engine is declared"),
    ("engine-ai-cpu", lambda: one("TopK", "x", "k", ins=(X, ("k", I32, (1,)))), "warning", "",
     "AI CPU"),
    ("engine-documented", lambda: one("Neg"), "info", "", "product table"),
]  # fmt: skip


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "w.bin").write_bytes(bytes(16))
    (folder / "short.bin").write_bytes(bytes(16))
    return folder


def find(report: CheckReport, rule: str) -> list[Finding]:
    return [f for f in report.findings if f.rule == rule]


@pytest.mark.parametrize(
    ("rule", "build", "severity", "code", "text"),
    CASES,
    ids=lambda c: c[0] if isinstance(c, tuple) else c if isinstance(c, str) else "",
)
def test_rule(rule: str, build, severity: str, code: str, text: str, weights_dir: Path) -> None:
    report = check(build(), cann="9.1", base_dir=weights_dir)
    found = find(report, rule)
    assert found, [f.rule for f in report.findings]
    hit = [f for f in found if text in f.message or text in f.hint]
    assert hit, [f.message for f in found]
    assert (hit[0].severity, hit[0].code) == (severity, code)
    assert hit[0].message[-1] != "."
    assert hit[0].hint or severity == "info"


def test_every_rule_has_a_test_and_a_line() -> None:
    assert {c[0] for c in CASES} == set(RULES)


def test_every_finding_of_every_case_is_a_known_rule(weights_dir: Path) -> None:
    for _, build, *_ in CASES:
        for version in ("8.5", "9.0", "9.1", "9.2"):
            report = check(build(), cann=version, base_dir=weights_dir)
            assert {f.rule for f in report.findings} <= set(RULES)


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
