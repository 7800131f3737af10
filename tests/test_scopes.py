"""Sites in bodies of If, Loop and Scan are fused where they lie."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.errors import ModelError, VerificationError
from sfa_onnx.kv_convert import convert
from sfa_onnx.passes import certificate
from sfa_onnx.passes.graph.sub_graphs import captured
from sfa_onnx.passes.plan import write_plan
from sfa_onnx.runtime.compare.run import compare
from tests.zoo import bodies as scopes
from tests.zoo.catalogue import cases


def case(name):
    return next(c for c in cases(f"^{name}$"))


def fused(model, sites):
    """The fused model, valid, with that many sites."""
    onnx.checker.check_model(model)
    report = sfa_onnx.fuse(model)
    assert len(report.fused) == sites, [(s.site_id, s.reason) for s in report.sites]
    onnx.checker.check_model(report.model)
    return report


def alike(before, after, feeds, tolerance=2e-5):
    want, got = runtime.run(before, feeds), runtime.run(after, feeds)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=tolerance, atol=tolerance)


GATHERED = "hand-float-nd_batch"
FORMS = {
    "if": (lambda m: scopes.in_if(m), 2, "decoder_if.then_branch"),
    "if, constants outside": (lambda m: scopes.in_if(m, hoist=True, suffix="/e"), 2, "decoder_if"),
    "loop": (lambda m: scopes.in_loop(m), 1, "steps.body/"),
    "loop, states": (
        lambda m: scopes.in_loop(m, tuple(v.name for v in m.graph.input), declared=False),
        1,
        "steps.body/",
    ),
    "if in a loop": (lambda m: scopes.nested(m), 2, "steps.body/decoder_if.then_branch/"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [GATHERED, "hand-int8-nd_batch", "hf-eager-prefill-dynamo"])
def test_sites_fuse_in_bodies(form, name):
    wrap, sites, path = FORMS[form]
    model = wrap(case(name).build())
    report = fused(model, sites)
    assert all(s.site_id.startswith(path) or "else" in s.site_id for s in report.fused)
    assert all(s.scope and s.site_id.startswith(s.scope) for s in report.fused)
    for branch in (True, False):
        alike(model, report.model, case(name).feeds(0) | _condition(model, branch))


def _condition(model, value):
    asked = any(v.name == scopes.COND for v in model.graph.input)
    return {scopes.COND: np.array(value)} if asked else {}


def test_a_certificate_covers_the_nodes_of_bodies(tmp_path):
    model = scopes.in_if(case(GATHERED).build(), first=1, suffix="/else")
    onnx.save(model, tmp_path / "before.onnx")
    sfa_onnx.fuse(
        tmp_path / "before.onnx", tmp_path / "after.onnx", certificate=tmp_path / "proof.json"
    )

    def check():
        paths = (tmp_path / name for name in ("proof.json", "before.onnx", "after.onnx"))
        return certificate.check_certificate(*paths)

    found = check()
    assert found.holds, found.problems
    assert any(".then_branch/" in name for name in found.difference.removed_nodes)
    assert found.difference.moved_nodes == ()
    owner = next(o for o in model.graph.node if o.op_type == "If").output[0]
    assert owner not in found.difference.removed_nodes
    edited = onnx.load(tmp_path / "after.onnx")
    body = next(n for n in edited.graph.node if n.op_type == "If").attribute[0].g
    body.node[0].doc_string = "edited"
    onnx.save(edited, tmp_path / "after.onnx")
    assert not check().holds


def test_a_plan_names_sites_by_their_path(tmp_path):
    model = scopes.nested(case(GATHERED).build())
    report = sfa_onnx.fuse(model)
    plan = write_plan(report, tmp_path / "plan.yaml")
    then, other = (s.site_id for s in report.fused)
    plan.write_text(plan.read_text().replace("fuse: true", "fuse: false", 1))
    again = sfa_onnx.fuse(model, plan=plan)
    assert [s.site_id for s in again.fused] == [other]
    left = next(s for s in again.sites if s.site_id == then)
    assert left.reason == "left out by the plan"
    with pytest.raises(VerificationError, match="2 sites were fused, 3 were expected"):
        sfa_onnx.fuse(model, expect_sites=3)


def test_unfuse_works_in_bodies():
    model = scopes.nested(case(GATHERED).build())
    report = sfa_onnx.unfuse(fused(model, 2).model)
    assert [s.status for s in report.sites] == ["unfused"] * 2
    assert {s.scope for s in report.sites} == {
        "steps.body/decoder_if.then_branch",
        "steps.body/decoder_if.else_branch",
    }
    alike(model, report.model, case(GATHERED).feeds(0) | {scopes.COND: np.array(True)})


# -- near misses ----------------------------------------------------------------------------------


def body_of(model, branch="then_branch"):
    owner = next(n for n in model.graph.node if n.attribute and n.op_type == "If")
    return next(a.g for a in owner.attribute if a.name == branch)


def node_of(graph, op):
    return next(n for n in graph.node if n.op_type == op)


def reasons(model):
    """scope -> reason, of everything that did not fuse."""
    onnx.checker.check_model(model)
    return {s.scope.rpartition(".")[2]: s.reason for s in sfa_onnx.fuse(model).refused}


def test_an_inner_value_that_is_a_body_output():
    model = scopes.in_if(case(GATHERED).build(), suffix="/else")
    owner = model.graph.node[-1]
    owner.output.append("p")
    for branch in ("then_branch", "else_branch"):
        body = body_of(model, branch)
        p = node_of(body, "Softmax").output[0]
        body.output.append(helper.make_tensor_value_info(p, TensorProto.FLOAT, None))
    found = reasons(model)
    assert set(found) == {"then_branch", "else_branch"}
    for branch, reason in found.items():
        p = node_of(body_of(model, branch), "Softmax").output[0]
        assert reason == f"the inner value {p} is a graph output"


def test_an_inner_value_that_a_nested_body_captures():
    model = scopes.in_if(case(GATHERED).build(), suffix="/else")
    body = body_of(model)
    p = node_of(body, "Softmax").output[0]
    branches = [
        helper.make_graph(
            [helper.make_node(op, [p], [f"inner/{op}"])],
            op,
            [],
            [helper.make_tensor_value_info(f"inner/{op}", TensorProto.FLOAT, None)],
        )
        for op in ("Neg", "Abs")
    ]
    body.node.append(
        helper.make_node(
            "If", [scopes.COND], ["leak"], "reader", then_branch=branches[0],
            else_branch=branches[1],
        )
    )  # fmt: skip
    last = body.output[0].name
    body.node.append(helper.make_node("ReduceSum", ["leak"], ["leaked"], keepdims=0))
    body.node.append(helper.make_node("Add", [last, "leaked"], ["with leak"]))
    body.output[0].name = "with leak"
    found = reasons(model)
    assert set(found) == {"then_branch"}
    wanted = f"the inner value {p} is used outside the attention by reader"
    assert found["then_branch"] == wanted


def test_what_lies_outside_must_be_an_operand():
    """Products outside, softmax inside: no operand is left that the operator could take."""
    model = case(GATHERED).build()
    at = [n.op_type for n in model.graph.node].index("Softmax")
    found = reasons(scopes.in_if(model, first=at, suffix="/else"))
    assert all(
        r.endswith(f"computed outside of decoder_if.{b}, the body that holds the softmax")
        for b, r in found.items()
    )
    assert len(found) == 2
    softmax = model.graph.node[at].name
    outside = scopes.in_if(model, first=at + 1)
    assert reasons(outside) == {
        "": f"the attention weights of Softmax {softmax} are used in a body of If decoder_if,"
        " and the softmax lies outside"
    }


DENSE = """
<ir_version: 10, opset_import: ["": 20]>
dense (float[B,4,8] q, float[B,6,8] kv) => (float[B,4,8] out) {
    keys = Transpose <perm = [0, 2, 1]> (kv)
    scores = MatMul (q, keys)
    p = Softmax <axis = -1> (scores)
    out = MatMul (p, kv)
}
"""


def test_weights_that_select_nothing_may_go_into_a_body():
    """Attention to all keys is no site, whichever graph its softmax lies in."""
    dense = onnx.parser.parse_model(DENSE)
    for first in (0, 2, 3):  # everything inside; products outside; the softmax outside
        split = scopes.in_if(dense, first=first, suffix="/else")
        onnx.checker.check_model(split)
        assert sfa_onnx.fuse(split).sites == []


@pytest.mark.parametrize(
    ("name", "step"),
    [(GATHERED, 1), ("hand-int8-nd_batch", 4), ("hand-mask-scatter_max-nodes", 3)],
)
def test_the_border_may_lie_anywhere(name, step):
    """Wherever outside ends and inside begins: fused with the same numbers, or told why not."""
    model = case(name).build()
    feeds = case(name).feeds(0) | {scopes.COND: np.array(True)}
    kinds = [n.op_type for n in model.graph.node]
    for first in range(0, kinds.index("Softmax"), step):
        split = scopes.in_if(model, first=first, suffix="/else")
        report = sfa_onnx.fuse(split)
        if report.fused:
            assert len(report.fused) == 2
            onnx.checker.check_model(report.model)
            alike(split, report.model, feeds)
        else:
            assert all("computed outside of" in s.reason for s in report.refused), first
            assert {"MatMul", "Einsum", "ReduceSum"} & set(kinds[:first])


def test_the_border_may_lie_anywhere_before_or_behind_an_indexer():
    """In each branch, or once outside: what selects is fused where its TopK lies."""
    hf = case("hf-eager-decode-dynamo")
    model = hf.build()
    at = [n.op_type for n in model.graph.node].index("TopK")
    for first in (0, at - 1, at, at + 1):
        split = scopes.in_if(model, first=first, suffix="/else")
        report = fused(split, 2)
        where = ["decoder_if.else_branch", "decoder_if.then_branch"] if first <= at else [""]
        assert sorted(s.scope for s in report.selections if s.status == "fused") == where
        for branch in (True, False):
            alike(split, report.model, hf.feeds(0) | {scopes.COND: np.array(branch)})


def test_values_that_only_a_replaced_body_read_go_too():
    model = case("hand-int8-nd_batch").build()
    last = [n.op_type for n in model.graph.node].index("Softmax") - 3
    split = scopes.in_if(model, first=last, suffix="/else")
    report = fused(split, 2)
    read = {i for n in report.model.graph.node for i in n.input}
    read |= captured(report.model.graph.node[-1])
    assert all(set(n.output) & read for n in report.model.graph.node[:-1])
    assert all(t.name in read for t in report.model.graph.initializer)
    one = scopes.in_if(model, first=last, other=model)
    node_of(body_of(one, "else_branch"), "Softmax").op_type = "Identity"
    node_of(body_of(one, "else_branch"), "Identity").ClearField("attribute")
    kept = sfa_onnx.fuse(one)
    assert [s.scope for s in kept.fused] == ["decoder_if.then_branch"]
    onnx.checker.check_model(kept.model)
    alike(one, kept.model, case("hand-int8-nd_batch").feeds(0) | {scopes.COND: np.array(False)})


def test_a_body_may_use_an_outer_name_for_something_else():
    """An initializer of the body hides one of the same name outside: each stays what it is."""
    model = scopes.in_if(case(GATHERED).build(), first=2, suffix="/else")
    body = body_of(model)
    scale = node_of(body, "Mul").input[1]
    outer = next(t for t in model.graph.initializer if t.name == scale)
    body.initializer.append(numpy_helper.from_array(np.float32(0.5).reshape(outer.dims), scale))
    report = fused(model, 2)
    for branch in (True, False):
        alike(model, report.model, case(GATHERED).feeds(0) | {scopes.COND: np.array(branch)})


@pytest.mark.parametrize(
    ("name", "first"), [("hand-int8-nd_batch", 11), ("hand-mask-scatter_max-nodes", 10)]
)
def test_outer_values_made_of_a_hidden_name_are_taken_as_given(name, first):
    """Outside, values are made from constants whose names mean other numbers inside."""
    base = case(name).build()
    model = scopes.in_if(base, first=first, suffix="/else")
    taken = {i for n in model.graph.node[:-1] for i in n.input}
    hidden = [t for t in model.graph.initializer if t.name in taken]
    model.graph.value_info.extend(base.graph.value_info)
    for tensor in hidden:
        other = numpy_helper.from_array(numpy_helper.to_array(tensor) * 0, tensor.name)
        body_of(model).initializer.append(other)
    assert hidden or name != "hand-int8-nd_batch"
    report = sfa_onnx.fuse(model)
    onnx.checker.check_model(report.model)
    for branch in (True, False):
        alike(model, report.model, case(name).feeds(0) | {scopes.COND: np.array(branch)})


def test_branches_of_other_sizes():
    """Each branch is read with its own sizes: K keys here, fewer there."""
    small = next(c for c in cases("^hand-float-nd_batch$")).build()
    other = onnx.ModelProto()
    other.CopyFrom(small)
    cut = [
        numpy_helper.from_array(np.asarray([v], np.int64), n)
        for n, v in (("cut/0", 0), ("cut/5", 5), ("cut/a", -1))
    ]
    other.graph.initializer.extend(cut)
    node = helper.make_node("Slice", ["indices", "cut/0", "cut/5", "cut/a"], ["fewer"], "fewer")
    for n in other.graph.node:
        n.input[:] = ["fewer" if i == "indices" else i for i in n.input]
    other.graph.node.insert(0, node)
    del other.graph.value_info[:]
    model = scopes.in_if(small, other=other, suffix="/else")
    report = fused(model, 2)
    for branch in (True, False):
        alike(model, report.model, case(GATHERED).feeds(0) | {scopes.COND: np.array(branch)})


# -- the other verbs ------------------------------------------------------------------------------


def test_comparing_and_converting_say_that_sites_lie_in_bodies():
    name = "hf-eager-decode-dynamo"
    model = scopes.in_if(case(name).build(), suffix="/else")
    report = fused(model, 2)
    after = report.model
    assert [s.status for s in report.selections] == ["fused"] * 2  # an indexer in each branch
    compared = compare(model, after)
    assert compared.passed
    assert any(n.startswith("4 fused operators lie in bodies") for n in compared.notes)
    assert not any("no fused site" in n for n in compared.notes)
    with pytest.raises(ModelError, match=r"lie in bodies of If.*decoder_if\.\w+_branch/"):
        convert(after, to="packed-int8")


def test_portable_operators_run_in_bodies():
    model = scopes.nested(case(GATHERED).build())
    portable = sfa_onnx.fuse(model, portable=True).model
    assert [f.domain for f in portable.functions] == ["npu"]
    feeds = case(GATHERED).feeds(0) | {scopes.COND: np.array(True)}
    plain = ort.InferenceSession(portable.SerializeToString(), providers=["CPUExecutionProvider"])
    want = runtime.run(model, feeds)
    for info, got in zip(plain.get_outputs(), plain.run(None, feeds), strict=True):
        np.testing.assert_allclose(got, want[info.name], rtol=2e-5, atol=2e-5)


# -- below control flow ---------------------------------------------------------------------------
