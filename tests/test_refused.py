"""What onnxruntime refuses without saying why."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sfa_onnx import runtime
from sfa_onnx.errors import ModelError
from tests.test_flavour import build


def viewed(target: list[int], *, allowzero: int = 1) -> onnx.ModelProto:
    node = helper.make_node("Reshape", ["x", "to"], ["y"], "view", allowzero=allowzero)
    inputs = [("x", TensorProto.FLOAT, ["b", 2, 0])]
    return build([node], inputs, [("y", 1, None)], inits=[("to", np.array(target))])


def test_an_open_size_of_an_empty_tensor_is_named() -> None:
    """One that nothing around tells: half a batch."""
    model = viewed([-1, 1, 4, 0])
    for given in (model, model.SerializeToString()):
        with pytest.raises(ModelError, match=r"view \(Reshape\) asks for -1 beside 0"):
            runtime.session(given)
    got = runtime.run(viewed([1, 1, 4, 0]), {"x": np.zeros((2, 2, 0), np.float32)})
    assert got["y"].shape == (1, 1, 4, 0)


def test_other_refusals_stay_as_they_are() -> None:
    model = viewed([3, 1, 1, 0])
    model.graph.node[0].input[1] = "x"
    with pytest.raises(ModelError) as caught:
        runtime.session(model)
    assert "asks for -1" not in str(caught.value)
