"""Decide whether a bound site is the operator: run both in float64 and compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import onnx

from sfa_onnx.passes.candidate import Candidate, Refusal
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete, SizesMeetError
from sfa_onnx.passes.shapes.size import form_of
from sfa_onnx.passes.verify.classes import Classes, Verdict, fingerprint
from sfa_onnx.passes.verify.extract import (
    UnverifiableError,
    extract_region,
    extract_replacement,
)
from sfa_onnx.passes.verify.natural import Natural, hidden_by_mask
from sfa_onnx.passes.verify.open.sizes import Opened, open_sizes
from sfa_onnx.passes.verify.probes import PROBES, Probe
from sfa_onnx.passes.verify.problem import Problem, inputs_as
from sfa_onnx.passes.verify.rounding import rounded_rows
from sfa_onnx.passes.verify.site import QUESTIONS, Site
from sfa_onnx.passes.verify.sizes.concrete import Sizer
from sfa_onnx.passes.verify.sizes.equal import canonical_shapes, unified
from sfa_onnx.report import VerifyRecord

__all__ = ["Verifier"]

_QUICK = 5.0  # seconds of all probes at the sizes that the file fixes; beyond, they are opened
_ROOM = 1_000_000_000  # bytes of one run there
_FEW = 4  # as many must fit, for one of them to be asked at the sizes of the file


class Verifier:
    """Verifies candidates of one graph; equal sites are run once.

    Args:
        index: the graph.
        probes: the questions to ask; tests leave some out to see that each is needed.
        budget: seconds that one class of sites may take.
        quick: seconds that probing at the sizes of the file may take before they are opened.
    """

    def __init__(
        self,
        index: GraphIndex,
        probes: Sequence[Probe] = PROBES,
        budget: float = 120.0,
        quick: float = _QUICK,
    ) -> None:
        self._index = index
        self._probes = probes
        self._budget = budget
        self._quick = quick
        self._sizes: dict[tuple[tuple[str, str], ...], Concrete] = {}
        self._classes = Classes(index)

    def verify(self, candidate: Candidate) -> Verdict:
        """The record of what was verified, or why the site is not the operator."""
        try:
            region = extract_region(self._index, candidate)
            replacement = extract_replacement(self._index, candidate)
            natural = Natural.of(self._index, candidate)
            sizes = self._sizes.setdefault(candidate.equal, unified(self._index, candidate))
            shapes = canonical_shapes(sizes, candidate)
        except UnverifiableError as error:
            return error.refusal
        if (rounded := rounded_rows(self._index, sizes, candidate)) is not None:
            return rounded
        made = [] if natural is None else [natural.model]
        read = (sizes.shape(v.name) or () for m in made for v in m.graph.input)
        shapes += [tuple(str(form_of(d)) for d in shape) for shape in read]
        key = fingerprint(candidate, region, replacement, made, shapes)

        def judge() -> Verdict:
            try:
                return self._judge(candidate, region, replacement, natural)
            except UnverifiableError as error:
                return error.refusal

        try:
            return self._classes.verdict(candidate, key, judge)
        except SizesMeetError as meet:  # of this site, or of another that shares its verdict
            hint = "export with these sizes fixed, or as one name"
            return Refusal(str(meet), candidate.outputs[0], hint)

    def _judge(
        self,
        candidate: Candidate,
        region: onnx.ModelProto,
        replacement: onnx.ModelProto,
        natural: Natural | None,
    ) -> Verdict:
        """Run the site at the sizes of the file if that is quick, else with its sizes opened.

        Raises:
            UnverifiableError: it can be run at no size.
        """
        layout = inputs_as(candidate).get("layout_kv", "")
        sizer = Sizer(self._index, candidate, layout)
        if natural is not None:
            shapes, dims = sizer.smallest()
            problem = Problem(candidate, shapes, dims, inputs_as(candidate))
            if hidden := hidden_by_mask(natural, problem, sizer.concrete(shapes)):
                return hidden
        site: Site | None = None
        effort = sizer.least()
        if effort.bytes <= _ROOM and effort.seconds <= self._quick / _FEW:
            site = Site(self._index, candidate, region, replacement, sizer)
            if site.seconds() * QUESTIONS <= self._quick:
                return site.verify(self._probes, self._budget)
        verdict: Refusal | None = None
        stuck: dict[str, None] = {}
        for opened in open_sizes(self._index, candidate, region, replacement, stuck):
            found = self._small(opened, sizer, site)
            if isinstance(found, VerifyRecord):
                return found
            verdict = verdict or found
        doubtful = verdict is None or (site is not None and site.doubts(verdict))
        if verdict is not None and not doubtful:
            return verdict
        try:
            site = site or Site(self._index, candidate, region, replacement, sizer)
            site.hurry(self._quick)
            return site.verify(self._probes, self._budget)
        except UnverifiableError as error:
            return _because(error.refusal, stuck)

    def _small(self, opened: Opened, sizer: Sizer, true: Site | None) -> Verdict:
        """The verdict at small sizes, and where it fits one question at those of the file."""
        try:
            layout = inputs_as(opened.candidate).get("layout_kv", "")
            small = Sizer(opened.index, opened.candidate, layout, opened.family)
            region = extract_region(opened.index, opened.candidate)
            replacement = extract_replacement(opened.index, opened.candidate)
            site = Site(opened.index, opened.candidate, region, replacement, small)
            site.hurry(self._quick)
            record = site.verify(self._probes, self._budget)
        except UnverifiableError as error:
            return error.refusal
        if isinstance(record, Refusal):
            return record
        whole = sizer.smallest()[1].named()
        shrunk = [f"{k}={n} instead of {whole[k]}" for k, n in record.sizes.items() if n < whole[k]]
        read = tuple(dict.fromkeys(self._index.constants_read))
        record = dataclasses.replace(record, shrunk=tuple(shrunk), constants_read=read)
        if true is None:
            return record
        asked = true.confirm(site.scale)
        if isinstance(asked, Refusal):
            return asked
        return dataclasses.replace(record, probes=(*record.probes, asked))


def _because(refusal: Refusal, stuck: Iterable[str]) -> Refusal:
    """A refusal for want of memory, with the tables that keep smaller sizes from being tried."""
    names = ", ".join(repr(name) for name in stuck)
    if not names or "within budget" not in refusal.reason:
        return refusal
    text = f"{refusal.reason}, and smaller ones cannot be tried: no rule gives the table {names}"
    return dataclasses.replace(refusal, reason=text)
