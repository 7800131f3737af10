"""More spellings that are fused, with the same numbers: roundings, exponentials and masks."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx.passes.certificate import check_certificate
from sfa_onnx.runtime import run, session
from tests.graphs import gathered

pytestmark = pytest.mark.kernel

_HEAD = """<ir_version: 8, opset_import: ["" : 17]>
site ({types}[2,3,4,40] q, float[2,24,40] kv, float[2,3,24] scores) => ({types}[2,3,4,32] o)
<int64[1] kk={{8}}, float sc={{0.25}}, int64[1] m1={{-1}}, int64[1] ax2={{2}}, int64[1] z={{0}},
 int64[1] c32={{32}}, int64[1] ax3={{3}}, int64[1] m3={{-3}}, int64 depth={{24}},
 int64[2] onoff={{0, 1}}, float low={{-30000.0}}, float zero={{0.0}}, float one={{1.0}}>
{{
 val, idx = TopK(scores, kk)
"""
_SCORES = """
 kt = Transpose<perm=[0,1,3,2]>(k)
 raw = MatMul(q, kt)
 s = Mul(raw, sc)
"""
_SUM = " v = Slice(k, z, c32, ax3)\n o = MatMul(p, v)\n}"
_ROWS = "ix = Unsqueeze(idx, m1)\n k = GatherND<batch_dims=1>(kv, ix)\n"


def _model(rows=_ROWS, scores=_SCORES, weights="p = Softmax<axis=-1>(s)\n", types="float"):
    return onnx.parser.parse_model(_HEAD.format(types=types) + rows + scores + weights + _SUM)


def _feeds(model: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = [d.dim_value for d in tensor.shape.dim]
        integers = rng.integers(0, 32, shape)  # int8 codes, and indices of 32 rows
        floats = rng.standard_normal(shape)
        feeds[value.name] = (integers if kind.kind == "i" else floats).astype(kind)
    return feeds


def _fused(model: onnx.ModelProto, tolerance: float = 1e-5) -> onnx.ModelProto:
    """The only site is fused, and computes what the graph did."""
    report = sfa_onnx.fuse(model)
    assert [s.status for s in report.sites] == ["fused"], [s.reason for s in report.sites]
    before, after = session(model), session(report.model)
    for seed in (1, 2):
        feeds = _feeds(model, seed)
        want, got = (np.float64(run(s, feeds)[model.graph.output[0].name]) for s in (before, after))
        assert np.abs(want - got).max() <= tolerance * np.abs(want).max()
    return report.model


def test_a_query_rounded_to_float16_stays_rounded():
    scores = _SCORES.replace("(q, kt)", "(rounded, kt)")
    _fused(_model(scores=" half = Cast<to=10>(q)\n rounded = Cast<to=1>(half)\n" + scores))


def test_scales_rounded_to_float16_stay_rounded():
    model = gathered(
        dequant="narrow = Cast <to = 10> (steps)\nagain = Cast <to = 1> (narrow)\n"
        "floats = Cast <to = 1> (codes)\ntiled = Reshape(floats, split)\n"
        "step4 = Unsqueeze(again, last)\nproduct = Mul(tiled, step4)\n"
        "nope = Reshape(product, joined)"
    )
    _fused(model)


def test_a_float32_cache_under_a_float16_operator_is_read_in_place():
    """Rows are rounded to the operator's own type: before or after the gather is the same."""
    scores = " sc16 = Cast<to=10>(sc)" + _SCORES.replace("(raw, sc)", "(raw, sc16)")
    rows = _ROWS.replace("k =", "wide =") + " k = Cast<to=10>(wide)\n"
    model = _model(rows, scores, types="float16")
    fused = _fused(model, 5e-3)
    assert not any(n.op_type.startswith("Gather") and "kv" in n.input for n in fused.graph.node)


_DENSE = " ax1 = Constant<value=int64[1] {1}>()\n k = Unsqueeze(kv, ax1)\n"
_EXP = " top = ReduceMax<axes=[-1]>(s)\n x = Sub(s, top)\n e = Exp(x)\n"
_HITS = " hot = OneHot<axis=-1>(idx, depth, onoff)\n hits = ReduceSum<keepdims=0>(hot, ax2)\n"
_SITES = {
    "exp(log_softmax)": _model(weights=" l = LogSoftmax<axis=-1>(s)\n p = Exp(l)\n"),
    "the product written out": _model(
        scores=" q5 = Unsqueeze(q, ax3)\n k5 = Unsqueeze(k, ax2)\n each = Mul(q5, k5)\n"
        " raw = ReduceSum<keepdims=0>(each, m1)\n s = Mul(raw, sc)\n"
    ),
    "one-hot mask": _model(
        _DENSE + _HITS,
        weights=" on = Cast<to=9>(hits)\n off = Not(on)\n off4 = Unsqueeze(off, ax2)\n"
        " masked = Where(off4, low, s)\n p = Softmax<axis=-1>(masked)\n",
    ),
    "exponentials times a mask": _model(
        _DENSE + _HITS,
        weights=_EXP + " on = Cast<to=1>(hits)\n on4 = Unsqueeze(on, ax2)\n em = Mul(e, on4)\n"
        " all = ReduceSum<keepdims=1>(em, m1)\n p = Div(em, all)\n",
    ),
}


@pytest.mark.parametrize("name", _SITES)
def test_fused_and_equal(name):
    _fused(_SITES[name])


def _reason(model: onnx.ModelProto) -> str:
    (site,) = sfa_onnx.fuse(model).sites
    assert site.status == "refused"
    return site.reason


def test_exponentials_weighted_by_numbers_are_refused():
    """A weight per key is no mask."""
    weights = (
        " all = Shape(scores)\n none = ConstantOfShape(all)\n"
        " w3 = ScatterElements<axis=-1>(none, idx, val)\n w = Unsqueeze(w3, ax2)\n"
        + _EXP
        + " em = Mul(e, w)\n sum = ReduceSum<keepdims=1>(em, m1)\n p = Div(em, sum)\n"
    )
    assert _reason(_model(_DENSE, weights=weights))


def test_hits_that_count_are_refused_where_indices_repeat():
    """exp * (number of times a key is named) is not softmax over the named keys."""
    twice = " both = Concat<axis=-1>(idx, idx)\n" + _HITS.replace("(idx,", "(both,")
    weights = (
        _EXP + " on = Cast<to=1>(hits)\n on4 = Unsqueeze(on, ax2)\n em = Mul(e, on4)\n"
        " all = ReduceSum<keepdims=1>(em, m1)\n p = Div(em, all)\n"
    )
    part = twice.replace("(idx, idx)", "(idx, first)").replace(
        " both", " first = Slice(idx, z, m3, ax2)\n both", 1
    )
    assert _reason(_model(_DENSE + part, weights=weights))


_BAD = " bad3 = Less(val, zero)\n bad = Unsqueeze(bad3, ax2)\n"
_HIDE = _BAD + " masked = Where(bad, low, s)\n p0 = Softmax<axis=-1>(masked)\n"


def test_weights_zeroed_where_scores_are_hidden():
    _fused(_model(weights=_HIDE + " p = Where(bad, zero, p0)\n"))


def test_weights_zeroed_elsewhere_are_refused():
    other = _HIDE + " few3 = Less(val, one)\n few = Unsqueeze(few3, ax2)\n"
    reason = _reason(_model(weights=other + " p = Where(few, zero, p0)\n"))
    assert "set to zero unless not(few3[" in reason


def test_weights_zeroed_where_something_else_is_infinite_are_refused():
    """Only infinite weights are impossible; other tensors may well be infinite."""
    where = " inf3 = IsInf(val)\n inf = Unsqueeze(inf3, ax2)\n"
    reason = _reason(_model(weights=_HIDE + where + " p = Where(inf, zero, p0)\n"))
    assert "set to zero unless not(inf3[" in reason


def test_two_key_heads_under_one_selection_are_refused():
    rows = _ROWS.replace("k =", "rows =") + (
        " two = Constant<value=int64[5] {2,3,8,2,20}>()\n k5 = Reshape(rows, two)\n"
        " k = Transpose<perm=[0,1,3,2,4]>(k5)\n"
    )
    scores = (
        " four = Constant<value=int64[5] {2,3,2,4,20}>()\n q5 = Reshape(q, four)\n"
        " kt = Transpose<perm=[0,1,2,4,3]>(k)\n raw = MatMul(q5, kt)\n s = Mul(raw, sc)\n"
    )
    text = _HEAD.format(types="float").replace("2,3,4,40", "2,3,8,20").replace("4,32", "2,4,16")
    model = onnx.parser.parse_model(
        text + rows + scores + " p = Softmax<axis=-1>(s)\n c16 = Constant<value=int64[1] {16}>()\n"
        " ax4 = Constant<value=int64[1] {4}>()\n v = Slice(k, z, c16, ax4)\n o = MatMul(p, v)\n}"
    )
    assert "kv have 2 heads; the operator takes one (N2 = 1)" in _reason(model)


def test_integer_keys_without_a_scale():
    rows = " whole = Cast<to=3>(kv)\n codes = Cast<to=1>(whole)\n" + _ROWS.replace("(kv", "(codes")
    assert "integers that are cast to float without a scale" in _reason(_model(rows))
    one = rows.replace("Cast<to=1>(whole)", "Cast<to=1>(whole)\n steps = Mul(codes, sc)")
    scaled = _reason(_model(one.replace("(codes, ix)", "(steps, ix)")))
    assert "cast to float and scaled by one number, 0.25, for all" in scaled


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("Add(all, one)", "divided by their sum and 1"),
        ("Max(all, one)", "a floor (1) that can act"),
    ],
)
def test_a_divisor_that_is_more_than_the_sum_is_listed(more, text):
    weights = _EXP + f" all = ReduceSum<keepdims=1>(e, m1)\n down = {more}\n p = Div(e, down)\n"
    assert text in _reason(_model(weights=weights))


def test_keys_that_are_rounded_more_than_values_are_refused():
    scores = " half = Cast<to=10>(k)\n kr = Cast<to=1>(half)\n" + _SCORES.replace("(k)", "(kr)")
    assert "keys are rounded to FLOAT16, values to FLOAT" in _reason(_model(scores=scores))


def test_nodes_that_no_output_needs_do_not_hold_a_site_back(tmp_path):
    """What reads the weights and leads nowhere goes with them, and the certificate says so."""
    model = _model(weights=" p = Softmax<axis=-1>(s)\n lost = Sub(p, one)\n more = Exp(lost)\n")
    report = sfa_onnx.fuse(model, certificate=tmp_path / "proof.json")
    (site,) = report.sites
    assert site.status == "fused", site.reason
    assert {"lost", "more"} <= set(site.removed)
    assert "removed as well: lost, more, which no output needs" in " ".join(site.bound)
    onnx.checker.check_model(report.model)
    assert check_certificate(tmp_path / "proof.json", model, report.model).holds


_FLAT = """<ir_version: 8, opset_import: ["" : 17]>
flat (float[4,40] q, float[24,40] kv, {given}) => (float[4,32] o)
<int64[1] kk={{8}}, int64[1] z={{0}}, int64[1] c32={{32}}, int64[1] ax1={{1}}, float none={{0.0}}>
{{
 {choose}
 k = Gather<axis=0>(kv, idx)
 s = Gemm<transB=1, alpha=0.25{more}>(q, k{third})
 p = Softmax<axis=-1>(s)
 v = Slice(k, z, c32, ax1)
 o = Gemm(p, v)
}}"""
_BEST = {"given": "float[24] scores", "choose": "val, idx = TopK(scores, kk)"}


def _flat(more="", third="", given="", choose=""):
    return onnx.parser.parse_model(_FLAT.format(more=more, third=third, given=given, choose=choose))


@pytest.mark.parametrize(
    "knobs",
    [
        _BEST,
        {**_BEST, "third": ", none"},
        {**_BEST, "third": ", q0", "more": ", beta=0.0", "given": "float[24] scores, float[8] q0"},
        {"given": "int64[8] idx", "choose": ""},
    ],
    ids=["best", "zero bias", "bias times zero", "one row of indices from outside"],
)
def test_one_query_token_without_batch(knobs):
    """Gemm over two-dimensional tensors."""
    model = _flat(**knobs)
    if knobs["given"].startswith("int64"):
        report = sfa_onnx.fuse(model)
        assert [s.status for s in report.sites] == ["fused"]
        return
    _fused(model)


def test_a_bias_of_the_product_is_refused():
    reason = _reason(_flat(**{**_BEST, "given": "float[24] scores, float[8] b", "third": ", b"}))
    assert "a product with a bias" in reason


def test_quantised_products_are_refused_by_name():
    scores = (
        " kt = Transpose<perm=[0,1,3,2]>(k)\n qq, qs, qz = DynamicQuantizeLinear(q)\n"
        " kq, ks, kz = DynamicQuantizeLinear(kt)\n si = MatMulInteger(qq, kq, qz, kz)\n"
        " sf = Cast<to=1>(si)\n s = Mul(sf, sc)\n"
    )
    reason = _reason(_model(scores=scores))
    assert "MatMulInteger on the score path is a product of rounded integers" in reason


def test_a_gathered_cache_that_is_only_reordered_is_not_listed():
    """Beam search picks sequences by one row of indices; its keys and values differ."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    beam (float[2,4,1,16] q, float[2,4,24,16] pk, float[2,4,24,16] pv, int64[2] beam)
     => (float[2,4,1,16] o) {
     k = Gather<axis=0>(pk, beam)
     v = Gather<axis=0>(pv, beam)
     kt = Transpose<perm=[0,1,3,2]>(k)
     s = MatMul(q, kt)
     p = Softmax<axis=-1>(s)
     o = MatMul(p, v)
    }"""
    assert not sfa_onnx.fuse(onnx.parser.parse_model(text)).sites
