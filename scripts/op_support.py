"""Rebuild sfa_onnx/ascend/data/op_support.json from a recorded listing of CANN's operators.

    python scripts/op_support.py operators.json [--without-8.1.RC1]

The listing has a cell per operator, chip and engine store; taken over are the operators that models
of sparse attention become, with the evidence class and the release of every cell. What rests on the
8.1.RC1 store alone (a third party's copy of an installed toolkit) is marked by its release, and
left out by the switch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

TARGET: Final = Path(__file__).parents[1] / "sfa_onnx" / "ascend" / "data" / "op_support.json"
CHIPS: Final = ("ascend910b", "ascend910_93", "ascend950")
STORES: Final = ("ai_cpu", "ai_cpu_tensorflow")
DOUBTED: Final = "8.1.RC1"
# Beside what standard ONNX operators become: targets of graph passes and the operators a vendor's
# own decoder layer uses.
MORE: Final = (
    "AccumulateNV2", "AddRmsNorm", "Adds", "BatchMatMul", "BatchMatMulV2", "Bitcast", "BitwiseOr",
    "BitwiseXor", "BroadcastTo", "Ceil", "ConcatV2", "DequantSwigluQuant", "DivNoNan",
    "DynamicQuant", "ExpandDims", "Fill", "FlattenV2", "FloorMod", "Gather", "Gelu", "GeluV2",
    "GroupedMatmul", "InplaceAddRmsNorm", "InterleaveRope", "Invert",
    "KvQuantSparseFlashAttention", "KvRmsNormRopeCache", "LayerNormV4", "LeftShift",
    "LightningIndexer", "LpNormV2", "MaskedFill", "MatMulV2", "MlaPrologV3",
    "MoeFinalizeRoutingV2", "MoeGatingTopK", "MoeGatingTopKSoftmax", "MoeInitRouting",
    "MoeInitRoutingV2", "MoeInitRoutingV3", "Muls", "Pack", "PadV3", "QuantBatchMatmulV3",
    "QuantLightningIndexer", "ReduceProd", "ReduceSumD", "ReverseV2", "ReverseV2D", "RmsNorm",
    "RotaryMul", "RotaryPositionEmbedding", "Rsqrt", "ScatterElementsV2", "ScatterNdAdd",
    "ScatterNdMax", "ScatterNdMin", "ScatterNdUpdate", "ScatterPaKvCache", "Select", "SelectV2",
    "Sign", "SparseFlashAttention", "SparseFlashAttentionAntiquant", "SplitVD", "Square",
    "SquareSumV1", "SqueezeV3", "StridedSlice", "StridedSliceD", "StridedSliceV3", "SwiGlu",
    "TensorMove", "TensorScatterUpdate", "TopK", "TopKD", "TopKV2", "TransposeBatchMatMul",
    "TransposeD", "Trilu", "Unsqueeze", "UnsqueezeV3", "Where",
)  # fmt: skip
# Operators of a package that has to be installed, per chip.
RECIPES: Final = {"SparseFlashAttentionAntiquant": ["ascend910b", "ascend910_93"]}
SPELLINGS: Final = {
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "float64": "double",
}
KEPT: Final = (
    *("engine", "evidence", "release", "listed", "opdef", "kernel_source", "inputs", "groups"),
    *("independent", "dtypes_from", "newer_dtypes", "note", "check_8.1.RC1"),
)

Json = dict[str, Any]


def _spelled(value: Any) -> Any:
    if isinstance(value, str):
        return SPELLINGS.get(value, value)
    if isinstance(value, list):
        return [_spelled(v) for v in value]
    return {k: _spelled(v) for k, v in value.items()} if isinstance(value, dict) else value


def _cell(cell: Any, chips: Json) -> Json:
    """One cell with only what the checks read; "as ascend910b" is resolved."""
    if cell is True:  # named by the TensorFlow part of the AI CPU store, no more
        return {"evidence": "listing", "release": DOUBTED}
    kept = {k: _spelled(cell[k]) for k in KEPT if k in cell}
    if "dtypes" in cell:
        other = chips[cell["dtypes"].removeprefix("as ")]
        same = ("inputs", "groups", "independent", "newer_dtypes", "check_8.1.RC1")
        kept |= {k: _spelled(other[k]) for k in same if k in other and k not in kept}
    return kept


def _without_doubted(cell: Json) -> Json | None:
    """The cell without what rests on the 8.1.RC1 store; None when nothing is left."""
    cell = {k: v for k, v in cell.items() if k != "check_8.1.RC1"}
    if str(cell.get("dtypes_from", "")).endswith(DOUBTED):
        cell = {k: v for k, v in cell.items() if k not in ("inputs", "groups", "dtypes_from")}
    if "listed" in cell:
        cell["listed"] = [r for r in cell["listed"] if r != DOUBTED]
    if cell.get("release") != DOUBTED:
        return cell
    if cell.get("opdef"):
        return cell | {"evidence": "opdef", "release": _first(cell["opdef"])}
    if cell.get("kernel_source"):
        return cell | {"evidence": "source", "release": cell["kernel_source"][0]}
    return None


def _first(releases: Any) -> str:
    return "8.5.0" if releases == "all" else str(releases[0])


def _operator(entry: Json, old: Json, doubted: bool) -> Json:
    """All cells of one operator, and the product table's word for chips without one."""
    made: Json = {"ge_local": True} if entry.get("ge_local") else {}
    cpu = entry.get("ai_cpu", {})
    if entry.get("folds_on_host") or cpu.get("folds_constants"):
        made["folds"] = True  # GE may evaluate it when its inputs are constants
    for name in (*STORES, *CHIPS):
        if name not in entry:
            continue
        cell: Json | None = _cell(entry[name], entry)
        if "older than the chip" in str((cell or {}).get("note", "")):
            continue  # a listing that cannot know the chip says nothing about it
        if cell is not None and not doubted:
            cell = _without_doubted(cell)
        if cell is not None:
            made[name] = cell
    documented = {c: v for c, v in old.get("doc", {}).items() if c not in made}
    return made | ({"doc": documented} if documented else {})


def build(listing: Json, old: Json, *, doubted: bool = True) -> Json:
    """The new table.

    Args:
        listing: operators.json: {"operators": {type: cells}, "rewrites": [...]}.
        old: the present table; its `onnx_to_ge` and product tables are carried over.
        doubted: keep what rests on the 8.1.RC1 store.
    """
    wanted = {t for types in old["onnx_to_ge"].values() for t in types} | set(MORE)
    operators = listing["operators"]
    ge = {
        name: _operator(operators[name], old["ge"].get(name, {}), doubted)
        for name in sorted(wanted & operators.keys())
    }
    for name, chips in RECIPES.items():
        ge[name] = ge.get(name, {}) | {"recipes_package": chips}
    about = {
        "what": "which engine takes an operator of CANN, per chip, in which dtypes, and what says"
        " so; written by scripts/op_support.py",
        "engine": "ai_core | ai_cpu | ge_local (GE resolves the node) | none (no engine lists it)",
        "evidence": "listing (operator store of a package) | opdef (an open operator definition"
        " registers the chip) | source (engine or kernel source) | doc (a graph pass's page)",
        "release": "of the listing or source; 8.1.RC1: a third party's copy of an installed toolkit"
        if doubted
        else "of the listing or source",
        "dtypes": 'columns of one table; a one-entry list holds for every column, "=x" repeats'
        " list x; lists of one group go together, groups combine freely; independent, and AI CPU:"
        " every list alone; empty: not restricted, or not read",
        "recorded": listing.get("_about", {}).get("recorded", ""),
    }
    rewrites = [_spelled(r) for r in listing["rewrites"]]
    return {"_about": about, "onnx_to_ge": old["onnx_to_ge"], "rewrites": rewrites, "ge": ge}


def text(table: Json) -> str:
    """One operator a line, so that changes can be read."""
    parts = []
    for key, value in table.items():
        if key == "_about":
            parts.append(f' "{key}": {json.dumps(value)}')
            continue
        items = value.items() if isinstance(value, dict) else ((None, v) for v in value)
        lines = [f"  {json.dumps(k) + ': ' if k else ''}{json.dumps(v)}" for k, v in items]
        ends = "{}" if isinstance(value, dict) else "[]"
        parts.append(f' "{key}": {ends[0]}\n' + ",\n".join(lines) + f"\n {ends[1]}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("listing", type=Path, help="operators.json")
    parser.add_argument("--without-8.1.RC1", dest="strict", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=TARGET)
    args = parser.parse_args()
    listing, old = (json.loads(p.read_text("utf-8")) for p in (args.listing, TARGET))
    args.output.write_text(text(build(listing, old, doubted=not args.strict)), "utf-8")


if __name__ == "__main__":
    main()
