"""Every shell and Python block of every page runs, page by page, as a reader would run them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUN = {"sh", "python"}
TOUR = "python -c \"from sfa_onnx import demo; demo.materialise('tour')\"\n"


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of what is to be run."""
    found = [(m[1], m[2]) for m in BLOCK.finditer(page.read_text()) if m[1] in RUN]
    if page.name != "README.md":
        return found
    # Its shell blocks are run by test_readme and .ci/run, its call of torch by test_torch_docs.
    own = [(k, t) for k, t in found if k == "python" and "torch.ops" not in t]
    return [("sh", TOUR), *own]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_blocks() -> list[Path]:
    return [page for page in PAGES if blocks(page)]


def script(parts: list[tuple[str, str]]) -> str:
    """One bash script: shell blocks in order; Python blocks of a page share one interpreter."""
    shell = [text for kind, text in parts if kind == "sh"]
    python = "\n".join(text for kind, text in parts if kind == "python")
    call = (
        [f"cat > page.py <<'END_OF_PAGE'\n{python}\nEND_OF_PAGE\npython page.py"] if python else []
    )
    return "\n".join([*shell, *call])


@pytest.mark.kernel
@pytest.mark.parametrize("page", with_blocks(), ids=name)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    if name(page) == "docs/torch.md" and importlib.util.find_spec("torch") is None:
        return  # the page is about torch
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for command, module in (("sfa-onnx", "-m sfa_onnx"), ("python", "")):
        (bin_folder / command).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (bin_folder / command).chmod(0o755)
    here = os.pathsep.join([*(p for p in sys.path if p and p != str(ROOT)), str(ROOT)])
    first = os.pathsep.join([str(ROOT), here]) if (ROOT / "sfa_onnx/runtime/lib").exists() else here
    work = tmp_path / "work"
    work.mkdir()
    (work / "tests").symlink_to(ROOT / "tests")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script(blocks(page))],
        cwd=work,
        env=os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": first},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_every_block_has_a_language() -> None:
    """No block is left out of the above by having none; what is not to be run says `text`."""
    known = RUN | {"text", "cpp", "yaml"}
    for page in PAGES:
        if "reference" not in page.parts:
            kinds = [m[1] for m in BLOCK.finditer(page.read_text())]
            assert set(kinds) <= known, name(page)
