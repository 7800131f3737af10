"""Which engine takes a GE operator, on which chip, in which dtypes - and what says so.

GE asks AI Core, then AI CPU, then itself, and takes the first that lists the operator with its
dtypes. The table (`data/op_support.json`) keeps for every cell its evidence class and the release
it was read in; `scripts/op_support.py` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sfa_onnx.ascend.checks.facts import ge_support

__all__ = ["FAMILIES", "Cell", "cell", "folds"]

# SoC family -> name of the chips in it, as ATC spells them.
FAMILIES: Final = {"A2": "ascend910b", "A3": "ascend910_93", "950": "ascend950"}
# CANN line -> how definitions and kernels in the open repositories name its release.
_RELEASES: Final = {"8.5": "8.5.0", "9.0": "9.0.0", "9.1": "9.1.0", "9.2": "main"}
_ORDER: Final = tuple(_RELEASES.values())

_Table = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One cell.

    `engine` is AI Core | AI CPU | GE (no kernel: GE resolves the node) | none (listed nowhere) |
    unknown; `evidence` is listing | opdef | source | documented | unknown; `release` is where the
    statement was read.
    """

    engine: str
    evidence: str
    note: str = ""
    release: str = ""


def folds(ge_type: str) -> bool:
    """Whether GE may evaluate the operator itself when all its inputs are constants."""
    entry = ge_support(ge_type)
    return entry is not None and bool(entry.get("folds") or entry.get("ge_local"))


def cell(
    ge_type: str, dtypes: tuple[str, ...], family: str, line: str = "9.1", *, declined: str = ""
) -> Cell:
    """The cell of one GE type for the dtypes of its inputs, in order ("" where unknown).

    `declined`: why the AI Core kernel refuses this node although its dtypes are listed.
    """
    entry, soc = ge_support(ge_type), FAMILIES[family]
    if entry is None:
        return Cell("unknown", "unknown", "not recorded")
    if soc in entry.get("recipes_package", ()):
        note = "by the recipes package, which must be installed"
        return Cell("AI Core", "opdef", note, "9.1.0")
    chip = entry.get(soc)
    if chip is None:
        return _documented(entry, soc)
    notes = [declined] if declined else []
    if chip.get("engine") == "ai_core":
        found = None if declined else _on_core(chip, dtypes, line, notes)
        if found is not None:
            return found
    return _elsewhere(entry, chip, dtypes, line, notes)


def _documented(entry: _Table, soc: str) -> Cell:
    """What the operator's own product table says of a chip that no listing or definition names."""
    said = entry.get("doc", {}).get(soc)
    if said == "yes":
        return Cell("unknown", "documented", "the product table says yes; engine not shown")
    note = "documented: no, unconfirmed (the table may speak of the opened kernel only)"
    return Cell("unknown", "unknown", note if said == "no" else "no listing names this chip")


def _on_core(chip: _Table, dtypes: tuple[str, ...], line: str, notes: list[str]) -> Cell | None:
    if not _covers(chip, line):
        notes.append(f"first seen for this chip in {chip['release']}")
        return None
    listed = _listed(chip, dtypes)
    newer = chip.get("newer_dtypes")
    if listed is False and newer and _reaches(line, newer["release"]):
        listed = _listed(newer, dtypes)
    if listed is False:
        notes.append(f"AI Core lists other types than {_shown(dtypes)}")
        return None
    note = "" if listed else "types not checked"
    return Cell("AI Core", chip["evidence"], note, chip["release"])


def _covers(chip: _Table, line: str) -> bool:
    """Whether the statement holds for the line: listings are taken to last, definitions are not."""
    release, defined = _RELEASES[line], chip.get("opdef")
    if defined == "all" or (defined and release in defined):
        return True
    if chip["evidence"] != "listing":
        return not defined
    return "8.1.RC1" in (chip["release"], *chip.get("listed", ())) or line != "8.5"


def _reaches(line: str, release: str) -> bool:
    at = release if release in _ORDER else "main"
    return _ORDER.index(_RELEASES[line]) >= _ORDER.index(at)


def _elsewhere(
    entry: _Table, chip: _Table, dtypes: tuple[str, ...], line: str, notes: list[str]
) -> Cell:
    """AI CPU, then GE itself, else nowhere."""
    for store in ("ai_cpu", "ai_cpu_tensorflow"):
        kernel = entry.get(store)
        if kernel is None or not _in_store(kernel, line):
            continue
        listed = _listed(kernel | {"independent": True}, dtypes)
        newer = kernel.get("newer_dtypes")
        if listed is False and newer and _reaches(line, newer["release"]):
            listed = _listed(newer | {"independent": True}, dtypes)
        if listed is not False:
            return Cell("AI CPU", kernel["evidence"], "; ".join(notes), kernel["release"])
    if entry.get("ge_local") or chip.get("engine") == "ge_local":
        return Cell("GE", chip["evidence"], "", chip["release"])
    if chip.get("engine") == "ai_cpu":
        return Cell("AI CPU", chip["evidence"], "; ".join(notes), chip["release"])
    if chip.get("engine") == "none":
        notes.append("the complete listings of this chip name no engine: a graph pass rewrites it")
    elif notes and notes[-1].startswith("first seen"):
        return Cell("unknown", "unknown", "; ".join(notes), chip["release"])
    return Cell("none", chip["evidence"], "; ".join(notes), chip["release"])


def _in_store(kernel: _Table, line: str) -> bool:
    return kernel["evidence"] == "listing" or _RELEASES[line] in kernel.get("kernel_source", ())


def _shown(dtypes: tuple[str, ...]) -> str:
    return ", ".join(d or "?" for d in dtypes)


def _listed(table: _Table, dtypes: tuple[str, ...]) -> bool | None:
    """Whether the dtypes are a row of the table; None: it does not say, or no dtype is known."""
    lists: dict[str, Any] = table.get("inputs", {})
    given = {n: d for n, d in zip(lists, dtypes, strict=False) if d and lists[n]}
    if not given:
        return None
    groups = [[n] for n in lists] if table.get("independent") else table.get("groups")
    groups = groups or [list(lists)]
    for group in groups:
        members = [n for n in given if _root(lists, n) in group or n in group]
        if members and not _has_column(lists, members, given):
            return False
    return True


def _root(lists: dict[str, Any], name: str) -> str:
    """The input whose list this one repeats ("=x")."""
    at = lists.get(name)
    return at[1:] if isinstance(at, str) else name


def _has_column(lists: dict[str, Any], members: list[str], given: dict[str, str]) -> bool:
    columns = {n: lists.get(_root(lists, n), []) for n in members}
    columns = {n: c for n, c in columns.items() if isinstance(c, list) and c}
    width = max((len(c) for c in columns.values()), default=1)
    return any(
        all(c[i if len(c) > 1 else 0] == given[n] for n, c in columns.items())
        for i in range(width)
        if all(len(c) in (1, width) for c in columns.values()) or width == 1
    )
