"""The C++ example is built with CMake and run on the demo's models, as its page says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest

import sfa_onnx
from sfa_onnx import demo
from sfa_onnx.cli import main

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "tests" / "data" / "ort" / "onnxruntime_c_api.h"

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="needs g++"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built against a folder laid out as a release of onnxruntime."""
    root = tmp_path_factory.mktemp("onnxruntime")
    (root / "include").mkdir()
    (root / "lib").mkdir()
    shutil.copy(HEADER, root / "include")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (root / "lib" / name).symlink_to(library)
    build = root / "build"
    run("cmake", "-S", ROOT / "examples" / "cpp", "-B", build, f"-DONNXRUNTIME_ROOT={root}")
    run("cmake", "--build", build)
    return build / "decode"


def run(*words: object) -> str:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_fused_model_gives_the_same_from_cpp(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--library"]) == 0
    library = capsys.readouterr().out.rstrip("\n")
    model = demo.materialise(tmp_path)
    fused = tmp_path / "fused.onnx"
    sfa_onnx.fuse(model, fused)
    printed = run(program, library, model, fused, 300)
    assert f"onnxruntime {onnxruntime.__version__}" in printed
    assert "latent         154112 elements" in printed, "past 300 and one new token, 512 wide"
    assert "the fused model gives the same" in printed

    wrong = subprocess.run([program, tmp_path / "none.so", model, fused], capture_output=True)
    assert wrong.returncode == 1
    assert b"none.so" in wrong.stderr


def test_other_models_are_told_apart(program: Path, tmp_path: Path) -> None:
    from sfa_onnx import runtime

    model = demo.materialise(tmp_path / "a")
    other = demo.materialise(tmp_path / "b", seed=1)
    done = subprocess.run(
        [program, runtime.library_path(), model, other, "300"], capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert "the models differ" in done.stdout
