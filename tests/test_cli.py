"""The command as a person or a script meets it: exit codes, errors, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sfa_onnx import demo
from sfa_onnx.cli import build_parser, main
from tests.attention_cases import make_case
from tests.op_models import op_model

VERBS = {
    "demo",
    "inspect",
    "fuse",
    "unfuse",
    "kv-cache",
    "compare",
    "run",
    "check",
    "atc",
    "doctor",
    "completion",
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A model without any attention: y = x + x."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    node = helper.make_node("Add", ["x", "x"], ["y"], name="twice")
    graph = helper.make_graph([node], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "plain.onnx"
    onnx.save(model, path)
    return path


def test_every_verb_has_json_and_help() -> None:
    actions = next(a for a in build_parser()._actions if a.dest == "verb")
    assert actions.choices is not None
    assert set(actions.choices) == VERBS, (
        "a verb has its part of sfa_onnx/cli/parser.py, its line in VERBS here and in VERBS of"
        " tests/test_all_doors.py, and its row in README.md"
    )
    for parser in actions.choices.values():  # type: ignore[union-attr]
        assert "--json" in parser.format_help()


@pytest.mark.parametrize("verb", ["inspect", "fuse", "unfuse", "run", "check"])
def test_missing_file_is_a_usage_error(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, str(tmp_path / "nowhere.onnx")]) == 2
    error = capsys.readouterr().err
    assert "nowhere.onnx" in error.replace("\n", "")
    assert "Traceback" not in error


def test_garbage_is_one_readable_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\xff\xff not a model")
    assert main(["inspect", str(path)]) in (1, 2)
    error = capsys.readouterr().err
    assert "broken.onnx" in error.replace("\n", "")
    assert "Traceback" not in error


def test_error_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse", str(tmp_path / "nowhere.onnx"), "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "sfa-onnx/error"
    assert "nowhere.onnx" in document["message"]


def test_inspect_counts_without_candidates(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(plain), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "sfa-onnx/inspect"
    assert document["summary"]["nodes"] == 1
    assert document["sites"] == []


def test_expectation_not_met_exits_3_and_writes_nothing(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fuse", str(plain), "--expect-sites", "1"]) == 3
    assert not plain.with_name("plain.sfa.onnx").exists()
    assert "1 were expected" in capsys.readouterr().err.replace("\n", " ")


def test_output_is_not_overwritten_without_force(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = plain.with_name("out.onnx")
    target.write_bytes(b"precious")
    assert main(["fuse", str(plain), "-o", str(target)]) == 2
    assert target.read_bytes() == b"precious"
    assert "--force" in capsys.readouterr().err
    demo_model = demo.materialise(plain.parent / "demo")
    target = demo_model.with_name("out.onnx")
    target.write_bytes(b"precious")
    assert main(["fuse", str(demo_model), "-o", str(target), "--no-verify", "--force"]) == 0
    assert target.read_bytes() != b"precious"


@pytest.mark.kernel
def test_run_writes_outputs(plain: Path, tmp_path: Path) -> None:
    inputs, outputs = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(inputs, x=np.arange(8, dtype=np.float32).reshape(2, 4))
    assert main(["run", str(plain), "--inputs", str(inputs), "-o", str(outputs)]) == 0
    with np.load(outputs) as archive:
        np.testing.assert_array_equal(archive["y"], 2 * np.arange(8).reshape(2, 4))


@pytest.mark.kernel
def test_run_compare_and_unfuse_take_a_rounding(tmp_path: Path) -> None:
    case = make_case(dtype=np.float16, nope=128, rope=8, tile=128)
    path, inputs = tmp_path / "op.onnx", tmp_path / "in.npz"
    onnx.save(op_model(case, symbolic=False), path)
    np.savez(inputs, **{n: a for n, a in case.inputs.items() if n != "value"})
    outputs = {}
    for rounding in ("exact", "npu"):
        target, plain = tmp_path / f"{rounding}.npz", tmp_path / f"{rounding}.onnx"
        chosen = ["--inputs", str(inputs), "--rounding", rounding]
        assert main(["run", str(path), *chosen, "-o", str(target)]) == 0
        with np.load(target) as archive:
            outputs[rounding] = archive["attention_out"]
        assert main(["unfuse", str(path), "-o", str(plain), "--rounding", rounding]) == 0
        assert main(["compare", str(path), str(plain), *chosen]) == 0
    assert (outputs["exact"] != outputs["npu"]).any()


def test_compare_needs_two_models(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(plain)]) == 2
    assert "second model" in capsys.readouterr().err


@pytest.mark.kernel
def test_compare_fails_with_3_when_models_differ(plain: Path) -> None:
    other = onnx.load(plain)
    other.graph.node[0].op_type = "Mul"
    path = plain.with_name("other.onnx")
    onnx.save(other, path)
    assert main(["compare", str(plain), str(plain)]) == 0
    assert main(["compare", str(plain), str(path)]) == 3


def test_bad_dim_binding(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["atc", str(plain), "--soc-version", "Ascend910B2", "-o", str(plain.parent / "x")]
    assert main([*arguments, "--dim", "batch"]) == 2
    assert "NAME=N" in capsys.readouterr().err


def test_doctor_tells_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    probes = {p["name"]: p for p in json.loads(capsys.readouterr().out)["probes"]}
    assert probes["onnxruntime"]["state"] == "ok"
    assert probes["torch_npu"]["state"] in ("ok", "info")
