"""The outcome of compare -> what a person reads on a terminal."""

from __future__ import annotations

from rich.text import Text

from sfa_onnx.cli.console import Console
from sfa_onnx.runtime.compare.difference import CompareReport, Difference, OutputRow, SiteRow

__all__ = ["compare_report"]

COLUMNS = (
    "",
    "site or output",
    "where",
    "how",
    "max |diff|",
    "relative",
    "1 - cosine",
    "x own rounding",
    "",
)


def compare_report(console: Console, report: CompareReport) -> None:
    """A row per site and output, the worst element of each failure, and a verdict."""
    rows: list[tuple[object, ...]] = []
    rows += [_site(row) for row in report.sites]
    rows += [_output(row) for row in report.outputs]
    console.table(COLUMNS, rows, right=(4, 5, 6, 7))
    for site in report.sites:
        _trouble(console, site)
        if site.loss is not None:
            console.say(
                "{}: relative loss by int8 {} (informational)", site.name, f"{site.loss:.1e}"
            )
    for output in report.outputs:
        _trouble(console, output)
    if console.verbose:
        _in_full(console, report)
    for note in report.notes:
        console.say("note: {}", note)
    colour = "green" if report.passed else "red"
    console.say(f"[bold {colour}]" + "{}[/]", report.verdict)


def _in_full(console: Console, report: CompareReport) -> None:
    """The inputs, and the bounds that each row was held against."""
    console.table(("input", "values"), list(report.inputs.items()))
    measured = [(r.name, r.difference) for r in report.sites]
    measured += [(r.name, r.difference) for r in report.outputs]
    bounds = [
        (name, f"{d.atol:.1e}", f"{d.rtol:.1e}", d.outside) for name, d in measured if d is not None
    ]
    console.table(("tensor", "atol", "rtol", "outside"), bounds, right=(1, 2, 3))


def _site(row: SiteRow) -> tuple[object, ...]:
    who = (row.name, row.layer, row.method)
    if row.difference is None:
        return ("site", *who, *("",) * 4, row.reason or _mark(row.passed))
    return ("site", *who, *_numbers(row.difference), _mark(row.passed))


def _output(row: OutputRow) -> tuple[object, ...]:
    mark = _mark(row.passed) if row.judged else Text("informational", "dim")
    return ("output", row.name, "", row.difference.dtype, *_numbers(row.difference), mark)


def _numbers(found: Difference) -> tuple[str, str, str, str]:
    multiple = f"{found.multiple:.1f}" if found.multiple is not None else ""
    return f"{found.max_abs:.2e}", f"{found.relative:.1e}", f"{found.cosine:.1e}", multiple


def _mark(passed: bool) -> Text:
    return Text("✓ same", "green") if passed else Text("✗ different", "red")


def _trouble(console: Console, row: SiteRow | OutputRow) -> None:
    found = row.difference
    if row.passed or found is None:
        return
    console.say(
        "[red]{}[/red] {}: {} elements outside atol {} / rtol {}; worst at {}: {} before, {} after",
        row.name, list(found.shape), found.outside, f"{found.atol:.1e}", f"{found.rtol:.1e}",
        list(found.worst_index), f"{found.worst_before:.6g}", f"{found.worst_after:.6g}",
    )  # fmt: skip
    if not found.nonfinite_equal:
        console.say("    NaN or infinities stand in other places")
