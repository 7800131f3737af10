"""The recorded verdicts of CANN's own parser: the checker must agree with every one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from sfa_onnx.ascend.checks import CheckReport, Plugin, check

DATA = Path(__file__).parent / "data" / "atc"
_OPSETS = [("npu", 1), *(("ai.onnx", v) for v in range(11, 19))]
_SCALE = (("scale_value", "float"),)
# The plug-in the verdicts were recorded with: it refuses a node without scale_value, nothing else.
DEMO = (
    Plugin("NPUKvQuantSparseFlashAttention", frozenset(_OPSETS), (4, 9), _SCALE),
    Plugin("NPUSparseFlashAttentionAntiquant", frozenset(_OPSETS), (4, 9), _SCALE),
    Plugin("AttrEcho", frozenset(_OPSETS), (1, 3)),
)


def _cases() -> Iterator[Any]:
    for case in json.loads((DATA / "cases.json").read_text())["cases"]:
        for version in ("8.5", "9.1", "9.2"):
            yield pytest.param(case, version, id=f"{case['id']}-{version}")


def run(case: dict[str, Any], version: str) -> CheckReport:
    model = onnx.load(DATA / "cases" / f"{case['id']}.onnx", load_external_data=False)
    return check(model, cann=version, base_dir=DATA / "cases", user_plugins=DEMO)


def _verdict(case: dict[str, Any], version: str) -> str:
    recorded = case["verdict"]
    return recorded if isinstance(recorded, str) else recorded[version]


@pytest.mark.parametrize(("case", "version"), list(_cases()))
def test_agrees_with_the_recorded_verdict(case: dict[str, Any], version: str) -> None:
    report, recorded = run(case, version), _verdict(case, version)
    if case.get("kind") == "environment":
        return
    if recorded == "crash":
        assert report.parser == "crash"
    elif recorded == "accepted":
        assert report.parser == "accepted", [f for f in report.findings if f.severity == "error"]
    else:
        assert (report.parser, report.code) == ("rejected", recorded)
    if case.get("kind") in ("silent", "later") and recorded == "accepted":
        assert report.of("error") + report.of("warning"), "accepted silently, and we say nothing"


def test_every_case_is_there() -> None:
    cases = json.loads((DATA / "cases.json").read_text())["cases"]
    assert len(cases) == 274
    assert {c["group"] for c in cases} == {
        *("attributes", "constant-node", "external-data", "fused", "initializer-dtype"),
        *("input-dtype", "ops", "opset-imports", "structure"),
    }
