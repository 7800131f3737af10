"""Garbage in indices, tables and lengths: refused or computed as the reference does, never worse.

Whatever the values are, the operator must agree with the reference about which calls are legal,
and must never read outside its tensors (the C++ tests run the same core under AddressSanitizer).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_onnx import runtime
from sfa_onnx.errors import ContractError
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT
from tests.attention_cases import LAYOUTS, Case, make_case
from tests.op_models import needs_library, op_model
from tests.test_ort_ops import OPS, OUT, feeds, head_error, in_float64, limit

I32 = np.iinfo(np.int32)
EXTREME = [0, 1, -1, -2, 15, 16, 39, 40, 41, 63, 64, 2**16, 2**27, 2**28, 2**30, I32.max, I32.min]
VICTIMS = ("sparse_indices", "block_table", "actual_seq_lengths_query", "actual_seq_lengths_kv")


@functools.cache
def session_of(op: str, layouts: tuple[str, str], mode: int, size: int) -> ort.InferenceSession:
    return runtime.session(op_model(case_of(op, layouts, mode, size)))


def case_of(op: str, layouts: tuple[str, str], mode: int, size: int) -> Case:
    contract = next(o for o in OPS if o.name == op)
    return make_case(
        contract, layouts, dtype=np.float32, sparse_mode=mode, sparse_block_size=size, count=30
    )


def spoil(case: Case, r: np.random.Generator, much: bool) -> None:
    """Overwrites some (or all) values of some of the untrusted inputs."""
    for name in VICTIMS:
        if name not in case.inputs or r.random() < 0.5:
            continue
        values = case.inputs[name].copy()
        count = values.size if much else min(values.size, int(r.integers(1, 4)))
        at = r.permutation(values.size)[:count]
        noise = np.where(
            r.random(count) < 0.5,
            r.choice(EXTREME, count),
            r.integers(-3, 70, count),
        )
        values.reshape(-1)[at] = noise
        case.inputs[name] = values


def outcome(call: Any) -> np.ndarray | None:
    try:
        return np.asarray(call())
    except ContractError:
        return None


@needs_library
@settings(max_examples=200, deadline=None)
@given(
    op=st.sampled_from([o.name for o in OPS]),
    layouts=st.sampled_from(LAYOUTS),
    mode=st.sampled_from([0, 3]),
    size=st.sampled_from([1, 3, 16]),
    much=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_garbage_is_refused_or_computed_as_the_reference_does(op, layouts, mode, size, much, seed):
    case = case_of(op, layouts, mode, size)
    spoil(case, np.random.default_rng(seed), much)
    session = session_of(op, layouts, mode, size)
    expected = outcome(lambda: in_float64(case))
    got = outcome(lambda: runtime.run(session, feeds(case))[OUT])
    assert (got is None) == (expected is None)
    if got is not None and expected is not None:
        assert head_error(got, expected) <= limit(case)


@needs_library
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("value", [I32.min, -1, 2**28, I32.max])
def test_one_value_everywhere(op, layouts, value):
    """Products of huge entries with block and row sizes must not wrap into legal addresses."""
    for name in VICTIMS:
        for size in (1, 16):
            case = make_case(op, layouts, dtype=np.float32, sparse_block_size=size)
            if name not in case.inputs:
                continue
            case.inputs[name] = np.full_like(case.inputs[name], value)
            got = outcome(lambda case=case: runtime.run(op_model(case), feeds(case))[OUT])
            if name != "sparse_indices":
                assert got is None
            elif got is not None:
                assert not got.any()


@needs_library
@pytest.mark.parametrize("op", [SPARSE_FLASH_ATTENTION_ANTIQUANT, SPARSE_FLASH_ATTENTION])
def test_rows_that_are_not_selected_are_never_read(op):
    """NaN in every row, scale and rope that no index names must not reach the output."""
    case = make_case(op, batch=2, s1=1, s2=64, count=8, sparse_mode=0, lengths=True)
    clean = runtime.run(op_model(case), feeds(case))[OUT]
    table, kept = case.inputs["block_table"], set()
    for b, row in enumerate(case.inputs["sparse_indices"][:, 0, 0]):
        kept |= {(int(table[b, t // 16]), int(t % 16)) for t in row if t >= 0}
    for name in ("key", "key_rope"):
        if name not in case.inputs:
            continue
        poisoned = case.inputs[name].copy()
        for page in range(len(poisoned)):
            for slot in range(16):
                if (page, slot) not in kept:
                    poisoned[page, slot] = -1 if poisoned.dtype == np.int8 else np.nan
        case.inputs[name] = poisoned
    assert (runtime.run(op_model(case), feeds(case))[OUT] == clean).all()


@needs_library
def test_an_error_in_one_token_of_many_is_reported_whoever_finds_it():
    case = make_case(batch=4, s1=8, s2=600, count=600, sparse_mode=0)
    case.inputs["sparse_indices"][2, 5, 0, :3] = (1, -1, 2)
    case.inputs["sparse_indices"][3, 1, 0, :3] = (-7, -1, 2)
    case.inputs["actual_seq_lengths_query"][:] = 8
    case.inputs["actual_seq_lengths_kv"][:] = 600
    case.inputs["block_table"] = np.resize(
        np.arange(len(case.inputs["key"]), dtype=np.int32), case.inputs["block_table"].shape
    )
    session = runtime.session(op_model(case))
    for _ in range(3):
        with pytest.raises(ContractError, match=r"query row 21: slot 2 .* at slot 1"):
            runtime.run(session, feeds(case))


@pytest.mark.parametrize("hidden", [(0, 512), (512, 1024), (1536, 2000)])
def test_a_chunk_of_minus_infinity_weighs_nothing(hidden: tuple[int, int]) -> None:
    """Scores of -inf throughout one 512-key chunk leave the finite rest as it is."""
    from tests import test_kv_convert as small

    count, low, high = 2000, *hidden
    names = {"key": small.C, "krope": small.R}
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal((1, count, 1, w)).astype(np.float32) for n, w in names.items()}
    for name, width in (("q", small.C), ("qr", small.R)):
        feeds[name] = np.abs(rng.standard_normal((1, 1, small.N1, width))).astype(np.float32) + 0.1
    feeds["krope"][0, low:high] = -np.inf
    feeds["idx"] = np.arange(count, dtype=np.int32).reshape(1, 1, 1, count)
    infos = [small.vi(n, list(a.shape)) for n, a in feeds.items() if n != "idx"]
    infos.append(small.vi("idx", [1, 1, 1, count], 6))
    out = [small.vi("o", [1, 1, small.N1, small.C])]
    whole = small.model([small.attention("", "key", "krope", "o")], infos, out, [], [])
    got = small.run(whole, feeds)["o"]
    kept = np.r_[0:low, high:count]
    rest = dict(feeds, key=feeds["key"][:, kept], krope=feeds["krope"][:, kept])
    rest["idx"] = np.arange(len(kept), dtype=np.int32).reshape(1, 1, 1, -1)
    shapes = [small.vi(n, list(a.shape)) for n, a in rest.items() if n != "idx"]
    shapes.append(small.vi("idx", [1, 1, 1, len(kept)], 6))
    part = small.model([small.attention("", "key", "krope", "o")], shapes, out, [], [])
    np.testing.assert_allclose(got, small.run(part, rest)["o"], rtol=1e-5, atol=1e-6)
