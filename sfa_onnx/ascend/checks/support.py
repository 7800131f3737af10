"""The core table: which engine would run an op, on which SoC, in which dtype - and who says so.

A row is an ONNX op with its dtypes: what it becomes in GE (`routes.py` follows the graph passes),
and the engine of that (`engines.py`). What GE computes itself while compiling, because all inputs
are constants, needs no engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sfa_onnx.ascend.checks.constness import constant_values
from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.engines import FAMILIES, Cell, cell, folds
from sfa_onnx.ascend.checks.facts import (
    INTERNAL_OPS,
    dtype_name,
    ge_types_of,
    registered_versions,
)
from sfa_onnx.ascend.checks.finding import Finding, Severity, SupportRow
from sfa_onnx.ascend.checks.plugin import EXPANSIONS
from sfa_onnx.ascend.checks.routes import Route, route
from sfa_onnx.ascend.chips import family_of
from sfa_onnx.operator.op import KV_CACHE_PACK, KV_CACHE_WRITE

__all__ = ["FAMILIES", "cell", "families", "layer_summary", "support_findings", "support_rows"]

# Ops that GE resolves by itself: no engine runs them, whatever the dtype.
_FREE: Final = frozenset(("If", "Identity"))
# What the canonical node becomes when it has to go through the ATC flavour first.
_RECIPES: Final = "SparseFlashAttentionAntiquant"
_BUILT_IN: Final = "KvQuantSparseFlashAttention"
_NO_KERNEL: Final = frozenset(("PartitionedCall", ""))
# GE types whose inputs stand in another order than those of the ONNX op, or are fewer.
_OTHER_ORDER: Final = frozenset(("Split",))
# GE types that take the first input only, or the others in types of their own (k as int32).
_FIRST_ONLY: Final = frozenset(("SplitVD", "StridedSliceD", "TopK", "TopKD"))
_RANKS: Final = ("unknown", "none", "AI CPU", "AI Core", "GE")  # the worst engine of a node first


def families(soc_version: str) -> tuple[str, ...]:
    """The family of a SoC version; all of them when it is ""."""
    return (family_of(soc_version),) if soc_version else tuple(FAMILIES)


def _ge_types(ctx: Context, node: Node) -> tuple[str, ...]:
    plugin = ctx.plugin(node)
    if plugin is not None and plugin.ge_type == _RECIPES and not ctx.takes_as_is(node):
        return (_BUILT_IN,)
    if plugin is not None and plugin.expands_to:
        return plugin.expands_to
    if plugin is not None:
        return (plugin.ge_type,) if plugin.ge_type not in _NO_KERNEL else ()
    registered = ctx.registration(node)
    if registered.known is False and not registered_versions(node.domain, node.op_type):
        return ()
    named = tuple(t for t in registered.ge_types if t not in _NO_KERNEL)
    return named or ge_types_of(node.op_type) or ()


@dataclass(frozen=True)
class _Kind:
    """Nodes that share a row."""

    op_type: str
    dtypes: tuple[str, ...]
    ge_types: tuple[str, ...]
    routes: tuple[tuple[str, Route], ...]  # family -> what it runs as
    folded: bool


def support_rows(ctx: Context) -> list[SupportRow]:
    """One row per op type, dtypes and engine of the model, in order of first use."""
    groups: dict[_Kind, int] = {}
    constants = constant_values(ctx.view)
    for node in ctx.nodes():
        if node.op_type in INTERNAL_OPS:
            continue
        kind = _kind(ctx, node, constants)
        groups[kind] = groups.get(kind, 0) + 1
    return [_row(ctx, kind, count) for kind, count in groups.items()]


def _kind(ctx: Context, node: Node, constants: set[tuple[str, str]]) -> _Kind:
    dtypes = tuple(
        dtype_name(e) if name and (e := ctx.view.dtype(node.scope, name)) else ""
        for name in node.proto.input
    )
    if node.op_type in _FREE and node.domain == "ai.onnx":
        return _Kind(node.op_type, dtypes, (), (), folded=True)
    types = _ge_types(ctx, node)
    known = all((node.scope.path, o) in constants for o in node.proto.output if o)
    folded = known and bool(types) and all(folds(t) for t in types)
    routes = tuple((f, _route(ctx, node, types, f)) for f in families(ctx.soc_version))
    return _Kind(node.op_type, dtypes, types, routes, folded)


def _route(ctx: Context, node: Node, types: tuple[str, ...], family: str) -> Route:
    if ctx.plugin(node) is not None or not ctx.well_formed(node):
        return Route(types)
    return route(ctx, node, types, family)


def _row(ctx: Context, kind: _Kind, count: int) -> SupportRow:
    engines, evidence, releases, notes = {}, {}, {}, []
    if kind.folded:
        for family in families(ctx.soc_version):
            engines[family], evidence[family], releases[family] = "GE", "source", ""
        note = "computed while compiling" if kind.routes else ""
        return SupportRow(
            kind.op_type, kind.dtypes, count, kind.ge_types, engines, evidence, note, releases
        )
    for family, way in kind.routes:
        cells = _cells(ctx, kind, way, family)
        worst = min(cells, key=lambda c: _RANKS.index(c.engine))
        engines[family], evidence[family] = worst.engine, worst.evidence
        releases[family] = worst.release
        notes += [n for n in (*(c.note for c in cells), way.note) if n]
    note = "; ".join(dict.fromkeys(notes))
    return SupportRow(
        kind.op_type, kind.dtypes, count, kind.ge_types, engines, evidence, note, releases
    )


def _cells(ctx: Context, kind: _Kind, way: Route, family: str) -> list[Cell]:
    if not way.types:
        return [Cell("none", "unknown", "no plug-in parses it")]
    declined = dict(way.declined)
    line = ctx.cann.version
    # Of the inner nodes of an expansion only the first one's types are those of the node.
    types = tuple(t for t in way.types if t not in _FREE) or way.types
    several = len(way.types) > 1
    if kind.ge_types == EXPANSIONS[KV_CACHE_WRITE.name]:  # the rest are views and their shapes
        pages, _, slots = (*kind.dtypes, "", "", "")[:3]
        return [cell("ScatterNdUpdate", (pages, slots, pages), family, line)]
    pack = kind.ge_types == EXPANSIONS[KV_CACHE_PACK.name]
    made = []
    names = _pack_types(types, family) if pack else types
    for place, name in enumerate(names):
        first = place == 0 and name == way.types[0]
        dtypes = kind.dtypes[:1] if several and first else () if several else kind.dtypes
        dtypes = () if pack or name in _OTHER_ORDER else dtypes
        dtypes = dtypes[:1] if name in _FIRST_ONLY else dtypes
        made.append(cell(name, dtypes, family, line, declined=declined.get(name, "")))
    return made


def _pack_types(types: tuple[str, ...], family: str) -> tuple[str, ...]:
    """The inner nodes of a pack that cost something: views go, slices are made static by a pass."""
    slices = "StridedSliceV2" if family == "950" else "StridedSliceD"
    return tuple(slices if t == "StridedSliceV2" else t for t in types if t != "Reshape")


def layer_summary(rows: list[SupportRow]) -> dict[str, str]:
    """SoC family -> "N nodes: a on AI Core, b on AI CPU (names), c resolved by GE, d unknown"."""
    found: dict[str, str] = {}
    for family in dict.fromkeys(f for row in rows for f in row.engines):
        total = sum(row.count for row in rows)
        counts = dict.fromkeys(_RANKS, 0)
        for row in rows:
            counts[row.engines[family]] += row.count
        names = _names([r for r in rows if r.engines[family] == "AI CPU"])
        nowhere = _names([r for r in rows if r.engines[family] == "none"])
        parts = [f"{counts['AI Core']} on AI Core"]
        parts += [f"{counts['AI CPU']} on AI CPU" + (f" ({names})" if names else "")]
        parts += [f"{counts['GE']} resolved by GE"]
        parts += [f"{counts['none']} listed nowhere ({nowhere})"] if nowhere else []
        found[family] = f"{total} nodes: {', '.join(parts)}, {counts['unknown']} unknown"
    return found


def _names(rows: list[SupportRow]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.op_type] = counts.get(row.op_type, 0) + row.count
    return ", ".join(f"{n} x{c}" if c > 1 else n for n, c in sorted(counts.items()))


def support_findings(rows: list[SupportRow]) -> Iterator[Finding]:
    """One finding per kind of gap and set of ops, SoC families together; what costs comes first."""
    gaps: dict[tuple[str, str], list[SupportRow]] = {}
    for row in rows:
        for family, engine in row.engines.items():
            kind = _gap(row, family, engine)
            if kind:
                gaps.setdefault((kind, family), []).append(row)
    merged: dict[tuple[str, str], list[str]] = {}
    for (kind, family), found in gaps.items():
        merged.setdefault((kind, _shown_rows(found, family)), []).append(family)
    for (kind, ops), where in sorted(merged.items(), key=lambda kv: list(_TEXT).index(kv[0][0])):
        severity, text, hint = _TEXT[kind]
        yield Finding(
            f"engine-{kind}",
            severity,
            "support",
            f"{', '.join(where)}: {text}: {ops}",
            hint=hint,
            evidence="listing" if kind in ("ai-cpu", "nowhere") else kind,
        )


def _gap(row: SupportRow, family: str, engine: str) -> str:
    if engine == "AI CPU":
        return "reshape" if row.op_type == "Reshape" else "ai-cpu"
    if engine == "none":
        return "nowhere" if row.ge_types else ""  # without a plug-in the parser refuses it anyway
    if engine == "unknown":
        return "documented" if row.evidence[family] == "documented" else "unknown"
    return ""


def _shown_rows(rows: list[SupportRow], family: str) -> str:
    """`Add(fp32) x3, Neg(bf16)`, with the release each statement was read in."""
    counts: dict[str, int] = {}
    for row in rows:
        said = row.releases.get(family, "")
        name = f"{row.op_type}({_first(row)}{'; ' + said if said else ''})"
        counts[name] = counts.get(name, 0) + row.count
    return ", ".join(f"{n} x{c}" if c > 1 else n for n, c in sorted(counts.items()))


def _first(row: SupportRow) -> str:
    return next((d for d in row.dtypes if d), "?")


_TEXT: Final[dict[str, tuple[Severity, str, str]]] = {
    "ai-cpu": (
        "warning",
        "runs on AI CPU (slow, and away from the cores)",
        "see whether --fix moves them; keep such ops small and rare, or fuse them away",
    ),
    "reshape": (
        "info",
        "from 9.1.0 on the sources have an AI CPU kernel that is asked before GE drops the node;"
        " whether packages let it win is open",
        "look at the compiled graph for Reshape kernels",
    ),
    "nowhere": (
        "warning",
        "no engine lists these types",
        "cast around the node, or convert once on the target machine to know",
    ),
    "unknown": (
        "unknown",
        "no engine is listed or documented",
        "not a no: closed kernels exist; convert once on the target machine to know",
    ),
    "documented": ("info", "the product table says yes, no listing shows the engine", ""),
}
