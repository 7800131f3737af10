"""What fusing, comparing and checking found: plain dataclasses, rendered elsewhere.

Library code returns these; only the command prints. `to_json` is the versioned form of all of them.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx

__all__ = [
    "FuseReport",
    "MaterializedWeight",
    "ProbeResult",
    "SiteReport",
    "VerifyRecord",
    "to_json",
]

JSON_VERSION = 1


@dataclass(frozen=True)
class ProbeResult:
    """One probe of one site: its name, the largest relative error seen and the bound it had."""

    name: str
    error: float
    bound: float
    draws: int = 1


@dataclass(frozen=True)
class VerifyRecord:
    """What was verified for a class of equal sites; no site is fused without one."""

    probes: tuple[ProbeResult, ...]
    sizes: dict[str, int]  # axis label -> size probed ("B", "S1", "N1", "S2", "K" ...)
    shrunk: tuple[str, ...]  # "S2=23 instead of 131072": sizes of the file that were opened
    assumptions: tuple[str, ...]  # "sparse_indices are distinct: discharged by TopK /layers.0/TopK"
    constants_read: tuple[str, ...]  # structural constants whose bytes were read
    own_rounding: float | None = None  # error of the region in the model's own dtype, informative
    margin: float | None = None  # least gap, per largest score, of the last key a TopK took
    shared_with: str | None = None  # anchor of the equal site that was probed in its place
    seconds: float = 0.0


@dataclass
class SiteReport:
    """One candidate: fused or refused, with the reason a person can act on."""

    site_id: str  # stable across runs: used by plans
    anchor: str  # node name (or output name when the node is unnamed)
    status: Literal["fused", "refused", "unfused"]
    op_type: str = ""
    scope: str = ""  # the body it lies in, "If_3.then_branch/Loop_1.body"; "" for the main graph
    layer: str = ""  # "model.layers.12.self_attn" where the exporter's metadata says
    reason: str = ""
    hint: str = ""  # what would make it fuse
    stopped_at: str = ""  # the tensor or node where recognition ended
    family: str = ""
    bound: tuple[str, ...] = ()  # what recognition understood, in order
    terms: tuple[str, ...] = ()  # `trace`: normal form of the result, and identities that fired
    npu_limits: tuple[str, ...] = ()
    record: VerifyRecord | None = None
    removed: tuple[str, ...] = ()  # node names (or outputs) replaced
    added: tuple[str, ...] = ()
    cost: dict[str, float] = field(default_factory=dict)  # flops/bytes before and after
    roles: dict[str, str] = field(default_factory=dict)  # value entering the site -> what it is

    def refuse(self, reason: str, hint: str, stopped_at: str) -> None:
        """Say why the site is not fused, what would help, and where recognition ended."""
        self.reason, self.hint, self.stopped_at = reason, hint, stopped_at


@dataclass(frozen=True)
class MaterializedWeight:
    """An expansion weight whose parts were written as initializers of their own, or why not."""

    weight: str  # the stored tensor
    sites: tuple[str, ...]  # ids of the sites that read it
    made: dict[str, str] = field(default_factory=dict)  # new initializer -> hash of its bytes
    bytes_read: int = 0
    bytes_written: int = 0
    kept: str = ""  # who else reads the weight, which therefore stays
    reason: str = ""  # why the site still slices it in the graph


@dataclass
class FuseReport:
    """The outcome of `fuse`: the model and everything that was decided on the way."""

    model: onnx.ModelProto
    sites: list[SiteReport]
    path: Path | None = None
    nodes_before: int = 0
    nodes_after: int = 0
    weights_bytes_read: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # per stage
    notes: list[str] = field(default_factory=list)
    changed_inputs: list[str] = field(default_factory=list)
    changed_outputs: list[str] = field(default_factory=list)
    planned: tuple[str, ...] = ()  # site ids that a plan asked for
    materialized: list[MaterializedWeight] = field(default_factory=list)
    inlined: tuple[tuple[str, str], ...] = ()  # (domain, name) of local functions inlined
    taken: tuple[str, ...] = ()  # first outputs of Ifs that constants decide, written out
    joined: tuple[str, ...] = ()  # first outputs of Attention operators whose caches were joined
    assumed: tuple[str, ...] = ()  # what the caller asserts: "two-valued:attention_mask"
    selections: list[SiteReport] = field(default_factory=list)  # lightning indexers, not in sites

    @property
    def fused(self) -> list[SiteReport]:
        """The sites that were fused."""
        return [s for s in self.sites if s.status == "fused"]

    @property
    def refused(self) -> list[SiteReport]:
        """The candidates that were not, each with a reason."""
        return [s for s in self.sites if s.status == "refused"]

    @property
    def indexers(self) -> list[SiteReport]:
        """The selections that the indexer stands for now."""
        return [s for s in self.selections if s.status == "fused"]


def to_json(report: Any) -> Any:
    """A JSON-ready copy of any report: models are left out, paths become strings."""
    if isinstance(report, onnx.ModelProto):
        return None
    if dataclasses.is_dataclass(report) and not isinstance(report, type):
        pairs = ((f.name, getattr(report, f.name)) for f in dataclasses.fields(report))
        return {k: to_json(v) for k, v in pairs if not isinstance(v, onnx.ModelProto)}
    if isinstance(report, dict):
        return {str(k): to_json(v) for k, v in report.items()}
    if isinstance(report, list | tuple | set | frozenset):
        return [to_json(v) for v in report]
    if isinstance(report, enum.Enum):
        return report.value
    return str(report) if isinstance(report, Path) else report
