"""Files as other exporters and converters leave them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import sfa_onnx
from sfa_onnx.errors import ModelError
from sfa_onnx.passes.certificate import check_certificate
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete, SizesMeetError
from tests.zoo.elsewhere import Spec, build
from tests.zoo.write import Graph


def test_copies_of_a_function_are_one():
    model = build(Spec(edit="functions"))
    model.functions.append(model.functions[0])
    report = sfa_onnx.fuse(model)
    assert len(report.fused) == 1
    assert len({f.name for f in report.model.functions}) == len(report.model.functions)


def test_two_functions_of_one_name_are_an_error():
    model = build(Spec(edit="functions"))
    other = onnx.FunctionProto()
    other.CopyFrom(model.functions[0])
    other.node[0].op_type = "Greater"
    model.functions.append(other)
    with pytest.raises(ModelError, match=r"two functions lib::plain_.* that differ"):
        sfa_onnx.fuse(model)


def test_functions_far_from_attention_stay():
    model = build(Spec(edit="functions"))
    body = [helper.make_node("Neg", ["x"], ["y"])]
    opset = [model.opset_import[0]]
    model.functions.append(helper.make_function("lib", "far", ["x"], ["y"], body, opset))
    model.graph.node.append(helper.make_node("far", ["out"], ["twice"], domain="lib"))
    model.graph.output[0].name = "twice"
    fused = sfa_onnx.fuse(model).model
    assert [f.name for f in fused.functions] == ["far"]


def test_unsorted_files_are_sorted_and_certified(tmp_path):
    model = build(Spec(edit="unsorted", select="arithmetic"))
    before, proof = tmp_path / "m.onnx", tmp_path / "proof.json"
    onnx.save(model, before)
    report = sfa_onnx.fuse(before, tmp_path / "fused.onnx", certificate=proof)
    assert len(report.fused) == 1
    assert any("were sorted" in note for note in report.notes)
    onnx.checker.check_model(report.model)
    assert check_certificate(proof, before, tmp_path / "fused.onnx").holds


def test_an_open_rope_width_is_refused_for_it_becomes_an_attribute():
    report = sfa_onnx.fuse(_int8_with_rope("width"))
    assert not report.fused
    assert "the size width is open in the file" in report.refused[0].reason
    assert "rope_head_dim" in report.refused[0].reason
    assert len(sfa_onnx.fuse(_int8_with_rope(16)).fused) == 1


def _int8_with_rope(width: int | str) -> onnx.ModelProto:
    g = Graph(17)
    _, idx = g.op("TopK", "score", g.ints(8), outputs=2, axis=-1)
    at = g.unsqueeze(idx, -1)
    rows = {n: g.op("GatherND", n, at, batch_dims=1) for n in ("nope", "scale", "rope")}
    tiles = g.reshape(g.cast(rows["nope"], "f32"), 2, 1, 8, 2, 32)
    k = g.reshape(g.op("Mul", tiles, g.unsqueeze(rows["scale"], -1)), 2, 1, 8, 64)
    x = g.op("Add", *(
        g.op("MatMul", q, g.op("Transpose", y, perm=[0, 1, 3, 2]))
        for q, y in (("q", k), ("q_rope", rows["rope"]))
    ))  # fmt: skip
    p = g.op("Softmax", g.op("Mul", x, g.const(0.1, np.float32)), axis=-1)
    inputs = {
        "q": ("f32", (2, 1, 4, 64)),
        "q_rope": ("f32", (2, 1, 4, width)),
        "nope": ("i8", (2, 24, 64)),
        "scale": ("f32", (2, 24, 2)),
        "rope": ("f32", (2, 24, width)),
        "score": ("f32", (2, 1, 24)),
    }
    return g.model(inputs, {"out": ("f32", (2, 1, 4, 64))}, [g.op("MatMul", p, k)])


def _meeting(first: list[str], second: list[str], beside: list[str]) -> Concrete:
    """Two inputs are added with their first axes merged; a third lies beside them."""
    g = Graph(17)
    names = [g.reshape(x, -1, 4) for x in ("a", "b")]
    total = g.op("Add", *names)
    inputs = {"a": ("f32", (*first, 4)), "b": ("f32", (*second, 4)), "c": ("f32", beside)}
    model = g.model(inputs, {"out": ("f32", ("n", 4))}, [total])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return Concrete(GraphIndex.of(model))


def test_merged_axes_that_meet_are_paired_in_order():
    sizes = _meeting(["b1", "s1"], ["b2", "s2"], ["b1", "s2"])
    assert sizes.shape("out") is not None
    assert sizes.symbols["b1"] == sizes.symbols["b2"] != sizes.symbols["s1"] == sizes.symbols["s2"]


def test_axes_of_one_input_are_not_made_equal():
    with pytest.raises(SizesMeetError, match="do not declare them as equal"):
        _meeting(["b", "s"], ["t", "u"], ["b", "t"]).shape("out")


def test_many_names_for_one_size():
    g = Graph(17)
    total = "x0"
    for i in range(1, 14):
        total = g.op("Add", total, f"x{i}")
    inputs = {f"x{i}": ("f32", (f"n{i}", 4)) for i in range(14)}
    model = g.model(inputs, {"out": ("f32", ("n0", 4))}, [total])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert Concrete(GraphIndex.of(model)).shape("out") is not None
