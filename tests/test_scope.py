"""Cutting the layers of one device out of a model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from sfa_onnx import runtime
from sfa_onnx.ascend.handover import folder as handover
from sfa_onnx.ascend.handover.scope import Scope, cut, parse_scope
from sfa_onnx.errors import ModelError, UsageError
from tests.test_flavour import build

SOC = "Ascend910B2"
RNG = np.random.default_rng(11)


def stack(layers=3):
    """Embedding, a shared table, layers with a cache each, a head."""
    size = 4
    nodes = [
        helper.make_node("Gather", ["embed", "ids"], ["h0"], "/embed_tokens/Gather"),
        helper.make_node("Sin", ["table"], ["shared"], "/rotary/Sin"),
    ]
    inits = [("embed", RNG.standard_normal((9, size)).astype(np.float32)),
             ("table", np.ones(size, np.float32))]  # fmt: skip
    inputs, outputs = [("ids", 7, [3])], [("logits", 1, [3, size])]
    for i in range(layers):
        where = f"/layers.{i}/"
        inits.append((f"w{i}", RNG.standard_normal((size, size)).astype(np.float32)))
        inputs.append((f"past{i}", 1, [3, size]))
        outputs.append((f"present{i}", 1, [3, size]))
        nodes += [
            helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"m{i}"], where + "mm"),
            helper.make_node("Add", [f"m{i}", f"past{i}"], [f"present{i}"], where + "cache"),
            helper.make_node("Mul", [f"present{i}", "shared"], [f"h{i + 1}"], where + "out"),
        ]
    nodes.append(helper.make_node("MatMul", [f"h{layers}", "head"], ["logits"], "/lm_head/MatMul"))
    inits.append(("head", RNG.standard_normal((size, size)).astype(np.float32)))
    return build(nodes, inputs, outputs, inits=inits)


def names(values):
    return [v.name for v in values]


def test_stages_chained_give_the_whole_model():
    model = stack()
    feeds = {"ids": np.array([1, 5, 2])}
    feeds |= {f"past{i}": RNG.standard_normal((3, 4)).astype(np.float32) for i in range(3)}
    whole = runtime.run(model, feeds)
    first, last = cut(model, Scope(0, 1)), cut(model, Scope(2, 2))
    assert names(first.graph.input) == ["ids", "past0", "past1"]
    assert names(first.graph.output) == ["h2", "present0", "present1"]
    assert names(last.graph.input) == ["past2", "h2"]
    assert names(last.graph.output) == ["logits", "present2"]
    assert "embed" not in names(last.graph.initializer)
    got = runtime.run(first, {k: feeds[k] for k in names(first.graph.input)})
    got |= runtime.run(last, {"past2": feeds["past2"], "h2": got["h2"]})
    for name, value in whole.items():
        np.testing.assert_array_equal(got[name], value)


def test_one_layer_in_the_middle():
    part = cut(stack(), parse_scope("layer:1"))
    assert names(part.graph.input) == ["past1", "h1"]
    assert names(part.graph.output) == ["h2", "present1"]
    assert {n.name for n in part.graph.node} == {
        "/rotary/Sin", "/layers.1/mm", "/layers.1/cache", "/layers.1/out",
    }  # fmt: skip


def test_the_border_has_the_symbols_of_the_inputs():
    """The file declares no value between its layers: the hidden state is [b, past + 1, 4]."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m0"], "/layers.0/mm"),
        helper.make_node("Concat", ["past0", "m0"], ["h0"], "/layers.0/cat", axis=1),
        helper.make_node("MatMul", ["h0", "w"], ["y"], "/layers.1/mm"),
    ]
    given = [("x", 1, ["b", 1, 4]), ("past0", 1, ["b", "past", 4])]
    model = build(nodes, given, [("y", 1, None)], inits=[("w", np.eye(4, dtype=np.float32))])
    (border,) = cut(model, parse_scope("layer:1")).graph.input
    dims = [d.dim_param or d.dim_value for d in border.type.tensor_type.shape.dim]
    assert (border.name, dims[0], dims[2]) == ("h0", "b", 4)
    assert "unk__" not in str(dims[1])


@pytest.mark.parametrize(
    ("bounds", "kind"),
    [({"start": 0, "end": 1}, "Shape"), ({"start": 1, "end": 2}, "Constant"),
     ({"start": -1}, "Shape"), ({"start": 0, "end": 2}, None)],
)  # fmt: skip
def test_a_size_is_asked_of_what_the_stage_has(bounds, kind):
    """Layer 0's other cache, asked for its batch or capacity alone, is no input of layer 1."""
    nodes = [
        helper.make_node("Shape", ["index0"], ["size"], "/size", **bounds),
        helper.make_node("Expand", ["one", "size"], ["ones"], "/ones"),
        helper.make_node("ReduceSum", ["ones"], ["count"], "/count", keepdims=0),
        helper.make_node("MatMul", ["x", "w"], ["m0"], "/layers.0/mm"),
        helper.make_node("Add", ["m0", "index0"], ["i0"], "/layers.0/index"),
        helper.make_node("ReduceSum", ["i0", "axis"], ["h0"], "/layers.0/out", keepdims=0),
        helper.make_node("MatMul", ["past1", "w"], ["m1"], "/layers.1/mm"),
        helper.make_node("Mul", ["m1", "count"], ["s1"], "/layers.1/scale"),
        helper.make_node("Add", ["s1", "h0"], ["y"], "/layers.1/out"),
    ]
    inits = [("w", np.eye(4, dtype=np.float32)), ("one", np.ones(1, np.float32)),
             ("axis", np.array([1]))]  # fmt: skip
    given = [("x", 1, ["b", 1, 4]), ("index0", 1, ["b", 8, "n"]), ("past1", 1, ["n", "b", 4])]
    model = build(nodes, given, [("y", 1, None)], inits=inits)
    feeds = {"x": np.ones((3, 1, 4), np.float32), "index0": np.ones((3, 8, 4), np.float32),
             "past1": np.ones((4, 3, 4), np.float32)}  # fmt: skip
    whole = runtime.run(model, feeds)["y"]
    part = cut(model, parse_scope("layer:1"))
    assert ("index0" in names(part.graph.input)) == (kind is None)
    if kind is not None:
        assert next(n.op_type for n in part.graph.node if n.name == "/size") == kind
    feeds |= runtime.run(cut(model, parse_scope("layer:0")),
                         {k: feeds[k] for k in ("x", "index0")})  # fmt: skip
    got = runtime.run(part, {k: feeds[k] for k in names(part.graph.input)})
    np.testing.assert_array_equal(got["y"], whole)


def test_scope_goes_into_the_hand_over(tmp_path):
    onnx.save(stack(), tmp_path / "m.onnx")
    handover.write(tmp_path / "m.onnx", tmp_path / "out", soc_version=SOC, scope="stage:1-2")
    part = onnx.load(tmp_path / "out" / "model.atc.onnx")
    assert names(part.graph.input) == ["past1", "past2", "h1"]


@pytest.mark.parametrize(
    ("text", "reason"), [("layer", "expected layer:N"), ("stage:4-2", "ends before it starts")]
)
def test_bad_scopes(text, reason):
    with pytest.raises(UsageError, match=reason):
        parse_scope(text)


def test_layers_that_are_not_there():
    with pytest.raises(ModelError, match=r"layers \[3, 4\] are not in the graph \(layers 0-2\)"):
        cut(stack(), Scope(2, 4))
    nodes = [helper.make_node("Abs", ["x"], ["y"], "a")]
    with pytest.raises(ModelError, match="no layer names"):
        cut(build(nodes, [("x", 1, [2])], [("y", 1, [2])]), Scope(0, 0))


def test_an_initializer_given_as_array_survives(tmp_path):
    model = stack(1)
    onnx.save(model, tmp_path / "m.onnx")
    report = handover.write(tmp_path / "m.onnx", tmp_path / "out", soc_version=SOC)
    written = {t.name: numpy_helper.to_array(t) for t in onnx.load(report.model).graph.initializer}
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(written[tensor.name], numpy_helper.to_array(tensor))
