"""Running atc, and reading what it says: its error codes in words a person can act on."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from sfa_onnx.files.writing import atomic_stream

__all__ = ["ERRORS", "AtcRun", "LogFinding", "explain", "run"]

# code -> (what it means, what to do). Recorded from CANN's own parser, or documented.
ERRORS: dict[str, tuple[str, str]] = {
    "E16005": (
        "the model imports more than one domain (releases up to 9.1 take one)",
        "convert the ATC flavour (model.atc.onnx), not the canonical file",
    ),
    "E13010": (
        "no parser plug-in for a node: not found, not loadable, or opset above 18",
        "source opp/vendors/sfa_onnx/bin/set_env.bash; run `ldd -r` on libcust_onnx_parsers.so;"
        " for other operators see `sfa-onnx check`",
    ),
    "E16002": (
        "no parser plug-in for this operator type",
        "as E13010: the plug-in was not loaded, or the operator is not one of CANN's",
    ),
    "E10501": (
        "the GE operator has no prototype here",
        "install the operator package of your chip (CANN ops), or for --binding recipes the"
        " cann-recipes-infer package, and put it on ASCEND_CUSTOM_OPP_PATH",
    ),
    "E13009": (
        "two nodes share a name, or a node has an input's name",
        "convert the ATC flavour: it gives every node its own name",
    ),
    "E11010": (
        "a parser plug-in refused the attributes of a node",
        "read the '[sfa_onnx plug-in] node ...' line above it; it names the attribute",
    ),
    "E16001": ("the graph has no input or no output", "keep at least one of each"),
    "E10001": (
        "an option's value is illegal; often a dim left at -1, or a foreign external_data key",
        "bind every dim with --dim NAME=N and take the generated atc.sh",
    ),
    "E10016": ("--input_shape names an input the model does not have", "take the generated atc.sh"),
    "E10017": ("--input_shape lacks an input of the model", "take the generated atc.sh"),
    "E19010": ("no parser is registered for an operator", "as E13010"),
    "E19999": (
        "internal error; the text names the cause (a plug-in's FAILED also shows as this)",
        "look for '[sfa_onnx plug-in]' above it; rerun with ASCEND_SLOG_PRINT_TO_STDOUT=1"
        " ASCEND_GLOBAL_LOG_LEVEL=1",
    ),
    "EZ9999": (
        "internal error of an operator: its tiling, shape inference or plug-in failed",
        "the text names the operator; compare its shapes with `sfa-onnx check`",
    ),
    "EZ3003": (
        "no engine supports an operator with these data types",
        "`sfa-onnx check --soc-version ...` shows which node; cast, or keep it on the host",
    ),
    "E40021": (
        "compiling an operator failed",
        "the operator package does not fit the toolkit's release, or the shapes break its limits:"
        " see `sfa-onnx check`",
    ),
}
_PHRASES: dict[str, tuple[str, str]] = {
    "infer_datatype func": (
        "the operator package lacks type inference for an operator",
        "the package is older than the toolkit; install the matching one",
    ),
    "of ops kernel is unsupported": (
        "no kernel for an operator with these types on this chip",
        "compare the types with `sfa-onnx check --soc-version ...`",
    ),
    "required_opp_abi_version": (
        "a vendor package was skipped because of its version",
        "rebuild the package for this CANN, or edit its version.info (ours has none)",
    ),
}
_SUCCESS = "ATC run success"
_CODE = re.compile(r"\b(E[0-9Z]\d{4})\b:?")
_PLUGIN = re.compile(r"\[sfa_onnx plug-in\] (.*)")


@dataclass(frozen=True)
class LogFinding:
    """One line of the log that says something, explained."""

    code: str
    line: str
    meaning: str
    advice: str


@dataclass
class AtcRun:
    """The outcome of one call of atc."""

    passed: bool
    exit_code: int
    findings: list[LogFinding] = field(default_factory=list)
    log: Path | None = None


def explain(text: str) -> list[LogFinding]:
    """The errors in a log, each code once, our plug-in's own lines first."""
    found: dict[str, LogFinding] = {}
    for line in text.splitlines():
        stripped = line.strip()
        if own := _PLUGIN.search(stripped):
            found.setdefault(
                own[1],
                LogFinding("plug-in", stripped, own[1], "the node is not what sfa-onnx writes"),
            )
            continue
        for code in _CODE.findall(stripped):
            meaning, advice = ERRORS.get(code, ("", "see CANN's error code reference"))
            found.setdefault(code, LogFinding(code, stripped, meaning or stripped, advice))
        for phrase, (meaning, advice) in _PHRASES.items():
            if phrase in stripped:
                found.setdefault(phrase, LogFinding("", stripped, meaning, advice))
    return sorted(found.values(), key=lambda f: f.code != "plug-in")


def run(folder: Path, *, timeout: float | None = None) -> AtcRun:
    """Run `atc.sh` in `folder`, keep its output as atc.log, and explain it.

    Args:
        folder: what `handover.write` filled.
        timeout: seconds; None waits as long as it takes.
    """
    log = folder / "atc.log"
    late: subprocess.TimeoutExpired | None = None
    code = -1
    with atomic_stream(log, force=True) as stream:
        try:
            code = subprocess.run(
                ["bash", "atc.sh"],
                cwd=folder,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            late = error  # what it said so far is kept
    if late is not None:
        raise late
    text = log.read_text(encoding="utf-8", errors="replace")
    passed = code == 0 and _SUCCESS in text
    return AtcRun(passed, code, explain(text), log)
