"""A hand-over is written whole, or not at all."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from sfa_onnx.ascend.handover import folder as handover
from sfa_onnx.errors import UsageError

SOC = "Ascend910B2"


def select(k, dim="n"):
    """A top-k over an open axis."""
    node = helper.make_node("TopK", ["x", "k"], ["values", "where"], "select")
    count = numpy_helper.from_array(np.array([k], np.int64), "k")
    outputs = [helper.make_tensor_value_info("values", 1, [2, k])]
    inputs = [helper.make_tensor_value_info("x", 1, [2, dim])]
    graph = helper.make_graph([node], "g", inputs, outputs, [count])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("dims", [{"n": 7}, {"n": "4,16"}, {"n": "4~16"}])
def test_dims_at_which_the_graph_stops_are_refused_before_anything_is_written(tmp_path, dims):
    onnx.save(select(8), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"top-k takes 8 of the [47] entries"):
        handover.write(tmp_path / "m.onnx", tmp_path / "out", soc_version=SOC, dims=dims)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]
    handover.write(tmp_path / "m.onnx", tmp_path / "out", soc_version=SOC, dims={"n": 8})
    assert (tmp_path / "out" / "atc.sh").is_file()


def test_a_failure_late_leaves_nothing(tmp_path):
    onnx.save(select(8), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="no array for x"):
        handover.write(tmp_path / "m.onnx", tmp_path / "out", soc_version=SOC, inputs={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


def test_a_failure_leaves_what_was_there_before(tmp_path):
    onnx.save(select(8), tmp_path / "m.onnx")
    out = tmp_path / "out"
    handover.write(tmp_path / "m.onnx", out, soc_version=SOC, dims={"n": 16})
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(UsageError):
        handover.write(tmp_path / "m.onnx", out, soc_version=SOC, inputs={}, force=True)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "out"]


def test_a_model_without_a_fused_operator_is_told_first(tmp_path):
    onnx.save(select(8), tmp_path / "m.onnx")
    report = handover.write(tmp_path / "m.onnx", tmp_path / "out", soc_version=SOC)
    assert report.lines()[0].startswith("this model holds no fused operator")


def test_a_folder_is_switched_whole_and_keeps_what_else_lies_in_it(tmp_path):
    onnx.save(select(8), tmp_path / "m.onnx")
    out = tmp_path / "out"
    handover.write(tmp_path / "m.onnx", out, soc_version=SOC, dims={"n": 16})
    (out / "built").mkdir()
    (out / "built" / "model.om").write_bytes(b"om")
    (out / "link").symlink_to("built/model.om")
    before, number = (out / "atc.sh").read_bytes(), out.stat().st_ino
    handover.write(tmp_path / "m.onnx", out, soc_version=SOC, dims={"n": 32}, force=True)
    assert (out / "atc.sh").read_bytes() != before
    assert out.stat().st_ino != number, "the folder itself was exchanged"
    assert (out / "link").read_bytes() == b"om"
    assert (out / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "out"]
