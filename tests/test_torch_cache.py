"""The packed cache in torch, against NumPy and FlashMLA's format."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sfa_onnx.errors import ContractError  # noqa: E402
from sfa_onnx.operator import kv_cache  # noqa: E402
from sfa_onnx.torch import cache  # noqa: E402
from sfa_onnx.torch.tensors import as_numpy, as_torch  # noqa: E402

pytestmark = pytest.mark.torch
BF16 = ml_dtypes.bfloat16


def latents(dtype=np.float32, seed=0, shape=(2, 9, 1)):
    r = np.random.default_rng(seed)
    nope = r.standard_normal((*shape, 512)).astype(dtype)
    nope[0, 0, 0, :128] = 0
    return nope, r.standard_normal((*shape, 64)).astype(BF16)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=["f32", "f16", "bf16"])
def test_every_tool_is_numpys_bit_for_bit(dtype):
    nope, rope = latents(dtype)
    rows = kv_cache.pack(nope, rope)
    assert np.array_equal(as_numpy(cache.pack(as_torch(nope), as_torch(rope))), rows)
    packed = torch.ops.sfa_onnx.kv_cache_pack(as_torch(nope), rope=as_torch(rope))
    assert np.array_equal(as_numpy(packed), rows)
    for order in ("reciprocal", "division"):
        want = kv_cache.quantise(nope, 128, 0.9, order)
        for mine, theirs in zip(cache.quantise(as_torch(nope), 128, 0.9, order), want, strict=True):
            assert np.array_equal(as_numpy(mine), theirs)
    q, back, scale = cache.unpack(as_torch(rows))
    assert np.array_equal(as_numpy(back), rope)
    want = kv_cache.dequantise(as_numpy(q), as_numpy(scale), BF16)
    assert np.array_equal(as_numpy(cache.dequantise(q, scale, torch.bfloat16)), want)
    lengths = np.array([9, 3])
    pages, table = cache.page(as_torch(rows), 4, as_torch(lengths))
    want_pages, want_table = kv_cache.page(rows, 4, lengths)
    assert np.array_equal(as_numpy(pages), want_pages)
    assert np.array_equal(as_numpy(table), want_table)
    again = cache.unpage(pages, table, as_torch(lengths))
    assert np.array_equal(as_numpy(again), kv_cache.unpage(want_pages, want_table, lengths))
    slots = np.array([5, -1, 0])
    written = cache.write_slots(pages, as_torch(rows[0, :3]), as_torch(slots))
    want = kv_cache.write_slots(want_pages, rows[0, :3], slots)
    assert np.array_equal(as_numpy(written), want)


def test_the_two_rounding_orders_differ_by_steps_of_one_and_rarely():
    nope, _ = latents(BF16, shape=(40, 50, 1))
    ours, scale = kv_cache.quantise(nope)
    theirs, their_scale = kv_cache.quantise(nope, order="division")
    step = np.abs(ours.astype(int) - theirs.astype(int))
    assert step.max() == 1
    assert 0 < (step > 0).mean() < 2e-3
    np.testing.assert_allclose(scale, their_scale, rtol=2e-7)
    # The vendor's check of its quantiser, as a formula: amax / 127, then round(x / scale).
    x = nope.astype(np.float32).reshape(-1, 128)[1:]
    x = x[np.abs(x).max(-1) > 0]
    want = np.rint(x / (np.abs(x).max(-1, keepdims=True) / np.float32(127)))
    flat = theirs.reshape(-1, 128)[1:]
    assert np.array_equal(flat[np.abs(nope.astype(np.float32)).reshape(-1, 128)[1:].max(-1) > 0],
                          want.astype(np.int8))  # fmt: skip
    with pytest.raises(ContractError, match="order: expected reciprocal or division, got up"):
        kv_cache.quantise(nope, order="up")


def test_flashmlas_rows_and_back():
    nope, rope = latents()
    ours = cache.pack(as_torch(nope), as_torch(rope))
    there = cache.to_flashmla(ours)
    assert there.rows.shape == ours.shape
    # Their layout: float8 latents, scales at 512, rope at 528.
    latent = there.rows[..., :512].contiguous().view(torch.float8_e4m3fn).float()
    scale = there.rows[..., 512:528].contiguous().view(torch.float32)
    values = (latent.unflatten(-1, (-1, 128)) * scale[..., None]).flatten(-2)
    near = cache.dequantise(*cache.unpack(ours)[::2])
    assert (values - near).abs().max() <= near.abs().max() * there.worst * 1.01
    assert torch.equal(there.rows[..., 528:].contiguous().view(torch.bfloat16), as_torch(rope))
    assert 0.01 < there.mean < 0.04  # float8 keeps 3 bits of mantissa
    back = cache.from_flashmla(there.rows.view(torch.uint8))
    assert torch.equal(cache.unpack(back.rows)[1], as_torch(rope))
    assert back.worst <= 0.5 / 127 * 1.001
    assert back.mean < 0.02
    with pytest.raises(ContractError, match=r"rows: expected \[..., 656\] of one-byte items"):
        cache.from_flashmla(ours[..., :600])
