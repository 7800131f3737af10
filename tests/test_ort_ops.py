"""The compiled operators in onnxruntime against the reference in float64."""

from __future__ import annotations

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from sfa_onnx import runtime
from sfa_onnx.errors import UsageError
from sfa_onnx.operator.op import (
    KV_QUANT_SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
)
from tests.attention_cases import BF16, LAYOUTS, Case, make_case, softmax_reference
from tests.op_models import needs_library, op_model

OPS = (SPARSE_FLASH_ATTENTION_ANTIQUANT, SPARSE_FLASH_ATTENTION)
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BF16)
OUT = "attention_out"


def in_float64(case: Case, **kw: Any) -> np.ndarray:
    """The exact answer to the case's own (rounded) inputs, not rounded to the output type."""
    dtype = case.inputs["query"].dtype
    if case.op is SPARSE_FLASH_ATTENTION:
        floats = {n: a for n, a in case.inputs.items() if a.dtype == dtype}
        wide = {n: a.astype(np.float64) for n, a in floats.items()}
        return dataclasses.replace(case, inputs=case.inputs | wide).reference(**kw)
    wide = {"query": case.inputs["query"].astype(np.float64)}
    case = dataclasses.replace(case, inputs=case.inputs | wide)
    return case.reference(rope_dtype=dtype, **kw)


def head_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Worst relative error of a (token, head); what must be zero must be exactly zero.

    A head whose values cancel (few columns, few keys) is held against 5 % of the largest.
    """
    got = got.astype(np.float64)
    norm = np.linalg.norm(expected, axis=-1)
    assert not got[norm == 0].any()
    floor = 0.05 * norm.max(initial=0) or 1
    error = np.linalg.norm(got - expected, axis=-1) / np.maximum(norm, floor)
    return float(error.max(initial=0))


def limit(case: Case) -> float:
    if case.inputs["query"].dtype == np.float32:
        return 1e-5
    # In a wide output roundings average out; a narrow one may show a whole unit of bfloat16.
    return 4e-3 if case.details["nope"] >= 64 else 8e-3


def run(case: Case, **kw: Any) -> np.ndarray:
    return runtime.run(op_model(case, **kw), feeds(case))[OUT]


def infers_shapes() -> bool:
    """Older runtimes crash on our shape function; the library does without it there."""
    return [int(n) for n in ort.__version__.split(".")[:2]] >= [1, 24]


def feeds(case: Case) -> dict[str, np.ndarray]:
    return {n: a for n, a in case.inputs.items() if n != "value"}


def check(case: Case) -> None:
    got, expected = run(case), in_float64(case)
    assert got.shape == expected.shape
    assert got.dtype == case.inputs["query"].dtype
    assert head_error(got, expected) <= limit(case)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_layout_mode_and_block_size(op, layouts, dtype):
    for sparse_mode, size in itertools.product((0, 3), (1, 4)):
        check(make_case(op, layouts, dtype=dtype, sparse_mode=sparse_mode, sparse_block_size=size))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("heads", [1, 16, 128])
def test_the_real_widths(op, dtype, heads):
    check(
        make_case(op, dtype=dtype, batch=1, s1=2, heads=heads, s2=1500, count=1100, block_size=128,
                  nope=512, rope=64, tile=128)
    )  # fmt: skip


@needs_library
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sizes_nobody_planned(data):
    tile = data.draw(st.sampled_from([1, 3, 16, 32, 128]))
    case = make_case(
        data.draw(st.sampled_from(OPS)),
        data.draw(st.sampled_from(LAYOUTS)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        batch=data.draw(st.integers(1, 4)),
        s1=data.draw(st.integers(1, 4)),
        heads=data.draw(st.integers(1, 19)),
        s2=data.draw(st.integers(1, 90)),
        count=data.draw(st.integers(0, 100)),
        sparse_mode=data.draw(st.sampled_from([0, 3])),
        sparse_block_size=data.draw(st.integers(1, 17)),
        block_size=data.draw(st.integers(1, 40)),
        nope=tile * data.draw(st.integers(1, 5)),
        rope=data.draw(st.integers(0, 20)),
        tile=tile,
        lengths=data.draw(st.booleans()),
        peak=data.draw(st.sampled_from([0.0, 1.0, 4.0])),
        seed=data.draw(st.integers(0, 999)),
    )
    check(case)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_sinks(op, layouts, dtype):
    for sparse_mode in (0, 3):
        check(make_case(op, layouts, dtype=dtype, sparse_mode=sparse_mode, sinks=True))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_the_softmax_comes_out_when_asked_for(layouts, dtype, sinks):
    for sparse_mode in (0, 3):
        case = make_case(
            SPARSE_FLASH_ATTENTION, layouts, dtype=dtype, sparse_mode=sparse_mode, sinks=sinks,
            lse=True,
        )  # fmt: skip
        session = runtime.session(op_model(case))
        got = runtime.run(session, feeds(case))
        assert head_error(got[OUT], in_float64(case)) <= limit(case)
        for name, want in zip(("softmax_max", "softmax_sum"), softmax_reference(case), strict=True):
            assert got[name].shape == want.shape
            np.testing.assert_allclose(got[name], want, rtol=2e-3, atol=2e-3)


@needs_library
def test_a_node_may_leave_out_the_softmax_that_it_asks_for():
    """Runtimes abort when a shape is told for an output that the node does not have."""
    case = make_case(SPARSE_FLASH_ATTENTION, lse=True)
    model = op_model(case)
    del model.graph.node[0].output[1:]
    del model.graph.output[1:]
    assert head_error(runtime.run(model, feeds(case))[OUT], in_float64(case)) <= limit(case)


@needs_library
def test_a_softmax_not_asked_for_is_empty_as_in_cann():
    case = make_case(SPARSE_FLASH_ATTENTION, lse=True)
    model = op_model(case)
    next(a for a in model.graph.node[0].attribute if a.name == "return_softmax_lse").i = 0
    for value in model.graph.output[1:]:
        del value.type.tensor_type.shape.dim[1:]
    got = runtime.run(model, feeds(case))
    assert got["softmax_max"].shape == got["softmax_sum"].shape == (0,)
    assert (got[OUT] == run(case)).all()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
def test_a_session_may_round_as_the_npu_does(layouts, dtype):
    case = make_case(layouts=layouts, dtype=dtype, nope=64, tile=32, sinks=True)
    got = runtime.run(op_model(case), feeds(case), rounding="npu")[OUT]
    assert head_error(got, case.reference(mode="npu").astype(np.float64)) <= 1.5 * limit(case)
    assert (got != run(case)).any() == (dtype != np.float32)


@needs_library
def test_a_rounding_belongs_to_its_session():
    model, options = op_model(make_case()), ort.SessionOptions()
    session = runtime.session(model, options, rounding="npu")
    runtime.session(model, options, rounding="npu")
    with pytest.raises(UsageError, match="registered with rounding 'npu', not 'exact'"):
        runtime.session(model, options)
    with pytest.raises(UsageError, match="open it with rounding"):
        runtime.run(session, feeds(make_case()), rounding="npu")
    with pytest.raises(UsageError, match="'away': expected exact or npu"):
        runtime.session(model, rounding="away")
    foreign = ort.SessionOptions()
    foreign.add_session_config_entry("sfa_onnx.rounding", "away")
    with pytest.raises(Exception, match="expected exact or npu, got 'away'"):
        foreign.register_custom_ops_library(str(runtime.library_path()))


@needs_library
def test_duplicates_count_and_entries_past_the_threshold_are_skipped():
    case = make_case(batch=1, s1=1, s2=40, count=12, sparse_mode=0, lengths=True)
    rows = ([7] * 6 + [3] * 6, [39, 40, 1000, 2**31 - 1, 5, 6] + [-1] * 6, [-1] * 12, [40] * 12)
    for row in rows:
        case.inputs["sparse_indices"][0, 0, 0] = row
        check(case)


@needs_library
@pytest.mark.parametrize("size", [2**20, 2**30, 2**31 - 1])
def test_large_block_sizes_do_not_overflow(size):
    case = make_case(batch=1, s1=1, s2=40, count=4, sparse_mode=0, sparse_block_size=40)
    everything = in_float64(case)  # entry 0 is the whole sequence
    case.attributes["sparse_block_size"] = size if size < 2**30 else 2**30
    assert head_error(run(case), everything) <= limit(case)
    for first in (1, 2**11, 2**12, 2**31 - 1):  # only the first entry is looked at
        case.inputs["sparse_indices"][0, 0, 0] = [first, 0, 0, 0]
        assert not run(case).any()


@needs_library
@pytest.mark.parametrize("holes", ["skip", "stop"])
def test_holes_can_be_relaxed(monkeypatch, holes):
    case = make_case(batch=1, s1=1, s2=40, count=12, sparse_mode=0)
    case.inputs["sparse_indices"][0, 0, 0, 4] = -1
    monkeypatch.setenv("SFA_ONNX_HOLES", holes)
    assert head_error(run(case), in_float64(case, holes=holes)) <= limit(case)


@needs_library
def test_value_is_never_read():
    case = make_case()
    model = op_model(case)
    value = model.graph.input.add()
    value.CopyFrom(next(i for i in model.graph.input if i.name == "key"))
    value.name = model.graph.node[0].input[2] = "value"
    del value.type.tensor_type.shape.dim[:]
    expected = run(case)
    for shape in ((0, 1, 1, 512), (1, 1, 1, 1)):
        other = np.full(shape, 77, np.int8)
        got = runtime.run(model, feeds(case) | {"value": other})[OUT]
        assert (got == expected).all()


@needs_library
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(("s1", "heads"), [(1, 1), (1, 16), (40, 3)])
def test_thread_count_and_batch_composition_change_no_bit(op, s1, heads):
    case = make_case(op, ("BSND", "BSND"), batch=2, s1=s1, heads=heads, s2=2500, count=2048,
                     sparse_mode=0, nope=128, rope=64, tile=64, lengths=False)  # fmt: skip
    results = []
    for threads in (1, 2, 3):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = runtime.session(op_model(case), options)
        results.append(runtime.run(session, feeds(case))[OUT])
    assert all((r == results[0]).all() for r in results)
    alone = {n: a[1:] for n, a in case.inputs.items()}
    assert (run(dataclasses.replace(case, inputs=alone)) == results[0][1:]).all()


@needs_library
def test_one_session_serves_many_threads():
    case = make_case(s2=600, count=600)
    session, expected = runtime.session(op_model(case)), run(case)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(runtime.run, session, feeds(case)) for _ in range(24)]
        assert all((f.result()[OUT] == expected).all() for f in futures)


@needs_library
@pytest.mark.parametrize("shape", ["batch", "heads", "tokens", "indices"])
def test_empty_dimensions(shape):
    case = make_case(layouts=("BSND", "BSND"))
    query, indices, key = (case.inputs[n] for n in ("query", "sparse_indices", "key"))
    empty = {
        "batch": {"query": query[:0], "sparse_indices": indices[:0], "key": key[:0],
                  "actual_seq_lengths_query": np.zeros(0, np.int32),
                  "actual_seq_lengths_kv": np.zeros(0, np.int32)},
        "heads": {"query": query[:, :, :0]},
        "tokens": {"query": query[:, :0], "sparse_indices": indices[:, :0],
                   "actual_seq_lengths_query": np.zeros(3, np.int32)},
        "indices": {"sparse_indices": indices[..., :0]},
    }[shape]  # fmt: skip
    case.inputs |= empty
    got = run(case)
    assert got.shape == (*case.inputs["query"].shape[:3], 32)
    assert not got.any()


def to_default_domain(model, op_type: str, **extra: Any):
    """The node as the ATC flavour writes it: no domain of its own, one opset import."""
    node = model.graph.node[0]
    node.domain, node.op_type = "", op_type
    for name, value in extra.items():
        node.attribute.append(helper.make_attribute(name, value))
    del model.opset_import[1:]
    return model


@needs_library
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BF16], ids=str)
@pytest.mark.parametrize("op_type", ["NPUKvQuantSparseFlashAttention", "same"])
def test_the_atc_flavour_runs_and_takes_the_exact_scale(op_type, dtype):
    case = make_case(dtype=dtype)
    expected = run(case)
    exact = case.attributes["scale_value"]
    case.attributes["scale_value"] = 0.5
    name = case.op.name if op_type == "same" else op_type
    assert (run(case) != expected).any()
    model = to_default_domain(op_model(case), name, scale_value_exact=[exact])
    assert (runtime.run(model, feeds(case))[OUT] == expected).all()


@needs_library
def test_the_float_cache_op_runs_in_the_default_domain():
    case = make_case(SPARSE_FLASH_ATTENTION)
    model = to_default_domain(op_model(case), case.op.name)
    assert (runtime.run(model, feeds(case))[OUT] == run(case)).all()


@needs_library
def test_the_built_in_spelling_has_its_own_defaults():
    case = make_case(nope=128, rope=64, tile=128)
    expected = run(case)
    model = op_model(dataclasses.replace(case, op=KV_QUANT_SPARSE_FLASH_ATTENTION))
    keep = {"scale_value", "key_quant_mode", "value_quant_mode", "layout_kv", "attention_mode"}
    kept = [a for a in model.graph.node[0].attribute if a.name in keep]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    assert (runtime.run(model, feeds(case))[OUT] == expected).all()


@needs_library
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_output_types_and_symbolic_shapes_are_inferred(op):
    for dtype, kind in zip(DTYPES, ("float", "float16", "bfloat16"), strict=True):
        model = op_model(make_case(op, dtype=dtype))
        after = model.graph.node.add()  # the op's own output stays undeclared
        after.op_type, model.graph.output[0].name = "Identity", "out"
        after.input.append(OUT)
        after.output.append("out")
        output = runtime.session(model).get_outputs()[0]
        assert output.type == f"tensor({kind})"
        if infers_shapes():
            assert output.shape == ["query_0", "query_1", "query_2", 32]
