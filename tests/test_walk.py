"""Walks over a graph: each node once, as far as asked, captures told apart."""

from __future__ import annotations

import pytest
from onnx import helper, parser

from sfa_onnx.passes.find import search
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.walk import above, back, below
from tests.hand_sites import GATHER_INT8, changed, model_of
from tests.zoo import bodies

# a diamond behind a chain of views; `d` reads `b` twice
TEXT = """<ir_version: 8, opset_import: ["" : 18]>
g (float[2,3] x, float[2,3] y) => (float[6] out)
{ a = Identity(x)  b = Transpose(a)  c = Relu(b)  d = Mul(b, b)  e = Add(c, d)
  flat = Constant<value_ints = [-1]>()  f = Reshape(e, flat)  out = Neg(f)  dead = Exp(c) }"""


@pytest.fixture
def index() -> GraphIndex:
    return GraphIndex.of(parser.parse_model(TEXT))


def kinds(index: GraphIndex, nodes) -> list[str]:
    return sorted(index.nodes[i].op_type for i in nodes)


def test_above_meets_every_node_once_and_stops_where_told(index):
    every = kinds(index, above(index, ["out"], lambda _: True))
    assert every == sorted(
        ["Neg", "Reshape", "Constant", "Add", "Relu", "Mul", "Transpose", "Identity"]
    )
    until = kinds(index, above(index, ["out"], lambda n: n.op_type != "Add"))
    assert until == ["Add", "Constant", "Neg", "Reshape"], "the node it ends at is met as well"
    assert list(above(index, ["x", ""], lambda _: True)) == []
    assert len([*above(index, ["out"], lambda _: True, most=3)]) == 3


def test_below_meets_living_readers_once_with_the_place_they_read_at(index):
    found = {index.nodes[i].op_type: at for i, at in below(index, ["b"], lambda _: True)}
    assert found == {"Relu": 0, "Mul": 0, "Add": found["Add"], "Reshape": 0, "Neg": 0}
    assert "Exp" not in found, "no output needs it"
    near = below(index, ["b"], lambda n: n.op_type == "Relu")
    assert kinds(index, (i for i, _ in near)) == ["Add", "Mul", "Relu"]


def test_a_body_that_captures_a_value_reads_it_at_no_position():
    merged = bodies.in_if(parser.parse_model(TEXT), hoist=True)
    around = GraphIndex.of(merged)
    (owner,) = around.owners
    value = next(iter(around.captures(owner)))
    assert (owner, -1) in list(below(around, [value], lambda _: True))


def test_back_follows_first_inputs_through_the_kinds_named(index):
    assert list(back(index, "f", {"Reshape", "Add"})) == ["f", "e", "c"]
    assert list(back(index, "out", None)) == ["out", "f", "e", "c", "b", "a", "x"]
    assert list(back(index, "out", None, most=2)) == ["out", "f"]
    assert list(back(index, "x", None)) == ["x"]
    lonely = GraphIndex(helper.make_graph([], "g", [], []))
    assert list(back(lonely, "nobody", None)) == ["nobody"]


@pytest.mark.parametrize(
    ("indices", "times"),
    [("Identity(idx)", 1), ("Add(idx, nought)", 2)],
    ids=["read as they are", "computed"],
)
def test_a_site_is_bound_again_only_where_index_arithmetic_was_followed(
    monkeypatch, indices, times
):
    bound = []
    real = search.bind
    monkeypatch.setattr(search, "bind", lambda *a: bound.append(a) or real(*a))
    text = changed(
        GATHER_INT8,
        {"idx4 = Unsqueeze(idx,": f"nought = Constant<value_int = 0>() own = {indices} "
         "idx4 = Unsqueeze(own,"},
    )  # fmt: skip
    (site,) = search.find_candidates(GraphIndex.of(model_of(text)))
    assert (site.family, len(bound)) == ("int8", times)
