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


# ---- reductions: every release with its own plug-ins ---------------------------------------------

_REDUCE = json.loads((DATA / "reduce" / "verdicts.json").read_text())["cases"]
_LINES = {"v8.5.0": "8.5", "v9.1.0": "9.1", "master": "9.2"}


def _reduce_cells() -> Iterator[Any]:
    for name, cells in _REDUCE.items():
        for release, cell in cells.items():
            if cell["verdict"] != "not run":
                yield pytest.param(name, _LINES[release], cell, id=f"{name}-{release}")


def _axes_lost(name: str, cell: dict[str, Any]) -> bool:
    return cell["axes"] == [] and not name.endswith("noop")


@pytest.mark.parametrize(("name", "line", "cell"), list(_reduce_cells()))
def test_agrees_with_the_recorded_reduction(name: str, line: str, cell: dict[str, Any]) -> None:
    report = check(DATA / "reduce" / f"{name}.onnx", cann=line)
    if cell["verdict"] == "rejected":
        assert (report.parser, report.code) == ("rejected", cell["code"])
        return
    assert report.parser == "accepted"
    found = [f for f in report.findings if f.stage == "meaning" and f.severity == "error"]
    assert bool(found) == _axes_lost(name, cell)
    assert all(f.rule == "reduce-axes" and f.fixable for f in found)


def test_the_one_node_of_which_two_records_differ() -> None:
    """A ReduceSum that does nothing: beta.2's plug-in took it, every older one refuses it."""
    cases = json.loads((DATA / "cases.json").read_text())["cases"]
    apart = [c for c in cases if "recorded" in c]
    assert [(c["id"], c["recorded"], c["verdict"]) for c in apart] == [
        ("198-reducesum-noop", "accepted", "EZ9999")
    ]
    assert {c["verdict"] for c in _REDUCE["ReduceSum-18-noop"].values()} == {"rejected"}
    for path in (DATA / "cases/198-reducesum-noop.onnx", DATA / "reduce/ReduceSum-18-noop.onnx"):
        for line in ("8.5", "9.0", "9.1", "9.2"):
            report = check(path, cann=line)
            (found,) = report.of("error")
            assert (report.code, found.rule, found.fixable) == ("EZ9999", "reduce-no-axes", True)
            assert ("9.2.0-beta.1" in found.message) == (line == "9.2")


@pytest.mark.parametrize("op_type", ["ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp"])
def test_axes_that_only_the_newest_release_reads(op_type: str) -> None:
    """As attribute at opset 17: an error on 9.2, too, which says where it is right."""
    path = DATA / "reduce" / f"{op_type}-17-axes-attr.onnx"
    for line in ("9.1", "9.2"):
        found = next(f for f in check(path, cann=line).of("error") if f.rule == "reduce-axes")
        assert ("beta.2" in found.message) == (line == "9.2")


def test_cells_that_were_read_in_the_sources() -> None:
    """9.0 reads as 8.5; minima and products from 9.1 on as maxima."""
    for name in _REDUCE:
        path = DATA / "reduce" / f"{name}.onnx"
        old, new = check(path, cann="8.5"), check(path, cann="9.0")
        assert (old.parser, old.code) == (new.parser, new.code)
        rules = [[f.rule for f in r.findings if f.stage == "meaning"] for r in (old, new)]
        assert rules[0] == rules[1]
        if name.startswith(("ReduceMin", "ReduceProd")):
            twin = DATA / "reduce" / f"ReduceMax{name[name.index('-') :]}.onnx"
            for line in ("9.1", "9.2"):
                rules = [f.rule for f in check(path, cann=line).findings if f.stage == "meaning"]
                twins = [f.rule for f in check(twin, cann=line).findings if f.stage == "meaning"]
                assert rules == twins


def test_every_reduction_is_there() -> None:
    assert len(_REDUCE) == 59
    assert {f.stem for f in (DATA / "reduce").glob("*.onnx")} == set(_REDUCE)


def test_every_case_is_there() -> None:
    cases = json.loads((DATA / "cases.json").read_text())["cases"]
    assert len(cases) == 274
    assert {c["group"] for c in cases} == {
        *("attributes", "constant-node", "external-data", "fused", "initializer-dtype"),
        *("input-dtype", "ops", "opset-imports", "structure"),
    }
