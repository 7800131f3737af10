"""Reports written to a file; the name's ending chooses the form."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import onnx

from sfa_onnx.errors import UsageError
from sfa_onnx.files.model import atomic_write, load_model
from sfa_onnx.pages import comparison, fusion, html
from sfa_onnx.pages.sites import Graphs
from sfa_onnx.report import FuseReport
from sfa_onnx.runtime.compare.difference import CompareReport

__all__ = ["page_form", "write_comparison", "write_fusion"]

_Path = str | os.PathLike[str]


def write_fusion(
    report: FuseReport, path: _Path, before: _Path | onnx.ModelProto, *, force: bool = False
) -> None:
    """Write what fusing did.

    Args:
        report: the outcome.
        path: a file ending in .html or .md.
        before: the model as it was, for the pictures.
        force: overwrite `path`.

    Raises:
        UsageError: another ending, or the file exists and `force` is not set.
    """
    name = "model" if isinstance(before, onnx.ModelProto) else Path(before).name
    title = f"{name}: sparse attention fused"
    if page_form(path) == "md":
        return atomic_write(Path(path), fusion.markdown(title, report).encode(), force=force)
    graphs = Graphs(load_model(before)), Graphs(report.model)
    parts = fusion.sections(report, *graphs, _peak_memory())
    return atomic_write(
        Path(path), html.page(title, html.text(fusion.summary(report)), parts).encode(), force=force
    )


def write_comparison(report: CompareReport, path: _Path, *, force: bool = False) -> None:
    """Write what comparing found; arguments and errors as `write_fusion`."""
    title = f"{Path(report.before).name} and {Path(report.after).name}"
    if page_form(path) == "md":
        return atomic_write(Path(path), comparison.markdown(title, report).encode(), force=force)
    mood = "good" if report.passed else "bad"
    verdict = f'<strong class="{mood}">{html.text(report.verdict)}</strong>'
    return atomic_write(
        Path(path), html.page(title, verdict, comparison.sections(report)).encode(), force=force
    )


def page_form(path: _Path) -> str:
    """The form of a page by its name's ending: "html" or "md".

    Raises:
        UsageError: it has another ending.
    """
    ending = Path(path).suffix.lower().lstrip(".")
    if ending not in ("html", "md"):
        raise UsageError(f"{path}: a report is written as .html or .md, not as {ending or 'that'}")
    return ending


def _peak_memory() -> str:
    """The most memory this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB"
