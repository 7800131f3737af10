"""`sfa_onnx.fuse` and `unfuse` on real exports' sites: options, reports, what stays untouched."""

import json

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx import fusion_run as run_fuse
from sfa_onnx.errors import UsageError, VerificationError
from sfa_onnx.files.model import hash_tensors_and_nodes
from sfa_onnx.passes.candidate import Refusal, RefusedSite
from sfa_onnx.passes.plan import read_plan, write_plan
from tests.graphs import dense, gathered
from tests.hand_sites import gather_site, several_sites


@pytest.fixture
def sites(monkeypatch):
    """Three sites; the middle one has a sink of logit -100 and must be refused."""
    model, candidates = several_sites(3, {1: {"float ninf = {-inf}": "float ninf = {-100.0}"}})
    monkeypatch.setattr(
        run_fuse, "find_candidates", lambda index, options: _moved(index, candidates)
    )
    return model


def _moved(index, candidates):
    for candidate in candidates:
        candidate.graph = index.graph
    return list(candidates)


def test_report_lists_every_candidate(sites):
    before = hash_tensors_and_nodes(sites.graph)
    report = sfa_onnx.fuse(sites)
    assert [s.status for s in report.sites] == ["fused", "refused", "fused"]
    assert "a sink" in report.sites[1].reason
    assert report.sites[0].op_type == "NPUSparseFlashAttention"
    assert report.sites[0].record.probes
    assert report.sites[2].record.shared_with == report.sites[0].anchor
    assert report.sites[0].removed
    assert report.nodes_after < report.nodes_before
    assert hash_tensors_and_nodes(sites.graph) == before, "the caller's model was changed"
    onnx.checker.check_model(report.model)
    json.dumps(sfa_onnx.to_json(report))


@pytest.mark.parametrize("model", [dense(), dense(types="float16"), gathered()])
def test_every_fused_site_says_what_it_costs(model):
    """Its replacement is counted node by node: masks and rows in any type."""
    (site,) = sfa_onnx.fuse(model, verify=False).fused
    assert site.cost["flops_before"] >= site.cost["flops_after"] > 0
    assert min(site.cost["bytes_after"], site.cost["time_ratio"]) > 0


def test_untouched_parts_keep_their_bytes(sites):
    report = sfa_onnx.fuse(sites)
    before, after = (hash_tensors_and_nodes(m.graph) for m in (sites, report.model))
    kept = [h for h in before[1] if h in set(after[1])]
    assert kept == [h for h in after[1] if h in set(before[1])]
    assert len(kept) == len(sites.graph.node) // 3 + 2  # the refused site and two fillers
    assert after[0].items() <= before[0].items()
    assert f"untouched: {len(kept)} nodes and {len(after[0])} initializers" in report.notes[-1]


def test_expectation_is_checked_before_anything_is_written(sites, tmp_path):
    with pytest.raises(VerificationError, match=r"2 sites were fused, 3 were expected.*a sink"):
        sfa_onnx.fuse(sites, tmp_path / "o.onnx", expect_sites=3)
    assert list(tmp_path.iterdir()) == []
    assert len(sfa_onnx.fuse(sites, tmp_path / "o.onnx", expect_sites=2).fused) == 2
    with pytest.raises(UsageError, match="exists already"):
        sfa_onnx.fuse(sites, tmp_path / "o.onnx")


@pytest.mark.parametrize(
    "wrong", [{"target": "gpu"}, {"cost": "low"}, {"kv_cache": "int4"}, {"plan": "none.yaml"}]
)
def test_bad_options_are_named(sites, wrong):
    with pytest.raises(UsageError, match=next(iter(wrong.values())).split(".")[0]):
        sfa_onnx.fuse(sites, **wrong)


def test_target_ascend_turns_limits_into_refusals(sites):
    report = sfa_onnx.fuse(sites)
    assert any(
        "query is float; the NPU takes float16" in text for text in report.sites[0].npu_limits
    )
    strict = sfa_onnx.fuse(sites, target="ascend")
    assert strict.fused == []
    assert "the NPU kernel rejects this site" in strict.sites[0].reason


def test_without_verification_the_record_says_so(sites):
    report = sfa_onnx.fuse(sites, verify=False)
    assert len(report.fused) == 3
    assert "not verified" in report.sites[0].record.assumptions[0]
    assert report.sites[0].record.probes == ()


def test_refused_anchors_are_reported_with_how_far_binding_got(monkeypatch):
    model, candidate = gather_site()
    refused = RefusedSite(
        candidate.anchor, "layers.0", Refusal("two values", "v", "use one"), ("scores",), "x"
    )
    monkeypatch.setattr(run_fuse, "find_candidates", lambda index, options: [refused])
    (site,) = sfa_onnx.fuse(model).sites
    assert (site.reason, site.stopped_at, site.hint) == ("two values", "v", "use one")
    assert (site.layer, site.bound) == ("layers.0", ("scores",))


def test_a_fault_of_the_verifier_refuses_one_site_only(sites, monkeypatch):
    from sfa_onnx.passes.verify import Verifier

    real = Verifier.verify

    def broken(self, candidate):
        if candidate.outputs == ("l0_y",):
            raise KeyError("boom")
        return real(self, candidate)

    monkeypatch.setattr(Verifier, "verify", broken)
    report = sfa_onnx.fuse(sites)
    assert "verification itself failed (KeyError: 'boom')" in report.sites[0].reason
    assert report.sites[2].status == "fused"


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_plan_round_trip(sites, tmp_path, suffix):
    path = write_plan(sfa_onnx.fuse(sites), tmp_path / f"plan{suffix}")
    ids = read_plan(path).chosen
    assert len(ids) == 2
    text = path.read_text()
    if suffix == ".yaml":
        assert "# refused" in text
        path.write_text(text.replace("fuse: true", "fuse: false", 1))
    else:
        path.write_text(text.replace('"fuse": true', '"fuse": false', 1))
    report = sfa_onnx.fuse(sites, plan=path)
    assert [s.site_id for s in report.fused] == [ids[1]]
    assert report.sites[0].reason == "left out by the plan"
    with pytest.raises(UsageError, match="exists already"):
        write_plan(report, path)


def test_plan_with_a_site_that_does_not_fuse_fails(sites, tmp_path):
    report = sfa_onnx.fuse(sites)
    path = tmp_path / "plan.yaml"
    path.write_text(f'version: 1\nsites:\n  - id: "{report.sites[1].site_id}"\n')
    with pytest.raises(VerificationError, match="1 sites of the plan do not fuse"):
        sfa_onnx.fuse(sites, plan=path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 2\nsites: []\n", "plan version 2"),
        ("version: 1\nsites:\n  - id: no such site\n", "not candidates of this model"),
        ("hello\n", "line 1: expected 'key: value'"),
        ('version: 1\nsites:\n  - id: "open\n', "line 3: bad quoting"),
        ("version: 1\nsites:\n  - fuse: true\n", "a site needs an id"),
    ],
)
def test_bad_plans_are_explained(sites, tmp_path, text, words):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        sfa_onnx.fuse(sites, plan=path)


def test_unfuse_gives_back_a_standard_model(sites):
    import onnxruntime as ort

    fused = sfa_onnx.fuse(sites).model
    report = sfa_onnx.unfuse(fused)
    assert [s.status for s in report.sites] == ["unfused"] * 2
    assert {o.domain for o in report.model.opset_import} == {""}
    rng = np.random.default_rng(0)
    sizes = {"B": 2, "S1": 2, "S2": 9, "K": 5}
    feeds = {}
    for value in sites.graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value or sizes[d.dim_param] for d in kind.shape.dim]
        if value.name.endswith("idx"):
            feeds[value.name] = np.tile(np.arange(5), (*shape[:-1], 1)).astype(np.int64)
        elif value.name.endswith("len"):
            feeds[value.name] = np.array([9, 7], np.int32)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
    run = [
        ort.InferenceSession(m.SerializeToString()).run(None, feeds) for m in (sites, report.model)
    ]
    for want, got in zip(*run, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_unfuse_without_operators_is_a_usage_error(sites):
    with pytest.raises(UsageError, match="nothing to unfuse"):
        sfa_onnx.unfuse(sites)
