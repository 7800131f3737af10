"""Files are switched together, links are written through, nothing needed is overwritten."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.ascend.handover import log
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
        ["run", "m.onnx", "-o", "in.npz", "--inputs", "in.npz"],
        ["fuse", "m.onnx", "-o", "out.onnx", "--report", "m.html"],
        ["fuse", "m.onnx", "-o", "out.onnx", "--report", "w.html"],
        ["fuse", "m.onnx", "-o", "page.html", "--report", "page.html"],
        ["fuse", "m.onnx", "-o", "o.onnx", "--certificate", "p.html", "--report", "p.html"],
        ["fuse", "m.onnx", "-o", "out.onnx", "--report", "plan.md", "--plan", "plan.md"],
        ["compare", "m.onnx", "m.onnx", "--report", "m.html"],
        ["compare", "m.onnx", "m.onnx", "--report", "w.html"],
        ["compare", "m.onnx", "m.onnx", "--report", "in.html", "--inputs", "in.npz"],
        ["unfuse", "fused.onnx", "-o", "w.bin"],
        ["kv-cache", "m.onnx", "-o", "w.bin", "--to", "int8"],
        ["check", "m.onnx", "--fix", "-o", "w.bin"],
    ],
)
def test_no_verb_overwrites_what_it_reads(model, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    sfa_onnx.fuse("m.onnx", "fused.onnx")
    np.savez("in.npz", **feeds())
    for name, page in (("m.onnx", "m.html"), ("w.bin", "w.html"), ("in.npz", "in.html")):
        Path(page).symlink_to(name)  # pages have their own endings
    Path("plan.md").write_text("sites: []\n")
    before = {name: Path(name).read_bytes() for name in names(tmp_path)}
    assert main([*arguments, "--force"]) == 2
    assert "choose another" in " ".join(capsys.readouterr().err.split())
    assert {name: Path(name).read_bytes() for name in names(tmp_path)} == before


def test_a_dry_run_writes_nothing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = names(tmp_path)
    options = ["--certificate", "proof.json", "--materialize-absorbed", "--weights", "copy"]
    options += ["--report", "page.html"]
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


# Who opens files for writing beside `files.writing`, and why.
_OTHER_WRITERS = {
    "ascend/handover/build_om.py": "stands alone on the device; writes beside, then renames",
    "ascend/handover/run_om.py": "stands alone on the device; writes beside, then renames",
    "ascend/handover/package_tables.py": "writes two tables of this repository",
    "cli/show.py": "puts arrays into an archive whose stream is the door's",
    "files/weights_file.py": "streams into a temporary file",
    "files/writing.py": "the door itself",
    "guard/serve.py": "tells the kernel who may be killed first",
}


def _opens_for_writing(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    words = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    if name in ("open", "fdopen"):
        return any(set(word) & set("wax+") and set(word) <= set("wabrxt+") for word in words)
    given = call.args[0] if call.args else None
    saves = name in ("save", "savez") and not isinstance(given, ast.Name)
    return name in ("write_text", "write_bytes", "copyfile", "copytree", "move") or saves


def test_all_files_are_written_through_one_door():
    package = Path(sfa_onnx.__file__).parent
    writers = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _opens_for_writing(node)
    }
    assert writers == set(_OTHER_WRITERS)


def test_what_atc_says_replaces_an_older_log_as_a_whole(tmp_path):
    (tmp_path / "atc.log").write_text("of an earlier run")
    (tmp_path / "atc.sh").write_text("echo begun; cat atc.log; exec sleep 60\n")
    with pytest.raises(subprocess.TimeoutExpired):
        log.run(tmp_path, timeout=2.0)
    assert (tmp_path / "atc.log").read_text() == "begun\nof an earlier run"
    (tmp_path / "atc.sh").write_text("echo ATC run success\n")
    assert log.run(tmp_path).passed
    assert names(tmp_path) == ["atc.log", "atc.sh"]


def test_an_interrupt_during_the_imports_shows_no_traceback():
    code = "import sys; sys.modules.pop('sfa_onnx.cli', None)\n"
    code += "class Stop:\n def find_spec(self, name, *a):\n  if name == 'sfa_onnx.cli': "
    code += "raise KeyboardInterrupt\n"
    code += (
        "sys.meta_path.insert(0, Stop())\nfrom sfa_onnx.__main__ import start\nsys.exit(start())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr == "interrupted: nothing was begun\n"
