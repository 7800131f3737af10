"""Indexer and attention of a layer are fused together: what lay between them is gone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx import runtime
from tests.zoo import kin
from tests.zoo.kin import Kin

BETWEEN = {"TopK", "ScatterElements", "GatherElements", "Relu", "Softmax"}


def check_same(kin_: Kin, model: onnx.ModelProto, fused: onnx.ModelProto) -> None:
    """Both give the same logits and caches at two sizes."""
    names = [i.name for i in model.graph.input]
    for batch, past in ((2, 24), (3, 5)):
        if kin_.phase == "prefill" and past != 24:
            continue
        feeds = kin.feeds(kin_, names, batch, past)
        want, got = (runtime.run(m, feeds) for m in (model, fused))
        for name, array in want.items():
            if kin_.padded and kin_.phase == "prefill":
                kept = feeds["attention_mask"].astype(bool)
                array, got[name] = array[kept], got[name][kept]
            np.testing.assert_allclose(got[name], array, rtol=2e-4, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    ("spec", "attentions"),
    [
        (Kin(layers=1, phase="prefill", padded=True, exporter="torch"), 1),
        (Kin(layers=1, exporter="torch"), 1),
        (Kin(model="glm_moe_dsa", layers=2, exporter="torch"), 2),
    ],
    ids=str,
)
def test_a_layer_keeps_nothing_between_selection_and_attention(spec: Kin, attentions: int) -> None:
    model = kin.export(spec)
    report = sfa_onnx.fuse(model, expect_sites=attentions)
    assert [s.reason for s in report.selections] == [""]
    kinds = Counter(n.op_type for n in report.model.graph.node)
    assert kinds["NPUSparseFlashAttention"] == attentions
    assert kinds["NPULightningIndexer"] == 1
    assert not BETWEEN & set(kinds)
    check_same(spec, model, report.model)
    alone = sfa_onnx.fuse(model, indexer=False).model
    assert Counter(n.op_type for n in alone.graph.node)["TopK"] > 0
