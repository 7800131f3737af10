"""The recorded facts: which ops are registered, which engines are declared, who parses what.

Data files in `sfa_onnx/ascend/data` say where each fact was read. Nothing here is guessed: what
the files do not say is `None`, and callers turn that into "unknown".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

import onnx

from sfa_onnx.ascend.cann import Cann

__all__ = ["Registration", "arity", "ge_support", "registration"]

_T = onnx.TensorProto


# dtypes the parser maps; anything else is refused as undefined. int4: see Cann.int4.
DATA_TYPES: Final[frozenset[int]] = frozenset((*range(1, 17), _T.FLOAT8E4M3FN, _T.FLOAT8E5M2))
# Known as inputs, but no constant can be made of them.
NO_CONSTANT: Final[frozenset[int]] = frozenset((_T.FLOAT8E4M3FN, _T.FLOAT8E5M2))
# Nodes the parser handles itself, without a plug-in and whatever their domain.
INTERNAL_OPS: Final = frozenset(("Constant", "Input", "FileConstant"))
# A plug-in registers them, but no prototype was seen in the open repositories.
NO_PROTOTYPE: Final = frozenset(("CastLike", "Dropout"))

SHORT_NAMES: Final[dict[int, str]] = {
    _T.FLOAT: "fp32",
    _T.FLOAT16: "fp16",
    _T.BFLOAT16: "bf16",
    _T.DOUBLE: "double",
    _T.FLOAT8E4M3FN: "float8_e4m3fn",
    _T.FLOAT8E5M2: "float8_e5m2",
}


def dtype_name(elem_type: int) -> str:
    """`fp32`, `bf16`, `int64` ...: the spelling of the op repositories."""
    known = SHORT_NAMES.get(elem_type)
    return known or (str(_T.DataType.Name(elem_type)).lower() if elem_type else "?")


@cache
def _load(name: str) -> dict[str, Any]:
    text = resources.files("sfa_onnx.ascend").joinpath("data", name).read_text("utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def _has(ranges: str, version: int) -> bool:
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        if int(low) <= version <= int(high or low):
            return True
    return False


@dataclass(frozen=True)
class Registration:
    """`known` None: the open sources of that release lack the plug-in, so nobody can say."""

    known: bool | None
    ge_types: tuple[str, ...] = ()


def _ge_types(entry: dict[str, Any], version: int) -> tuple[str, ...]:
    ge = entry.get("ge", "")
    if isinstance(ge, dict):
        ge = next((name for name, ranges in ge.items() if _has(ranges, version)), "")
    return tuple(ge.split("|")) if ge else ()


def _in_release(entry: dict[str, Any], version: int, release: str) -> Registration:
    if entry.get("refused"):
        return Registration(False)
    source = entry.get("sources", {}).get(release)
    if source is not None:
        ge = tuple(source["ge"].split("|"))
        return Registration(_has(source["versions"], version), ge)
    if "versions" not in entry:
        return Registration(False)
    known: bool | None = _has(entry["versions"], version)
    if known and release in entry.get("not_open", ()) and release != "9.2":
        known = None
    return Registration(known, _ge_types(entry, version))


@cache
def registration(release: Cann, domain: str, version: int, op_type: str) -> Registration:
    """Whether `domain::version::op_type` has a built-in plug-in, and its GE types."""
    entry = _load("registered_ops.json").get(domain, {}).get(op_type)
    if entry is None:
        return Registration(False)
    found = [_in_release(entry, version, fact) for fact in release.facts]
    known = found[0].known if len({f.known for f in found}) == 1 else None
    return Registration(known, found[-1].ge_types)


def registered_versions(domain: str, op_type: str) -> str:
    """The opset versions with a plug-in ("8-18"), "" when there is none at all."""
    entry = _load("registered_ops.json").get(domain, {}).get(op_type, {})
    return str(entry.get("versions", ""))


@cache
def arity(ge_type: str) -> tuple[int, int | None, int | None] | None:
    """(required inputs, all inputs or None, outputs or None) of a GE prototype; None: not read."""
    entry = _load("ge_arity.json")["arity"].get(ge_type)
    return None if entry is None else (entry[0], entry[1], entry[2])


def ge_types_of(op_type: str) -> tuple[str, ...] | None:
    """The GE types an ONNX op of a DSA model becomes; None: not recorded."""
    entry = _load("op_support.json")["onnx_to_ge"].get(op_type)
    return None if entry is None else tuple(entry)


def ge_support(ge_type: str) -> dict[str, Any] | None:
    """Declared engines and dtypes of a GE type; None: not recorded."""
    entry: dict[str, Any] | None = _load("op_support.json")["ge"].get(ge_type)
    return entry
