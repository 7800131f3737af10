"""Finding sites: what is a candidate, what is refused and why, what is none."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.errors import ContractError
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION_ANTIQUANT
from sfa_onnx.passes.candidate import Candidate, RefusedSite, Role
from sfa_onnx.passes.find.attempt import refused
from sfa_onnx.passes.find.search import FindOptions, find_candidates
from sfa_onnx.passes.graph.index import READ_LIMIT, GraphIndex
from tests.graphs import dense, gathered


def find(model: onnx.ModelProto, **options) -> list[Candidate | RefusedSite]:
    return find_candidates(GraphIndex.of(model), FindOptions(**options))


def only(model: onnx.ModelProto) -> Candidate:
    (site,) = find(model)
    assert isinstance(site, Candidate), site
    return site


def reason(model: onnx.ModelProto) -> str:
    (site,) = find(model)
    assert isinstance(site, RefusedSite), "it was bound"
    assert site.refusal.stopped_at
    return site.refusal.reason


# -- what is bound --------------------------------------------------------------------------------


def test_dense_float_site_is_bound_with_roles_and_axes():
    site = only(dense())
    assert site.op.name == "NPUSparseFlashAttention"
    axes = {o.role: o.axes for o in site.operands}
    assert axes[Role.QUERY] == ("B", "S1", "N1", "C")
    assert axes[Role.LATENT] == ("B", "S2", "C")
    assert axes[Role.KEY_ROPE] == ("B", "S2", "R")
    assert axes[Role.INDICES] == ("B", "S1", "K")
    assert site.sizes["N1"] == 4
    assert site.sizes["S2"] == "S"
    indices = next(o for o in site.operands if o.role is Role.INDICES)
    assert indices.domain.distinct
    assert "TopK" in indices.domain.discharged_by


def test_int8_site_packs_the_selected_rows():
    site = only(gathered())
    assert site.op.name == "NPUSparseFlashAttentionAntiquant"
    ops = [n.op_type for n in site.replacement]
    assert "KvCachePack" in ops
    assert ops[-1] == "Reshape" or site.replacement[-1].output[0] == "out"
    given = next(o for o in site.operands if o.role is Role.INDICES)
    assert given.value == "idx"
    assert given.domain.negative_allowed
    assert {o.role for o in site.operands} >= {Role.LATENT_INT8, Role.SCALE, Role.KEY_ROPE}


def test_scale_is_the_product_of_all_factors():
    model = dense(score="root = Mul(raw, half)\nscaled = Div(root, half)\n")
    (node,) = [n for n in only(model).replacement if n.op_type.startswith("NPU")]
    scale = next(a.f for a in node.attribute if a.name == "scale_value")
    assert scale == pytest.approx(1.0)


@pytest.mark.parametrize(
    "score",
    [
        "scaled = Mul(scale, raw)",
        "a = Identity(raw)\nb = Cast <to = 1> (a)\nscaled = Mul(b, scale)",
        "t = Transpose <perm = [0, 2, 1, 3]> (raw)\nu = Mul(t, scale)\n"
        "scaled = Transpose <perm = [0, 2, 1, 3]> (u)",
    ],
)
def test_spelling_does_not_matter(score):
    assert only(dense(score=score)).op.name == "NPUSparseFlashAttention"


@pytest.mark.parametrize(
    "mask",
    [
        "masked = Add(picked, scaled)",
        "gone = Less(picked, half)\nnot = Not(gone)\nmasked = Add(scaled, picked)",
        "gone = Less(picked, low)\nm0 = Add(scaled, picked)\nmasked = Identity(m0)",
    ],
)
def test_masks_in_any_order(mask):
    assert isinstance(find(dense(mask=mask))[0], Candidate)


@pytest.mark.parametrize(
    "weights",
    [
        "bad = IsNaN(soft)\nnought = Sub(half, half)\np = Where(bad, nought, soft)",
        "c = Cast <to = 1> (soft)\np = Identity(c)",
    ],
)
def test_guards_between_softmax_and_sum(weights):
    assert isinstance(find(dense(weights=weights))[0], Candidate)


def test_zero_size_writes_are_nothing():
    """What `mask[:, :, :0] = True` leaves in a graph."""
    model = dense(mask="same = ScatterND(picked, nowhere, nothing)\nmasked = Add(scaled, same)")
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.zeros((0, 4), np.int64), "nowhere"),
            numpy_helper.from_array(np.zeros(0, np.float32), "nothing"),
        ]
    )
    assert only(model).family == "float-dense"


def test_k_assembled_through_views_is_still_the_key():
    views = "a = Reshape(key, flat3)\nb = Transpose <perm = [0, 2, 1]> (a)\nk_t = Reshape(b, back4)"
    model = gathered(views=views)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([-1, 6, 24]), "flat3"),
            numpy_helper.from_array(np.array([2, 3, 24, 6]), "back4"),
        ]
    )
    assert only(model).family == "int8"


# -- what is refused, and why ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"score": "c = Tanh(raw)\nscaled = Mul(c, scale)"}, "Tanh .* soft-cap"),
        ({"score": "c = Clip(raw, low, half)\nscaled = Mul(c, scale)"}, "Clip"),
        ({"score": "c = Add(raw, bias)\nscaled = Mul(c, scale)"}, "bias"),
        ({"score": "c = Relu(raw)\nscaled = Mul(c, scale)"}, "Relu"),
        ({"score": "scaled = Mul(raw, bias)"}, "not a constant"),
        ({"score": "n = Neg(scale)\nscaled = Mul(raw, n)"}, "not positive"),
        ({"value": "other"}, "read from other, the key from kv"),
        ({"weights": "p = Mul(soft, half)"}, "weighted sum is multiplied by 0.5"),
        ({"outputs": ", float[B,2,4,S] soft"}, "graph output"),
        ({"outputs": ", float[B,2,4,S] raw"}, "raw is a graph output"),
        ({"mask": "m = Add(scaled, picked)\nmasked = Where(flag, m, raw)"}, "two scores"),
    ],
)
def test_refusals_name_what_stopped_them(knobs, text):
    model = dense(**knobs)
    if "flag" in knobs.get("mask", ""):
        model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, [1]))
    assert re.search(text, reason(model))


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"rope_index": "wide_next"}, "not read by the same indices"),
        (
            {
                "dequant": "floats = Cast <to = 1> (codes)\ntiled = Reshape(floats, split)\n"
                "other = GatherND(scales, wide_next)\nstep4 = Unsqueeze(other, last)\n"
                "product = Mul(tiled, step4)\nnope = Reshape(product, joined)"
            },
            "scale scales is not read by the same indices",
        ),
        (
            {
                "value": "f2 = Cast <to = 1> (codes)\nt2 = Reshape(f2, split)\n"
                "s2 = GatherND(scales2, wide)\nu2 = Unsqueeze(s2, last)\np2 = Mul(t2, u2)\n"
                "v = Reshape(p2, joined)"
            },
            "scales are scales2",
        ),
        ({"value": "v = Slice(key, one, seventeen, last, one)"}, "several tensors"),
    ],
)
def test_int8_refusals(knobs, text):
    model = gathered(**knobs)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([17]), "seventeen"),
        ]
    )
    assert re.search(text, reason(model))


def test_selection_or_something_else_is_refused_not_lost():
    """Selected keys and a window besides: more keys than the selection names."""
    both = "chosen = Greater(picked, low2)\nboth = Or(chosen, window)"
    text = f"{both}\nmasked = Where(both, scaled, low)"
    model = dense(mask=text)
    model.graph.input.append(
        helper.make_tensor_value_info("window", TensorProto.BOOL, [1, 1, 1, "S"])
    )
    low2 = numpy_helper.from_array(np.array(-1, np.float32), "low2")
    model.graph.initializer.append(low2)
    assert "not a selection that other masks only narrow" in reason(model)


def test_step_budget_ends_in_a_refusal():
    (site,) = find(dense(), max_steps=10)
    assert isinstance(site, RefusedSite)
    assert "more steps" in site.refusal.reason
    assert "max_steps" in site.refusal.hint


@pytest.mark.parametrize("op", ["And", "Add"])
def test_a_lattice_of_doublings_is_read_once(op):
    """2**40 paths lead upwards; every value on them is read once."""
    lines, value = [], "scaled" if op == "Add" else "chosen"
    for i in range(40):
        lines.append(f"l{i} = {op}({value}, {value})")
        value = f"l{i}"
    if op == "And":
        text = "chosen = Greater(picked, low)\n" + "\n".join(lines)
        model = dense(mask=f"{text}\nmasked = Where({value}, scaled, low)")
    else:
        model = dense(mask="\n".join(lines) + f"\nmasked = Add({value}, picked)")
    (site,) = find(model, max_steps=20_000)
    assert isinstance(site, Candidate)


def test_refusal_tells_how_far_recognition_got():
    (site,) = find(dense(score="c = Tanh(raw)\nscaled = Mul(c, scale)"))
    assert any(text.startswith("Softmax") for text in site.bound)
    assert any("value kv" in text for text in site.bound)


def test_replacements_of_two_sites_of_one_name_do_not_collide():
    model = dense()
    first = list(model.graph.node)
    for node in first:
        if node.op_type == "Softmax":
            node.name = "soft"
    keep = {"idx", "picked", "two", "scale", "kv", "q_nope", "q_rope", "pe"}
    for node in first[first.index(next(n for n in first if n.output[0] == "s1")) :]:
        twin = model.graph.node.add()
        twin.CopyFrom(node)
        for names in (twin.input, twin.output):
            for i, name in enumerate(names):
                names[i] = name if name in keep else f"{name}_2"
    model.graph.output.add().CopyFrom(model.graph.output[0])
    model.graph.output[1].name = "out_2"
    sites = find(model)
    assert [type(s) for s in sites] == [Candidate, Candidate]
    names = [{t.name for t in s.replacement_initializers} for s in sites]
    assert not names[0] & names[1]


# -- what is no site ------------------------------------------------------------------------------


def test_dense_attention_and_routers_are_no_candidates():
    plain = dense(mask="masked = Identity(scaled)")
    assert find(plain) == []
    text = (
        '<ir_version: 9, opset_import: ["" : 18]>\n'
        "router (float[T,8] x, int64[1] k) => (float[T,K] w, int64[T,K] e) {\n"
        " p = Softmax <axis = -1> (x)\n w, e = TopK <axis = -1> (p, k)\n}"
    )
    assert find(onnx.parser.parse_model(text)) == []


# -- the index ------------------------------------------------------------------------------------


def test_names_captured_by_subgraphs_are_uses():
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "then",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    node = helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
        ],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])],
    )
    assert GraphIndex(graph).uses("x") == [(0, -1)]


def test_only_structural_constants_are_read():
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4])
    weights.data_location = TensorProto.EXTERNAL
    table = TensorProto(name="t", data_type=TensorProto.INT64, dims=[3])
    table.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "64"), ("length", "24")):
        table.external_data.add(key=key, value=value)
    big = TensorProto(name="big", data_type=TensorProto.INT8, dims=[READ_LIMIT + 1])
    graph = onnx.GraphProto(initializer=[weights, table, big])
    asked = []

    def reader(location: str, offset: int, length: int) -> bytes:
        asked.append((location, offset, length))
        return np.arange(3, dtype=np.int64).tobytes()

    index = GraphIndex(graph, reader=reader)
    assert index.constant("w") is None
    assert index.constant("big") is None
    assert index.constant("t").tolist() == [0, 1, 2]
    assert index.constant("t").tolist() == [0, 1, 2]
    assert asked == [("w.bin", 64, 24)]
    assert index.constants_read == ["t"]
    assert index.bytes_read == 24


def test_layer_comes_from_the_exporter():
    node = helper.make_node("Softmax", ["a"], ["b"], name="/model/layers.3/self_attn/Softmax")
    other = helper.make_node("Softmax", ["b"], ["c"], name="node_softmax")
    scopes = "['', 'model', 'model.layers.7.self_attn', 'softmax']"
    other.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    index = GraphIndex(onnx.GraphProto(node=[node, other]))
    assert index.layer(0) == "model.layers.3.self_attn"
    assert index.layer(1) == "model.layers.7.self_attn"


def test_what_breaks_the_operators_contract_is_refused_with_the_limit() -> None:
    with pytest.raises(ContractError) as caught:
        SPARSE_FLASH_ATTENTION_ANTIQUANT.complete(
            {"scale_value": 1.0, "sparse_block_size": 1, "rope_head_dim": 2**63 - 1}
        )
    refusal = refused(caught.value, "scores", "a site")
    assert "rope_head_dim: expected <= 2147483647" in refusal.reason
    assert "itself failed" not in refusal.reason
