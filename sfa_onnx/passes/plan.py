"""An editable plan: which sites to fuse, by stable id.

A plan is a small YAML file (the subset below, so that no YAML package is needed) or the same as
JSON. Deleting a site, or writing `fuse: false`, leaves it as it is.

    version: 1
    model: "model.onnx"
    assume: "two-valued:attention_mask"
    sites:
      - id: "/layers.0/attn/Softmax"
        fuse: true
        op: "NPUSparseFlashAttention"
        layer: "layers.0.attn"
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfa_onnx.errors import UsageError
from sfa_onnx.files.json_form import form_problem, parsed
from sfa_onnx.files.model import atomic_write
from sfa_onnx.guard.doors import door
from sfa_onnx.report import FuseReport

__all__ = ["Plan", "read_plan", "write_plan"]

_VERSION = 1
_HEADER = (
    "# Sites of sfa-onnx. Delete a site or set fuse: false to leave it as it is; then run\n"
    "# sfa-onnx fuse MODEL --plan THIS_FILE. Refused sites are listed as comments.\n"
)


@dataclass(frozen=True)
class Plan:
    """Site ids that a plan file asks for, and what it asserts about inputs (`fuse(assume=)`)."""

    path: Path
    chosen: tuple[str, ...]
    assume: tuple[str, ...] = ()

    def check_against(self, known: Iterable[str]) -> None:
        """Every chosen site must be a candidate of the model.

        Raises:
            UsageError: the plan belongs to another model, or an id was mistyped.
        """
        present = set(known)
        missing = [site for site in self.chosen if site not in present]
        if missing:
            some = ", ".join(repr(m) for m in missing[:3])
            raise UsageError(
                f"{self.path}: {len(missing)} sites of the plan are not candidates of this model"
                f" ({some}); write a new plan with `sfa-onnx inspect MODEL --plan PLAN`"
            )


@door
def write_plan(report: FuseReport, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the sites that would fuse; the others appear as comments with their reasons.

    The format follows the file name: `.json`, else YAML.

    Raises:
        UsageError: the file exists and `force` is not set.
    """
    target = Path(path)
    sites = [
        {"id": s.site_id, "fuse": True, "op": s.op_type, "layer": s.layer}
        for s in (*report.fused, *report.indexers)
    ]
    if target.suffix == ".json":
        head = {"version": _VERSION} | (
            {"assume": " ".join(report.assumed)} if report.assumed else {}
        )
        text = json.dumps({**head, "sites": sites}, indent=2) + "\n"
    else:
        lines = [f"version: {_VERSION}"]
        if report.assumed:
            lines.append(f"assume: {json.dumps(' '.join(report.assumed))}")
        lines.append("sites:" if sites else "sites: []")
        for site in sites:
            pairs = [f"{key}: {json.dumps(value)}" for key, value in site.items()]
            lines += [f"  - {pairs[0]}", *(f"    {pair}" for pair in pairs[1:])]
        for s in (*report.refused, *(s for s in report.selections if s.status == "refused")):
            lines.append(f"# refused: {json.dumps(s.site_id)}: {s.reason}".replace("\n", " "))
        text = _HEADER + "\n".join(lines) + "\n"
    atomic_write(target, text.encode(), force=force)
    return target


@door
def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan.

    Raises:
        UsageError: no such file, another version, or a line that is not a plan's.
    """
    source = Path(path)
    if not source.is_file():
        raise UsageError(f"{source}: the plan file does not exist")
    try:
        text = source.read_text(encoding="utf-8")
        document = parsed(text) if text.lstrip().startswith("{") else _parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"{source}: not a plan file: {error}") from error
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise UsageError(
            f"{source}: plan version {document.get('version')!r}; this release reads {_VERSION}"
        )
    sites = document.get("sites") or []
    if problem := form_problem(sites, [{"id": str, "?fuse": bool}], "sites"):
        raise UsageError(f"{source}: a site needs an id (text) and fuse: true|false: {problem}")
    chosen = [site["id"] for site in sites if site.get("fuse", True)]
    assume = document.get("assume") or ""
    if not isinstance(assume, str):
        raise UsageError(f"{source}: assume is text, entries apart by spaces: {assume!r}")
    return Plan(source, tuple(chosen), tuple(assume.split()))


def _parse_yaml(text: str) -> dict[str, Any]:
    """The subset of YAML that plans use: top-level keys and one list of flat mappings."""
    document: dict[str, Any] = {}
    items: list[dict[str, Any]] | None = None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.rstrip()
        body = line.strip()
        if not body or body.startswith("#") or body == "---":
            continue
        is_item = body.startswith("- ")
        key, colon, value = (body[2:] if is_item else body).partition(":")
        if not colon:
            raise ValueError(f"line {number}: expected 'key: value', got {body!r}")
        key = key.strip()
        if not is_item and not line.startswith(" "):
            document[key] = [] if not value.strip() else _scalar(value, number)
            items = document[key] if isinstance(document[key], list) else None
            continue
        if items is None or (not is_item and not items):
            raise ValueError(f"line {number}: {body!r} belongs to no list")
        if is_item:
            items.append({})
        items[-1][key] = _scalar(value, number)
    return document


def _scalar(text: str, number: int) -> Any:
    """A quoted string, number, boolean, empty list or bare text."""
    value = text.strip()
    if value.startswith('"'):
        try:
            result, end = json.JSONDecoder().raw_decode(value)
        except ValueError as error:
            raise ValueError(f"line {number}: bad quoting in {value!r}") from error
        rest = value[end:].strip()
        if rest and not rest.startswith("#"):
            raise ValueError(f"line {number}: text after a quoted value: {rest!r}")
        return result
    value = value.split(" #")[0].strip()
    if value.startswith("'") and value.endswith("'") and len(value) > 1:
        return value[1:-1].replace("''", "'")
    known = {"true": True, "false": False, "yes": True, "no": False, "[]": [], "": None}
    if value.lower() in known:
        return known[value.lower()]
    return int(value) if value.lstrip("-").isdigit() else value
