"""The lightning indexers inside onnxruntime: results, shapes, refusals, garbage."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_onnx import runtime
from sfa_onnx.errors import ContractError, ModelError
from sfa_onnx.operator import reference
from sfa_onnx.operator.op import LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER
from tests.attention_cases import BF16, LAYOUTS
from tests.indexer_cases import indexer_call, indexer_model, select
from tests.op_models import needs_library

FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": BF16}
OPS = (LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER)
I32 = np.iinfo(np.int32)
EXTREME = [0, 1, -1, -2, 15, 16, 39, 40, 41, 63, 64, 2**16, 2**27, 2**28, 2**30, I32.max, I32.min]
VICTIMS = ("block_table", "actual_seq_lengths_query", "actual_seq_lengths_key")


def run(op, inputs, attributes):
    return runtime.run(indexer_model(op, inputs, attributes), inputs)


@needs_library
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("weights", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("mode", [0, 3])
def test_the_float_indexer_selects_what_the_reference_selects(layouts, dtype, weights, mode):
    given = {"weights": weights, "sparse_mode": mode, "sparse_count": 12}
    inputs, attributes = indexer_call(LIGHTNING_INDEXER, layouts, dtype, mode, **given)
    got = run(LIGHTNING_INDEXER, inputs, attributes)
    arguments = [inputs.get(t.name) for t in LIGHTNING_INDEXER.inputs]
    indices, values = reference.lightning_indexer(*arguments, **attributes)
    np.testing.assert_array_equal(got["sparse_indices"], indices)
    assert (indices == -1).any()
    assert got["sparse_values"].dtype == dtype
    a, b = got["sparse_values"].astype(float), values.astype(float)
    np.testing.assert_array_equal(np.isinf(a), np.isinf(b))
    eps = 2e-6 if dtype == np.float32 else 1e-2
    np.testing.assert_allclose(a[np.isfinite(a)], b[np.isfinite(b)], eps, eps)


@needs_library
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("mode", [0, 3])
@pytest.mark.parametrize("lengths", [True, False])
def test_the_quantised_indexer_selects_what_the_reference_selects(layouts, mode, lengths):
    op = QUANT_LIGHTNING_INDEXER
    given = {"sparse_mode": mode, "lengths": lengths, "heads": 5, "width": 21}
    inputs, attributes = indexer_call(op, layouts, None, 1, **given)
    got = run(op, inputs, attributes)["sparse_indices"]
    np.testing.assert_array_equal(got, select(op, inputs, attributes))


@needs_library
def test_the_session_chooses_the_rounding():
    op = QUANT_LIGHTNING_INDEXER
    given = {"heads": 2, "width": 4, "sparse_count": 40, "sparse_mode": 0}
    inputs, attributes = indexer_call(op, ("BSND", "PA_BSND"), None, 6, **given)
    found = {}
    for rounding in ("exact", "npu"):
        session = runtime.session(indexer_model(op, inputs, attributes), rounding=rounding)
        found[rounding] = runtime.run(session, inputs)["sparse_indices"]
        want = select(op, inputs, attributes, mode=rounding)
        np.testing.assert_array_equal(found[rounding], want)
    assert (found["npu"] != found["exact"]).any(), "choose numbers that the roundings tell apart"


@needs_library
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_values_are_made_only_when_asked_for(op):
    inputs, attributes = indexer_call(op, ("BSND", "PA_BSND"), np.float32)
    alone = attributes | ({"return_values": 0} if op is LIGHTNING_INDEXER else {})
    assert list(run(op, inputs, alone)) == ["sparse_indices"]
    if op is QUANT_LIGHTNING_INDEXER:
        return
    # The second output may go unread.
    model = indexer_model(op, inputs, attributes)
    only = runtime.run(runtime.session(model), inputs, ["sparse_indices"])
    np.testing.assert_array_equal(only["sparse_indices"], select(op, inputs, attributes))
    model.graph.node[0].attribute.remove(
        next(a for a in model.graph.node[0].attribute if a.name == "return_values")
    )
    assert runtime.run(model, inputs)["sparse_values"].shape == (0,)


@needs_library
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
def test_shapes_are_inferred_with_their_symbols(op, layouts):
    inputs, attributes = indexer_call(op, layouts, np.float32)
    session = runtime.session(indexer_model(op, inputs, attributes))
    lead = [f"query{i}" for i in range(inputs["query"].ndim - 2)]
    version = tuple(map(int, ort.__version__.split(".")[:2]))
    if version >= (1, 24):  # older ones crash on shape functions, so they get none
        for output in session.get_outputs()[:1]:
            assert output.shape == [*lead, 1, 9]


@needs_library
@pytest.mark.parametrize("dtype", [np.float32, np.int8], ids=["f32", "int8"])
def test_one_row_over_many_keys_does_not_depend_on_threads(dtype):
    op = QUANT_LIGHTNING_INDEXER if dtype == np.int8 else LIGHTNING_INDEXER
    r = np.random.default_rng(0)
    keys, heads, width = 20_000, 8, 16
    shapes = {"query": (1, 1, heads, width), "key": (1, keys, 1, width)}
    inputs = {n: r.integers(-9, 9, s).astype(dtype) for n, s in shapes.items()}
    kind = np.float16 if dtype == np.int8 else dtype
    inputs["weights"] = r.standard_normal((1, 1, heads)).astype(kind)
    if dtype == np.int8:
        inputs["query_dequant_scale"] = r.uniform(0.5, 1, (1, 1, heads)).astype(kind)
        inputs["key_dequant_scale"] = r.uniform(0.5, 1, (1, keys, 1)).astype(kind)
    attributes = op.complete({"layout_key": "BSND", "sparse_count": 700})
    results = []
    for threads in (1, 2, 5):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = runtime.session(indexer_model(op, inputs, attributes), options)
        results.append(runtime.run(session, inputs)["sparse_indices"])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "query rank": ({"query": lambda x: x[0]}, r"query: .*expected 4 dim.*got 3"),
    "no head": ({"query": lambda x: x[:, :, :0], "weights": lambda x: x[:, :, :0],
                 "query_dequant_scale": lambda x: x[:, :, :0]}, "at least one head"),
    "key width": ({"key": lambda x: x[..., :8]}, r"key: .*expected 16 .*width, as the query's"),
    "key heads": ({"key": lambda x: np.concatenate([x, x], 2)}, "one key head"),
    "key pages": ({"key": lambda x: x[:, :0]}, "pages of at least one row"),
    "weights": ({"weights": lambda x: x[..., :2]}, r"weights: .*expected 3 in dimension 2"),
    "weights rank": ({"weights": lambda x: x[..., None]}, r"weights: .*expected 3 dimensions"),
    "table": ({"block_table": lambda x: x[:2]}, r"block_table: .*expected 3 in dimension 0"),
    "no table": ({"block_table": None}, "block_table: expected, because layout_key is PA_BSND"),
    "no lengths": (
        {"actual_seq_lengths_key": None},
        "actual_seq_lengths_key: expected, because layout_key is PA_BSND",
    ),
    "lengths": ({"actual_seq_lengths_query": lambda x: x[:1]}, r"expected 3 in dimension 0"),
    "query scale": (
        {"query_dequant_scale": lambda x: x[:, :1]}, r"query_dequant_scale: .*expected 3",
    ),
    "key scale": ({"key_dequant_scale": lambda x: x[:, :7]}, r"key_dequant_scale: .*expected 16"),
    "too long": (
        {"actual_seq_lengths_key": lambda x: x + 99},
        r"block_table has 4 columns, but actual_seq_lengths_key\[0\] needs 9 pages",
    ),
    "page": ({"block_table": lambda x: x + 99}, r"block_table\[0\]\[0\] is \d+, but query row 0"),
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("name", REFUSALS)
def test_bad_inputs_are_refused_by_name(op, name):
    inputs, attributes = indexer_call(op, ("BSND", "PA_BSND"), np.float32)
    changes, message = REFUSALS[name]
    if op is LIGHTNING_INDEXER and all("scale" in n for n in changes):
        assert not changes.keys() & inputs.keys()
        return
    for tensor, change in changes.items():
        if change is None:
            del inputs[tensor]
        elif tensor in inputs:
            inputs[tensor] = np.ascontiguousarray(change(inputs[tensor]))
    with pytest.raises(ContractError, match=message):
        run(op, inputs, attributes)


@needs_library
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sparse_count", 0, "sparse_count: expected an int in"),
        ("sparse_mode", 1, "sparse_mode: expected 0 or 3, got 1"),
        ("layout_key", "TND", "layout_key: expected PA_BSND or layout_query's BSND, got TND"),
        ("layout_query", "BNSD", "layout_query: expected BSND or TND, got 'BNSD'"),
        ("pre_tokens", 5, "pre_tokens: expected"),
        ("sparse_count", 2.5, "sparse_count: expected an int, got a float"),
    ],
)
def test_bad_attributes_are_refused_when_the_session_is_made(op, name, value, message):
    inputs, attributes = indexer_call(op, ("BSND", "PA_BSND"), np.float32)
    with pytest.raises(ModelError, match=rf"{op.name} 'site': attribute {message}"):
        runtime.session(indexer_model(op, inputs, attributes | {name: value}))


# ------------------------------------------------------------------ garbage


@functools.cache
def session_of(op: str, layouts: tuple[str, str], mode: int) -> ort.InferenceSession:
    return runtime.session(indexer_model(*case_of(op, layouts, mode)))


def case_of(name: str, layouts: tuple[str, str], mode: int) -> tuple[Any, Any, Any]:
    op = next(o for o in OPS if o.name == name)
    given = {"whole": True, "sparse_mode": mode, "return_values": 0}
    if op is QUANT_LIGHTNING_INDEXER:
        del given["return_values"]
    return op, *indexer_call(op, layouts, np.float32, **given)


def outcome(call: Any) -> np.ndarray | None:
    try:
        return np.asarray(call())
    except ContractError:
        return None


@needs_library
@settings(max_examples=150, deadline=None)
@given(
    op=st.sampled_from([o.name for o in OPS]),
    layouts=st.sampled_from(LAYOUTS),
    mode=st.sampled_from([0, 3]),
    much=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_garbage_is_refused_or_computed_as_the_reference_does(op, layouts, mode, much, seed):
    contract, inputs, attributes = case_of(op, layouts, mode)
    r = np.random.default_rng(seed)
    for name in VICTIMS:
        if name not in inputs or r.random() < 0.5:
            continue
        values = inputs[name].copy()
        count = values.size if much else min(values.size, int(r.integers(1, 4)))
        noise = np.where(r.random(count) < 0.5, r.choice(EXTREME, count), r.integers(-3, 70, count))
        values.reshape(-1)[r.permutation(values.size)[:count]] = noise
        inputs[name] = values
    session = session_of(op, layouts, mode)
    want = outcome(lambda: select(contract, inputs, attributes))
    got = outcome(lambda: runtime.run(session, inputs)["sparse_indices"])
    assert (got is None) == (want is None)
    if got is not None:
        np.testing.assert_array_equal(got, want)


@needs_library
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_keys_that_no_row_sees_are_never_read(op):
    """NaN (or -128) in hidden keys, pages and scales must change nothing."""
    inputs, attributes = indexer_call(op, ("BSND", "PA_BSND"), np.float32, whole=True)
    clean = run(op, inputs, attributes)["sparse_indices"]
    seen = np.zeros(inputs["key"].shape[:2], bool)
    for table, length in zip(inputs["block_table"], inputs["actual_seq_lengths_key"], strict=True):
        for token in range(length):
            seen[table[token // 16], token % 16] = True
    inputs["key"] = inputs["key"].copy()
    inputs["key"][~seen] = -128 if op is QUANT_LIGHTNING_INDEXER else np.nan
    if op is QUANT_LIGHTNING_INDEXER:
        inputs["key_dequant_scale"] = inputs["key_dequant_scale"].copy()
        inputs["key_dequant_scale"][~seen] = np.nan
    np.testing.assert_array_equal(run(op, inputs, attributes)["sparse_indices"], clean)
