"""The public surface: light to import, complete, and nothing private on it."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import sfa_onnx

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "onnxruntime", "transformers", "onnxscript", "rich")
OPTIONAL = ("sfa_onnx.torch",)


def modules() -> list[str]:
    found = pkgutil.walk_packages(sfa_onnx.__path__, "sfa_onnx.")
    return sorted(m.name for m in found if not m.name.startswith(OPTIONAL))


def test_import_is_light() -> None:
    code = f"import sys, sfa_onnx; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_imports_without_torch_and_exports_what_it_says() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport importlib\n" + "\n".join(
        f"importlib.import_module({name!r})" for name in modules()
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in modules():
        module = importlib.import_module(name)
        exported = getattr(module, "__all__", [])
        missing = [n for n in exported if not hasattr(module, n)]
        assert not missing, f"{name}: {missing}"


def test_top_level_names() -> None:
    assert sfa_onnx.__all__ == sorted(sfa_onnx.__all__)
    for name in sfa_onnx.__all__:
        assert getattr(sfa_onnx, name) is not None
    assert callable(sfa_onnx.fuse)
    importlib.import_module("sfa_onnx.passes")
    assert callable(sfa_onnx.fuse), "no submodule may shadow the function"


def test_files_stay_short_and_speak_of_the_project_alone() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.cc", "*.h"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.split():
        text = (ROOT / name).read_text()
        assert text.count("\n") <= 400, f"{name}: over 400 lines"
        assert not re.search(r"(?<![\w.])/(work|home|root)/", text), f"{name}: a machine's path"
