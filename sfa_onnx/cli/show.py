"""Reports -> what a person reads on a terminal. Nothing is decided here."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from rich.text import Text

from sfa_onnx.cli.console import Console, count, human_bytes
from sfa_onnx.errors import UsageError
from sfa_onnx.files.writing import atomic_stream
from sfa_onnx.operator.op import DOMAIN_NPU
from sfa_onnx.report import FuseReport, SiteReport
from sfa_onnx.summary import Summary

__all__ = [
    "doctor_report",
    "fuse_report",
    "kv_report",
    "pick_sites",
    "save_npz",
    "selections",
    "sites",
    "spread",
    "summary",
]

SHOWN_OPS, SHOWN_FILES = 12, 3
MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "missing": ("✗", "red")}


def spread(values: np.ndarray[Any, Any]) -> str:
    """'mean 0.01, max |x| 3.2' of an output, NaN and Inf counted."""
    if values.size == 0:
        return "empty"
    wide = np.asarray(values).astype(np.float64)
    finite = wide[np.isfinite(wide)]
    text = f"mean {finite.mean():.4g}, max |x| {np.abs(finite).max():.4g}" if finite.size else ""
    odd = wide.size - finite.size
    return text + (f", {odd} not finite" if odd else "")


def save_npz(path: Path, arrays: dict[str, np.ndarray[Any, Any]], *, force: bool = False) -> None:
    """Write an .npz atomically, without pickled objects: any name, numbers and texts.

    What NumPy has no type for (bfloat16, float8) is stored as float32.

    Raises:
        UsageError: the file exists and `force` is not set, or is no regular file.
    """
    with (
        atomic_stream(path, force=force) as stream,
        ZipFile(stream, "w", allowZip64=True) as archive,  # np.savez takes no array called "file"
    ):
        for name, array in arrays.items():
            plain = array.astype({"V": np.float32, "O": np.str_}.get(array.dtype.kind, array.dtype))
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, plain, allow_pickle=False)


def summary(console: Console, path: Path, found: Summary) -> None:
    """Header of `inspect`."""
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    files, top = list(found.external_files), list(found.op_counts.items())
    most = (len(files), len(top)) if console.verbose else (SHOWN_FILES, SHOWN_OPS)
    where = f" in {_first(files, most[0], ', ')}" if files else ""
    console.say(
        "[bold]{}[/bold]  {}, opset {}, by {}",
        path.name,
        human_bytes(found.file_bytes),
        opsets,
        found.producer or "unknown",
    )
    console.say(
        "{} nodes, {} initializers ({}{}; 0 B read)",
        found.nodes,
        found.initializers,
        human_bytes(found.weight_bytes),
        where,
    )
    console.say("inputs   {}", ", ".join(found.inputs), style="dim")
    console.say("outputs  {}", ", ".join(found.outputs), style="dim")
    if found.own_ops:
        own = "  ".join(f"{name} {count}" for name, count in found.own_ops.items())
        console.say("[green]fused already[/green]  {}", own)
    ops = _first([f"{name} {count}" for name, count in top], most[1], "  ")
    console.say("ops      {}", ops, style="dim")


def _first(items: Sequence[str], most: int, between: str) -> str:
    """The first items, and how many there are besides."""
    more = [f"… {len(items) - most} more"] if len(items) > most else []
    return between.join([*items[:most], *more])


def pick_sites(found: Sequence[SiteReport], wanted: str | None) -> list[SiteReport]:
    """All sites, or the one with this id or (1-based) number."""
    if wanted is None:
        return list(found)
    chosen = [s for n, s in enumerate(found, 1) if wanted in (s.site_id, str(n), s.anchor)]
    if not chosen:
        raise UsageError(f"no site {wanted!r}; there are {len(found)}, see `sfa-onnx inspect`")
    return chosen


def sites(console: Console, found: Sequence[SiteReport], *, explain: bool = False) -> None:
    """One row per candidate; refusals in full with `explain`."""
    if not found:
        console.say("no softmax over selected keys in this graph: no sparse-attention candidate")
        return
    _rows(console, found, "site", explain=explain)


def selections(console: Console, found: Sequence[SiteReport], *, explain: bool = False) -> None:
    """As `sites`, of what selects keys; silent where nothing does."""
    if found:
        _rows(console, found, "selection", explain=explain)


def _rows(console: Console, found: Sequence[SiteReport], kind: str, *, explain: bool) -> None:
    rows = []
    for number, site in enumerate(found, 1):
        state = Text("■ fuses", "green") if site.status == "fused" else Text("□ refused", "red")
        what = site.family or site.op_type if site.status == "fused" else site.reason
        rows.append((number, site.site_id, state, site.layer or site.anchor, what))
    console.table(("#", kind, "", "where", "what"), rows, right=(0,))
    for site in found:
        for limit in site.npu_limits:
            console.say("  NPU limit at {}: {}", site.site_id, limit, style="yellow")
        if explain:
            _explain(console, site)


def _explain(console: Console, site: SiteReport) -> None:
    console.say("\n[bold]{}[/bold]  {}", site.site_id, site.layer or site.anchor)
    for label, text in (
        ("anchor", site.anchor),
        ("family", site.family),
        ("reason", site.reason),
        ("stopped at", site.stopped_at),
        ("would fuse if", site.hint),
    ):
        if text:
            console.say("  {}{}", f"{label:14}", text)
    if site.record:
        worst = max((p.error for p in site.record.probes), default=0.0)
        console.say(
            "  {}{} probes, worst {}", f"{'verified':14}", len(site.record.probes), f"{worst:.1e}"
        )
        if site.record.margin is not None:
            text = "behind the last key taken, of the largest score"
            console.say("  {}{} {}", f"{'least margin':14}", f"{site.record.margin:.1e}", text)
        if site.record.shrunk:
            console.say("  {}{}", f"{'at sizes':14}", ", ".join(site.record.shrunk))
        for assumption in site.record.assumptions:
            console.say("  {}{}", f"{'assumes':14}", assumption)
    for label, text in zip(
        ("normal form", *("identity",) * len(site.terms)), site.terms, strict=False
    ):
        console.say("  {}{}", f"{label:14}", text)


def fuse_report(console: Console, path: Path, report: FuseReport) -> None:
    """The outcome of fuse: the layer strip, refusals by reason, what was left alone."""
    strip = "".join("■" if s.status == "fused" else "□" for s in report.sites)
    console.say("{}/{} sites fused: [green]{}[/green]", len(report.fused), len(report.sites), strip)
    for op_type, times in Counter(s.op_type for s in report.fused).items():
        console.say("  {} x {}", times, op_type)
    _verified(console, report)
    _selected(console, report)
    if console.verbose:
        sites(console, report.sites, explain=True)
        selections(console, report.selections, explain=True)
    for entry in report.assumed:
        console.say("  [yellow]assumed[/yellow], as the caller asserts: {}", entry)
    for reason, times in Counter(s.reason for s in report.refused).most_common():
        console.say("  [red]refused[/red] {} x {}", times, reason)
    for limit, times in Counter(x for s in report.fused for x in s.npu_limits).items():
        console.say("  [yellow]NPU limit[/yellow] at {}: {}", count(times, "site"), limit)
    console.say(
        "nodes {} -> {}; weights read: {}",
        report.nodes_before,
        report.nodes_after,
        human_bytes(report.weights_bytes_read),
    )
    for note in (*report.notes, *_changed(report)):
        console.say("note: {}", note)
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items())
    if stages:
        console.say(stages, style="dim")
    if report.path:
        console.say("written: [bold]{}[/bold]", report.path)
    if not report.fused and not report.indexers:
        console.say("see why: sfa-onnx inspect {} --explain", shlex.quote(str(path)), style="dim")


def _selected(console: Console, report: FuseReport) -> None:
    """The indexers of a fusion."""
    if report.selections:
        done, total = len(report.indexers), len(report.selections)
        console.say("{}/{} selections are NPULightningIndexer now", done, total)
    margins = [s.record.margin for s in report.indexers if s.record and s.record.margin is not None]
    if margins:
        text = "  verified in float64: at least {} of the largest score behind the last key taken"
        console.say(text, f"{min(margins):.1e}")
    refused = (s.reason for s in report.selections if s.status == "refused")
    for reason, times in Counter(refused).most_common():
        console.say("  [red]refused[/red] {} x {}", times, reason)
    for limit, times in Counter(x for s in report.indexers for x in s.npu_limits).items():
        console.say("  [yellow]NPU limit[/yellow] at {}: {}", count(times, "site"), limit)


def _verified(console: Console, report: FuseReport) -> None:
    records = [s.record for s in report.fused if s.record]
    probes = [p for r in records if not r.shared_with for p in r.probes]
    if probes:
        worst = max(p.error for p in probes)
        classes = sum(1 for r in records if not r.shared_with)
        console.say(
            "  verified in float64: {}, {}, worst relative error {}",
            count(classes, "class", "es"),
            count(len(probes), "probe"),
            f"{worst:.1e}",
        )
    elif report.fused:
        console.say("  [yellow]not verified by execution[/yellow]")


def _changed(report: FuseReport) -> list[str]:
    return [f"interface: {line}" for line in (*report.changed_inputs, *report.changed_outputs)]


def kv_report(console: Console, report: Any) -> None:
    """The outcome of kv-cache."""
    kinds = Counter(n.op_type for n in report.model.graph.node if n.domain == DOMAIN_NPU)
    held = ", ".join(f"{times} x {kind}" for kind, times in kinds.items())
    console.say("{} -> {}, form {}", count(report.sites, "site"), held, report.form)
    for label, old, new in (
        ("inputs", report.removed_inputs, report.added_inputs),
        ("outputs", report.removed_outputs, report.added_outputs),
    ):
        if old or new:
            console.say("  {}: {} -> {}", label, ", ".join(old) or "-", ", ".join(new) or "-")
    if report.bytes_per_token_before:
        console.say(
            "  cache: {} -> {} bytes per token",
            report.bytes_per_token_before,
            report.bytes_per_token_after,
        )
    for note in report.notes:
        console.say("  note: {}", note)


def doctor_report(console: Console, report: Any) -> None:
    """The outcome of doctor."""
    rows = [
        (p.topic, p.name, Text(*MARKS.get(p.state, ("·", "dim"))), p.text) for p in report.probes
    ]
    console.table(("", "", "", ""), rows)
    if not report.healthy:
        console.say("[red]something needed is missing[/red]; see the ✗ lines above")
