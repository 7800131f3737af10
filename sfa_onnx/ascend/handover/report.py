"""What a hand-over wrote, and what is left to do."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from sfa_onnx.ascend.handover.log import AtcRun

__all__ = ["HandoverReport"]


@dataclass
class HandoverReport:
    """What was written and what is left to do."""

    folder: Path
    model: Path
    soc_version: str
    binding: str
    cann: str
    command: str
    unbound: dict[str, str] = field(default_factory=dict)  # dim -> shell variable of atc.sh
    plugin_built: bool = False
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # what ATC or the operators would refuse
    warnings: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # what nobody outside has shown to work
    engines: dict[str, str] = field(default_factory=dict)  # SoC family -> nodes per engine
    ran: AtcRun | None = None
    operators: int = 1  # fused operators in the model

    @property
    def passed(self) -> bool:
        """Nothing known stands in the way, and atc (when it was run) succeeded."""
        return not self.errors and (self.ran is None or self.ran.passed)

    def lines(self) -> list[str]:
        """The report for a person, and the next step."""
        run = f"  bash {shlex.quote(str(self.folder / 'atc.sh'))}"
        return [*self.facts(), "next, on a machine with CANN:", run]

    def facts(self) -> list[str]:
        """What was written and what stands in the way."""
        bare = (
            "this model holds no fused operator: it is handed over as it is. Fuse it first:"
            " sfa-onnx fuse"
        )
        head = [] if self.operators else [bare]
        head += [f"ATC flavour: {self.model}", f"hand-over:   {self.folder}"]
        head += [f"  {note}" for note in _grouped(self.notes)]
        head += [f"engines on {family}: {line}" for family, line in self.engines.items()]
        head += [f"renamed: {text}" for text in self.renamed]
        head += [f"error: {text}" for text in self.errors]
        head += [f"warning: {text}" for text in self.warnings]
        head += [f"unknown: {text}" for text in self.unknown]
        if self.ran is not None:
            verdict = "succeeded" if self.ran.passed else f"failed ({self.ran.exit_code})"
            head.append(f"atc {verdict}, log: {self.ran.log}")
            head += [f"  {f.code}: {f.meaning} -> {f.advice}" for f in self.ran.findings]
        return head


def _grouped(notes: list[str]) -> list[str]:
    """Many fixes of one rule become one line: first the rule, then how many."""
    rules: dict[str, list[str]] = {}
    for note in notes:
        rule = ":".join(note.split(":")[:2]) if note.startswith("fixed:") else note
        rules.setdefault(rule, []).append(note)
    return [
        same[0] if len(same) == 1 else f"{rule}: {len(same)} nodes, equal bit for bit in trial runs"
        for rule, same in rules.items()
    ]
