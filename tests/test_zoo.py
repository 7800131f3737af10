"""Fusing the zoo: a quick selection of models of our own, near misses and property tests.

The whole zoo (some 900 models) runs with `python -m tests.zoo.score`.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sfa_onnx
from tests.zoo import catalogue, mutate
from tests.zoo.base import Case
from tests.zoo.edits import EDITS, TOOLS
from tests.zoo.judge import difference, judge, run_original, scaled_error

pytestmark = [pytest.mark.kernel, pytest.mark.torch]

FUSED = (
    "int8-gather-gather-dynamo-dyn",
    "int8-paged-flat-dynamo-dyn",
    "int8-true-paged",
    "int8-attn-sdpa-ts",
    "int8-rule-causal-f16-same-ts",
    "int8-paged-flat-bf16-f32-ts",
    "int8-gather-index_select-ts-dyn",
    "int8-dequant-repeat-ts-dyn",
    "int8-dequant-first-ts",
    "int8-paged-two_level-ts-dyn",
    "int8-paged-materialised-ts",
    "official-layer-ts-dyn",
    "official-layer-f16-same-dynamo",
    "official-layer-bf16-same-ts",
    "official-input-trash-ts",
    "official-mask-one_hot-ts",
    "hf-eager-decode-dynamo",
    "hf-sdpa-decode-ts",
    "hf-sdpa-prefill-ts",
    "exp-official-ts",
    "exp-matmul-finfo-triu-ts-dyn",
    "exp-sdpa-bool-opset23",
    "exp-wide-groups-ts",
    "flash-tnd-lse-ts",
    "layer8-slots-ts-dyn",
    "flash-paged-lonely-ts",
    "hand-opset14",
    "hand-opset26-int8",
    "hand-mask-scatter_max",
    "mask-dense-input-ts",
    "mask-gathered-causal-ts",
    "kernels-prefill-length-dynamo-dyn",
    "kernels-decode-length-ts-static",
    "kernels-running-5-isinf-dynamo-dyn",
    "kernels-masked-ts-static",
    "kernels-halves-dynamo-static",
    "kernels-prefill-all-dynamo-static",
    "kernels-decode-sink-dynamo-static",
    "pools-rows-causal-ts-dyn",
    "guarded-open-last-dynamo",
    "guarded-join-without-first-dynamo",
    "foreign-expanded-4-2-dynamo-static",
    "foreign-tiles-divided-dynamo-static",
)
HONEST = ("int8-honest-ts", "dense-honest-ts")


@functools.lru_cache(maxsize=1)
def _all() -> dict[str, Case]:
    return {case.name: case for case in catalogue.cases()}


def _near_misses() -> list[str]:
    """Every near miss the tracer exports (it is quick); the dynamo twins run in the full score."""
    mine = ("kernels-halves-swapped-dynamo-static", "kernels-running-eps-dynamo-static")
    return [n for n in _all() if ("-miss-" in n and n.endswith("-ts")) or n in mine]


@pytest.mark.parametrize("name", [*FUSED, *HONEST])
def test_fuses_and_computes_the_same(name: str) -> None:
    verdict = judge(_all()[name])
    assert verdict.ok, f"{verdict.failure} | {verdict.reasons} | {verdict.stopped}"
    assert verdict.error is not None


@pytest.mark.parametrize("name", _near_misses())
def test_refuses_a_near_miss_with_a_reason(name: str) -> None:
    verdict = judge(_all()[name])
    assert verdict.ok, f"{verdict.failure} | fused {verdict.fused} | {verdict.reasons}"


@pytest.mark.parametrize("name", ["router", "plain", "window", "masked", "threshold"])
def test_leaves_other_attention_alone(name: str) -> None:
    case = _all()[f"mask-decoy-{name}"]
    report = sfa_onnx.fuse(case.build())
    assert not report.sites
    assert report.model.graph.node == case.build().graph.node


@pytest.mark.parametrize(
    "name", ["official-layer-ts-dyn", "hf-eager-decode-dynamo", "int8-paged-two_level-ts-dyn"]
)
def test_everything_outside_the_site_stays_byte_for_byte(name: str) -> None:
    model = _all()[name].build()
    before = [n.SerializeToString() for n in model.graph.node]
    report = sfa_onnx.fuse(model)
    assert [n.SerializeToString() for n in model.graph.node] == before, "the input was changed"
    [site] = report.fused
    removed = {*site.removed, *(name for chosen in report.indexers for name in chosen.removed)}
    after = [n.SerializeToString() for n in report.model.graph.node]
    gone = [b for b in before if b not in set(after)]
    assert len(gone) == len(removed)
    kept = [b for b in before if b in set(after)]
    assert [a for a in after if a in set(before)] == kept, "the order changed"
    old = {t.name: t.SerializeToString() for t in model.graph.initializer}
    new = {t.name: t.SerializeToString() for t in report.model.graph.initializer}
    assert all(new[n] == old[n] for n in new.keys() & old.keys())
    assert [o.name for o in report.model.graph.output] == [o.name for o in model.graph.output]
    assert [i.name for i in report.model.graph.input] == [i.name for i in model.graph.input]
    onnx.checker.check_model(report.model)


BASES = ("hand-int8-flat", "hand-opset17-dense", "official-layer-ts", "int8-rule-causal-ts-dyn")


@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_the_zoo_change_nothing(edit: str) -> None:
    """The edits are honest themselves: otherwise the next test would prove nothing."""
    for name in BASES:
        case = _all()[name]
        model = case.build()
        outs = run_original(EDITS[edit](model), case.feeds(1))
        assert scaled_error(run_original(model, case.feeds(1)), outs) <= 1e-6


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    name=st.sampled_from(BASES),
    edits=st.lists(
        st.sampled_from(sorted(set(EDITS) - {"function"})), min_size=1, max_size=3, unique=True
    ),
)
def test_other_spellings_of_the_same_graph_fuse_alike(name: str, edits: list[str]) -> None:
    case = _all()[name]
    model = case.build()
    for edit in edits:
        model = EDITS[edit](model)
    onnx.checker.check_model(model)
    report = sfa_onnx.fuse(model)
    assert len(report.fused) == 1, [s.reason for s in report.refused]
    assert difference(case.build(), report.model, case.feeds(2), "f32") <= 2e-5


@pytest.mark.parametrize("tool", [*TOOLS, "function"])
def test_fuses_after_other_tools(tool: str) -> None:
    case = _all()["official-layer-ts"]
    model = {**TOOLS, **EDITS}[tool](case.build())
    report = sfa_onnx.fuse(model)
    assert len(report.fused) == 1, [s.reason for s in report.refused]
    assert difference(case.build(), report.model, case.feeds(2), "f32") <= 2e-5


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(
    name=st.sampled_from(("hand-float-nd_batch", "hand-int8-flat", "hand-opset17-dense")),
    seed=st.integers(0, 10_000),
)
def test_fusing_never_changes_what_a_mutant_computes(name: str, seed: int) -> None:
    case = _all()[name]
    changed, what = mutate.mutant(case.build(), seed)
    if what and mutate.runs(changed, case.feeds(3)):
        _, problem = mutate.survives(changed, case)
        assert not problem, f"{what}: {problem}"


def test_mutants_are_telling() -> None:
    """Mutations do change results: the test above is not vacuous."""
    case = _all()["hand-int8-flat"]
    model, feeds = case.build(), case.feeds(3)
    original = run_original(model, feeds)
    different = 0
    for seed in range(40):
        changed, what = mutate.mutant(model, seed)
        if what and mutate.runs(changed, feeds):
            outs = run_original(changed, feeds)[: len(original)]
            same = [
                a.shape == b.shape and np.allclose(a, b)
                for a, b in zip(original, outs, strict=True)
            ]
            different += not all(same)
    assert different >= 10
