"""What a check finds: plain data, rendered elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

__all__ = [
    "STAGES",
    "CheckReport",
    "Finding",
    "ParserVerdict",
    "Severity",
    "Stage",
    "Verdict",
    "leading",
    "misread",
    "refused",
]

Severity = Literal["error", "warning", "unknown", "info"]
# parse: CANN's parser refuses. meaning: it accepts, but the graph is not what the file means.
# operator: host checks of the fused operators. graph: later stages, speed, memory.
# support: which engine runs an op.
Stage = Literal["parse", "meaning", "graph", "operator", "support"]
ParserVerdict = Literal["accepted", "rejected", "crash"]
Verdict = Literal["errors", "unknown", "warnings", "clean"]

_WORST: Final[tuple[tuple[Severity, Verdict], ...]] = (
    ("error", "errors"),
    ("unknown", "unknown"),
    ("warning", "warnings"),
)
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)


@dataclass(frozen=True)
class Finding:
    """One thing found.

    `code` is the CANN error code the finding would become ("" when CANN says nothing), `hint` what
    to do about it, `fixable` whether `fix` can do it. `nodes` lists every node concerned,
    `node` the first; names are those the parser gives (unnamed nodes: `<OpType>_<n>`).
    """

    rule: str
    severity: Severity
    stage: Stage
    message: str
    node: str = ""
    code: str = ""
    hint: str = ""
    fixable: bool = False
    evidence: str = ""  # recorded | source | declared | documented | contract | model
    nodes: tuple[str, ...] = ()
    crash: bool = False  # the parser's process dies instead of reporting


# What a layer pays for at every step: shown before the rest.
_COSTS: Final = (
    *("engine-ai-cpu", "scatternd-copies-cache", "data-dependent-shape", "topk-computed-k"),
    *("int64-hot", "expert-gather", "engine-nowhere"),
)


def leading(findings: Sequence[Finding]) -> list[Finding]:
    """Errors first, then what costs (AI CPU, copies, host-bound shapes), then the rest.

    The rest goes by severity; what one rule found stays together.
    """
    severities, first = get_args(Severity), dict[str, int]()
    for at, found in enumerate(findings):
        first.setdefault(found.rule, at)

    def place(found: Finding) -> tuple[int, int]:
        if found.severity == "error":
            return -1, first[found.rule]
        if found.rule in _COSTS:
            return 0, _COSTS.index(found.rule)
        return 1 + severities.index(found.severity), first[found.rule]

    return sorted(findings, key=place)


def misread(
    rule: str,
    severity: Severity,
    message: str,
    node: str,
    hint: str = "",
    fixable: bool = False,
    evidence: str = "recorded",
) -> Finding:
    """Something that the parser accepts and understands otherwise than the file means it."""
    return Finding(rule, severity, "meaning", message, node, "", hint, fixable, evidence)


def refused(
    rule: str,
    message: str,
    code: str,
    node: str = "",
    *,
    hint: str = "",
    fixable: bool = False,
    evidence: str = "recorded",
    crash: bool = False,
) -> Finding:
    """Something that the parser refuses with `code`."""
    return Finding(
        rule, "error", "parse", message, node, code, hint, fixable, evidence, crash=crash
    )


@dataclass
class CheckReport:
    """What `check` found, in the order the parser would meet it; the A3 conflict comes first.

    `parser` is what CANN's ONNX parser would do, `code` what it would report first ("" when it
    accepts or dies). `verdict` is the worst of all findings; only `clean` may be shown green:
    unknown is not good news.
    """

    cann: str
    soc_version: str
    flavour: Literal["canonical", "atc", "plain"]
    findings: list[Finding]
    support: list[SupportRow] = field(default_factory=list)
    strict: bool = False
    summary: dict[str, str] = field(default_factory=dict)  # SoC family -> engines of all nodes
    parser: ParserVerdict = field(init=False)
    code: str = field(init=False)
    verdict: Verdict = field(init=False)
    passed: bool = field(init=False)  # no errors; with `strict`, nothing worse than information

    def __post_init__(self) -> None:
        refused = [f for f in self.findings if f.stage == "parse" and f.severity == "error"]
        self.parser, self.code = "accepted", ""
        if refused:
            self.parser, self.code = "crash" if refused[0].crash else "rejected", refused[0].code
        self.verdict = next((v for s, v in _WORST if self.of(s)), "clean")
        self.passed = self.verdict == "clean" if self.strict else self.verdict != "errors"

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of one severity."""
        return [f for f in self.findings if f.severity == severity]

    @property
    def fixable(self) -> list[Finding]:
        """What `fix` can change."""
        return [f for f in self.findings if f.fixable]


@dataclass(frozen=True)
class SupportRow:
    """One row of the support table: an ONNX op with the dtypes seen, and where it would run.

    `engines` maps a SoC family to "AI Core" | "AI CPU" | "GE" (GE resolves the node) | "none"
    (listed nowhere) | "unknown"; `evidence` to listing | opdef | source | documented | unknown
    (listing: a package's operator store; opdef: an open operator definition; documented: only the
    op's product table says so); `releases` to where that was read.
    """

    op_type: str
    dtypes: tuple[str, ...]
    count: int
    ge_types: tuple[str, ...]
    engines: dict[str, str]
    evidence: dict[str, str]
    note: str = ""
    releases: dict[str, str] = field(default_factory=dict)
