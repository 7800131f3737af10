"""The parts of verification: promotion, evaluation of our operators, sizes, classes, refusals."""

import math

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.op import PackedRow
from sfa_onnx.passes.candidate import Domain, Operand, Refusal, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.verify import Verifier
from sfa_onnx.passes.verify.execute import Executable
from sfa_onnx.passes.verify.promote import promote
from sfa_onnx.passes.verify.sizes import concrete as sizes_module
from sfa_onnx.report import VerifyRecord
from tests.hand_sites import FLOAT, INT64, gather_site, several_sites


def _run(text, half=None, **feeds):
    """Output of the promoted model; `half` is the value of a float16 initializer "c"."""
    model = onnx.parser.parse_model(text)
    if half is not None:
        model.graph.initializer.append(numpy_helper.from_array(np.float16(half), "c"))
    return Executable(promote(model)).run(feeds)[0]


def test_casts_and_constants_become_double():
    out = _run(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float16[n] x) => (float16[n] y) {
          wide = Cast<to=1>(x) half = Constant<value_float=0.5>()
          z = Mul(wide, half) narrow = Cast<to=10>(z) y = Add(narrow, c) }""",
        half=0.1,
        x=np.array([1 / 3]),
    )
    assert out.dtype == np.float64
    assert out[0] == pytest.approx(1 / 6 + float(np.float16(0.1)), abs=1e-16)


def test_integer_casts_keep_their_meaning():
    out = _run(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float[n] x) => (int64[n] y) { y = Cast<to=7>(x) }""",
        x=np.array([2.9, -2.9]),
    )
    np.testing.assert_array_equal(out, [2, -2])


@pytest.mark.parametrize(("limit", "smooth"), [(20.0, True), (2.0, False)])
def test_softplus_is_the_identity_where_float32_sees_no_difference(limit, smooth):
    """F.softplus: x above its threshold. From 20 on float32 has one number for both."""
    text = f"""<ir_version: 9, opset_import: ["" : 18]> f (float[3] x) => (float[3] y)
    <float limit = {{{limit}}}> {{
        soft = Softplus(x)
        far = Greater(x, limit)
        y = Where(far, x, soft)
    }}"""
    x = np.array([-1.0, 3.0, 21.0])
    out = Executable(promote(onnx.parser.parse_model(text))).run({"x": x})[0]
    np.testing.assert_allclose(
        out[[0, 2]], np.log1p(np.exp(x))[[0, 2]], rtol=1e-15 if smooth else 1e-9
    )
    assert (out[1] == 3.0) != smooth


def test_default_of_constant_of_shape_is_promoted():
    out = _run(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float[n] x) => (float[n] y) { s = Shape(x) z = ConstantOfShape(s) y = Add(x, z) }""",
        x=np.ones(3),
    )
    assert out.dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_base_two_softmax_is_exact_after_promotion(dtype):
    """log2(e) and ln(2) rounded to a narrow type multiply to one again."""
    log2e, ln2 = (np.asarray(v).astype(dtype) for v in (math.log2(math.e), math.log(2)))
    nodes = [
        helper.make_node("Mul", ["x", "log2e"], ["a"]),
        helper.make_node("Mul", ["a", "ln2"], ["y"]),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, [1])],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(log2e, "log2e"), numpy_helper.from_array(ln2, "ln2")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    out = Executable(promote(model)).run({"x": np.array([7.0])})[0]
    assert out[0] == pytest.approx(7.0, rel=1e-15)


def test_lowest_half_becomes_a_real_minus_infinity():
    """-65504 would be an ordinary score in double."""
    text = """<ir_version: 10, opset_import: ["" : 18]>
        g (float16[n] x) => (float16[n] y) { y = Add(x, c) }"""
    assert _run(text, half=-65504, x=np.array([1e5]))[0] < -1e38


@pytest.mark.parametrize(
    ("axis", "scale"),
    [(1, [0.5, 2.0, 4.0]), (0, [0.5, 2.0]), (1, 0.25), (-1, [0.5, 2.0, 4.0]), (None, [0.5, 2, 4])],
)
@pytest.mark.parametrize("zero", [False, True])
def test_dequantize_linear_in_double(axis, scale, zero):
    x = np.array([[1, -2, 3], [4, 5, -6]], np.int8)
    scales = np.array(scale, np.float32)
    zeros = np.arange(3, 3 + scales.size, dtype=np.int8).reshape(scales.shape)
    inputs = ["x", "s"] + (["z"] if zero else [])
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", inputs, ["y"], axis=axis)],  # None: not written
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT8, [2, 3])],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(scales, "s"), numpy_helper.from_array(zeros, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    out = Executable(promote(model)).run({"x": x})[0]
    assert out.dtype == np.float64
    want = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_array_equal(out, want)


def test_bit_casts_keep_their_bits():
    """1.5 in bfloat16 is 0x3fc0; promotion must widen the number, not reinterpret 8 bytes."""
    text = """<ir_version: 13, opset_import: ["" : 26]>
        g (int16[n] x) => (float[n] y) { b = BitCast<to=16>(x) y = Cast<to=1>(b) }"""
    model = onnx.parser.parse_model(text)
    out = Executable(promote(model)).run({"x": np.array([0x3FC0], np.int16)})[0]
    np.testing.assert_array_equal(out, [1.5])


PACK = """
<ir_version: 10, opset_import: ["" : 18, "npu" : 1, "sfa_onnx" : 1]>
r (float[B,S,N,20] q, int8[B,T,16] lat, float[B,T,2] s, float[B,T,4] rope, int32[B,S,1,K] idx)
  => (float[B,S,N,16] y)
{
  axis = Constant<value_ints = [2]>()
  rows = sfa_onnx.KvCachePack<tile_size=8>(lat, rope, s)
  key = Unsqueeze(rows, axis)
  out = npu.NPUSparseFlashAttentionAntiquant<scale_value=0.25, sparse_block_size=1,
    key_quant_mode=2, value_quant_mode=2, layout_query="BSND", layout_kv="BSND", sparse_mode=0,
    attention_mode=2, quant_scale_repo_mode=1, tile_size=8, rope_head_dim=4>(
    q, key, key, idx)
  y = Neg(out)
}
"""


def test_packing_rounds_nothing_in_double():
    """The rope of a packed row has 16 bits; in float64 the judge must see all 52."""
    rng = np.random.default_rng(0)
    feeds = {
        "q": rng.standard_normal((1, 1, 2, 20)),
        "lat": rng.integers(-128, 128, (1, 5, 16)).astype(np.int8),
        "s": rng.uniform(0.01, 0.1, (1, 5, 2)),
        "rope": rng.standard_normal((1, 5, 4)),
        "idx": np.array([[[[3, 0, 4]]]], np.int32),
    }
    model = onnx.parser.parse_model(PACK)
    (out,) = Executable(promote(model)).run(feeds)
    nope = kv_cache.dequantise(feeds["lat"], feeds["s"], np.float64)
    keys = np.concatenate([nope, feeds["rope"]], -1)[0, [3, 0, 4]]
    scores = 0.25 * feeds["q"][0, 0] @ keys.T
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = -(weights / weights.sum(-1, keepdims=True)) @ keys[:, :16]
    np.testing.assert_allclose(out[0, 0], want, rtol=1e-13)
    assert PackedRow(16, 4, 8).bytes == 32  # the row that carried the handle keeps its true size


def _verify(model, candidate, **options):
    return Verifier(GraphIndex.of(model), **options).verify(candidate)


def test_record_tells_sizes_assumptions_constants_and_own_error():
    record = _verify(*gather_site())
    assert isinstance(record, VerifyRecord)
    assert record.sizes == {"B": 3, "S1": 3, "S2": 17, "K": 6}
    assert record.assumptions[0] == "sparse_indices are distinct: discharged by TopK"
    assert record.assumptions[1].startswith("keys that no row attends to hold no NaN")
    assert "scale" in record.constants_read
    assert 1e-9 < record.own_rounding < 1e-5  # float32
    assert all(p.error <= 1e-12 for p in record.probes)


def test_static_sizes_are_used_as_they_are():
    model, candidate = gather_site()
    sizes = {"B": 2, "S1": 1, "S2": 9, "K": 5}
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    record = _verify(model, candidate)
    assert record.sizes == sizes


def test_contradictory_sizes_are_refused():
    """Ten distinct indices into four keys cannot be."""
    model, candidate = gather_site()
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in ("K", "S2"):
                dim.dim_value = {"K": 10, "S2": 4}[dim.dim_param]
    refusal = _verify(model, candidate)
    assert isinstance(refusal, Refusal)
    assert "contradict each other" in refusal.reason


def test_rows_without_keys_are_noted_but_may_not_be_all_there_is():
    """-inf everywhere is NaN in the original and zero in the operator."""
    rule = "  keep3 = LessOrEqual(idx, seen3)"
    few = {
        rule: "  k1 = LessOrEqual(idx, seen3)\n  five = Constant<value_int=5>()\n"
        "  k2 = GreaterOrEqual(seen3, five)\n  keep3 = And(k1, k2)"
    }
    assert isinstance(_verify(*gather_site(few)), Refusal)
    none = {rule: "  keep3 = Less(idx, c0)"}
    reason = _verify(*gather_site(none)).reason
    assert "different infinities or NaN" in reason


def test_what_was_bound_to_no_role_is_refused():
    model, candidate = gather_site()
    candidate.operands = tuple(o for o in candidate.operands if o.value != "rope")
    assert "'rope' enters the site and was bound to no role" in _verify(model, candidate).reason


def test_a_producer_outside_the_site_is_refused():
    model, candidate = gather_site()
    candidate.nodes = tuple(i for i in candidate.nodes if model.graph.node[i].output[0] != "seen3")
    reason = _verify(model, candidate).reason
    assert "'seen3' enters the site from 'n_seen3', which was bound to no role" in reason


def test_a_weight_inside_the_site_is_refused():
    model, candidate = gather_site({"  v = Identity(kn)": "  v = Mul(kn, w)"})
    weight = TensorProto(name="w", data_type=1, dims=[16], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="w.bin")
    model.graph.initializer.append(weight)
    reason = _verify(model, candidate).reason
    assert "depends on the table 'w' [16]" in reason


def test_memory_and_time_are_bounded(monkeypatch):
    refusal = _verify(*gather_site(), budget=0.0)
    assert "not verifiable within budget: the probes" in refusal.reason
    monkeypatch.setattr(sizes_module, "MEMORY_LIMIT", 1000)
    refusal = _verify(*gather_site())
    assert "not verifiable within budget: one run in float64" in refusal.reason
    assert "dynamic shapes" in refusal.hint


def test_the_fused_form_must_accept_what_the_original_accepts():
    """Holes between valid indices: the graph masks each, the operator calls them an error."""
    domain = Domain(low=-1, high="S2", negative_allowed=True)
    changes = {
        "  idx4 = Unsqueeze(idx, minus)": "  safe = Max(idx, c0)\n  idx4 = Unsqueeze(safe, minus)",
        "  keep3 = LessOrEqual(idx, seen3)": "  k1 = LessOrEqual(idx, seen3)\n"
        "  k2 = GreaterOrEqual(idx, c0)\n  keep3 = And(k1, k2)",
    }
    refusal = _verify(*gather_site(changes, domain=domain))
    assert "the original accepts inputs that the fused operator rejects" in refusal.reason
    tidy = Domain(low=-1, high="S2", negative_allowed=True, valid_first=True, distinct=True)
    assert isinstance(_verify(*gather_site(changes, domain=tidy)), VerifyRecord)


def test_wrong_shape_is_refused():
    model, candidate = gather_site(replace={"scale_value=0.22360679": "scale_value=0.22360679"})
    last = candidate.replacement[-1]
    last.output[0] = "out"
    candidate.replacement.append(helper.make_node("Transpose", ["out"], ["y"], perm=[0, 2, 1, 3]))
    assert "but the fused one" in _verify(model, candidate).reason


def test_scale_is_compared_to_rounding():
    model, candidate = gather_site(replace={"scale_value=0.22360679": "scale_value=0.2236069"})
    reason = _verify(model, candidate).reason
    assert "the graph scales its scores by 0.223606" in reason


def test_the_scale_is_found_by_the_first_of_two_outputs():
    twice = {"int32[B] len) => (float[B,S1,4,16] y)": "int32[B] len) => (float[B,S1,4,16] y,"
             " float[B,S1,4,16] again)",
             "(p, v)\n": "(p, v)\n  again = Identity(y)\n"}  # fmt: skip
    model, candidate = gather_site(twice, replace={"scale_value=0.22360679": "scale_value=0.2236"})
    candidate.outputs = ("y", "again")
    candidate.replacement.append(helper.make_node("Identity", ["y"], ["again"]))
    refusal = _verify(model, candidate)
    assert "the graph scales its scores by 0.223606" in refusal.reason


def test_an_original_that_fails_on_ordinary_inputs_is_named():
    """It runs at lengths of its own and fails where all are full: the scale is asked there."""
    full = {
        "float scale = {0.22360679}": "float[1] scales = {0.22360679}",
        "  scaled = Mul(sum, scale)": "  least = ReduceMin<keepdims=0>(len)\n"
        "  shape = Shape<start=1, end=2>(lat)\n  rows = Cast<to=6>(shape)\n"
        "  all = Equal(least, rows)\n  which = Cast<to=7>(all)\n"
        "  scale = Gather(scales, which)\n  scaled = Mul(sum, scale)",
    }
    refusal = _verify(*gather_site(full))
    assert "the original itself fails on ordinary inputs" in refusal.reason
    assert refusal.stopped_at == "y"


def test_equal_sites_share_a_record_and_different_constants_do_not():
    model, candidates = several_sites(3, {2: {"float ninf = {-inf}": "float ninf = {-1e30}"}})
    verifier = Verifier(GraphIndex.of(model))
    records = [verifier.verify(c) for c in candidates]
    assert records[0].shared_with is None
    assert records[1].shared_with == GraphIndex.of(model).label(candidates[0].anchor)
    assert records[2].shared_with is None  # another constant, though it means the same


def test_a_mask_that_hides_every_valid_index_is_refused():
    text = {
        "  keep3 = LessOrEqual(idx, seen3)": "  keep3 = Less(idx, c0)",
    }
    model, candidate = gather_site(text, domain=Domain(low=0, high="S2"))
    for node in list(model.graph.node):
        if node.output[0] in ("seen3", "seen", "base", "base2", "iota", "s1", "qshape", "len64"):
            model.graph.node.remove(node)
    names = [n.output[0] for n in model.graph.node]
    cut = names.index("keep3")
    candidate.nodes = tuple(i for i in range(len(names)) if i != cut)
    candidate.anchor = names.index("y")
    mask = Operand("keep3", Role.MASK, ("B", "S1", "K"), TensorProto.BOOL)
    candidate.operands = tuple(o for o in candidate.operands if o.role is not Role.LENGTHS_KV)
    candidate.operands += (mask,)
    for node in candidate.replacement:
        for i, name in enumerate(node.input):
            if name == "len":
                node.input[i] = ""
    reason = _verify(model, candidate).reason
    assert "'keep3' hides every index that is in range" in reason


def test_operand_kinds_are_real_onnx_types():
    model, candidate = gather_site()
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    assert {o.value: o.elem_type for o in candidate.operands} == kinds
    assert (FLOAT, INT64) == (1, 7)
