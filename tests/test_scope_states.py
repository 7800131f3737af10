"""What If, Loop and Scan return, and what they carry, is as good as an input."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.test_scopes import GATHERED, alike, case, fused
from tests.zoo import bodies as scopes


def chosen(model, name, *, declared):
    """`model` with the input `name` returned by an If: one of two inputs."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    info = next(v for v in out.graph.input if v.name == name)
    kept = [v for v in out.graph.input if v.name != name]
    branches = []
    for k in "ab":
        given, result = onnx.ValueInfoProto(), onnx.ValueInfoProto()
        given.CopyFrom(info)
        result.CopyFrom(info)
        given.name, result.name = f"{name}.{k}", f"{name}.{k}/out"
        kept.append(given)
        copied = helper.make_node("Identity", [given.name], [result.name])
        branches.append(helper.make_graph([copied], k, [], [result]))
    node = helper.make_node(
        "If", [scopes.COND], [name], "choice", then_branch=branches[0], else_branch=branches[1]
    )
    if declared:
        out.graph.value_info.append(info)
    del out.graph.input[:]
    kept.append(helper.make_tensor_value_info(scopes.COND, TensorProto.BOOL, []))
    out.graph.input.extend(kept)
    out.graph.node.insert(0, node)
    return out


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("name", ["query", "kv", "indices"])
def test_what_an_if_returns_is_as_good_as_an_input(name, declared):
    model = chosen(case(GATHERED).build(), name, declared=declared)
    report = fused(model, 1)
    by = "If choice" if name == "indices" else "the caller"
    assert f"indices are in range: discharged by {by}" in report.fused[0].record.assumptions
    feeds = case(GATHERED).feeds(0)
    feeds |= {f"{name}.{k}": feeds[name] for k in "ab"} | {scopes.COND: np.array(True)}
    del feeds[name]
    alike(model, report.model, feeds)


def test_indices_that_a_loop_carries():
    model = case(GATHERED).build()
    report = fused(scopes.in_loop(model, ("indices",)), 1)
    assert "indices are in range: discharged by the caller" in report.fused[0].record.assumptions
    looped = scopes.in_loop(model, ("indices",))
    body = looped.graph.node[-1].attribute[0].g
    body.node[-1].op_type = "Abs"  # no longer handed on as it is
    report = fused(looped, 1)
    by = "discharged by Loop steps"
    assert f"indices are in range: {by}" in report.fused[0].record.assumptions


def test_a_state_may_have_the_name_of_its_initial_value():
    model = scopes.in_loop(case(GATHERED).build(), ("kv", "indices"), trips=2)
    body = model.graph.node[-1].attribute[0].g
    for node in body.node:
        node.input[:] = [i.removesuffix("/it") for i in node.input]
    for info in body.input:
        info.name = info.name.removesuffix("/it")
    alike(model, fused(model, 1).model, case(GATHERED).feeds(0))


def test_weights_captured_by_a_loop_are_absorbed_with_a_note():
    model = case("exp-official-ts").build()
    loop = scopes.in_loop(model, trips=2)
    body = loop.graph.node[-1].attribute[0].g
    loop.graph.initializer.extend(body.initializer)
    body.ClearField("initializer")
    report = fused(loop, 1)
    assert any("run in every iteration" in note for note in report.fused[0].bound)
    alike(loop, report.model, case("exp-official-ts").feeds(0))
    once = fused(scopes.in_if(model, suffix="/else"), 2)
    assert not any("every iteration" in note for s in once.fused for note in s.bound)
