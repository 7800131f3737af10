"""What others meet first: types that hold in their projects, scripts without traps."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sfa_onnx

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "data" / "consumer" / "program.py"


def check(program: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """mypy --strict over a program that finds the package as an installed one."""
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nstrict = True\n[mypy-onnx.*]\nignore_missing_imports = True\n")
    where = str(Path(sfa_onnx.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(settings), str(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"MYPYPATH": where, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )


def test_a_consumers_project_type_checks_against_us(tmp_path: Path) -> None:
    assert (Path(sfa_onnx.__file__).parent / "py.typed").is_file()
    lines = [line for line in check(PROGRAM, tmp_path).stdout.splitlines() if "program.py" in line]
    assert lines == []
    wrong = tmp_path / "wrong.py"
    wrong.write_text('import sfa_onnx\nsfa_onnx.fuse("a", kv_cache="int4").fused[0].site_id + 1\n')
    said = check(wrong, tmp_path).stdout
    assert 'incompatible type "Literal' in said or "Argument" in said
    assert "Unsupported operand types" in said


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shell_scripts_are_clean() -> None:
    listed = subprocess.run(["git", "ls-files", "*.sh", ".ci/run"], cwd=ROOT, capture_output=True)
    scripts = listed.stdout.decode().split()
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
