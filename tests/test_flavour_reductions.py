"""Reductions in the form a CANN line reads: same numbers, and nothing left that the line loses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from sfa_onnx.ascend.cann import CANN_VERSIONS
from sfa_onnx.ascend.checks import check, fix
from sfa_onnx.ascend.flavour import convert
from sfa_onnx.ascend.reductions import REDUCTIONS
from sfa_onnx.errors import ModelError, UsageError
from tests.test_flavour import build, ops, run

LINES = (*CANN_VERSIONS, None)
KINDS = sorted(REDUCTIONS)
AXES = {"attribute-like": (-1,), "two": (0, 2), "unsorted": (2, -3), "none": None}


def reduction(
    kind: str,
    axes: tuple[int, ...] | None,
    *,
    opset: int = 18,
    keep: int = 1,
    dims: tuple[int | str, ...] = (2, 3, 8),
    dtype: int = TensorProto.FLOAT,
    inner: bool = False,
    noop: int = 0,
) -> ModelProto:
    """x -> [Neg ->] Reduce -> y; axes in the form of that opset."""
    as_input = opset >= (13 if kind == "ReduceSum" else 18)
    source = "t" if inner else "x"
    attributes = {"keepdims": keep} | ({"noop_with_empty_axes": noop} if noop else {})
    inputs, inits = [source], []
    if axes is not None and as_input:
        inputs, inits = [source, "axes"], [("axes", np.array(axes, np.int64))]
    elif axes is not None:
        attributes["axes"] = list(axes)
    nodes = [helper.make_node(kind, inputs, ["y"], "r", **attributes)]
    if inner:
        nodes.insert(0, helper.make_node("Neg", ["x"], ["t"], "neg"))
    return build(nodes, [("x", dtype, list(dims))], [("y", dtype, None)], opset=opset, inits=inits)


def values(shape: tuple[int, ...], dtype: int = TensorProto.FLOAT, seed: int = 3):
    drawn = np.random.default_rng(seed).uniform(0.5, 2.0, shape)
    return drawn.astype(helper.tensor_dtype_to_np_dtype(dtype))


def lost(model: ModelProto, line: str) -> set[str]:
    """Rules of what the line would not read as meant."""
    found = {f.rule for f in check(model, cann=line).findings if f.severity != "info"}
    return found & {"reduce-axes", "reduce-no-axes", "unregistered-op"}


def same(model: ModelProto, line: str | None, feeds, tolerance: float = 2e-6) -> ModelProto:
    atc = convert(model, cann=line).model
    (before,), (after,) = run(model, feeds), run(atc, feeds)
    assert (before.dtype, before.shape) == (after.dtype, after.shape)
    np.testing.assert_allclose(
        before.astype(np.float64), after.astype(np.float64), rtol=tolerance, atol=tolerance
    )
    for release in CANN_VERSIONS if line is None else (line,):
        assert not lost(atc, release), ops(atc)
    return atc


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_keeps_its_numbers_and_is_read(kind: str, line: str | None) -> None:
    for axes, keep, opset in itertools.product(AXES.values(), (0, 1), (11, 13, 17, 18)):
        model = reduction(kind, axes, opset=opset, keep=keep)
        same(model, line, {"x": values((2, 3, 8))})


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "ReduceProd"])
def test_open_dims_and_computed_inputs(kind: str) -> None:
    for axes, keep in itertools.product(AXES.values(), (0, 1)):
        model = reduction(kind, axes, keep=keep, dims=("b", "s", 8), inner=kind != "ReduceLogSum")
        for shape in ((2, 3, 8), (1, 5, 8)):
            same(model, None, {"x": values(shape)})


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare"])
def test_unknown_rank_is_flattened(kind: str, keep: int) -> None:
    model = reduction(kind, None, keep=keep)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    for shape in ((2, 3), (4,), (2, 1, 3)):
        same(model, "9.1", {"x": values(shape)})


def test_unknown_rank_is_refused_where_only_the_axes_would_tell() -> None:
    model = reduction("ReduceMax", None)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    same(model, "9.1", {"x": values((2, 3))})
    with pytest.raises(ModelError, match="rank known only at run time"):
        convert(model)


@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceSum", "ReduceMax"])
def test_computed_axes(kind: str) -> None:
    nodes = [helper.make_node(kind, ["x", "axes"], ["y"], "r", keepdims=0)]
    model = build(nodes, [("x", 1, [2, 3, 4]), ("axes", TensorProto.INT64, [1])], [("y", 1, None)])
    for axis in (-1, 0):
        same(model, "9.1", {"x": values((2, 3, 4)), "axes": np.array([axis])})


@pytest.mark.parametrize("kind", KINDS)
def test_over_no_axes_what_stands_beside_the_sum_stays(kind: str) -> None:
    """Only the reduction is none: a sum of squares squares, a norm of one number is its size."""
    x = values((2, 3, 8))
    x *= 1 if kind == "ReduceLogSum" else np.random.default_rng(1).choice([-1, 1], x.shape)
    atc = same(reduction(kind, None, noop=1), None, {"x": x.astype(np.float32)})
    beside = {"L1": "Abs", "L2": "Abs", "LogSum": "Log", "SumSquare": "Mul"}
    assert ops(atc) == [beside.get(kind.removeprefix("Reduce"), "Identity")]


@pytest.mark.parametrize("kind", ["ReduceMax", "ReduceMin", "ReduceProd"])
def test_axes_from_run_time_where_a_line_wants_numbers(kind: str) -> None:
    model = reduction(kind, None)
    model.graph.node[0].input.append("axes")
    model.graph.input.append(helper.make_tensor_value_info("axes", TensorProto.INT64, [1]))
    with pytest.raises(ModelError, match="known only at run time"):
        convert(model, cann="8.5")
    assert not lost(convert(model, cann="9.1").model, "9.1")


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT32])
@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceMax", "ReduceMin"])
def test_other_types(kind: str, dtype: int) -> None:
    for opset in (17, 18):
        feeds = {"x": values((2, 3, 8), dtype) * 3}
        same(reduction(kind, (1, 2), opset=opset, dtype=dtype), None, feeds, 1e-3)


def test_half_means_do_not_overflow() -> None:
    """The sum of 8 * 3 numbers near the type's end leaves it, their mean does not."""
    model = reduction("ReduceMean", (1, 2), dtype=TensorProto.FLOAT16)
    same(model, None, {"x": np.full((2, 3, 8), 60000, np.float16)}, 1e-3)


def test_infinite_log_sums() -> None:
    x = values((2, 3, 8))
    x[0, 0], x[1, 1, 2] = -np.inf, np.inf
    atc = convert(reduction("ReduceLogSumExp", (-1,), opset=17)).model
    (before,), (after,) = run(reduction("ReduceLogSumExp", (-1,)), {"x": x}), run(atc, {"x": x})
    np.testing.assert_allclose(before, after, rtol=1e-6)


@pytest.mark.parametrize(("line", "opset"), [("8.5", 17), ("9.0", 17), ("9.1", 18), ("9.2", 18)])
@pytest.mark.parametrize("source", [14, 17, 18])
def test_maxima_stay_where_the_opset_can_move(line: str, opset: int, source: int) -> None:
    atc = same(reduction("ReduceMax", (-1,), opset=source), line, {"x": values((2, 3, 8))})
    assert ops(atc) == ["ReduceMax"]
    assert atc.opset_import[0].version == (source if line in ("8.5", "9.0") and source < 18 else
                                           opset)  # fmt: skip


def test_an_operator_of_opset_18_keeps_the_opset_and_the_maximum_is_a_top_k() -> None:
    nodes = [
        helper.make_node("Mish", ["x"], ["t"], "m"),
        helper.make_node("ReduceMax", ["t", "axes"], ["y"], "r"),
    ]
    model = build(nodes, [("x", 1, [2, 3])], [("y", 1, None)], inits=[("axes", np.array([1]))])
    assert "TopK" in ops(same(model, "8.5", {"x": values((2, 3))}))
    assert "TopK" not in ops(same(model, "9.1", {"x": values((2, 3))}))


def test_a_split_without_sizes_survives_the_move_to_opset_18() -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["t"], "r", axes=[1]),
        helper.make_node("Split", ["t"], ["a", "b"], "s", axis=0),
        helper.make_node("Sub", ["a", "b"], ["y"], "d"),
    ]
    model = build(nodes, [("x", 1, [4, 3])], [("y", 1, None)], opset=13)
    atc = same(model, "9.1", {"x": values((4, 3))})
    assert atc.opset_import[0].version == 18


def test_a_long_product_is_refused_where_it_would_be_lost() -> None:
    model = reduction("ReduceProd", (-1,), dims=(2, 100), inner=True, opset=18)
    model.graph.node.insert(0, helper.make_node("Mish", ["x"], ["unused"], "m"))
    convert(model, cann="9.1")
    with pytest.raises(ModelError, match="ReduceProd over more than 64"):
        convert(model, cann="8.5")


def test_check_mends_a_foreign_file_for_its_line() -> None:
    for line, kind in itertools.product(CANN_VERSIONS, ("ReduceMean", "ReduceMax")):
        model = reduction(kind, (-1,))
        report = check(model, cann=line)
        fixed, changes = fix(model, report)
        assert bool(changes) == bool(lost(model, line)), (line, kind)
        assert not lost(fixed, line)


def test_the_line_is_checked() -> None:
    with pytest.raises(UsageError, match="expected one of"):
        convert(reduction("ReduceMax", (-1,)), cann="8.4")
