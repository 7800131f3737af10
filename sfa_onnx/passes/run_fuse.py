"""`sfa_onnx.fuse`: find, bind, verify and splice, over one model."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx

from sfa_onnx.errors import ModelError, UsageError, VerificationError
from sfa_onnx.external import StorageReader
from sfa_onnx.model import load_model, paused_gc, save_model
from sfa_onnx.passes import certificate as certificates
from sfa_onnx.passes import plan as plans
from sfa_onnx.passes.candidate import Candidate, Refusal, RefusedSite
from sfa_onnx.passes.cost import compare_costs, nominal_sizes, region_cost
from sfa_onnx.passes.find import find_candidates
from sfa_onnx.passes.index import GraphIndex
from sfa_onnx.passes.limits import npu_limits
from sfa_onnx.passes.scopes import bodies_with_attention, inline_functions
from sfa_onnx.passes.shapes import Concrete
from sfa_onnx.passes.splice import check_region, splice
from sfa_onnx.report import FuseReport, SiteReport, VerifyRecord

__all__ = ["fuse"]

_log = logging.getLogger("sfa_onnx")

_STAGES = (
    *("load", "find", "verify", "hash", "splice"),
    *("kv-cache", "portable", "certificate", "save"),
)

_OLDEST_OPSET = 13  # Unsqueeze and ReduceSum take their axes as inputs since
Progress = Callable[[str, float], None]
Target = Literal["any", "ascend", "cpu"]
CacheForm = Literal["keep", "int8", "packed-int8", "paged-int8"]


def fuse(
    model: str | os.PathLike[str] | onnx.ModelProto,
    output: str | os.PathLike[str] | None = None,
    *,
    target: Target = "any",
    kv_cache: CacheForm = "keep",
    verify: bool = True,
    expect_sites: int | None = None,
    portable: bool = False,
    plan: str | os.PathLike[str] | None = None,
    certificate: str | os.PathLike[str] | None = None,
    weights: Literal["copy"] | None = None,
    force: bool = False,
    cost: Literal["any", "not-worse"] = "any",
    progress: Progress | None = None,
) -> FuseReport:
    """Put the fused sparse-attention operators in place of the sub-graphs that spell them.

    A site is replaced only when it was verified to *be* the operator; every other candidate is
    listed with the reason. Nodes outside the sites stay byte for byte, weights are never read.

    Args:
        model: a path, or a `ModelProto` (which is not changed).
        output: where to write the fused model; None: only return it.
        target: "ascend" refuses sites that the NPU kernel rejects; "any" and "cpu" report that.
        kv_cache: "keep", or the int8 form that `sfa_onnx.kv_convert` rewrites float caches to.
        verify: False skips execution in float64; the records say so.
        expect_sites: raise unless exactly this many sites are fused.
        portable: ship the fused operators' bodies of standard operators with the model.
        plan: a plan file written by `inspect --plan`; exactly its sites are fused.
        certificate: write the proof of what changed and what did not (JSON).
        weights: "copy" copies external weights when `output` lies in another folder.
        force: overwrite existing files.
        cost: "not-worse" refuses sites whose estimated CPU time grows.
        progress: called with (stage, fraction done).

    Returns:
        The fused model and a report of every candidate.

    Raises:
        UsageError: an option makes no sense, or a file exists already.
        ModelError: the model cannot be read or written.
        VerificationError: `expect_sites` or the plan was not met; nothing is written.
    """
    _check_options(target, kv_cache, cost, portable)
    for path in (output, certificate):
        if path is not None and Path(path).exists() and not force:
            raise UsageError(f"{path} exists already; choose another name or pass force (--force)")
    run = _Run(verify, target, cost, progress or _silent)
    with paused_gc():
        report = run.fuse(model, None if plan is None else plans.read_plan(plan))
    _expect(report, expect_sites, plan)
    if kv_cache != "keep":
        with run.stage("kv-cache"):
            _convert_cache(report, kv_cache)
    if portable:
        from sfa_onnx.runtime.portable import make_portable

        with run.stage("portable"):
            report.model = make_portable(report.model)
    if certificate is not None:
        with run.stage("certificate"):
            proof = certificates.make_certificate(report, run.before)
            certificates.write_certificate(proof, certificate, force=force)
    if output is not None:
        with run.stage("save"):
            report.path = save_model(
                report.model, output, source_dir=run.source_dir, force=force, weights=weights
            )
    return report


def _silent(_stage: str, _fraction: float) -> None:
    """Progress that nobody watches."""


def _check_options(target: str, kv_cache: str, cost: str, portable: bool) -> None:
    for name, value, legal in (
        ("target", target, ("any", "ascend", "cpu")),
        ("kv_cache", kv_cache, ("keep", "int8", "packed-int8", "paged-int8")),
        ("cost", cost, ("any", "not-worse")),
    ):
        if value not in legal:
            raise UsageError(f"{name}={value!r}: expected one of {', '.join(legal)}")
    if portable and kv_cache != "keep":
        raise UsageError("portable=True cannot be combined with an int8 kv_cache yet")


def _expect(report: FuseReport, count: int | None, plan: Any) -> None:
    """Fail loudly when fewer or more sites fused than the caller counts on."""
    fused = len(report.fused)
    refused = "; ".join(f"{s.site_id}: {s.reason}" for s in report.refused[:5])
    if count is not None and fused != count:
        raise VerificationError(
            f"{fused} sites were fused, {count} were expected."
            + (f" Refused: {refused}" if refused else " No other candidate was found.")
        )
    planned = [s for s in report.refused if s.site_id in report.planned]
    if plan is not None and planned:
        reasons = "; ".join(f"{s.site_id}: {s.reason}" for s in planned[:5])
        raise VerificationError(f"{plan}: {len(planned)} sites of the plan do not fuse. {reasons}")


def _convert_cache(report: FuseReport, form: str) -> None:
    """Rewrite float caches to int8 with the converter of `sfa_onnx.kv_convert`."""
    from sfa_onnx.kv_convert import convert

    converted = convert(report.model, to=form)
    report.model = converted.model
    report.nodes_after = len(converted.model.graph.node)
    report.notes += converted.notes
    report.changed_inputs += [*converted.removed_inputs, *converted.added_inputs]
    report.changed_outputs += [*converted.removed_outputs, *converted.added_outputs]


@dataclass
class _Run:
    """One call of `fuse`: options, stage times, what was seen."""

    verify: bool
    target: str
    cost: str
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    source_dir: Path | None = None
    before: certificates.Snapshot = field(default_factory=certificates.Snapshot)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and announce it."""
        self.progress(name, _STAGES.index(name) / len(_STAGES))
        begin = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin

    def fuse(
        self, source: str | os.PathLike[str] | onnx.ModelProto, plan: plans.Plan | None
    ) -> FuseReport:
        """Find, verify and splice; nothing is written."""
        with self.stage("load"):
            model, notes = self._load(source)
        reader = StorageReader(self.source_dir)
        with self.stage("find"):
            index = GraphIndex.of(model, reader)
            found = find_candidates(index)
            costs = _Costs(index)
            sites = [_describe(index, item, n, costs) for n, item in enumerate(found)]
            _unique_ids(sites)
        with self.stage("verify"):
            ready = self._judge(index, found, sites, plan)
        with self.stage("hash"):
            self.before = certificates.snapshot(model)
        nodes_before = len(model.graph.node)
        with self.stage("splice"):
            for site, result in zip(
                (s for _, s in ready), splice(model, index, [c for c, _ in ready]), strict=True
            ):
                site.removed, site.added = result.removed, result.added
        with self.stage("hash"):
            notes.append(_untouched(self.before, certificates.snapshot(model)))
        report = FuseReport(
            model=model,
            sites=sites,
            nodes_before=nodes_before,
            nodes_after=len(model.graph.node),
            weights_bytes_read=reader.bytes_read,
            seconds=self.seconds,
            notes=notes,
            planned=() if plan is None else plan.chosen,
        )
        report.sites += bodies_with_attention(model)
        return report

    def _load(
        self, source: str | os.PathLike[str] | onnx.ModelProto
    ) -> tuple[onnx.ModelProto, list[str]]:
        """The model, ours to edit; local functions that hold attention are inlined."""
        model = load_model(source)
        if isinstance(source, onnx.ModelProto):
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            model = copy
        else:
            self.source_dir = Path(source).parent
        return inline_functions(model)

    def _judge(
        self,
        index: GraphIndex,
        found: list[Candidate | RefusedSite],
        sites: list[SiteReport],
        plan: plans.Plan | None,
    ) -> list[tuple[Candidate, SiteReport]]:
        """Decide every candidate; returns those to splice."""
        from sfa_onnx.passes.verify import Verifier

        verifier = Verifier(index)
        ready = []
        if plan is not None:
            plan.check_against(s.site_id for s in sites)
        for n, (item, site) in enumerate(zip(found, sites, strict=True)):
            if isinstance(item, RefusedSite):
                continue
            self.progress("verify", 0.25 + 0.4 * n / len(found))
            refusal = self._refusal(index, item, site, plan)
            if refusal is None:
                verdict = self._verdict(verifier, item)
                if isinstance(verdict, Refusal):
                    refusal = verdict
                else:
                    site.record = verdict
            if refusal is None:
                site.status = "fused"
                ready.append((item, site))
            else:
                site.reason, site.hint = refusal.reason, refusal.hint
                site.stopped_at = refusal.stopped_at
        return ready

    def _refusal(
        self, index: GraphIndex, item: Candidate, site: SiteReport, plan: plans.Plan | None
    ) -> Refusal | None:
        """Reasons that need no execution."""
        if plan is not None and site.site_id not in plan.chosen:
            return Refusal("left out by the plan", hint="set fuse: true in the plan")
        if (opset := index.opsets.get("", _OLDEST_OPSET)) < _OLDEST_OPSET:
            return Refusal(
                f"the model imports opset {opset}; what replaces a site needs {_OLDEST_OPSET}",
                hint="convert it first: onnx.version_converter.convert_version(model, 17)",
            )
        if self.target == "ascend" and site.npu_limits:
            return Refusal(
                "the NPU kernel rejects this site: " + "; ".join(site.npu_limits),
                hint="fuse for target 'any' to run it on a CPU",
            )
        if self.cost == "not-worse" and site.cost.get("time_ratio", 0.0) > 1.0:
            ratio = site.cost["time_ratio"]
            return Refusal(
                f"the fused form is estimated to take {ratio:.1f}x the time of the original",
                hint="use cost 'any' to fuse it anyway",
            )
        return check_region(index, item)

    def _verdict(self, verifier: Any, item: Candidate) -> VerifyRecord | Refusal:
        """Run the verifier; a fault of ours refuses the site instead of breaking the run."""
        if not self.verify:
            return VerifyRecord((), {}, (), ("not verified: verification was switched off",), ())
        try:
            verdict: VerifyRecord | Refusal = verifier.verify(item)
        except Exception as error:
            _log.exception("verification of %s failed", item.site_id)
            return Refusal(
                f"verification itself failed ({type(error).__name__}: {error}); please report it"
            )
        return verdict


def _untouched(before: certificates.Snapshot, after: certificates.Snapshot) -> str:
    """The note that proves what stayed; a moved node would be a fault of ours.

    Raises:
        ModelError: an untouched node changed its place.
    """
    difference = certificates.compare_snapshots(before, after)
    if difference.moved_nodes:
        raise ModelError(f"splicing moved the node that makes {difference.moved_nodes[0]!r}")
    return (
        f"untouched: {difference.untouched_nodes} nodes and {difference.untouched_initializers}"
        " initializers, equal by hash and in order"
    )


def _describe(
    index: GraphIndex, item: Candidate | RefusedSite, number: int, costs: _Costs
) -> SiteReport:
    """The report of one candidate, refused until proved otherwise."""
    label = index.label(item.anchor)
    site = SiteReport(
        site_id=label or f"site-{number}",
        anchor=label,
        status="refused",
        layer=item.layer,
        family=item.family,
    )
    if isinstance(item, RefusedSite):
        refusal = item.refusal
        site.reason, site.hint, site.stopped_at = refusal.reason, refusal.hint, refusal.stopped_at
        site.bound = item.bound
        return site
    site.op_type = item.op.name
    site.npu_limits = npu_limits(item)
    site.bound = tuple(item.notes)
    item.site_id = site.site_id
    site.cost = costs.of(item)
    return site


class _Costs:
    """Estimated work of sites, at nominal sizes of the graph's symbols."""

    def __init__(self, index: GraphIndex) -> None:
        self._index = index
        self._sizes = Concrete(index, nominal_sizes(index))

    def of(self, item: Candidate) -> dict[str, float]:
        """Before and after; empty where shapes are unknown."""
        try:
            before = region_cost(self._sizes, (self._index.nodes[i] for i in item.nodes))
            after = region_cost(self._sizes, item.replacement)
        except (ModelError, ValueError, KeyError, IndexError, TypeError) as error:
            _log.debug("no cost for %s: %s", item.site_id, error)
            return {}
        return compare_costs(before, after) if before.flops and after.flops else {}


def _unique_ids(sites: list[SiteReport]) -> None:
    """Site ids name sites in plans: equal anchors (impossible in valid graphs) get a number."""
    seen: dict[str, int] = {}
    for site in sites:
        count = seen.get(site.site_id, 0)
        seen[site.site_id] = count + 1
        if count:
            site.site_id = f"{site.site_id}#{count + 1}"
