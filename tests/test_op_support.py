"""The script that writes the support table: evidence kept per cell, the doubted store removable."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "scripts" / "op_support.py"
_spec = importlib.util.spec_from_file_location("op_support", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
op_support = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(op_support)

OLD = {"onnx_to_ge": {"Add": ["Add"], "Loop": []}, "ge": {"Neg": {"doc": {"ascend950": "yes"}}}}
LISTED = {"engine": "ai_core", "evidence": "listing", "release": "8.1.RC1"}
CELLS = {
    "Add": {
        "ai_cpu": {"evidence": "listing", "release": "8.1.RC1", "kernel_source": ["9.1.0", "main"],
                   "inputs": {"x1": ["int64"]}, "folds_constants": True},
        "ai_cpu_tensorflow": True,
        "ascend910b": LISTED | {"release": "9.0.0-beta.1", "listed": ["8.1.RC1", "9.0.0-beta.1"],
                                "dtypes_from": "binaries:8.1.RC1", "check_8.1.RC1": "nothing",
                                "inputs": {"x1": ["fp8_e5m2", "bf16"], "x2": "=x1"}},
        "ascend910_93": LISTED | {"dtypes": "as ascend910b", "opdef": ["9.0.0", "main"]},
        "ascend950": {"engine": "ai_cpu", "evidence": "listing", "release": "8.1.RC1",
                      "note": "the listing is older than the chip"},
    },
    "Neg": {"ascend910b": LISTED},
    "Conv3D": {"ascend910b": LISTED},
}  # fmt: skip


def built(*, doubted: bool) -> dict[str, Any]:
    listing = {"operators": CELLS, "rewrites": []}
    old = OLD | {"onnx_to_ge": OLD["onnx_to_ge"] | {"Neg": ["Neg"]}}
    table: dict[str, Any] = op_support.build(listing, old, doubted=doubted)
    assert json.loads(op_support.text(table)) == table
    return table["ge"]  # type: ignore[no-any-return]


def test_only_operators_of_this_field_are_taken() -> None:
    assert set(built(doubted=True)) == {"Add", "Neg", *op_support.RECIPES}


def test_cells_keep_evidence_and_release_and_shared_types_are_resolved() -> None:
    add = built(doubted=True)["Add"]
    assert add["ascend910_93"]["release"] == "8.1.RC1"
    assert add["ascend910_93"]["inputs"] == add["ascend910b"]["inputs"]
    assert add["ascend910b"]["inputs"]["x1"] == ["float8_e5m2", "bf16"]
    assert add["folds"]
    assert "ascend950" not in add  # a listing older than the chip says nothing
    assert built(doubted=True)["Neg"]["doc"] == {"ascend950": "yes"}


def test_the_switch_leaves_nothing_that_rests_on_the_doubted_store() -> None:
    ge = built(doubted=False)
    assert "8.1.RC1" not in json.dumps(ge)
    assert ge["Add"]["ascend910_93"]["evidence"] == "opdef"
    assert ge["Add"]["ascend910_93"]["release"] == "9.0.0"
    assert ge["Add"]["ai_cpu"]["evidence"] == "source"
    assert "inputs" not in ge["Add"]["ascend910b"]
    assert "ascend910b" not in ge["Neg"]
    assert "ai_cpu_tensorflow" not in ge["Add"]


def test_the_shipped_table_was_written_by_it() -> None:
    table = json.loads(op_support.TARGET.read_text("utf-8"))
    assert op_support.text(table) == op_support.TARGET.read_text("utf-8")
    named = {t for types in table["onnx_to_ge"].values() for t in types}
    assert named <= set(table["ge"])
    assert 140 <= len(table["ge"]) <= 180
