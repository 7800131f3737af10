"""Sites in bodies of If, Loop and Scan are fused where they lie."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.errors import VerificationError
from sfa_onnx.passes import certificate
from sfa_onnx.passes.plan import write_plan
from tests import scope_models as scopes
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
