"""What pointwise operators compute: two spellings of one number are one term."""

from __future__ import annotations

import onnx
import pytest

from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.trace import Ref, Tracer
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.values.read import Reader
from sfa_onnx.passes.values.table import normal
from sfa_onnx.passes.values.terms import Term

T = Label("t", 7)


def term(text: str) -> Term:
    """The element of `y` at t."""
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[7] x, float[7] z) => (float[7] y)
        <float zero = {{0}}, float one = {{1}}, float minus = {{-1}}, float two = {{2}},
         float half = {{0.5}}> {{ {text} }}""")
    index = GraphIndex.of(model)
    tracer = Tracer(index, Concrete(index), Concrete(index, second=True), 1000)
    inner = {o for node in model.graph.node for o in node.output}
    return Reader(tracer, normal(), inner).term(Ref("y", (Expr.of(T),)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("y = Reciprocal(x)", "y = Div(one, x)"),
        ("y = Pow(x, minus)", "y = Div(one, x)"),
        ("r = Reciprocal(z) y = Mul(x, r)", "y = Div(x, z)"),
        ("y = Neg(x)", "y = Mul(x, minus)"),
        ("n = Neg(z) y = Add(x, n)", "y = Sub(x, z)"),
        ("y = Pow(x, two)", "y = Mul(x, x)"),
        ("b = Greater(x, z) y = Where(b, x, z)", "b = Less(z, x) y = Where(b, x, z)"),
        ("y = Clip(x, half)", "y = Max(half, x)"),
        ('y = Clip(x, "", half)', "y = Min(half, x)"),
        ("y = Relu(x)", "y = Max(zero, x)"),
    ],
)
def test_two_spellings_are_one_term(one: str, other: str) -> None:
    assert term(one) == term(other) != term("y = Add(x, one)")


@pytest.mark.parametrize("text", ["y = Reciprocal(x)", "y = Pow(x, two)", "y = Neg(x)"])
def test_another_number_is_another_term(text: str) -> None:
    assert term(text) != term("y = Identity(x)")
    assert term(text) != term(text.replace("x", "z", 1))
