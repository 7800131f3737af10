"""The core table: which engine would run an op, on which SoC, in which dtype - and who says so.

Three kinds of cell. *declared*: an operator definition in the open repositories lists the SoC and
the dtypes. *documented*: only the op's product table says yes. *unknown*: neither; that is no
"no" (older kernels ship closed), and never a "yes" either. Cells of A2 and A3 are unknown unless
shown otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.facts import (
    INTERNAL_OPS,
    dtype_name,
    ge_support,
    ge_types_of,
    registered_versions,
)
from sfa_onnx.ascend.checks.finding import Finding, Severity, SupportRow
from sfa_onnx.ascend.checks.plugin import PACK_EXPANSION
from sfa_onnx.ascend.chips import family_of

__all__ = ["FAMILIES", "cell", "families", "support_findings", "support_rows"]

# SoC family -> name of the chips in it, as ATC spells them.
FAMILIES: Final = {"A2": "ascend910b", "A3": "ascend910_93", "950": "ascend950"}
# Ops that GE resolves by itself: no engine runs them, whatever the dtype.
_FREE: Final = frozenset(("If", "Identity", *INTERNAL_OPS))
# Ops that move no data; that only their AI CPU fallback is declared is no reason to warn.
_VIEWS: Final = frozenset(("Flatten", "Reshape", "Squeeze", "Unsqueeze"))
# What the canonical node becomes when it has to go through the ATC flavour first.
_RECIPES: Final = "SparseFlashAttentionAntiquant"
_BUILT_IN: Final = "KvQuantSparseFlashAttention"
_NO_KERNEL: Final = frozenset(("PartitionedCall", ""))


@dataclass(frozen=True)
class Cell:
    """One cell.

    `engine` is AI Core | AI CPU | unknown | none, `evidence` declared | documented | unknown.
    """

    engine: str
    evidence: str
    note: str = ""


def families(soc_version: str) -> tuple[str, ...]:
    """The family of a SoC version; all of them when it is ""."""
    return (family_of(soc_version),) if soc_version else tuple(FAMILIES)


def cell(ge_type: str, dtypes: tuple[str, ...], family: str, release: str = "") -> Cell:
    """The cell of one GE type for the dtypes of its inputs, in order ("" where unknown)."""
    entry = ge_support(ge_type)
    if entry is None:
        return Cell("unknown", "unknown", "not recorded")
    soc = FAMILIES[family]
    core = entry["ai_core"].get(soc) == "declared"
    if release == "8.5" and "ai_core_8.5" in entry:
        core = core and soc in entry["ai_core_8.5"]
    listed = _listed(entry.get("dtypes"), dtypes)
    if core and listed:
        return Cell("AI Core", "declared")
    if core:
        return Cell("unknown", "unknown", f"AI Core is declared, {_shown(dtypes)} is not shown")
    if soc in entry.get("recipes_package", ()):
        return Cell("AI Core", "declared", "by the recipes package, which must be installed")
    on_cpu = _listed(entry.get("ai_cpu_dtypes"), dtypes)
    defined = "declared" in entry["ai_core"].values()
    if entry["ai_cpu"] == "declared" and on_cpu and not defined:
        return Cell("AI CPU", "declared", "no AI Core definition seen for any SoC")
    documented = entry.get("doc", {}).get(soc)
    refused = False in (listed, on_cpu) and True not in (listed, on_cpu)
    if documented == "yes" and not refused:
        return Cell("unknown", "documented", "the product table says yes; engine not shown")
    note = f"no definition lists {_shown(dtypes)}" if refused else ""
    if documented == "no":
        note = "documented: no, unconfirmed (the table may speak of the opened kernel only)"
    return Cell("unknown", "unknown", note)


def _listed(table: dict[str, list[str]] | None, dtypes: tuple[str, ...]) -> bool | None:
    """Whether each known dtype is in its input's list; None when the table does not say."""
    if not table:
        return None
    known: bool | None = None
    for legal, dtype in zip(table.values(), dtypes, strict=False):
        if not dtype:
            continue
        if legal and dtype not in legal:
            return False
        if not legal:
            return None  # that input's dtypes were not read
        known = True
    return known


def _shown(dtypes: tuple[str, ...]) -> str:
    return ", ".join(d or "?" for d in dtypes)


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


def support_rows(ctx: Context) -> list[SupportRow]:
    """One row per op type and dtypes of the model, in order of first use."""
    groups: dict[tuple[str, tuple[str, ...], tuple[str, ...]], int] = {}
    for node in ctx.nodes():
        if node.op_type in _FREE:
            continue
        dtypes = tuple(
            dtype_name(e) if name and (e := ctx.view.dtype(node.scope, name)) else ""
            for name in node.proto.input
        )
        key = (node.op_type, dtypes, _ge_types(ctx, node))
        groups[key] = groups.get(key, 0) + 1
    return [_row(ctx, *key, count) for key, count in groups.items()]


def _row(
    ctx: Context, op_type: str, dtypes: tuple[str, ...], ge_types: tuple[str, ...], count: int
) -> SupportRow:
    engines, evidence, notes = {}, {}, []
    inner = () if ge_types == PACK_EXPANSION else dtypes  # those of the inner nodes are not known
    for family in families(ctx.soc_version):
        cells = [cell(t, inner, family, ctx.cann.version) for t in ge_types] or [
            Cell("none", "unknown", "no plug-in parses it")
        ]
        worst = min(cells, key=lambda c: ("unknown", "documented", "declared").index(c.evidence))
        engines[family], evidence[family] = worst.engine, worst.evidence
        notes += [c.note for c in cells if c.note]
    note = "; ".join(dict.fromkeys(notes))
    return SupportRow(op_type, dtypes, count, ge_types, engines, evidence, note)


def support_findings(rows: list[SupportRow]) -> Iterator[Finding]:
    """One finding per kind of gap and set of ops, SoC families together."""
    gaps: dict[tuple[str, str], list[SupportRow]] = {}
    for row in rows:
        for family, evidence in row.evidence.items():
            cpu = row.engines[family] == "AI CPU" and row.op_type not in _VIEWS
            kind = "AI CPU" if cpu else evidence
            if kind != "declared" and row.engines[family] != "none":
                gaps.setdefault((kind, family), []).append(row)
    merged: dict[tuple[str, str], list[str]] = {}
    for (kind, family), found in gaps.items():
        merged.setdefault((kind, _shown_rows(found)), []).append(family)
    for (kind, ops), where in sorted(merged.items(), key=lambda kv: _ORDER.index(kv[0][0])):
        severity, text = _TEXT[kind]
        yield Finding(
            f"engine-{kind.lower().replace(' ', '-')}",
            severity,
            "support",
            f"{', '.join(where)}: {text}: {ops}",
            hint=_HINTS[kind],
            evidence="declared" if kind == "AI CPU" else kind,
        )


def _shown_rows(rows: list[SupportRow]) -> str:
    """`Add(fp32) x3, Neg(bf16)`."""
    counts: dict[str, int] = {}
    for row in rows:
        name = f"{row.op_type}({_first(row)})"
        counts[name] = counts.get(name, 0) + row.count
    return ", ".join(f"{n} x{c}" if c > 1 else n for n, c in sorted(counts.items()))


def _first(row: SupportRow) -> str:
    return next((d for d in row.dtypes if d), "?")


_ORDER: Final = ("unknown", "AI CPU", "documented")
_TEXT: Final[dict[str, tuple[Severity, str]]] = {
    "unknown": ("unknown", "no engine is declared or documented"),
    "AI CPU": ("warning", "only an AI CPU kernel is declared (slow)"),
    "documented": ("info", "the product table says yes, no open definition shows the engine"),
}
_HINTS: Final = {
    "unknown": "not a no: closed kernels exist; convert once on the target machine to know",
    "AI CPU": "keep such ops small and rare, or fuse them away",
    "documented": "",
}
