"""The indexer core through its C ABI, path by path, against the float64 reference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from benchmarks import indexer_abi
from benchmarks import kernel_abi as core
from benchmarks.indexer_abi import Call, random_call
from sfa_onnx.operator import reference
from sfa_onnx.operator.op import LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER
from tests.attention_cases import BF16, LAYOUTS
from tests.indexer_cases import indexer_call, select

pytestmark = pytest.mark.kernel

TYPES = {"f32": np.float32, "f16": np.float16, "bf16": BF16, "int8": np.int8}


@pytest.fixture(params=core.isas())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def op_of(dtype: Any) -> Any:
    return QUANT_LIGHTNING_INDEXER if np.dtype(dtype) == np.int8 else LIGHTNING_INDEXER


def scores_of(inputs: dict[str, np.ndarray], rounding: str = "exact") -> np.ndarray:
    """[rows, keys] in float64, of a BSND call of one sequence."""
    query, key = inputs["query"][0].astype(float), inputs["key"][0, :, 0].astype(float)
    weights = inputs["weights"][0].astype(float)
    products = np.maximum(np.einsum("shd,kd->shk", query, key), 0)
    if "query_dequant_scale" in inputs:
        weights = weights * inputs["query_dequant_scale"][0].astype(float)
        if rounding == "npu":
            weights = weights.astype(np.float16).astype(float)
            products = (products / 1024).astype(np.float16).astype(float)
        return np.einsum("sh,shk->sk", weights, products) * inputs["key_dequant_scale"][0, :, 0]
    return np.einsum("sh,shk->sk", weights, products)


def assert_best(call: Call, scores: np.ndarray, bound: float) -> None:
    """The selected keys' scores are the best ones, in order, up to `bound` of the largest."""
    margin = bound * np.abs(scores).max()
    count = call.indices.shape[-1]
    for row, indices in enumerate(call.indices.reshape(-1, count)):
        n = min(count, scores.shape[1])
        assert (indices[n:] == -1).all()
        assert len(np.unique(indices[:n])) == n
        chosen, best = scores[row, indices[:n]], np.sort(scores[row])[::-1][:n]
        np.testing.assert_allclose(chosen, best, rtol=0, atol=2 * margin)
        values = call.values.reshape(-1, count)[row].astype(float)
        eps = float(ml_dtypes.finfo(call.values.dtype).eps)
        np.testing.assert_allclose(values[:n], chosen, rtol=eps, atol=margin)
        assert (values[n:] == -np.inf).all()


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(
    ("heads", "width", "keys", "count", "rows"),
    [(64, 128, 700, 256, 2), (32, 128, 100, 200, 1), (5, 7, 50, 10, 3), (70, 33, 9000, 64, 1)],
)
def test_the_best_scores_are_selected(isa, dtype, heads, width, keys, count, rows):
    r = np.random.default_rng(heads)
    shape = {"heads": heads, "width": width, "keys": keys, "count": count, "rows": rows}
    inputs, attributes = random_call(r, dtype, **shape)
    call = Call(inputs, attributes, isa)
    call.run()
    assert_best(call, scores_of(inputs), 1e-6)


def test_the_npus_roundings_are_made_on_request(isa):
    r = np.random.default_rng(3)
    inputs, attributes = random_call(r, np.int8, heads=12, width=48, keys=500, count=90, rows=2)
    call = Call(inputs, attributes, isa, "npu")
    call.run()
    assert_best(call, scores_of(inputs, "npu"), 1e-6)
    rounded = call.indices.copy()
    call = Call(inputs, attributes, isa, "exact")
    call.run()
    assert_best(call, scores_of(inputs), 1e-6)
    assert (rounded != call.indices).any(), "the two roundings should differ somewhere"


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("mode", [0, 3])
def test_equal_scores_come_in_the_order_of_keys(isa, layouts, dtype, mode):
    """Whole numbers: every sum is exact, and most scores are shared by many keys."""
    op = op_of(dtype)
    given = {"sparse_mode": mode, "sparse_count": 17, "heads": 4, "width": 3, "whole": True}
    inputs, attributes = indexer_call(op, layouts, dtype, mode, **given)
    call = Call(inputs, attributes, isa)
    call.run()
    np.testing.assert_array_equal(call.indices, select(op, inputs, attributes))


def test_nan_is_last_and_infinities_are_numbers(isa):
    """As NumPy sorts: infinity first, -infinity before NaN, -0 and 0 equal."""
    special = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1, -1, 3, np.nan], np.float32)
    keys = np.stack([np.abs(special), special < 0], 1).astype(np.float32)
    keys[[0, 8]] = np.nan
    inputs = {
        "query": np.array([[1, 0], [0, np.inf]], np.float32).reshape(1, 1, 2, 2),
        "key": keys.reshape(1, -1, 1, 2),
        "weights": np.array([[[1, 0]]], np.float32),
    }
    inputs["query"][0, 0, 1] = 0  # a head of weight 0 beside infinite keys gives NaN
    one = {n: a[:, :, :1] if n != "key" else a for n, a in inputs.items()}
    for given, count in ((one, 5), (one, 12), (inputs, 12)):
        attributes = {"layout_query": "BSND", "layout_key": "BSND", "sparse_mode": 0}
        call = Call(given, attributes | {"sparse_count": count}, isa)
        call.run()
        with np.errstate(all="ignore"):
            want, values = reference.lightning_indexer(
                given["query"], given["key"], given["weights"], sparse_mode=0, sparse_count=count
            )
        np.testing.assert_array_equal(call.indices, want)
        np.testing.assert_array_equal(call.values, values)


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "few", "random"])
@pytest.mark.parametrize("count", [1, 100, 2048, 5000])
def test_the_selection_is_exact_whatever_the_order(isa, order, count):
    """Orders that fill the candidates' buffer in every way, cut into pieces or not."""
    n = 20_000
    ranks = {
        "rising": np.arange(n),
        "falling": np.arange(n)[::-1],
        "equal": np.ones(n),
        "few": np.arange(n) % 7,
        "random": np.random.default_rng(0).permutation(n),
    }[order].astype(np.float32)
    one = np.ones((1, 1, 1), np.float32)
    inputs = {"query": one[..., None], "key": ranks.reshape(1, n, 1, 1), "weights": one}
    attributes = {"layout_query": "BSND", "layout_key": "BSND", "sparse_mode": 0}
    call = Call(inputs, attributes | {"sparse_count": count}, isa)
    want = np.argsort(-ranks, kind="stable")[:count]
    call.run()
    np.testing.assert_array_equal(call.indices.reshape(-1), want)
    tasks = call.num_tasks()
    assert tasks > 1
    for turn in ([*range(tasks)], [*range(tasks)][::-1]):
        call.indices[:] = 7
        call.run(order=turn)
        np.testing.assert_array_equal(call.indices.reshape(-1), want)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_threads_and_task_order_change_no_bit(isa, dtype, rows):
    r = np.random.default_rng(rows)
    inputs, attributes = random_call(r, dtype, heads=3, width=8, keys=9000, count=300, rows=rows)
    call = Call(inputs, attributes, isa)
    call.run()
    indices, values = call.indices.copy(), call.values.tobytes()
    tasks = call.num_tasks()
    assert tasks == (rows if rows >= 16 else 3 * rows)
    for threads in (1, 4):
        call.indices[:] = 7
        call.run(threads, list(r.permutation(tasks)))
        np.testing.assert_array_equal(call.indices, indices)
        assert call.values.tobytes() == values


@pytest.mark.parametrize("pieces", [True, False])
def test_memory_is_bounded_by_the_count_and_not_by_the_keys(pieces):
    """A million keys through one page of cache: scratch stays as it is for sixteen thousand."""
    lib, used, size = indexer_abi.library(), [], 256
    page = np.random.default_rng(0).permutation(size).astype(np.float32)
    for keys in (1 << 14, 1 << 20):
        pages = keys // size
        inputs = {
            "query": np.ones((1, 1, 1, 1), np.float32),
            "key": page.reshape(1, size, 1, 1),
            "weights": np.ones((1, 1, 1), np.float32),
            "block_table": np.zeros((1, pages), np.int32),
            "actual_seq_lengths_key": np.array([keys], np.int32),
        }
        attributes = {"layout_query": "BSND", "layout_key": "PA_BSND", "sparse_count": 512}
        call = Call(inputs, attributes | {"sparse_mode": 0})
        lib.sfa_core_trim()
        assert lib.sfa_core_pool_bytes() == 0
        call.run(order=list(range(call.num_tasks())) if pieces else None)
        used.append(lib.sfa_core_pool_bytes())
        order = np.argsort(-page, kind="stable")
        want = (order[:, None] + size * np.arange(pages)).reshape(-1)[:512]
        np.testing.assert_array_equal(call.indices.reshape(-1), want)
    assert used[0] == used[1] <= 256 << 10


def test_bad_lengths_and_pages_are_named():
    inputs, attributes = indexer_call(LIGHTNING_INDEXER, ("BSND", "PA_BSND"), np.float32)

    def refused(name: str, value: Any) -> str:
        with pytest.raises(core.CoreError) as caught:
            Call(inputs | {name: np.array(value, np.int32)}, attributes).run()
        return str(caught.value)

    table = inputs["block_table"].copy()
    table[0, 1] = 99
    assert "block_table[0][1] is 99" in refused("block_table", table)
    assert "actual_seq_lengths_key[1] is -1" in refused("actual_seq_lengths_key", [0, -1, 0])
    assert "block_table has 4 columns, but actual_seq_lengths_key[2] needs 5 pages" in refused(
        "actual_seq_lengths_key", [0, 0, 65]
    )
    assert "actual_seq_lengths_query[0] is 4" in refused("actual_seq_lengths_query", [4, 0, 0])
