"""The public surface: light to import, complete, and nothing private on it."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sfa_onnx

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "onnxruntime", "transformers", "onnxscript", "rich", "onnx", "numpy")
OPTIONAL = ("sfa_onnx.torch",)


def modules() -> list[str]:
    found = pkgutil.walk_packages(sfa_onnx.__path__, "sfa_onnx.")
    return sorted(m.name for m in found if not m.name.startswith(OPTIONAL))


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def loaded_after(code: str) -> set[str]:
    printed = python(f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')")
    return set(printed.splitlines())


@pytest.mark.parametrize(
    "code",
    [
        "import sfa_onnx",
        "import sfa_onnx.cli; sfa_onnx.cli.build_parser().format_help()",
        "import sfa_onnx.errors, sfa_onnx.version, sfa_onnx.operator.op",
    ],
)
def test_imports_stay_light(code: str) -> None:
    """What keeps `import sfa_onnx` below half a second, and `--help` below 0.3 s."""
    loaded = loaded_after(code)
    assert loaded.isdisjoint(HEAVY)
    assert len(loaded) < 250, "some 130 modules of the standard library, and few of ours"


def test_the_operators_are_known_to_onnx_whoever_comes_first() -> None:
    known = "print(onnx.defs.has('NPUSparseFlashAttention', domain='npu'), onnx.__spec__.loader)"
    for order in ("sfa_onnx, onnx", "onnx, sfa_onnx"):
        printed = python(f"import {order}\n{known}")
        assert printed.startswith("True <_frozen_importlib_external.SourceFileLoader"), order
    left = "print([f for f in sys.meta_path if 'sfa_onnx' in type(f).__module__])"
    assert python(f"import sys, sfa_onnx, onnx\n{left}").strip() == "[]"


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
