"""Every door, every class of bad input: only errors of ours leave, and they say something."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.ascend import checks
from sfa_onnx.ascend.estimate import estimate
from sfa_onnx.ascend.flavour import from_atc, to_atc
from sfa_onnx.ascend.handover import folder as handover
from sfa_onnx.cli import main
from sfa_onnx.doctor import examine
from sfa_onnx.errors import BudgetError, FaultError, SfaError, UsageError
from sfa_onnx.guard.doors import as_ours, door
from sfa_onnx.guard.text import printable
from sfa_onnx.kv_convert import convert
from sfa_onnx.passes.certificate import check_certificate
from sfa_onnx.passes.plan import read_plan
from sfa_onnx.runtime.compare.run import compare
from sfa_onnx.runtime.feeds import random_feeds
from sfa_onnx.runtime.portable import make_portable
from sfa_onnx.runtime.portable.model import unfuse as standard_nodes
from sfa_onnx.summary import summarise
from sfa_onnx.unfusion import unfuse
from tests.broken_models import sound
from tests.fuzz.corpus import gathered

ROOT = Path(sfa_onnx.__file__).parents[1]

DOORS: dict[str, Callable[[Path], Any]] = {
    "fuse": lambda p: sfa_onnx.fuse(p),
    "unfuse": lambda p: unfuse(p),
    "kv-cache": lambda p: convert(p, to="int8"),
    "compare": lambda p: compare(p, p),
    "run": lambda p: runtime.run(p, {}),
    "session": lambda p: runtime.session(p),
    "feeds": lambda p: random_feeds(p),
    "check": lambda p: checks.check(p),
    "fix": lambda p: checks.fix_file(p, checks.check(gathered()), p.with_name("fixed.onnx")),
    "hand over": lambda p: handover.write(
        p, p.with_name("atc"), soc_version="Ascend910B2", execute=False
    ),
    "inspect": lambda p: summarise(p),
    "doctor": lambda p: examine(p),
    "certificate": lambda p: check_certificate(p, p, p),
    "plan": lambda p: read_plan(p),
}
# Doors that take a model in memory.
IN_MEMORY: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "from atc": lambda m: from_atc(m),
    "standard nodes": lambda m: standard_nodes(m),
    "fuse": lambda m: sfa_onnx.fuse(m),
    "unfuse": lambda m: unfuse(m),
    "kv-cache": lambda m: convert(m, to="int8"),
    "compare": lambda m: compare(m, m),
    "session": lambda m: runtime.session(m),
    "feeds": lambda m: random_feeds(m),
    "check": lambda m: checks.check(m),
    "portable": lambda m: make_portable(m),
    "estimate": lambda m: estimate(m),
    "to atc": lambda m: to_atc(m),
}
VERBS = ("inspect", "fuse", "unfuse", "kv-cache", "check", "run", "doctor")


def _files(folder: Path) -> dict[str, Path]:
    """One file, or path, per class of things that are no model."""
    kinds = {
        "empty": b"",
        "text": b"hello\n",
        "npz": b"PK\x05\x06" + bytes(18),
        "binary": bytes(range(256)) * 4,
        "truncated": sound().SerializeToString()[:-40],
        "no graph": onnx.ModelProto(ir_version=8).SerializeToString(),
    }
    found = {}
    for name, data in kinds.items():
        found[name] = folder / f"{name.replace(' ', '-')}.onnx"
        found[name].write_bytes(data)
    (folder / "folder.onnx").mkdir()
    (folder / "loop.onnx").symlink_to("loop.onnx")
    return found | {
        "missing": folder / "missing.onnx",
        "folder": folder / "folder.onnx",
        "loop": folder / "loop.onnx",
        "too long": folder / ("x" * 300 + ".onnx"),
        "under a file": found["text"] / "m.onnx",
        "device": Path("/dev/null"),
    }


def _only_ours(call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except FaultError as error:
        raise AssertionError(f"{what}: unforeseen: {error}") from error
    except SfaError as error:
        text = str(error)
        assert len(text) > 20, f"{what}: says nothing: {text!r}"
        assert text == printable(text), f"{what}: raw control characters"


@pytest.mark.parametrize("name", DOORS)
def test_files_that_are_no_models(name, tmp_path):
    for kind, path in _files(tmp_path).items():
        if name != "doctor":  # that one reports instead
            with pytest.raises(SfaError):
                DOORS[name](path)
        _only_ours(lambda path=path: DOORS[name](path), f"{name} of {kind}")


@pytest.mark.parametrize("name", sorted({*DOORS, *IN_MEMORY}))
def test_arguments_of_other_types(name):
    call = DOORS.get(name) or IN_MEMORY[name]
    if name in ("fix", "hand over", "doctor"):
        return  # two build their own arguments from a path, one reports instead
    for other in (5, b"m.onnx", [], np.zeros(3)):
        with pytest.raises((SfaError, TypeError)):
            call(other)


def test_a_call_that_does_not_fit_stays_a_type_error():
    with pytest.raises(TypeError, match="surprise"):
        sfa_onnx.fuse(sound(), surprise=1)


@pytest.mark.parametrize("data", [b"", b"PK\x05\x06" + bytes(18), b"PK\x03\x04" + bytes(40), b"x"])
def test_inputs_that_are_no_arrays(data, tmp_path, capsys):
    path, inputs = tmp_path / "m.onnx", tmp_path / "in.npz"
    path.write_bytes(gathered().SerializeToString())
    inputs.write_bytes(data)
    assert main(["run", str(path), "--inputs", str(inputs)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"[1, 2]", b"sites: 5", b"\x00\x01"])
def test_plans_that_are_none(data, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_bytes(data)
    with pytest.raises(UsageError):
        sfa_onnx.fuse(sound(), plan=path)


def test_errors_of_the_system_are_told_with_what_to_do():
    for number, text in ((28, "free some space"), (13, "permissions"), (36, "shorter name")):
        error = as_ours(OSError(number, os.strerror(number), "out.onnx"), "fuse")
        assert isinstance(error, UsageError)
        assert "out.onnx" in str(error)
        assert text in str(error)
    assert isinstance(as_ours(MemoryError(), "fuse"), BudgetError)


def test_ctrl_c_stays_ctrl_c_where_an_import_makes_an_error_of_it():
    @door
    def loads():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as stopped:  # as pybind11 does when a module begins
            raise ImportError("initialization failed") from stopped

    with pytest.raises(KeyboardInterrupt):
        loads()


def test_what_nobody_foresaw_says_where_and_asks_for_a_report():
    @door
    def opened() -> None:
        raise KeyError("axis\x1b[2J")

    with pytest.raises(FaultError, match=r"opened: stopped by KeyError.*\\x1b.*report") as caught:
        opened()
    assert isinstance(caught.value.__cause__, KeyError)


def _run(arguments: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sfa_onnx", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, text=True, stderr=subprocess.PIPE, **more)


def test_standard_output_may_be_closed_or_full(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(gathered().SerializeToString())
    shell = f"{sys.executable} -m sfa_onnx inspect {path} --no-verify"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for redirection, codes in ((">&-", (0, 1)), ("> /dev/full", (1, 2)), ("| head -c1", (0,))):
        done = subprocess.run(
            ["bash", "-c", f"{shell} {redirection}"],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode in codes, (redirection, done.stderr)
        assert "Traceback" not in done.stderr, redirection
        assert "Exception ignored" not in done.stderr, redirection


def test_control_characters_never_reach_the_terminal(tmp_path):
    """Names that clear the screen, ring, set the title, or turn the direction of text."""
    evil = "a\x1b[2J\x07\x1b]0;owned\x07\u202e\x9bb"
    model = gathered()
    for node in model.graph.node:
        node.name = f"{evil}{node.name}{node.op_type}"
    model.producer_name = evil
    model.graph.output[0].name = evil
    model.graph.node[-1].output[0] = evil
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    for verb in (["inspect", "--explain"], ["check"], ["run"]):
        done = _run([verb[0], str(path), *verb[1:]], stdout=subprocess.PIPE)
        shown = done.stdout + done.stderr
        assert not {c for c in shown if ord(c) < 32} - {"\n", "\t"}, verb
        assert not set(shown) & {"\x7f", "\x9b", "\u202e"}, verb
