"""What comparing two models found, as sections of a page and as Markdown."""

from __future__ import annotations

from sfa_onnx.guard.text import printable
from sfa_onnx.pages import html
from sfa_onnx.runtime.compare.difference import (
    DECADES,
    CompareReport,
    Difference,
    SiteRow,
)

__all__ = ["markdown", "sections"]

_HEAD = ("what", "type", "max error", "relative", "outside", "verdict")


def sections(report: CompareReport) -> list[str]:
    """The page's parts, in reading order."""
    rows = [(_place(r), r.difference, r.passed, r.reason) for r in report.sites]
    outs = [(r.name, r.difference, r.passed, "") for r in report.outputs]
    return [
        html.strip([("fused" if ok else "refused", name) for name, _, ok, _ in (*rows, *outs)]),
        html.section("Fused sites, each alone", html.table(_HEAD, [_row(*r) for r in rows])),
        html.section("Outputs of the whole graph", html.table(_HEAD, [_row(*r) for r in outs])),
        html.section("Errors by size", *(_histogram(n, d) for n, d, _, _ in (*rows, *outs))),
        html.section("Inputs", html.facts(list(report.inputs.items()))),
        html.section("Notes", html.table(("note",), [(n,) for n in report.notes])),
    ]


def _place(row: SiteRow) -> str:
    return f"{row.name} ({row.layer})" if row.layer else row.name


def _row(name: str, found: Difference | None, passed: bool, reason: str) -> tuple[object, ...]:
    if found is None:
        return (name, "", "", "", "", f"not compared: {reason}")
    kind = f"{found.dtype}{list(found.shape)}"
    verdict = reason or ("same" if passed else "different")
    return (
        *(name, kind, f"{found.max_abs:.2e}", f"{found.relative:.1e}"),
        *(found.outside, verdict),
    )


def _histogram(name: str, found: Difference | None) -> str:
    if found is None or not any(found.decades):
        return ""
    labels = ["equal", *(f"1e{d} of the bound" for d in DECADES)]
    drawn = html.bars(found.decades, labels, over=1 + DECADES.index(0))
    text = f"{html.text(name)}: errors in units of the bound, from equal to beyond it (red)"
    return f"<figure>{drawn}<figcaption>{text}</figcaption></figure>"


def markdown(title: str, report: CompareReport) -> str:
    """The same in short, for a pull request."""
    rows = [_row(_place(r), r.difference, r.passed, r.reason) for r in report.sites]
    rows += [_row(r.name, r.difference, r.passed, "") for r in report.outputs]
    lines = [f"# {title}", "", f"{report.verdict}.", "", f"| {' | '.join(_HEAD)} |"]
    lines += [f"|{' --- |' * len(_HEAD)}"]
    lines += [f"| {' | '.join(printable(str(c)) for c in row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"- {n}" for n in report.notes), ""])
