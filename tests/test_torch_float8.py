"""8-bit float latents under torch_npu's and vLLM's names: as the vendor's formula has them."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx.errors import ContractError  # noqa: E402
from sfa_onnx.operator.contract import PackedRow  # noqa: E402
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION  # noqa: E402
from sfa_onnx.torch.float8 import HIFLOAT8, hifloat8_values  # noqa: E402
from sfa_onnx.torch.tensors import as_numpy, as_torch  # noqa: E402
from tests.attention_cases import BF16, LAYOUTS, Case, make_case  # noqa: E402

pytestmark = pytest.mark.torch
ROW = PackedRow(32, 8, 16)


@pytest.fixture(scope="module", autouse=True)
def enabled():
    yield sfa_torch.enable_ascend_names()
    sfa_torch.enable_ascend_names()


def test_hifloat8_is_read_as_it_is_written_down():
    values = hifloat8_values().tolist()
    known = {0x00: 0.0, 0x08: 1.0, 0x0C: 1.5, 0x10: 2.0, 0x18: 0.5, 0x88: -1.0, 0x01: 2.0**-22,
             0x07: 2.0**-16, 0x6E: 2.0**15, 0x6D: 1.5 * 2.0**14, 0x7E: 2.0**-15, 0x20: 4.0,
             0x6F: float("inf"), 0xEF: float("-inf")}  # fmt: skip
    assert {byte: values[byte] for byte in known} == known
    assert values[0x80] != values[0x80]
    finite = [v for v in values if abs(v) < float("inf")]
    assert len(set(finite)) == 256 - 3  # zero, the infinities and no number have one byte each
    assert [-v for v in values[1:128]] == values[129:]


def float8_case(layouts, kind, dtype):
    """A packed case whose latents are bytes of an 8-bit float, and the float one it stands for."""
    case = make_case(layouts=layouts, dtype=dtype, seed=3)
    rows = as_torch(case.inputs["key"]).view(torch.uint8).clone()
    generator = torch.Generator().manual_seed(1)
    if kind == "hifloat8":
        finite = torch.arange(256)[hifloat8_values().abs() < 16].to(torch.uint8)
        table = hifloat8_values()
    else:
        table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        finite = torch.arange(256)[table.abs() < 16].to(torch.uint8)
    shape = (*rows.shape[:-1], ROW.nope)
    rows[..., : ROW.nope] = finite[torch.randint(len(finite), shape, generator=generator)]
    scale = rows[..., ROW.scale_offset :].contiguous().view(torch.float32)
    latent = table[rows[..., : ROW.nope].long()] * scale.repeat_interleave(ROW.tile, -1)
    rope = (
        rows[..., ROW.nope : ROW.scale_offset].contiguous().view(as_torch(np.zeros(1, dtype)).dtype)
    )
    inputs = {n: a for n, a in case.inputs.items() if n not in ("key", "value", "query")}
    query = case.inputs["query"]
    inputs["query"] = np.ascontiguousarray(query[..., : ROW.nope])
    inputs["query_rope"] = np.ascontiguousarray(query[..., ROW.nope :])
    inputs |= {"key": as_numpy(latent).astype(dtype), "key_rope": as_numpy(rope)}
    names = {a.name for a in SPARSE_FLASH_ATTENTION.attributes}
    given = {n: v for n, v in case.attributes.items() if n in names}
    floats = Case(SPARSE_FLASH_ATTENTION, inputs, SPARSE_FLASH_ATTENTION.complete(given))
    return case, rows, floats


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("kind", ["hifloat8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", [BF16, np.float16], ids=str)
def test_the_attention_over_8_bit_floats(layouts, kind, dtype):
    case, rows, floats = float8_case(layouts, kind, dtype)
    given = {n: as_torch(a) for n, a in case.inputs.items()} | case.attributes
    packet, words = torch.ops.npu.npu_kv_quant_sparse_flash_attention, {}
    if kind == "hifloat8":
        words = {"key_dtype": HIFLOAT8, "value_dtype": HIFLOAT8}
    key = rows if kind == "hifloat8" else rows.view(torch.float8_e4m3fn)
    given |= {"key": key, "value": key} | words
    want = floats.reference(mode="npu").astype(np.float64)
    got = as_numpy(packet(**given)).astype(np.float64)
    norm = np.linalg.norm(want, axis=-1)
    assert (np.linalg.norm(got - want, axis=-1) <= 8e-3 * norm).all()
    if kind == "float8_e4m3fn":
        vllm = torch.ops._C_ascend.npu_kv_quant_sparse_flash_attention
        out, top, total = vllm(**given, return_softmax_lse=True)
        np.testing.assert_array_equal(as_numpy(out).astype(np.float64), got)
        assert top.shape == total.shape
        assert top.numel()


def test_what_does_not_go_together_is_refused():
    case, rows, _ = float8_case(("BSND", "PA_BSND"), "hifloat8", BF16)
    packet = torch.ops.npu.npu_kv_quant_sparse_flash_attention
    given = {n: as_torch(a) for n, a in case.inputs.items()} | case.attributes
    given |= {"key": rows, "value": rows, "key_dtype": HIFLOAT8, "value_dtype": HIFLOAT8}
    wrong = {
        "value_dtype": (292, "value_dtype: expected 290 like key_dtype, got 292"),
        "key_dtype": (1, r"_dtype: expected 1 like key_dtype, got 290"),
        "key": (rows.view(torch.float8_e4m3fn), "key: expected torch.uint8 .*, got torch.float8"),
        "value": (rows.float(), "value: expected the key's torch.uint8, got torch.float32"),
        "tile_size": (24, "tile_size: expected a divisor of the latent's 32"),
        "attention_mode": (0, "attention_mode: expected 2, got 0"),
        "key_dequant_scale": (torch.ones(2), "key_dequant_scale: expected nothing"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(ContractError, match=message):
            packet(**(given | {name: value}))
    given |= {"key_dtype": 1, "value_dtype": 1}
    with pytest.raises(ContractError, match=r"key_dtype: expected None, 290 .* got 1"):
        packet(**given)
    plain = {n: v for n, v in given.items() if not n.endswith("_dtype")}
    with pytest.raises(ContractError, match=r"key: expected torch\.int8, got torch\.uint8"):
        torch.ops.custom.npu_sparse_flash_attention_antiquant(**plain)
