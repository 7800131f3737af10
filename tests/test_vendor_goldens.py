"""The int8 operators against the vendors' own tests, in their forms and within their tolerances.

Three ways each: `torch.ops.custom` (the recipes' names), `torch.ops.npu` (torch_npu's) and a file
in onnxruntime. All of them round as the NPU does. Four forms have fewer equal sequences or rows
than the vendor's (3 and 6 of 18, 4 of 24, 32 of 576): the rest only takes time.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx import runtime  # noqa: E402
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION_ANTIQUANT  # noqa: E402
from sfa_onnx.torch.tensors import as_numpy, as_torch  # noqa: E402
from tests.vendor_cases import (  # noqa: E402
    Form,
    IndexerForm,
    attention_call,
    attention_golden,
    indexer_call,
    indexer_golden,
)

pytestmark = [pytest.mark.torch, pytest.mark.kernel]
WAYS = ("custom", "npu", "onnxruntime")
NAMES = {
    "custom": ("npu_sparse_flash_attention_antiquant", "npu_lightning_indexer_quant"),
    "npu": ("npu_kv_quant_sparse_flash_attention", "npu_quant_lightning_indexer"),
}
ONE_TO_22 = list(range(1, 23))
SHORT = [12] * 21 + [128]
# Ranges of values of ops-transformer's generator.
DRAWN = {
    "query": (2, 10), "query_rope": (-1, 1), "key": (-100, 100), "key_rope": (-10, -2),
    "dequant": (0, 1),
}  # fmt: skip
LONG = [800, 2208, 3072]
RECIPES = Form("recipes and op-plugin", 4, 128, 8192, [4096] * 4, page=256, shared=True)
VLLM = Form("vllm-ascend", 1, 64, 4096, [4096], page=256, dequant=(0.1, 1), shared=True)
SETS = (
    Form("TND over pages", 22, 48, 128, SHORT, page=128, tnd=True, **DRAWN),
    Form("BSND", 1, 64, 4096, [4096], **DRAWN),
    Form("BSND over pages", 3, 64, 3072, LONG, queries=3, page=16, **DRAWN),
    Form("TND with sinks", 22, 48, 128, SHORT, tnd=True, sinks=True, **DRAWN),
)
SMALL = Form("sizes", 3, 16, 400, [399, 160, 33], queries=3, query_lengths=[3, 2, 3], page=16,
             count=128, **DRAWN)  # fmt: skip
SIZES = [
    dataclasses.replace(SMALL, name=f"{size} {mode} {dtype}", size=size, mode=mode, dtype=dtype,
                        tnd=size == 4)
    for size in (1, 2, 4, 8, 16)
    for mode, dtype in ((0, torch.bfloat16), (3, torch.bfloat16), (3, torch.float16))
]  # fmt: skip
PYPTO = Form("PyPTO", 4, 128, 0, [65536] * 4, queries=2, page=128, scale=576**-0.5, query=(-1, 1),
             query_rope=(-1, 1), key=(-1, 1), key_rope=(-1, 1), quantised=True)  # fmt: skip
PYPTO_RAGGED = dataclasses.replace(PYPTO, lengths=[65536, 16381, 666, 15])


@pytest.fixture(scope="module", autouse=True)
def names():
    sfa_torch.enable_ascend_names()


def by_torch(call, way):
    name = NAMES[way][call.op is not SPARSE_FLASH_ATTENTION_ANTIQUANT]
    packet = getattr(getattr(torch.ops, way), name)
    known = {a.name for a in packet.default._schema.arguments}
    given = call.tensors | call.attributes
    assert set(given) - known <= {"sinks"}
    return packet(**{n: v for n, v in given.items() if n in known})


def by_onnxruntime(call):
    op, given = call.op, {n: as_numpy(t) for n, t in call.tensors.items() if n != "value"}
    names = [t.name if t.name in given else "" for t in op.inputs]
    if op is SPARSE_FLASH_ATTENTION_ANTIQUANT:
        names[2] = "key"
    while not names[-1]:
        names.pop()
    kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in given.items()}
    inputs = [helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in given.items()]
    kind = kinds["query"] if op is SPARSE_FLASH_ATTENTION_ANTIQUANT else TensorProto.INT32
    node = helper.make_node(op.name, names, ["out"], domain=op.domain, **call.attributes)
    out = helper.make_tensor_value_info("out", kind, None)
    graph = helper.make_graph([node], "one_node", inputs, [out])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(op.domain, 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=9)
    (result,) = runtime.run(runtime.session(model, rounding="npu"), given).values()
    return as_torch(np.asarray(result))


def every_way(call):
    for way in WAYS:
        if way == "custom" and "sinks" in call.tensors:
            continue  # the recipes' operator never had them
        result = by_onnxruntime(call) if way == "onnxruntime" else by_torch(call, way)
        yield way, result.float()


def share(got, want, rtol, atol):
    return torch.isclose(got, want, rtol=rtol, atol=atol).float().mean().item()


def test_recipes_and_op_plugin():
    call = attention_call(RECIPES)
    want = attention_golden(call).to(torch.bfloat16).float()
    for way, got in every_way(call):
        assert share(got, want, 0.005, 1e-4) > 0.99, way


def test_vllm_ascend():
    call = attention_call(VLLM)
    want = attention_golden(call)
    for way, got in every_way(call):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=6e-2, msg=way)


@pytest.mark.parametrize("form", [*SETS, *SIZES], ids=lambda form: form.name)
def test_ops_transformer(form):
    call = attention_call(form)
    want = attention_golden(call)
    half = form.dtype == torch.float16
    rtol, atol = (0.005, 2.5e-5) if half else (2**-7, 1e-4)
    for way, got in every_way(call):
        assert share(got, want, rtol, atol) >= 0.995, way
        least = torch.full((), 2**-14 / 0.005)
        error = (got - want).abs() / torch.maximum(torch.maximum(got.abs(), want.abs()), least)
        assert error.max() < 10, way


def test_pypto_over_long_sequences():
    call = attention_call(PYPTO)
    for want in (attention_golden(call), attention_golden(call, flash=True)):
        for way, got in every_way(call):
            assert share(got, want.to(torch.bfloat16).float(), 0.005, 1e-4) >= 0.995, way


def test_pypto_over_short_sequences():
    """Its two forms differ there by more than its tolerance, and each from weights not rounded.

    Many keys weigh about the same, so their sum is small beside the rounding of each. Hence a
    tolerance of the row, and the vendor's own one by the rounding of its check.
    """
    call = attention_call(PYPTO_RAGGED)
    flash, normalised = (
        attention_golden(call, f).to(torch.bfloat16).float() for f in (True, False)
    )
    assert share(flash, normalised, 0.005, 1e-4) < 0.995
    for want in (flash, normalised):
        for way, got in every_way(call):
            error = torch.linalg.vector_norm(got - want, dim=-1)
            assert (error <= 2**-8 * torch.linalg.vector_norm(want, dim=-1)).all(), way
    try:
        sfa_torch.enable_ascend_names(rounding="golden")
        for way in NAMES:
            got = by_torch(call, way).float()
            assert share(got, normalised, 0.005, 1e-4) >= 0.995, way
    finally:
        sfa_torch.enable_ascend_names()


INDEXERS = (
    IndexerForm("all", 24, 512, queries=4),
    IndexerForm("causal", 24, 512, queries=4, mode=3),
    IndexerForm("few keys", 4, 1449, [27, 27, 27, 1449], queries=32, count=1302),
    IndexerForm("packed", 1, 8192, [2176], ends=[4], mode=3),
    IndexerForm("packed, one page more", 1, 8192, [2304], ends=[4], mode=3),
    IndexerForm("packed, long", 1, 66048, [65529], ends=[2], mode=3),
    IndexerForm("packed, an empty sequence", 2, 512, [0, 165], ends=[26, 33], count=1325),
    IndexerForm("8192 keys", 4, 8192, queries=4, mode=3),
)


@pytest.mark.parametrize("form", INDEXERS, ids=lambda form: form.name)
def test_indexer_of_the_recipes_and_op_plugin(form):
    call = indexer_call(form)
    want = indexer_golden(call)
    for way, got in every_way(call):
        assert (got.view(want.shape) == want).float().mean() >= 0.999, way


def test_indexer_of_ops_transformer():
    lengths = [3016] * 5 + [3072]
    form = IndexerForm("set", 6, 3072, lengths, queries=3, mode=3, heads=16, scales=(0, 1),
                       weights=(-1, 1))  # fmt: skip
    call = indexer_call(form)
    want = indexer_golden(call).sort(-1).values
    for way, got in every_way(call):
        assert (got.view(want.shape).sort(-1).values == want).all(), way


def test_indexer_of_pypto():
    lengths = [65536, 971, 32869, 16383]
    call = indexer_call(IndexerForm("PyPTO", 4, 65536, lengths, queries=2, mode=3, few=True))
    want = indexer_golden(call)
    for way, got in every_way(call):
        for mine, theirs in zip(got.view(want.shape).int().tolist(), want.tolist(), strict=True):
            assert len(set(theirs) - set(mine)) <= int(2048 * 5e-4), way
