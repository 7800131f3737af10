"""What a sound model is: one rule broken at a time, by every verb, before anything else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sfa_onnx
from sfa_onnx.errors import BudgetError, ModelError
from sfa_onnx.files.model import load_model
from sfa_onnx.files.sound import problems
from sfa_onnx.files.sound_nodes import NodeRules
from tests.broken_models import BROKEN, doubling, sound
from tests.zoo import bodies


@pytest.mark.parametrize("name", BROKEN)
def test_one_broken_rule_is_told(name):
    change, text = BROKEN[name]
    model = sound()
    assert problems(model) == []
    change(model)
    with pytest.raises(ModelError) as caught:
        load_model(model)
    message = str(caught.value)
    assert text in message, message
    assert "not a sound ONNX model" in message
    assert "Export it again" in message


def test_many_problems_are_counted_and_three_are_told():
    model = sound()
    model.graph.output.extend(onnx.ValueInfoProto(name=f"o{i}") for i in range(9))
    with pytest.raises(ModelError, match=r"'o2'.*; and 6 more"):
        load_model(model)


def test_any_order_of_nodes_is_sound_as_long_as_one_runs():
    model = sound()
    nodes = list(
        reversed([onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node])
    )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert problems(model) == []


@pytest.mark.parametrize("hoist", [True, False])
def test_bodies_see_the_values_around_them(hoist):
    assert problems(bodies.in_if(sound(), hoist=hoist)) == []


def test_a_cycle_through_a_body_is_seen():
    model = sound()
    out = model.graph.output[0].name
    branch = helper.make_graph(
        [helper.make_node("Relu", [out], ["r"])],
        "branch",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    model.graph.node.append(
        helper.make_node("If", ["flag"], ["looped"], then_branch=branch, else_branch=branch)
    )
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    assert problems(model) == []
    maker = next(n for n in model.graph.node if out in n.output)
    maker.input[0] = "looped"
    assert any("depends on itself" in p for p in problems(model))


def test_functions_that_double_are_refused_by_their_budget(monkeypatch):
    report = sfa_onnx.fuse(doubling(5))
    assert report.nodes_before > 0
    with pytest.raises(
        BudgetError, match=r"4194\d\d\d nodes.*nodes after inlining.*SFA_ONNX_MAX_NODES"
    ):
        sfa_onnx.fuse(doubling(21))
    monkeypatch.setenv("SFA_ONNX_MAX_NODES", "60")
    with pytest.raises(BudgetError, match="budget of 60"):
        sfa_onnx.fuse(doubling(6))


def test_names_that_are_not_utf8_are_escaped_and_told(tmp_path, caplog):
    """A name in GBK: onnxruntime loads the file, and so do we."""
    data = sound().SerializeToString()
    model = onnx.ModelProto.FromString(data)
    node = next(n for n in model.graph.node if n.op_type == "Softmax")
    node.name = "softmaxNAME"
    old = model.graph.input[0].name
    path = tmp_path / "gbk.onnx"
    raw = model.SerializeToString().replace(b"softmaxNAME", b"softmax\xd6\xd0\xce\xc4")
    path.write_bytes(raw)
    loaded = load_model(path)
    names = [n.name for n in loaded.graph.node]
    assert "softmax\\xd6\\xd0\\xce\\xc4" in names
    assert loaded.graph.input[0].name == old
    assert "names are not UTF-8" in caplog.text
    in_memory = onnx.ModelProto.FromString(raw)
    assert [n.name for n in load_model(in_memory).graph.node] == names
    report = sfa_onnx.fuse(path, tmp_path / "out.onnx")
    assert len(report.fused) == 1
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))


def test_what_onnxruntime_accepts_is_sound():
    """Optional inputs left out, shadowed names, initializers that are inputs too."""
    inner = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["t"])],
        "branch",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, [2])],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Clip", ["x", "", "w"], ["c"]),
            helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("c", TensorProto.FLOAT, [2]),
        ],
        [helper.make_tensor("w", TensorProto.FLOAT, [], [1.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model)
    assert problems(model) == []


def test_a_sparse_tensor_that_fits_is_sound():
    model = sound()
    values = helper.make_tensor("thin", TensorProto.FLOAT, [2], [1.0, 2.0])
    places = helper.make_tensor("at", TensorProto.INT64, [2], [0, 3])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [5]))
    assert problems(model) == []


@pytest.mark.parametrize(
    ("places", "shape", "told"),
    [
        ([[0, 1], [1, 2]], [2, 3], ""),
        ([[0, 1], [1, 3]], [2, 3], "at place 3 on axis 1, expected 0 to 2"),
        ([[-1, 1], [1, 2]], [2, 3], "at place -1 on axis 0, expected 0 to 1"),
        ([0, 5], [2, 3], ""),
        ([0, 6], [2, 3], "at place 6, expected 0 to 5"),
        ([0, 0], [], ""),
        ([0, 1], [], "at place 1, expected 0 to 0"),
    ],
)
def test_places_of_a_sparse_tensor_lie_in_it(places, shape, told):
    model = sound()
    values = helper.make_tensor("thin", TensorProto.FLOAT, [2], [1.0, 2.0])
    at = numpy_helper.from_array(np.array(places), "at")
    sparse = onnx.SparseTensorProto(values=values, indices=at, dims=shape)
    model.graph.sparse_initializer.append(sparse)
    model.graph.node.append(helper.make_node("Constant", [], ["thin too"], sparse_value=sparse))
    found = problems(model)
    assert len(found) == 2 * bool(told)
    assert all(told in text for text in found)


def body(inputs, outputs):
    """A graph that makes its outputs of `q`."""
    values = [
        helper.make_tensor_value_info(f"i{n}", TensorProto.FLOAT, None) for n in range(inputs)
    ]
    nodes = [helper.make_node("Relu", ["q"], [f"b{n}"]) for n in range(outputs)]
    made = [helper.make_tensor_value_info(f"b{n}", TensorProto.FLOAT, None) for n in range(outputs)]
    return helper.make_graph(nodes, "body", values, made)


@pytest.mark.parametrize(
    ("op", "sides", "opset", "right"),
    [("If", (1, 2), 17, (0, 2)), ("Loop", (3, 1), 17, (3, 2))]
    + [("Scan", (3, 2), opset, (2 + (opset > 8), 2)) for opset in (8, 9, 17)],
)
def test_bodies_have_what_their_node_gives_and_takes(op, sides, opset, right):
    for inputs in range(5):
        for outputs in range(4):
            names = ("then_branch", "else_branch") if op == "If" else ("body",)
            graphs = {name: body(inputs, outputs) for name in names}
            if op == "Scan":
                graphs["num_scan_inputs"] = 1
            outs = [f"o{n}" for n in range(sides[1])]
            node = helper.make_node(op, ["q"] * sides[0], outs, **graphs)
            told = " ".join(NodeRules({"": opset}).problems(node))
            assert bool(told) == ((inputs, outputs) != right), told
            assert not told or f"expected {right[0]}" in told or f"expected {right[1]}" in told


@pytest.mark.parametrize(
    ("equation", "told"),
    [
        *(
            (text, "")
            for text in ("ij,jk", "ij,jk->ik", " i j , ...jk -> ... ik ", "...,->", "iI,I->")
        ),
        *((text, "expected 2") for text in ("ij->i", "ij,jk,kl->il", "")),
        *((text, "'...' for an operand") for text in ("i..j,j->i", "i......,i->", "i,j->...i...")),
        *(
            (text, "expected letters")
            for text in ("ä,b->ä", "i1,j->i", "i,j->i->j", "i\n,j", "i.,j")
        ),
    ],
)
def test_equations_of_einsum(equation, told):
    node = helper.make_node("Einsum", ["q", "q"], ["r"], equation=equation)
    found = [*NodeRules({"": 17}).problems(node)]
    assert len(found) == bool(told)
    assert all(told in text for text in found)


def test_functions_name_what_they_take_and_make_it():
    opsets = [helper.make_opsetid("", 17)]
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    for inputs, outputs, told in (
        (["x", "x"], ["y"], ""),
        (["", "x"], ["y"], "an input or output of function local::F has no name"),
        (["x"], ["y", ""], "an input or output of function local::F has no name"),
        (["x"], ["y", "x"], "output 'x' of function local::F is its input"),
    ):
        model = sound()
        function = helper.make_function("local", "F", inputs, outputs, relu, opsets)
        model.functions.append(function)
        found = problems(model)
        assert bool(found) == bool(told)
        assert told in "".join(found)


def test_opsets_are_numbers_of_32_bits():
    for version, bad in ((1, 0), ((1 << 31) - 1, 0), (1 << 31, 1), ((1 << 63) - 1, 1), (0, 1)):
        model = sound()
        model.opset_import[0].version = version
        assert sum("imports opset" in text for text in problems(model)) == bad


def test_axes_and_offsets_that_nothing_has():
    model = sound()
    model.graph.initializer.add(name="w", data_type=1, dims=[1] * 65, raw_data=bytes(4))
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1] * 65))
    far = model.graph.initializer.add(name="f", data_type=1, dims=[1], data_location=1)
    for key, value in (("location", "w"), ("offset", "9" * 5000), ("length", "4")):
        far.external_data.add(key=key, value=value)
    told = problems(model)
    assert len(told) == 3
    assert sum("has 65 axes, expected 64 at most" in text for text in told) == 2
    assert sum("which no file has" in text for text in told) == 1


def test_an_operator_newer_than_the_opset_needs_its_inputs():
    node = helper.make_node("GatherND", ["x"], ["y"], "n")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y])
    for opset in (8, 18):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        (told,) = problems(model)
        assert "has 1 inputs, expected 2" in str(told)


def test_a_value_that_goes_through_has_one_type():
    model = sound()
    through = model.graph.output.add()
    through.CopyFrom(model.graph.input[0])
    assert problems(model) == []
    through.type.tensor_type.elem_type = TensorProto.STRING
    (told,) = problems(model)
    assert "is an input and an output of two types" in told
