"""The README is executed: its tour's shell blocks run as they stand."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def tour_blocks() -> list[str]:
    tour = README.split("<!-- tour:")[1].split("<!-- end of tour -->")[0]
    return re.findall(r"```sh\n(.*?)```", tour, flags=re.DOTALL)


@pytest.mark.kernel
def test_the_tour_runs(tmp_path: Path) -> None:
    command = shutil.which("sfa-onnx", path=str(Path(sys.executable).parent))
    assert command, "the package is installed with its command"
    blocks = tour_blocks()
    assert len(blocks) >= 3
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            env={"PATH": f"{Path(command).parent}:/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "tour" / "handover").is_dir()
    assert (tmp_path / "tour" / "paged.onnx").is_file()


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).is_file(), target


def test_every_operator_is_in_the_table() -> None:
    from sfa_onnx.operator.op import ALL_OPS

    for op in ALL_OPS:
        row = f"`{op.domain}::{op.name}`"
        assert row in README, f"README.md: {row} in the table of operators"


def test_every_verb_is_in_the_table() -> None:
    from sfa_onnx.cli import build_parser

    actions = [a for a in build_parser()._actions if a.dest == "verb"]
    assert actions[0].choices is not None
    for verb in actions[0].choices:
        assert f"`{verb}`" in README
