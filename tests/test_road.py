"""The road the README draws, for every kin and two exporters: each verb after every other.

An export takes longer than all verbs together, so by default a part of the cross product is gone
through in which every pair of choices meets; `SFA_ONNX_ROAD=all` goes through all of it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.ascend import checks
from sfa_onnx.ascend.handover import write
from sfa_onnx.ascend.handover.command import free_dims
from sfa_onnx.ascend.handover.data import read_arrays
from sfa_onnx.ascend.handover.scope import cut, parse_scope
from sfa_onnx.errors import ModelError
from sfa_onnx.kv_convert import convert
from sfa_onnx.kv_convert.interface import adapt_feeds, read_interface
from sfa_onnx.runtime.compare.run import compare
from sfa_onnx.runtime.feeds.draw import random_feeds
from tests.op_models import needs_library

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.zoo import kin as zoo  # noqa: E402 - only where torch and transformers are
from tests.zoo.kin import Kin  # noqa: E402

pytestmark = pytest.mark.torch

SOC, BLOCK = "Ascend910B2", 16
FORMS = ("int8", "packed-int8", "paged", "paged-int8")
KINDS = ("deepseek_v32", "glm_moe_dsa", "axk2", "dots3_note", "mistral_large4")
PAIRS = (
    Kin("deepseek_v32", "hf", "decode", padded=True),
    Kin("deepseek_v32", "hf", "decode", cache="static"),
    Kin("deepseek_v32", "hf", "decode", cache="static", heads=1),
    Kin("deepseek_v32", "torch", "prefill"),
    Kin("glm_moe_dsa", "torch", "decode", padded=True),
    Kin("glm_moe_dsa", "hf", "prefill"),
    Kin("axk2", "torch", "decode"),
    Kin("dots3_note", "hf", "prefill", padded=True),
    Kin("mistral_large4", "hf", "decode", nope=True),
)


def _all() -> Iterator[Kin]:
    flags = (False, True)
    for model, exporter, phase, pad in itertools.product(
        KINDS, ("hf", "torch"), ("decode", "prefill"), flags
    ):
        yield Kin(model, exporter, phase, padded=pad)
        if phase == "decode" and exporter == "hf":
            yield Kin(model, exporter, phase, padded=pad, cache="static")


WALKED = (*_all(), PAIRS[-1]) if os.environ.get("SFA_ONNX_ROAD") == "all" else PAIRS


@pytest.fixture
def road(request: pytest.FixtureRequest, tmp_path: Path, exports: Path) -> tuple[Kin, Path, Path]:
    """The kin, its export and the fused model."""
    kin: Kin = request.param
    before, after = tmp_path / "m.onnx", tmp_path / "m.sfa.onnx"
    before.write_bytes(zoo.exported(kin, exports))
    report = sfa_onnx.fuse(before, after)
    assert len(report.fused) == kin.layers, [s.reason for s in report.refused]
    return kin, before, after


def _ours(model: onnx.ModelProto) -> list[str]:
    """The operators of a fused model, in its order: selections and attention."""
    return [n.op_type for n in model.graph.node if n.domain]


def runs(path: Path) -> None:
    """A model takes what is drawn for it, and says something."""
    got = runtime.run(path, random_feeds(path))
    assert all(a.dtype.kind != "f" or np.isfinite(a).all() for a in got.values())


@needs_library
@pytest.mark.parametrize("road", WALKED, ids=str, indirect=True)
def test_every_verb_after_every_other(road: tuple[Kin, Path, Path], tmp_path: Path) -> None:
    kin, before, after = road
    first = compare(before, after)
    assert first.passed, (first.verdict, first.notes)
    assert all(int(text.split("[")[1].split(",")[0].rstrip("]")) == zoo.BATCH
               for name, text in first.inputs.items() if name.endswith("input_ids"))  # fmt: skip
    runs(after)
    if kin.padded:
        _hidden_rows(kin, before, after)
    for form in FORMS:
        _converted(kin, form, before, after, tmp_path / f"m.{form}.onnx")
    plain = tmp_path / "plain.onnx"
    ours = _ours(onnx.load(after))
    assert len(sfa_onnx.unfuse(after, plain).sites) == len(ours)
    assert compare(before, plain).passed
    again = sfa_onnx.fuse(plain, expect_sites=len(ours)).model
    assert [n.op_type for n in again.graph.node] == [n.op_type for n in onnx.load(after).graph.node]
    found = checks.check(after, cann="9.1", soc_version=SOC)
    assert not any(f.rule == "not-sound" for f in found.findings)
    stage = write(after, tmp_path / "stage", soc_version=SOC, scope="layer:0", execute=False)
    assert stage.operators == ours.index("NPUSparseFlashAttention") + 1  # its indexer, too
    _stages(after)
    _handed_over(kin, after, tmp_path / "fused", None)


def _hidden_rows(kin: Kin, before: Path, after: Path) -> None:
    """A sequence that is padding throughout: its rows differ, as the record says, and no others."""
    feeds = random_feeds(before)
    name = next(n for n in feeds if n.endswith("attention_mask"))
    feeds[name] = np.ones_like(feeds[name])
    feeds[name][0] = 0
    one, other = (runtime.run(path, feeds) for path in (before, after))
    key = next(n for n in one if one[n].ndim == 3 and one[n].shape[-1] in (zoo.VOCAB, 64))
    np.testing.assert_allclose(one[key][1:], other[key][1:], rtol=2e-3, atol=2e-4)
    assert not np.allclose(one[key][0], other[key][0], rtol=2e-3, atol=2e-4)
    for site in sfa_onnx.fuse(before, expect_sites=kin.layers).fused:
        assert any("rows without a visible key" in a for a in site.record.assumptions)


def _converted(kin: Kin, form: str, before: Path, after: Path, path: Path) -> None:
    """One form of the cache: converted, compared, run and handed over."""
    if form.startswith("paged") and kin.phase == "prefill":
        with pytest.raises(ModelError, match="do not come from a cache among the inputs"):
            convert(after, path, to=form, block_size=BLOCK)
        return
    convert(after, path, to=form, block_size=BLOCK)
    report = compare(before, path)
    assert report.passed, (form, report.verdict, report.notes)
    attention = [site for site in report.sites if site.op_type != "NPULightningIndexer"]
    assert len(attention) == kin.layers
    if form != "paged":  # which rounds nothing
        assert all(site.loss is not None and site.loss < 0.05 for site in attention)
    runs(path)
    if form.startswith("paged"):
        _stages(path)
        for scope in (None, f"layer:{kin.layers - 1}"):
            _handed_over(kin, path, path.parent / f"{form}.{scope or 'whole'}", scope)


def _handed_over(kin: Kin, path: Path, folder: Path, scope: str | None) -> None:
    """What `atc` writes of a float32 model runs on the inputs beside it, 16-bit inside."""
    model = onnx.load(path)
    feeds = random_feeds(model)
    part = model if scope is None else cut(model, parse_scope(scope))
    named = {d.dim_param: feeds[v.name].shape[i] for v in model.graph.input
             for i, d in enumerate(v.type.tensor_type.shape.dim)}  # fmt: skip
    dims = {name: named[name] for name in free_dims(part) if name in named}
    kind = "bf16" if kin.padded else "fp16"  # hidden keys have a weight that fp16 cannot hold
    report = write(path, folder, soc_version=SOC, scope=scope, dims=dims, npu_dtype=kind,
                   execute=False)  # fmt: skip
    assert not report.unbound
    # The tiny models' sizes are not the kernel's, nor does it pack rows without a rope; nothing
    # else is wrong.
    sizes = ("row-size", "attribute-value", "heads", "block")
    assert all(e.startswith(sizes) or (kin.nope and "no rope" in e) for e in report.errors)
    told = read_arrays(folder / "inputs", "inputs.json")
    got = runtime.run(report.model, told)
    assert all(a.dtype.kind != "f" or np.isfinite(a).all() for a in got.values())
    if any(a.dtype == np.int8 for a in told.values()):
        return  # rows of another width
    for name, value in runtime.run(part, told).items():
        assert got[name].dtype == value.dtype
        if value.dtype.kind == "f" and value.size:  # a near tie may turn a row in 16 bits
            gaps, norms = (
                np.linalg.norm(a.reshape(-1, a.shape[-1]), axis=-1)
                for a in (got[name] - value, value)
            )
            ratios = np.sort(gaps / np.maximum(norms, 1e-6))
            assert ratios[(len(ratios) - 1) // 2] < 0.1, name  # of two rows, the other may be one


def _stages(after: Path) -> None:
    """The stages, one behind the other, give what the whole model gives."""
    model = onnx.load(after)
    feeds = random_feeds(model)
    whole, known = runtime.run(model, feeds), dict(feeds)
    told: dict[str, np.ndarray] = {}
    for layer in range(2):
        part = cut(model, parse_scope(f"layer:{layer}"))
        entering = {v.name for v in part.graph.input}
        assert entering <= known.keys(), "a stage wants what no other stage gives"
        handed = entering - feeds.keys()
        assert len(handed) <= 2, f"hidden state and a shared selection, got {handed}"
        caches = {n for n in entering & feeds.keys() if n not in told and "mask" not in n}
        other = [n for n in caches if f".{1 - layer}." in n or n.endswith(f"_{1 - layer}")]
        assert all("length" in n for n in other), f"layer {layer} takes {other}"
        told |= runtime.run(part, {n: known[n] for n in entering})
        known |= told
    assert whole.keys() <= told.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(told[name], value, rtol=1e-5, atol=1e-5)


# ---- twenty steps ------------------------------------------------------------------------------

STEPS = 20
WALKS = tuple(kin for kin in PAIRS if kin.phase == "decode" and kin.model in KINDS[:2])


class Walk:
    """One model stepping through given tokens, its caches carried along."""

    def __init__(self, kin: Kin, model: onnx.ModelProto, caches: dict[str, np.ndarray]) -> None:
        self.kin, self.session = kin, runtime.session(model)
        self.inputs = [v.name for v in model.graph.input]
        self.outputs = [v.name for v in model.graph.output]
        self.interface = read_interface(model)
        self.state, self.length = dict(caches), zoo.PAST
        if self.interface is not None and self.interface.form != "int8":
            self.state = adapt_feeds(self.interface, caches, new_tokens=0)
            self.state.pop("slot_mapping", None)
            if self.interface.paged:
                self._room(caches)

    def _room(self, caches: dict[str, np.ndarray]) -> None:
        """Pages for all steps to come; what is written there is overwritten."""
        assert self.interface is not None
        ahead = STEPS if not self.interface.caches[0].in_place else 0
        self.state = adapt_feeds(
            self.interface, caches, new_tokens=ahead, **({"start": zoo.PAST} if ahead else {})
        )
        self.state.pop("slot_mapping")

    def step(self, tokens: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
        feeds = {**self.state, "input_ids": tokens}
        if kept is not None and "attention_mask" in self.inputs:
            feeds["attention_mask"] = kept
        if "block_table" in feeds:
            table = feeds["block_table"]
            page = table[:, self.length // BLOCK].astype(np.int64) * BLOCK
            feeds["slot_mapping"] = (page + self.length % BLOCK).astype(np.int32)
            if not (self.interface and self.interface.caches[0].in_place):
                feeds["actual_seq_lengths_kv"] = np.full(len(table), self.length + 1, np.int32)
        got = runtime.run(self.session, {n: feeds[n] for n in self.inputs})
        self.length += 1
        for name, value in got.items():
            back = self._input(name)
            if back in self.inputs:
                self.state[back] = value
        return got["logits"]

    def _input(self, output: str) -> str:
        return output.replace("output.", "input.", 1) if "output." in output else (
            output.replace("new_", "past_", 1)
        )  # fmt: skip


@needs_library
@pytest.mark.parametrize("kin", WALKS, ids=str)
def test_twenty_steps_in_every_form_stay_with_the_original(kin: Kin, exports: Path) -> None:
    source = onnx.load_from_string(zoo.exported(kin, exports))
    fused = sfa_onnx.fuse(source, expect_sites=kin.layers).model
    models = {"original": source, "fused": fused}
    models |= {form: convert(fused, to=form, block_size=BLOCK).model for form in FORMS}
    names = [v.name for v in source.graph.input]
    given = zoo.inputs(kin, zoo.make(kin))
    first = zoo.named(kin, names, given)
    caches = {n: a for n, a in first.items() if n not in ("input_ids", "attention_mask")}
    walks = {name: Walk(kin, model, caches) for name, model in models.items()}
    rng = np.random.default_rng(3)
    kept = first.get("attention_mask")
    gaps: dict[str, list[float]] = {name: [] for name in models}
    apart: list[float] = []
    for _ in range(STEPS):
        tokens = rng.integers(3, zoo.VOCAB, (zoo.BATCH, 1))
        told = {name: walk.step(tokens, kept) for name, walk in walks.items()}
        for name, logits in told.items():
            gaps[name].append(_distance(told["original"], logits))
        apart += [_distance(told["int8"], told[form]) for form in ("packed-int8", "paged-int8")]
        if kept is not None and kin.cache == "dynamic":
            kept = np.pad(kept, ((0, 0), (0, 1)), constant_values=1)
    assert max(gaps["fused"] + gaps["paged"]) < 1e-4
    # A rounded row may turn a near tie of the selection, so single steps may be further off.
    assert all(np.median(gaps[form]) < 0.05 for form in FORMS), gaps
    assert np.median(apart) < 1e-4, apart
    assert max(apart) < 0.05, apart


def _distance(want: np.ndarray, got: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_a_length_that_a_cache_counts_in_python_is_kept_open() -> None:
    """A sliding layer, as dots3_note's third: left alone, the traced length is a constant."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    layer, rows = DynamicSlidingWindowLayer(sliding_window=512), torch.zeros(2, 1, 24, 4)
    layer.update(rows, rows)
    cache = SimpleNamespace(layers=[layer])

    class Step(torch.nn.Module):
        def __init__(self, *, told: bool) -> None:
            super().__init__()
            self.told = told

        def forward(self, flat: list[torch.Tensor]) -> torch.Tensor:
            own = zoo.filled(cache, flat).layers[0]
            own.cumulative_length = own.cumulative_length if self.told else layer.cumulative_length
            length, _ = own.get_mask_sizes(1)
            keys, _ = own.update(flat[0][:, :, :1], flat[1][:, :, :1])
            return keys.sum(-1) + torch.ones(length)

    open_dims = dict.fromkeys((0, 2), torch.export.Dim.DYNAMIC)
    given, shapes = ([rows, rows.clone()],), ([open_dims, open_dims],)
    program = torch.export.export(Step(told=True), given, dynamic_shapes=shapes)
    longer = [torch.zeros(3, 1, 31, 4)] * 2
    assert program.module()(longer).shape == (3, 1, 32)
    with pytest.raises(Exception, match=r"static shape of 24|a constant \(24\)"):
        torch.export.export(Step(told=False), given, dynamic_shapes=shapes)


@pytest.mark.skipif(WALKED == PAIRS, reason="walked with SFA_ONNX_ROAD=all")
def test_what_exporters_cannot_do() -> None:
    """A cache of fixed length by torch.onnx.export."""
    with pytest.raises(torch.onnx.OnnxExporterError, match="decompose"):
        zoo.export(Kin("deepseek_v32", "torch", "decode", cache="static"))
