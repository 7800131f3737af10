"""What an installed CANN has to offer: version, atc, vendor packages and their order, our targets.

Everything is read from files, the way CANN itself looks them up; nothing is executed. Without CANN
that is said, and nothing is wrong: hand-over folders are written without it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sfa_onnx.ascend.handover.package import LIBRARY, toolkit
from sfa_onnx.operator.op import BINDINGS

__all__ = ["CannProbe", "Vendor", "examine_cann", "vendors"]

_VERSION_FILES = (
    "version.info",
    "ascend_toolkit_install.info",
    "*/ascend_toolkit_install.info",
    "compiler/version.info",
    "runtime/version.info",
    "version.cfg",
)
_VERSION = re.compile(r"^\s*(?:\w*[Vv]ersion\w*)\s*=\s*\[?([\w.]+)", re.MULTILINE)
_MARK = b"NPUKvQuantSparseFlashAttention"  # any build of our plug-in contains it
_NAMESAKE = "SparseFlashAttentionAntiquant"
# What the experimental operator of that name has and ours has not.
_NAMESAKE_SIGNS = ("sparse_seq_lengths_kv", "sparse_shard_size")


State = Literal["ok", "warning", "info"]


@dataclass(frozen=True)
class CannProbe:
    """One line: `state` is "ok", "warning" or "info" (not there, and no fault)."""

    name: str
    state: State
    text: str


@dataclass(frozen=True)
class Vendor:
    """One vendor package in the order CANN loads them."""

    name: str
    path: Path
    origin: str  # "ASCEND_CUSTOM_OPP_PATH", "config.ini", "not listed" or "built-in"


def examine_cann() -> list[CannProbe]:
    """Look at the installed CANN, or say that there is none."""
    home = toolkit() or _usual_place()
    if home is None:
        text = "none here; `sfa-onnx atc` writes everything without it"
        return [CannProbe("CANN toolkit", "info", text)]
    opp = _opp(home)
    found = vendors(opp)
    probes = [_toolkit_probe(home), _atc_probe(), *_vendor_probes(found)]
    probes.append(_plugin_probe(found))
    return [*probes, *_operator_probes(found)]


def _usual_place() -> Path | None:
    for text in ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest"):
        if (Path(text) / "include" / "register" / "register.h").is_file():
            return Path(text)
    return None


def _opp(home: Path) -> Path:
    value = os.environ.get("ASCEND_OPP_PATH")
    return Path(value) if value else home / "opp"


def _toolkit_probe(home: Path) -> CannProbe:
    for pattern in _VERSION_FILES:
        for path in sorted(home.glob(pattern)):
            found = _VERSION.search(path.read_text(encoding="utf-8", errors="replace"))
            if found:
                return CannProbe("CANN toolkit", *_judge_version(found[1], home))
    return CannProbe("CANN toolkit", "warning", f"{home}, version not found")


def _judge_version(version: str, home: Path) -> tuple[State, str]:
    parts = [int(p) for p in re.findall(r"\d+", version)[:2]]
    if len(parts) == 2 and parts < [8, 5]:
        need = "8.5.0 is the first release with KvQuantSparseFlashAttention"
        return "warning", f"{version} at {home}; {need}"
    return "ok", f"{version} at {home}"


def _atc_probe() -> CannProbe:
    found = shutil.which("atc")
    if found:
        return CannProbe("atc", "ok", found)
    return CannProbe("atc", "warning", "not on PATH: source CANN's set_env.sh")


def vendors(opp: Path) -> list[Vendor]:
    """Vendor packages in load order: custom paths, then config.ini, then those nobody lists."""
    found = []
    for text in os.environ.get("ASCEND_CUSTOM_OPP_PATH", "").split(":"):
        if text:
            found.append(Vendor(Path(text).name, Path(text), "ASCEND_CUSTOM_OPP_PATH"))
    folder = opp / "vendors"
    listed = _load_priority(folder / "config.ini")
    found += [Vendor(name, folder / name, "config.ini") for name in listed]
    if folder.is_dir():
        rest = sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in listed)
        found += [Vendor(p.name, p, "not listed") for p in rest]
    return [*found, Vendor("built-in", opp / "built-in", "built-in")]


def _load_priority(path: Path) -> list[str]:
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, sign, value = line.partition("=")
        if sign and key.strip() == "load_priority":
            return [name.strip() for name in value.split(",") if name.strip()]
    return []


def _vendor_probes(found: list[Vendor]) -> Iterator[CannProbe]:
    for place, vendor in enumerate(v for v in found if v.origin != "built-in"):
        name = f"vendor {place + 1}: {vendor.name}"
        if vendor.origin == "not listed":
            text = f"{vendor.path} is not in config.ini's load_priority: CANN does not load it"
            yield CannProbe(name, "warning", text)
        elif not vendor.path.is_dir():
            yield CannProbe(name, "warning", f"{vendor.path} ({vendor.origin}) does not exist")
        else:
            yield CannProbe(name, "ok", f"{vendor.path} ({vendor.origin})")


def _loaded(found: list[Vendor]) -> list[Vendor]:
    return [v for v in found if v.origin != "not listed" and v.path.is_dir()]


def _plugin_probe(found: list[Vendor]) -> CannProbe:
    ours = []
    for vendor in _loaded(found):
        for library in sorted((vendor.path / "framework").rglob("*.so")):
            if vendor.origin != "built-in" and _MARK in library.read_bytes():
                ours.append(library)
    if not ours:
        text = f"not visible: source opp/vendors/sfa_onnx/bin/set_env.bash (needs {LIBRARY})"
        return CannProbe("our plug-in", "warning", text)
    if len(ours) > 1:
        text = f"found {len(ours)} times; the first wins: {', '.join(map(str, ours))}"
        return CannProbe("our plug-in", "warning", text)
    return CannProbe("our plug-in", "ok", str(ours[0]))


def _ops_info(vendor: Vendor) -> dict[str, Any]:
    """Operator type -> its ops-info entry, of every chip the package has kernels for."""
    entries: dict[str, Any] = {}
    pattern = "op_impl/ai_core/tbe/config/*/*ops-info*.json"
    for path in sorted(vendor.path.glob(pattern)):
        try:
            content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except ValueError:
            continue
        if isinstance(content, dict):
            entries |= content
    return entries


def _operator_probes(found: list[Vendor]) -> Iterator[CannProbe]:
    tables = [(vendor, _ops_info(vendor)) for vendor in _loaded(found)]
    for binding in BINDINGS:
        holders = [(v, info[binding.ge_type]) for v, info in tables if binding.ge_type in info]
        name = f"operator {binding.ge_type}"
        if not holders:
            text = f"not found in any loaded package; it comes with {binding.since}"
            # The recipes package is a choice, the built-ins come with the chip's operator package.
            state: State = "info" if binding.name == "recipes" else "warning"
            yield CannProbe(name, state, text)
            continue
        yield _holder_probe(name, binding.ge_type, holders)


def _holder_probe(name: str, ge_type: str, holders: list[tuple[Vendor, Any]]) -> CannProbe:
    first, entry = holders[0]
    where = f"{first.name} ({first.origin})"
    if ge_type == _NAMESAKE and _is_namesake(entry):
        text = (
            f"{where} holds the experimental namesake (other inputs and meaning), not the recipes"
            " operator; use --binding kv-quant, or load the recipes package before it"
        )
        return CannProbe(name, "warning", text)
    if len(holders) > 1:
        others = ", ".join(v.name for v, _ in holders[1:])
        return CannProbe(name, "warning", f"{where} wins over {others}")
    return CannProbe(name, "ok", where)


def _is_namesake(entry: Any) -> bool:
    text = json.dumps(entry)
    return any(sign in text for sign in _NAMESAKE_SIGNS)
