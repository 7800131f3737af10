"""Selections that are not fused are listed with their true reason; look-alikes stay silent."""

from __future__ import annotations

import onnx
import pytest

import sfa_onnx
from tests.test_bind_more import _ROWS, _SCORES, _model

_DENSE = " axis1 = Constant<value=int64[1] {1}>()\n k = Unsqueeze(kv, axis1)\n"
_BODY = """
 loops = Constant<value=int64 {2}>()
 on = Constant<value=bool {1}>()
 k = Loop (loops, on) <body = one (int64 i, bool go) => (bool more, float[3,8,40] rows) {
   more = Identity(go)
   own = Gather(kv, i)
   at = Gather(INDICES, i)
   rows = Gather(own, at)
 }>
"""
_KTH = " last = Constant<value=int64[1] {7}>()\n least = Gather<axis=-1>(val, last)\n"


def _sites(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(site.status, site.reason) for site in sfa_onnx.fuse(model).sites]


def _only_reason(model: onnx.ModelProto) -> str:
    ((status, reason),) = _sites(model)
    assert status == "refused"
    return reason


def test_rows_that_a_loop_gathers_are_listed():
    reason = _only_reason(_model(_BODY.replace("INDICES", "idx")))
    assert "the keys k are gathered by the body of Loop" in reason


def test_rows_that_a_loop_takes_in_order_are_none():
    ones = ",".join("1" * 48)
    table = " first = Constant<value=int64[2,3,8] {" + ones + "}>()\n"
    assert not _sites(_model(table + _BODY.replace("INDICES", "first")))


@pytest.mark.parametrize("test", ["GreaterOrEqual(scores, least)", "LessOrEqual(least, scores)"])
def test_a_threshold_is_named(test):
    weights = (
        f"{_KTH} keep3 = {test}\n keep = Unsqueeze(keep3, ax2)\n x = Where(keep, s, low)\n"
        " p = Softmax<axis=-1>(x)\n"
    )
    reason = _only_reason(_model(_DENSE, weights=weights))
    assert "selected by a threshold" in reason
    assert "make the number of keys unbounded" in reason


@pytest.mark.parametrize(
    "kept",
    [
        " zeros = Mul(all, zero)\n p = ScatterElements<axis=-1>(zeros, which, best)\n",
        " cut = Slice(best, m1, big, m1)\n keep = GreaterOrEqual(all, cut)\n"
        " p = Where(keep, all, zero)\n",
    ],
)
def test_the_best_weights_are_listed(kept):
    weights = (
        " big = Constant<value=int64[1] {99}>()\n all = Softmax<axis=-1>(s)\n"
        " best, which = TopK(all, kk)\n" + kept
    )
    assert "selects keys by the weights of Softmax" in _only_reason(_model(_DENSE, weights=weights))


_BY = "\n qw = MatMul(q, w)\n"
_HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'


def test_a_router_and_a_sampler_stay_silent():
    """The best of a softmax of a projection weigh experts; logits below the k-th are not drawn."""
    router = (
        _HEAD
        + """moe (float[5,4] x) => (float[5,3] o, float[5,2] p)
    <float[4,2] w={1,2,3,4,5,6,7,8},
     float[2,4,3] e={1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6},
     int64[1] one={1}, float low={-9.0}> {
     s = MatMul(x, w)
     all = Softmax<axis=-1>(s)
     best, which = TopK(all, one)
     zeros = Sub(all, all)
     p0 = ScatterElements<axis=-1>(zeros, which, best)
     out = Einsum<equation="td,edf->tef">(x, e)
     o = Einsum<equation="te,tef->tf">(p0, out)
     high, at = TopK(s, one)
     keep = GreaterOrEqual(s, high)
     few = Where(keep, s, low)
     p = Softmax<axis=-1>(few)
    }"""
    )
    assert not _sites(onnx.parser.parse_model(router))


def test_a_product_in_front_of_the_scores_is_no_linear_attention():
    """(q w) k^T with w from outside: the softmax comes behind both products."""
    text = _model(scores=_SCORES.replace("(q, kt)", "(qw, kt)").replace("\n", _BY, 1))
    more = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [40, 40])
    text.graph.input.append(more)
    assert [status for status, _ in _sites(text)] == ["fused"]


def test_reasons_do_not_depend_on_what_was_looked_at_before():
    """Labels are numbered over a whole process; a reason tells them apart by d, d2 only."""
    shifted = _ROWS + " two = Constant<value=int64[1] {2}>()\n c34 = Add(two, c32)\n"
    text = shifted.replace("ix = ", "kr = Gather<axis=1>(kv, ids)\n ix = ")
    rows = " ids = Constant<value=int64[24] {" + ",".join(str(i ^ 1) for i in range(24)) + "}>()\n"
    scores = " w = GatherND<batch_dims=1>(kr, ix)\n" + _SCORES.replace("(k)", "(w)")
    first, again = (_only_reason(_model(rows + text, scores)) for _ in range(2))
    assert first == again
    assert "#" not in first


def test_indices_compared_by_order_are_listed():
    weights = (
        " start = Constant<value=int64 {0}>()\n step = Constant<value=int64 {1}>()\n"
        " place = Range(start, depth, step)\n ix4 = Unsqueeze(idx, m1)\n"
        " early = LessOrEqual(ix4, place)\n counts = Cast<to=7>(early)\n"
        " hits = ReduceSum<keepdims=0>(counts, ax2)\n none = Constant<value=int64 {0}>()\n"
        " keep3 = Greater(hits, none)\n keep = Unsqueeze(keep3, ax2)\n x = Where(keep, s, low)\n"
        " p = Softmax<axis=-1>(x)\n"
    )
    assert "is not a selection that other masks only narrow" in _only_reason(
        _model(_DENSE, weights=weights)
    )
