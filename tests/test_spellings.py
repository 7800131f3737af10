"""Spellings that people write and export: fused and the same, or refused."""

import numpy as np
import pytest
from onnx import helper, numpy_helper, parser

import sfa_onnx
from sfa_onnx.runtime import run, session

_HEAD = """<ir_version: 8, opset_import: ["" : 17]>
site (float[2,3,4,40] q, {cache}, {select}) => (float[2,3,4,32] o)
<int64[1] kk={{8}}, float sc={{0.15}}, int64[1] m1={{-1}}, int64[1] ax1={{1}}, int64[1] ax2={{2}},
 int64[1] z={{0}}, int64[1] c4={{4}}, int64[1] c32={{32}}, int64[1] ax3={{3}}, int64[1] s24={{24}},
 float zero={{0.0}}, float ninf={{-1e30}}, int64 first={{0}}, int64 page={{16}}>
{{
"""
_TAIL = """
 kt = Transpose<perm=[0,1,3,2]>(k)
 s = MatMul(q, kt)
 sm = Mul(s, sc)
 {below}
 {guard}
 v = Slice(k, z, c32, ax3)
 o = MatMul(p, v)
}}"""
_DENSE = """
 k4 = Unsqueeze(kv, ax1)
 kt = Transpose<perm=[0,1,3,2]>(k4)
 s = MatMul(q, kt)
 sm = Mul(s, sc)
 m4 = Unsqueeze(mask, ax2)
 masked = Add(sm, m4)
 p = Softmax<axis=-1>(masked)
 v = Slice(k4, z, c32, ax3)
 o = MatMul(p, v)
}"""
_CACHE, _SCORES = "float[2,24,40] kv", "float[2,3,24] scores"
_SOFTMAX = "p0 = Softmax<axis=-1>(sm)"
_PLAIN = "p = Identity(p0)"
_GATHER = "ix = Unsqueeze(idx, m1)\n k = GatherND<batch_dims=1>(kv, ix)"
_SCATTER = """val, idx = TopK(scores, kk)
 shp = Shape(scores)
 far = ConstantOfShape<value=float[1] {-1e30}>(shp)
 ish = Shape(idx)
 none = ConstantOfShape<value=float[1] {0.0}>(ish)
 sel = ScatterElements<axis=-1>(far, idx, none)"""


def _gather(body, guard=_PLAIN, cache=_CACHE, select=_SCORES, below=_SOFTMAX):
    text = _HEAD.format(cache=cache, select=select) + body + _TAIL.format(guard=guard, below=below)
    return parser.parse_model(text)


def _dense(body, cache=_CACHE):
    return parser.parse_model(_HEAD.format(cache=cache, select=_SCORES) + body + _DENSE)


def _feeds(model, seed):
    rng = np.random.default_rng(seed)
    feeds = {}
    for info in model.graph.input:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        feeds[info.name] = rng.standard_normal(shape).astype(np.float32)
        if info.name == "chosen":
            rows = [rng.permutation(24)[: shape[-1]] for _ in range(6)]
            feeds[info.name] = np.reshape(rows, shape).astype(np.int32)
    return feeds


SITES = {
    "one kv head, selected by a constant": _gather(
        "idx0 = Gather<axis=2>(chosen, first)\n idx = Cast<to=7>(idx0)\n" + _GATHER,
        select="int32[2,3,1,8] chosen",
    ),
    "the best four of eight": _gather(
        "val, many = TopK(scores, kk)\n idx = Slice(many, z, c4, ax2)\n" + _GATHER
    ),
    "selected keys and a window": _gather(
        "val, best = TopK(scores, kk)\n"
        " last = Constant<value=int64[2,3,2] {22,23,22,23,22,23,22,23,22,23,22,23}>()\n"
        " idx = Concat<axis=2>(best, last)\n" + _GATHER
    ),
    "NaN guard through a cast": _gather(
        "val, idx = TopK(scores, kk)\n" + _GATHER,
        guard="bad = IsNaN(p0)\n flag = Cast<to=9>(bad)\n p = Where(flag, zero, p0)",
    ),
    "nan_to_num": _gather(
        "val, idx = TopK(scores, kk)\n" + _GATHER,
        guard="bad = IsNaN(p0)\n p1 = Where(bad, zero, p0)\n up = Greater(p0, zero)\n"
        " inf = IsInf(p0)\n hot = And(up, inf)\n p = Where(hot, sc, p1)",
    ),
    "softmax of what is below the maximum": _gather(
        "val, idx = TopK(scores, kk)\n" + _GATHER,
        below="top = ReduceMax<axes=[-1], keepdims=1>(sm)\n low = Sub(sm, top)\n"
        " p0 = Softmax<axis=-1>(low)",
    ),
    "front of a buffer [S2, B, D]": _dense(
        "whole = Transpose<perm=[1,0,2]>(ring)\n kv = Slice(whole, z, s24, ax1)\n"
        + _SCATTER
        + "\n mask = Identity(sel)",
        cache="float[32,2,40] ring",
    ),
    "gather from the front of a buffer": _gather(
        "kv = Slice(buffer, z, s24, ax1)\n val, idx = TopK(scores, kk)\n" + _GATHER,
        cache="float[2,32,40] buffer",
    ),
    "causal mask by Trilu": _dense(
        _SCATTER
        + "\n table = Constant<value=float[3,24] {"
        + ",".join(["-1e30"] * 72)
        + "}>()\n upper = Constant<value=int64 {22}>()\n tri = Trilu<upper=1>(table, upper)\n"
        " mask = Add(sel, tri)"
    ),
    "a table of the file in a Constant node": _dense(
        _SCATTER
        + "\n table = Constant<value=float[3,24] {"
        + ",".join("-1e30" if t > s + 20 else "0" for s in range(3) for t in range(24))
        + "}>()\n mask = Add(sel, table)"
    ),
    "cache rounded to float16 in a float32 graph": _gather(
        "half = Cast<to=10>(kv)\n val, idx = TopK(scores, kk)\n ix = Unsqueeze(idx, m1)\n"
        " kh = GatherND<batch_dims=1>(half, ix)\n k = Cast<to=1>(kh)"
    ),
}


@pytest.mark.parametrize("name", SITES)
def test_fused_and_equal(name):
    report = sfa_onnx.fuse(SITES[name])
    assert [s.status for s in report.sites] == ["fused"], report.sites
    before, after = session(SITES[name]), session(report.model)
    for seed in (1, 2):
        feeds = _feeds(SITES[name], seed)
        want, got = (np.asarray(run(s, feeds)["o"]) for s in (before, after))
        assert np.abs(want - got).max() <= 1e-5 * np.abs(want).max()


NEAR = {
    "weights cut at a threshold": (
        "up = Greater(p0, sc)\n p = Where(up, zero, p0)",
        "weights are set to zero unless not((0.15 < ",
    ),
    "weights squared": ("p = Mul(p0, p0)", "the weights are a power (2) of the softmax"),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_refused(name):
    guard, words = NEAR[name]
    report = sfa_onnx.fuse(_gather("val, idx = TopK(scores, kk)\n" + _GATHER, guard=guard))
    assert [s.status for s in report.sites] == ["refused"]
    assert words in report.sites[0].reason


def test_an_opset_that_the_replacement_cannot_use_is_said():
    model = _gather("val, idx = TopK(scores, kk)\n" + _GATHER)
    model.opset_import[0].version = 12
    for node in model.graph.node:
        if node.op_type == "Unsqueeze":
            del node.input[1:]
            node.attribute.append(helper.make_attribute("axes", [-1]))
        elif node.op_type == "Softmax":
            node.attribute[0].i = 3
    report = sfa_onnx.fuse(model, verify=False)
    assert [s.status for s in report.sites] == ["refused"]
    assert "imports opset 12" in report.sites[0].reason
    assert "convert" in report.sites[0].hint


def test_sequences_told_by_prefix_sums_in_the_graph() -> None:
    """Ragged queries whose sequence is the count of prefix sums passed: drawn as such."""
    torch = pytest.importorskip("torch")
    batch, length, keep, heads, width, tokens = 3, 24, 6, 2, 16, 7

    class Ragged(torch.nn.Module):
        def forward(self, q, cache, chosen, ends):
            token = torch.arange(tokens, dtype=torch.int32)
            owner = (token[:, None] >= ends[None, :]).sum(-1)
            rows = cache[owner[:, None], chosen]
            score = torch.einsum("tnd,tkd->tnk", q, rows) * 0.25
            return torch.einsum("tnk,tkd->tnd", score.softmax(-1), rows)

    q, cache = torch.randn(tokens, heads, width), torch.randn(batch, length, width)
    chosen = torch.stack([torch.randperm(length)[:keep] for _ in range(tokens)])
    ends = torch.tensor([2, 3, 7], dtype=torch.int32)
    with torch.no_grad():
        program = torch.onnx.export(
            Ragged().eval(), (q, cache, chosen, ends), dynamo=True, verbose=False
        )
    report = sfa_onnx.fuse(program.model_proto)
    assert [s.status for s in report.sites] == ["fused"], report.sites[0].reason


_SINGLE = """ix = Unsqueeze(single, m1)
 g = GatherND<batch_dims=1>(kv, ix)
 k = Unsqueeze(g, ax2)"""
_OTHER = """next = Add(single, first)
 iy = Unsqueeze(next, m1)
 gy = GatherND<batch_dims=1>(kv, iy)
 ky = Unsqueeze(gy, ax2)"""


@pytest.mark.parametrize("other", [False, True])
def test_a_single_key_needs_no_axis_of_indices(other: bool) -> None:
    body = _SINGLE + ("\n " + _OTHER if other else "")
    model = _gather(body, select="int64[2,3] single")
    if other:  # the row that is weighted is another one
        cut = next(n for n in model.graph.node if n.output[0] == "v")
        cut.input[0] = "ky"
        one = next(t for t in model.graph.initializer if t.name == "first")
        one.CopyFrom(numpy_helper.from_array(np.asarray(1, np.int64), "first"))
    report = sfa_onnx.fuse(model)
    assert [s.status for s in report.sites] == ["refused" if other else "fused"], report.sites
    if other:
        assert "not the key's nope part" in report.sites[0].reason
        return
    rng = np.random.default_rng(5)
    feeds = _feeds(model, 5) | {"single": rng.integers(0, 24, (2, 3))}
    want, got = (np.asarray(run(session(m), feeds)["o"]) for m in (model, report.model))
    assert np.abs(want - got).max() <= 1e-5 * np.abs(want).max()


def test_products_in_half_precision_are_summed_in_float32() -> None:
    """`(q * k).sum(-1)` of float16, as exporters write it: the sum lies behind a cast."""
    model = parser.parse_model("""<ir_version: 9, opset_import: ["" : 18]>
    site (float16[2,3,4,40] q, float16[2,24,40] kv, float[2,3,24] scores) => (float16[2,3,4,32] o)
    <int64[1] kk={8}, int64[1] z={0}, int64[1] c32={32}, int64[1] last={-1}, int64[1] two={2},
     int64[1] three={3}, float sc32={0.15}> {
        sc = Cast<to=10>(sc32)
        best, idx = TopK(scores, kk)
        at = Unsqueeze(idx, last)
        k = GatherND<batch_dims=1>(kv, at)
        q5 = Unsqueeze(q, three)
        k5 = Unsqueeze(k, two)
        m = Mul(q5, k5)
        m32 = Cast<to=1>(m)
        s32 = ReduceSum<keepdims=0>(m32, last)
        s16 = Cast<to=10>(s32)
        s = Mul(s16, sc)
        p = Softmax<axis=-1>(s)
        p5 = Unsqueeze(p, last)
        v = Slice(k5, z, c32, last)
        w = Mul(p5, v)
        w32 = Cast<to=1>(w)
        o32 = ReduceSum<keepdims=0>(w32, three)
        o = Cast<to=10>(o32)
    }""")
    report = sfa_onnx.fuse(model)
    assert [s.status for s in report.sites] == ["fused"], [s.reason for s in report.sites]
    rng = np.random.default_rng(3)
    feeds = {
        "q": rng.standard_normal((2, 3, 4, 40)).astype(np.float16),
        "kv": rng.standard_normal((2, 24, 40)).astype(np.float16),
        "scores": rng.standard_normal((2, 3, 24)).astype(np.float32),
    }
    want, got = (np.asarray(run(session(m), feeds)["o"], np.float32) for m in (model, report.model))
    assert np.abs(want - got).max() <= 1e-2 * np.abs(want).max()
