"""The certificate tells what changed, and notices when the files say otherwise."""

import json

import onnx
import pytest

import sfa_onnx
from sfa_onnx import fusion_run as run_fuse
from sfa_onnx.errors import UsageError
from sfa_onnx.passes.certificate import check_certificate
from tests.hand_sites import several_sites


@pytest.fixture
def fused(monkeypatch, tmp_path):
    """(folder with before.onnx, after.onnx, proof.json, the report)."""
    model, candidates = several_sites(2)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("l0_p", 1, None))
    monkeypatch.setattr(run_fuse, "find_candidates", lambda index, options: list(candidates))
    onnx.save(model, tmp_path / "before.onnx")
    report = sfa_onnx.fuse(
        tmp_path / "before.onnx", tmp_path / "after.onnx", certificate=tmp_path / "proof.json"
    )
    return tmp_path, report


def _check(folder):
    return check_certificate(folder / "proof.json", folder / "before.onnx", folder / "after.onnx")


def test_it_holds_and_counts(fused):
    folder, report = fused
    result = _check(folder)
    assert result.holds
    assert result.problems == ()
    assert result.difference.untouched_nodes == 2
    assert result.difference.moved_nodes == ()
    assert result.difference.changed_fields == ("opset_import",)
    assert result.difference.removed_values == ("value_info l0_p",)
    proof = json.loads((folder / "proof.json").read_text())
    assert len(proof["untouched_nodes"]) == 2
    assert proof["weights_bytes_read"] == 0
    assert proof["sites"][0]["record"]["probes"]
    assert len(result.difference.removed_nodes) == len(report.sites[0].removed) * 2


def _edit(path, change):
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "a weight pointer",
            lambda m: m.graph.node[-1].metadata_props.add(key="a", value="b"),
            "untouched_nodes",
        ),
        ("an attribute", lambda m: setattr(_op(m).attribute[0], "f", 9.0), "was changed after"),
        ("an output", lambda m: setattr(m.graph.output[0], "doc_string", "x"), "changed_fields"),
        ("order", lambda m: _swap(m), "another order"),
    ],
)
def test_edits_after_fusing_are_noticed(fused, name, change, words):
    folder, _ = fused
    _edit(folder / "after.onnx", change)
    result = _check(folder)
    assert not result.holds
    assert any(words in p for p in result.problems), result.problems


def _op(model):
    return next(n for n in model.graph.node if n.domain == "npu")


def _swap(model):
    """Move the first filler node behind the second."""
    nodes = model.graph.node
    first = next(i for i, n in enumerate(nodes) if n.op_type == "Relu")
    copy = onnx.NodeProto()
    copy.CopyFrom(nodes[first])
    del nodes[first]
    nodes.append(copy)


def test_other_files_are_not_certificates(fused):
    folder, _ = fused
    (folder / "proof.json").write_text("{}")
    with pytest.raises(UsageError, match="not a certificate of version"):
        _check(folder)
    (folder / "proof.json").unlink()
    with pytest.raises(UsageError, match="does not exist"):
        _check(folder)


def test_an_existing_certificate_is_not_overwritten(fused):
    folder, _ = fused
    with pytest.raises(UsageError, match="exists already"):
        sfa_onnx.fuse(folder / "before.onnx", certificate=folder / "proof.json")
