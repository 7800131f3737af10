"""Is the fused model the same? Each fused site alone, then the whole graph.

Sites first: the first model is run once and the values at every site's border are captured; the
replaced region and its replacement then run on the same values ("captured"). Where the whole model
cannot run, both regions run on random values that share one graph above them ("random"). Where the
cache was quantised on purpose, the site is judged against the original's on int8-rounded latents
("rounded"), and the loss by int8 is reported.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray
from onnx import ModelProto, helper

from sfa_onnx.errors import SfaError, UsageError
from sfa_onnx.files.empty_views import settled
from sfa_onnx.files.model import load_model
from sfa_onnx.guard.doors import door
from sfa_onnx.kv_convert.interface import Interface, float_outputs, read_interface
from sfa_onnx.operator.contract import Rounding
from sfa_onnx.operator.op import LIGHTNING_INDEXER
from sfa_onnx.runtime.compare.converted import capacity, converted_feeds
from sfa_onnx.runtime.compare.difference import CompareReport, OutputRow, SiteRow, measure
from sfa_onnx.runtime.compare.extract import (
    AFTER,
    Site,
    attending,
    find_sites,
    joined_model,
    region_above,
    region_model,
    sites_in_bodies,
)
from sfa_onnx.runtime.compare.precision import as_typed, in_other_precision, narrowest
from sfa_onnx.runtime.compare.reasons import UNTOLD_KEYS, unreadable, untaken
from sfa_onnx.runtime.compare.room import check_end, check_room, weight_bytes
from sfa_onnx.runtime.compare.rounded import (
    in_order,
    is_selection,
    judge,
    other_keys,
    packs_floats,
    packs_keys,
    relative_distance,
    rounded_values,
)
from sfa_onnx.runtime.elem_types import ElemTypes
from sfa_onnx.runtime.execute import execute, fill_dims, infos, with_outputs, with_structure
from sfa_onnx.runtime.feeds.draw import describe, random_feeds
from sfa_onnx.runtime.ort import Model
from sfa_onnx.runtime.twin import float32_twin

__all__ = ["compare"]

Array = NDArray[Any]
Values = dict[str, Array]
_LOG = logging.getLogger("sfa_onnx")
_NOISE_LIMIT: Final = 1 << 28  # bytes of weights up to which the whole graph gets a float64 twin
_LARGEST: Final = 1 << 31  # bytes of a region's largest tensor in float64
_PLAUSIBLE_FLIPS: Final = 0.25  # share of selected keys; the same
_PLAUSIBLE_LOSS: Final = 0.1  # relative; beyond it something else than int8 is at work
_TOGETHER: Final = 8  # sites whose border values are captured in one run


@door
def compare(
    before: Model,
    after: Model,
    *,
    inputs: Mapping[str, Array] | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    seed: int = 0,
    rounding: Rounding = "exact",
    progress: Callable[[str, float], None] | None = None,
) -> CompareReport:
    """Compare a model with what was fused from it, in onnxruntime.

    Weights are never read into Python: sessions open them by path.

    Args:
        before: the original (path or ModelProto).
        after: the fused or converted model.
        inputs: some or all inputs of `before`; the rest is random but plausible.
        atol: absolute bound for every tensor; default: by type and size (`difference.py`).
        rtol: relative bound.
        seed: of the random inputs.
        rounding: of our operators in both models: "exact", or "npu" as CANN's kernels round.
        progress: called with (what is being done, fraction done).

    Raises:
        UsageError: a file is missing, or `inputs` does not fit.
        MissingError: the operator library was not built.
        ModelError: a file is no model, or onnxruntime refuses the fused model.
    """
    started = time.perf_counter()
    bounds = {"atol": atol, "rtol": rtol}
    task = _Comparison(before, after, bounds, dict(inputs or {}), seed, rounding, progress)
    report = task.run()
    report.seconds = time.perf_counter() - started
    return report


class _Comparison:
    def __init__(
        self,
        before: Model,
        after: Model,
        bounds: dict[str, float | None],
        inputs: dict[str, Array],
        seed: int,
        rounding: Rounding,
        progress: Callable[[str, float], None] | None,
    ) -> None:
        self.progress = progress or (lambda _what, _fraction: None)
        self.bounds, self.inputs, self.seed, self.rounding = bounds, inputs, seed, rounding
        self.folders = [_folder(m) for m in (before, after)]
        self.report = CompareReport(_name(before), _name(after))
        self.original, self.fused = map(self._loaded, (before, after), self.folders)
        self.interface = _conversion(self.original, self.fused)
        packs = [sum(map(packs_floats, m.graph.node)) for m in (self.original, self.fused)]
        kinds = {c.kind for c in self.interface.caches} if self.interface is not None else set()
        self.lossy = packs[1] > packs[0] or bool(kinds - {"float"})
        # The type whose bounds hold, and whether its rounding is not the original's own.
        self.dtype, self.narrower = narrowest(self.original, self.fused)
        self.first, self.second = self.original, self.fused
        if self.dtype == "bfloat16":
            self.first, self.second = map(float32_twin, (self.original, self.fused))
            self._note(
                "bfloat16: onnxruntime's CPU provider lacks it, so float32 twins of both models"
                " were compared; our operators kept bfloat16"
            )
        if self.narrower:
            self._note(f"{self.dtype} in one model only: its rounding is the floor")
        self.types = ElemTypes(self.second)

        if rounding == "npu":
            self._note("rounding npu: our operators round as CANN's kernels do")

    def _loaded(self, source: Model, folder: Path | None) -> ModelProto:
        model, lines = settled(with_structure(load_model(source), folder))
        for line in lines:
            self._note(f"{_name(source)}: {line}")
        return model

    def _execute(self, *args: Any, **kw: Any) -> dict[str, Array]:
        return execute(*args, rounding=self.rounding, **kw)

    def run(self) -> CompareReport:
        sites = find_sites(self.first, self.second)
        if inner := sites_in_bodies(self.second.graph):
            self._note(
                f"{inner} fused operators lie in bodies of If, Loop or Scan: they are compared by"
                " the model's outputs only"
            )
        elif not sites:
            self._note("no fused site: the second model holds no operator that the first lacks")
        if reason := unreadable((self.original, self.fused), self.folders):
            return self._apart(sites, self._draw(wide=False), reason)
        failure: SfaError | None = None
        for wide in (False, True):  # the second choice of sizes, when the first is not accepted
            feeds = self._draw(wide=wide)
            try:
                check_room(self.original)
                check_end(self.original)
                self._whole(self._sites(sites, feeds), feeds)
                return self.report
            except UsageError:
                raise
            except SfaError as error:
                failure = failure or error
                if self.report.sites:
                    break
        told = untaken(self.original, str(failure), self.inputs)
        return self._apart(sites, feeds, f"{failure}{told}")

    def _draw(self, *, wide: bool) -> dict[str, Array]:
        """Inputs of the first model, and their description in the report."""
        self.progress("inputs", 0.05)
        feeds = random_feeds(self.original, self.seed, self.inputs, fused=self.fused, wide=wide)
        self.report.inputs = {
            n: f"{describe(a)}, {'given' if n in self.inputs else 'random'}"
            for n, a in feeds.items()
        }
        return feeds

    def _apart(self, sites: list[Site], feeds: dict[str, Array], reason: str) -> CompareReport:
        """The sites alone, where the whole models cannot run."""
        self._note(f"the whole models were not run: {reason}")
        self.report.missing = f"the whole models were not run: {reason}"
        done = {row.name for row in self.report.sites}
        rest = [s for s in sites if not self.lossy and s.name not in done]
        self.report.sites += [self._random(site, feeds) for site in rest]
        return self.report

    def _sites(self, sites: list[Site], feeds: dict[str, Array]) -> dict[str, Array]:
        """Judge every site; returns the first model's outputs, which come with the first run."""
        made = {o for n in self.first.graph.node for o in n.output}
        outputs = [o.name for o in self.first.graph.output]
        want: dict[str, Array] = {}
        for start in range(0, max(len(sites), 1), _TOGETHER):
            group = sites[start : start + _TOGETHER]
            border = [v for s in group for v in s.border if v in made]
            names = list(dict.fromkeys([*border, *([] if want else outputs)]))
            self.progress("the first model", 0.1 + 0.6 * start / max(len(sites), 1))
            values = self._execute(with_outputs(self.first, names), self.folders[0], feeds, names)
            want = want or {n: values[n] for n in outputs}
            entering = self._adapted(feeds, want) | feeds | want | values
            for number, site in enumerate(group, start + 1):
                self.progress(f"site {number} of {len(sites)}", 0.1 + 0.6 * number / len(sites))
                self.report.sites.append(self._site(site, entering))
        return want

    # ------------------------------------------------------------------ whole graph

    def _whole(self, want: dict[str, Array], feeds: dict[str, Array]) -> None:
        adapted = self._adapted(feeds, want)
        self.progress("the second model", 0.7)
        got = self._execute(self.second, self.folders[1], adapted)
        self.progress("the noise floor", 0.85)
        if self.interface is not None:
            room = capacity(self.interface, feeds)
            got = float_outputs(self.interface, got, adapted, length=room)
        exact = self._exact_outputs(feeds)
        if self.lossy:
            self._note("int8 caches change values: outputs are informational, sites decide")
        for name in (n for n in want if n in got):
            if want[name].shape != got[name].shape:
                self._note(f"output {name}: {want[name].shape} became {got[name].shape}")
                if not self.lossy:
                    self.report.missing = f"output {name} has another shape"
                continue
            row = self._measure(want[name], got[name], exact.get(name))
            self.report.outputs.append(OutputRow(name, row, judged=not self.lossy))
        if missing := sorted(want.keys() ^ got.keys()):
            self._note(f"outputs of one model only: {', '.join(missing)}")

    def _exact_outputs(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """The original in another precision; {} when too large, or onnxruntime cannot run it."""
        if weight_bytes(self.original) > _NOISE_LIMIT:
            self._note("no noise floor for the whole graph: its weights are too large to double")
            return {}
        try:
            other = in_other_precision(self.original, self.dtype, narrower=self.narrower)
            return self._execute(other, self.folders[0], feeds, as_written=True)
        except SfaError as error:
            _LOG.debug("no twin for the noise floor: %s", error)
            self._note("no noise floor for the whole graph: it does not run in another precision")
            return {}

    def _adapted(self, feeds: dict[str, Array], want: dict[str, Array]) -> dict[str, Array]:
        """Feeds for the second model; `want`: what the first model made of `feeds`."""
        if self.interface is not None:
            feeds = converted_feeds(self.interface, feeds, want)
        return as_typed(feeds, self.types) if self.narrower else feeds

    # ------------------------------------------------------------------ sites

    def _site(self, site: Site, values: dict[str, Array]) -> SiteRow:
        if not site.outputs:
            return _skipped(site, "no value downstream of the operator is known to the first model")
        feeds = {n: values[n] for n in site.border if n in values}
        types = {n: int(helper.np_dtype_to_tensor_dtype(a.dtype)) for n, a in feeds.items()}
        first = region_model(self.first, site.before, types, site.outputs)
        theirs = as_typed(feeds, self.types) if self.narrower else feeds
        kinds = {n: int(helper.np_dtype_to_tensor_dtype(a.dtype)) for n, a in theirs.items()}
        second = region_model(self.second, site.after, kinds, site.outputs)
        try:
            want = self._execute(first, self.folders[0], feeds)
            got = self._execute(second, self.folders[1], theirs)
            if self.lossy:
                return self._quantised(site, values, feeds, want, got)
        except SfaError as error:
            return _skipped(site, str(error))
        return self._row(site, "captured", want, got, self._exact_region(first, feeds))

    def _quantised(
        self,
        site: Site,
        values: dict[str, Array],
        feeds: dict[str, Array],
        plain: dict[str, Array],
        got: dict[str, Array],
    ) -> SiteRow:
        """A converted site: judged against the original's on int8-rounded latents."""
        selects = is_selection(plain)
        node = self.second.graph.node[site.own if selects else attending(self.second, site)]
        if selects and node.op_type == LIGHTNING_INDEXER.name:  # its keys are not rounded
            return self._row(site, "captured", plain, got, {})
        distance = other_keys if selects else relative_distance
        loss = max(distance(plain[n], got[n]) for n in plain)
        flips = any(packs_keys(self.second.graph.node[i]) for i in site.after)
        rounded = {} if flips else rounded_values(self.second, site, self.interface, values)
        known = feeds | rounded
        types = {n: int(helper.np_dtype_to_tensor_dtype(a.dtype)) for n, a in known.items()}
        above = region_above(self.first, site.outputs, {*site.border, *rounded})
        first = region_model(self.first, above, types, site.outputs)
        if {i.name for i in first.graph.input} & rounded.keys():
            want = self._execute(first, self.folders[0], known)
            row = self._row(site, "rounded", want, got, self._exact_region(first, known))
            return dataclasses.replace(row, loss=loss)
        names = [n for n in dict.fromkeys((*node.input, *node.output)) if n and n not in feeds]
        types = {n: int(helper.np_dtype_to_tensor_dtype(a.dtype)) for n, a in feeds.items()}
        inner = self._execute(
            region_model(self.second, site.after, types, names), self.folders[1], feeds
        )
        inner |= feeds
        own = in_order(inner[node.output[0]])
        difference = self._measure(judge(node, inner, self.rounding), own, None)
        plausible = loss <= (_PLAUSIBLE_FLIPS if selects else _PLAUSIBLE_LOSS)
        if not plausible and flips and not selects and difference.passed:
            return _skipped(site, f"{loss:.0%} off; {UNTOLD_KEYS}")
        limit = "" if plausible else f"{loss:.0%} is more than int8 can explain"
        return SiteRow(
            site.name, site.op_type, site.layer, "reference", difference, loss, reason=limit
        )

    def _row(self, site: Site, method: Any, want: Values, got: Values, exact: Values) -> SiteRow:
        """The worst of the site's outputs."""
        if apart := [n for n in want if want[n].shape != got[n].shape]:
            name = apart[0]
            self.report.missing = f"{name} of {site.name}: {want[name].shape} -> {got[name].shape}"
            return _skipped(site, f"another shape: {self.report.missing}")
        rows = [self._measure(want[n], got[n], exact.get(n)) for n in want]
        worst = max(rows, key=lambda d: (not d.passed, d.relative))
        return SiteRow(site.name, site.op_type, site.layer, method, worst)

    def _exact_region(self, region: ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
        """A site's region in another precision; {} when too large, or it cannot run."""
        sizes = (
            math.prod(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in infos(region, feeds).values()
        )
        if max(sizes, default=0) * 8 > _LARGEST:
            return {}
        try:
            known = None if self.dtype is None else ElemTypes(self.original)
            other = in_other_precision(region, self.dtype, narrower=self.narrower, known=known)
            return self._execute(other, self.folders[0], feeds, as_written=True)
        except SfaError as error:
            _LOG.debug("no twin for a site's noise floor: %s", error)
            return {}

    def _random(self, site: Site, feeds: dict[str, Array]) -> SiteRow:
        """Both regions, under one random graph, without the rest of the model."""
        try:
            model, entering = joined_model(self.first, self.second, site, self.folders[0])
            second = infos(self.second, feeds)
            known = second | infos(self.first, feeds)
            for name, info in second.items():
                fill_dims(known[name], info)
            if unknown := sorted(n for n in entering if n not in known):
                return _skipped(site, f"the shape of {unknown[0]} is not in the model")
            model.graph.input.extend(known[n] for n in sorted(entering))
            values = self._execute(model, self.folders[0], random_feeds(model, self.seed))
        except SfaError as error:
            return _skipped(site, str(error))
        want = {n: values[n] for n in site.outputs}
        got = {n: values[n + AFTER] for n in site.outputs}
        return self._row(site, "random", want, got, {})

    def _measure(self, want: Array, got: Array, exact: Array | None) -> Any:
        floating = want.dtype.kind not in "iub"
        return measure(want, got, **self.bounds, exact=exact,
                       dtype=self.dtype if floating else None)  # fmt: skip

    def _note(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.notes.append(text)


def _name(model: Model) -> str:
    return model.graph.name if isinstance(model, ModelProto) else os.fspath(model)


def _skipped(site: Site, reason: str) -> SiteRow:
    return SiteRow(site.name, site.op_type, site.layer, "skipped", reason=reason)


def _folder(model: Model) -> Path | None:
    return None if isinstance(model, ModelProto) else Path(model).resolve().parent


def _conversion(before: ModelProto, after: ModelProto) -> Interface | None:
    """How `after`'s caches differ from `before`'s; None when the interface is the same."""
    interface = read_interface(after)
    return None if interface is None or read_interface(before) is not None else interface
