"""Operators that plan an indexer's work on the NPU, and the indexers that take their result."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx.errors import ContractError  # noqa: E402
from sfa_onnx.operator.op import QUANT_LIGHTNING_INDEXER  # noqa: E402
from sfa_onnx.torch.schedules import schedules  # noqa: E402
from sfa_onnx.torch.tensors import as_torch  # noqa: E402
from tests.indexer_cases import indexer_call  # noqa: E402

pytestmark = pytest.mark.torch
INDEXERS = {
    "custom::npu_quant_lightning_indexer_metadata": "npu_quant_lightning_indexer",
    "_C_ascend::npu_vllm_quant_lightning_indexer_metadata": "npu_vllm_quant_lightning_indexer",
}


@pytest.fixture(scope="module", autouse=True)
def enabled():
    return sfa_torch.enable_ascend_names()


def packets(schedule):
    space = getattr(torch.ops, schedule.namespace)
    return getattr(space, schedule.name), getattr(space, INDEXERS[schedule.qualified])


@pytest.mark.parametrize("schedule", schedules(), ids=lambda s: s.qualified)
def test_a_planned_call_is_the_call(schedule):
    plan, indexer = packets(schedule)
    inputs, attributes = indexer_call(QUANT_LIGHTNING_INDEXER, ("BSND", "PA_BSND"), np.int8)
    given = {n: as_torch(a) for n, a in inputs.items()} | attributes
    want = torch.ops.npu.npu_quant_lightning_indexer(**given)
    lengths = {n: given[n] for n in ("actual_seq_lengths_query", "actual_seq_lengths_key")}

    def call():
        metadata = plan(3, 1, 16, 0, 0, batch_size=3, **lengths)
        return indexer(**given, metadata=metadata)

    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        indices, values = run()
        assert torch.equal(indices, want)
        assert (values.shape, values.dtype) == ((0,), torch.float32)
    assert plan(3, 1, 16, 0, 0).shape == (1024,)
    assert plan(3, 1, 16, 0, 0, **{n: t.to("meta") for n, t in lengths.items()}).is_meta
    for word, value, message in (
        ("cmp_ratio", 4, "cmp_ratio: expected 1, got 4"),
        ("return_value", True, "return_value: expected False, got True"),
    ):
        with pytest.raises(ContractError, match=message):
            indexer(**given, **{word: value})


def test_schedules_are_told_apart_from_what_others_defined():
    found = sfa_torch.owners()
    assert {s.qualified for s in schedules()} == set(INDEXERS)
    assert all(found[name] == "sfa_onnx" for name in INDEXERS)
    assert all(s.source for s in schedules())
