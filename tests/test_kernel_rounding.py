"""The core's choice of rounding, its sinks and what it tells of the softmax, path by path."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from benchmarks import kernel_abi as core
from sfa_onnx.operator import kv_cache, reference
from sfa_onnx.operator.op import PackedRow
from sfa_onnx.operator.reference_npu import npu_round
from tests.test_kernel_core import (
    BF16,
    F16,
    F32,
    IDS,
    QUERIES,
    Case,
    assert_close,
    isa,
    limit,
)

__all__ = ["isa"]  # the fixture
pytestmark = pytest.mark.kernel


def rounded_rows(case: Case) -> Case:
    """The float-cache call whose latents are the case's, rounded as the NPU rounds them."""
    row = PackedRow(case.query.shape[-1] - case.rope, case.rope, case.tile, case.dtype.itemsize)
    nope, rope, scale = kv_cache.unpack(case.key, row, case.dtype)
    latent = npu_round(kv_cache.dequantise(nope, scale, np.float32), case.dtype)
    other = copy.copy(case)
    other.key, other.key_rope = latent.astype(case.dtype), rope
    other.query = np.ascontiguousarray(case.query[..., : row.nope])
    other.query_rope = np.ascontiguousarray(case.query[..., row.nope :])
    return other


@pytest.mark.parametrize("dtype", QUERIES, ids=IDS)
@pytest.mark.parametrize(("nope", "rope", "tile"), [(512, 64, 128), (192, 33, 64), (20, 6, 5)])
def test_npu_rounding_is_the_call_over_rounded_latents(
    isa: str, dtype: np.dtype, nope: int, rope: int, tile: int
) -> None:
    for heads in (1, 4, 6, 16, 40):
        case = Case(
            np.random.default_rng(heads), dtype, heads=heads, k=600, nope=nope, rope=rope, tile=tile
        )
        got = case.run(isa, rounding="npu")
        assert_close(got, rounded_rows(case).want(), limit(dtype))
        changed = (got != case.run(isa)).any()
        assert changed == (dtype != F32), "a float32 query rounds nothing"


def test_npu_rounding_breaks_ties_as_the_kernel_does(isa: str) -> None:
    """One key per row: the output is its latent, so every rounding can be read off."""
    for dtype, step in ((BF16, 2.0**-7), (F16, 2.0**-10)):
        scale = np.float32(1 + step / 2)  # odd multiples lie half-way between two values
        q = np.arange(-128, 128, dtype=np.int8).reshape(2, 1, 1, 128)
        rope = np.zeros((2, 1, 1, 2), dtype)
        key = kv_cache.pack(q, rope, np.full((2, 1, 1, 1), scale), tile_size=128)
        query = np.zeros((2, 1, 5, 130), dtype)
        got = core.attention(
            query, key, np.zeros((2, 1, 1, 1), np.int32), scale=1.0, rope_dim=2, isa=isa,
            rounding="npu",
        )  # fmt: skip
        want = npu_round(q.astype(np.float32) * scale, dtype).astype(dtype)
        np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape))


@pytest.mark.parametrize("scale", [0.0, 2.0**-110, -1e-35, np.inf, np.nan])
def test_npu_rounding_of_extreme_scales(isa: str, scale: float) -> None:
    q = np.full((1, 1, 1, 128), 3, np.int8)
    q[..., 64:] = -128
    key = kv_cache.pack(q, None, np.full((1, 1, 1, 1), scale, np.float32), tile_size=128)
    query = np.zeros((1, 1, 3, 128), BF16)
    arguments = {"scale": 0.0, "rope_dim": 0, "isa": isa, "rounding": "npu"}
    got = core.attention(query, key, np.zeros((1, 1, 1, 1), np.int32), **arguments)
    want = (q.astype(np.float32) * np.float32(scale)).astype(BF16)
    if not np.isfinite(scale):
        assert np.isnan(got.astype(np.float32)).all()  # 0 x Inf is no score
    else:
        np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape))


def softmax_of(case: Case, isa: str, **kw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """attention_out, softmax_max and softmax_sum in CANN's shapes."""
    lead = case.query.shape[:-1]
    top, total = np.full((2, *lead), -77, np.float32)
    out = case.run(isa, softmax=(top, total), **kw)
    shape = (*lead[:-2], 1, *lead[-2:])
    return out, top.reshape(shape), total.reshape(shape)


def wanted(case: Case, sinks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = {
        "actual_seq_lengths_query": case.attrs.get("actual_q"),
        "actual_seq_lengths_kv": case.attrs.get("actual_kv"),
    }
    floats = (case.query, case.key, case.query_rope, case.key_rope)
    query, key, query_rope, key_rope = (x.astype(np.float64) for x in floats)
    return reference.sparse_flash_attention_lse(
        query, key, None, case.indices, query_rope=query_rope, key_rope=key_rope, sinks=sinks,
        scale_value=case.scale, layout_query="BSND", layout_kv="BSND", sparse_mode=3, **lengths
    )  # fmt: skip


@pytest.mark.parametrize("dtype", QUERIES, ids=IDS)
@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
def test_softmax_and_sinks(isa: str, dtype: np.dtype, with_sinks: bool) -> None:
    for heads in (1, 6, 16, 130):
        rng = np.random.default_rng(heads)
        case = Case(rng, dtype, heads=heads, k=700, batch=3, s1=3, s2=900, float_cache=True)
        case.indices[0, 1] = -1  # nothing selected
        case.attrs = {
            "actual_q": np.array([3, 3, 2], np.int32),
            "actual_kv": np.array([900, 2, 700], np.int32),  # the first row of batch 1 sees nothing
        }
        case.indices[1] = -1
        case.indices[1, 1:, 0, 0] = 0
        sinks = None
        if with_sinks:
            sinks = rng.standard_normal(heads).astype(np.float32)
            sinks[0], sinks[heads // 2], sinks[-1] = -np.inf, 60, 3
        out, top, total = softmax_of(case, isa, sinks=sinks)
        want, want_top, want_total = wanted(case, sinks)
        floor = 1e-6 * np.abs(want).max()  # a large sink leaves next to nothing
        assert np.abs(out - want).max() <= limit(dtype) * np.abs(want).max() + floor
        np.testing.assert_allclose(top, want_top, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(total, want_total, rtol=5e-4)
        np.testing.assert_array_equal(out, case.run(isa, sinks=sinks))


def test_a_sink_that_is_nan_or_infinite(isa: str) -> None:
    case = Case(np.random.default_rng(1), F32, heads=4, k=40, sparse_mode=0)
    plain = case.run(isa)
    sinks = np.array([-np.inf, np.nan, np.inf, 1e30], np.float32)
    got, top, total = softmax_of(case, isa, sinks=sinks)
    np.testing.assert_array_equal(got[..., 0, :], plain[..., 0, :])
    assert np.isnan(got[..., 1, :]).all()
    assert not got[..., 2:, :].any()
    assert top[..., 2].min() == np.inf
    assert (total[..., 2:] == 1).all()


def test_tasks_in_any_order_give_the_same_softmax(isa: str) -> None:
    case = Case(np.random.default_rng(3), BF16, heads=20, k=1500, s2=1600)
    sinks = np.linspace(-2, 2, 20, dtype=np.float32)
    want = softmax_of(case, isa, sinks=sinks)
    top, total = np.zeros((2, 1, 1, 20), np.float32)
    arguments = case.arguments(isa, sinks=sinks, softmax=(top, total))
    params, out = core.build(case.query, case.key, case.indices, **arguments)
    core.run(params, order=[2, 0, 1])
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(top, want[1][:, 0])
    np.testing.assert_array_equal(total, want[2][:, 0])


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
@pytest.mark.parametrize("rounding", ["exact", "npu"])
def test_where_one_key_wins_its_latent_is_rounded_once(
    isa: str, dtype: np.dtype, rounding: str
) -> None:
    for heads in (1, 4, 7, 16, 40):
        case = Case(np.random.default_rng(heads), dtype, heads=heads, k=700, peak=100.0)
        case.scale = 10.0
        got = case.run(isa, rounding=rounding)
        row = PackedRow(512, 64, 128, 2)
        nope, rope, scale = kv_cache.unpack(case.key, row, dtype)
        latent = kv_cache.dequantise(nope, scale, np.float32)[0, :, 0]
        keys = np.concatenate([latent, rope[0, :, 0].astype(np.float32)], -1)
        scores = case.query[0, 0].astype(np.float64) @ keys[case.indices[0, 0, 0]].T
        first, second = np.sort(scores, -1)[:, [-1, -2]].T
        clear = first - second > 3
        assert clear.sum() >= heads / 2
        winners = latent[case.indices[0, 0, 0][scores.argmax(-1)]][clear]
        want = npu_round(winners, dtype) if rounding == "npu" else winners
        np.testing.assert_array_equal(got[0, 0][clear], want.astype(dtype))
