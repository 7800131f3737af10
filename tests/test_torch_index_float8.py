"""The quantised indexer over 8-bit floats: as Ascend 950's kernel has it, for every layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx.errors import ContractError  # noqa: E402
from sfa_onnx.operator.op import QUANT_LIGHTNING_INDEXER  # noqa: E402
from sfa_onnx.operator.sequences import Sequences  # noqa: E402
from sfa_onnx.torch.float8 import HIFLOAT8, float8_table  # noqa: E402
from sfa_onnx.torch.tensors import as_torch  # noqa: E402
from tests.attention_cases import LAYOUTS  # noqa: E402
from tests.indexer_cases import indexer_call  # noqa: E402

pytestmark = pytest.mark.torch
WIDE = (torch.bfloat16, torch.float32, torch.float32)
HALF = (torch.float16,) * 3
FACTORS = ("weights", "query_dequant_scale", "key_dequant_scale")


@pytest.fixture(scope="module", autouse=True)
def enabled():
    yield sfa_torch.enable_ascend_names()
    sfa_torch.enable_ascend_names()


def select(**given):
    return torch.ops.npu.npu_quant_lightning_indexer(**given)


def float8_call(layouts, hifloat8, types, mode=3):
    """A call whose bytes are small whole numbers, so that sums are equal in every order."""
    inputs, attributes = indexer_call(
        QUANT_LIGHTNING_INDEXER, layouts, np.int8, whole=True, sparse_mode=mode, sparse_count=24
    )
    table = float8_table(hifloat8)
    whole = torch.tensor([int((table == n).nonzero()[0]) for n in range(-7, 8)], dtype=torch.uint8)
    given = {n: as_torch(a) for n, a in inputs.items()} | attributes
    generator = torch.Generator().manual_seed(7)
    for name in ("query", "key"):
        shape = given[name].shape
        data = whole[torch.randint(len(whole), shape, generator=generator)]
        data = data.index_select(-3, torch.arange(shape[-3]) // 3 * 3)  # three keys alike
        given[name] = data if hifloat8 else data.view(torch.float8_e4m3fn)
    for name, kind in zip(FACTORS, types, strict=True):
        exponents = torch.randint(-4, 1, given[name].shape, generator=generator)
        given[name] = (2.0**exponents).to(kind)
    # So little apart that bfloat16 makes ties of some.
    steps = torch.randint(4, given["key"].shape[:-1], generator=generator)
    given["key_dequant_scale"] = (1 + steps / 512).to(types[2])
    given["weights"][..., 0] *= -1
    return given | ({"query_dtype": HIFLOAT8, "key_dtype": HIFLOAT8} if hifloat8 else {})


def formula(given, hifloat8, rounded):
    """Row by row in float64."""
    table = float8_table(hifloat8).double()
    query, key = (table[given[n].view(torch.uint8).long()].numpy() for n in ("query", "key"))
    weights, scale_q, scale_k = (given[n].double().numpy() for n in FACTORS)
    lengths = (
        None if given.get(n) is None else given[n].numpy()
        for n in ("actual_seq_lengths_query", "actual_seq_lengths_key", "block_table")
    )  # fmt: skip
    layouts = given["layout_query"], given["layout_key"]
    seqs = Sequences.of(query, key, *layouts, given["sparse_mode"], *lengths, "key")
    count, heads = given["sparse_count"], query.shape[-2:]
    out = np.full((len(seqs.batch), count), -1, np.int32)
    flat = query.reshape(-1, *heads), (weights * scale_q).reshape(-1, heads[0])
    for row in np.flatnonzero(seqs.threshold):
        at = seqs.addresses(int(seqs.batch[row]), np.arange(seqs.threshold[row]))
        keys = key.reshape(-1, heads[1])[at]
        scores = flat[1][row] @ np.maximum(flat[0][row] @ keys.T, 0) * scale_k.reshape(-1)[at]
        if rounded:
            scores = torch.from_numpy(scores).to(torch.bfloat16).double().numpy()
        best = np.argsort(-scores, kind="stable")[:count]
        out[row, : len(best)] = best
    return torch.from_numpy(out.reshape(*query.shape[:-2], 1, count))


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize(
    ("hifloat8", "types"), [(True, WIDE), (False, WIDE), (False, HALF)], ids=["hi", "wide", "half"]
)
def test_as_the_formula(layouts, hifloat8, types):
    differ = 0
    for mode, rounding in itertools.product((0, 3), ("exact", "npu")):
        sfa_torch.enable_ascend_names(rounding=rounding)
        given = float8_call(layouts, hifloat8, types, mode)
        got = select(**given)
        assert torch.equal(got, formula(given, hifloat8, rounding == "npu"))
        differ += int(not torch.equal(got, formula(given, hifloat8, rounding != "npu")))
        meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        traced = select(**meta)
        assert (traced.shape, traced.dtype) == (got.shape, got.dtype)
    assert differ, "the rounding of scores shows nowhere"


def test_what_does_not_go_together_is_refused():
    sfa_torch.enable_ascend_names()
    layouts = ("BSND", "PA_BSND")
    hi, wide, half = (
        float8_call(layouts, h, t) for h, t in ((True, WIDE), (False, WIDE), (False, HALF))
    )
    for given, name, value, message in (
        (hi, "key_dtype", None, r"key_dtype: expected 290 \(hifloat8\) like the other, got None"),
        (hi, "query_dtype", None, r"query_dtype: expected 290 .*, got None"),
        (hi, "query_dtype", 292, r"query_dtype: expected 290 .*, got 292"),
        (hi, "key", wide["key"], "key: expected torch.uint8 .*, got torch.float8_e4m3fn"),
        (hi, "weights", half["weights"], "weights: expected torch.bfloat16, got torch.float16"),
        (wide, "query", hi["query"], "query: expected torch.float8_e4m3fn .*, got torch.ui"),
        (wide, "key_dequant_scale", half["key_dequant_scale"],
         r"key_dequant_scale: expected torch.float32 \(weights bfloat16\), got torch.float16"),
        (half, "query_dequant_scale", wide["query_dequant_scale"],
         "query_dequant_scale: expected torch.float16 .*, got torch.float32"),
        (half, "weights", half["weights"][..., :1].contiguous(), "weights: expected shape .*, got"),
        (half, "query_quant_mode", 1, "query_quant_mode: expected 0, got 1"),
        (half, "block_table", half["block_table"].long(), "block_table: expected torch.int32"),
        (half, "block_table", None, "block_table: expected shape .*, got nothing"),
    ):  # fmt: skip
        with pytest.raises(ContractError, match=message):
            select(**(given | {name: value}))
    lacking = {n: v for n, v in half.items() if n not in ("pre_tokens", "next_tokens")}
    with pytest.raises(ContractError, match=r"query: expected int8, got torch\.float8_e4m3fn"):
        torch.ops.custom.npu_lightning_indexer_quant(**lacking)
