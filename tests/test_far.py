"""Scores far from 0: what hand-written exponentials lose in float32 stands in the record."""

from __future__ import annotations

import numpy as np
import pytest

import sfa_onnx
from sfa_onnx.passes.verify.distance import UNDEFINED, relative_error
from tests.graphs import dense, gathered

OVER = "e = Exp(less)\nt = ReduceSum <keepdims = 1> (e, last)\nsoft = Div(e, t)"
SUM = '\nout = Einsum <equation = "bsht,btc->bshc"> (soft, kv)'
TOP = "top = ReduceMax <keepdims = 1> (masked, last)\n"
PLAIN = "less = Identity(masked)\n" + OVER + SUM
NEAR = (
    TOP
    + "nought = Constant <value = float {0.0}> ()\n"
    + "bound = Max(top, nought)\nless = Sub(masked, bound)\n"
    + OVER
    + SUM
)
SAFE = TOP + "less = Sub(masked, top)\n" + OVER + SUM


def noted(nodes: str) -> bool:
    (site,) = sfa_onnx.fuse(dense(tail=nodes)).sites
    assert site.status == "fused", site.reason
    assert site.record is not None
    return any("scores that are all beyond" in a for a in site.record.assumptions)


@pytest.mark.parametrize("nodes", [PLAIN, NEAR], ids=["plain", "near"])
def test_exponentials_that_vanish_in_float32_are_noted(nodes: str) -> None:
    assert noted(nodes)


def test_exponentials_below_their_maximum_lose_nothing() -> None:
    assert not noted(SAFE)


def test_nan_in_rows_that_see_keys_is_noted_and_the_rest_judged() -> None:
    want, got = np.array([1.0, np.nan, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 4.0])
    edges: set[str] = set()
    assert relative_error(want, got, edges) == 0
    assert edges == {UNDEFINED}
    assert relative_error(want, got + 1, edges) > 0.1
    assert relative_error(np.array([np.nan, np.nan, 1.0]), np.ones(3), edges) == np.inf
    assert relative_error(want, got) == np.inf


def test_an_input_of_no_known_type_refuses_its_site() -> None:
    model = dense()
    query = next(v for v in model.graph.input if v.name == "pe")
    query.type.tensor_type.elem_type = 0
    (site,) = sfa_onnx.fuse(model).sites
    assert site.status == "refused"
    assert "element type" in site.reason
    assert "report it" not in site.reason


def test_keys_that_are_none_in_any_run_refuse_their_site() -> None:
    model = gathered()
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value == 32:
                dim.dim_value = 0
    (site,) = sfa_onnx.fuse(model).sites
    assert "empty in every run" in site.reason
