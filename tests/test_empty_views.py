"""Reshapes with -1 beside 0: the size that was meant, or none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.ascend.checks import apply_fixes, check
from sfa_onnx.cli import main
from sfa_onnx.errors import ModelError
from sfa_onnx.files.empty_views import settled, unsettled
from sfa_onnx.runtime.compare.run import compare
from tests.test_flavour import build

Dims = Sequence[int | str | None]


def viewed(
    target: list[int], given: Dims = ("b", 1, 0), declared: Dims | None = None, *, zero: int = 1
) -> ModelProto:
    """A view of a tensor without elements, and its width as a second output."""
    nodes = [
        helper.make_node("Reshape", ["x", "to"], ["y"], "view", allowzero=zero),
        helper.make_node("Shape", ["y"], ["sizes"]),
    ]
    outputs = [("y", TensorProto.FLOAT, declared), ("sizes", TensorProto.INT64, None)]
    return build(
        nodes, [("x", TensorProto.FLOAT, given)], outputs, inits=[("to", np.array(target))]
    )


def shape_of(model: ModelProto, *dims: int) -> tuple[int, ...]:
    got = runtime.run(model, {"x": np.zeros(dims, np.float32)})
    assert tuple(got["sizes"]) == got["y"].shape
    return got["y"].shape


@pytest.mark.parametrize(
    ("target", "given", "dims", "want"),
    [
        ([-1, 1, 1, 0], ("b", 1, 0), (3, 1, 0), (3, 1, 1, 0)),
        ([1, 0, -1], (0, "b", None), (0, 3, 5), (1, 0, 15)),
        ([-1, 2, 0], ("b", 6, 0), (5, 6, 0), (15, 2, 0)),
        ([0, -1], ("b", "s", 0, 4), (2, 3, 0, 4), (0, 24)),
        ([-1, 4, 0], (2, 6, 0), (2, 6, 0), (3, 4, 0)),
        ([-1, 1, 0], ("b", 0), (0, 0), (0, 1, 0)),  # an open size may be 0 itself
    ],
)
def test_the_size_is_what_the_axes_around_the_empty_one_leave(target, given, dims, want) -> None:
    model = viewed(target, given)
    text = model.SerializeToString()
    new, told = settled(model)
    assert len(told) == 1
    assert "view (Reshape): -1 beside 0 is now" in told[0]
    assert not list(unsettled(new))
    onnx.shape_inference.infer_shapes(new, strict_mode=True)
    for form in (new, model, text):  # `session` mends by itself what onnxruntime refuses
        assert shape_of(form, *dims) == want
    assert model.SerializeToString() == text


@pytest.mark.parametrize(
    ("target", "given", "declared"),
    [
        ([-1, 1, 0], None, None),  # nothing known of the input
        ([-1, 0], ("b", "s"), None),  # which axis is empty is not known
        ([-1, 0, 0], ("b", 0), None),  # two axes became empty
        ([-1, 4, 0], ("b", 2, 0), None),  # half a batch
        ([-1, 1, 0], ("b", 1, 0), (2, 1, 0)),  # the file says otherwise
        ([-1, 0], ("b", "s", 0), ("s", 0)),
    ],
)
def test_what_is_not_told_is_left_and_refused(target, given, declared) -> None:
    model = viewed(target, given, declared)
    same, told = settled(model)
    assert same is model
    assert not told
    found = next(f for f in check(model).findings if f.rule == "reshape-open-empty")
    assert not found.fixable
    with pytest.raises(ModelError, match="asks for -1 beside 0"):
        runtime.session(model)


def test_a_zero_that_copies_is_no_such_view() -> None:
    model = viewed([-1, 0], ("b", 4), zero=0)
    assert not list(unsettled(model))
    assert shape_of(model, 3, 4) == (3, 4)


def test_a_body_is_mended_with_names_of_its_own() -> None:
    inner = viewed([-1, 1, 0], ("b", 0)).graph.node[0]
    inner.output[0] = "inner"
    taken = helper.make_node("Identity", ["x"], ["view/Shape"], "view/Gather")
    body = helper.make_graph(
        [inner], "body", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Unsqueeze", ["x", "one"], ["kept"])], "other", [],
        [helper.make_tensor_value_info("kept", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([1]), "one")],
    )  # fmt: skip
    branch = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=other)
    model = build(
        [taken, branch],
        [("x", TensorProto.FLOAT, ["b", 0]), ("c", TensorProto.BOOL, [])],
        [("y", TensorProto.FLOAT, None), ("view/Shape", TensorProto.FLOAT, None)],
        inits=[("to", np.array([-1, 1, 0]))],
    )
    new, told = settled(model)
    assert len(told) == 1
    for way in (True, False):
        feeds = {"x": np.zeros((3, 0), np.float32), "c": np.array(way)}
        assert runtime.run(new, feeds)["y"].shape == (3, 1, 0)


def test_every_verb_takes_it_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, fixed = tmp_path / "m.onnx", tmp_path / "fixed.onnx"
    onnx.save(viewed([-1, 1, 1, 0]), path)
    said = "view (Reshape): -1 beside 0 is now size 0 of its input"
    assert main(["run", str(path)]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    fused = sfa_onnx.fuse(path)
    assert any(said in note for note in fused.notes)
    assert not list(unsettled(fused.model))
    result = apply_fixes(onnx.load(path), check(path))
    assert any(said in line for line in result.applied)
    assert "reshape-open-empty" not in {f.rule for f in check(result.model).findings}
    onnx.save(result.model, fixed)
    onnx.shape_inference.infer_shapes(result.model, strict_mode=True)
    report = compare(path, fixed)
    assert report.passed
    assert any(said in note for note in report.notes)


def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    model = viewed([-1, 1, 1, 0])
    model.graph.node.append(helper.make_node("Add", ["w", "one"], ["z"]))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(300, np.float32), "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [300]))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin")
    got = runtime.run(tmp_path / "m.onnx", {"x": np.zeros((2, 1, 0), np.float32)})
    assert got["y"].shape == (2, 1, 1, 0)
    assert (got["z"] == 2).all()
