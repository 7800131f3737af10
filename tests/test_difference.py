"""How far two tensors are apart: bounds, directions, what must be equal."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from sfa_onnx.runtime.compare.difference import DECADES, CompareReport, OutputRow, measure
from sfa_onnx.runtime.compare.extract import Site
from sfa_onnx.runtime.compare.room import weight_bytes
from sfa_onnx.runtime.compare.rounded import in_order, rounded_values


def test_weights_are_as_large_as_they_are_stored():
    model = ModelProto()
    for dims, kind in (([3, 5], TensorProto.FLOAT16), ([7], TensorProto.INT64), ([0, 9], 1)):
        model.graph.initializer.add(dims=dims, data_type=kind)
    assert weight_bytes(model) == 3 * 5 * 2 + 7 * 8


@pytest.mark.parametrize("step", ["Cast", "Identity"])
def test_rows_are_rounded_in_the_type_that_is_packed(step):
    """A Cast in front of the packing tells the type; behind anything else nothing is told."""
    how = {"to": TensorProto.FLOAT16} if step == "Cast" else {}
    nodes = [
        helper.make_node(step, ["x"], ["narrow"], **how),
        helper.make_node("KvCachePack", ["narrow", "rope"], ["rows"], domain="sfa_onnx"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    site = Site("s", "NPUSparseFlashAttentionAntiquant", "", (), (), (), (0, 1), 1)
    x = np.linspace(-3, 3, 256, dtype=np.float32).reshape(2, 128)
    told = rounded_values(model, site, None, {"x": x})
    assert list(told) == (["x"] if step == "Cast" else [])
    for got in told.values():
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, x, atol=3 / 127)
        assert (got != x).any()


def test_a_selection_is_compared_by_its_keys_and_numbers_by_their_place():
    x = np.array([[[3, 1], [2, -1]], [[5, 4], [0, 7]]])
    want = [[[1, 3], [-1, 2]], [[4, 5], [0, 7]]]
    for kind in (np.int32, np.int64):
        assert in_order(x.astype(kind)).tolist() == want
    assert in_order(np.array([[2, 1]], np.uint8)).tolist() == [[1, 2]]
    assert in_order(x.astype(np.float32)).tolist() == x.tolist()


def test_nonfinite_values_must_stand_in_the_same_places():
    a = np.array([1.0, np.nan, np.inf, -np.inf], np.float32)
    assert measure(a, a).passed
    for i, wrong in ((1, 0.0), (2, -np.inf), (3, np.nan), (0, np.nan)):
        b = a.copy()
        b[i] = wrong
        assert not measure(a, b).passed


def test_absolute_or_relative_is_enough():
    a = np.array([1e-6, 1000.0], np.float32)
    assert measure(a, a + np.array([1e-4, 0.0]), atol=1e-3, rtol=0).passed
    assert measure(a, a * np.array([1, 1.0005]), atol=0, rtol=1e-3).passed
    worst = measure(a, a + np.array([2e-3, 5.0]), atol=1e-3, rtol=1e-3)
    assert (worst.outside, worst.worst_index, worst.worst_before) == (2, (1,), 1000.0)
    assert worst.worst_after == 1005.0


def test_the_noise_floor_widens_the_bound_but_not_without_limit():
    r = np.random.default_rng(0)
    exact = r.standard_normal(1000)
    noisy = (exact + 1e-3 * r.standard_normal(1000)).astype(np.float32)
    other = (exact + 1e-3 * r.standard_normal(1000)).astype(np.float32)
    assert not measure(noisy, other).passed
    told = measure(noisy, other, exact=exact)
    assert told.passed
    assert 0.5 < told.multiple < 2
    wild = (exact + 3 * r.standard_normal(1000)).astype(np.float32)
    assert not measure(wild, exact.astype(np.float32), exact=exact).passed


def test_a_small_turn_of_direction_is_caught_where_elements_are_not():
    a = np.ones(10_000, np.float32)
    b = a.copy()
    b[::2] += 1.5e-5
    assert measure(a, b).passed
    turned = dataclasses.replace(measure(a, b), cosine=1e-3)
    assert not turned.passed


def test_zero_agrees_in_direction_with_zero_only():
    zero, one = np.zeros(8, np.float32), np.ones(8, np.float32)
    assert measure(zero, zero).cosine == 0.0
    assert measure(zero, zero).passed
    for a, b in ((zero, one), (one, zero)):
        assert measure(a, b).cosine == 1.0
        assert not measure(a, b).passed
    assert measure(one, -one).cosine == pytest.approx(2.0)
    assert measure(zero, one, atol=2.0, rtol=0.0).passed, "the caller's bounds hold alone"


def test_rows_without_a_softmax_are_told_not_judged():
    a = np.ones((3, 4), np.float32)
    b = a.copy()
    a[1], b[1] = np.nan, 0
    found = measure(a, b)
    assert found.passed
    assert found.undefined == 1
    assert not measure(np.full((2, 4), np.nan, np.float32), np.zeros((2, 4), np.float32)).passed
    half = a.copy()
    half[0, 0] = np.nan
    assert not measure(half, b).passed


def test_a_comparison_passes_only_when_it_was_made_and_all_agreed():
    good, bad = measure(np.ones(4), np.ones(4)), measure(np.ones(4), np.zeros(4))
    report = CompareReport("a", "b", outputs=[OutputRow("y", good)])
    assert report.passed
    assert not dataclasses.replace(report, missing="no weights").passed
    assert not dataclasses.replace(report, outputs=[]).passed
    assert not dataclasses.replace(report, outputs=[*report.outputs, OutputRow("z", bad)]).passed
    told = [*report.outputs, OutputRow("z", bad, judged=False)]
    assert dataclasses.replace(report, outputs=told).passed


def test_a_single_float_beyond_its_bound_and_one_index_in_two_hundred():
    a = np.ones(200, np.float32)
    b = a.copy()
    b[7] = 2
    assert not measure(a, b).passed
    indices = np.arange(200)
    turned = indices.copy()
    turned[7] = 8
    assert measure(indices, turned).passed, "a selection may differ where scores tie"
    turned[:9] = 100
    assert not measure(indices, turned).passed


def test_errors_are_counted_by_size_in_units_of_the_bound():
    a = np.ones(6)
    b = a + np.array([0, 0.5e-3, 5e-3, 0.5, 1e-12, 1e9])
    counts = measure(a, b, atol=1e-3, rtol=0.0).decades
    assert sum(counts) == 6
    assert counts[0] == 1
    seen = {DECADES[i]: n for i, n in enumerate(counts[1:]) if n}
    assert seen == {-8: 1, -1: 1, 0: 1, 2: 1, 3: 1}
