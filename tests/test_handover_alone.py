"""Hand-overs of one model with external weights do not meet: each script converts its own file."""

from __future__ import annotations

import os

import numpy as np
import onnx
from onnx import helper

from sfa_onnx.ascend.handover import folder as handover
from tests.test_handover import SOC, attention

RNG = np.random.default_rng(29)


def test_hand_overs_of_one_model_stand_alone(tmp_path):
    """bf16 and fp16 of one file with external weights: each script converts its own model."""
    model, _ = attention()
    weight = RNG.standard_normal((576, 576)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model.graph.node.append(helper.make_node("MatMul", ["side", "w"], ["side_out"], "mm"))
    model.graph.input.append(helper.make_tensor_value_info("side", 1, [1, 576]))
    model.graph.output.append(helper.make_tensor_value_info("side_out", 1, [1, 576]))
    source = tmp_path / "model"
    source.mkdir()
    onnx.save(model, source / "m.onnx", save_as_external_data=True, location="m.bin")
    reports = {
        line: handover.write(source / "m.onnx", tmp_path / line / "out", soc_version=SOC, cann=line)
        for line in ("8.5", "9.1", "9.2")
    }
    files = {line: report.model for line, report in reports.items()}
    assert len(set(files.values())) == 3
    bytes_before = {line: file.read_bytes() for line, file in files.items()}
    for line, report in reports.items():
        where = (report.folder / "atc.sh").read_text()
        assert f"--model={os.path.relpath(files[line], report.folder)} " in where
    for line in reversed(list(files)):  # written again, each meets its own file
        again = handover.write(
            source / "m.onnx", tmp_path / line / "out", soc_version=SOC, cann=line, force=True
        )
        assert again.model == files[line]
    assert {line: file.read_bytes() for line, file in files.items()} == bytes_before
