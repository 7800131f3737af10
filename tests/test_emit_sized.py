"""Sizes that no tensor of a site shows are computed from the dims of the inputs."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from sfa_onnx.passes.axes.trace import Stop, Tracer
from sfa_onnx.passes.emit.emitter import Emitter
from sfa_onnx.passes.emit.sized import sized
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.form import Call, Form, largest, quotient, smallest
from tests.zoo.write import Graph

PAST, SEQ, B = (Form.of(x) for x in ("past", "seq", "b"))
TOTAL = PAST.plus(SEQ)


def emitter() -> Emitter:
    g = Graph(18)
    out = g.op("Concat", "cache", "new", axis=1)
    inputs = {"cache": ("f32", ("b", "past", 2)), "new": ("f32", ("b", "seq", 2))}
    index = GraphIndex.of(g.model(inputs, {"out": ("f32", ("b", "t", 2))}, [out]))
    return Emitter(Tracer(index, Concrete(index), Concrete(index, second=True), 1000), "site")


@pytest.mark.parametrize(
    "form",
    [
        Form(const=7),
        SEQ,
        TOTAL,
        smallest(Form(const=8), TOTAL),
        largest(PAST.plus(Form(const=3), -1), SEQ).times(B).plus(Form(const=2)),
        quotient(TOTAL.plus(Form(const=3)), Form(const=4)).times(Form(const=-2)).plus(B),
    ],
    ids=str,
)
def test_a_form_as_nodes_computes_what_it_says(form: Form) -> None:
    e = emitter()
    name = e.emit("Identity", [sized(e, e.tracer.sizes, form)], "size", TensorProto.INT64)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 3) for n in e.used]
    out = helper.make_tensor_value_info(name, TensorProto.INT64, [1])
    graph = helper.make_graph(e.nodes, "size", values, [out], initializer=e.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for b, past, seq in ((1, 1, 1), (2, 5, 3), (3, 9, 4)):
        shapes = {"cache": (b, past, 2), "new": (b, seq, 2)}
        given = {n: np.zeros(shapes[n], np.float32) for n in e.used}
        (got,) = session.run([name], given)
        assert got.tolist() == [form({"b": b, "past": past, "seq": seq})]


def test_what_only_a_run_tells_is_refused() -> None:
    e = emitter()
    unknown = Form.of(Call("size", (Form.of("x"), Form())))
    with pytest.raises(Stop, match="can only be known by running the model"):
        sized(e, e.tracer.sizes, unknown)
    with pytest.raises(Stop, match="no input shows the size other"):
        sized(e, e.tracer.sizes, Form.of("other"))
