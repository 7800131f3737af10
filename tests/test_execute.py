"""Running models that onnxruntime alone would not run."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from sfa_onnx.cli import main
from sfa_onnx.errors import ModelError
from sfa_onnx.runtime.execute import runnable
from tests.attention_cases import make_case
from tests.op_models import needs_library, op_model


def product(kind: int) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["a", "b"], ["y"], name="product")]
    inputs = [helper.make_tensor_value_info(n, kind, [2, 2]) for n in "ab"]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", kind, [2, 2])]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@needs_library
def test_a_bfloat16_model_runs_as_its_float32_twin_and_says_so(tmp_path, capsys):
    path = tmp_path / "b.onnx"
    onnx.save(product(TensorProto.BFLOAT16), path)
    assert main(["run", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "float32[2, 2]" in printed
    assert "float32 twin was run" in printed


@needs_library
def test_what_onnxruntime_runs_itself_is_run_as_it_is(tmp_path):
    path = tmp_path / "ours.onnx"
    onnx.save(op_model(make_case(), symbolic=False), path)
    session, note = runnable(path)
    assert not note
    assert session.get_outputs()[0].type == "tensor(bfloat16)"


def test_other_refusals_stay(tmp_path):
    model = product(TensorProto.FLOAT)
    model.graph.node[0].domain = "nobody"
    model.opset_import.append(helper.make_opsetid("nobody", 1))
    path = tmp_path / "x.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelError, match="refuses"):
        runnable(path)
