"""Nodes moved off AI CPU: only where nothing changes, and never where a number might not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from sfa_onnx import runtime
from sfa_onnx.ascend.checks import check, fix, trial
from sfa_onnx.ascend.checks.fixing import apply_fixes
from sfa_onnx.ascend.checks.ranges import value_range
from sfa_onnx.ascend.flavour.scope import Facts, Names, Scope
from sfa_onnx.ascend.handover import write
from sfa_onnx.cli import main
from tests.test_flavour import build, ops, run

SOC = "Ascend910_9391"
RNG = np.random.default_rng(11)


def moved(model: ModelProto, rule: str) -> ModelProto:
    """The model after `fix`, which had to report and apply `rule`."""
    report = check(model, soc_version=SOC)
    assert rule in {f.rule for f in report.fixable}
    fixed, lines = fix(model, report)
    assert any(line.startswith(rule) for line in lines), lines
    return fixed


def on_ai_cpu(model: ModelProto) -> set[str]:
    rows = check(model, soc_version=SOC).support
    return {row.op_type for row in rows if row.engines["A3"] == "AI CPU"}


def test_an_unsorted_top_k_is_sorted() -> None:
    nodes = [helper.make_node("TopK", ["x", "k"], ["v", "i"], "top", sorted=0, axis=1)]
    inits = [("k", np.array([9]))]
    model = build(nodes, [("x", 1, [4, 64])], [("v", 1, None), ("i", 7, None)], inits=inits)
    fixed = moved(model, "topk-unsorted")
    assert on_ai_cpu(model) == {"TopK"}
    assert not on_ai_cpu(fixed)
    x = RNG.standard_normal((4, 64)).astype(np.float32)
    for a, b in zip(run(model, {"x": x}), run(fixed, {"x": x}), strict=True):
        np.testing.assert_array_equal(np.sort(a, 1), np.sort(b, 1))


def mask(axis: int, dims: list[int], index: list[int], *, value: str = "expand") -> ModelProto:
    """Scores masked by scattering one value: the way exporters write top-k masks."""
    nodes = [helper.make_node("ScatterElements", ["x", "i", "u"], ["y"], "s", axis=axis)]
    inits: list[Any] = [("u", np.zeros(index, np.float32))]
    if value == "expand":
        nodes.insert(0, helper.make_node("Expand", ["zero", "shape"], ["u"], "e"))
        inits = [("zero", np.float32(0.5)), ("shape", np.array(index))]
    if value == "mixed":
        inits[0][1].reshape(-1)[-1] = 1.0
    return build(nodes, [("x", 1, dims), ("i", 7, index)], [("y", 1, None)], inits=inits)


@pytest.mark.parametrize("value", ["expand", "constant"])
@pytest.mark.parametrize(("axis", "index"), [(-1, [2, 3, 4]), (1, [2, 2, 8]), (0, [5, 3, 8])])
def test_a_mask_is_compared_instead_of_scattered(axis: int, index: list[int], value: str) -> None:
    model = mask(axis, [2, 3, 8], index, value=value)
    fixed = moved(model, "scatter-mask")
    assert "ScatterElements" not in ops(fixed)
    assert not on_ai_cpu(fixed) - {"Reshape"}
    size = [2, 3, 8][axis]
    feeds = {
        "x": RNG.standard_normal((2, 3, 8)).astype(np.float32),
        "i": RNG.integers(-size, size, index),  # negative and equal ones
    }
    np.testing.assert_array_equal(run(model, feeds)[0], run(fixed, feeds)[0])


def test_a_selection_written_as_a_mask_is_compared_at_once() -> None:
    """As transformers writes it over known sizes: two findings at one node, one change."""
    nodes = [
        helper.make_node("TopK", ["scores", "k"], ["best", "i"], "top"),
        helper.make_node("Expand", ["yes", "all"], ["none"], "none"),
        helper.make_node("Expand", ["no", "few"], ["u"], "u"),
        helper.make_node("ScatterElements", ["none", "i", "u"], ["y"], "s", axis=-1),
    ]
    inits = [("yes", np.array(True)), ("no", np.array(False)), ("k", np.array([4]))]
    inits += [("all", np.array([2, 3, 8])), ("few", np.array([2, 3, 4]))]
    inputs = [("scores", 1, [2, 3, 8])]
    model = build(nodes, inputs, [("y", TensorProto.BOOL, None)], inits=inits)
    report = check(model, soc_version=SOC)
    assert {"scatter-dtype", "scatter-mask"} <= {f.rule for f in report.fixable}
    result = apply_fixes(model, report)
    assert [line.split(":")[0] for line in result.applied] == ["scatter-mask"]
    assert not result.skipped
    assert not on_ai_cpu(result.model) - {"Reshape"}
    feeds = {"scores": RNG.standard_normal((2, 3, 8)).astype(np.float32)}
    np.testing.assert_array_equal(run(model, feeds)[0], run(result.model, feeds)[0])


@pytest.mark.parametrize(
    "model",
    [
        mask(-1, [2, 3, 8], [2, 3, 4], value="mixed"),
        mask(-1, [2, 3, 8], [2, 2, 4]),  # leaves rows of the data alone
        mask(-1, [1, 4096, 4096], [1, 4096, 64]),  # too many comparisons
    ],
)
def test_scatters_that_stay(model: ModelProto) -> None:
    rules = {f.rule for f in check(model, soc_version=SOC).findings}
    assert "scatter-mask" not in rules
    assert "engine-ai-cpu" in rules


def test_a_scatter_without_an_axis_stays() -> None:
    rules = {f.rule for f in check(mask(0, [], []), soc_version=SOC).findings}
    assert "scatter-mask" not in rules


def top_k_then(*nodes: Any, inits: Any = (), outputs: Any = ("y",)) -> ModelProto:
    first = helper.make_node("TopK", ["x", "k"], ["v", "i"], "top")
    given = [("k", np.array([8])), *inits]
    outs = [(o, TensorProto.INT64, None) for o in outputs]
    return build([first, *nodes], [("x", 1, [2, 64]), ("n", 7, [1])], outs, inits=given)


def test_indices_are_divided_in_int32() -> None:
    """The page and the slot of a selected token: Div and Mod by the page size."""
    page = [("page", np.array(16))]
    div = helper.make_node("Div", ["i", "page"], ["y"], "page_of")
    mod = helper.make_node("Mod", ["i", "page"], ["z"], "slot_of")
    model = top_k_then(div, mod, inits=page, outputs=("y", "z"))
    fixed = moved(model, "int64-fits")
    assert on_ai_cpu(model) == {"Div", "Mod"}
    assert not on_ai_cpu(fixed)
    feeds = {"x": RNG.standard_normal((2, 64)).astype(np.float32), "n": np.array([0])}
    for a, b in zip(run(model, feeds), run(fixed, feeds), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("node", "inits"),
    [
        (helper.make_node("Mod", ["n", "m"], ["y"], "m"), [("m", np.array(16))]),  # n: any int64
        (helper.make_node("Div", ["i", "m"], ["y"], "d"), [("m", np.array(2**30))]),
        (helper.make_node("Mod", ["i", "n"], ["y"], "m"), []),
    ],
)
def test_numbers_that_may_not_fit_stay_in_int64(node: Any, inits: Any) -> None:
    model = top_k_then(node, inits=inits)
    assert "int64-fits" not in {f.rule for f in check(model, soc_version=SOC).findings}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([("Mul", ["i", "c"], {})], (0, 63 * 5)),
        ([("Sub", ["c", "i"], {})], (5 - 63, 5)),
        ([("Neg", ["i"], {})], (-63, 0)),
        ([("Mod", ["i", "c"], {})], (-4, 4)),
        ([("Min", ["i", "c"], {})], (0, 5)),
        ([("Max", ["i", "c"], {})], (5, 63)),
        ([("Div", ["i", "c"], {})], (0, 12)),
        ([("Div", ["i", "n"], {})], None),
        ([("Add", ["i", "n"], {})], None),
        ([("Shape", ["x"], {})], (0, 64)),
        ([("Cast", ["x"], {"to": 7})], None),
        ([("Cast", ["b"], {"to": 7})], (0, 1)),
        ([("Concat", ["i", "i"], {"axis": 0})], (0, 63)),
    ],
)
def test_ranges(nodes: Any, expected: Any) -> None:
    made = [helper.make_node(op, ins, ["y"], "r", **kw) for op, ins, kw in nodes]
    model = top_k_then(*made, inits=[("c", np.array(5))])
    model.graph.input.append(helper.make_tensor_value_info("b", TensorProto.BOOL, [3]))
    scope = Scope(model.graph, Names(model), Facts.of(model), 18)
    assert value_range(scope, "y") == expected


def test_a_mask_is_gathered_as_int8() -> None:
    """Whether the selected keys are visible: a bool mask at the indices of TopK."""
    node = helper.make_node("GatherElements", ["m", "i"], ["y"], "seen", axis=-1)
    inputs = [("m", TensorProto.BOOL, ["b", 64]), ("i", TensorProto.INT64, ["b", 8])]
    model = build([node], inputs, [("y", TensorProto.BOOL, ["b", 8])])
    fixed = moved(model, "gather-bool")
    assert on_ai_cpu(model) == {"GatherElements"}
    assert not on_ai_cpu(fixed)
    feeds = {"m": RNG.integers(0, 2, (3, 64)).astype(bool), "i": RNG.integers(-64, 64, (3, 8))}
    np.testing.assert_array_equal(run(model, feeds)[0], run(fixed, feeds)[0])


def top_k_of_a_size(axis: int) -> ModelProto:
    """The first min(8, size) of the last axis of [b, past, "64"]."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape"),
        helper.make_node("Slice", ["s", "from", "to"], ["n"], "size"),
        helper.make_node("Min", ["n", "most"], ["k"], "min"),
        helper.make_node("TopK", ["x", "k"], ["v", "i"], "top"),
    ]
    bounds = {"from": [axis], "to": [axis + 1], "most": [8]}
    inits = [(n, np.array(v)) for n, v in bounds.items()]
    return build(nodes, [("x", 1, ["b", "past", "64"])], [("i", 7, None)], inits=inits)


def test_a_dim_spelled_as_text_is_a_number_and_a_bound_one_proves_k(tmp_path: Path) -> None:
    """transformers' exporter writes "64" for 64; `check --dim` binds the others."""
    for axis, known in ((1, False), (2, True)):
        found = {f.rule: f.fixable for f in check(top_k_of_a_size(axis)).findings}
        assert found["topk-computed-k"] == known
    path, out = tmp_path / "m.onnx", tmp_path / "f.onnx"
    onnx.save(top_k_of_a_size(1), path)
    command = [str(path), "--soc-version", SOC, "--fix", "-o", str(out)]
    assert main(["check", *command, "--dim", "past=5"]) == 0
    fixed = onnx.load(out)
    k = next(n.input[1] for n in fixed.graph.node if n.op_type == "TopK")
    value = next(t for t in fixed.graph.initializer if t.name == k)
    assert onnx.numpy_helper.to_array(value).tolist() == [5]
    assert fixed.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 5
    for wrong in ("none=5", "past=2~8", "past=0"):
        assert main(["check", *command, "--force", "--dim", wrong]) == 2


def test_atc_fixes_for_the_dims_it_is_given(tmp_path: Path) -> None:
    """A k computed from the cache's length is a constant for the one length atc compiles for."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape", start=1, end=2),
        helper.make_node("Min", ["s", "most"], ["k"], "min"),
        helper.make_node("TopK", ["x", "k"], ["v", "i"], "top"),
    ]
    inits = [("most", np.array([8]))]
    model = build(nodes, [("x", 1, ["b", "past"])], [("v", 1, None)], inits=inits)
    onnx.save(model, tmp_path / "m.onnx")
    given = {"b": 2, "past": 5}
    report = write(tmp_path / "m.onnx", tmp_path / "out", soc_version="Ascend910B2", dims=given)
    assert "the file is for b=2, past=5 only" in report.notes
    made = onnx.load(report.model)
    constants = {t.name for t in made.graph.initializer}
    assert next(n for n in made.graph.node if n.op_type == "TopK").input[1] in constants
    x = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    np.testing.assert_array_equal(runtime.run(report.model, {"x": x})["v"], -np.sort(-x, 1))
    ranged = write(
        tmp_path / "m.onnx",
        tmp_path / "open",
        soc_version="Ascend910B2",
        dims={"b": 2, "past": "2~9"},
    )
    assert not [note for note in ranged.notes if note.startswith("fixed:")]


@pytest.mark.parametrize("dims", [[4, 0], [0, 4]])
def test_indices_into_nothing_are_not_drawn(dims: list[int]) -> None:
    """An axis without elements has no legal index, and a trial run needs one."""
    nodes = [helper.make_node("GatherND", ["x", "i"], ["y"])]
    model = build(nodes, [("x", 1, dims), ("i", 7, [3, 2])], [("y", 1, None)])
    scope = Scope(model.graph, Names(model), Facts.of(model), 18)
    assert trial._draw(scope, model.graph.node[0], "i") is None
