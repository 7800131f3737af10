"""A declared size of 0 is legal in ONNX: such sites are refused in words, never by a fault."""

from __future__ import annotations

import onnx
import pytest

import sfa_onnx
from sfa_onnx.errors import ModelError
from tests.graphs import dense, dense_int8, gathered


@pytest.mark.parametrize("make", [dense, dense_int8, gathered])
def test_any_axis_of_an_input_may_be_empty(make) -> None:
    whole = make()
    places = [
        (i, axis)
        for i, value in enumerate(whole.graph.input)
        for axis in range(len(value.type.tensor_type.shape.dim))
    ]
    for i, axis in places:
        model = onnx.ModelProto.FromString(whole.SerializeToString())
        model.graph.input[i].type.tensor_type.shape.dim[axis].dim_value = 0
        try:
            sites = sfa_onnx.fuse(model).sites
        except ModelError:
            continue
        assert not any("failed" in s.reason for s in sites), (
            model.graph.input[i].name,
            axis,
            sites,
        )
