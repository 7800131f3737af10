"""Canonical <-> ATC flavour: forms the parser misreads, down-levelling, round trips, refusals."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sfa_onnx import op
from sfa_onnx.ascend import flavour
from sfa_onnx.errors import ContractError, ModelError, UsageError, WeightsError

RNG = np.random.default_rng(7)
SCALE = float(np.float32(0.1352337747812271))


def build(nodes, inputs, outputs, *, opset=18, domains=(), inits=(), functions=()) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
        [helper.make_tensor_value_info(n, t, s) for n, t, s in outputs],
        [numpy_helper.from_array(v, n) for n, v in inits],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=imports, functions=list(functions))
    model.ir_version = 10
    return model


def run(model: ModelProto, feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def same_results(model: ModelProto, feeds, exact=True) -> ModelProto:
    atc = flavour.to_atc(model)
    assert flavour.is_atc(atc)
    for before, after in zip(run(model, feeds), run(atc, feeds), strict=True):
        assert before.dtype == after.dtype
        if exact:
            np.testing.assert_array_equal(before, after)
        else:
            np.testing.assert_allclose(before, after, rtol=2e-5, atol=2e-6)
    assert flavour.to_atc(flavour.from_atc(atc)).graph == atc.graph
    return atc


def ops(model: ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def attr(node: NodeProto, name: str):
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def ours(contract: op.OpContract, name="sfa_0", gaps=True, **override) -> NodeProto:
    values = {"scale_value": SCALE, "sparse_block_size": 1, "sparse_mode": 0, "tile_size": 128}
    values |= {"rope_head_dim": 64, "layout_kv": "PA_BSND", "sparse_count": 64}
    node = NodeProto(op_type=contract.name, domain=contract.domain, name=name)
    absent = {t.name for t in contract.inputs if "dequant_scale" in t.name and t.optional and gaps}
    node.input.extend("" if t.name in absent else t.name for t in contract.inputs)
    if contract is op.KV_CACHE_PACK and gaps:
        node.input[:] = ["nope", "rope"]
    node.output.extend([contract.outputs[0].name])
    for a in contract.attributes:
        value = override.get(
            a.name, values.get(a.name, a.write if a.write is not None else a.default)
        )
        if a.kind == "float":
            node.attribute.append(
                onnx.AttributeProto(name=a.name, type=onnx.AttributeProto.FLOAT, f=value)
            )
        else:
            node.attribute.append(helper.make_attribute(a.name, value))
    return node


def fused(contract=op.SPARSE_FLASH_ATTENTION_ANTIQUANT, node=None, qtype=TensorProto.BFLOAT16):
    node = node or ours(contract)
    kinds = {"tensor(int8)": TensorProto.INT8, "tensor(int32)": TensorProto.INT32}
    kinds |= {"tensor(float)": TensorProto.FLOAT, "tensor(float16)": TensorProto.FLOAT16}
    shapes = {"query": [1, 1, 16, 576], "key": [8, 128, 1, 656], "value": [8, 128, 1, 656]}
    inputs = []
    for tensor, name in zip(contract.inputs, node.input, strict=False):
        types = contract.types_of(tensor)
        kind = qtype if len(types) > 1 else kinds[types[0]]
        if name:
            inputs.append((name, kind, shapes.get(tensor.name)))
    outputs = [(node.output[0], qtype, None)]
    return build([node], inputs, outputs, domains=(contract.domain,))


# ---- our operators -------------------------------------------------------------------------------


@pytest.mark.parametrize("contract", op.ALL_OPS, ids=lambda c: c.name)
@pytest.mark.parametrize("binding", ["kv-quant", "recipes"])
def test_round_trip_gives_the_canonical_node_back(contract, binding):
    model = fused(contract)
    atc = flavour.to_atc(model, binding=binding)
    assert [(i.domain, i.version) for i in atc.opset_import] == [("", 18)]
    assert atc.graph.node[0].domain == ""
    back = flavour.from_atc(atc)
    assert back.graph.node[0] == model.graph.node[0]
    assert back.graph.input == model.graph.input
    assert back.graph.output == model.graph.output
    assert {(i.domain, i.version) for i in back.opset_import} == {("", 18), (contract.domain, 1)}


def test_kv_quant_binding_renames_and_orders_the_attributes_as_the_ge_operator():
    node = flavour.to_atc(fused()).graph.node[0]
    contract = op.KV_QUANT_SPARSE_FLASH_ATTENTION
    assert node.op_type == "NPUKvQuantSparseFlashAttention"
    names = [a.name for a in node.attribute]
    assert names == [*(a.name for a in contract.attributes), "scale_value_exact"]
    assert attr(node, "pre_tokens") == attr(node, "next_tokens") == 2**63 - 1
    assert attr(node, "sparse_mode") == 0
    assert attr(node, "scale_value_exact") == [SCALE]


def test_recipes_binding_keeps_the_name_and_has_no_window():
    node = flavour.to_atc(fused(), binding="recipes").graph.node[0]
    assert node.op_type == "NPUSparseFlashAttentionAntiquant"
    assert attr(node, "pre_tokens") is None
    assert attr(node, "scale_value_exact") == [SCALE]


@settings(max_examples=40, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_scale_survives_both_ways_to_the_last_bit(scale):
    model = fused(node=ours(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, scale_value=scale))
    atc = flavour.to_atc(model)
    assert np.float32(attr(atc.graph.node[0], "scale_value_exact")[0]) == np.float32(scale)
    assert flavour.from_atc(atc).graph.node[0] == model.graph.node[0]


@pytest.mark.parametrize(
    ("override", "drop", "reason"),
    [
        ({"sparse_mode": "three"}, None, "sparse_mode is STRING, expected int"),
        ({}, "scale_value", "required attribute scale_value is missing"),
        ({}, "key_quant_mode", "required attribute key_quant_mode is missing"),
    ],
)
def test_bad_attributes_are_refused_by_name(override, drop, reason):
    node = ours(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, **override)
    for a in [a for a in node.attribute if a.name == drop]:
        node.attribute.remove(a)
    with pytest.raises(ContractError, match=reason):
        flavour.to_atc(fused(node=node))


def test_unknown_attribute_and_binding_are_refused():
    node = ours(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    node.attribute.append(helper.make_attribute("foo", 3))
    with pytest.raises(ContractError, match="attribute foo is not part of the operator"):
        flavour.to_atc(fused(node=node))
    with pytest.raises(UsageError, match="kv-quant, recipes"):
        flavour.to_atc(fused(), binding="sfa")


def test_a_sliding_window_has_no_canonical_form():
    atc = flavour.to_atc(fused())
    next(a for a in atc.graph.node[0].attribute if a.name == "pre_tokens").i = 128
    with pytest.raises(ContractError, match="pre_tokens 128 has no canonical form"):
        flavour.from_atc(atc)


def test_portable_function_bodies_of_our_ops_are_dropped_not_inlined():
    node = ours(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    body = helper.make_function(
        "npu", node.op_type, list("abcdefghi"), ["y"], [helper.make_node("Identity", ["a"], ["y"])],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    model = fused(node=node)
    model.functions.append(body)
    atc = flavour.to_atc(model)
    assert ops(atc) == ["NPUKvQuantSparseFlashAttention"]
    assert not atc.functions


def test_npu_dtype_casts_float_queries_and_the_result():
    model = fused(op.SPARSE_FLASH_ATTENTION, qtype=TensorProto.FLOAT)
    result = flavour.convert(model, npu_dtype="bf16")
    assert ops(result.model).count("Cast") == 6  # query, key, value, two ropes; the result
    last = result.model.graph.node[-1]
    assert last.op_type == "Cast"
    assert last.output[0] == "attention_out"
    assert attr(last, "to") == TensorProto.FLOAT
    assert "cast float32 <-> bf16" in result.notes[0]
    with pytest.raises(UsageError, match="bf16 or fp16"):
        flavour.to_atc(model, npu_dtype="fp8")


def test_float32_rows_in_a_cache_input_are_refused_for_the_npu():
    model = fused(qtype=TensorProto.FLOAT)
    for value in model.graph.input:
        if value.name in ("key", "value"):
            value.type.tensor_type.shape.dim[3].dim_value = 784
    with pytest.raises(ContractError, match="784 bytes hold a float32 rope part"):
        flavour.to_atc(model, npu_dtype="bf16")


def test_a_gap_inside_if_is_refused_and_a_full_node_passes():
    def model(gaps):
        node = ours(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, gaps=gaps)
        out = [helper.make_tensor_value_info("attention_out", TensorProto.BFLOAT16, None)]
        then = helper.make_graph([node], "then", [], out)
        z_out = [helper.make_tensor_value_info("e", TensorProto.BFLOAT16, None)]
        other = helper.make_graph([helper.make_node("Identity", ["z"], ["e"])], "else", [], z_out)
        choice = helper.make_node(
            "If", ["c"], ["y"], then_branch=then, else_branch=other, name="if"
        )
        names = [n for n in dict.fromkeys(node.input) if n]
        inputs = [(n, TensorProto.INT32, None) for n in names]
        inputs += [("c", TensorProto.BOOL, []), ("z", TensorProto.BFLOAT16, None)]
        return build([choice], inputs, [("y", TensorProto.BFLOAT16, None)], domains=("npu",))

    with pytest.raises(ModelError, match=r"sfa_0.*leaves out an input inside a sub-graph.*E19999"):
        flavour.to_atc(model(gaps=True))
    inner = attr(flavour.to_atc(model(gaps=False)).graph.node[0], "then_branch").node[0]
    assert (inner.domain, inner.op_type) == ("", "NPUKvQuantSparseFlashAttention")


# ---- form: names, imports, outputs, external data -----------------------------------------------


def test_names_are_given_made_unique_and_kept_off_inputs_and_generated_ones():
    nodes = [
        helper.make_node("Abs", ["x"], ["a"], name="n"),
        helper.make_node("Neg", ["a"], ["b"], name="n"),
        helper.make_node("Abs", ["b"], ["c"], name="x"),
        helper.make_node("Add", ["c", "w"], ["d"], name="w_Initializer_0"),
        helper.make_node("Abs", ["d"], ["y"]),
    ]
    io = ("x", TensorProto.FLOAT, [2]), ("y", TensorProto.FLOAT, [2])
    model = build(nodes, io[:1], io[1:], inits=[("w", np.ones(2, np.float32))])
    result = flavour.convert(model)
    names = [n.name for n in result.model.graph.node]
    assert len(set(names)) == 5
    assert all(names)
    assert names[0] == "n"
    assert "x" not in names
    assert "w_Initializer_0" not in names
    assert len(result.renamed) == 3
    assert [n.name for n in model.graph.node][1] == "n"  # the argument is untouched


def test_empty_outputs_are_named_or_dropped():
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["", "i"], name="top"),
        helper.make_node("Dropout", ["x"], ["y", ""], name="drop"),
    ]
    outs = [("i", TensorProto.INT64, [1]), ("y", TensorProto.FLOAT, [4])]
    model = build(nodes, [("x", TensorProto.FLOAT, [4])], outs, inits=[("k", np.array([1]))])
    atc = flavour.to_atc(model)
    assert all(out for node in atc.graph.node for out in node.output)
    assert len(atc.graph.node[1].output) == 1


def test_functions_are_inlined_and_explicit_domains_spelled_alike():
    body = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Twice", ["x"], ["t"], domain="mine"),
        helper.make_node("Neg", ["t"], ["y"], domain="ai.onnx"),
    ]
    io = ("x", TensorProto.FLOAT, [2]), ("y", TensorProto.FLOAT, [2])
    model = build(nodes, io[:1], io[1:], domains=("mine", "unused"), functions=[body])
    atc = same_results(model, {"x": np.ones(2, np.float32)})
    assert ops(atc) == ["Add", "Neg"]


def test_foreign_domains_are_refused_and_vendor_ops_share_the_default_one():
    io = ("x", TensorProto.FLOAT, [2]), ("y", TensorProto.FLOAT, [2])
    foreign = helper.make_node("FusedMatMul", ["x", "x"], ["y"], "mm", domain="com.microsoft")
    with pytest.raises(ModelError, match=r"'mm'.*com\.microsoft"):
        flavour.to_atc(build([foreign], io[:1], io[1:], domains=("com.microsoft",)))
    vendor = helper.make_node("NPURmsNorm", ["x", "x"], ["y"], "rms", domain="npu")
    atc = flavour.to_atc(build([vendor], io[:1], io[1:], domains=("npu",)))
    assert atc.graph.node[0].domain == ""
    assert flavour.from_atc(atc).graph.node[0].domain == "npu"


def test_outputs_of_constants_alone_are_tied_to_an_input():
    nodes = [
        helper.make_node("Constant", [], ["c"], name="c", value_floats=[1.0, -2.0]),
        helper.make_node("Neg", ["c"], ["z"]),
        helper.make_node("Abs", ["x"], ["y"]),
        helper.make_node("Not", ["flag"], ["b"]),
    ]
    outs = [("y", 1, [2]), ("z", 1, [2]), ("w", 1, [2]), ("b", TensorProto.BOOL, [1])]
    inits = [("w", np.array([3.0, 4.0], np.float32)), ("flag", np.array([True]))]
    model = build(nodes, [("x", TensorProto.FLOAT, [2])], outs, inits=inits)
    atc = same_results(model, {"x": np.ones(2, np.float32)})
    assert [o.name for o in atc.graph.output] == ["y", "z", "w", "b"]
    readers = {n.output[0]: n for n in atc.graph.node}
    assert readers["w"].op_type == "Add"
    assert readers["b"].op_type == "Or"


def test_external_data_keeps_three_keys_and_weights_are_not_read(tmp_path):
    io = ("x", TensorProto.FLOAT, [2]), ("y", TensorProto.FLOAT, [2])
    node = helper.make_node("Add", ["x", "w"], ["y"], "add")
    model = build([node], io[:1], io[1:], inits=[("w", np.ones(2, np.float32))])
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = (("location", "w.bin"), ("checksum", "9ab"), ("offset", "8"), ("length", "8"))
    for key, value in entries:
        tensor.external_data.add(key=key, value=value)
    atc = flavour.to_atc(model)  # there is no w.bin anywhere
    kept = {e.key: e.value for e in atc.graph.initializer[0].external_data}
    assert kept == {"location": "w.bin", "offset": "8", "length": "8"}
    tensor.external_data[0].value = "/abs/w.bin"
    with pytest.raises(WeightsError, match="expected a path relative"):
        flavour.to_atc(model)


def test_large_embedded_weights_come_back_bit_for_bit_even_when_renamed():
    weight = RNG.standard_normal((64, 64)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")]
    outs = [("y", 1, [1, 64]), ("w", 1, [64, 64])]
    model = build(nodes, [("x", TensorProto.FLOAT, [1, 64])], outs, inits=[("w", weight)])
    atc = same_results(model, {"x": weight[:1]})
    assert numpy_helper.to_array(atc.graph.initializer[0]).tobytes() == weight.tobytes()


def test_external_initializers_of_branches_move_to_the_main_graph():
    weight = onnx.TensorProto(name="w", data_type=1, dims=[2])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="w.bin")
    out = [helper.make_tensor_value_info("t", 1, [2])]
    then = helper.make_graph([helper.make_node("Add", ["x", "w"], ["t"])], "t", [], out, [weight])
    out = [helper.make_tensor_value_info("e", 1, [2])]
    other = helper.make_graph([helper.make_node("Abs", ["x"], ["e"])], "e", [], out)
    node = helper.make_node("If", ["c"], ["y"], "if", then_branch=then, else_branch=other)
    inputs = [("c", TensorProto.BOOL, []), ("x", 1, [2])]
    atc = flavour.to_atc(build([node], inputs, [("y", 1, [2])]))
    assert [t.name for t in atc.graph.initializer] == ["w"]
    assert not attr(atc.graph.node[0], "then_branch").initializer


@pytest.mark.parametrize(
    ("opset", "ours_too", "passes"), [(7, False, False), (10, False, True), (10, True, False)]
)
def test_old_opsets(opset, ours_too, passes):
    nodes = [helper.make_node("Abs", ["x"], ["y"], "a")]
    model = build(nodes, [("x", 1, [2])], [("y", 1, [2])], opset=opset)
    if ours_too:
        model = fused()
        model.opset_import[0].version = opset
    if passes:
        assert flavour.to_atc(model).opset_import[0].version == opset
    else:
        with pytest.raises(ModelError, match=f"uses opset {opset}"):
            flavour.to_atc(model)


def test_values_nobody_produces_are_refused():
    node = helper.make_node("Add", ["x", "nowhere"], ["y"], "add")
    with pytest.raises(ModelError, match="'add' reads 'nowhere', which nothing produces"):
        flavour.to_atc(build([node], [("x", 1, [2])], [("y", 1, [2])]))


# ---- what the parser misreads ------------------------------------------------------------------

X24 = ("x", TensorProto.FLOAT, [2, 4])


def _single(op_type, inputs, out, *, inits=(), extra=(), opset=18, **attributes):
    names = [n for n, *_ in inputs] + [n for n, _ in inits]
    node = helper.make_node(op_type, names, ["y"], "n0", **attributes)
    return build([node, *extra], inputs, [("y", *out)], inits=inits, opset=opset)


@pytest.mark.parametrize(
    ("name", "value"),
    [("value_float", 2.5), ("value_floats", [1.0, 2.0]), ("value_int", 3), ("value_ints", [4, 5])],
)
def test_constant_forms_become_value_tensors(name, value):
    nodes = [
        helper.make_node("Constant", [], ["c"], "c", **{name: value}),
        helper.make_node("Cast", ["c"], ["f"], "f", to=1),
        helper.make_node("Add", ["x", "f"], ["y"], "a"),
    ]
    model = build(nodes, [("x", 1, [2])], [("y", 1, [2])])
    atc = same_results(model, {"x": np.ones(2, np.float32)})
    assert [a.name for a in atc.graph.node[0].attribute] == ["value"]


@pytest.mark.parametrize(
    ("start", "end"), [(1, None), (0, 1), (-2, -1), (2, 1), (-9, 9), (0, None)]
)
def test_shape_ranges_become_slices(start, end):
    attributes = {"start": start} | ({} if end is None else {"end": end})
    model = _single("Shape", [("x", 1, [2, "n", 5])], (7, None), **attributes)
    atc = same_results(model, {"x": np.zeros((2, 3, 5), np.float32)})
    assert not atc.graph.node[0].attribute


@pytest.mark.parametrize("dims", [[7, 2], ["n", 2]])
@pytest.mark.parametrize("rows", [7, 6])
def test_split_num_outputs(dims, rows):
    node = helper.make_node("Split", ["x"], ["a", "b", "c"], "s", axis=0, num_outputs=3)
    dims = [rows if isinstance(dims[0], int) else dims[0], 2]
    model = build([node], [("x", 1, dims)], [(n, 1, None) for n in "abc"])
    atc = same_results(model, {"x": RNG.standard_normal((rows, 2)).astype(np.float32)})
    assert all(attr(n, "num_outputs") is None for n in atc.graph.node)
    assert "s" in [n.name for n in atc.graph.node]


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_gather_nd_batches_and_negative_indices(batch, dynamic):
    data = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
    lead = {0: (6,), 1: (2, 6), 2: (2, 3, 6)}[batch]
    index = np.stack([RNG.integers(-s, s, lead) for s in data.shape[batch : batch + 2]], -1)
    dims = ["b", "c", 4, 5] if dynamic else list(data.shape)
    index_dims = [f"i{k}" if dynamic else n for k, n in enumerate(lead)] + [2]
    inputs = [("x", 1, dims), ("i", 7, index_dims)]
    model = _single("GatherND", inputs, (1, None), batch_dims=batch)
    atc = same_results(model, {"x": data, "i": index})
    done = next(n for n in atc.graph.node if n.op_type == "GatherND")
    assert (done.name, attr(done, "batch_dims")) == ("n0", None)


def test_gather_nd_with_indices_known_to_be_good_is_left_alone():
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["v", "i"], "top", axis=0),
        helper.make_node("Unsqueeze", ["i", "ax"], ["j"], "un"),
        helper.make_node("GatherND", ["x", "j"], ["y"], "g"),
    ]
    inits = [("k", np.array([2])), ("ax", np.array([-1]))]
    model = build(nodes, [("x", 1, [4])], [("y", 1, None)], inits=inits)
    assert ops(flavour.to_atc(model)) == ["TopK", "Unsqueeze", "GatherND"]


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_scatter_nd_reductions(reduction, depth):
    data = RNG.standard_normal((3, 4, 2)).astype(np.float32)
    index = np.stack([RNG.integers(-s, s, (5,)) for s in data.shape[:depth]], -1)
    if reduction == "none":  # duplicates have no defined order there
        index = index[:1]
    updates = RNG.standard_normal((len(index), *data.shape[depth:])).astype(np.float32)
    inputs = [("x", 1, ["a", 4, 2]), ("i", 7, ["n", depth]), ("u", 1, None)]
    attributes = {} if reduction == "none" else {"reduction": reduction}
    model = _single("ScatterND", inputs, (1, None), **attributes)
    atc = same_results(model, {"x": data, "i": index, "u": updates}, exact=False)
    kinds = {n.op_type for n in atc.graph.node}
    assert ("ScatterND" in kinds) == (reduction == "none")


@pytest.mark.parametrize("fmod", [0, 1])
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.float32])
def test_mod_does_not_depend_on_the_sign_rule(fmod, kind):
    if kind is np.float32 and not fmod:
        pytest.skip("ONNX forbids it")
    x = np.array([-7, -6, -1, 0, 1, 5, 7, -7, 7], kind)
    y = np.array([3, 3, 3, 3, 3, 3, 3, -3, -3], kind)
    onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    inputs = [("x", onnx_type, [9]), ("z", onnx_type, [9])]
    model = _single("Mod", inputs, (onnx_type, [9]), **({"fmod": 1} if fmod else {}))
    atc = same_results(model, {"x": x, "z": y})
    flipped = ModelProto()  # the other convention everywhere: results must stay
    flipped.CopyFrom(atc)
    for node in flipped.graph.node:
        if node.op_type == "Mod":
            del node.attribute[:]
            node.attribute.append(
                helper.make_attribute("fmod", 1 if kind is np.float32 else 1 - fmod)
            )
    feeds = {"x": x, "z": y}
    np.testing.assert_array_equal(run(flipped, feeds)[0], run(model, feeds)[0])


@pytest.mark.parametrize("op_type", ["ReduceL1", "ReduceL2"])
def test_reduce_norms_of_opset_18_are_spelled_out(op_type):
    inits = [("axes", np.array([-1]))]
    model = _single(op_type, [X24], (1, [2, 1]), inits=inits, keepdims=1)
    atc = same_results(model, {"x": RNG.standard_normal((2, 4)).astype(np.float32)}, exact=False)
    assert op_type not in ops(atc)


# ---- newer opsets ------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [19, 20, 21, 22, 23, 24])
def test_type_only_versions_are_relabelled(opset):
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], "c", to=1, saturate=1),
        helper.make_node("Reshape", ["a", "s"], ["b"], "r"),
        helper.make_node("Transpose", ["b"], ["y"], "t", perm=[1, 0]),
    ]
    inits = [("s", np.array([4, 2]))]
    model = build(nodes, [X24], [("y", 1, [2, 4])], opset=opset, inits=inits)
    atc = same_results(model, {"x": RNG.standard_normal((2, 4)).astype(np.float32)})
    assert atc.opset_import[0].version == 18
    assert attr(atc.graph.node[0], "saturate") is None


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [("tanh", {"approximate": "tanh"}), ("plain", {}), ("swish", {"alpha": 0.5}), ("swish1", {})],
)
def test_activations(kind, attributes):
    op_type = "Swish" if kind.startswith("swish") else "Gelu"
    model = _single(
        op_type, [X24], (1, [2, 4]), opset=24 if op_type == "Swish" else 20, **attributes
    )
    x = RNG.standard_normal((2, 4)).astype(np.float32)
    atc = flavour.to_atc(model)
    done = run(atc, {"x": x})[0]
    from onnx.reference import ReferenceEvaluator

    np.testing.assert_allclose(done, ReferenceEvaluator(model).run(None, {"x": x})[0], rtol=1e-5)
    assert "n0" in [n.name for n in atc.graph.node]


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("half", [False, True])
def test_rms_normalization(axis, half):
    kind = np.float16 if half else np.float32
    x = RNG.standard_normal((2, 3, 8)).astype(kind)
    scale = RNG.standard_normal(x.shape[axis:]).astype(kind)
    tensor = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    inputs = [("x", tensor, ["b", 3, 8]), ("s", tensor, list(scale.shape))]
    model = _single("RMSNormalization", inputs, (tensor, None), opset=23, axis=axis, epsilon=1e-6)
    atc = flavour.to_atc(model)
    wide = x.astype(np.float32)
    axes = tuple(range(axis % 3, 3))
    root = np.sqrt((wide * wide).mean(axes, keepdims=True) + np.float32(1e-6))
    expected = (wide / root).astype(kind) * scale
    np.testing.assert_allclose(
        run(atc, {"x": x, "s": scale})[0], expected, rtol=1e-3 if half else 1e-5
    )
    assert atc.graph.node[-1].name == "n0"


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_expanded(causal, masked):
    shape = ["b", 2, 3, 8]
    inputs = [(n, TensorProto.FLOAT, shape) for n in ("q", "k", "v")]
    feeds = {n: RNG.standard_normal((1, 2, 3, 8)).astype(np.float32) for n in ("q", "k", "v")}
    if masked:
        inputs.append(("m", TensorProto.FLOAT, [3, 3]))
        feeds["m"] = RNG.standard_normal((3, 3)).astype(np.float32)
    model = _single("Attention", inputs, (1, None), opset=23, is_causal=causal, scale=0.25)
    atc = same_results(model, feeds, exact=False)
    assert "Attention" not in ops(atc)
    assert all(attr(n, "start") is None for n in atc.graph.node if n.op_type == "Shape")
    assert "CastLike" not in ops(atc)


@pytest.mark.parametrize("pair", [(np.int8, np.uint8), (np.uint8, np.int8), (np.int32, np.uint32)])
def test_bit_cast_between_integers(pair):
    source, target = pair
    info = np.iinfo(source)
    values = np.array([info.min, 0, 1, info.max // 2, info.max // 2 + 1, info.max], source)
    kinds = [helper.np_dtype_to_tensor_dtype(np.dtype(k)) for k in pair]
    model = _single("BitCast", [("x", kinds[0], [6])], (kinds[1], [6]), opset=26, to=kinds[1])
    done = run(flavour.to_atc(model), {"x": values})[0]
    np.testing.assert_array_equal(done, values.view(target))


@pytest.mark.parametrize("mode", ["linear", "circular"])
@pytest.mark.parametrize("starts", [True, False])
def test_tensor_scatter(mode, starts):
    cache = RNG.standard_normal((2, 3, 6, 4)).astype(np.float32)
    update = RNG.standard_normal((2, 3, 2, 4)).astype(np.float32)
    where = np.array([1, 5 if mode == "circular" else 4])
    inputs = [("c", 1, [2, 3, 6, 4]), ("u", 1, [2, 3, 2, 4])] + [("i", 7, [2])] * starts
    model = _single("TensorScatter", inputs, (1, None), opset=24, mode=mode)
    expected = cache.copy()
    for b in range(2):
        for s in range(2):
            expected[b, :, ((where[b] if starts else 0) + s) % 6] = update[b, :, s]
    feeds = {"c": cache, "u": update} | ({"i": where} if starts else {})
    np.testing.assert_array_equal(run(flavour.to_atc(model), feeds)[0], expected)


@pytest.mark.parametrize(
    ("op_type", "opset", "attributes", "reason"),
    [
        (
            "BitCast",
            26,
            {"to": TensorProto.INT32},
            "BitCast FLOAT -> INT32 has no form at opset 18",
        ),
        ("CumProd", 26, {}, "CumProd of opset 26 has no form at opset 18"),
    ],
)
def test_what_has_no_form_is_refused_by_name(op_type, opset, attributes, reason):
    inits = [("axis", np.array(0, np.int64))] if op_type == "CumProd" else []
    model = _single(op_type, [X24], (1, None), opset=opset, inits=inits, **attributes)
    with pytest.raises(ModelError, match=f"n0.*{reason}"):
        flavour.to_atc(model)
