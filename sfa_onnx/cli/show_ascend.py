"""Reports about the way to the device -> what a person reads on a terminal."""

from __future__ import annotations

from typing import Any

from sfa_onnx.ascend.checks import CheckReport, Finding
from sfa_onnx.ascend.checks.finding import leading
from sfa_onnx.ascend.estimate import Estimate
from sfa_onnx.cli.console import Console, count, human_bytes

__all__ = ["check_report", "estimate_report", "handover_report"]

COLOURS = {"error": "red", "unknown": "magenta", "warning": "yellow", "info": "dim"}
VERDICTS = {
    "errors": "[red]would not convert as it is[/red]",
    "unknown": "[magenta]no known obstacle, but not everything is known[/magenta]",
    "warnings": "[yellow]no known obstacle; read the warnings[/yellow]",
    "clean": "[green]no known obstacle[/green]",
}
PARSER = {"accepted": "accepts it", "rejected": "refuses it:", "crash": "crashes on it"}
SHOWN_NODES = 3


def check_report(console: Console, report: CheckReport, *, tried: bool) -> None:
    """Findings, worst first, and a line of verdict; unknown never looks green.

    `tried`: the file is what `--fix` wrote, so what is left could not be repaired.
    """
    console.say(
        f"checked for CANN {report.cann}, {report.soc_version or 'all chips'},"
        f" flavour {report.flavour}; CANN's parser {PARSER[report.parser]} {report.code}".rstrip()
    )
    for family, line in report.summary.items():
        console.say("{}: {}", family, line)
    shown = leading(report.findings)
    for finding, following in zip(shown, [*shown[1:], None], strict=True):
        same = following is not None and (following.rule, following.hint) == (
            finding.rule,
            finding.hint,
        )
        _finding(console, finding, hint=not same)
    rows = console.verbose and [
        (row.op_type, row.count, ", ".join(row.dtypes), *_engines(row)) for row in report.support
    ]
    if rows:
        families = list(report.support[0].engines)
        console.table(("operator", "nodes", "types", *families), rows, right=(1,))
    console.say("verdict: " + _verdict(report))
    if not rows and report.support:
        console.say("-v lists where each operator would run, as far as that is known", style="dim")
    if report.fixable:
        found = count(len(report.fixable), "finding")
        step = (
            "kept: no exact repair applies to it" if tried else "can be fixed: run again with --fix"
        )
        console.say("{} {}", found, step, style="dim")


def _verdict(report: CheckReport) -> str:
    """One line; what converts without an error and means something else is told apart."""
    stages = {f.stage for f in report.of("error") if f.rule != "shape-contradiction"}
    if report.parser == "accepted" and stages == {"meaning"}:
        return "[red]would convert, without an error, to something else than the file means[/red]"
    return VERDICTS[report.verdict]


def _engines(row: Any) -> list[str]:
    said = {f: f"{row.evidence[f]} {row.releases.get(f, '')}".strip() for f in row.engines}
    return [f"{engine} ({said[family]})" for family, engine in row.engines.items()]


def _finding(console: Console, finding: Finding, *, hint: bool) -> None:
    """`hint`: say what helps, which the last of several findings does for all."""
    colour = COLOURS[finding.severity]
    code = f" {finding.code}" if finding.code else ""
    console.say(
        "[{}]{}{}[/{}] {}: {}",
        colour,
        finding.severity,
        code,
        colour,
        finding.rule,
        finding.message,
    )
    names = finding.nodes or ((finding.node,) if finding.node else ())
    if names:
        more = f" and {len(names) - SHOWN_NODES} more" if len(names) > SHOWN_NODES else ""
        console.say("    at {}{}", ", ".join(names[:SHOWN_NODES]), more, style="dim")
    if hint and finding.hint:
        console.say("    -> {}", finding.hint, style="dim")


def handover_report(console: Console, report: Any, *, kept: bool = True) -> None:
    """What was written for ATC, and what a person does next; `kept`: the files stay."""
    for line in report.lines() if kept else report.facts():
        console.say("{}", line)


def estimate_report(console: Console, report: Estimate) -> None:
    """The roofline model per site, labelled as what it is."""
    console.say("[bold]{}[/bold] ({}): {}", report.soc_version, report.chip.name, report.label)
    rows = [
        (
            site.node, site.keys, human_bytes(site.bytes_per_token), f"{site.flop_per_byte:.0f}",
            site.bound, f"{site.us_per_token:.1f}", "?" if site.us is None else f"{site.us:.1f}",
        )
        for site in report.sites
    ]  # fmt: skip
    if rows:
        head = ("site", "keys", "bytes/token", "FLOP/byte", "bound by", "us/token a core", "us")
        console.table(head, rows, right=(1, 2, 3, 5, 6))
    else:
        console.say("no fused operator in this model")
    _layers(console, report)
    for copy in report.copies:
        size = "?" if copy.bytes is None else human_bytes(copy.bytes)
        console.say("copied whole at every call: {} -> {}, {}", copy.input, copy.output, size)
    for note in report.notes:
        console.say("note: {}", note)


def _layers(console: Console, report: Estimate) -> None:
    """Nodes and copies of the whole layer per CANN line, before -> after."""
    rows = []
    for line in report.layers:
        costs = [line.before, *([line.after] if line.after else [])]
        counts = [[c.engines.get(e, 0) for c in costs] for e in ("AI Core", "AI CPU", "GE")]
        sizes = [c.copied_bytes for c in costs]
        copied = " -> ".join("?" if s is None else human_bytes(s) for s in sizes)
        names = ", ".join(f"{n} x{c}" if c > 1 else n for n, c in costs[-1].on_ai_cpu.items())
        shown = [" -> ".join(map(str, c)) for c in ([c.nodes for c in costs], *counts)]
        rows.append((line.cann, *shown, copied, names if line.after else line.note))
    if rows:
        head = ("CANN", "nodes", "AI Core", "AI CPU", "GE", "caches copied", "left on AI CPU")
        console.table(head, rows)
