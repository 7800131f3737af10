"""Zero heads and zero ropes in the ATC flavour: the same numbers, sizes that the NPU has."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sfa_onnx import kv_convert, runtime
from sfa_onnx.ascend import flavour
from sfa_onnx.ascend.checks import check
from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.contract import PackedRow
from sfa_onnx.operator.op import (
    KV_CACHE_PACK,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
)
from tests.attention_cases import BF16, LAYOUTS, make_case, softmax_reference
from tests.op_models import needs_library, op_model

SIZES = {"nope": 512, "tile": 128, "s2": 40, "count": 12, "batch": 2, "s1": 2}


def outputs(model, feeds):
    return [np.asarray(v) for v in runtime.run(model, feeds).values()]


def findings(model, soc="Ascend910B2"):
    found = check(model, cann="9.1", soc_version=soc).findings
    return {f.rule for f in found if f.severity == "error"}


def node_of(model, op):
    wanted = op.name.replace("SparseFlashAttentionAntiquant", "KvQuantSparseFlashAttention")
    return next(n for n in model.graph.node if n.op_type == wanted)


@needs_library
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("op", [SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT])
@pytest.mark.parametrize("symbolic", [False, True])
def test_heads_are_padded_and_sliced_exactly(op, layouts, symbolic):
    case = make_case(op, layouts, dtype=np.float16, heads=24, rope=64, **SIZES)
    model = op_model(case, symbolic=symbolic)
    if symbolic:
        for value in model.graph.input:
            if value.name in ("query", "query_rope"):
                value.type.tensor_type.shape.dim[-2].dim_value = 24
    feeds = {n: a for n, a in case.inputs.items() if n != "value"}
    converted = flavour.convert(model)
    (note,) = [n for n in converted.notes if "heads" in n]
    assert "24 query heads computed as 32, the further ones zero and sliced away (exact; 33" in note
    (want,), (got,) = outputs(model, feeds), outputs(converted.model, feeds)
    np.testing.assert_array_equal(got, want)
    assert not {"heads", "row-size"} & findings(converted.model)
    assert "heads" in findings(model)


@needs_library
def test_the_softmax_of_padded_heads_is_sliced_too():
    case = make_case(SPARSE_FLASH_ATTENTION, ("BSND", "BSND"), dtype=np.float16, heads=3, rope=64,
                     lse=True, **SIZES)  # fmt: skip
    feeds = {n: a for n, a in case.inputs.items() if n != "value"}
    model = op_model(case, symbolic=False)
    for got, want in zip(outputs(flavour.to_atc(model), feeds), outputs(model, feeds), strict=True):
        np.testing.assert_array_equal(got, want)
    assert outputs(flavour.to_atc(model), feeds)[1].shape == softmax_reference(case)[0].shape


@needs_library
def test_a_sink_and_padded_heads():
    case = make_case(SPARSE_FLASH_ATTENTION, ("TND", "TND"), dtype=np.float32, heads=5, rope=0,
                     sinks=True, **SIZES)  # fmt: skip
    feeds = {n: a for n, a in case.inputs.items() if n != "value"}
    model = op_model(case, symbolic=False)
    (got,) = outputs(flavour.to_atc(model), feeds)
    np.testing.assert_allclose(got, case.reference(), rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BF16], ids=str)
def test_a_float_site_without_a_rope_gets_one_of_zeros(layouts, dtype):
    case = make_case(SPARSE_FLASH_ATTENTION, layouts, dtype=dtype, rope=0, heads=6, **SIZES)
    model = op_model(case, symbolic=False)
    feeds = {n: a for n, a in case.inputs.items() if n != "value"}
    converted = flavour.convert(model)
    assert any("no rope, 64 zero columns of queries and keys" in n for n in converted.notes)
    node = node_of(converted.model, SPARSE_FLASH_ATTENTION)
    assert all(node.input[i] for i in range(9) if i not in (4, 5, 6))
    (want,), (got,) = outputs(model, feeds), outputs(converted.model, feeds)
    np.testing.assert_array_equal(got, want)
    errors = findings(converted.model)
    assert not {"heads", "rope-missing", "row-size", "attribute-value"} & errors, errors


@needs_library
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
def test_int8_rows_without_a_rope_get_one_of_zeros(layouts):
    case = make_case(layouts=layouts, dtype=np.float16, rope=0, heads=4, **SIZES)
    model = op_model(case, symbolic=False)
    feeds = {n: a for n, a in case.inputs.items() if n != "value"}
    (want,) = outputs(model, feeds)
    converted = flavour.convert(model)
    assert "key: rows of 528 bytes become 656 (a rope of zeros)" in converted.notes
    nope, _, scale = kv_cache.unpack(case.inputs["key"], PackedRow(512, 0, 128, 2), np.float16)
    zeros = np.zeros((*nope.shape[:-1], 64), np.float16)
    feeds["key"] = kv_cache.pack(nope, zeros, scale)
    (got,) = outputs(converted.model, feeds)
    np.testing.assert_array_equal(got, want)
    assert not {"heads", "row-size", "attribute-value"} & findings(converted.model)


@needs_library
@pytest.mark.parametrize("npu_dtype", [None, "fp16"])
def test_rows_packed_in_the_graph_get_the_rope_there(npu_dtype):
    dtype = np.float32 if npu_dtype else np.float16
    case = make_case(layouts=("BSND", "BSND"), dtype=dtype, rope=0, heads=4, lengths=False, **SIZES)
    model = op_model(case, symbolic=False)
    packs = helper.make_node(KV_CACHE_PACK.name, ["latent"], ["fresh"], name="pack",
                             domain=KV_CACHE_PACK.domain, tile_size=128)  # fmt: skip
    joins = helper.make_node("Concat", ["past", "fresh"], ["key"], name="join", axis=1)
    model.graph.node.insert(0, packs)
    model.graph.node.insert(1, joins)
    old = next(i for i in model.graph.input if i.name == "key")
    model.graph.input.remove(old)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model.graph.input.extend([
        helper.make_tensor_value_info("latent", kind, [2, 1, 1, 512]),
        helper.make_tensor_value_info("past", TensorProto.INT8, [2, 39, 1, 528]),
    ])  # fmt: skip
    model.graph.output.append(
        helper.make_tensor_value_info("key", TensorProto.INT8, [2, 40, 1, 528])
    )
    model.opset_import.append(helper.make_opsetid(KV_CACHE_PACK.domain, 1))
    onnx.checker.check_model(model)
    latent = np.random.default_rng(1).standard_normal((2, 1, 1, 512)).astype(dtype)
    feeds = {n: a for n, a in case.inputs.items() if n not in ("value", "key")}
    feeds |= {"latent": latent, "past": case.inputs["key"][:, :39]}
    want, rows = outputs(model, feeds)
    converted = flavour.convert(model, npu_dtype=npu_dtype)
    row = PackedRow(512, 0, 128, 2)
    nope, _, scale = kv_cache.unpack(feeds["past"], row, np.float16)
    feeds["past"] = kv_cache.pack(nope, np.zeros((*nope.shape[:-1], 64), np.float16), scale)
    got, wide = outputs(converted.model, feeds)
    np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=4e-3, atol=4e-3)
    if npu_dtype is None:
        np.testing.assert_array_equal(got, want)
    parts = kv_cache.unpack(wide, PackedRow(512, 64, 128, 2), np.float16)
    assert not parts[1].any()
    np.testing.assert_array_equal(kv_cache.pack(parts[0], None, parts[2]), rows)
    assert not {"heads", "row-size", "attribute-value"} & findings(converted.model)


@needs_library
def test_a_converted_cache_without_a_rope_says_what_the_npu_wants():
    case = make_case(SPARSE_FLASH_ATTENTION, ("BSND", "BSND"), dtype=np.float16, rope=0, heads=24,
                     lengths=False, **SIZES)  # fmt: skip
    report = kv_convert.convert(op_model(case, symbolic=False), to="packed-int8")
    (note,) = [n for n in report.notes if "rope" in n]
    assert note == (
        "no rope, so rows have 528 bytes; `sfa-onnx atc` writes 656 for the NPU, with 64 zero"
        " columns: exact, 24% more cache"
    )
    feeds = {n: a for n, a in case.inputs.items() if n not in ("value", "key")}
    rows = kv_cache.pack(case.inputs["key"], None)
    (want,) = outputs(report.model, feeds | {"key_packed": rows})
    converted = flavour.convert(report.model)
    nope, _, scale = kv_cache.unpack(rows, PackedRow(512, 0, 128, 2), np.float16)
    rows = kv_cache.pack(nope, np.zeros((*nope.shape[:-1], 64), np.float16), scale)
    (got,) = outputs(converted.model, feeds | {"key_packed": rows})
    np.testing.assert_array_equal(got, want)
    assert not {"heads", "row-size", "attribute-value"} & findings(converted.model)


@pytest.mark.parametrize("op", [SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT])
def test_queries_without_a_head_get_none(op):
    case = make_case(op, ("BSND", "BSND"), dtype=np.float16, heads=24, rope=64, **SIZES)
    model = op_model(case)
    for value in model.graph.input:
        if value.name in ("query", "query_rope"):
            value.type.tensor_type.shape.dim[-2].dim_value = 0
    assert "heads" in findings(model)
    assert not any("heads" in note for note in flavour.convert(model).notes)


@pytest.mark.parametrize("size", [-1, -(2**63), 2**63 - 1])
def test_a_size_that_no_tensor_has_is_open(size: int) -> None:
    case = make_case(
        SPARSE_FLASH_ATTENTION, LAYOUTS[0], dtype=np.float16, heads=24, rope=64, **SIZES
    )
    model = op_model(case)
    want = flavour.to_atc(op_model(case)).graph.node
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = size
    assert [n.op_type for n in flavour.to_atc(model).graph.node] == [n.op_type for n in want]
