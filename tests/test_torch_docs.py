"""docs/torch.md and README's call of the document run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.kernel]
ROOT = Path(__file__).resolve().parent.parent


def run(text: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "torch.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    printed = run("\n".join(blocks), tmp_path)
    assert "float8 moved the latents by 2." in printed
    assert (tmp_path / "model.onnx").is_file()


def test_the_readmes_call_runs(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```python\n((?:(?!```).)*?ops\.custom.*?)```", readme, re.DOTALL)
    assert len([line for line in block.splitlines() if line]) == 5
    setup = """
import torch
query, indices = torch.randn(1, 1, 16, 576).bfloat16(), torch.arange(8).int().reshape(1, 1, 1, 8)
cache = torch.zeros(2, 16, 1, 656, dtype=torch.int8)
table, lengths = torch.tensor([[0, 1]]).int(), torch.tensor([32]).int()
"""
    assert run(setup + block + "print(out.shape)", tmp_path) == "torch.Size([1, 1, 16, 512])\n"
