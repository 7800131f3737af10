"""Every public door and every verb, with every class of broken model and every unfit output."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.ascend import checks
from sfa_onnx.cli import build_parser, main
from sfa_onnx.errors import FaultError, ModelError, SfaError
from sfa_onnx.guard.text import printable
from sfa_onnx.runtime.portable.model import OPS
from tests.broken_models import BROKEN, doubling, sound
from tests.fuzz.corpus import gathered
from tests.test_doors import DOORS, IN_MEMORY

# Doors that say what is wrong by a report, not by an error.
_REPORTS = {"check", "doctor", "fix", "plan", "certificate"}
_SOC = ["--soc-version", "Ascend910B2", "--no-run"]
VERBS: dict[str, list[str]] = {
    "inspect": ["inspect", "m.onnx", "--explain"],
    "fuse": ["fuse", "m.onnx", "-o", "out.onnx"],
    "unfuse": ["unfuse", "m.onnx", "-o", "out.onnx"],
    "kv-cache": ["kv-cache", "m.onnx", "-o", "out.onnx", "--to", "int8"],
    "compare": ["compare", "m.onnx", "m.onnx"],
    "run": ["run", "m.onnx", "-o", "out.npz"],
    "check": ["check", "m.onnx"],
    "atc": ["atc", "m.onnx", "-o", "folder", *_SOC],
    "doctor": ["doctor", "m.onnx"],
}
_NO_MODEL = {"demo", "completion"}  # verbs that take none
_MODEL_DOORS = [name for name in IN_MEMORY if name not in _REPORTS]


def broken(name: str) -> onnx.ModelProto:
    model = sound()
    BROKEN[name][0](model)
    return model


def refused(call: Callable[[], Any], what: str) -> str:
    """The text of the refusal, which is one of ours, says something and steers no terminal."""
    with pytest.raises(SfaError) as caught:
        call()
    assert not isinstance(caught.value, FaultError), f"{what}: unforeseen: {caught.value}"
    text = str(caught.value)
    assert text == printable(text), what
    assert len(text) > 40, f"{what}: {text!r}"
    return text


def test_every_public_function_and_every_verb_is_walked():
    functions = {n for n in sfa_onnx.__all__ if inspect.isfunction(getattr(sfa_onnx, n))}
    lost = functions - {"to_json"} - {*DOORS, *IN_MEMORY}
    assert not lost, f"say in DOORS or IN_MEMORY how {lost} are called with a model"
    assert {"run", "session"} <= {*DOORS, *IN_MEMORY}
    parser = build_parser()
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert set(verbs.choices) - _NO_MODEL == set(VERBS), (
        "say in VERBS how the verb is called with a model, or enter it in _NO_MODEL"
    )


@pytest.mark.parametrize("name", BROKEN)
def test_each_class_by_each_door_in_memory(name):
    for door in _MODEL_DOORS:
        text = refused(lambda door=door: IN_MEMORY[door](broken(name)), f"{door} of {name}")
        assert "not a sound ONNX model" in text, f"{door} of {name}: {text}"
        assert BROKEN[name][1] in text, f"{door} of {name}: {text}"
        assert "Export it again" in text
    report = checks.check(broken(name))
    assert not report.passed
    assert any(f.rule == "not-sound" for f in report.findings)


@pytest.mark.parametrize("name", BROKEN)
def test_each_class_as_a_file_and_as_bytes(name, tmp_path):
    path = tmp_path / "m.onnx"
    data = broken(name).SerializeToString()
    path.write_bytes(data)
    for door in DOORS:
        if door not in _REPORTS:
            text = refused(lambda door=door: DOORS[door](path), f"{door} of {name}")
            assert "not a sound ONNX model" in text, f"{door} of {name}: {text}"
    for call in (lambda: runtime.session(data), lambda: runtime.run(data, {})):
        assert BROKEN[name][1] in refused(call, f"the bytes of {name}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"], "nothing is left behind"


@pytest.mark.parametrize("verb", VERBS)
def test_each_class_by_each_verb(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in BROKEN:
        Path("m.onnx").write_bytes(broken(name).SerializeToString())
        code = main(VERBS[verb])
        told = capsys.readouterr()
        assert code in ((0, 3) if verb == "doctor" else (1, 3)), f"{verb} of {name}"
        assert "Traceback" not in told.err + told.out
        assert "please report it" not in told.err + told.out, f"{verb} of {name}: {told.err}"
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"], f"{verb} of {name}"


def test_bytes_that_are_no_model():
    for data in (b"", b"\xff" * 40, b"version https://git-lfs.github.com/spec/v1\noid sha256:0"):
        with pytest.raises(ModelError):
            runtime.session(data)


def test_functions_that_double_by_every_door():
    for door in _MODEL_DOORS:
        text = refused(lambda door=door: IN_MEMORY[door](doubling(21)), door)
        assert "SFA_ONNX_MAX_NODES" in text, door


def _unfit(folder: Path) -> dict[str, Path]:
    """Places that nothing is written to."""
    (folder / "a-folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    return {
        "a pipe": folder / "pipe",
        "a device": Path("/dev/full"),
        "a circle of links": folder / "loop",
        "a name too long": folder / ("x" * 300),
        "under a file": folder / "m.onnx" / "out",
        "nowhere": folder / "no" / "such" / "out",
        "a folder": folder / "a-folder",
    }


@pytest.mark.parametrize("verb", [v for v in VERBS if "-o" in VERBS[v] and v != "atc"])
def test_outputs_that_cannot_be_written(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("m.onnx").write_bytes(sound().SerializeToString())
    before = Path("m.onnx").read_bytes()
    for name, place in _unfit(tmp_path).items():
        words = [w if not w.startswith("out.") else str(place) for w in VERBS[verb]]
        code = main([*words, "--force"])
        told = capsys.readouterr().err
        assert code in (1, 2), f"{verb} to {name}: {code}"
        assert "error: " in told, f"{verb} to {name}"
        assert "please report it" not in told, f"{verb} to {name}: {told}"
    assert Path("m.onnx").read_bytes() == before
    kept = {"a-folder", "loop", "m.onnx", "pipe"}
    assert {p.name for p in tmp_path.iterdir()} == kept


def test_sizes_beyond_64_bits_are_refused_without_a_traceback(tmp_path, capfd):
    model = gathered()
    for axis, size in enumerate(((1 << 63) - 1, 1 << 62)):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    onnx.save(model, tmp_path / "m.onnx")
    assert main(["fuse", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "out.onnx")]) == 0
    said = capfd.readouterr()
    assert "0/1 sites fused" in said.out
    assert "refused" in said.out
    assert "Traceback" not in said.out + said.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check", "m.onnx", "--dim", "B=" + "9" * 20], "no tensor is so large"),
        (["run", "m.onnx", "--seed", "-1"], "expected a number from 0 on"),
        (["compare", "m.onnx", "m.onnx", "--seed", "-5"], "expected a number from 0 on"),
        (["fuse", "m.onnx", "-o", "a\0b"], "no file has such a name"),
    ],
)
def test_numbers_and_names_that_nothing_has(tmp_path, monkeypatch, capfd, arguments, text):
    monkeypatch.chdir(tmp_path)
    onnx.save(gathered(), "m.onnx")
    assert main(arguments) == 2
    assert text in " ".join(capfd.readouterr().err.split())


def test_a_budget_that_is_no_number_is_the_callers_mistake(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFA_ONNX_MAX_VERIFY_BYTES", "0")
    onnx.save(gathered(), "m.onnx")
    assert main(["fuse", "m.onnx", "-o", "out.onnx"]) == 2
    assert "SFA_ONNX_MAX_VERIFY_BYTES='0'" in capfd.readouterr().err
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_operators_of_ours_without_their_inputs(op, count):
    node = onnx.helper.make_node(op.name, ["x"] * count, ["y"], domain=op.domain)
    values = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(op.domain, 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    faults = []
    for door, call in IN_MEMORY.items():
        try:
            call(model)
        except FaultError as error:
            faults.append(f"{door}: {error}")
        except SfaError:
            continue
    assert not faults
