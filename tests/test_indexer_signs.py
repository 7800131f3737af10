"""Which values are never negative: claimed only where every run agrees."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.indexer.signs import assumed_positive
from sfa_onnx.passes.shapes.concrete import Concrete

NEVER = {
    "of keys": " a = Abs(x)\n m = ReduceMax<axes=[-1]>(a)\n y = Div(m, c)\n",
    "a norm": " n = ReduceL2<axes=[-1]>(x)\n r = Reciprocal(n)\n y = Reshape(r, shape)\n",
    "a floor": " y = Clip(x, zero)\n",
    "a floor and a ceiling": " y = Clip(x, zero, c)\n",
    "unsigned codes": " a = Abs(x)\n u = Cast<to=2>(a)\n y = Cast<to=1>(u)\n",
    "the larger of both": " y = Max(x, zero)\n",
    "squares": " s = Mul(x, x)\n m = ReduceMean<axes=[-1]>(s)\n y = Sqrt(m)\n",
    "an even power": " y = Pow(x, c2)\n",
    "chosen": " a = Abs(x)\n b = Greater(x, zero)\n y = Where(b, x_up, a)\n",
}
GIVEN = {
    "as it is": " y = Identity(x)\n",
    "joined": " a = Abs(x)\n y = Concat<axis=0>(x, a)\n",
    "written into": " a = Abs(x)\n y = ScatterND(x, rows, a)\n",
    "an odd power": " y = Pow(x, c3)\n",
    "a low floor": " y = Clip(x, minus)\n",
}
MAYBE = {
    "the larger of two": " y = Max(x, minus)\n",
    "turned": " y = Neg(x)\n",
    "taken away": " y = Sub(x, c)\n",
    "a negative factor": " a = Abs(x)\n y = Mul(a, minus)\n",
    "a logarithm": " a = Abs(x)\n y = Log(a)\n",
    "a ceiling below zero": " a = Abs(x)\n y = Clip(a, , minus)\n",
    "a floor above its ceiling": " y = Clip(x, zero, minus)\n",
    "codes that wrap": " a = Abs(x)\n b = Mul(a, c)\n i = Cast<to=3>(b)\n y = Cast<to=1>(i)\n",
    "unsigned codes read as signed": " a = Abs(x)\n b = Mul(a, c)\n u = Cast<to=2>(b)\n"
    " i = Cast<to=3>(u)\n y = Cast<to=1>(i)\n",
    "the size of the lowest code": " i = Cast<to=3>(x)\n a = Abs(i)\n y = Cast<to=1>(a)\n",
    "a wave": " y = Sin(x)\n",
}


def _model(nodes: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>\nsigns (float[3,4] x) => (float y)\n'
        "<float c={127.0}, float zero={0.0}, float minus={-2.0}, float c2={2.0}, float c3={3.0},"
        f" int64[1] shape={{-1}}, int64[3,1] rows={{2,1,0}}> {{\n x_up = Exp(x)\n{nodes}}}"
    )


@pytest.mark.parametrize("kind", NEVER)
def test_what_is_never_negative_is_known(kind: str) -> None:
    model = _model(NEVER[kind])
    assert assumed_positive(Concrete(GraphIndex(model.graph)), "y") == []
    model.graph.output[0].ClearField("type")
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    session = ort.InferenceSession(model.SerializeToString())
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    assert (session.run(["y"], {"x": x})[0] >= 0).all()


@pytest.mark.parametrize("kind", GIVEN)
def test_what_depends_on_inputs_names_them(kind: str) -> None:
    assert assumed_positive(Concrete(GraphIndex(_model(GIVEN[kind]).graph)), "y") == ["x"]


@pytest.mark.parametrize("kind", MAYBE)
def test_what_may_be_negative_is_not_claimed(kind: str) -> None:
    assert assumed_positive(Concrete(GraphIndex(_model(MAYBE[kind]).graph)), "y") is None
