"""Indexer and attention of a layer are fused together: what lay between them is gone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import sfa_onnx
from sfa_onnx import runtime
from tests.indexer_models import K, Spelling, arrays, layer, layer_inputs
from tests.zoo import kin
from tests.zoo.base import export, quiet
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
    ("spec", "selections"),
    [
        (Kin(layers=1, phase="prefill", padded=True, exporter="torch"), 1),
        (Kin("axk2", "torch"), 2),  # this one and the next are walked by test_road, too
        (Kin("glm_moe_dsa", "torch", padded=True), 1),
    ],
    ids=str,
)
def test_a_layer_keeps_nothing_between_selection_and_attention(
    spec: Kin, selections: int, exports: Path
) -> None:
    model = onnx.load_from_string(kin.exported(spec, exports))
    report = sfa_onnx.fuse(model, expect_sites=spec.layers)
    assert [s.reason for s in report.selections] == [""] * selections
    kinds = Counter(n.op_type for n in report.model.graph.node)
    assert kinds["NPUSparseFlashAttention"] == spec.layers
    assert kinds["NPULightningIndexer"] == selections
    assert not BETWEEN & set(kinds)
    names = {n.name for n in report.model.graph.node}
    old = {n.name for n in model.graph.node}
    for site in (*report.sites, *report.selections):
        assert set(site.added) <= names
        assert set(site.removed) <= old
    check_same(spec, model, report.model)
    alone = sfa_onnx.fuse(model, indexer=False).model
    assert Counter(n.op_type for n in alone.graph.node)["TopK"] > 0


CAUSAL = Spelling(mask="causal fill")


@pytest.mark.parametrize(
    ("form", "also"),
    [("mask", "again"), ("gather", ""), ("scores", ""), ("mask", "indices"), ("open", "")],
)
def test_written_by_hand(form: str, also: str) -> None:
    model = layer(CAUSAL, form, also)
    report = sfa_onnx.fuse(model, expect_sites=2 if also == "again" else 1)
    assert [s.reason for s in report.selections] == [""]
    kinds = Counter(n.op_type for n in report.model.graph.node)
    assert kinds["NPULightningIndexer"] == 1
    listed = also == "indices" or form == "open"  # somebody wants the indices as TopK gives them
    assert bool(BETWEEN & set(kinds)) is False
    assert ("Range" in kinds or "Less" in kinds) is listed or not listed
    for keys in (12, 7):
        feeds = arrays(layer_inputs(CAUSAL, 3, keys, seed=keys))
        want, got = (runtime.run(m, feeds) for m in (model, report.model))
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_rows_of_padding_are_hidden_from_selection_and_attention() -> None:
    spelling = Spelling(mask="rows")
    model = layer(spelling, "gather")
    report = sfa_onnx.fuse(model, expect_sites=1)
    assert [s.reason for s in (*report.selections, *report.sites)] == ["", ""]
    left = BETWEEN & {n.op_type for n in report.model.graph.node}
    assert left <= {"Relu"}, "the mask of rows asks for the shape of the scores"
    for keys in (12, 7):
        feeds = arrays(layer_inputs(spelling, 3, keys, seed=keys))
        feeds["kept"] = (np.arange(keys) >= np.array([[0], [keys - 2], [1]])).astype(np.int64)
        want, got = (runtime.run(m, feeds)["out"] for m in (model, report.model))
        empty = np.isnan(want)  # rows that see no key: NaN before, zeros after
        assert 0 < empty.sum() < empty.size
        np.testing.assert_allclose(got[~empty], want[~empty], rtol=1e-4, atol=1e-5)
        assert not got[empty].any()


def test_scores_that_are_returned_hold_a_selection_back() -> None:
    model = layer(CAUSAL, "scores")
    top = next(n for n in model.graph.node if n.op_type == "TopK")
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(top.output[0], onnx.TensorProto.FLOAT, None)
    )
    report = sfa_onnx.fuse(model)
    (site,) = report.selections
    assert site.status == "refused"
    assert "as an output of the graph" in site.reason


class Apart(nn.Module):
    """A layer whose indexer is written out: heads one by one, or a cache and new keys apart."""

    def __init__(self, kind: str, order: str) -> None:
        super().__init__()
        self.kind, self.order = kind, order

    def scores(self, q: Any, past: Any, new: Any, w: Any) -> Any:
        if self.kind == "heads":
            keys, total = torch.cat([past, new], 1).transpose(1, 2), 0
            for i in range(q.shape[2]):
                total = total + torch.relu(q[:, :, i] @ keys) * w[:, :, i, None]
            return total
        parts = (torch.relu(torch.einsum("bshd,btd->bsht", q, k)) for k in (past, new))
        return torch.cat([(x * w.unsqueeze(-1)).sum(2) for x in parts], -1)

    def forward(self, q: Any, past: Any, new: Any, w: Any, query: Any, old: Any, own: Any) -> Any:
        latent = torch.cat([old, own], 1)
        total, rows = latent.shape[1], q.shape[1]
        seen = torch.arange(total)[None, :] <= (torch.arange(rows) + (total - rows))[:, None]
        x = self.scores(q, past, new, w).masked_fill(~seen, -torch.inf)
        turned = -x if self.order == "smallest" else x
        idx = turned.topk(K, -1, largest=self.order == "largest")[1]
        kept = torch.full(x.shape, -torch.inf).scatter(-1, idx, 0.0)
        scores = torch.einsum("bsnc,btc->bsnt", query, latent) * 0.3 + kept.unsqueeze(2)
        scores = scores.masked_fill(~seen[None, :, None], -torch.inf)
        return torch.einsum("bsnt,btc->bsnc", torch.softmax(scores, -1), latent)


@pytest.mark.parametrize(("kind", "order"), [("heads", "largest"), ("blocks", "smallest")])
def test_attention_takes_rows_of_an_indexer_that_is_written_out(kind: str, order: str) -> None:
    def given(batch: int, rows: int, past: int) -> dict[str, Any]:
        make = torch.Generator().manual_seed(past)
        shapes = {"q": (rows, 3, 8), "past": (past, 8), "new": (rows, 8), "w": (rows, 3)}
        shapes |= {"query": (rows, 2, 16), "old": (past, 16), "own": (rows, 16)}
        return {n: torch.randn(batch, *s, generator=make) for n, s in shapes.items()}

    first = given(2, 5, 7)
    axes = {n: {0: "b", 1: "p" if n in ("past", "old") else "s"} for n in first}
    with quiet():
        model = export(
            Apart(kind, order).eval(), first, ("out",), exporter="ts", opset=17, dynamic=axes
        )
    report = sfa_onnx.fuse(model, expect_sites=1)
    assert [s.reason for s in (*report.selections, *report.sites)] == ["", ""]
    kinds = {n.op_type for n in report.model.graph.node}
    assert not {"TopK", "ScatterElements", "Relu", "Softmax"} & kinds
    for batch, rows, past in ((2, 5, 7), (3, 1, 12), (1, 2, 4)):
        feeds = {n: t.numpy() for n, t in given(batch, rows, past).items()}
        want, got = (runtime.run(m, feeds)["out"] for m in (model, report.model))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
