"""Rows picked by a product with one-hot rows: a gather where every index is one of a row."""

from __future__ import annotations

import onnx
import pytest

import sfa_onnx
from tests.test_bind_more import _fused, _model

pytestmark = pytest.mark.kernel

_HOT = " hot = OneHot<axis=-1>(idx, depth, onoff)\n"
_TIMES = " rows4 = Unsqueeze(kv, m1a)\n hf = Cast<to=1>(hot)\n k = MatMul(hf, rows4)\n"
_ONE = " m1a = Constant<value=int64[1] {1}>()\n"
_EINSUM = ' hf = Cast<to=1>(hot)\n k = Einsum<equation="bskt,btc->bskc">(hf, kv)\n'
_FLAT = (
    " hf = Cast<to=1>(hot)\n two = Constant<value=int64[3] {2,24,24}>()\n"
    " flat = Reshape(hf, two)\n many = MatMul(flat, kv)\n"
    " wide = Constant<value=int64[4] {2,3,8,40}>()\n k = Reshape(many, wide)\n"
)
_EQUAL = (
    " start = Constant<value=int64 {0}>()\n step = Constant<value=int64 {1}>()\n"
    " place = Range(start, depth, step)\n ix = Unsqueeze(idx, m1)\n hot = Equal(ix, place)\n"
)
_FRONT = " first = OneHot<axis=1>(idx, depth, onoff)\n hot = Transpose<perm=[0,2,3,1]>(first)\n"


@pytest.mark.parametrize("hot", [_HOT, _EQUAL, _FRONT])
@pytest.mark.parametrize("product", [_ONE + _TIMES, _EINSUM, _FLAT])
def test_one_hot_of_a_top_k_times_rows_is_a_gather(hot, product):
    _fused(_model(hot + product))


def _refused(rows: str) -> str:
    """The reason; nothing that a selection feeds may vanish."""
    report = sfa_onnx.fuse(_model(rows))
    assert [site.status for site in report.sites] == ["refused"]
    return report.sites[0].reason


def test_indices_that_may_be_no_row_are_refused():
    """An index of -1 makes a key of zeros, which has a weight; the operator hides it."""
    moved = " less = Constant<value=int64 {1}>()\n moved = Sub(idx, less)\n"
    rows = moved + _EQUAL.replace("Unsqueeze(idx", "Unsqueeze(moved") + _EINSUM
    assert "an index that is no row gives a row of zeros" in _refused(rows)


def test_other_numbers_than_one_are_no_gather():
    soft = " soft = Constant<value=float[2] {0.0, 2.0}>()\n"
    rows = soft + _HOT.replace("onoff", "soft") + _EINSUM.replace("Cast<to=1>", "Identity")
    assert _refused(rows)


def test_a_top_k_over_more_keys_than_there_are_rows_is_no_gather():
    rows = (
        " twice = Concat<axis=2>(scores, scores)\n val2, far = TopK(twice, kk)\n"
        + _HOT.replace("idx", "far")
        + _EINSUM
    )
    assert "an index that is no row gives a row of zeros" in _refused(rows)


def test_a_one_hot_embedding_is_no_selection():
    """Token types looked up in a weight, as BERT does, feed ordinary attention."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    bert (int64[2,6] types, float[2,6,8] x) => (float[2,6,8] o)
    <float[2,8] table={0,1,2,3,4,5,6,7,0,1,2,3,4,5,6,7}, int64 depth={2}, float[2] onoff={0,1}>
    {
     hot = OneHot<axis=-1>(types, depth, onoff)
     t = MatMul(hot, table)
     e = Add(x, t)
     et = Transpose<perm=[0,2,1]>(e)
     s = MatMul(e, et)
     p = Softmax<axis=-1>(s)
     o = MatMul(p, e)
    }""")
    assert not sfa_onnx.fuse(model).sites


def test_arithmetic_on_picked_rows_is_named():
    rows = _HOT + _EINSUM.replace(" k =", " k0 =") + " k = Relu(k0)\n"
    assert "the gathered rows are changed by Relu" in _refused(rows)
