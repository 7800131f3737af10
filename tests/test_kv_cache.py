import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sfa_onnx.errors import ContractError
from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.op import PackedRow

BF16 = ml_dtypes.bfloat16
TYPES = (np.float32, np.float16, BF16)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("dtype", TYPES)
def test_pack_of_int8_round_trips_bit_exactly(dtype):
    nope = rng().integers(-128, 128, (2, 5, 1, 512)).astype(np.int8)
    bits = rng(1).integers(0, 256, (2, 5, 1, 64 * np.dtype(dtype).itemsize)).astype(np.uint8)
    rope = bits.view(dtype)  # NaN payloads included
    scale = rng(2).standard_normal((2, 5, 1, 4)).astype(np.float32)
    row = PackedRow(itemsize=np.dtype(dtype).itemsize)
    rows = kv_cache.pack(nope, rope, scale)
    assert rows.shape == (2, 5, 1, row.bytes)
    n, r, s = kv_cache.unpack(rows, row, dtype)
    assert n.tobytes() == nope.tobytes()
    assert r.tobytes() == rope.tobytes()
    assert s.tobytes() == scale.tobytes()


def test_row_bytes_lie_where_the_npu_reads_them():
    nope = np.zeros((1, 512), np.int8)
    nope[0, 3] = 7
    rope = np.zeros((1, 64), BF16)
    rope[0, 1] = 1.0
    rows = kv_cache.pack(nope, rope, np.array([[1, 2, 3, 4]], np.float32)).view(np.uint8)[0]
    assert rows[3] == 7
    assert rows[514:516].tobytes() == b"\x80\x3f"  # bfloat16 1.0
    assert rows[640:656].view("<f4").tolist() == [1, 2, 3, 4]


def _scalar_quantise(x, alpha):
    """Steps 1-9 of the docstring, one float32 operation at a time."""
    f = np.float32
    with np.errstate(all="ignore"):
        limit = f(max(abs(float(v)) for v in x)) * f(alpha)
        if not np.isfinite(limit) or any(np.isnan(v) for v in x):
            return [0] * len(x), f(np.nan)
        scale = limit * (f(1) / f(127))
        r = f(1) / scale
        if not np.isfinite(r):
            return [0] * len(x), f(0)
        return [int(np.rint(min(max(f(v), -limit), limit) * r)) for v in x], scale


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 16), elements=st.floats(width=32)),
    st.sampled_from([1.0, 0.5, 0.93, 2.0]),
)
def test_quantise_follows_the_documented_steps(x, alpha):
    q, scale = kv_cache.quantise(x, tile_size=8, clip=alpha)
    assert np.abs(q.astype(int)).max() <= 127
    for row, got_q, got_s in zip(x, q, scale, strict=True):
        for t in range(2):
            want_q, want_s = _scalar_quantise(row[8 * t : 8 * t + 8], alpha)
            assert got_q[8 * t : 8 * t + 8].tolist() == want_q
            assert got_s[t].tobytes() == want_s.tobytes()


def test_zero_tiny_and_poisoned_tiles():
    x = np.ones((6, 8), np.float32)
    x[0, :4] = 0
    x[1, 5] = np.nan
    x[2, 1] = -np.inf
    x[3, :4] = 1e-44  # 1/scale overflows
    x[4, :4] = 3e38
    q, scale = kv_cache.quantise(x, tile_size=4)
    assert scale[0, 0] == 0
    assert not q[0, :4].any()
    assert np.isnan(scale[1, 1])
    assert scale[1, 0] > 0
    assert np.isnan(scale[2, 0])
    assert scale[3, 0] == 0
    assert scale[4, 0] == np.float32(3e38) * (np.float32(1) / np.float32(127))
    assert (q[5] == 127).all()
    back = kv_cache.dequantise(q, scale)
    assert np.isnan(back[1, 4:]).all()
    assert np.isfinite(back[1, :4]).all()
    assert scale[1, 1].tobytes() == b"\x00\x00\xc0\x7f"


def test_rounding_is_half_to_even():
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.0]], np.float32)
    q, scale = kv_cache.quantise(x, tile_size=8)
    assert scale[0, 0] == 127 * (np.float32(1) / np.float32(127)) == 1
    assert q[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 3]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 17), st.integers(0, 2**32 - 1))
def test_page_and_unpage_invert_each_other(batch, length, block_size, seed):
    r = rng(seed)
    rows = r.integers(-128, 128, (batch, length, 1, 12)).astype(np.int8)
    lengths = r.integers(0, length + 1, batch)
    need = -(-lengths // block_size)
    columns = int(max(need.max(), 1)) + 1
    table = r.permutation(batch * columns + 3)[: batch * columns].reshape(batch, columns)
    for given_table in (None, table):
        pages, out = kv_cache.page(rows, block_size, lengths, given_table)
        back = kv_cache.unpage(pages, out, lengths, length)
        for b in range(batch):
            assert (back[b, : lengths[b]] == rows[b, : lengths[b]]).all()
            assert not back[b, lengths[b] :].any()


def test_a_cache_that_no_sequence_uses_has_one_page_and_one_column():
    pages, table = kv_cache.page(np.zeros((2, 0, 1, 3), np.int8), 4)
    assert pages.shape == (1, 4, 1, 3)
    assert table.tolist() == [[-1], [-1]]
    assert kv_cache.unpage(pages, table, np.array([0, 0])).shape == (2, 0, 1, 3)
    rows = np.ones((1, 4, 1, 3), np.int8)
    pages, table = kv_cache.page(rows, 4)  # one page, full to its last row
    assert (pages.shape, table.tolist()) == ((1, 4, 1, 3), [[0]])
    assert (kv_cache.unpage(pages, table, np.array([4])) == rows).all()


@pytest.mark.parametrize("shape", [(1, 2), (3, 2), (2, 1), (0, 0)])
def test_a_table_has_a_row_for_each_sequence_and_a_column_for_each_page(shape):
    rows = np.zeros((2, 8, 1, 4), np.int8)
    table = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    with pytest.raises(ContractError, match=r"block_table: expected \[2, >= 2\], got"):
        kv_cache.page(rows, 4, block_table=table)
    assert kv_cache.page(rows, 4, block_table=[[0, 1, -1], [2, 3, -1]])[0].shape[0] == 4


def test_rows_without_a_rope_unpack_to_one_of_width_zero():
    rows = kv_cache.pack(np.ones((2, 3, 128), np.float32))
    nope, rope, scale = kv_cache.unpack(rows, PackedRow(nope=128, rope=0))
    assert (nope.shape, rope.shape, scale.shape) == ((2, 3, 128), (2, 3, 0), (2, 3, 1))
    assert (nope == 127).all()


def test_write_slots_appends_and_drops_padding():
    pages = np.zeros((2, 4, 1, 3), np.int8)
    rows = np.arange(1, 10, dtype=np.int8).reshape(3, 1, 3)
    out = kv_cache.write_slots(pages, rows, np.array([6, -1, 0]))
    assert out[1, 2, 0].tolist() == [1, 2, 3]
    assert out[0, 0, 0].tolist() == [7, 8, 9]
    assert np.count_nonzero(out) == 6
    assert not pages.any()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: kv_cache.pack(np.zeros((1, 128), np.int8)),
            "scale of int8 nope: expected float32",
        ),
        (
            lambda: kv_cache.pack(
                np.zeros((1, 128), np.float32), scale=np.ones((1, 1), np.float32)
            ),
            "nope is float",
        ),
        (lambda: kv_cache.quantise(np.zeros((1, 100), np.float32)), "multiple of tile_size 128"),
        (lambda: kv_cache.quantise(np.zeros((1, 128))), "float32, float16 or bfloat16"),
        (lambda: kv_cache.quantise(np.zeros((1, 128), np.float32), clip=-1.0), "clip: expected"),
        (
            lambda: kv_cache.unpack(np.zeros((1, 656), np.int8), PackedRow(), np.float32),
            "2 bytes",
        ),
        (
            lambda: kv_cache.pack(np.zeros((2, 128), np.float32), np.zeros((3, 4), np.float16)),
            "rope: expected",
        ),
        (
            lambda: kv_cache.page(
                np.zeros((1, 8, 1, 4)), 4, block_table=np.zeros((1, 2), np.int32)
            ),
            "distinct pages",
        ),
        (  # int8, but not as wide as the row
            lambda: kv_cache.unpack(np.zeros((1, 655), np.int8), PackedRow()),
            r"packed rows: expected int8 \[..., 656\], got int8 \(1, 655\)",
        ),
        (
            lambda: kv_cache.unpack(np.zeros((1, 656), np.uint8), PackedRow()),
            "packed rows: expected int8",
        ),
        (  # the first page past the cache
            lambda: kv_cache.unpage(
                np.zeros((2, 4, 1, 3), np.int8), np.array([[1, 2]], np.int32), np.array([8])
            ),
            r"block_table\[0\]: expected pages in \[0, 2\)",
        ),
        (
            lambda: kv_cache.unpage(
                np.zeros((2, 4, 1, 3), np.int8), np.array([[1, 0]], np.int32), np.array([9])
            ),
            r"lengths: expected values in \[0, 8\]",
        ),
        (  # the first slot past the cache
            lambda: kv_cache.write_slots(
                np.zeros((2, 4, 1, 3), np.int8), np.zeros((1, 1, 3), np.int8), np.array([8])
            ),
            "slot_mapping: expected slots < 8",
        ),
    ],
)
def test_refusals_name_the_cause(call, text):
    with pytest.raises(ContractError, match=text):
        call()
