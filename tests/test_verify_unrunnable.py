"""Graphs around a site that cannot be run: the refusal says why in words for people."""

from __future__ import annotations

import sfa_onnx
from sfa_onnx.passes.verify.unrunnable import first_line, unrunnable
from tests.test_bind_more import _model

_BY_HAND = """
 top = ReduceMax<axes=[-1], noop_with_empty_axes=0>(s)
 less = Sub(s, top)
 e = Exp(less)
 total = ReduceSum(e, m1)
 p = Div(e, total)
"""


def test_an_attribute_that_the_opset_does_not_have_is_named():
    """onnx's version converter leaves noop_with_empty_axes behind below opset 18."""
    (site,) = sfa_onnx.fuse(_model(weights=_BY_HAND)).sites
    assert site.status == "refused"
    assert "has the attribute noop_with_empty_axes, which opset 17 does not know" in site.reason
    assert "remove noop_with_empty_axes" in site.hint


def test_other_failures_are_quoted():
    model = _model()
    assert "any probe size: no such thing" in unrunnable(model, ["no such thing"], "o").reason


def test_places_in_a_runtime_are_left_out():
    text = (
        "Reshape 'r': /src/onnxruntime/reshape_helper.h:91 onnxruntime::Helper(const Shape&, bool)"
        " input_shape_size == requested_shape_size was false.\nmore"
    )
    assert first_line(RuntimeError(text)) == (
        "Reshape 'r': input_shape_size == requested_shape_size was false."
    )
