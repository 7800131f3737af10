"""`fix`: what is mechanical is changed, means the same in onnxruntime, and is found no more."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.ascend.checks import apply_fixes, check, fix, fix_file
from sfa_onnx.ascend.checks.einsum import as_matmul
from sfa_onnx.cli import main
from sfa_onnx.errors import UsageError

F, I64, BOOL, BF16 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.BFLOAT16


def info(name: str, elem: int = F, dims: tuple[int | str, ...] = (4, 6)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem, dims)


def model(nodes, inputs, outputs, initializers=(), opset: int = 18) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers))
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def const(name: str, value, dtype=np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def run(m: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(m.SerializeToString(), options)
    return session.run(None, feeds)


def rules(m: onnx.ModelProto) -> set[str]:
    return {f.rule for f in check(m).findings}


def fixed(m: onnx.ModelProto, rule: str, feeds: dict[str, np.ndarray] | None) -> onnx.ModelProto:
    """Fix `m`, and hold both models against each other in onnxruntime."""
    report = check(m)
    assert any(f.rule == rule and f.fixable for f in report.findings), rules(m)
    new, applied = fix(m, report)
    assert any(line.startswith(rule) for line in applied), apply_fixes(m, report).skipped
    assert rule not in {f.rule for f in check(new).findings if f.severity != "info"}
    if feeds is not None:
        for a, b in zip(run(m, feeds), run(new, feeds), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    return new


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_topk_indices_go_through_a_cast() -> None:
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["v", "i"], name="top"),
        helper.make_node("Add", ["i", "one"], ["j"], name="add"),
    ]
    m = model(nodes, [info("x")], [info("j", I64, (4, 3))], [const("k", [3]), const("one", 1)])
    new = fixed(m, "topk-int32-indices", {"x": rand(4, 6)})
    assert [n.op_type for n in new.graph.node] == ["TopK", "Cast", "Add"]


def test_topk_bf16_runs_in_float32() -> None:
    nodes = [helper.make_node("TopK", ["x", "k"], ["v", "i"], name="top", sorted=0)]
    outs = [info("v", BF16, (4, 3)), info("i", I64, (4, 3))]
    m = model(nodes, [info("x", BF16)], outs, [const("k", [3])])
    new = fixed(m, "topk-bf16", None)
    x = rand(4, 6).astype(ml_dtypes.bfloat16)
    from onnx.reference import ReferenceEvaluator

    for a, b in zip(*(ReferenceEvaluator(w).run(None, {"x": x}) for w in (m, new)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_topk_with_a_proven_k() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "at"], ["n"], name="dim"),
        helper.make_node("Min", ["n", "most"], ["m"], name="min"),
        helper.make_node("Reshape", ["m", "one"], ["k"], name="vector"),
        helper.make_node("TopK", ["x", "k"], ["v", "i"], name="top"),
    ]
    constants = [const("at", 1), const("most", 4), const("one", [1])]
    m = model(nodes, [info("x")], [info("v", F, (4, 4))], constants)
    new = fixed(m, "topk-computed-k", {"x": rand(4, 6)})
    top = next(n for n in new.graph.node if n.op_type == "TopK")
    k = next(t for t in new.graph.initializer if t.name == top.input[1])
    assert numpy_helper.to_array(k).tolist() == [4]


def test_a_k_that_nothing_proves_stays() -> None:
    nodes = [helper.make_node("TopK", ["x", "k"], ["v", "i"], name="top")]
    m = model(nodes, [info("x"), info("k", I64, (1,))], [info("v", F, (4, "k"))])
    found = next(f for f in check(m).findings if f.rule == "topk-computed-k")
    assert not found.fixable
    assert "fixed k" in found.hint


def test_bool_scatter_runs_in_int8() -> None:
    nodes = [helper.make_node("ScatterElements", ["x", "i", "u"], ["y"], name="s", axis=1)]
    ins = [info("x", BOOL), info("i", I64, (4, 2)), info("u", BOOL, (4, 2))]
    feeds = {
        "x": rand(4, 6) > 0,
        "i": np.array([[0, -1], [2, 3], [5, 1], [4, 0]]),
        "u": rand(4, 2, seed=1) > 0,
    }
    fixed(model(nodes, ins, [info("y", BOOL)]), "scatter-dtype", feeds)


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bshc,btc->bsht", (2, 3, 4, 5), (2, 6, 5)),
        ("bsht,btc->bshc", (2, 3, 4, 6), (2, 6, 5)),
        ("bqhd,bkhd->bhqk", (2, 3, 4, 5), (2, 6, 4, 5)),
        ("bsht,bsh->bst", (2, 3, 4, 6), (2, 3, 4)),
        ("hd,hd->h", (3, 5), (3, 5)),
        ("i,j->ij", (3,), (4,)),
        ("ij,jk", (3, 4), (4, 5)),
        ("abcd,cde->eab", (2, 3, 4, 5), (4, 5, 6)),
        ("bshd,hdc->bshc", (2, 3, 4, 5), (4, 5, 6)),
        ("ab,ab->", (2, 3), (2, 3)),
    ],
)
@pytest.mark.parametrize("opset", [12, 18])
def test_einsum_becomes_matmul(equation: str, left, right, opset: int) -> None:
    nodes = [helper.make_node("Einsum", ["a", "b"], ["y"], name="e", equation=equation)]
    a, b = (np.arange(np.prod(s)).reshape(s).astype(np.float32) % 7 for s in (left, right))
    out = np.einsum(equation, a, b)
    m = model(
        nodes, [info("a", F, left), info("b", F, right)], [info("y", F, out.shape)], (), opset
    )
    new = fixed(m, "einsum", {"a": a, "b": b})
    assert "Einsum" not in {n.op_type for n in new.graph.node}
    assert new.graph.node[-1].name == "e"


def test_einsum_over_open_dims() -> None:
    nodes = [helper.make_node("Einsum", ["a", "b"], ["y"], name="e", equation="bshd,btd->bsht")]
    ins = [info("a", F, ("B", "S", 4, 8)), info("b", F, ("B", "T", 8))]
    m = model(nodes, ins, [info("y", F, ("B", "S", 4, "T"))])
    feeds = {"a": np.ones((2, 3, 4, 8), np.float32), "b": np.ones((2, 5, 8), np.float32)}
    fixed(m, "einsum", feeds)


def test_einsum_with_a_dim_known_on_one_side_only() -> None:
    nodes = [helper.make_node("Einsum", ["a", "b"], ["y"], name="e", equation="bsd,btd->bst")]
    ins = [info("a", F, ("B", 3, "D")), info("b", F, (2, "T", 8))]
    m = model(nodes, ins, [info("y", F, ("B", 3, "T"))])
    feeds = {"a": np.ones((2, 3, 8), np.float32), "b": np.ones((2, 5, 8), np.float32)}
    fixed(m, "einsum", feeds)


@pytest.mark.parametrize("equation", ["aab,bc->ac", "ab,bc,cd->ad", "abz,bc->ac", "...a,ab->...b"])
def test_einsum_of_another_form_stays(equation: str) -> None:
    ranks = [len(s) for s in equation.split("->")[0].split(",")]
    assert as_matmul(equation, ranks) is None


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_einsum_form_is_right_for_random_equations(data) -> None:
    groups = {c: data.draw(st.sampled_from(["b", "l", "r", "k"])) for c in "abcde"}
    sizes = dict(zip("abcde", (2, 3, 4, 5, 6), strict=True))
    left = "".join(data.draw(st.permutations([c for c in groups if groups[c] in "blk"])))
    right = "".join(data.draw(st.permutations([c for c in groups if groups[c] in "brk"])))
    out = "".join(data.draw(st.permutations([c for c in groups if groups[c] in "blr"])))
    equation = f"{left},{right}->{out}"
    shapes = [tuple(sizes[c] for c in s) for s in (left, right, out)]
    nodes = [helper.make_node("Einsum", ["x", "y"], ["z"], name="e", equation=equation)]
    ins = [info("x", F, shapes[0]), info("y", F, shapes[1])]
    m = model(nodes, ins, [info("z", F, shapes[2])])
    assert as_matmul(equation, [len(left), len(right)]) is not None
    new, applied = fix(m, check(m))
    assert any(line.startswith("einsum") for line in applied)
    feeds = {
        n: np.asarray(np.arange(np.prod(s)).reshape(s) % 5, np.float32)
        for n, s in zip("xy", shapes[:2], strict=True)
    }
    np.testing.assert_array_equal(run(new, feeds)[0], np.einsum(equation, *feeds.values()))


def test_what_the_parser_misreads_is_rewritten() -> None:
    nodes = [
        helper.make_node("Constant", [], ["c"], name="c", value_floats=[1.0, 2.5]),
        helper.make_node("Shape", ["x"], ["s"], name="s", start=1),
        helper.make_node("Transpose", ["x"], ["t"], name="t"),
        helper.make_node("Clip", ["t"], ["u"], name="u"),
        helper.make_node("Gemm", ["u", "x"], ["g"], name="g", alpha=0.5),
        helper.make_node(
            "ConstantOfShape", ["s"], ["b"], name="b", value=helper.make_tensor("v", BOOL, [1], [1])
        ),
        helper.make_node("Split", ["g"], ["p", "q"], name="p", axis=1, num_outputs=2),
        helper.make_node("Dropout", ["p"], ["d"], name="d"),
        helper.make_node("Mul", ["d", "scale"], ["y"], name="y"),
        helper.make_node("ReduceSum", ["c"], ["scale"], name="scale", keepdims=0),
    ]
    nodes = [*nodes[:8], nodes[9], nodes[8]]
    outs = [info("y", F, (6, 3)), info("b", BOOL, (6,)), info("q", F, (6, 3))]
    m = model(nodes, [info("x")], outs)
    report = check(m)
    want = {"constant-form", "shape-slice", "transpose-without-perm", "clip-without-bounds"}
    want |= {"gemm-alpha", "constant-of-shape-value", "split-num-outputs", "prototype-not-open"}
    assert want <= {f.rule for f in report.fixable}
    new, _ = fix(m, report)
    assert not want & rules(new)
    feeds = {"x": rand(4, 6)}
    for a, b in zip(run(m, feeds), run(new, feeds), strict=True):
        np.testing.assert_array_equal(a, b)


def test_names_and_empty_outputs() -> None:
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["v", ""], name="n"),
        helper.make_node("Neg", ["v"], ["y"], name="n"),
    ]
    m = model(nodes, [info("x")], [info("y", F, (4, 3))], [const("k", [3])])
    new = fixed(m, "duplicate-name", None)  # onnxruntime refuses the model before, too
    x = rand(4, 6)
    np.testing.assert_array_equal(run(new, {"x": x})[0], -np.sort(x)[:, ::-1][:, :3])
    assert len({n.name for n in new.graph.node}) == 2
    assert all(o for n in new.graph.node for o in n.output)


def test_the_model_given_is_left_alone() -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["y"], name="t")]
    m = model(nodes, [info("x")], [info("y", F, (6, 4))])
    before = m.SerializeToString()
    fix(m, check(m))
    assert m.SerializeToString() == before


def test_nothing_known_of_a_shape_means_no_change() -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["y"], name="t")]
    x = helper.make_tensor_value_info("x", F, None)
    m = model(nodes, [x], [helper.make_tensor_value_info("y", F, None)])
    result = apply_fixes(m, check(m))
    assert not result.applied
    assert result.skipped == ["transpose-without-perm: t: not mechanical here"]


def test_fix_file_writes_once(tmp_path: Path) -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["y"], name="t")]
    source, target = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(model(nodes, [info("x")], [info("y", F, (6, 4))]), source)
    report = check(source)
    result = fix_file(source, report, target)
    assert result.path == target
    assert check(target).parser == "accepted"
    with pytest.raises(UsageError, match="exists already"):
        fix_file(source, report, target)


def test_what_a_fix_leaves_is_not_offered_again(tmp_path, capsys) -> None:
    """A mean at opset 20 becomes a sum that no plug-in of that opset reads either."""
    node = helper.make_node("ReduceMean", ["x"], ["y"], "mean", keepdims=0)
    onnx.save(model([node], [info("x")], [info("y", F, ())], opset=20), tmp_path / "m.onnx")
    first, again = tmp_path / "m.onnx", tmp_path / "fixed.onnx"
    assert main(["check", str(first), "--cann", "9.1"]) == 3
    assert "run again with --fix" in capsys.readouterr().out
    assert main(["check", str(first), "--cann", "9.1", "--fix", "-o", str(again)]) == 3
    told = capsys.readouterr().out
    assert "run again with --fix" not in told
    assert "kept: no exact repair applies" in told
