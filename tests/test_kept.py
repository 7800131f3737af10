"""Rows that a boolean mask picks, then attended: the mask hides the others, or nothing is fused."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

import sfa_onnx
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.kept import counts_kept, kept_mask
from tests.zoo.judge import run_fused, run_original, scaled_error

N, D, C, K = 4, 40, 32, 6
_TEXT = """<ir_version: 9, opset_import: ["" : 18]>
row (float[4,40] q, float[s,40] kv, int64[2,6] idx{inputs}) => (float[4,32] o{outputs})
<int64 row={{1}}, int64 none={{-1}}, int64[1] zero={{0}}, int64[1] one={{1}}, float sc={{0.2}},
 int64[1] last={{-1}}, int64[1] cut={{32}}, float half={{0.5}}, float[1] shown={{1.0}},
 float deep={{-inf}}, float[1] off={{0.0}}, float two={{2.5}}>
{{
 own = Gather<axis=0>(idx, row)
 hidden = Equal(own, none)
 mask = Not(hidden)
 nz = NonZero(mask)
 points = Transpose<perm=[1,0]>(nz)
 {pick}
 kt = Transpose<perm=[1,0]>(k)
 raw = MatMul(q, kt)
 s = Mul(raw, sc)
 {soft}
 {value}
 o = MatMul(p, v)
}}"""
_PICK = "kept = GatherND(own, points)\n k = Gather<axis=0>(kv, kept)"
_SOFT = "p = Softmax<axis=-1>(s)"
_VALUE = "v = Slice(k, zero, cut, one)"


def _model(pick=_PICK, soft=_SOFT, value=_VALUE, inputs="", outputs=""):
    return parser.parse_model(
        _TEXT.format(pick=pick, soft=soft, value=value, inputs=inputs, outputs=outputs)
    )


def _feeds(model, seed, keys=24, hidden=None):
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(keys)[:K] for _ in range(2)])
    rows[rng.random(rows.shape) < 0.4] = -1
    if hidden is not None:
        rows[:] = np.where(hidden, -1, np.maximum(rows, 0))
    feeds = {
        "q": rng.standard_normal((N, D)).astype(np.float32),
        "kv": rng.standard_normal((keys, D)).astype(np.float32),
        "idx": rows,
    }
    return feeds


_DENSE = """six = Constant<value=int64[1] {6}>()
 wide = Shape(kv)
 keys = Gather<axis=0>(wide, zero)
 blank = ConstantOfShape<value=float[1] {0.0}>(keys)
 front = Max(own, zero)
 ones = Expand(shown, six)
 picked = ScatterElements<axis=0>(blank, front, ones)
 over = Greater(picked, half)
 found = NonZero(over)
 places = Transpose<perm=[1,0]>(found)
 k = GatherND(kv, places)"""
SITES = {
    "indices picked by a mask": _model(),
    "places of a mask, as numbers": _model(
        "at = Squeeze(points, one)\n kept = Gather<axis=0>(own, at)\n k = Gather<axis=0>(kv, kept)"
    ),
    "columns joined behind the gather": _model(
        "kept = GatherND(own, points)\n a0 = Slice(kv, zero, cut, one)\n"
        " far = Constant<value=int64[1] {40}>()\n b0 = Slice(kv, cut, far, one)\n"
        " a = Gather<axis=0>(a0, kept)\n b = Gather<axis=0>(b0, kept)\n k = Concat<axis=1>(a, b)"
    ),
    "softmax written out": _model(
        soft="top = ReduceMax<keepdims=1>(s, last)\n low = Sub(s, top)\n e = Exp(low)\n"
        " total = ReduceSum<keepdims=1>(e, last)\n p = Div(e, total)"
    ),
    "with its log-sum-exp": _model(
        soft=_SOFT + "\n lse = ReduceLogSumExp<keepdims=0>(s, last)", outputs=", float[4] lse"
    ),
    "rows of a cache picked by a scattered mask": _model(_DENSE),
}
_SET = """kept = GatherND(own, points)
 at = Unsqueeze(kept, last)
 wide = Shape(kv)
 keys = Gather<axis=0>(wide, zero)
 blank = ConstantOfShape<value=float[1] {0.0}>(keys)
 many = Shape(kept)
 ones = Expand(shown, many)
 hits = ScatterND(blank, at, {update})
 over = Greater(hits, half)
 masked = Where(over, s, deep)
 p0 = Softmax<axis=-1>(masked)
 bad = IsNaN(p0)
 nought = Squeeze(off)
 p = Where(bad, nought, p0)"""
_KEPT = "kept = GatherND(own, points)\n"
SITES["a mask set at the indices that are kept"] = _model(
    "k = Identity(kv)", soft=_SET.replace("{update}", "ones")
)
MISSES = {
    "all that are kept but the first": _model(
        "k0 = GatherND(own, points)\n far = Constant<value=int64[1] {99}>()\n"
        " kept = Slice(k0, one, far, zero)\n k = Gather<axis=0>(kv, kept)"
    ),
    "the first three that are kept": _model(
        "k0 = GatherND(own, points)\n three = Constant<value=int64[1] {3}>()\n"
        " kept = Slice(k0, zero, three, zero)\n k = Gather<axis=0>(kv, kept)"
    ),
    "a mask that only some of the kept set": _model(
        "k = Identity(kv)",
        soft="c0 = Constant<value=int64 {0}>()\n"
        + _SET.replace("hits =", "rank = CumSum(ones, c0)\n hits =")
        .replace("{update}", "rank")
        .replace("half", "two"),
    ),
    "a bias by the place among the kept": _model(
        soft="long = Shape<start=1, end=2>(nz)\n size = Squeeze(long)\n nought = Squeeze(zero)\n"
        " step = Squeeze(one)\n at = Range(nought, size, step)\n bias = Cast<to=1>(at)\n"
        " t = Add(s, bias)\n p = Softmax<axis=-1>(t)"
    ),
    "values in the opposite order": _model(
        value="long = Shape<start=1, end=2>(nz)\n size = Squeeze(long)\n nought = Squeeze(zero)\n"
        " step = Squeeze(one)\n at = Range(nought, size, step)\n end = Sub(size, step)\n"
        " back = Sub(end, at)\n turned = Gather<axis=0>(k, back)\n"
        " v = Slice(turned, zero, cut, one)"
    ),
    "keys centred among the kept": _model(
        _KEPT + " rows = Gather<axis=0>(kv, kept)\n mean = ReduceMean<keepdims=1>(rows, zero)\n"
        " k = Sub(rows, mean)"
    ),
    "the number of kept keys in the sum": _model(
        soft="e = Exp(s)\n total = ReduceSum<keepdims=1>(e, last)\n"
        " long = Shape<start=1, end=2>(nz)\n size = Cast<to=1>(long)\n"
        " more = Add(total, size)\n p = Div(e, more)"
    ),
    "values of other indices": _model(
        value="next = Add(kept, one)\n r = Gather<axis=0>(kv, next)\n v = Slice(r, zero, cut, one)"
    ),
}


@pytest.mark.parametrize("name", SITES)
def test_what_a_mask_picks_is_what_it_does_not_hide(name):
    model = SITES[name]
    report = sfa_onnx.fuse(model)
    assert [s.status for s in report.sites] == ["fused"], [s.reason for s in report.sites]
    for seed, hidden in ((0, None), (1, False), (2, None), (3, True)):
        feeds = _feeds(model, seed, keys=24 + 7 * (seed % 2), hidden=hidden)
        before, after = run_original(model, feeds), run_fused(report.model, feeds)
        assert scaled_error(before, after) < 1e-5, seed


@pytest.mark.parametrize("name", MISSES)
def test_what_depends_on_the_places_among_the_kept_is_refused(name):
    (site,) = sfa_onnx.fuse(MISSES[name]).sites
    assert site.status == "refused"
    assert "whole_" not in site.reason


def test_a_size_says_which_mask_it_counts():
    graph = _model().graph
    sizes = Concrete(GraphIndex(graph))
    count = sizes.shape("nz")[1]
    assert sizes.shape("nz")[0] == 1
    assert kept_mask(count) == "mask"
    assert sizes.shape("k") == (count, 40)
    assert counts_kept(count * 40)
    assert not kept_mask(count * 40)
    assert not counts_kept(sizes.shape("kv")[0])


_ENTRIES = """<ir_version: 9, opset_import: ["" : 18]>
listed (float[2,3,4,40] q, float[2,24,40] kv, int64[2,3,6] idx) => (float[2,3,4,32] o)
<int64[3] whole={{2,3,24}}, int64[4] each={{2,3,6,1}}, int64[2] flat={{36,3}}, int64[1] many={{36}},
 int64 first={{0}}, int64 third={{2}}, int64 end={{24}}, int64[1] one={{1}}, int64[1] zero={{0}},
 int64[1] cut={{32}}, int64[1] two={{2}}, float sc={{0.2}}, float low={{-inf}},
 int64[2,1,1,1] batch={{{batch}}}, int64[1,3,1,1] row={{0,1,2}}>
{{
 b = Expand(batch, each)
 r = Expand(row, each)
 i = Reshape(idx, each)
 points = Concat<axis=3>(b, r, i)
 list = Reshape(points, flat)
 own = Gather<axis=1>(list, third)
 above = GreaterOrEqual(own, first)
 below = Less(own, end)
 good = And(above, below)
 nz = NonZero(good)
 t = Transpose<perm=[1,0]>(nz)
 at = Squeeze(t, one)
 kept = Gather<axis=0>(list, at)
 n = Shape<end=1>(kept)
 yes = ConstantOfShape<value=bool[1] {{1}}>(n)
 none = ConstantOfShape<value=bool[1] {{0}}>(whole)
 mask = ScatterND(none, kept, yes)
 shown = Unsqueeze(mask, one)
 s = Einsum<equation="bshd,btd->bhst">(q, kv)
 scaled = Mul(s, sc)
 masked = Where(shown, scaled, low)
 p = Softmax<axis=-1>(masked)
 v = Slice(kv, zero, cut, two)
 o = Einsum<equation="bhst,btd->bshd">(p, v)
}}"""


def test_entries_listed_one_by_one_are_a_selection():
    """`mask.at[b, s, idx].set(True)` of jax: entries out of range are left out before a scatter."""
    model = parser.parse_model(_ENTRIES.format(batch="0,1"))
    report = sfa_onnx.fuse(model)
    assert [s.status for s in report.sites] == ["fused"], [s.reason for s in report.sites]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        idx = np.stack([rng.permutation(24)[:6] for _ in range(6)]).reshape(2, 3, 6)
        idx[:, :, 1:][rng.random((2, 3, 5)) < 0.3] = (-1, 24, 30)[seed]
        feeds = {
            "q": rng.standard_normal((2, 3, 4, 40)).astype(np.float32),
            "kv": rng.standard_normal((2, 24, 40)).astype(np.float32),
            "idx": idx,
        }
        before, after = run_original(model, feeds), run_fused(report.model, feeds)
        assert scaled_error(before, after) < 1e-5


@pytest.mark.parametrize("batch", ["1,0", "0,0"])
def test_entries_listed_for_another_row_are_refused(batch):
    (site,) = sfa_onnx.fuse(parser.parse_model(_ENTRIES.format(batch=batch))).sites
    assert site.status == "refused"
