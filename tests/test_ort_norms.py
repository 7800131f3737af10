"""The vendor's norms inside onnxruntime: all outputs, every type, refusals with their reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from sfa_onnx import runtime
from tests.op_models import needs_library
from tests.test_flavour import build

T = TensorProto
RNG = np.random.default_rng(23)
pytestmark = needs_library(pytest.mark.filterwarnings("default"))


def one(
    x: tuple[int, ...], gamma: tuple[int, ...], *, adds: bool = False, dtype: int = T.FLOAT,
    gamma_type: int = T.FLOAT, other: tuple[int, ...] | None = None, **attributes: Any,
) -> ModelProto:  # fmt: skip
    names = ["x1", "x2", "gamma"] if adds else ["x", "gamma"]
    outs = ["y", "rstd", "sum"][: len(names)]
    node = helper.make_node("NPUAddRmsNorm" if adds else "NPURmsNorm", names, outs, "n",
                            domain="npu", **attributes)  # fmt: skip
    shapes = [x, other or x, gamma] if adds else [x, gamma]
    types = [dtype] * (len(names) - 1) + [gamma_type]
    inputs = [(n, t, list(s)) for n, t, s in zip(names, types, shapes, strict=True)]
    kinds = [dtype, T.FLOAT, dtype]
    outputs = [(o, k, None) for o, k in zip(outs, kinds, strict=False)]
    return build([node], inputs, outputs, domains=["npu"])


def drawn(model: ModelProto) -> dict[str, Any]:
    return {
        v.name: RNG.standard_normal([d.dim_value for d in v.type.tensor_type.shape.dim]).astype(
            helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)
        )
        for v in model.graph.input
    }


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    ("x", "gamma"), [((40, 33), (33,)), ((2, 3, 4, 8), (4, 8)), ((0, 4), (4,))]
)
def test_all_outputs(x: Any, gamma: Any, adds: bool) -> None:
    model = one(x, gamma, adds=adds)
    given = drawn(model)
    got = runtime.run(model, given)
    axes = tuple(range(-len(gamma), 0))
    wide = given["x1"] + given["x2"] if adds else given["x"]
    exact = wide.astype(np.float64)
    rstd = 1 / np.sqrt((exact**2).mean(axes, keepdims=True) + 1e-6)
    np.testing.assert_allclose(got["rstd"], rstd, rtol=1e-6)
    np.testing.assert_allclose(got["y"], exact * rstd * given["gamma"], rtol=1e-5, atol=1e-6)
    if adds:
        np.testing.assert_array_equal(got["sum"], wide)


@pytest.mark.parametrize("gamma_type", [T.FLOAT, T.FLOAT16])
def test_half_precision_with_either_gamma(gamma_type: int) -> None:
    model = one((5, 16), (16,), dtype=T.FLOAT16, gamma_type=gamma_type)
    given = drawn(model)
    x = given["x"].astype(np.float64)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * given["gamma"]
    got = runtime.run(model, given)["y"]
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_an_epsilon_that_is_given_is_used() -> None:
    model = one((3, 8), (8,), epsilon=0.5)
    given = drawn(model)
    x = given["x"].astype(np.float64)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5) * given["gamma"]
    np.testing.assert_allclose(runtime.run(model, given)["y"], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (one((3, 8), (7,)), r"input gamma: shape \[7\]: expected the last dimensions of \[3,8\]"),
        (one((8,), (2, 8)), r"input gamma: shape \[2,8\]"),
        (one((3, 8), (8,), adds=True, other=(1, 8)), r"input x2: shape \[1,8\]: expected x1's"),
        (one((3, 8), (8,), epsilon=-1.0), r"attribute epsilon: -1, expected 0 or more"),
    ],
)
def test_refusals(model: ModelProto, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        runtime.run(model, drawn(model))
