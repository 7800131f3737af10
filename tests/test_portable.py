import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from sfa_onnx import runtime
from sfa_onnx.errors import ContractError, ModelError
from sfa_onnx.operator import reference
from sfa_onnx.operator.op import (
    LIGHTNING_INDEXER,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
)
from sfa_onnx.runtime.portable.model import make_portable, unfuse
from tests.attention_cases import BF16, LAYOUTS, make_case, softmax_reference
from tests.indexer_cases import indexer_call, indexer_model
from tests.op_models import needs_library, op_model, pack_model, plain

SFAA, SFA = SPARSE_FLASH_ATTENTION_ANTIQUANT, SPARSE_FLASH_ATTENTION


def feeds(case):
    return {n: a for n, a in case.inputs.items() if n != "value"}


def close(got, case, bound):
    exact = case.reference().astype(float)
    error = np.linalg.norm(got.astype(float) - exact, axis=-1)
    assert (error <= bound * np.linalg.norm(exact, axis=-1) + 1e-30).all(), error.max()


BOUNDS = {np.dtype(np.float32): 3e-6, np.dtype(np.float16): 6e-4, BF16: 4e-3}


@pytest.mark.parametrize("op", [SFAA, SFA], ids=["antiquant", "float"])
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize(
    ("sparse_mode", "size", "dtype", "opset"),
    [(3, 1, BF16, 14), (0, 1, np.float16, 18), (3, 4, np.float32, 21), (0, 3, BF16, 18)],
)
def test_the_body_in_plain_onnxruntime_is_the_reference(
    op, layouts, sparse_mode, size, dtype, opset
):
    case = make_case(
        op, layouts, dtype=dtype, sparse_mode=sparse_mode, sparse_block_size=size, seed=opset
    )
    out = runtime.run(plain(make_portable(op_model(case, opset))), feeds(case))
    close(out["attention_out"], case, BOUNDS[np.dtype(dtype)])


def test_no_rope_and_no_lengths():
    for op in (SFAA, SFA):
        case = make_case(op, ("BSND", "BSND"), rope=0, lengths=False, dtype=np.float32)
        out = runtime.run(plain(make_portable(op_model(case))), feeds(case))
        close(out["attention_out"], case, 3e-6)


@pytest.mark.parametrize("op", [SFAA, SFA], ids=["antiquant", "float"])
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("rewrite", [make_portable, unfuse])
def test_sinks_and_the_softmax(op, layouts, rewrite):
    for sparse_mode in (0, 3):
        case = make_case(
            op, layouts, dtype=np.float32, sparse_mode=sparse_mode, sinks=True, lse=op is SFA
        )
        case.inputs["sinks"][:3] = -np.inf, 50, np.inf
        out = runtime.run(plain(rewrite(op_model(case))), feeds(case))
        want = case.reference()
        np.testing.assert_allclose(out["attention_out"], want, rtol=1e-4, atol=1e-6)
        if op is SFA:
            for name, one in zip(
                ("softmax_max", "softmax_sum"), softmax_reference(case), strict=True
            ):
                np.testing.assert_allclose(out[name], one, rtol=1e-5, atol=1e-6)


def test_the_softmax_without_sinks_and_not_asked_for():
    case = make_case(SFA, dtype=np.float32, lse=True)
    out = runtime.run(plain(make_portable(op_model(case))), feeds(case))
    for name, one in zip(("softmax_max", "softmax_sum"), softmax_reference(case), strict=True):
        np.testing.assert_allclose(out[name], one, rtol=1e-5, atol=1e-6)
    model = op_model(case)
    next(a for a in model.graph.node[0].attribute if a.name == "return_softmax_lse").i = 0
    for value in model.graph.output[1:]:
        del value.type.tensor_type.shape.dim[1:]
    out = runtime.run(plain(make_portable(model)), feeds(case))
    assert out["softmax_max"].shape == out["softmax_sum"].shape == (0,)


@pytest.mark.parametrize("dtype", [np.float16, BF16], ids=str)
@pytest.mark.parametrize("rewrite", [make_portable, unfuse])
def test_bodies_may_round_as_the_npu_does(dtype, rewrite):
    case = make_case(SFAA, dtype=dtype)
    rounded, exact = (
        runtime.run(plain(rewrite(op_model(case), **kw)), feeds(case))["attention_out"]
        for kw in ({"rounding": "npu"}, {})
    )
    want = case.reference(mode="golden").astype(float)
    error = np.linalg.norm(rounded.astype(float) - want, axis=-1)
    assert (error <= 2 * BOUNDS[np.dtype(dtype)] * np.linalg.norm(want, axis=-1)).all()
    assert (rounded != exact).any()


def test_rows_that_are_not_selected_do_not_leak_in():
    case = make_case(SFA, ("BSND", "PA_BSND"), dtype=np.float32)
    want = case.reference()
    used = np.unique(case.inputs["block_table"][case.inputs["block_table"] >= 0])
    for name in ("key", "key_rope"):
        spoiled = np.full_like(case.inputs[name], np.nan)
        spoiled[used] = case.inputs[name][used]
        case.inputs[name] = spoiled
    out = runtime.run(plain(make_portable(op_model(case))), feeds(case))
    np.testing.assert_allclose(out["attention_out"], want, rtol=1e-4, atol=1e-6)


def test_a_negative_page_is_refused():
    case = make_case(SFAA, ("BSND", "PA_BSND"), dtype=np.float32)
    case.inputs["block_table"][0, 0] = -1
    with pytest.raises(ModelError, match="out of data bounds"):
        runtime.run(plain(make_portable(op_model(case))), feeds(case))


def two_sites():
    """Two calls with different signatures in one model."""
    a, b = make_case(dtype=np.float32), make_case(dtype=np.float32, sparse_mode=0, seed=1)
    models = []
    for i, case in enumerate((a, b)):
        model = op_model(case)
        node = model.graph.node[0]
        for names in (node.input, node.output):
            names[:] = [f"{n}{i}" if n else "" for n in names]
        node.name = f"site{i}"
        for value in (*model.graph.input, *model.graph.output):
            value.name += str(i)
        models.append(model)
    merged = models[0]
    merged.graph.node.extend(models[1].graph.node)
    merged.graph.input.extend(models[1].graph.input)
    merged.graph.output.extend(models[1].graph.output)
    return merged, {f"{n}{i}": x for i, c in enumerate((a, b)) for n, x in feeds(c).items()}, (a, b)


@pytest.mark.parametrize("rewrite", [make_portable, unfuse])
def test_two_signatures_in_one_model(rewrite):
    model, inputs, cases = two_sites()
    before = model.SerializeToString()
    rewritten = rewrite(model)
    assert model.SerializeToString() == before
    out = runtime.run(plain(rewritten), inputs)
    for i, case in enumerate(cases):
        close(out[f"attention_out{i}"], case, 3e-6)


def test_equal_signatures_share_a_body_whatever_their_scale():
    model, inputs, cases = two_sites()
    for attribute in model.graph.node[1].attribute:
        if attribute.name == "sparse_mode":
            attribute.i = 3
        if attribute.name == "scale_value":
            attribute.f = 0.5
    cases[1].attributes |= {"sparse_mode": 3, "scale_value": 0.5}
    portable = make_portable(model)
    assert len(portable.functions) == 1
    assert portable.ir_version == model.ir_version
    out = runtime.run(plain(portable), inputs)
    close(out["attention_out1"], cases[1], 3e-6)


@needs_library
def test_our_kernel_wins_when_registered():
    model, inputs, _ = two_sites()
    portable, bare = make_portable(model), runtime.run(model, inputs)
    for function in portable.functions:  # a body that would give something else
        for node in function.node:
            if node.op_type == "Softmax":
                node.op_type = "LogSoftmax"
    with_library = runtime.run(portable, inputs)
    assert all((bare[n] == with_library[n]).all() for n in bare)
    without = runtime.run(plain(portable), inputs)
    assert not np.allclose(without["attention_out0"], bare["attention_out0"])


def test_unfuse_leaves_standard_operators_and_everything_else_alone():
    case = make_case(dtype=np.float32)
    model = op_model(case)
    model.graph.node.insert(
        0, helper.make_node("Neg", ["query"], ["minus"], name="before", doc_string="kept")
    )
    model.graph.node.append(helper.make_node("Neg", ["attention_out"], ["after"], name="after"))
    model.graph.node[1].input[0] = "minus"
    out = model.graph.output.add()
    out.CopyFrom(model.graph.output[0])
    out.name = "after"
    first, last = (model.graph.node[i].SerializeToString() for i in (0, 2))
    rewritten = unfuse(make_portable(model))
    assert {n.domain for n in rewritten.graph.node} == {""}
    assert not rewritten.functions
    assert [o.domain for o in rewritten.opset_import] == [""]
    assert rewritten.graph.node[0].SerializeToString() == first
    assert rewritten.graph.node[-1].SerializeToString() == last
    names = [n.name for n in rewritten.graph.node]
    assert len(set(names)) == len(names)
    got = runtime.run(plain(rewritten), feeds(case))
    case.inputs["query"] = -case.inputs["query"]
    close(-got["after"], case, 3e-6)


def test_nodes_of_a_body_are_named_apart_whatever_its_result_is_called():
    """A result called "indices_16" once shared its number with the body's sixteenth value."""
    model = op_model(make_case())
    for number in range(100):
        model.graph.output[0].name = f"result_{number}"
        model.graph.node[0].output[0] = f"result_{number}"
        names = [node.name for node in unfuse(model).graph.node]
        assert len(set(names)) == len(names)


def test_sites_inside_control_flow_are_rewritten():
    case = make_case(dtype=np.float32)
    model = op_model(case)
    branch = helper.make_graph([model.graph.node[0]], "then", [], list(model.graph.output))
    other = helper.make_graph(
        [helper.make_node("Slice", ["query", "zero", "width", "last"], ["other"])],
        "else", [], [helper.make_empty_tensor_value_info("other")],
    )  # fmt: skip
    other.output[0].type.CopyFrom(model.graph.output[0].type)
    constants = [
        onnx.numpy_helper.from_array(np.array([v]), n)
        for n, v in (("zero", 0), ("width", 32), ("last", -1))
    ]
    node = helper.make_node(
        "If", ["flag"], ["attention_out"], then_branch=branch, else_branch=other
    )
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    del model.graph.node[:]
    model.graph.node.append(node)
    model.graph.input.append(flag)
    model.graph.initializer.extend(constants)
    for rewrite in (make_portable, unfuse):
        out = runtime.run(plain(rewrite(model)), {**feeds(case), "flag": np.array(True)})
        close(out["attention_out"], case, 3e-6)


def test_old_opsets_and_unknown_types_are_refused():
    case = make_case(dtype=np.float32)
    with pytest.raises(ModelError, match=r"opset 13.*needs 14"):
        make_portable(op_model(case, opset=13))
    model = op_model(case)
    model.graph.node[0].input[0] = "mystery"
    model.graph.node.insert(0, helper.make_node("Maker", [], ["mystery"], domain="theirs"))
    with pytest.raises(ModelError, match="type of 'mystery', input query"):
        make_portable(model)


@pytest.mark.parametrize("rewrite", [make_portable, unfuse])
def test_types_that_the_contract_does_not_have_are_refused(rewrite):
    rows = {"nope": np.zeros((3, 16), np.float32), "rope": np.zeros((3, 8), np.float32)}
    for model, name in (
        (pack_model(rows, tile_size=16), "rope"),
        (op_model(make_case(dtype=np.float32)), "query"),
    ):
        given = next(i for i in model.graph.input if i.name == name)
        given.type.tensor_type.elem_type = TensorProto.DOUBLE
        with pytest.raises(ContractError, match=f"its input {name} is of type double, .*bfloat16"):
            rewrite(model)


# ------------------------------------------------------------------ indexers


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("rewrite", [make_portable, unfuse])
def test_the_indexer_selects_what_the_reference_selects(layouts, dtype, rewrite):
    inputs, attributes = indexer_call(LIGHTNING_INDEXER, layouts, dtype)
    model = rewrite(indexer_model(LIGHTNING_INDEXER, inputs, attributes))
    got = runtime.run(ort.InferenceSession(model.SerializeToString()), inputs)
    arguments = [inputs.get(t.name) for t in LIGHTNING_INDEXER.inputs]
    indices, values = reference.lightning_indexer(*arguments, **attributes)
    assert (got["sparse_indices"] == indices).all()
    assert (got["sparse_indices"] == -1).any()
    finite = np.isfinite(values.astype(np.float32))
    assert (finite == np.isfinite(got["sparse_values"].astype(np.float32))).all()
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(
        got["sparse_values"].astype(float)[finite], values.astype(float)[finite], 20 * eps, eps
    )


@pytest.mark.parametrize("rewrite", [make_portable, unfuse])
@pytest.mark.parametrize("named", [False, True])
def test_an_indexer_whose_values_nobody_wants(rewrite, named):
    inputs, attributes = indexer_call(LIGHTNING_INDEXER, LAYOUTS[0], np.float32)
    model = indexer_model(LIGHTNING_INDEXER, inputs, attributes)
    del model.graph.node[0].output[1:], model.graph.output[1:]
    if named:  # an output left out is written so, too
        model.graph.node[0].output.append("")
    portable = rewrite(model)
    onnx.checker.check_model(portable)
    got = runtime.run(plain(portable), inputs)
    arguments = [inputs.get(t.name) for t in LIGHTNING_INDEXER.inputs]
    assert (got["sparse_indices"] == reference.lightning_indexer(*arguments, **attributes)[0]).all()


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
def test_the_quantised_indexer_selects_what_the_reference_selects(layouts):
    op = QUANT_LIGHTNING_INDEXER
    inputs, attributes = indexer_call(op, layouts, None)
    got = runtime.run(plain(make_portable(indexer_model(op, inputs, attributes))), inputs)
    want = reference.quant_lightning_indexer(*(inputs.get(t.name) for t in op.inputs), **attributes)
    assert (got["sparse_indices"] == want).all()
