"""Reports as files: complete, self-contained, safe to open, readable in a browser."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx.cli import main
from sfa_onnx.demo import materialise
from sfa_onnx.errors import UsageError
from sfa_onnx.pages import write_comparison, write_fusion
from sfa_onnx.pages.picture import MOST, Box, draw
from sfa_onnx.runtime.compare.difference import DECADES, CompareReport, OutputRow, measure
from tests import graphs

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
SHOT = "--headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars"


class Reader(HTMLParser):
    """What a page holds: its words, its tags, and whether they close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def read(path: Path) -> Reader:
    page = Reader(path.read_text())
    assert page.open == []
    assert not [t for t, _ in page.tags if t in ("script", "link", "img", "iframe")]
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on") or a == "src"]
    return page


def two_sites() -> onnx.ModelProto:
    """One site that fuses; another is refused when the plan leaves it out."""
    return graphs.dense()


def test_a_fusion_page_shows_the_site_before_and_after(tmp_path: Path) -> None:
    model = two_sites()
    report = sfa_onnx.fuse(model)
    write_fusion(report, tmp_path / "out.html", model)
    page = read(tmp_path / "out.html")
    drawn = [attrs for tag, attrs in page.tags if tag == "g"]
    roles = {str(attrs["class"]).split()[1] for attrs in drawn}
    assert {"gone", "new", "query", "indices"} <= roles
    assert sum("gone" in str(a["class"]) for a in drawn) == min(len(report.fused[0].removed), 45)
    assert "Softmax" in page.text
    assert "NPUSparseFlashAttention" in page.text
    assert f"1 of {len(report.sites)} sites fused" in page.text
    for assumption in report.fused[0].record.assumptions:
        assert assumption in page.text
    assert "peak memory" in page.text
    assert f"{len(report.fused[0].removed)} nodes in 1 site" in page.text
    assert "equal by hash and in order" in page.text


def test_refusals_are_grouped_with_what_would_help(tmp_path: Path) -> None:
    report = sfa_onnx.fuse(two_sites())
    site = report.sites[0]
    site.status, site.record = "refused", None
    site.refuse("a reason <b>with</b> marks", "do | this", "x")
    write_fusion(report, tmp_path / "out.html", two_sites())
    text = read(tmp_path / "out.html").text
    assert "a reason <b>with</b> marks" in text
    assert "do | this" in text
    write_fusion(report, tmp_path / "out.md", two_sites())
    assert "do \\| this" in (tmp_path / "out.md").read_text()


def test_names_cannot_steer_the_page(tmp_path: Path) -> None:
    model = two_sites()
    report = sfa_onnx.fuse(model)
    report.sites[0].layer = "<script>alert(1)</script>\x1b[31m"
    write_fusion(report, tmp_path / "out.html", model)
    assert "\\x1b" in read(tmp_path / "out.html").text


def test_a_comparison_page_counts_errors_by_size(tmp_path: Path) -> None:
    a = np.linspace(-1, 1, 1000, dtype=np.float32).reshape(2, 500)
    b = a.copy()
    b[0, :10] += 1.0
    found = measure(a, b)
    assert sum(found.decades) == a.size
    assert len(found.decades) == len(DECADES) + 1
    beyond = sum(found.decades[1 + DECADES.index(0) :])
    assert beyond >= found.outside == 10
    assert found.decades[0] == a.size - 10
    report = CompareReport("a.onnx", "b.onnx", outputs=[OutputRow("y", found)])
    write_comparison(report, tmp_path / "out.html")
    page = read(tmp_path / "out.html")
    assert "different: 1 of 1, first y" in page.text
    assert [a for t, a in page.tags if t == "i" and a.get("class") == "over"]
    write_comparison(report, tmp_path / "out.md")
    assert "| y | float32[2, 500] |" in (tmp_path / "out.md").read_text()


def test_what_was_not_compared_is_not_green(tmp_path: Path) -> None:
    write_comparison(CompareReport("a.onnx", "b.onnx", missing="no weights"), tmp_path / "o.html")
    page = read(tmp_path / "o.html")
    assert ("strong", {"class": "bad"}) in page.tags
    assert "not compared: no weights" in page.text


def test_nothing_is_overwritten_and_other_endings_are_refused(tmp_path: Path) -> None:
    report = CompareReport("a", "b")
    write_comparison(report, tmp_path / "o.html")
    with pytest.raises(UsageError, match="exists already"):
        write_comparison(report, tmp_path / "o.html")
    write_comparison(report, tmp_path / "o.html", force=True)
    with pytest.raises(UsageError, match=r"as \.html or \.md, not as pdf"):
        write_comparison(report, tmp_path / "o.pdf")


def test_pictures_are_cut_and_say_so() -> None:
    boxes = [Box(str(i), "Add", f"n{i}", reads=[str(i - 1)]) for i in range(MOST + 7)]
    drawn = draw(boxes, "many")
    assert drawn.count("<rect") == MOST
    assert "7 more nodes are not drawn" in drawn


def test_a_circle_can_be_drawn() -> None:
    assert draw([Box("a", "A", reads=["b"]), Box("b", "B", reads=["a"])], "x").count("<rect") == 2


def test_the_verbs_write_them(tmp_path: Path) -> None:
    out = tmp_path / "m.sfa.onnx"
    page = tmp_path / "fuse.html"
    model = materialise(tmp_path)
    assert main(["fuse", str(model), "-o", str(out), "--report", str(page)]) == 0
    assert "1 of 1 sites fused" in read(page).text
    second = tmp_path / "compare.md"
    assert main(["compare", str(model), str(out), "--report", str(second)]) == 0
    assert second.read_text().startswith("# decode_layer.onnx and m.sfa.onnx")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_it_without_scrolling_sideways(tmp_path: Path, width: int) -> None:
    model = two_sites()
    write_fusion(sfa_onnx.fuse(model), tmp_path / "out.html", model)
    page = tmp_path / "out.html"
    probe = "<script>document.title=document.documentElement.scrollWidth</script></body>"
    page.write_text(page.read_text().replace("</body>", probe))
    shot = tmp_path / "shot.png"
    done = subprocess.run(
        [str(BROWSER), *SHOT.split(), f"--window-size={width},900", f"--screenshot={shot}",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    assert int(title) <= max(width, 500)  # headless windows are at least 500 wide
