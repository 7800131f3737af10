"""A whole layer on every CANN line: nodes per engine and cache copies, before and after.

Before: the file as it is. After: fused, written for the line and repaired as `sfa-onnx atc` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from sfa_onnx.ascend import checks
from sfa_onnx.ascend.cann import CANN_VERSIONS, cann
from sfa_onnx.ascend.checks.context import Context
from sfa_onnx.ascend.checks.finding import SupportRow
from sfa_onnx.ascend.checks.support import support_rows
from sfa_onnx.ascend.checks.view import ModelView
from sfa_onnx.ascend.chips import Chip
from sfa_onnx.ascend.copies import copies
from sfa_onnx.ascend.flavour.model import convert
from sfa_onnx.errors import SfaError

__all__ = ["LayerCost", "LayerLine", "layer_costs"]


@dataclass(frozen=True)
class LayerCost:
    """Nodes of one file per engine, and the caches copied whole at every call."""

    nodes: int
    engines: dict[str, int]  # "AI Core" | "AI CPU" | "GE" | "none" | "unknown" -> nodes
    on_ai_cpu: dict[str, int]  # op type -> nodes
    copies: int
    copied_bytes: int | None  # read and written; None where dims are open


@dataclass(frozen=True)
class LayerLine:
    """One CANN line; `after` is None where the file has no form for it, `note` says why."""

    cann: str
    before: LayerCost
    after: LayerCost | None
    note: str = ""


def layer_costs(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    chip: Chip,
    soc_version: str,
    dims: Mapping[str, int],
) -> list[LayerLine]:
    """The counts of both models for every CANN line on one chip."""
    lines = []
    view = ModelView(before)
    for line in CANN_VERSIONS:
        first = _cost(view, line, chip, soc_version, dims)
        try:
            model = convert(after, cann=line).model
            report = checks.check(model, cann=line, soc_version=soc_version)
            model, _ = checks.fix(model, report)
        except SfaError as error:
            lines.append(LayerLine(line, first, None, str(error)))
            continue
        lines.append(LayerLine(line, first, _cost(ModelView(model), line, chip, soc_version, dims)))
    return lines


def _cost(
    view: ModelView, line: str, chip: Chip, soc_version: str, dims: Mapping[str, int]
) -> LayerCost:
    ctx = Context(view, cann(line), checks.OWN_PLUGINS, soc_version)
    rows = support_rows(ctx)
    copied = list(copies(ctx, chip, dims))
    sizes = [c.bytes for c in copied]
    known = [s for s in sizes if s is not None]
    return LayerCost(
        sum(r.count for r in rows),
        _counted(rows),
        _names(rows),
        len(copied),
        sum(known) if len(known) == len(sizes) else None,
    )


def _engine(row: SupportRow) -> str:
    return next(iter(row.engines.values()))


def _counted(rows: list[SupportRow]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[_engine(row)] = counts.get(_engine(row), 0) + row.count
    return counts


def _names(rows: list[SupportRow]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        if _engine(row) == "AI CPU":
            counts[row.op_type] = counts.get(row.op_type, 0) + row.count
    return dict(sorted(counts.items()))
