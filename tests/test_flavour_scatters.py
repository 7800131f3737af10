"""ScatterElements with a reduction on CANN lines that ignore it: written out, same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from sfa_onnx.ascend.checks import check, fix
from sfa_onnx.ascend.flavour import convert
from sfa_onnx.errors import ModelError
from tests.test_flavour import build, ops, run

RNG = np.random.default_rng(5)


def scatter(
    kind: str, axis: int, dims, index_dims, *, dtype: int = TensorProto.FLOAT, index: int = 7
) -> ModelProto:
    node = helper.make_node(
        "ScatterElements", ["x", "i", "u"], ["y"], "s", axis=axis, reduction=kind
    )
    inputs = [("x", dtype, list(dims)), ("i", index, list(index_dims)), ("u", dtype, index_dims)]
    return build([node], inputs, [("y", dtype, None)])


def feeds(axis: int, shape, index_shape, dtype=np.float32, index=np.int64):
    size = shape[axis]
    return {
        "x": (RNG.standard_normal(shape) * 8).astype(dtype),
        "i": RNG.integers(-size, size, index_shape).astype(index),  # equal and negative ones
        "u": (RNG.standard_normal(index_shape) * 8).astype(dtype),
    }


@pytest.mark.parametrize("line", ["8.5", "9.0", None])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("kind", ["add", "max", "min", "mul"])
def test_same_numbers(kind: str, axis: int, line: str | None) -> None:
    shape, index_shape = (2, 3, 5), [2, 3, 5]
    index_shape[axis] = 7
    for dtype, index in ((np.float32, np.int64), (np.int32, np.int32)):
        elem, places = (helper.np_dtype_to_tensor_dtype(np.dtype(t)) for t in (dtype, index))
        dims = list(shape)
        model = scatter(kind, axis, dims, index_shape, dtype=elem, index=places)
        atc = convert(model, cann=line).model
        assert "ScatterElements" not in ops(atc)
        given = feeds(axis, shape, index_shape, dtype, index)
        np.testing.assert_allclose(run(model, given)[0], run(atc, given)[0], rtol=1e-6, atol=1e-5)


def test_open_dims_along_the_axis() -> None:
    model = scatter("add", 1, (2, "n"), (2, "m"))
    atc = convert(model, cann="9.0").model
    for n, m in ((4, 6), (3, 1)):
        given = feeds(1, (2, n), (2, m))
        np.testing.assert_allclose(run(model, given)[0], run(atc, given)[0], rtol=1e-6, atol=1e-5)


def test_lines_that_read_the_reduction_keep_the_node() -> None:
    model = scatter("add", 0, (4, 2), (3, 2))
    for line in ("9.1", "9.2"):
        assert ops(convert(model, cann=line).model) == ["ScatterElements"]


def test_the_check_tells_the_lines_apart_and_mends() -> None:
    model = scatter("max", 0, (4, 2), (3, 2))
    assert "scatterelements-reduction" not in {f.rule for f in check(model, cann="9.1").findings}
    report = check(model, cann="9.0")
    assert "scatterelements-reduction" in {f.rule for f in report.of("error")}
    fixed, changes = fix(model, report)
    assert len(changes) == 1
    assert not check(fixed, cann="9.0").of("error")


@pytest.mark.parametrize(
    "model",
    [scatter("add", 0, (4, 2), (3, 1)), scatter("add", 0, (4, "n"), (3, "n"))],
)  # fmt: skip
def test_what_is_not_written_out_is_refused(model: ModelProto) -> None:
    with pytest.raises(ModelError, match="ignores the reduction"):
        convert(model, cann="8.5")
    assert ops(convert(model, cann="9.1").model) == ops(convert(model).model) == ["ScatterElements"]


@pytest.mark.parametrize("kind", ["add", "max"])
def test_rows_scattered_by_tuples(kind: str) -> None:
    node = helper.make_node("ScatterND", ["x", "i", "u"], ["y"], "s", reduction=kind)
    inputs = [("x", 1, [3, 4, 5]), ("i", 7, [6, 2]), ("u", 1, [6, 5])]
    model = build([node], inputs, [("y", 1, None)])
    atc = convert(model, cann="8.5").model
    assert not {"ScatterElements", "ScatterND"} & set(ops(atc))
    given = feeds(0, (3, 4, 5), (6, 5))
    given["i"] = np.stack([RNG.integers(-3, 3, 6), RNG.integers(-4, 4, 6)], -1)
    np.testing.assert_allclose(run(model, given)[0], run(atc, given)[0], rtol=1e-6, atol=1e-5)
