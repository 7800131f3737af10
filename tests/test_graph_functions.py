"""Sites in local functions: what is inlined, how its nodes are named, and what stays."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import helper

import sfa_onnx
from sfa_onnx.passes import certificate
from sfa_onnx.passes.graph.functions import inline_functions
from tests.test_scopes import GATHERED, alike, case, fused
from tests.zoo import bodies as scopes

MLP = """
<domain: "local", opset_import: ["" : 17]>
Mlp (x) => (y) { t = Transpose(x) u = MatMul(x, t) y = MatMul(u, x) }
"""


def layered(count, attributes=None, **references):
    """A model of `count` calls of one attention function, and the feeds it takes."""
    model = case(GATHERED).build()
    function = scopes.as_function(model, "Attn", **references)
    made = scopes.calls(model, function, attributes or [{}] * count)
    feeds = {f"{n}.{i}": a for i in range(count) for n, a in case(GATHERED).feeds(i).items()}
    return made, feeds


def test_every_call_is_a_site_with_an_id_of_its_own():
    model, feeds = layered(3)
    report = fused(model, 3)
    ids = [s.site_id for s in report.fused]
    assert [i.split("/")[0] for i in ids] == ["layers.0", "layers.1", "layers.2"]
    assert [s.layer for s in report.fused] == ["layers.0.attn", "layers.1.attn", "layers.2.attn"]
    assert report.notes[0] == "local functions inlined: local::Attn"
    assert report.inlined == (("local", "Attn"),)
    assert [s.record.shared_with is None for s in report.fused] == [True, False, False]
    assert not report.model.functions
    alike(model, report.model, feeds)


def test_calls_with_other_attributes_are_other_sites():
    scale = next(n.input[1] for n in case(GATHERED).build().graph.node if n.op_type == "Mul")
    given = [{"by": 0.11}, {"by": 0.05}]
    model, feeds = layered(2, given, **{scale: "by"})
    report = fused(model, 2)
    scales = [
        a.f
        for n in report.model.graph.node
        if n.domain == "npu"
        for a in n.attribute
        if a.name == "scale_value"
    ]
    np.testing.assert_allclose(scales, [0.11, 0.05], rtol=1e-6)
    alike(model, report.model, feeds)


def test_functions_without_sites_stay_as_they_are():
    model, feeds = layered(2)
    mlp = onnx.parser.parse_function(MLP)
    model.functions.append(mlp)
    model.graph.input.append(helper.make_tensor_value_info("x", 1, [3, 3]))
    model.graph.output.append(helper.make_tensor_value_info("y", 1, [3, 3]))
    model.graph.node.append(helper.make_node("Mlp", ["x"], ["y"], "mlp", domain="local"))
    report = fused(model, 2)
    assert [f.SerializeToString() for f in report.model.functions] == [mlp.SerializeToString()]
    assert report.model.graph.node[-1] == model.graph.node[-1]
    feeds["x"] = np.eye(3, dtype=np.float32)
    alike(model, report.model, feeds)


def test_a_model_without_sites_keeps_all_its_functions():
    model, _ = layered(2)
    for node in model.functions[0].node:
        if node.op_type == "Softmax":
            node.op_type = "Sigmoid"
            del node.attribute[:]
    report = sfa_onnx.fuse(model)
    assert not report.fused
    assert [f.SerializeToString() for f in report.model.functions] == [
        f.SerializeToString() for f in model.functions
    ]


def test_a_site_spread_over_nested_functions():
    model = case(GATHERED).build()
    for node in model.graph.node:
        if node.op_type == "Softmax":
            node.op_type, node.domain, node.name = "aten_softmax", "local", "softmax_1"
            del node.attribute[:]
    attention = scopes.as_function(model, "Attn")
    attention.opset_import.append(helper.make_opsetid("local", 1))
    outer = scopes.calls(case(GATHERED).build(), attention, [{}, {}])
    outer.functions.append(
        onnx.parser.parse_function(
            '<domain: "local", opset_import: ["" : 17]>'
            " aten_softmax (x) => (y) { [n0] y = Softmax<axis = -1>(x) }"
        )
    )
    report = fused(outer, 2)
    assert [s.site_id for s in report.fused] == [
        "layers.0/attn/softmax_1/n0",
        "layers.1/attn/softmax_1/n0",
    ]
    assert not report.model.functions


def test_functions_called_in_bodies_and_bodies_in_functions():
    model, feeds = layered(2)
    inside = scopes.in_if(model)
    report = fused(inside, 4)
    assert {s.scope for s in report.fused} == {"decoder_if.then_branch", "decoder_if.else_branch"}
    assert len({s.site_id for s in report.sites}) == 4
    alike(inside, report.model, feeds | {scopes.COND: np.array(False)})
    branched = scopes.in_if(case(GATHERED).build(), suffix="/else")
    function = scopes.as_function(branched, "Decoder")
    around = scopes.calls(branched, function, [{}])
    report = fused(around, 2)
    path = "layers.0/attn/decoder_if.then_branch/layers.0/attn/softmax"
    assert any(s.site_id.startswith(path) for s in report.fused)
    feeds = {f"{n}.0": a for n, a in case(GATHERED).feeds(0).items()}
    alike(around, report.model, feeds | {f"{scopes.COND}.0": np.array(True)})


def test_metadata_of_a_call_goes_to_its_nodes():
    model, _ = layered(2)
    for i, node in enumerate(model.graph.node):
        node.metadata_props.add(key="namespace", value=f"model.layers.{i}.attn: Attn/attn: call")
    model.ir_version = 10
    report = fused(model, 2)
    assert [s.layer for s in report.fused] == ["model.layers.0.attn", "model.layers.1.attn"]


@pytest.mark.parametrize(("opset", "sites"), [(18, 1), (11, 0)])
def test_functions_of_another_opset(opset, sites):
    """Inlined where every operator means the same; else told, and the model is not rejected."""
    model, _ = layered(1)
    function = model.functions[0]
    function.opset_import[0].version = opset
    if opset < 13:  # axes were an attribute then
        (node,) = [n for n in function.node if n.op_type == "Unsqueeze"]
        del node.input[1:]
        node.attribute.append(helper.make_attribute("axes", [-1]))
    report = sfa_onnx.fuse(model)
    assert len(report.fused) == sites
    if not sites:
        (note,) = [n for n in report.notes if "was not looked into" in n]
        assert "local::Attn was not looked into: it imports opset 11 of 'ai.onnx'" in note


def test_a_certificate_names_what_was_inlined(tmp_path):
    model, _ = layered(2)
    onnx.save(model, tmp_path / "before.onnx")
    sfa_onnx.fuse(
        tmp_path / "before.onnx", tmp_path / "after.onnx", certificate=tmp_path / "proof.json"
    )
    assert json.loads((tmp_path / "proof.json").read_text())["inlined"] == [["local", "Attn"]]
    paths = (tmp_path / name for name in ("proof.json", "before.onnx", "after.onnx"))
    found = certificate.check_certificate(*paths)
    assert found.holds, found.problems


def test_inlining_is_the_same_each_time():
    model, _ = layered(3)
    one, other = (inline_functions(model, [("local", "Attn")]).model for _ in range(2))
    assert one == other
    names = [n.name for n in one.graph.node]
    assert len(set(names)) == len(names)
