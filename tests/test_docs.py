"""The documentation: generated pages are current, links lead somewhere, the site builds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import glossary_links, write_measured, write_reference

ROOT = Path(__file__).resolve().parent.parent
NAMES = re.compile(r"`((?:sfa_onnx|kernels|tests|scripts|benchmarks|examples)/[\w./]+)`")
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", write_reference.PAGES)
def test_reference_pages_are_current(page: str) -> None:
    stored = (write_reference.FOLDER / page).read_text()
    assert stored == write_reference.PAGES[page](), "run python -m scripts.write_reference"


@pytest.mark.parametrize("page", write_measured.PAGES)
def test_measured_tables_are_those_of_the_recorded_runs(page: str) -> None:
    text = (ROOT / page).read_text()
    assert text == write_measured.written(page), "run python -m scripts.write_measured"
    for table in write_measured.PAGES[page]:
        assert text.count(f"<!-- measured: {table} -->") == 1


FIGURE = re.compile(
    r"(?<![\d.])\d[\d.,]*(?:\s(?:to|->|and|-)\s[\d.]+)?"
    r"(?:x|\s?(?:%|us|ms|s|GB/s|GB|MB|times|GFLOP/s))(?![\w/])"
)


@pytest.mark.parametrize("page", write_measured.PAGES)
def test_other_figures_in_prose_say_where_they_are_from(page: str) -> None:
    """A figure that was measured is written from its run; the few others are listed there."""
    known = json.loads(write_measured.RUNS.read_text())["prose"][page]
    assert set(FIGURE.findall(write_measured.outside(page))) == set(known)
    assert all(len(origin) > 5 for origin in known.values())
    told = "it runs at 12.5 % and 1.9x, in 2.0 to 2.6 s, 64 x 128 values, 5 sites"
    assert FIGURE.findall(told) == ["12.5 %", "1.9x", "2.0 to 2.6 s"]


def test_terms_of_ours_lead_to_the_glossary() -> None:
    headings = re.findall(r"^### (.+)$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    known = {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in headings}
    assert set(glossary_links.TERMS.values()) <= known
    text = "# A site\n\n`site` and [a site](x.md): the site, and the site again.\n```\nsite\n```\n"
    linked = glossary_links.link(text, "contributing/a.md")
    assert linked == text.replace("the site,", "the [site](../glossary.md#site),")


def test_every_option_of_every_verb_is_explained() -> None:
    rows = re.findall(r"^\| `(.+?)` \| (.*?) \|", write_reference.command(), re.MULTILINE)
    assert len(rows) > 40
    assert [name for name, text in rows if not text.strip()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).is_file(), target


def test_names_of_files_in_the_docs_exist() -> None:
    """What a recipe tells people to open is there."""
    missing = []
    for page in PAGES:
        for name in NAMES.findall(page.read_text()):
            if not (ROOT / name).exists():
                missing.append(f"{page.name}: {name}")
    assert missing == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "index.html").is_file()
