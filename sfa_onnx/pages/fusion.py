"""What fusing did, as sections of a page and as Markdown."""

from __future__ import annotations

from collections import Counter

from sfa_onnx.guard.text import printable
from sfa_onnx.pages import html
from sfa_onnx.pages.picture import draw
from sfa_onnx.pages.sites import Graphs, distinct
from sfa_onnx.report import FuseReport, SiteReport

__all__ = ["markdown", "sections", "summary"]


def summary(report: FuseReport) -> str:
    """One sentence: how many sites fused, into what."""
    ops = ", ".join(f"{n} x {op}" for op, n in Counter(s.op_type for s in report.fused).items())
    text = f"{len(report.fused)} of {len(report.sites)} sites fused"
    nodes = f"nodes {report.nodes_before} -> {report.nodes_after}"
    return "; ".join(filter(None, (text, ops, nodes)))


def sections(report: FuseReport, before: Graphs, after: Graphs, memory: str) -> list[str]:
    """The page's parts, in reading order."""
    cells = [(s.status, f"{s.site_id}: {s.status}") for s in report.sites]
    return [
        html.strip(cells),
        *(_site(s, n, before, after) for s, n in distinct(report.fused)),
        html.section("Refused", html.table(_REFUSED, _reasons(report))),
        html.section("Assumptions", html.table(("assumption", "sites"), _assumptions(report))),
        html.section("Limits of the NPU kernel", html.table(("limit", "sites"), _limits(report))),
        html.section("Every site", html.table(_SITES, [_row(s) for s in report.sites])),
        html.section(
            "Selections", html.table(_SELECTIONS, [_selection(s) for s in report.selections])
        ),
        html.section("Certificate in short", html.facts(_certificate(report))),
        html.section("Notes", html.table(("note",), [(n,) for n in _others(report)])),
        html.section("Time and memory", html.facts(_costs(report, memory))),
    ]


_UNTOUCHED = "untouched:"
_REFUSED = ("reason", "what would help", "sites")
_SITES = ("site", "where", "status", "operator", "form", "probes", "largest error")
_SELECTIONS = (*_SITES, "least margin")


def _site(site: SiteReport, alike: int, before: Graphs, after: Graphs) -> str:
    many = f", as {alike - 1} more" if alike > 1 else ""
    pictures = (
        draw(before.boxes(site.removed, "gone", site.roles), "before: what was replaced"),
        draw(after.boxes(site.added, "new", site.roles), "after: what stands in their place"),
    )
    head = html.facts([("where", site.layer or site.anchor), ("form", site.family)])
    pair = f'<div class="pair">{"".join(pictures)}</div>'
    return html.section(f"{site.site_id}: {site.op_type}{many}", head, pair)


def _row(site: SiteReport) -> tuple[object, ...]:
    record = site.record
    probes = record.probes if record else ()
    worst = f"{max(p.error for p in probes):.1e}" if probes else ""
    told = "not verified" if record and not probes else len(probes) or ""
    return (
        *(site.site_id, site.layer or site.anchor, site.status, site.op_type),
        *(site.family or site.reason, told, worst),
    )


def _reasons(report: FuseReport) -> list[tuple[object, ...]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for site in report.refused:
        groups.setdefault((site.reason, site.hint), []).append(site.site_id)
    return [(reason, hint, ", ".join(ids)) for (reason, hint), ids in groups.items()]


def _assumptions(report: FuseReport) -> list[tuple[str, int]]:
    done = (*report.fused, *report.indexers)
    count = Counter(a for s in done if s.record for a in s.record.assumptions)
    return count.most_common()


def _selection(site: SiteReport) -> tuple[object, ...]:
    """As a site; a refused one says why in the place of its form.

    The margin is the least gap behind the last key taken, next to the largest score.
    """
    where, form = _row(site), site.reason or site.family
    margin = site.record.margin if site.record else None
    return (*where[:4], form, *where[5:], "" if margin is None else f"{margin:.1e}")


def _certificate(report: FuseReport) -> list[tuple[str, object]]:
    """What changed and what did not; `fuse --certificate` writes the hashes behind it."""
    fused = report.fused
    removed = sum(len(s.removed) for s in fused)
    interface = [*report.changed_inputs, *report.changed_outputs]
    return [
        ("replaced", f"{removed} nodes in {len(fused)} site{'' if len(fused) == 1 else 's'}"),
        ("in their place", f"{sum(len(s.added) for s in fused)} nodes"),
        ("everything else", "; ".join(n for n in report.notes if n.startswith(_UNTOUCHED))),
        ("inputs and outputs", "; ".join(interface) or "as they were"),
    ]


def _others(report: FuseReport) -> list[str]:
    return [n for n in report.notes if not n.startswith(_UNTOUCHED)]


def _limits(report: FuseReport) -> list[tuple[str, int]]:
    return Counter(x for s in (*report.fused, *report.indexers) for x in s.npu_limits).most_common()


def _costs(report: FuseReport, memory: str) -> list[tuple[str, object]]:
    stages = ", ".join(f"{k} {v:.2f} s" for k, v in report.seconds.items())
    read = f"{report.weights_bytes_read} bytes"
    return [("stages", stages), ("weights read", read), ("peak memory", memory)]


def markdown(title: str, report: FuseReport) -> str:
    """The same in short, for a pull request."""
    lines = [f"# {title}", "", f"{summary(report)}.", ""]
    lines += _md_table(_SITES, [_row(s) for s in report.sites])
    lines += _md_table(_SELECTIONS, [_selection(s) for s in report.selections])
    lines += _md_table(_REFUSED, _reasons(report))
    lines += _md_table(("assumption", "sites"), _assumptions(report))
    lines += _md_table(("certificate in short", ""), _certificate(report))
    return "\n".join([*lines, *(f"- {note}" for note in _others(report)), ""])


def _md_table(head: tuple[str, ...], rows: object) -> list[str]:
    assert isinstance(rows, list)
    if not rows:
        return []
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return [*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows), ""]


def _cell(value: object) -> str:
    return printable(str(value)).replace("|", "\\|").replace("\n", " ")
