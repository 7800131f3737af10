"""Rows that see no key: what a graph puts in their place, and what it takes from others by it."""

import numpy as np
import pytest
from onnx import parser

import sfa_onnx
from sfa_onnx.runtime import run, session

_HEAD = """<ir_version: 8, opset_import: ["" : 17]>
site (float[2,3,4,40] q, float[2,24,40] kv, int64[2,3,8] ragged, bool[2,3] valid{more})
 => (float[2,3,4,32] o{out})
<float sc={{0.15}}, int64[1] m1={{-1}}, int64[1] ax2={{2}}, int64[1] ax3={{3}}, int64[1] z={{0}},
 int64[1] one={{1}}, int64[1] c8={{8}}, int64[1] c32={{32}}, float zero={{0.0}},
 float low={{-1e30}}, int64 nought={{0}}, int64[4] col={{1,1,4,1}}, int64[4] all={{2,3,4,1}}>
{{
 ok0 = GreaterOrEqual(ragged, nought)
 idx = Max(ragged, nought)
 ix = Unsqueeze(idx, m1)
 k = GatherND<batch_dims=1>(kv, ix)
 kt = Transpose<perm=[0,1,3,2]>(k)
 s0 = MatMul(q, kt)
 s = Mul(s0, sc)
 ok = Unsqueeze(ok0, ax2)
 hid = Where(ok, s, low)
 count = Cast<to=7>(ok)
 {body}
 v = Slice(k, z, c32, ax3)
 o = MatMul(p, v)
}}"""
_ANY = "n = ReduceMax<axes=[{axis}], keepdims=1>(count)\n some = Cast<to=9>(n)\n "
_ROW = "filled = Where({by}, hid, zero)\n w = Softmax<axis=-1>(filled)\n p = Where(ok, w, zero)"
_SLOT = """a = Slice(hid, z, one, ax3)
 b = Slice(hid, one, c8, ax3)
 c = Where(some, a, zero)
 filled = Concat<axis=3>(c, b)
 w = Softmax<axis=-1>(filled)
 p = Where(ok, w, zero)"""
_EXPS = """n = ReduceSum<keepdims=1>(count, m1)
 some = Greater(n, nought)
 filled = Where(some, hid, zero)
 top = ReduceMax<axes=[-1], keepdims=1>(filled)
 d = Sub(filled, top)
 e = Exp(d)
 t = ReduceSum<keepdims=1>(e, m1)
 w = Div(e, t)
 p = Where(ok, w, zero)"""
_VALID = """r = Unsqueeze(valid, m1)
 row = Unsqueeze(r, m1)
 both = And(ok, row)
 h2 = Where(both, s, low)
 w = Softmax<axis=-1>(h2)
 p = Where(both, w, zero)"""
_SINK = """col0 = Reshape(sink, col)
 own = Mul(col0, {by})
 wide = Expand(own, all)
 joined = Concat<axis=3>(hid, wide)
 w = Softmax<axis=-1>(joined)
 p = Slice(w, z, c8, ax3)"""


def _site(body, more="", out=""):
    return parser.parse_model(_HEAD.format(body=body, more=more, out=out))


def _feeds(model, seed):
    rng = np.random.default_rng(seed)
    feeds = {}
    for info in model.graph.input:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        feeds[info.name] = rng.standard_normal(shape).astype(np.float32)
    ragged = np.stack([rng.permutation(24)[:8] for _ in range(6)]).reshape(2, 3, 8)
    for row, count in zip(ragged.reshape(6, 8), (8, 5, 0, 1, 7, 0), strict=True):
        row[count:] = -1
    return feeds | {"ragged": ragged, "valid": rng.random((2, 3)) < 0.7}


FUSES = {
    "rows made finite": _site(_ANY.format(axis=-1) + _ROW.format(by="some")),
    "one slot made finite": _site(_ANY.format(axis=-1) + _SLOT),
    "rows made finite, softmax written out": _site(_EXPS),
    "weights of some rows set to zero": _site(_VALID),
    "a sink times a number": _site(_SINK.format(by="sc"), ", float[4] sink"),
}


@pytest.mark.parametrize("name", FUSES)
def test_fused_and_equal(name):
    report = sfa_onnx.fuse(FUSES[name])
    assert [s.status for s in report.sites] == ["fused"], report.sites
    before, after = session(FUSES[name]), session(report.model)
    for seed in (1, 2, 3):
        feeds = _feeds(FUSES[name], seed)
        want, got = (np.asarray(run(s, feeds)["o"]) for s in (before, after))
        assert np.abs(want - got).max() <= 1e-5 * np.abs(want).max()


NEAR = {
    "rows that do not see all keys": _site(
        "n = ReduceMin<axes=[-1], keepdims=1>(count)\n some = Cast<to=9>(n)\n "
        + _ROW.format(by="some")
    ),
    "keys that no row sees": _site(_ANY.format(axis=1) + _ROW.format(by="some")),
    "rows of another mask": _site(
        "r = Unsqueeze(valid, m1)\n row = Unsqueeze(r, m1)\n " + _ROW.format(by="row")
    ),
    "rows that see one key": _site(_EXPS.replace("Greater(n, nought)", "Greater(n, one)")),
    "rows of the next token": _site(
        _ANY.format(axis=-1)
        + "h0 = Slice(some, z, one, one)\n t0 = Slice(some, one, c8, one)\n"
        + " turned = Concat<axis=1>(t0, h0)\n "
        + _ROW.format(by="turned")
    ),
    "weights of heads set to zero": _site(
        _VALID.replace(
            "r = Unsqueeze(valid, m1)\n row = Unsqueeze(r, m1)", "row = Greater(g, low)"
        ),
        ", float[2,3,4,1] g",
    ),
    "the log-sum-exp of rows that are set to zero": _site(
        _VALID.replace("p =", "lse = ReduceLogSumExp<axes=[-1], keepdims=0>(hid)\n p ="),
        out=", float[2,3,4] lse",
    ),
    "a sink times a number of its own per token": _site(
        _SINK.format(by="g").replace("wide = Expand(own, all)", "wide = Identity(own)"),
        ", float[4] sink, float[2,3,1,1] g",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_refused(name):
    report = sfa_onnx.fuse(NEAR[name])
    assert [s.status for s in report.sites] == ["refused"]
    assert "differs from the fused" not in report.sites[0].reason, report.sites[0].reason
