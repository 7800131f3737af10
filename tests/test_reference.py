import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest

from sfa_onnx.errors import ContractError
from sfa_onnx.operator import kv_cache, reference, sequences
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT, PackedRow
from sfa_onnx.operator.reference_npu import half_away
from tests.attention_cases import BF16, LAYOUTS, make_case, softmax_reference

SFAA, SFA = SPARSE_FLASH_ATTENTION_ANTIQUANT, SPARSE_FLASH_ATTENTION


def row_of_token(case, batch, token):
    """Flat key row of a token, by the page's words, one at a time."""
    layout, lengths = case.attributes["layout_kv"], case.inputs.get("actual_seq_lengths_kv")
    key = case.inputs["key"]
    if layout == "PA_BSND":
        size = key.shape[1]
        return int(case.inputs["block_table"][batch, token // size]) * size + token % size
    if layout == "TND":
        return (int(lengths[batch - 1]) if batch else 0) + token
    return batch * key.shape[1] + token


def by_hand(case):
    """The operator one scalar decision at a time, in Python floats."""
    a, d = case.attributes, case.details
    query, key = case.inputs["query"], case.inputs["key"]
    tnd = a["layout_query"] == "TND"
    out = np.zeros((*query.shape[:-1], d["nope"]))
    for b, (act_q, act_kv) in enumerate(zip(d["act_q"], d["act_kv"], strict=True)):
        for s in range(act_q):
            at = (int(sum(d["act_q"][:b])) + s,) if tnd else (b, s)
            threshold = act_kv if a["sparse_mode"] == 0 else act_kv - act_q + s + 1
            tokens = []
            for slot, v in enumerate(case.inputs["sparse_indices"][at][0]):
                if v < 0 or slot * a["sparse_block_size"] >= threshold:
                    break
                first = int(v) * a["sparse_block_size"]
                tokens += [t for t in range(first, first + a["sparse_block_size"]) if t < threshold]
            if not tokens:
                continue
            rows = [row_of_token(case, b, t) for t in tokens]
            if case.op is SFAA:
                row = PackedRow(d["nope"], d["rope"], d["tile"], query.dtype.itemsize)
                n, r, sc = kv_cache.unpack(key.reshape(-1, row.bytes)[rows], row, query.dtype)
                latent = n.astype(float) * np.repeat(sc, d["tile"], -1).astype(float)
                keys, q = np.concatenate([latent, r.astype(float)], -1), query[at].astype(float)
            else:
                latent = key.reshape(-1, d["nope"])[rows].astype(float)
                rope = case.inputs["key_rope"].reshape(-1, d["rope"])[rows].astype(float)
                keys = np.concatenate([latent, rope], -1)
                q = np.concatenate([query[at], case.inputs["query_rope"][at]], -1).astype(float)
            for h in range(query.shape[-2]):
                weights = [math.exp(a["scale_value"] * float(q[h] @ k)) for k in keys]
                out[(*at, h)] = np.array(weights) @ latent / sum(weights)
    return out


@pytest.mark.parametrize("op", [SFAA, SFA], ids=["antiquant", "float"])
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize(
    ("sparse_mode", "size", "dtype"),
    [(3, 1, BF16), (0, 1, np.float16), (3, 4, np.float32), (0, 3, BF16)],
)
def test_every_layout_and_mode_matches_the_definition(op, layouts, sparse_mode, size, dtype):
    for seed in range(3):
        case = make_case(
            op, layouts, dtype=dtype, sparse_mode=sparse_mode, sparse_block_size=size, seed=seed
        )
        got = case.reference()
        assert got.dtype == dtype
        eps = float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(got.astype(float), by_hand(case), rtol=eps, atol=eps)


def test_float64_queries_give_float64_results():
    case = make_case(SFA, dtype=np.float32)
    for name in ("query", "key", "value", "query_rope", "key_rope"):
        case.inputs[name] = case.inputs[name].astype(np.float64)
    got = case.reference()
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, by_hand(case), rtol=1e-12, atol=1e-14)


def test_packed_rows_and_their_latents_agree_in_double():
    case = make_case(SFAA, ("BSND", "BSND"), dtype=np.float32)
    row = PackedRow(32, 8, 16, 4)
    nope, rope, scale = kv_cache.unpack(case.inputs["key"], row, np.float32)
    latent = kv_cache.dequantise(nope, scale, np.float64)
    query = case.inputs["query"].astype(np.float64)
    keep = ("scale_value", "sparse_mode", "sparse_block_size", "layout_query", "layout_kv")
    want = reference.sparse_flash_attention(
        query[..., :32], latent, latent, case.inputs["sparse_indices"],
        actual_seq_lengths_query=case.inputs["actual_seq_lengths_query"],
        actual_seq_lengths_kv=case.inputs["actual_seq_lengths_kv"],
        query_rope=query[..., 32:], key_rope=rope.astype(np.float64),
        **{k: case.attributes[k] for k in keep},
    )  # fmt: skip
    case.inputs["query"] = query
    np.testing.assert_allclose(case.reference(rope_dtype=np.float32), want, rtol=1e-12)


def simple(indices, s2=6, s1=1, **attributes):
    """One batch, one head, values that tell which tokens were read: v[t] = e_t."""
    nope = np.eye(16, dtype=np.float32)[None, :s2, None, :]
    query = np.zeros((1, s1, 1, 16), np.float32)
    indices = np.array(indices, np.int32).reshape(1, s1, 1, -1)
    lengths = attributes.pop("lengths", {})
    out = reference.sparse_flash_attention(
        query, nope, nope, indices, scale_value=1.0, **lengths, **attributes
    )
    return out[0, :, 0, :s2]


def test_duplicates_count_and_indices_past_the_threshold_are_skipped():
    assert simple([[2, 2, 5, 9]], sparse_mode=0)[0].tolist() == pytest.approx(
        [0, 0, 2 / 3, 0, 0, 1 / 3]
    )
    assert simple([[7, 5, 1]], sparse_mode=0)[0].tolist() == pytest.approx([0, 0.5, 0, 0, 0, 0.5])


def test_only_the_first_threshold_slots_are_looked_at():
    got = simple([[1, 1, 0]], s2=6, lengths={"actual_seq_lengths_kv": [2]})
    assert got[0].tolist() == [0, 1, 0, 0, 0, 0]


def test_a_length_may_fill_the_whole_cache():
    whole = simple([[0, 5]], s2=6, lengths={"actual_seq_lengths_kv": [6]})
    assert whole[0].tolist() == pytest.approx([0.5, 0, 0, 0, 0, 0.5])
    with pytest.raises(ContractError, match=r"kv\[0\]: expected <= 6 \(S2\), got 7"):
        simple([[0, 5]], s2=6, lengths={"actual_seq_lengths_kv": [7]})


def test_a_partial_block_may_stand_anywhere():
    got = simple([[2, 0, 1]], sparse_block_size=2, lengths={"actual_seq_lengths_kv": [5]})
    assert got[0].tolist() == pytest.approx([0.2] * 5 + [0])


def test_causal_rows_see_the_right_bottom_triangle():
    rows = simple([[0, 1, 2, 3]] * 3, s2=4, s1=3, lengths={"actual_seq_lengths_kv": [2]})
    assert rows[0].tolist() == [0, 0, 0, 0]  # two keys, three queries: the first row sees none
    assert rows[1].tolist() == [1, 0, 0, 0]
    assert rows[2].tolist() == [0.5, 0.5, 0, 0]


def test_holes_policies():
    hole = [[0, -1, 3]]
    with pytest.raises(ContractError, match=r"row 0, slot 2: .*negative one at slot 1.*got 3"):
        simple(hole, sparse_mode=0)
    assert simple(hole, sparse_mode=0, holes="skip")[0].tolist() == [0.5, 0, 0, 0.5, 0, 0]
    assert simple(hole, sparse_mode=0, holes="stop")[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert simple([[0, -1, 9]], sparse_mode=0)[0, 0] == 1  # nothing usable follows
    assert simple([[0, -1, 1]], lengths={"actual_seq_lengths_kv": [1]})[0, 0] == 1  # not looked at


def test_empty_rows_and_rows_past_the_query_length_are_zero():
    assert not simple([[-1, -1]], sparse_mode=0).any()
    assert not simple([[0, 1]], lengths={"actual_seq_lengths_kv": [0]}).any()
    case = make_case(SFAA, ("TND", "PA_BSND"))
    used = case.inputs["actual_seq_lengths_query"][-1]
    assert len(case.inputs["query"]) > used
    assert not case.reference()[used:].any()


def test_rows_that_are_not_selected_are_never_read():
    case = make_case(SFA, ("BSND", "PA_BSND"), dtype=np.float32, s2=64, count=8, batch=1, s1=1)
    pages, table = case.inputs["key"].copy(), case.inputs["block_table"]
    want = case.reference()
    chosen = case.inputs["sparse_indices"][0, 0, 0]
    rows = table[0, chosen // 16] * 16 + chosen % 16
    poisoned = np.full_like(pages, np.nan).reshape(-1, pages.shape[-1])
    poisoned[rows] = pages.reshape(poisoned.shape)[rows]
    case.inputs["key"] = poisoned.reshape(pages.shape)
    assert (case.reference() == want).all()


@pytest.mark.parametrize("dtype", [BF16, np.float16])
def test_npu_mode_rounds_but_stays_near(dtype):
    case = make_case(SFAA, dtype=dtype, s2=1500, count=1400, block_size=128, heads=8)
    exact, npu = case.reference(), case.reference(mode="npu")
    error = np.abs(exact.astype(float) - npu.astype(float)).max()
    assert 0 < error < 4 * float(ml_dtypes.finfo(dtype).eps) * np.abs(exact.astype(float)).max()


def test_half_away_rounds_ties_away_from_zero():
    x = np.array([1 + 2**-8, -(1 + 2**-8), 1 + 3 * 2**-8, 1 + 2**-9, 2.0**-140], np.float32)
    assert half_away(x, BF16).tolist() == [1.0078125, -1.0078125, 1.015625, 1.0, 0.0]
    tiny = np.array([2**-25, 3 * 2**-26, 65519.0, 65520.0], np.float32)
    assert half_away(tiny, np.float16).tolist() == [2**-24, 2**-24, 65504.0, math.inf]


BAD = {
    "a needed page outside the cache": (
        lambda c: c.inputs["block_table"].__setitem__((0, 0), 99), r"block_table\[0\]\[0\].*got 99"
    ),
    "the first page behind the cache": (
        lambda c: c.inputs["block_table"].__setitem__((0, 0), c.inputs["key"].shape[0]),
        r"block_table\[0\]\[0\]",
    ),
    "a negative needed page": (
        lambda c: c.inputs["block_table"].__setitem__((0, 1), -1), r"block_table\[0\]\[1\].*got -1"
    ),
    "too short a table": (
        lambda c: c.inputs.update(block_table=c.inputs["block_table"][:, :1]),
        r"seq_lengths_kv\[0\]",
    ),
    "a negative length": (
        lambda c: c.inputs["actual_seq_lengths_kv"].__setitem__(1, -2), r"kv\[1\].*got -2"
    ),
    "too long a query": (
        lambda c: c.inputs["actual_seq_lengths_query"].__setitem__(2, 4), r"query\[2\].*<= 3"
    ),
    "a table of floats": (
        lambda c: c.inputs.update(block_table=c.inputs["block_table"].astype(np.float32)),
        r"block_table: expected int32 .*got float32",
    ),
    "no table": (lambda c: c.inputs.pop("block_table"), "block_table: expected int32"),
    "no key lengths": (lambda c: c.inputs.pop("actual_seq_lengths_kv"), "seq_lengths_kv"),
    "wrong row": (lambda c: c.attributes.update(tile_size=32), "key: expected rows of"),
    "float key": (lambda c: c.inputs.update(key=np.zeros((1, 16, 1, 64), np.float32)), "int8"),
    "scales": (lambda c: c.inputs.update(key_dequant_scale=np.ones(1)), "reserved"),
    "mode 1": (lambda c: c.attributes.update(sparse_mode=1), "expected 0 or 3, got 1"),
    "quant mode": (lambda c: c.attributes.update(key_quant_mode=1), "key_quant_mode: expected 2"),
    "unknown attribute": (lambda c: c.attributes.update(pre_tokens=1), "no attribute 'pre_tokens'"),
    "indices": (
        lambda c: c.inputs.update(sparse_indices=c.inputs["sparse_indices"][:, :2]),
        "sparse_indices",
    ),
    "layouts": (lambda c: c.attributes.update(layout_kv="TND"), "PA_BSND or the query's layout"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_violations_are_refused_with_their_cause(name):
    spoil, text = BAD[name]
    case = make_case(SFAA, ("BSND", "PA_BSND"))
    spoil(case)
    with pytest.raises(ContractError, match=text):
        case.reference()


def test_a_sequence_without_a_token_between_two_others_is_one():
    starts, counts = sequences._prefix(np.array([2, 2, 5]), 5, "kv")
    assert (starts.tolist(), counts.tolist()) == ([0, 2, 2], [2, 0, 3])
    with pytest.raises(ContractError, match=r"kv\[2\] \(prefix sum\): expected >= 2, got 1"):
        sequences._prefix(np.array([0, 2, 1]), 5, "kv")


def test_decreasing_prefix_sums_are_refused():
    case = make_case(SFAA, ("TND", "TND"))
    case.inputs["actual_seq_lengths_kv"][:] = [40, 30, 40]
    with pytest.raises(ContractError, match=r"kv\[1\] \(prefix sum\): expected >= 40, got 30"):
        case.reference()


def test_indexer_orders_by_score_then_index():
    r = np.random.default_rng(0)
    query = r.standard_normal((2, 3, 4, 8)).astype(np.float32)
    key = r.integers(-1, 2, (2, 9, 1, 8)).astype(np.float32)
    weights = r.standard_normal((2, 3, 4)).astype(np.float32)
    got, values = reference.lightning_indexer(query, key, weights, None, [9, 5], sparse_count=6)
    for b, length in enumerate((9, 5)):
        for s in range(3):
            visible = length - 3 + s + 1
            q, w = query[b, s].astype(float), weights[b, s].astype(float)
            scores = [
                float(w @ np.maximum(q @ key[b, t, 0].astype(float), 0)) for t in range(visible)
            ]
            order = sorted(range(visible), key=lambda t: (-round(scores[t], 9), t))[:6]
            assert got[b, s, 0].tolist() == order + [-1] * (6 - len(order))
            assert values[b, s, 0, : len(order)] == pytest.approx([scores[t] for t in order])
            assert np.isneginf(values[b, s, 0, len(order) :]).all()


@pytest.mark.parametrize("mode", ["exact", "npu"])
def test_quantised_indexer_agrees_with_the_float_one_on_dequantised_inputs(mode):
    r = np.random.default_rng(1)
    query = r.integers(-127, 128, (5, 4, 16)).astype(np.int8)
    key = r.integers(-127, 128, (3, 8, 1, 16)).astype(np.int8)
    weights = r.uniform(0.1, 1, (5, 4)).astype(np.float16)
    q_scale = r.uniform(0.5, 1, (5, 4)).astype(np.float16)
    k_scale = r.uniform(0.5, 1, (3, 8, 1)).astype(np.float16)
    table, lengths = np.array([[2, 0], [1, -1]], np.int32), ([3, 5], [13, 7])
    layouts = {"layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": 4}
    got = reference.quant_lightning_indexer(
        query, key, weights, q_scale, k_scale, *lengths, table, mode=mode, **layouts
    )
    want, _ = reference.lightning_indexer(
        query.astype(float) * q_scale[..., None].astype(float),
        key.astype(float) * k_scale[..., None].astype(float),
        weights.astype(float), *lengths, table, **layouts,
    )  # fmt: skip
    assert got.shape == (5, 1, 4)
    assert (got == want).mean() >= (1 if mode == "exact" else 0.8)


def test_a_sink_is_one_more_score_without_a_value():
    for op in (SFAA, SFA):
        case = make_case(op, dtype=np.float32, sinks=True)
        plain = dataclasses.replace(case, inputs={**case.inputs, "sinks": None})
        if op is SFA:
            top, total = softmax_reference(plain)
            lse = (top + np.log(np.maximum(total, 1e-38))).transpose(0, 2, 3, 1)
            share = 1 / (1 + np.exp(case.inputs["sinks"][:, None] - lse))
            np.testing.assert_allclose(case.reference(), plain.reference() * share, rtol=1e-5)
        nothing = dataclasses.replace(case, inputs=case.inputs | {"sinks": np.full(4, -np.inf)})
        np.testing.assert_array_equal(nothing.reference(), plain.reference())
        everything = dataclasses.replace(case, inputs=case.inputs | {"sinks": np.full(4, np.inf)})
        for mode in ("exact", "npu", "golden"):
            assert not everything.reference(mode=mode).any()
        for mode in ("npu", "golden"):
            case = make_case(op, dtype=BF16, sinks=True)
            got, want = (case.reference(mode=m).astype(float) for m in (mode, "exact"))
            assert np.linalg.norm(got - want) <= 0.02 * np.linalg.norm(want)


def test_rows_without_a_key_have_their_sink_alone():
    case = make_case(SFA, ("BSND", "BSND"), dtype=np.float32, sinks=True, batch=2, s1=3, s2=6)
    case.inputs["actual_seq_lengths_query"] = np.array([3, 2], np.int32)
    case.inputs["actual_seq_lengths_kv"] = np.array([6, 1], np.int32)
    case.inputs["sparse_indices"][:] = -1
    top, total = softmax_reference(case)
    for row in ((0, 0, 0), (0, 0, 2), (1, 0, 1)):
        np.testing.assert_array_equal(top[row], case.inputs["sinks"])
        np.testing.assert_array_equal(total[row], np.ones(4))
    for row in ((1, 0, 0), (1, 0, 2)):  # the mask leaves nothing; past the query's length
        assert not top[row].any()
        assert not total[row].any()
    assert not case.reference().any()


@pytest.mark.parametrize("dtype", [np.float16, BF16], ids=str)
def test_the_golden_mode_is_the_vendors_formula(dtype):
    """Latents to the query's type, one float32 softmax, normalised weights to the query's type."""
    case = make_case(SFAA, ("BSND", "BSND"), dtype=dtype, batch=1, s1=1, sparse_mode=0)
    row = PackedRow(32, 8, 16)
    tokens = case.inputs["sparse_indices"][0, 0, 0]
    n, rope, scale = kv_cache.unpack(case.inputs["key"][0, tokens, 0], row, np.dtype(dtype))
    latent = (n * np.repeat(scale, 16, -1)).astype(dtype).astype(np.float32)
    keys = np.concatenate([latent, rope.astype(np.float32)], -1)
    scores = case.inputs["query"][0, 0].astype(np.float32) @ keys.T
    scores = scores * np.float32(case.attributes["scale_value"])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).astype(dtype).astype(np.float32)
    want = (weights @ latent).astype(dtype)
    np.testing.assert_array_equal(case.reference(mode="golden")[0, 0], want)
