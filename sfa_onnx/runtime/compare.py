"""Is the fused model the same? Each fused site alone, then the whole graph.

Sites first: the first model is run once and the values at every site's border are captured; the
replaced region and its replacement then run on the same values ("captured"). Where the whole model
cannot run, both regions run on random values that share one graph above them ("random"). Where the
cache was quantised on purpose there is no equivalence to test: the operator is judged by the
reference on its own inputs, and the loss is told ("reference").
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from sfa_onnx import reference
from sfa_onnx.errors import SfaError, UsageError
from sfa_onnx.kv_convert.interface import Interface, adapt_feeds, float_outputs, read_interface
from sfa_onnx.model import load_model
from sfa_onnx.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT, find_op
from sfa_onnx.runtime.difference import CompareReport, OutputRow, SiteRow, measure
from sfa_onnx.runtime.elem_types import ElemTypes
from sfa_onnx.runtime.execute import execute, fill_dims, infos, with_outputs, with_structure
from sfa_onnx.runtime.extract import AFTER, Site, find_sites, joined_model, region_model
from sfa_onnx.runtime.feeds import describe, random_feeds
from sfa_onnx.runtime.ort import Model
from sfa_onnx.runtime.twin import FLOATS, twin, uses

__all__ = ["compare"]

Array = NDArray[Any]
_LOG = logging.getLogger("sfa_onnx")
_NOISE_LIMIT: Final = 1 << 29  # bytes of weights up to which the whole graph gets a float64 twin
_LARGEST: Final = 1 << 31  # bytes of a region's largest tensor in float64
_TOGETHER: Final = 8  # sites whose border values are captured in one run


def compare(
    before: Model,
    after: Model,
    *,
    inputs: Mapping[str, Array] | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    seed: int = 0,
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

    Raises:
        UsageError: a file is missing, or `inputs` does not fit.
        MissingError: the operator library was not built.
        ModelError: a file is no model, or onnxruntime refuses the fused model.
    """
    started = time.perf_counter()
    task = _Comparison(before, after, {"atol": atol, "rtol": rtol}, dict(inputs or {}), seed)
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
    ) -> None:
        self.bounds, self.inputs, self.seed = bounds, inputs, seed
        self.folders = [_folder(m) for m in (before, after)]
        self.original, self.fused = (
            with_structure(load_model(m), f)
            for m, f in zip((before, after), self.folders, strict=True)
        )
        self.report = CompareReport(_name(before), _name(after))
        self.interface = _conversion(self.original, self.fused)
        self.lossy = self.interface is not None or _packs_floats(self.fused) > _packs_floats(
            self.original
        )
        self.dtype: str | None = None  # the type whose bounds hold; None: each tensor's own
        self.first, self.second = self.original, self.fused
        if uses(self.original, TensorProto.BFLOAT16):
            self.dtype = "bfloat16"
            both = (self.original, self.fused)
            self.first, self.second = (
                twin(m, [TensorProto.BFLOAT16], TensorProto.FLOAT) for m in both
            )
            self._note(
                "bfloat16: onnxruntime's CPU provider lacks it, so float32 twins of both models"
                " were compared; our operators kept bfloat16"
            )

    def run(self) -> CompareReport:
        sites = find_sites(self.first, self.second)
        if not sites:
            self._note("no fused site: the second model holds no operator that the first lacks")
        feeds = random_feeds(self.original, self.seed, self.inputs, fused=self.fused)
        self.report.inputs = {
            n: f"{describe(a)}, {'given' if n in self.inputs else 'random'}"
            for n, a in feeds.items()
        }
        try:
            want = self._sites(sites, feeds)
            self._whole(want, feeds)
        except UsageError:
            raise
        except SfaError as error:
            self._note(f"the whole models were not run: {error}")
            done = {row.name for row in self.report.sites}
            rest = [s for s in sites if not self.lossy and _title(s) not in done]
            self.report.sites += [self._random(site, feeds) for site in rest]
        return self.report

    def _sites(self, sites: list[Site], feeds: dict[str, Array]) -> dict[str, Array]:
        """Judge every site; returns the first model's outputs, which come with the first run."""
        if self.lossy:
            self.report.sites += self._judged(sites, feeds)
            return execute(self.first, self.folders[0], feeds)
        made = {o for n in self.first.graph.node for o in n.output}
        outputs = [o.name for o in self.first.graph.output]
        want: dict[str, Array] = {}
        for start in range(0, max(len(sites), 1), _TOGETHER):
            group = sites[start : start + _TOGETHER]
            border = [v for s in group for v in s.border if v in made]
            names = list(dict.fromkeys([*border, *([] if want else outputs)]))
            values = execute(with_outputs(self.first, names), self.folders[0], feeds, names)
            want = want or {n: values[n] for n in outputs}
            self.report.sites += [self._site(site, values | feeds) for site in group]
        return want

    # ------------------------------------------------------------------ whole graph

    def _whole(self, want: dict[str, Array], feeds: dict[str, Array]) -> None:
        adapted = self._adapted(feeds)
        got = execute(self.second, self.folders[1], adapted)
        if self.interface is not None:
            got = float_outputs(self.interface, got, adapted)
        exact = self._exact_outputs(feeds)
        if self.lossy:
            self._note("int8 caches are no equivalence: outputs are told, sites are judged")
        for name in (n for n in want if n in got):
            if want[name].shape != got[name].shape:
                self._note(f"output {name}: {want[name].shape} became {got[name].shape}")
                continue
            row = self._measure(want[name], got[name], exact.get(name))
            self.report.outputs.append(OutputRow(name, row, judged=not self.lossy))
        if missing := sorted(want.keys() ^ got.keys()):
            self._note(f"outputs of one model only: {', '.join(missing)}")

    def _exact_outputs(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """The original in another precision; {} when too large, or onnxruntime cannot run it."""
        if _weight_bytes(self.original) > _NOISE_LIMIT:
            self._note("no noise floor for the whole graph: its weights are too large to double")
            return {}
        try:
            if self.dtype is None:
                other = twin(self.original, FLOATS, TensorProto.DOUBLE)
            else:  # the original rounds at every step; the float32 twin hardly at all
                bfloat16 = [TensorProto.BFLOAT16]
                other = twin(self.original, bfloat16, TensorProto.FLOAT, rounded=True)
            return execute(other, self.folders[0], feeds)
        except SfaError as error:
            _LOG.debug("no twin for the noise floor: %s", error)
            self._note("no noise floor for the whole graph: it does not run in another precision")
            return {}

    def _adapted(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Feeds for the second model."""
        if self.interface is None:
            return feeds
        tokens = _new_tokens(self.original, self.interface, feeds)
        return adapt_feeds(self.interface, feeds, new_tokens=tokens)

    # ------------------------------------------------------------------ sites

    def _site(self, site: Site, values: dict[str, Array]) -> SiteRow:
        title, feeds = _title(site), {n: values[n] for n in site.border if n in values}
        if not site.outputs:
            reason = "nothing downstream of the operator has a name that the first model knows"
            return SiteRow(title, site.op_type, site.layer, "skipped", reason=reason)
        types = {n: int(helper.np_dtype_to_tensor_dtype(a.dtype)) for n, a in feeds.items()}
        first = region_model(self.first, site.before, types, site.outputs)
        second = region_model(self.second, site.after, types, site.outputs)
        try:
            want = execute(first, self.folders[0], feeds)
            got = execute(second, self.folders[1], feeds)
        except SfaError as error:
            return SiteRow(title, site.op_type, site.layer, "skipped", reason=str(error))
        exact = self._exact_region(first, feeds)
        return self._row(site, "captured", want, got, exact)

    def _row(
        self,
        site: Site,
        method: Any,
        want: dict[str, Array],
        got: dict[str, Array],
        exact: dict[str, Array],
    ) -> SiteRow:
        """The worst of the site's outputs."""
        rows = [self._measure(want[n], got[n], exact.get(n)) for n in want]
        worst = max(rows, key=lambda d: (not d.passed, d.relative))
        return SiteRow(_title(site), site.op_type, site.layer, method, worst)

    def _exact_region(self, region: ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
        """A site's region in another precision; {} when too large, or it cannot run."""
        sizes = (
            math.prod(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in infos(region, feeds).values()
        )
        if max(sizes, default=0) * 8 > _LARGEST:
            return {}
        try:
            if self.dtype is None:
                other = twin(region, FLOATS, TensorProto.DOUBLE)
            else:
                known = ElemTypes(self.original)
                bfloat16 = [TensorProto.BFLOAT16]
                other = twin(region, bfloat16, TensorProto.FLOAT, rounded=True, known=known)
            return execute(other, self.folders[0], feeds)
        except SfaError as error:
            _LOG.debug("no twin for a site's noise floor: %s", error)
            return {}

    def _random(self, site: Site, feeds: dict[str, Array]) -> SiteRow:
        """Both regions, under one random graph, without the rest of the model."""
        title = _title(site)
        try:
            model, entering = joined_model(self.first, self.second, site)
            second = infos(self.second, feeds)
            known = second | infos(self.first, feeds)
            for name, info in second.items():
                fill_dims(known[name], info)
            if unknown := sorted(n for n in entering if n not in known):
                reason = f"the shape of {unknown[0]} is not in the model"
                return SiteRow(title, site.op_type, site.layer, "skipped", reason=reason)
            model.graph.input.extend(known[n] for n in sorted(entering))
            values = execute(model, self.folders[0], random_feeds(model, self.seed))
        except SfaError as error:
            return SiteRow(title, site.op_type, site.layer, "skipped", reason=str(error))
        want = {n: values[n] for n in site.outputs}
        got = {n: values[n + AFTER] for n in site.outputs}
        return self._row(site, "random", want, got, {})

    def _judged(self, sites: list[Site], feeds: dict[str, Array]) -> list[SiteRow]:
        """Operators of a quantised model against the reference on their own inputs."""
        nodes = [self.second.graph.node[s.own] for s in sites]
        names = dict.fromkeys(v for n in nodes for v in (*n.input, *n.output) if v)
        adapted = self._adapted(feeds)
        made = {o for n in self.second.graph.node for o in n.output}
        wanted = [n for n in names if n in made]
        model = with_outputs(self.second, wanted)
        values = adapted | execute(model, self.folders[1], adapted, wanted)
        known = {o for n in self.first.graph.node for o in n.output}
        shared = [s.outputs[0] for s in sites if s.outputs and s.outputs[0] in known]
        plain = execute(with_outputs(self.first, shared), self.folders[0], feeds, shared)
        rows = []
        for site, node in zip(sites, nodes, strict=True):
            got = values[node.output[0]]
            difference = self._measure(_judge(node, values), got, None)
            loss = _loss(plain, values, site, node)
            title = _title(site)
            rows.append(SiteRow(title, site.op_type, site.layer, "reference", difference, loss))
        return rows

    def _measure(self, want: Array, got: Array, exact: Array | None) -> Any:
        floating = want.dtype.kind not in "iub"
        return measure(want, got, **self.bounds, exact=exact,
                       dtype=self.dtype if floating else None)  # fmt: skip

    def _note(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.notes.append(text)


def _name(model: Model) -> str:
    return model.graph.name if isinstance(model, ModelProto) else os.fspath(model)


def _title(site: Site) -> str:
    return site.outputs[0] if site.outputs else site.node


def _folder(model: Model) -> Path | None:
    return None if isinstance(model, ModelProto) else Path(model).resolve().parent


def _conversion(before: ModelProto, after: ModelProto) -> Interface | None:
    """How `after`'s caches differ from `before`'s; None when the interface is the same."""
    interface = read_interface(after)
    return None if interface is None or read_interface(before) is not None else interface


def _packs_floats(model: ModelProto) -> int:
    """How many KvCachePack nodes quantise (rather than copy int8 and scales)."""
    return sum(n.op_type == "KvCachePack" and len(n.input) < 3 for n in model.graph.node)


def _weight_bytes(model: ModelProto) -> int:
    return sum(int(np.prod(t.dims)) * 4 for t in model.graph.initializer)


def _new_tokens(model: ModelProto, interface: Interface, feeds: dict[str, Array]) -> int:
    """Rows that one run appends: by how much a cache output is longer than its input."""
    known = infos(model, feeds)
    for cache in interface.caches:
        info = known.get(cache.latent_out)
        if cache.latent_in not in feeds or info is None:
            continue
        dims = info.type.tensor_type.shape.dim
        for label, dim, size in zip(cache.latent_axes, dims, feeds[cache.latent_in].shape,
                                    strict=False):  # fmt: skip
            if label == "S" and dim.dim_value:
                return max(int(dim.dim_value) - int(size), 0)
    return 1


def _judge(node: onnx.NodeProto, values: Mapping[str, Array]) -> Array:
    """The reference's answer for one node."""
    op = find_op(node.domain, node.op_type)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
    inputs = [values[n] if n else None for n in node.input]
    if op is SPARSE_FLASH_ATTENTION_ANTIQUANT:
        return reference.sparse_flash_attention_antiquant(*inputs, **attributes)  # type: ignore[arg-type]
    if op is SPARSE_FLASH_ATTENTION:
        return reference.sparse_flash_attention(*inputs, **attributes)  # type: ignore[arg-type]
    raise UsageError(f"{node.op_type} has no reference to judge by")


def _loss(
    plain: Mapping[str, Array], values: Mapping[str, Array], site: Site, node: onnx.NodeProto
) -> float | None:
    """Relative distance from the unquantised model, where both make the same value."""
    name = site.outputs[0] if site.outputs else ""
    if name not in plain or name != node.output[0] or plain[name].shape != values[name].shape:
        return None
    want, got = plain[name].astype(np.float64), values[name].astype(np.float64)
    norm = float(np.linalg.norm(want))
    return float(np.linalg.norm(got - want)) / norm if norm else None
