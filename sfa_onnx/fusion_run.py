"""One call of `fuse` at work: attention is found, verified and spliced, then what selects keys."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from sfa_onnx.errors import BudgetError, CrashError, UsageError
from sfa_onnx.files.empty_views import settled
from sfa_onnx.files.external import StorageReader
from sfa_onnx.files.model import load_model
from sfa_onnx.files.weights_file import WeightsFile
from sfa_onnx.guard import worker
from sfa_onnx.passes import certificate as certificates
from sfa_onnx.passes import plan as plans
from sfa_onnx.passes.assume import FLAGS, MASKS, SCALES, asserted, note_assumptions, scales_of
from sfa_onnx.passes.candidate import Candidate, Refusal, RefusedSite
from sfa_onnx.passes.find.search import FindOptions, find_candidates
from sfa_onnx.passes.graph.attention_caches import caches_joined
from sfa_onnx.passes.graph.constant_ifs import branches_taken
from sfa_onnx.passes.graph.functions import Finding, Inlined, inline_sites
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.order import put_in_order
from sfa_onnx.passes.indexer.find import find_selections
from sfa_onnx.passes.indexer.regions import selection_regions
from sfa_onnx.passes.indexer.verify import SelectionVerifier
from sfa_onnx.passes.materialize import Materializer, materialized_notes
from sfa_onnx.passes.scopes.index import body_views
from sfa_onnx.passes.scopes.splice import count_nodes, note_captures, splice_scopes
from sfa_onnx.passes.site_report import Costs, describe, unique_ids
from sfa_onnx.passes.splice import check_region
from sfa_onnx.passes.verify import Verifier
from sfa_onnx.report import FuseReport, SiteReport, VerifyRecord
from sfa_onnx.runtime.portable.restore import restored, restored_sites

__all__ = ["Progress", "Run", "silent"]

_log = logging.getLogger("sfa_onnx")

_STAGES = (
    *("load", "find", "verify", "weights", "hash", "splice"),
    *("kv-cache", "portable", "certificate", "save"),
)

_OLDEST_OPSET = 13  # Unsqueeze and ReduceSum take their axes as inputs since
_NAMED = 6  # inputs that a note names
Progress = Callable[[str, float], None]
_Finder = Callable[[GraphIndex, FindOptions], list[Candidate | RefusedSite]]


def silent(_stage: str, _fraction: float) -> None:
    """Progress that nobody watches."""


@dataclass
class Scope:
    """One graph of the model: its candidates, and those that are to be spliced."""

    index: GraphIndex
    found: list[Candidate | RefusedSite]
    sites: list[SiteReport]
    ready: list[tuple[Candidate, SiteReport]] = field(default_factory=list)


@dataclass
class Run:
    """One call of `fuse`: options, stage times, what was seen."""

    verify: bool
    target: str
    cost: str
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    source_dir: Path | None = None
    materialize: bool = False
    restored: list[SiteReport] = field(default_factory=list)  # operators that bodies stood for
    assume: tuple[str, ...] = ()
    trace: bool = False
    indexer: bool = True
    options: FindOptions = field(default_factory=FindOptions)
    sorted: bool = False  # nodes were not in an order that runs
    settled: tuple[str, ...] = ()  # sizes that the file left open against ONNX's rules
    file: WeightsFile | None = None  # takes what materialize makes of external weights
    before: certificates.Snapshot = field(default_factory=certificates.Snapshot)

    @contextlib.contextmanager
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
        if self.verify:
            worker.warm()  # it gets ready while sites are looked for
        with self.stage("load"):
            given, back = restored(self._load(source))
            self.restored = restored_sites(given, back)
        reader = StorageReader(self.source_dir)
        assumed = (*self.assume, *(() if plan is None else plan.assume))
        self.assume = tuple(dict.fromkeys(assumed))
        said = asserted(self.assume, given.graph)
        self.options = FindOptions(
            masks=said[MASKS], flags=said[FLAGS], scales=said[SCALES], trace=self.trace
        )
        with self.stage("find"):
            find = functools.partial(self._findings, reader)
            inlined = inline_sites(given, find)
            inlined.model, taken = branches_taken(inlined.model, find)
            inlined.model, joined = caches_joined(inlined.model, find)
            scopes = self._find(inlined.model, reader)
            sites = [site for scope in scopes for site in scope.sites] + self.restored
            unique_ids(sites)
            selecting = self._selecting(scopes)
            if plan is not None:
                plan.check_against([*(s.site_id for s in sites), *selecting])
        with self.stage("verify"):
            self._judge(scopes, plan, Verifier)
        if not selecting and not any(scope.ready for scope in scopes):
            inlined, joined, taken = Inlined(given, left=inlined.left), (), ()
        model, notes = inlined.model, [*self.settled, *inlined.notes]
        if taken:
            notes.append(f"the branch that a constant chooses was written out: {', '.join(taken)}")
        if joined:
            notes.append(f"the caches of Attention {', '.join(joined)} are joined in front of it")
        if self.sorted:
            notes = ["nodes that read what is made later were sorted", *notes]
        own_weights = self._materialize(scopes)
        with self.stage("hash"):
            self.before = certificates.snapshot(model)
        nodes_before = count_nodes(model.graph)
        with self.stage("splice"):
            splice_scopes(model, [(s.index, s.ready) for s in scopes])
            materialized = [] if own_weights is None else own_weights.finish()
        selections = self._selections(model, reader, plan) if selecting else []
        sites = _apart(sites, selections)
        if any(site.reason for site in (*sites, *selections)):
            notes += _defaults(scopes[0].index)
        with self.stage("hash"):
            notes.append(certificates.untouched(self.before, certificates.snapshot(model)))
        report = FuseReport(
            model=model,
            sites=sites,
            nodes_before=nodes_before,
            nodes_after=count_nodes(model.graph),
            weights_bytes_read=reader.bytes_read,
            seconds=self.seconds,
            notes=notes,
            planned=() if plan is None else plan.chosen,
            materialized=materialized,
            inlined=inlined.functions,
            taken=taken,
            joined=joined,
            assumed=self.assume,
            selections=selections,
        )
        note_assumptions(report.model, self.assume)
        if own_weights is not None:
            report.weights_bytes_read += sum(m.bytes_read for m in materialized)
            report.notes += materialized_notes(materialized, self.file)
        return report

    def _findings(self, reader: StorageReader, model: onnx.ModelProto) -> list[Finding]:
        """Every candidate with the view of the graph it lies in."""
        scopes = self._find(model, reader)
        if self.indexer:
            scopes += self._find(model, reader, find_selections)
        return [(scope.index, item) for scope in scopes for item in scope.found]

    def _selecting(self, scopes: list[Scope]) -> list[str]:
        """Ids of what may be a lightning indexer."""
        if not self.indexer:
            return []
        return [s.index.place(r.node) for s in scopes for r in selection_regions(s.index)]

    def _selections(
        self, model: onnx.ModelProto, reader: StorageReader, plan: plans.Plan | None
    ) -> list[SiteReport]:
        """Put the indexer in place of selections, once attention is in place."""
        with self.stage("find"):
            scopes = self._find(model, reader, find_selections)
        with self.stage("verify"):
            self._judge(scopes, plan, SelectionVerifier)
        with self.stage("splice"):
            splice_scopes(model, [(s.index, s.ready) for s in scopes])
        note_assumptions(model, scales_of(model, (c for s in scopes for c, _ in s.ready)))
        sites = [site for scope in scopes for site in scope.sites]
        unique_ids(sites)
        return sites

    def _find(
        self, model: onnx.ModelProto, reader: StorageReader, finder: _Finder | None = None
    ) -> list[Scope]:
        """The candidates of the main graph and of every body, each graph before its bodies."""
        main = GraphIndex.of(model, reader)
        if not main.ordered:  # converters that append casts leave such files, and runtimes sort
            put_in_order(model.graph)
            main, self.sorted = GraphIndex.of(model, reader), True
        scopes = []
        for index in (main, *body_views(main)):
            found = (finder or find_candidates)(index, self.options)
            costs = Costs(index) if found else None
            sites = [describe(index, item, n, costs) for n, item in enumerate(found)]
            scopes.append(Scope(index, found, sites))
        return scopes

    def _materialize(self, scopes: list[Scope]) -> Materializer | None:
        """Give absorbed sites weights of their own, where that was asked for."""
        if not self.materialize:
            return None
        folder = self.source_dir or (None if self.file is None else self.file.path.parent)
        own_weights = Materializer(scopes[0].index.graph, StorageReader(folder), self.file)
        with self.stage("weights"):
            for scope in scopes:
                own_weights.apply(scope.index, scope.ready)
        return own_weights

    def _load(self, source: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
        """The model, ours to edit."""
        model, self.settled = settled(load_model(source))
        if not isinstance(source, onnx.ModelProto):
            self.source_dir = Path(source).parent
        elif not self.settled:
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            return copy
        return model

    def _judge(
        self,
        scopes: list[Scope],
        plan: plans.Plan | None,
        verifiers: type[Verifier | SelectionVerifier],
    ) -> None:
        """Decide every candidate; bodies first, whose replacements read values around them."""
        total, done = sum(len(s.found) for s in scopes), 0
        for scope in reversed(scopes):
            if not scope.found:
                continue
            verifier = verifiers(scope.index)
            for item, site in zip(scope.found, scope.sites, strict=True):
                done += 1
                if isinstance(item, RefusedSite):
                    continue
                self.progress("verify", 0.25 + 0.4 * done / total)
                self._decide(verifier, scope, item, site, plan)

    def _decide(
        self,
        verifier: Any,
        scope: Scope,
        item: Candidate,
        site: SiteReport,
        plan: plans.Plan | None,
    ) -> None:
        """Verify one candidate and note the verdict."""
        refusal = self._refusal(scope.index, item, site, plan)
        verdict = refusal or self._verdict(verifier, item)
        if isinstance(verdict, Refusal):
            site.refuse(verdict.reason, verdict.hint, verdict.stopped_at)
            again = None if refusal or verdict.final or not item.otherwise else item.otherwise()
            if again is None or check_region(scope.index, again) is not None:
                return
            again.site_id, item = item.site_id, again
            verdict = self._verdict(verifier, item)
            if isinstance(verdict, Refusal):
                if verdict.final:
                    site.refuse(verdict.reason, verdict.hint, verdict.stopped_at)
                return
            site.reason = site.hint = site.stopped_at = ""
            site.family = item.family
        site.status, site.record = "fused", verdict
        scope.ready.append((item, site))
        note_captures(scope.index, item)

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
        except UsageError:  # a budget that is no number, in the environment
            raise
        except (CrashError, BudgetError) as error:
            return Refusal(str(error))
        except Exception as error:
            _log.debug("verification of %s failed", item.site_id, exc_info=True)
            return Refusal(
                f"verification itself failed ({type(error).__name__}: {error}); please report it"
            )
        return verdict


def _apart(sites: list[SiteReport], selections: list[SiteReport]) -> list[SiteReport]:
    """The sites, each node named once: some were added for attention and are a selection's now."""
    added = {name for site in sites for name in site.added}
    for selection in selections:
        gone = set(selection.removed)
        selection.removed = tuple(n for n in selection.removed if n not in added)
        for site in sites:
            site.added = tuple(n for n in site.added if n not in gone)
    done = {s.site_id for s in selections if s.status == "fused"}  # listed as no attention's
    return [s for s in sites if s.status == "fused" or s.site_id not in done]


def _defaults(index: GraphIndex) -> list[str]:
    """What is stored as the default of an input only: it may be what holds a site back."""
    names = sorted(index.defaults)
    if not names:
        return []
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [
        "no constants, since a caller may give other values than those stored (take them out of the"
        f" graph's inputs if nobody does): {', '.join(names[:_NAMED])}{more}"
    ]
