"""The attention core through its C ABI, path by path, against the float64 reference."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from benchmarks import kernel_abi as core
from sfa_onnx.operator import kv_cache, reference

pytestmark = pytest.mark.kernel

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
QUERIES = [F32, F16, BF16]
IDS = ["f32", "f16", "bf16"]


@pytest.fixture(params=core.isas())
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def limit(dtype: np.dtype, peak: float = 1.0) -> float:
    """Largest relative error per (token, head) that the project allows."""
    if dtype != F32:
        return 4e-3
    return 5e-5 if peak > 4 else 1e-5


def assert_close(got: np.ndarray, want: np.ndarray, bound: float) -> None:
    a, b = got.astype(np.float64), want.astype(np.float64)
    norm = np.linalg.norm(b, axis=-1)
    error = np.linalg.norm(a - b, axis=-1)
    assert np.all(error[norm == 0] == 0), "rows without a key must be zero"
    worst = (error[norm > 0] / norm[norm > 0]).max(initial=0)
    assert worst <= bound, f"worst (token, head) relative error {worst:.3g} > {bound:.3g}"


class Case:
    """A packed-row call and its float64 answer."""

    def __init__(
        self,
        rng: np.random.Generator,
        dtype: np.dtype,
        *,
        heads: int = 4,
        k: int = 64,
        batch: int = 1,
        s1: int = 1,
        s2: int | None = None,
        nope: int = 512,
        rope: int = 64,
        tile: int = 128,
        peak: float = 1.0,
        float_cache: bool = False,
        **attrs: Any,
    ):
        self.dtype, self.attrs = dtype, attrs
        s2 = s2 or max(k * 2, 8)
        sbs = attrs.get("sparse_block_size", 1)
        latent = rng.standard_normal((batch, s2, 1, nope)).astype(np.float32)
        k_rope = rng.standard_normal((batch, s2, 1, rope)).astype(dtype)
        query = (peak * rng.standard_normal((batch, s1, heads, nope + rope))).astype(dtype)
        self.scale = float((nope + rope) ** -0.5)
        blocks = max(1, -(-s2 // sbs))
        self.indices = np.full((batch, s1, 1, k), -1, np.int32)
        for b in range(batch):
            for s in range(s1):
                picks = rng.permutation(blocks)[:k]
                self.indices[b, s, 0, : len(picks)] = picks
        self.rope, self.tile = rope, tile
        if float_cache:
            self.key, self.key_rope = latent.astype(dtype), k_rope
            self.query = np.ascontiguousarray(query[..., :nope])
            self.query_rope = np.ascontiguousarray(query[..., nope:])
        else:
            q, scales = kv_cache.quantise(latent, tile)
            scales *= np.where(rng.random(scales.shape) < 0.2, -1, 1).astype(np.float32)
            self.key = kv_cache.pack(q, k_rope, scales, tile_size=tile)
            self.query, self.query_rope, self.key_rope = query, None, None

    def run(self, isa: str, **kw: Any) -> np.ndarray:
        return core.attention(self.query, self.key, self.indices, **self.arguments(isa, **kw))

    def arguments(self, isa: str, **kw: Any) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "query_rope": self.query_rope,
            "key_rope": self.key_rope,
            "rope_dim": self.rope,
            "tile_size": self.tile,
            "isa": isa,
            **self.attrs,
            **kw,
        }

    def want(self) -> np.ndarray:
        attrs = dict(self.attrs)
        lengths = {
            "block_table": attrs.pop("block_table", None),
            "actual_seq_lengths_query": attrs.pop("actual_q", None),
            "actual_seq_lengths_kv": attrs.pop("actual_kv", None),
        }
        attrs = {"scale_value": self.scale, "layout_kv": "BSND", "sparse_mode": 3, **attrs}
        query = self.query.astype(np.float64)
        if self.key_rope is None:
            return reference.sparse_flash_attention_antiquant(
                query, self.key, None, self.indices, rope_dtype=self.dtype,
                rope_head_dim=self.rope, tile_size=self.tile, **lengths, **attrs
            )  # fmt: skip
        parts = (self.key, self.key_rope, self.query_rope)
        key, key_rope, query_rope = (part.astype(np.float64) for part in parts)
        return reference.sparse_flash_attention(
            query, key, None, self.indices, query_rope=query_rope, key_rope=key_rope,
            **lengths, **attrs
        )  # fmt: skip


@pytest.mark.parametrize("dtype", QUERIES, ids=IDS)
@pytest.mark.parametrize("k", [1, 7, 511, 2047])
def test_selection_sizes(isa: str, dtype: np.dtype, k: int) -> None:
    case = Case(np.random.default_rng(k), dtype, heads=5, k=k, sparse_mode=0)
    assert_close(case.run(isa), case.want(), limit(dtype))


@pytest.mark.parametrize("dtype", QUERIES, ids=IDS)
@pytest.mark.parametrize("float_cache", [False, True], ids=["packed", "float"])
def test_head_counts(isa: str, dtype: np.dtype, float_cache: bool) -> None:
    for heads in (1, 2, 3, 4, 6, 8, 9, 15, 16, 17, 31, 32, 47, 64, 100, 127, 128, 129, 200):
        case = Case(np.random.default_rng(heads), dtype, heads=heads, k=75, float_cache=float_cache)
        assert_close(case.run(isa), case.want(), limit(dtype))


@pytest.mark.parametrize("dtype", QUERIES, ids=IDS)
@pytest.mark.parametrize("peak", [4.0, 16.0])
def test_peaky_scores(isa: str, dtype: np.dtype, peak: float) -> None:
    for float_cache in (False, True):
        case = Case(
            np.random.default_rng(7), dtype, heads=16, k=1024, peak=peak, float_cache=float_cache
        )
        assert_close(case.run(isa), case.want(), limit(dtype, peak))


@pytest.mark.parametrize("dtype", QUERIES, ids=IDS)
@pytest.mark.parametrize(
    ("nope", "rope", "tile"),
    [
        (512, 64, 64),
        (256, 32, 128),
        (512, 0, 128),
        (128, 64, 32),
        (128, 5, 64),
        (192, 33, 64),
        (128, 130, 128),
        (20, 6, 5),
        (33, 1, 11),
        (1, 0, 1),
    ],
)
def test_widths(isa: str, dtype: np.dtype, nope: int, rope: int, tile: int) -> None:
    for heads in (1, 7, 40):
        case = Case(
            np.random.default_rng(nope), dtype, heads=heads, k=600, nope=nope, rope=rope, tile=tile
        )
        assert_close(case.run(isa), case.want(), limit(dtype))
        case = Case(
            np.random.default_rng(nope),
            dtype,
            heads=heads,
            k=90,
            nope=nope,
            rope=max(rope, 1),
            float_cache=True,
        )
        assert_close(case.run(isa), case.want(), limit(dtype))


@pytest.mark.parametrize("block_size", [16, 48, 128, 1024])
@pytest.mark.parametrize("sbs", [1, 2, 3, 16])
def test_pages(isa: str, block_size: int, sbs: int) -> None:
    rng = np.random.default_rng(block_size + sbs)
    pages = max(2, 2 * 1100 // block_size)
    for dtype in (F32, BF16):
        case = Case(rng, dtype, heads=6, k=1040 // sbs, batch=2, s1=3, s2=pages * block_size)
        table = rng.permutation(2 * pages).astype(np.int32).reshape(2, pages)
        case.key = np.ascontiguousarray(case.key.reshape(2 * pages, block_size, 1, -1))
        actual_kv = np.array([pages * block_size - 5, 700], np.int32)
        needed = -(-700 // block_size)
        table[1, needed:] = -1
        case.attrs.update(
            layout_kv="PA_BSND",
            block_table=table,
            actual_q=np.array([3, 2], np.int32),
            actual_kv=actual_kv,
            sparse_block_size=sbs,
        )
        case.indices = sorted_blocks(rng, case.indices.shape, actual_kv, sbs)
        assert_close(case.run(isa), case.want(), limit(dtype))


def sorted_blocks(
    rng: np.random.Generator, shape: tuple[int, ...], actual_kv: np.ndarray, sbs: int
) -> np.ndarray:
    """Valid-first random block numbers, some past the visible ones, some repeated."""
    out = np.full(shape, -1, np.int32)
    for b in range(shape[0]):
        blocks = -(-int(actual_kv[b]) // sbs)
        for s in range(shape[1]):
            count = min(shape[3], blocks)
            picks = rng.permutation(blocks + 2)[:count]
            picks[count // 2] = picks[0]
            out[b, s, 0, :count] = picks
    return out


def test_packed_sequences(isa: str) -> None:
    rng = np.random.default_rng(5)
    case = Case(rng, BF16, heads=3, k=40, batch=1, s1=11, s2=300)
    case.query = np.ascontiguousarray(case.query[0])
    case.key = np.ascontiguousarray(case.key[0])
    case.indices = np.ascontiguousarray(case.indices[0])
    for actual_q, actual_kv in (([4, 4, 9], [100, 130, 300]), ([11], [300]), ([0, 5], [0, 2])):
        case.attrs = {
            "layout_query": "TND",
            "layout_kv": "TND",
            "actual_q": np.array(actual_q, np.int32),
            "actual_kv": np.array(actual_kv, np.int32),
        }
        assert_close(case.run(isa), case.want(), limit(BF16))


def test_rows_without_keys_are_zero(isa: str) -> None:
    case = Case(np.random.default_rng(1), F32, heads=4, k=700, batch=3, s1=2, s2=1000)
    case.indices[0] = -1
    case.indices[1, 0, 0] = 999_999
    case.indices[2, 1, 0, 5:] = -7
    case.attrs = {"actual_kv": np.array([1000, 800, 1], np.int32)}
    got = case.run(isa)
    assert_close(got, case.want(), limit(F32))
    assert not got[0].any()
    assert not got[1, 0].any()
    assert not got[2, 0].any()


@pytest.mark.parametrize("offset", [1, 3, 5])
def test_odd_addresses(isa: str, offset: int) -> None:
    case = Case(np.random.default_rng(offset), BF16, heads=20, k=100)
    want = case.run(isa)
    for name in ("query", "key"):
        array = getattr(case, name)
        raw = np.zeros(array.nbytes + offset, np.uint8)
        raw[offset:] = array.view(np.uint8).ravel()
        setattr(case, name, raw[offset:].view(array.dtype).reshape(array.shape))
    np.testing.assert_array_equal(case.run(isa).view(np.uint16), want.view(np.uint16))


@pytest.mark.parametrize("heads", [1, 16, 130])
def test_task_order_threads_and_batch_do_not_change_a_bit(isa: str, heads: int) -> None:
    rng = np.random.default_rng(heads)
    many = Case(rng, BF16, heads=heads, k=1500, batch=20, s1=1, s2=1600)
    together = many.run(isa)
    one = [np.ascontiguousarray(x[3:4]) for x in (many.query, many.key, many.indices)]
    params, alone = core.build(*one, **many.arguments(isa))
    tasks = core.num_tasks(params)
    assert tasks == 3
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        alone[:] = 0
        core.run(params, order=order)
        np.testing.assert_array_equal(alone[0].view(np.uint16), together[3].view(np.uint16))
    core.run(params, threads=2)
    np.testing.assert_array_equal(alone[0].view(np.uint16), together[3].view(np.uint16))


@pytest.mark.parametrize("holes", ["skip", "stop"])
def test_holes_can_be_relaxed(isa: str, holes: str) -> None:
    case = Case(np.random.default_rng(2), F32, heads=2, k=1200, s2=1300)
    case.indices[0, 0, 0, 600] = -1
    case.attrs["holes"] = holes
    assert_close(case.run(isa), case.want(), limit(F32))


def refusal(case: Case, **kw: Any) -> core.CoreError:
    with pytest.raises(core.CoreError) as caught:
        case.run("scalar", **kw)
    return caught.value


def test_a_hole_is_refused_and_named() -> None:
    case = Case(np.random.default_rng(2), F32, heads=2, k=1200, batch=2, s2=1300)
    case.indices[1, 0, 0, 600] = -1
    problem = refusal(case)
    assert (problem.error.token, problem.error.slot, problem.error.limit) == (1, 601, 600)
    assert "query row 1" in str(problem)
    assert "slot 601" in str(problem)


def test_bad_pages_and_lengths_are_refused_before_any_read() -> None:
    case = Case(np.random.default_rng(2), F32, heads=2, k=20, batch=2, s2=64)
    case.key = np.ascontiguousarray(case.key.reshape(8, 16, 1, -1))
    table = np.arange(8, dtype=np.int32).reshape(2, 4)
    ok = {
        "layout_kv": "PA_BSND",
        "block_table": table,
        "actual_kv": np.array([64, 64], np.int32),
        "sparse_mode": 0,
    }
    case.run("scalar", **ok)
    table[1] = 8
    assert "block_table[1]" in str(refusal(case, **ok))
    assert "0..7" in str(refusal(case, **ok))
    long = {**ok, "actual_kv": np.array([64, 65], np.int32)}
    assert "needs 5 pages" in str(refusal(case, **long))
    negative = {**ok, "actual_kv": np.array([-1, 65], np.int32)}
    assert "actual_seq_lengths_kv[0] is -1" in str(refusal(case, **negative))
    flat = Case(np.random.default_rng(2), F32, heads=2, k=20, batch=2, s2=64)
    too_long = {"actual_kv": np.array([64, 65], np.int32)}
    assert "actual_seq_lengths_kv[1] is 65" in str(refusal(flat, **too_long))
    too_many = {"actual_q": np.array([2, 1], np.int32)}
    assert "actual_seq_lengths_query[0] is 2" in str(refusal(flat, **too_many))


@pytest.mark.parametrize("tile", [128, 64, 512, 8])
@pytest.mark.parametrize("dtype", QUERIES, ids=IDS)
def test_pack_is_bit_equal_with_numpy(dtype: np.dtype, tile: int) -> None:
    rng = np.random.default_rng(tile)
    nope = (rng.standard_normal((40, 512)) * 10.0 ** rng.integers(-42, 4, (40, 1))).astype(dtype)
    nope[3] = 0
    nope[4, 17] = np.nan
    nope[5, 300] = np.inf
    nope[6, :64] = -0.0
    rope = rng.standard_normal((40, 64)).astype(dtype)
    for clip in (1.0, 0.9, 1.5):
        with np.errstate(all="ignore"):
            want = kv_cache.pack(nope, rope, clip=clip, tile_size=tile)
        np.testing.assert_array_equal(core.pack(nope, rope, clip=clip, tile_size=tile), want)
    q, scales = kv_cache.quantise(nope, tile)
    want = kv_cache.pack(q, rope, scales, tile_size=tile)
    np.testing.assert_array_equal(core.pack(q, rope, scales, tile_size=tile), want)


def test_only_the_abi_is_exported_and_old_systems_can_load_it() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    text = subprocess.run([nm, "-D", core.library_path()], capture_output=True, text=True).stdout
    lines = [line.split() for line in text.splitlines()]
    exported = {line[-1].split("@")[0] for line in lines if line[-2] in "TDBRV"}
    assert {"sfa_core_begin", "sfa_core_run_task"} <= exported
    assert all(re.match("RegisterCustomOps$|sfa_(core|torch)_|SFA_ONNX", name) for name in exported)
    needed = re.findall(r"GLIBC_(\d+)\.(\d+)", text)
    assert max((int(a), int(b)) for a, b in needed) <= (2, 17)
    assert "GLIBCXX" not in text
