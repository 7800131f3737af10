"""Canonical <-> ATC flavour: forms the parser misreads, down-levelling, round trips, refusals."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sfa_onnx.ascend.flavour import model as flavour
from sfa_onnx.errors import ModelError, UsageError, WeightsError
from sfa_onnx.operator import op

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
    node.input.extend("" if t.name in absent else t.name for t in contract.ge_inputs)
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
    if contract in (op.LIGHTNING_INDEXER, op.QUANT_LIGHTNING_INDEXER):  # the kernel's own sizes
        shapes = {"query": [1, 1, 64, 128], "key": [1, 128, 1, 128], "weights": [1, 1, 64]}
        shapes |= {"query_dequant_scale": [1, 1, 64], "key_dequant_scale": [1, 128, 1]}

    def kind(tensor):
        types = contract.types_of(tensor)
        return qtype if len(types) > 1 else kinds[types[0]]

    inputs = [
        (name, kind(tensor), shapes.get(tensor.name))
        for tensor, name in zip(contract.inputs, node.input, strict=False)
        if name
    ]
    outputs = [(node.output[0], kind(contract.outputs[0]), None)]
    return build([node], inputs, outputs, domains=(contract.domain,))


# ---- our operators -------------------------------------------------------------------------------


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
    inner = [
        helper.make_node("Constant", [], ["k"], value=weight),
        helper.make_node("Add", ["x", "w"], ["s"]),
        helper.make_node("Add", ["s", "k"], ["t"]),
    ]
    then = helper.make_graph(inner, "t", [], out, [weight])
    out = [helper.make_tensor_value_info("e", 1, [2])]
    other = helper.make_graph([helper.make_node("Abs", ["x"], ["e"])], "e", [], out)
    node = helper.make_node("If", ["c"], ["y"], "if", then_branch=then, else_branch=other)
    inputs = [("c", TensorProto.BOOL, []), ("x", 1, [2])]
    atc = flavour.to_atc(build([node], inputs, [("y", 1, [2])]))
    assert sorted(t.name for t in atc.graph.initializer) == ["k", "w"]
    branch = attr(atc.graph.node[0], "then_branch")
    assert not branch.initializer
    assert [n.op_type for n in branch.node] == ["Add", "Add"]


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
    with pytest.raises(ModelError, match="'add' reads 'nowhere', which nothing makes"):
        flavour.to_atc(build([node], [("x", 1, [2])], [("y", 1, [2])]))


@pytest.mark.parametrize("choice", [True, False])
def test_branches_are_rewritten_like_the_main_graph(choice):
    value = helper.make_tensor_value_info
    inner = [
        helper.make_node("Constant", [], ["c"], value_float=2.0),
        helper.make_node("Shape", ["x"], ["s"], start=1),
        helper.make_node("Cast", ["s"], ["f"], to=1),
        helper.make_node("GatherND", ["x", "i"], ["g"], batch_dims=1),
        helper.make_node("Mul", ["g", "c"], ["m"]),
        helper.make_node("Add", ["m", "f"], ["t"]),
    ]
    then = helper.make_graph(inner, "then", [], [value("t", 1, None)])
    split = helper.make_node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2)
    total = helper.make_node("ReduceSum", ["a"], ["e"], keepdims=0)
    other = helper.make_graph([split, total], "else", [], [value("e", 1, None)])
    node = helper.make_node("If", ["which"], ["y"], then_branch=then, else_branch=other)
    inputs = [("which", TensorProto.BOOL, []), ("x", 1, ["b", 4]), ("i", 7, ["b", 1])]
    feeds = {"which": np.array(choice), "x": RNG.standard_normal((2, 4)).astype(np.float32)}
    same_results(build([node], inputs, [("y", 1, None)]), feeds | {"i": np.array([[-1], [2]])})
