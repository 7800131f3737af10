"""What a wheel promises by its name: a library that every manylinux2014 system can load."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sfa_onnx import runtime
from tests.op_models import needs_library

ROOT = Path(__file__).resolve().parent.parent
CHECK = ROOT / "scripts" / "wheel_symbols.py"


@needs_library
def test_the_library_asks_for_no_newer_glibc_and_no_cpp_runtime() -> None:
    done = subprocess.run(
        [sys.executable, str(CHECK), str(runtime.library_path())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_library_that_asks_for_more_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "new.cc"
    source.write_text("#include <string>\nint f(int n) { return std::to_string(n).size(); }\n")
    library = tmp_path / "new.so"
    built = subprocess.run(["g++", "-shared", "-fPIC", "-o", str(library), str(source)])
    if built.returncode:
        pytest.skip("no C++ compiler")
    done = subprocess.run(
        [sys.executable, str(CHECK), str(library)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "links to libstdc++.so.6" in done.stderr


def test_both_architectures_are_named() -> None:
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"][
        "overrides"
    ]
    named = {o["env"]["_PYTHON_HOST_PLATFORM"]["default"] for o in overrides}
    assert named == {"manylinux2014_x86_64", "manylinux2014_aarch64"}
