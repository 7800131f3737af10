"""MatMul with a tensor of one axis is the sum that numpy says it is."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.trace import Dot, Ref, Tracer
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 3, 4), (4,)), ((4,), (4, 5)), ((4,), (2, 4, 5)), ((4,), (4,)), ((1, 4), (4,))],
)
def test_a_product_with_a_vector_is_traced(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    known = {"a": rng.standard_normal(a), "b": rng.standard_normal(b)}
    want = np.matmul(known["a"], known["b"])
    given = ", ".join(f"float[{','.join(map(str, x.shape))}] {n}" for n, x in known.items())
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>\n'
        f"g ({given}) => (float[{','.join(map(str, want.shape))}] y) {{ y = MatMul(a, b) }}"
    )
    index = GraphIndex.of(model)
    tracer = Tracer(index, Concrete(index), Concrete(index, second=True), 100)
    labels = [Label(f"l{i}", size) for i, size in enumerate(want.shape)]
    step = tracer.step(Ref("y", tuple(map(Expr.of, labels))))
    assert isinstance(step, Dot)
    for place in itertools.product(*(range(n) for n in want.shape)):
        at = dict(zip(labels, place, strict=True))
        total = 0.0
        for i in range(step.label.size):
            at[step.label] = i
            total += np.prod(
                [
                    known[side.value][
                        tuple(c.const + sum(at[x] * n for x, n in c.terms) for c in side.coords)
                    ]
                    for side in (step.a, step.b)
                ]
            )
        np.testing.assert_allclose(total, want[place])
