"""Models that break one rule of the checker each, and what the checker must say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sfa_onnx.ascend.checks import (
    CheckReport,
    Finding,
)
from tests.test_estimate import fused

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


def cache_write() -> ModelProto:
    """As no `sfa-onnx atc` wrote it: slots go straight to the node."""
    ins = [("p", I8, (4, 16, 1, 656)), ("r", I8, (2, 1, 656)), ("s", I32, (2,))]
    node = N("KvCacheWrite", ["p", "r", "s"], ["w"], name="kw")
    return model([node], ins, [("w", I8, (4, 16, 1, 656))])


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
    ("not-sound", lambda: model([N("Relu", ["y"], ["t"]), N("Relu", ["t"], ["y"])]),
     "error", "", "depends on itself"),
    ("reshape-open-empty", lambda: one(
        "Reshape", "x", "to", ins=[("x", F, ("b", 1, 0))], init=[const("to", [-1, 1, 1, 0])],
        allowzero=1,
    ), "error", "", "-1 beside 0"),
    ("negative-size", lambda: one("Relu", ins=[("x", F, (2, -1))]), "warning", "", "size -1"),
    ("no-inference", lambda: model([N("Foo", ["x"], ["y"], domain="nowhere")]),
     "warning", "", "infers no shapes"),
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
    ("plugin-interface", lambda: edit(
        ModelProto.FromString(ATC_FUSED.SerializeToString()),
        lambda m: m.graph.node[0].output.append("lse"),
     ),
     "error", "E19999", "2 outputs, it has 1"),
    ("plugin-not-open", lambda: one("Gemm", "x", "x"), "unknown", "", "not in the open sources"),
    ("prototype-not-open", lambda: one("Dropout"), "unknown", "", "E10501"),
    ("reduce-no-axes", lambda: model([N("Neg", ["x"], ["t"]), N("ReduceSum", ["t"], ["y"])]),
     "error", "EZ9999", "no axes on a computed tensor"),
    ("norm-epsilon", lambda: one("NPURmsNorm", "x", "g", ins=(X, ("g", F, (6,))), epsilon=1e-5),
     "error", "", "never reads it"),
    ("reduce-axes", lambda: one("ReduceMean"), "error", "", "nowhere (all), opset 18: lost"),
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
    ("scale-six-digits", lambda: edit(
        ModelProto.FromString(ATC_FUSED.SerializeToString()),
        lambda m: setattr(
            next(a for a in m.graph.node[0].attribute if a.name == "scale_value"), "f", 576**-0.5
        ),
     ), "warning", "", "as 0.0416667"),
    ("scatternd-reduction", lambda: one("ScatterND", "x", "i", "u", reduction="add", ins=(
        X, ("i", I64, (1, 1)), ("u", F, (1, 6))
    )), "error", "", "reduction is ignored"),
    ("scatterelements-reduction", lambda: one("ScatterElements", "x", "i", "u", reduction="add",
     ins=(X, ("i", I64, (1, 1)), ("u", F, (1, 1)))), "error", "", "9.0 ignores the reduction"),
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
    ("sinks", lambda: with_input(sfa(), 9, "sinks", F, (16,)), "error", "", "on Ascend 950"),
    ("attribute-value", lambda: sfa(int8=False, return_softmax_lse=1, layout_kv="PA_BSND"), "error",
     "", "for contiguous ones"),
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
    ("cache-write-padding", cache_write, "warning", "", "not documented to skip"),
    ("cache-write-order", cache_write, "info", "", "no order"),
    ("scatternd-copies-cache", lambda: one("ScatterND", "x", "i", "u", ins=(
        ("x", F, (1000, 1000)), ("i", I64, (1, 1)), ("u", F, (1, 1000))
    )), "warning", "", "4.0 MB a call"),
    ("topk-bf16", lambda: model(
        [N("TopK", ["x", "k"], ["v", "i"], name="n0", sorted=0)],
        [("x", BF16, (4, 6))], [("v", BF16, None)], [K3],
    ), "warning", "", "bfloat16"),
    ("topk-computed-k", lambda: model(TOPK, [X, ("k", I64, (1,))], [("v", F, None)]), "warning", "",
     "computed at run time"),
    ("topk-int32-indices", lambda: model(TOPK, outs=[("i", I64, None)], init=[K3]), "warning", "",
     "graph output 'i'"),
    ("shape-contradiction", lambda: edit(one("ReduceMean", "x", "a", init=[const("a", [-1])]),
     lambda m: m.graph.output[0].CopyFrom(value("y", F, (4, 1)))), "error", "",
     "GE will infer [4, 6]"),
    ("topk-unsorted", lambda: model(
        [N("TopK", ["x", "k"], ["v", "i"], name="n0", sorted=0)], outs=[("v", F, None)], init=[K3]
    ), "warning", "", "sorted = 0"),
    ("scatter-mask", lambda: model([
        N("ScatterElements", ["x", "i", "u"], ["y"], name="n0", axis=1)
    ], [X, ("i", I64, (4, 2))], init=[const("u", [[0.0, 0.0]] * 4, np.float32)]), "warning", "",
     "one value"),
    ("gather-bool", lambda: model([
        N("GatherElements", ["m", "i"], ["y"], name="n0", axis=1)
    ], [("m", BOOL, (4, 6)), ("i", I64, (4, 2))], outs=[("y", BOOL, None)]), "warning", "",
     "takes int8"),
    ("int64-fits", lambda: model([
        N("TopK", ["x", "k"], ["v", "i"]), N("Mod", ["i", "two"], ["y"], name="n0")
    ], outs=[("y", I64, None)], init=[K3, const("two", [2])]), "warning", "", "fit int32"),
    ("engine-unknown", lambda: one("MatMul", "x", "x"), "unknown", "", "no engine is listed"),
    ("engine-ai-cpu", lambda: one("TopK", "x", "k", ins=(X, ("k", I32, (1,)))), "warning", "",
     "AI CPU"),
    ("engine-documented", lambda: one("Trilu"), "info", "", "product table"),
    ("engine-nowhere", lambda: one("Neg", ins=[("x", TensorProto.UINT64, (2,))]), "warning", "",
     "no engine lists"),
    ("engine-reshape", lambda: one("Reshape", "x", "s", ins=(X, ("s", I64, (1,)))), "info", "",
     "whether packages let it win"),
]  # fmt: skip


def find(report: CheckReport, rule: str) -> list[Finding]:
    return [f for f in report.findings if f.rule == rule]
