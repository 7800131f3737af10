"""Sites in bodies of If, Loop and Scan are fused where they lie."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx import runtime
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
