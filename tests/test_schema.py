import subprocess
import sys

import onnx
import pytest
from onnx import TensorProto, helper

from sfa_onnx.operator import schema
from sfa_onnx.operator.op import ALL_OPS, BINDINGS
from tests.attention_cases import BF16, LAYOUTS, make_case
from tests.op_models import op_model

pytestmark = pytest.mark.skipif(
    not hasattr(onnx.defs.OpSchema, "set_type_and_shape_inference_function"),
    reason="this onnx takes no inference function from Python",
)


def inferred(model):
    onnx.checker.check_model(model, full_check=True)
    out = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0]
    kind = out.type.tensor_type
    return kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim]


def test_every_operator_is_registered_by_the_import():
    for op in (*ALL_OPS, *(b.contract for b in BINDINGS)):
        found = onnx.defs.get_schema(op.name, domain=op.domain)
        assert found.since_version == op.version
        assert [i.name for i in found.inputs] == [t.name for t in op.inputs]
        assert {n for n, a in found.attributes.items() if a.required} == {
            a.name for a in op.attributes if a.required
        }
    schema.register()  # a second time changes nothing


def test_a_bare_import_registers():
    code = "import sfa_onnx, onnx; onnx.defs.get_schema('NPUSparseFlashAttention', domain='npu')"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
def test_symbolic_dims_flow_through(layouts):
    case = make_case(layouts=layouts, dtype=BF16)
    elem, dims = inferred(op_model(case))
    lead = 3 if layouts[0] == "BSND" else 2
    assert elem == TensorProto.BFLOAT16
    assert dims == [f"query_{i}" for i in range(lead)] + [32]


def test_float_cache_keeps_the_query_shape():
    case = make_case(next(op for op in ALL_OPS if op.name == "NPUSparseFlashAttention"))
    assert inferred(op_model(case))[1][-1] == case.details["nope"]


def model_of(op_name, inputs, n_outputs=1, **attributes):
    op = next(o for o in ALL_OPS if o.name == op_name)
    names = [n for n, _, _ in inputs]
    node = helper.make_node(
        op.name, names, [f"o{i}" for i in range(n_outputs)], domain=op.domain, **attributes
    )
    infos = [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs if n]
    outs = [helper.make_empty_tensor_value_info(f"o{i}") for i in range(n_outputs)]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(op.domain, 1)]
    graph = helper.make_graph([node], "g", infos, outs)
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def shapes(model):
    got = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    return [
        (
            o.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim],
        )
        for o in got.graph.output
    ]


def test_pack_makes_rows_of_656_bytes():
    F16 = TensorProto.FLOAT16
    rows = model_of("KvCachePack", [("n", F16, ["b", 1, 512]), ("r", F16, ["b", 1, 64])])
    assert shapes(rows) == [(TensorProto.INT8, ["b", 1, 656])]
    wide = model_of("KvCachePack", [("n", 1, ["b", 512]), ("r", 1, ["b", 64])], tile_size=128)
    assert shapes(wide) == [(TensorProto.INT8, ["b", 784])]


def test_indexer_gives_indices_and_values_when_asked():
    inputs = [
        ("q", 16, ["b", "s", 64, 128]),
        ("k", 16, ["b", "t", 1, 128]),
        ("w", 16, ["b", "s", 64]),
    ]
    want = ["b", "s", 1, 512]
    model = model_of("NPULightningIndexer", inputs, 2, sparse_count=512, return_values=1)
    assert shapes(model) == [(TensorProto.INT32, want), (TensorProto.BFLOAT16, want)]
    only = model_of("NPULightningIndexer", inputs, sparse_count=512)
    assert shapes(only) == [(TensorProto.INT32, want)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sparse_mode": 1}, "expected 0 or 3, got 1"),
        ({"attention_mode": 0}, "attention_mode: expected 2, got 0"),
        ({"tile_size": 64}, "tile_size: expected a divisor of the latent"),
        ({"layout_query": "TND"}, r"query \(layout TND\): expected rank 3"),
        ({"layout_kv": "TND"}, "layout TND of the key"),
        ({"scale_value": None}, "Required attribute 'scale_value' is missing|scale_value"),
        ({"no_such": 3}, "Unrecognized attribute: no_such"),
    ],
)
def test_the_checker_refuses_what_the_contract_forbids(change, text):
    case = make_case(layouts=("BSND", "PA_BSND"))
    case.attributes |= change
    if case.attributes["scale_value"] is None:
        del case.attributes["scale_value"]
    model = op_model(case)
    with pytest.raises(
        (onnx.checker.ValidationError, onnx.shape_inference.InferenceError), match=text
    ):
        onnx.checker.check_model(model, full_check=True)


def test_unknown_types_do_not_break_inference():
    case = make_case()
    model = op_model(case)
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    out = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0]
    assert not any(d.dim_param or d.dim_value for d in out.type.tensor_type.shape.dim)
