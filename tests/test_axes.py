"""Index expressions: whatever views do to a tensor, tracing says where each element came from."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.passes.axes.expr import Expr, Label, Quot, Read, Rem, merge, split
from sfa_onnx.passes.axes.named import axes_of, axis_of
from sfa_onnx.passes.axes.trace import Move, Ref, Stop, Tracer
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete


def evaluate(expr: Expr, at: dict[Label, int]) -> int:
    total = expr.const
    for atom, coefficient in expr.terms:
        if isinstance(atom, Label):
            own = at[atom]
        elif isinstance(atom, Quot):
            own = evaluate(atom.expr, at) // atom.by
        else:
            assert isinstance(atom, Rem)
            own = evaluate(atom.expr, at) % atom.by
        total += own * coefficient
    return total


def tracer(model: onnx.ModelProto, budget: int = 10_000) -> Tracer:
    index = GraphIndex.of(model)
    return Tracer(index, Concrete(index), Concrete(index, second=True), budget)


def deepest(trace: Tracer, ref: Ref) -> Ref:
    while isinstance(step := trace.step(ref), Move):
        ref = step.ref
    return ref


@st.composite
def factorisations(draw, total: int) -> list[int]:
    dims = []
    while total > 1:
        divisors = [d for d in range(2, total + 1) if total % d == 0]
        dims.append(draw(st.sampled_from(divisors)))
        total //= dims[-1]
    for _ in range(draw(st.integers(0, 2))):
        dims.insert(draw(st.integers(0, len(dims))), 1)
    return dims


@st.composite
def chains(draw) -> tuple[onnx.ModelProto, np.ndarray]:
    """A random chain of views over a tensor that holds its own positions."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    data = np.arange(math.prod(shape)).reshape(shape)
    source, nodes, constants, name = data, [], [], "x"
    for i in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["Reshape", "Transpose", "Slice", "Unsqueeze", "Identity"]))
        out, inputs, attrs = f"v{i}", [name], {}
        if kind == "Reshape":
            dims = draw(factorisations(data.size)) or [1]
            constants.append(numpy_helper.from_array(np.array(dims), f"c{i}"))
            inputs.append(f"c{i}")
            data = data.reshape(dims)
        elif kind == "Transpose":
            perm = draw(st.permutations(range(data.ndim)))
            attrs["perm"] = list(perm)
            data = data.transpose(perm)
        elif kind == "Slice":
            axis = draw(st.integers(0, data.ndim - 1))
            start = draw(st.integers(0, data.shape[axis] - 1))
            stop = draw(st.integers(start + 1, data.shape[axis]))
            for k, v in zip("sea", (start, stop, axis), strict=True):
                constants.append(numpy_helper.from_array(np.array([v]), f"{k}{i}"))
                inputs.append(f"{k}{i}")
            data = data.take(range(start, stop), axis=axis)
        elif kind == "Unsqueeze":
            constants.append(numpy_helper.from_array(np.array([0]), f"u{i}"))
            inputs.append(f"u{i}")
            data = data[None]
        nodes.append(helper.make_node(kind, inputs, [out], **attrs))
        name = out
    graph = helper.make_graph(
        nodes,
        "views",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(source.shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(data.shape))],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    return model, data


@settings(deadline=None, max_examples=80)
@given(chains())
def test_tracing_views_agrees_with_numpy(case):
    model, data = case
    labels = [Label(f"i{k}", d) for k, d in enumerate(data.shape)]
    out = model.graph.output[0].name
    ref = deepest(tracer(model), Ref(out, tuple(map(Expr.of, labels))))
    assert ref.value == "x"
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    for place in list(np.ndindex(*data.shape))[:200]:
        at = dict(zip(labels, place, strict=True))
        coords = [evaluate(c, at) for c in ref.coords]
        assert int(np.ravel_multi_index(coords, shape)) == int(data[place])


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 60).flatmap(lambda n: st.tuples(st.just(n * 4), factorisations(n * 4))))
def test_splitting_a_position_and_merging_it_is_the_position(case):
    size, dims = case
    position = Expr.of(Label("p", size))
    assert merge(split(position, tuple(dims)), tuple(dims)) == position


def test_an_index_in_range_stays_inside_its_batch():
    b, s = Expr.of(Label("b", 3)), Expr.of(Label("s", 7))
    read = Expr.of(Read("idx", (b, s)))
    assert split(b * 50 + read, (3, 50)) == (b, read)


def test_an_index_into_pages_is_split_into_page_and_place():
    batch, slot = Expr.of(Label("b", 2)), Expr.of(Label("k", 4))
    index = Expr.of(Read("indices", (batch, slot)))
    pages = split(merge((batch, index), (2, 24)), (2, 3, 8))
    assert pages == (batch, index.floordiv(8), index.mod(8))
    assert merge(pages, (2, 3, 8)) == merge((batch, index), (2, 24))


def test_a_view_that_cannot_be_kept_is_named_not_lost():
    d = Expr.of(Label("d", 6))
    assert str(d.floordiv(4)) == "(d)//4"
    assert str(d.mod(4)) == "(d)%4"


def test_rows_written_in_place_are_read_from_the_update():
    """Keys assembled as ScatterND(ScatterND(empty, nope), rope)."""
    graph = helper.make_graph(
        [
            helper.make_node("ConstantOfShape", ["dims"], ["empty"]),
            helper.make_node("ScatterND", ["empty", "first", "nope"], ["half"]),
            helper.make_node("ScatterND", ["half", "second", "rope"], ["key"]),
        ],
        "assembly",
        [
            helper.make_tensor_value_info("nope", TensorProto.FLOAT, [4, 5]),
            helper.make_tensor_value_info("rope", TensorProto.FLOAT, [2, 5]),
        ],
        [helper.make_tensor_value_info("key", TensorProto.FLOAT, [6, 5])],
        [
            numpy_helper.from_array(np.array([6, 5]), "dims"),
            numpy_helper.from_array(np.arange(4).reshape(4, 1), "first"),
            numpy_helper.from_array(np.arange(4, 6).reshape(2, 1), "second"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    trace = tracer(model)
    column = Expr.of(Label("t", 5))
    rope = Expr.of(Label("r", 2)) + 4
    assert deepest(trace, Ref("key", (rope, column))).value == "rope"
    nope = Expr.of(Label("n", 4))
    assert deepest(trace, Ref("key", (nope, column))) == Ref("nope", (nope, column))


def test_the_budget_stops_with_a_reason():
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"v{i}"], [f"v{i + 1}"]) for i in range(50)],
        "long",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("v50", TensorProto.FLOAT, [2])],
    )
    trace = tracer(helper.make_model(graph), budget=20)
    with pytest.raises(Stop, match="more steps"):
        deepest(trace, Ref("v50", (Expr.of(Label("i", 2)),)))


def test_blocks_of_columns_behind_blocks_of_keys() -> None:
    """(48 * key + column) // 192 = key // 4 where columns are fewer than 48."""
    key, column = Label("key", 12), Label("column", 32)
    position = Expr.of(key) * 48 + Expr.of(column)
    assert position.floordiv(192) == Expr.of(key).floordiv(4)
    assert position.mod(192) == Expr.of(key).mod(4) * 48 + Expr.of(column)
    wide = Expr.of(key) * 24 + Expr.of(column)  # columns reach into the next key
    assert wide.floordiv(96) != Expr.of(key).floordiv(4)


def test_an_axis_that_is_not_repeated_is_read_as_it_is() -> None:
    """Heads are repeated by Tile behind a gather: rows stay those that the indices name."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2,5,1,3] rows, int64[2,4] idx) => (float[2,5,6,3] out)
        <int64[4] by={1,1,6,1}> { out = Tile(rows, by) }"""
    )
    trace = tracer(model)
    batch, head, column = Label("b", 2), Label("h", 6), Label("c", 3)
    read = Expr.of(Read("idx", (Expr.of(batch), Expr())))
    found = deepest(trace, Ref("out", (Expr.of(batch), read, Expr.of(head), Expr.of(column))))
    assert found == Ref("rows", (Expr.of(batch), read, Expr(), Expr.of(column)))


def test_a_single_number_has_no_axis() -> None:
    scatter = helper.make_node("ScatterElements", ["x", "at", "new"], ["y"], axis=-1)
    for rank, axis, expected in ((3, -1, 2), (3, 2, 2), (1, 0, 0)):
        scatter.attribute[0].i = axis
        assert axis_of(scatter, rank) == expected
    for rank, axis in ((0, 0), (0, -1), (2, 2), (2, -3)):
        scatter.attribute[0].i = axis
        with pytest.raises(Stop, match=rf"ScatterElements names the axes \[{axis}\] of {rank}"):
            axis_of(scatter, rank)
    assert axes_of(scatter, [-1, 0], 3) == [0, 2]
