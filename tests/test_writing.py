"""Files are switched together, links are written through, nothing needed is overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.cli import main
from sfa_onnx.errors import UsageError
from sfa_onnx.files.writing import atomic_write, check_outputs
from tests.absorbed_models import expanding
from tests.test_materialize import feeds, saved

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model(tmp_path) -> Path:
    return saved(expanding(), tmp_path)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def result(path: Path) -> np.ndarray:
    return runtime.run(runtime.session(path), feeds())["y0"]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "file")
    atomic_write(link, b"one")
    assert link.is_symlink()
    assert (tmp_path / "there" / "file").read_bytes() == b"one"
    with pytest.raises(UsageError, match="exists already"):
        atomic_write(link, b"two")
    atomic_write(link, b"two", force=True)
    assert (tmp_path / "there" / "file").read_bytes() == b"two"
    assert names(tmp_path) == ["link", "there/file"]


def test_what_is_no_regular_file_is_refused(tmp_path):
    pipe, folder, loop = tmp_path / "pipe", tmp_path / "folder", tmp_path / "loop"
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop)
    for path, text in (
        *((pipe, "a device, pipe"), (Path("/dev/null"), "a device, pipe")),
        *((folder, "a folder"), (tmp_path / "no" / "where", "does not exist")),
        (loop, "cannot be written|circle|exists"),
    ):
        with pytest.raises(UsageError, match=text):
            atomic_write(path, b"x", force=True)
    assert pipe.is_fifo()


def test_outputs_are_told_apart_by_what_they_are(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"m")
    (tmp_path / "hard").hardlink_to(tmp_path / "m.onnx")
    (tmp_path / "soft").symlink_to("m.onnx")
    for name in ("m.onnx", "hard", "soft", "../" + tmp_path.name + "/m.onnx"):
        with pytest.raises(UsageError, match="would be the certificate and is the model already"):
            check_outputs(
                {"the certificate": tmp_path / name}, {"the model": tmp_path / "m.onnx"}, force=True
            )
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match="would be the certificate and is the output"):
        check_outputs({"the output": tmp_path / "a", "the certificate": tmp_path / "b/../a"}, {})
    check_outputs(
        {"the output": tmp_path / "m.onnx"}, {"the model": tmp_path / "m.onnx"},
        force=True, replaceable=("the output",),
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ["fuse", "m.onnx", "-o", "out.onnx", "--certificate", "m.onnx"],
        ["fuse", "m.onnx", "-o", "out.onnx", "--certificate", "w.bin"],
        ["fuse", "m.onnx", "-o", "out.onnx", "--certificate", "out.onnx"],
        ["fuse", "m.onnx", "-o", "w.bin"],
        ["inspect", "m.onnx", "--no-verify", "--plan", "m.onnx"],
        ["inspect", "m.onnx", "--no-verify", "--plan", "w.bin"],
        ["run", "m.onnx", "-o", "m.onnx"],
        ["run", "m.onnx", "-o", "w.bin"],
    ],
)
def test_no_verb_overwrites_what_it_reads(model, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    before = {name: Path(name).read_bytes() for name in names(tmp_path)}
    assert main([*arguments, "--force"]) == 2
    assert "choose another" in " ".join(capsys.readouterr().err.split())
    assert {name: Path(name).read_bytes() for name in names(tmp_path)} == before


def test_a_dry_run_writes_nothing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = names(tmp_path)
    options = ["--certificate", "proof.json", "--materialize-absorbed", "--weights", "copy"]
    assert main(["fuse", "m.onnx", "-o", "out.onnx", "--dry-run", *options]) == 0
    assert names(tmp_path) == before


def test_copied_weights_never_replace_those_of_an_older_model(model, tmp_path):
    far = tmp_path / "far"
    far.mkdir()
    sfa_onnx.fuse(model, far / "out.onnx", weights="copy")
    old = result(far / "out.onnx")
    os.link(far / "out.onnx", far / "older.onnx")
    weights = bytearray((tmp_path / "w.bin").read_bytes())
    values = np.frombuffer(weights, np.float32)
    (tmp_path / "w.bin").write_bytes((values * 2).tobytes())
    sfa_onnx.fuse(model, far / "out.onnx", weights="copy", force=True)
    assert names(far) == ["older.onnx", "out.onnx", "w-2.bin", "w.bin"]
    assert np.array_equal(result(far / "older.onnx"), old)
    assert not np.array_equal(result(far / "out.onnx"), old)
    assert np.allclose(result(far / "out.onnx"), result(model), atol=1e-4)
    sfa_onnx.fuse(model, tmp_path / "beside.onnx")
    with pytest.raises(UsageError, match="holds other bytes"):
        sfa_onnx.fuse(
            model, far / "out.onnx", weights="copy", force=True, certificate=far / "proof.json"
        )
    (tmp_path / "w.bin").write_bytes(bytes(weights))
    sfa_onnx.fuse(model, far / "out.onnx", weights="copy", force=True)
    assert names(far) == ["older.onnx", "out.onnx", "w-2.bin", "w.bin"], "equal files are kept"
    assert np.array_equal(result(far / "out.onnx"), old)


def test_absorbed_weights_get_a_new_name(model, tmp_path):
    out = tmp_path / "o.onnx"
    sfa_onnx.fuse(model, out, materialize_absorbed=True)
    first = (tmp_path / "o.absorbed.bin").read_bytes()
    os.link(out, tmp_path / "older.onnx")
    report = sfa_onnx.fuse(model, out, materialize_absorbed=True, force=True)
    assert any("o.absorbed.bin was left for models that read it" in n for n in report.notes)
    assert (tmp_path / "o.absorbed.bin").read_bytes() == first
    locations = {
        e.value
        for t in onnx.load(out, load_external_data=False).graph.initializer
        for e in t.external_data
        if e.key == "location"
    }
    assert "o.absorbed-2.bin" in locations
    assert "o.absorbed.bin" not in locations
    assert np.array_equal(result(out), result(tmp_path / "older.onnx"))


def test_killed_writers_leave_the_old_or_the_new(tmp_path):
    """Two verbs, a few times; `scripts/kill-writers.py` tries all, 200 times each."""
    command = [sys.executable, str(ROOT / "scripts" / "kill-writers.py"), "--times", "3"]
    environment = {**os.environ, "PYTHONPATH": str(Path(sfa_onnx.__file__).parents[1])}
    verbs = ["--verb", "fuse --materialize-absorbed", "--verb", "fuse --weights copy"]
    done = subprocess.run([*command, *verbs], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('"broken": []') == 2
