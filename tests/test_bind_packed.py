"""Packed rows that a graph decodes itself: fused onto the cache, look-alikes refused by name."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import pytest

from sfa_onnx import fuse, runtime
from sfa_onnx.report import FuseReport
from tests.packed_models import Spec, build, feeds

BASE = Spec()
# Largest |fused - original| as a share of max |original|: one rounding of the type.
BOUND = {"f16": 1e-3, "bf16": 8e-3, "f32": 2e-6}


def _fused(spec: Spec) -> tuple[onnx.ModelProto, FuseReport, onnx.NodeProto]:
    model = build(spec)
    report = fuse(model)
    assert len(report.fused) == 1, [s.reason for s in report.refused]
    (node,) = (n for n in report.model.graph.node if n.domain == "npu")
    return model, report, node


def _attributes(node: onnx.NodeProto) -> dict:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _difference(spec: Spec, before: onnx.ModelProto, after: onnx.ModelProto) -> float:
    worst = 0.0
    for seed in (0, 1):
        given = feeds(spec, seed)
        a, b = (
            np.asarray(runtime.run(m, given)["out"]).astype(np.float64) for m in (before, after)
        )
        worst = max(worst, float(np.abs(a - b).max() / np.abs(a).max()))
    return worst


WAYS = {
    "shifts": BASE,
    "shifts, bf16": replace(BASE, dtype="bf16"),
    "every second byte, f32": replace(BASE, decode="strided", dtype="f32"),
    "masks and powers": replace(BASE, decode="and"),
    "modulo, bf16": replace(BASE, decode="mod", dtype="bf16"),
    "signs by comparison": replace(BASE, decode="where"),
    "look-up table": replace(BASE, decode="table"),
    "tile by tile": replace(BASE, tiles="concat"),
    "repeated scales": replace(BASE, tiles="repeat"),
    "no rope": replace(BASE, R=0),
    "query in two parts": replace(BASE, split=True),
    "one index per batch offset": replace(BASE, find="flat", rank=3),
    "elements": replace(BASE, find="elements"),
    "whole cache, then rows": replace(BASE, late=True),
    "float32 around it": replace(BASE, out="f32"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_itself_becomes_the_key(way: str) -> None:
    spec = WAYS[way]
    before, report, node = _fused(spec)
    assert node.input[1] == node.input[2]
    if spec.rank == 4:
        assert node.input[1] == "key"
    left = {n.op_type for n in report.model.graph.node}
    assert not left & {"BitCast", "BitwiseAnd", "KvCachePack", "Softmax"}
    attributes = _attributes(node)
    assert (attributes["tile_size"], attributes["rope_head_dim"]) == (spec.tile, spec.R)
    bound = BOUND["f16" if way == "float32 around it" else spec.dtype]
    assert _difference(spec, before, report.model) <= bound


@pytest.mark.parametrize("find", ["paged", "paged-two"])
@pytest.mark.parametrize("late", [False, True])
def test_pages_stay_pages(find: str, late: bool) -> None:
    spec = replace(BASE, find=find, late=late, dtype="bf16")
    before, report, node = _fused(spec)
    assert _attributes(node)["layout_kv"] == b"PA_BSND"
    assert (node.input[1], node.input[6]) == ("key", "block_table")
    assert _difference(spec, before, report.model) <= BOUND["bf16"]


def test_pages_that_a_bare_index_may_leave_are_gathered() -> None:
    """Without a mask a negative index wraps in the original, which the operator would skip."""
    spec = replace(BASE, find="paged", masked=False)
    before, report, node = _fused(spec)
    assert _attributes(node)["layout_kv"] == b"BSND"
    assert _difference(spec, before, report.model) <= BOUND["f16"]


def test_a_bare_index_into_all_sequences_takes_them_as_one() -> None:
    """index + b * S2 may point into another sequence: only the sum says which row is read."""
    spec = replace(BASE, find="flat", masked=False)
    before, report, _ = _fused(spec)
    given = feeds(spec)
    given["indices"][1, :, :3] = -5  # the sequence before
    a, b = (runtime.run(m, given)["out"].astype(np.float64) for m in (before, report.model))
    assert np.abs(a - b).max() <= BOUND["f16"] * np.abs(a).max()


def test_a_mask_over_the_decoded_cache_becomes_indices() -> None:
    spec = replace(BASE, find="dense")
    before, report, node = _fused(spec)
    assert "Softmax" not in {n.op_type for n in report.model.graph.node}
    assert node.input[1] == "key"
    assert _difference(spec, before, report.model) <= BOUND["f16"]


def test_dynamic_sizes() -> None:
    spec = replace(BASE, dynamic=True, dtype="bf16")
    before, report, _ = _fused(spec)
    for other in (spec, replace(spec, B=1, S1=3, S2=11)):
        assert _difference(other, before, report.model) <= BOUND["bf16"]


def test_a_float32_query_over_half_precision_ropes_is_repacked() -> None:
    """The operator reads ropes in the query's type: narrowing the query would lose digits."""
    spec = replace(BASE, query="f32", dtype="bf16")
    before, report, _ = _fused(spec)
    assert "KvCachePack" in {n.op_type for n in report.model.graph.node}
    assert _difference(spec, before, report.model) <= BOUND["f32"]


def test_a_result_in_float32_is_said_to_be_rounded() -> None:
    _, report, _ = _fused(replace(BASE, out="f32"))
    assert "rounded to float16" in " ".join(report.fused[0].bound)


MISSES = {
    "swapped": (BASE, "scales begin at byte 32 .* at byte 48"),
    "big-endian": (replace(BASE, decode="and"), "little-endian"),
    "unsigned": (BASE, "signed int8"),
    "fp8": (BASE, "signed int8"),
    "other tile": (BASE, r"scale of column d is read at byte"),
    "interleaved": (BASE, r"scale of column d is read at byte"),
    "other float": (BASE, "rope bytes .* query's type"),
    "no subnormals": (replace(BASE, decode="and"), "rope bytes .* query's type"),
    "clipped scales": (BASE, "last bytes .* float32 scale"),
    "clipped ropes": (BASE, "rope bytes"),
    "rope of another row": (replace(BASE, late=True), "not read by the same indices"),
}


@pytest.mark.parametrize("wrong", MISSES)
def test_look_alikes_are_refused_with_the_reason(wrong: str) -> None:
    spec, reason = MISSES[wrong]
    report = fuse(build(replace(spec, wrong=wrong)))
    assert not report.fused
    (site,) = report.refused
    assert re.search(reason, site.reason), site.reason
