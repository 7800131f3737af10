"""RMS norms as the vendor's operators: every spelling, only where the mathematics is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from sfa_onnx import runtime
from sfa_onnx.ascend.checks import apply_fixes, check
from sfa_onnx.ascend.flavour import convert, from_atc
from sfa_onnx.ascend.handover import folder as handover
from tests.op_models import needs_library
from tests.test_flavour import build, ops
from tests.test_flavour import run as run_plain

T = TensorProto
N = helper.make_node
RNG = np.random.default_rng(17)
BF16 = np.dtype(ml_dtypes.bfloat16)


def norm(
    *,
    dtype: int = T.FLOAT,
    gamma: int = T.FLOAT,
    dims: Any = (2, 3, 16),
    epsilon: float = 1e-6,
    root: str = "sqrt-div",
    square: str = "pow",
    mean: str = "mean",
    cast: str = "before gamma",
    axes: Any = (-1,),
    residual: bool = False,
    swapped: bool = False,
) -> ModelProto:
    """A norm as exporters write it; with float16 or bfloat16 it is computed in float32."""
    wide = dtype != T.FLOAT
    nodes, inits = [], [("eps", np.float32(epsilon)), ("two", np.float32(2))]
    inits += [("one", np.float32(1)), ("axes", np.array(axes)), ("half", np.float32(-0.5))]
    x = "x"
    if residual:
        nodes.append(N("Add", ["x", "r"], ["sum"], "add"))
        x = "sum"
    w = x
    if wide:
        nodes.append(N("Cast", [x], ["wide"], "wide", to=T.FLOAT))
        w = "wide"
    nodes.append(N("Pow", [w, "two"], ["sq"], "sq") if square == "pow" else
                 N("Mul", [w, w], ["sq"], "sq"))  # fmt: skip
    if mean == "mean":
        nodes.append(N("ReduceMean", ["sq", "axes"], ["m"], "mean"))
    else:
        nodes += [N("ReduceSum", ["sq", "axes"], ["total"], "sum"),
                  N("Mul", ["total", "per"], ["m"], "mean")]  # fmt: skip
        inits.append(("per", np.float32(1 / dims[-1])))
    nodes.append(N("Add", ["eps", "m"] if swapped else ["m", "eps"], ["inside"], "plus"))
    if root == "sqrt-div":
        nodes += [N("Sqrt", ["inside"], ["root"], "root"), N("Div", [w, "root"], ["unit"], "unit")]
    elif root == "pow":
        nodes += [N("Pow", ["inside", "half"], ["rs"], "rs"), N("Mul", [w, "rs"], ["unit"], "unit")]
    else:
        inverse = N("Reciprocal", ["root"], ["rs"], "rs")
        if root == "one-over":
            inverse = N("Div", ["one", "root"], ["rs"], "rs")
        order = ["rs", w] if swapped else [w, "rs"]
        nodes += [
            N("Sqrt", ["inside"], ["root"], "root"),
            inverse,
            N("Mul", order, ["unit"], "unit"),
        ]
    unit, g = "unit", "g"
    if wide and cast == "before gamma":
        nodes.append(N("Cast", ["unit"], ["narrow"], "narrow", to=dtype))
        unit = "narrow"
    if wide and cast == "behind" and gamma != T.FLOAT:
        nodes.append(N("Cast", ["g"], ["gw"], "gw", to=T.FLOAT))
        g = "gw"
    out = "scaled" if wide and cast == "behind" else "y"
    nodes.append(N("Mul", [g, unit] if swapped else [unit, g], [out], "scale"))
    if out == "scaled":
        nodes.append(N("Cast", [out], ["y"], "behind", to=dtype))
    inputs = [("x", dtype, list(dims)), *([("r", dtype, list(dims))] if residual else [])]
    outputs = [("y", dtype, None), *([("sum", dtype, None)] if residual else [])]
    model = build(nodes, inputs, outputs, inits=inits)
    width = [dims[a] for a in range(-len(axes), 0)]
    values = RNG.standard_normal(width).astype(helper.tensor_dtype_to_np_dtype(gamma))
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "g"))
    return model


def feeds(model: ModelProto) -> dict[str, Any]:
    made = {}
    for value in model.graph.input:
        dims = [d.dim_value or 3 for d in value.type.tensor_type.shape.dim]
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        made[value.name] = RNG.standard_normal(dims).astype(kind)
    return made


def fused(model: ModelProto, kind: str = "NPURmsNorm", line: str = "9.1") -> ModelProto:
    atc = convert(model, cann=line).model
    assert kind in ops(atc), ops(atc)
    assert not {"Sqrt", "ReduceSum", "ReduceMean", "Pow"} & set(ops(atc))
    report = check(atc, cann=line)
    assert report.parser == "accepted"
    assert not [f for f in report.findings if f.stage in ("parse", "meaning")]
    return atc


def held(model: ModelProto, atc: ModelProto, tolerance: float) -> None:
    """The ATC file, its canonical form and the original agree; a plain runtime takes the latter."""
    given = feeds(model)
    before = dict(zip([o.name for o in model.graph.output], run_plain(model, given), strict=True))
    portable = from_atc(atc)
    after = runtime.run(atc, given)
    plain = dict(zip([o.name for o in portable.graph.output], run_plain(portable, given),
                     strict=True))  # fmt: skip
    for name, value in before.items():
        for other in (after[name], plain[name]):
            assert other.dtype == value.dtype
            a, b = value.astype(np.float64), other.astype(np.float64)
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@needs_library
@pytest.mark.parametrize("root", ["sqrt-div", "pow", "reciprocal", "one-over"])
@pytest.mark.parametrize("square", ["pow", "mul"])
@pytest.mark.parametrize("mean", ["mean", "sum"])
def test_every_spelling(root: str, square: str, mean: str) -> None:
    for swapped in (False, True):
        model = norm(root=root, square=square, mean=mean, swapped=swapped)
        atc = fused(model)
        assert ops(atc) == ["NPURmsNorm"]
        assert atc.graph.node[0].name == "scale"  # dumps are lined up by the last node's name
        held(model, atc, 1e-6)


@needs_library
@pytest.mark.parametrize("cast", ["before gamma", "behind"])
@pytest.mark.parametrize("gamma", ["same", "float"])
def test_half_precision_takes_the_narrow_input(cast: str, gamma: str) -> None:
    dtype = T.FLOAT16
    if cast == "before gamma" and gamma == "float":
        return  # not a legal product
    model = norm(dtype=dtype, gamma=dtype if gamma == "same" else T.FLOAT, cast=cast)
    atc = fused(model)
    assert ops(atc) == ["NPURmsNorm"]
    assert list(atc.graph.node[0].input) == ["x", "g"]
    held(model, atc, 2e-3)


def test_bfloat16_is_written_too() -> None:
    atc = fused(norm(dtype=T.BFLOAT16, gamma=T.BFLOAT16))
    assert ops(atc) == ["NPURmsNorm"]


@needs_library
def test_bfloat16_runs_on_our_kernel() -> None:
    x = RNG.standard_normal((2, 3, 16)).astype(BF16)
    atc = fused(norm(dtype=T.BFLOAT16, gamma=T.BFLOAT16))
    gamma = onnx.numpy_helper.to_array(next(t for t in atc.graph.initializer if t.name == "g"))
    got = runtime.run(atc, {"x": x})["y"].astype(np.float64)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * gamma.astype(np.float64)
    np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=1e-3)


@needs_library
@pytest.mark.parametrize("dtype", [T.FLOAT, T.FLOAT16])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-8, 1e-3])
def test_another_epsilon_is_reached_by_scaling(epsilon: float, dtype: int) -> None:
    """The plug-in writes 1e-6 whatever the file says; small inputs make epsilon matter."""
    model = norm(epsilon=epsilon, dtype=dtype, gamma=dtype)
    atc = fused(model)
    assert "Mul" in ops(atc)
    small = feeds(model)
    small["x"] = (small["x"] * 1e-3).astype(small["x"].dtype)
    (before,), (after,) = run_plain(model, small), runtime.run(atc, small).values()
    tolerance = 1e-5 if dtype == T.FLOAT else 2e-3
    np.testing.assert_allclose(before, after, rtol=tolerance, atol=tolerance)


@needs_library
@pytest.mark.parametrize("dtype", [T.FLOAT, T.FLOAT16])
def test_a_residual_sum_is_taken_in(dtype: int) -> None:
    model = norm(dtype=dtype, gamma=dtype, residual=True)
    atc = fused(model, "NPUAddRmsNorm")
    assert ops(atc) == ["NPUAddRmsNorm"]
    assert all(atc.graph.node[0].output)
    held(model, atc, 1e-6 if dtype == T.FLOAT else 2e-3)


@pytest.mark.parametrize(("other", "kept"), [("b", False), ("c", True), (None, True), (1, True)])
def test_a_sum_is_taken_in_where_its_shapes_are_one_for_sure(other: Any, kept: bool) -> None:
    """One operand may be broadcast at run time; the operator cannot."""
    model = norm(residual=True, dims=("b", 3, 16))
    model.graph.input[1].CopyFrom(helper.make_tensor_value_info("r", T.FLOAT, [other, 3, 16]))
    atc = convert(model, cann="9.1").model
    assert ops(atc) == (["Add", "NPURmsNorm"] if kept else ["NPUAddRmsNorm"])


@needs_library
def test_several_axes_and_open_batch() -> None:
    model = norm(axes=(-2, -1), dims=("b", 4, 8))
    held(model, fused(model), 1e-6)


@needs_library
def test_two_norms_of_one_sum_and_a_chain_of_layers() -> None:
    """Each sum is taken in once; a second norm reads the operator's third output."""
    first = norm(residual=True)
    nodes = list(first.graph.node)
    for tag, x in (("b", "sum"), ("c", "y")):
        for node in first.graph.node[1:]:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{node.name}_{tag}"
            made = {o for n in first.graph.node[1:] for o in n.output}
            for i, name in enumerate(node.input):
                copy.input[i] = x if name == "sum" else f"{name}_{tag}" if name in made else name
            copy.output[0] = f"{node.output[0]}_{tag}"
            nodes.append(copy)
    del first.graph.node[:]
    first.graph.node.extend(nodes)
    first.graph.output.extend(
        helper.make_tensor_value_info(n, T.FLOAT, None) for n in ("y_b", "y_c")
    )
    atc = fused(first, "NPUAddRmsNorm")
    assert sorted(ops(atc)) == ["NPUAddRmsNorm", "NPURmsNorm", "NPURmsNorm"]
    held(first, atc, 1e-5)


def test_a_value_of_the_norm_that_is_read_elsewhere_stays() -> None:
    model = norm()
    model.graph.output.append(helper.make_tensor_value_info("m", T.FLOAT, None))
    atc = convert(model, cann="9.1").model
    assert "NPURmsNorm" in ops(atc)
    assert "ReduceSum" in ops(atc)
    assert "Sqrt" not in ops(atc)


def _edited(change: Any, **kw: Any) -> ModelProto:
    model = norm(**kw)
    change({n.name: n for n in model.graph.node}, model)
    return model


def _constant(model: ModelProto, name: str, value: Any) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(value, np.float32), name))


NEAR_MISSES = {
    "another exponent": lambda n, m: _constant(m, "two", 3),
    "another value divided": lambda n, m: n["unit"].input.__setitem__(0, "sq"),
    "first axis": lambda n, m: m.graph.initializer[3].CopyFrom(
        onnx.numpy_helper.from_array(np.array([-2]), "axes")
    ),
    "no epsilon": lambda n, m: _constant(m, "eps", 0),
    "negative epsilon": lambda n, m: _constant(m, "eps", -1e-6),
    "gamma broadcast": lambda n, m: _constant(m, "g", [1.0]),
    "computed epsilon": lambda n, m: (
        m.graph.input.append(helper.make_tensor_value_info("e", T.FLOAT, [])),
        n["plus"].input.__setitem__(1, "e"),
    ),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_near_misses_are_left_alone(miss: str) -> None:
    model = _edited(NEAR_MISSES[miss])
    assert not [o for o in ops(convert(model, cann="9.1").model) if o.startswith("NPU")]


def test_a_sum_over_the_wrong_count_is_no_mean() -> None:
    model = norm(mean="sum")
    _constant(model, "per", 1 / 15)
    assert "NPURmsNorm" not in ops(convert(model, cann="9.1").model)


def test_norms_of_newer_opsets() -> None:
    node = N("RMSNormalization", ["x", "g"], ["y"], "n", epsilon=1e-6)
    model = build([node], [("x", 1, [2, 16])], [("y", 1, None)],
                  inits=[("g", np.ones(16, np.float32))], opset=23)  # fmt: skip
    assert ops(fused(model)) == ["NPURmsNorm"]
    assert "NPURmsNorm" not in ops(convert(model, cann="9.1", norms=False).model)
    assert "NPURmsNorm" not in ops(convert(model).model)


@needs_library
def test_a_foreign_norm_with_an_epsilon_the_plug_in_never_reads() -> None:
    for kind, inputs in (("NPURmsNorm", ["x", "g"]), ("NPUAddRmsNorm", ["x", "r", "g"])):
        outputs = ["y", "rstd", "sum"][: len(inputs)]
        node = N(kind, inputs, outputs, "n", epsilon=1e-3)
        values = [(n, T.FLOAT, [2, 16]) for n in inputs[:-1]]
        model = build([node], values, [("y", 1, [2, 16])], inits=[("g", np.ones(16, np.float32))])
        assert [f.rule for f in check(model).of("error")] == ["norm-epsilon"]
        atc = convert(model, cann="9.1").model
        assert not check(atc).of("error")
        given = {k: v * 1e-2 for k, v in feeds(model).items()}
        wanted, got = (runtime.run(m, given)["y"] for m in (model, atc))
        np.testing.assert_allclose(wanted, got, rtol=1e-5)


@needs_library
@pytest.mark.parametrize("dtype", [T.FLOAT, T.FLOAT16])
def test_check_fix_reaches_an_epsilon_the_plug_in_never_reads(dtype: int) -> None:
    """`--fix` keeps every output the file reads, 1 / root included, where batch is open."""
    for kind, inputs in (("NPURmsNorm", ["x", "g"]), ("NPUAddRmsNorm", ["x", "r", "g"])):
        outputs = ["y", "rstd", "sum"][: len(inputs)]
        node = N(kind, inputs, outputs, "n", domain="npu", epsilon=1e-3)
        values = [(n, dtype, ["b", 16]) for n in inputs[:-1]]
        gamma = RNG.standard_normal(16).astype(helper.tensor_dtype_to_np_dtype(dtype))
        outs = [(n, T.FLOAT if n == "rstd" else dtype, ["b", 1 if n == "rstd" else 16])
                for n in outputs]  # fmt: skip
        model = build([node], values, outs, inits=[("g", gamma)], domains=("npu",))
        report = check(model, cann="9.2")
        assert [f.rule for f in report.of("error")] == ["norm-epsilon"]
        result = apply_fixes(model, report)
        (line,) = result.applied
        assert "within 1e-06 in float64" in line
        assert not check(result.model, cann="9.2").of("error")
        given = {k: v * np.asarray(1e-2, v.dtype) for k, v in feeds(model).items()}
        wanted, got = (runtime.run(m, given) for m in (model, result.model))
        for name in outputs:
            slack = 1e-5 if dtype == T.FLOAT else 2e-3
            np.testing.assert_allclose(wanted[name], got[name], rtol=slack, err_msg=name)


def test_an_epsilon_that_no_scaling_reaches_is_no_fix() -> None:
    node = N("NPURmsNorm", ["x", "g"], ["y"], "n", epsilon=0.0)
    model = build([node], [("x", T.FLOAT, [2, 16])], [("y", T.FLOAT, [2, 16])],
                  inits=[("g", np.ones(16, np.float32))])  # fmt: skip
    (found,) = check(model).of("error")
    assert (found.rule, found.fixable) == ("norm-epsilon", False)


@needs_library
@pytest.mark.parametrize("residual", [False, True])
def test_a_norm_in_a_branch(residual: bool) -> None:
    """Values of the main graph in, the branch's own out; the other branch does without."""
    inner = norm(dims=(2, 16), residual=residual)
    out = [helper.make_tensor_value_info("y", T.FLOAT, [2, 16])]
    then = helper.make_graph(inner.graph.node, "then", [], out, inner.graph.initializer)
    other = helper.make_graph([N("Neg", ["x"], ["z"], "neg")], "else", [],
                              [helper.make_tensor_value_info("z", T.FLOAT, [2, 16])])  # fmt: skip
    nodes = [N("If", ["c"], ["out"], "if", then_branch=then, else_branch=other)]
    values = [("x", T.FLOAT, [2, 16]), ("c", T.BOOL, [])]
    values += [("r", T.FLOAT, [2, 16])] if residual else []
    model = build(nodes, values, [("out", T.FLOAT, [2, 16])])
    kind = "NPUAddRmsNorm" if residual else "NPURmsNorm"
    atc = convert(model, cann="9.1").model
    branch = next(a.g for n in atc.graph.node for a in n.attribute if a.name == "then_branch")
    assert [n.op_type for n in branch.node] == [kind]
    report = check(atc, cann="9.1")
    assert report.parser == "accepted"
    assert not [f for f in report.findings if f.stage in ("parse", "meaning")]
    portable = from_atc(atc)
    assert [f.name for f in portable.functions] == [kind]
    for taken in (True, False):
        given = {n: RNG.standard_normal((2, 16)).astype(np.float32) for n in "xr"[: 1 + residual]}
        given["c"] = np.array(taken)
        wanted = run_plain(model, given)[0]
        for got in (runtime.run(atc, given)["out"], run_plain(portable, given)[0]):
            np.testing.assert_allclose(wanted, got, rtol=1e-5, atol=1e-6)


def test_a_hand_over_has_them_unless_told_not_to(tmp_path: Path) -> None:
    onnx.save(norm(), tmp_path / "m.onnx")
    for norms in (True, False):
        report = handover.write(tmp_path / "m.onnx", tmp_path / str(norms),
                                soc_version="Ascend910B2", norms=norms)  # fmt: skip
        assert ("NPURmsNorm" in ops(onnx.load(report.model))) == norms
        assert ("1 norm fused to NPURmsNorm" in report.notes) == norms
