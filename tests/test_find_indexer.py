"""Lightning indexers are found however they are spelt, and give what the original gave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.cli import main
from sfa_onnx.passes.plan import write_plan
from tests.indexer_models import K, Spelling, arrays, inputs, spelt

BASE = Spelling()
SPELLINGS = {
    "plain": BASE,
    "einsum": replace(BASE, product="einsum", weigh="einsum", scale="scores"),
    "sums": replace(BASE, product="sum", weigh="mul", scale="relu"),
    "parts": replace(BASE, product="parts", weigh="mean", scale="relu", mask="both"),
    "parts causal": replace(BASE, product="parts", mask="causal add"),
    "rows": replace(BASE, mask="rows"),
    "rows by keys": replace(BASE, mask="rows by keys"),
    "clamp": replace(BASE, relu="clamp", scale="weights", top="unsorted"),
    "max": replace(BASE, relu="max", scale="query", top="all"),
    "where": replace(BASE, relu="where", mask="causal add"),
    "lowest": replace(BASE, mask="causal add", low=float(np.finfo(np.float32).min)),
    "fill": replace(BASE, mask="causal fill", weigh="einsum"),
    "fill low": replace(BASE, mask="causal fill", low=-1e9),
    "chosen": replace(BASE, mask="causal where", product="einsum"),
    "tril": replace(BASE, mask="tril"),
    "triu": replace(BASE, mask="triu"),
    "assigned": replace(BASE, mask="assigned"),
    "padding": replace(BASE, mask="padding"),
    "padding first": replace(BASE, mask="padding first"),
    "padding last": replace(BASE, mask="padding last"),
    "both": replace(BASE, mask="both", low=-1e30),
    "lengths": replace(BASE, mask="lengths", rows=1),
    "positions": replace(BASE, mask="positions"),
    "half": replace(BASE, mask="both", dtype=torch.float16),
    "start": replace(BASE, mask="start"),
    "decode": replace(BASE, rows=1),
    "norms": replace(BASE, scale="norms", relu="not below", mask="both"),
    "int8 keys": replace(BASE, scale="keys", mask="causal fill"),
    "int8 keys inside": replace(BASE, scale="keys inside", product="einsum", weigh="einsum"),
    "int8 keys stored": replace(BASE, scale="stored", mask="both", weigh="mul"),
}


def nodes(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == kind]


def same_choice(model: onnx.ModelProto, fused: onnx.ModelProto, s: Spelling) -> None:
    """Both select the same keys at several sizes, in the same order."""
    for batch, rows, keys in ((2, s.rows, 12), (3, 1 if s.rows == 1 else 2, K), (1, s.rows, 4)):
        if keys < K and (s.exporter == "ts" or s.top == "all"):
            continue
        feeds = arrays(inputs(s, batch, rows, keys, seed=keys))
        want, got = (runtime.run(m, feeds)["indices"] for m in (model, fused))
        assert want.shape == got.shape
        assert want.dtype == got.dtype
        if s.top == "unsorted":
            want, got = np.sort(want, -1), np.sort(got, -1)
        np.testing.assert_array_equal(want, got)


@pytest.mark.parametrize("name", SPELLINGS)
def test_an_indexer_is_found_in_every_spelling(name: str) -> None:
    model = spelt(SPELLINGS[name])
    report = sfa_onnx.fuse(model)
    assert [s.reason for s in report.selections] == [""]
    assert len(nodes(report.model, "NPULightningIndexer")) == 1
    assert not nodes(report.model, "TopK")
    same_choice(model, report.model, SPELLINGS[name])


WRONG = {
    "none": "no activation",
    "sigmoid": "Sigmoid stands where a relu is expected",
    "gelu": "stands where a relu is expected",
    "silu": "Sigmoid stands where a relu is expected",
    "leaky": "LeakyRelu stands where a relu is expected",
    "softmax": "Softmax stands where a relu is expected",
    "square": "no lightning indexer",
    "floor": "a floor other than 0",
    "outside": "the relu is outside the sum over heads",
    "negative": "not positive",
    "key weights": "depends on the key, and scale may be negative",
    "signed scale": "depends on the key",
    "signed divisor": "depends on the key, and k may be negative",
    "per head": "every head selects keys of its own",
    "pooled": "keys are pooled by ReduceMean",
    "routing": "by another selection (group routing",
    "top-p": "the scores of the selected keys",
}


def test_scales_that_are_given_are_assumed_not_to_be_negative() -> None:
    (site,) = sfa_onnx.fuse(spelt(replace(BASE, scale="stored"))).selections
    assert site.record is not None
    told = [a for a in site.record.assumptions if "negative" in a]
    assert [a.split(": ")[:2] for a in told] == [["by_key", "scales of keys are not negative"]]
    (site,) = sfa_onnx.fuse(spelt(replace(BASE, scale="keys"))).selections
    assert site.record is not None
    assert not [a for a in site.record.assumptions if "negative" in a]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_near_miss_is_refused_by_name(wrong: str) -> None:
    base = replace(BASE, scale="stored") if wrong == "signed scale" else BASE
    model = spelt(replace(base, wrong=wrong), fixed=wrong in ("pooled", "routing"))
    report = sfa_onnx.fuse(model)
    assert all(site.status == "refused" for site in report.selections)
    assert any(WRONG[wrong] in site.reason for site in report.selections), report.selections
    assert report.model == model


@pytest.mark.parametrize(
    ("mask", "reason"), [("window", "sliding window"), ("handed in", "handed in")]
)
def test_a_mask_the_indexer_does_not_know_is_refused_by_name(mask: str, reason: str) -> None:
    (site,) = sfa_onnx.fuse(spelt(replace(BASE, mask=mask))).selections
    assert site.status == "refused"
    assert reason in site.reason, site.reason


def test_selections_are_left_alone_where_that_is_asked_for() -> None:
    model = spelt(BASE)
    report = sfa_onnx.fuse(model, indexer=False)
    assert report.selections == []
    assert report.model == model


def test_a_cheaper_selection_passes_where_cost_must_not_grow() -> None:
    report = sfa_onnx.fuse(spelt(replace(BASE, mask="both")), cost="not-worse")
    (site,) = report.selections
    assert site.status == "fused"
    assert 0 < site.cost["time_ratio"] <= 1


def test_a_plan_lists_selections_and_chooses_them(tmp_path: Path) -> None:
    model = spelt(BASE)
    report = sfa_onnx.fuse(model)
    path = write_plan(report, tmp_path / "plan.yaml")
    assert report.selections[0].site_id in path.read_text()
    assert report.sites == []
    again = sfa_onnx.fuse(model, plan=path)
    assert len(again.indexers) == 1
    path.write_text(path.read_text().replace("fuse: true", "fuse: false"))
    left = sfa_onnx.fuse(model, plan=path)
    assert [s.reason for s in left.selections] == ["left out by the plan"]


def test_the_margin_behind_the_last_key_is_told_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(spelt(BASE), tmp_path / "m.onnx")
    files = ["-o", tmp_path / "f.onnx", "--report", tmp_path / "r.md"]
    files += ["--certificate", tmp_path / "proof.json"]
    assert main(list(map(str, ["fuse", tmp_path / "m.onnx", *files, "-v"]))) == 0
    (site,) = json.loads((tmp_path / "proof.json").read_text())["sites"]
    told = f"{site['record']['margin']:.1e}"
    assert f"| {told} |" in (tmp_path / "r.md").read_text()
    said = " ".join(capsys.readouterr().out.split())
    assert f"at least {told} of the largest score behind the last key taken" in said
    assert f"least margin {told} behind the last key taken, of the largest score" in said


def test_the_npu_takes_no_padding() -> None:
    (site,) = sfa_onnx.fuse(spelt(replace(BASE, mask="padding")), target="ascend").selections
    assert site.status == "refused"
    assert "the NPU has no such mask" in site.reason


def test_a_mask_that_the_file_holds_as_a_table_is_read() -> None:
    model = spelt(replace(BASE, mask="table"), fixed=True)
    report = sfa_onnx.fuse(model)
    assert [s.reason for s in report.selections] == [""]
    (node,) = nodes(report.model, "NPULightningIndexer")
    assert next(a.i for a in node.attribute if a.name == "sparse_mode") == 3
    feeds = arrays(inputs(BASE))
    want, got = (runtime.run(m, feeds)["indices"] for m in (model, report.model))
    np.testing.assert_array_equal(want, got)
