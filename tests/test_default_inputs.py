"""Stored values that are inputs as well: defaults, which whoever calls the model may replace."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.passes.graph.index import GraphIndex
from tests.indexer_models import WIDTH, Spelling, arrays, inputs, spelt
from tests.op_models import needs_library

pytestmark = pytest.mark.torch
KINDS: dict[str, tuple[Spelling, Callable[[np.ndarray], bool], str]] = {
    "table": (Spelling(mask="table"), lambda a: a.dtype == bool and a.size > 9, "no order"),
    "low": (
        Spelling(mask="causal add"),
        lambda a: a.dtype.kind == "f" and bool(np.isinf(a).all()),
        "may be a bias",
    ),
    "k": (
        Spelling(top="all"),
        lambda a: a.dtype == np.int64 and a.tolist() in (5, [5]),
        "neither a constant nor",
    ),
}


def _offered(model: onnx.ModelProto, pick: Callable[[np.ndarray], bool]) -> str:
    """Make inputs of the constants that are picked, with these as defaults; the last one's name."""
    graph, name = model.graph, ""
    for node in [n for n in graph.node if n.op_type == "Constant"]:
        tensor = node.attribute[0].t
        if pick(numpy_helper.to_array(tensor)):
            name = tensor.name = node.output[0]
            graph.initializer.append(tensor)
            graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
            graph.node.remove(node)
    assert name
    return name


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_a_caller_may_replace_is_no_constant(kind: str) -> None:
    spelling, pick, reason = KINDS[kind]
    model = spelt(spelling)
    name = _offered(model, pick)
    report = sfa_onnx.fuse(model)
    (site,) = report.selections
    assert site.status == "refused"
    assert reason in site.reason
    assert any(name in note and "other values" in note for note in report.notes)


@needs_library
def test_a_factor_that_a_caller_replaces_is_read_where_it_is() -> None:
    spelling = Spelling(scale="products")
    model = spelt(spelling)
    name = _offered(model, lambda a: a.dtype.kind == "f" and a.tolist() == np.float32(WIDTH**-0.5))
    report = sfa_onnx.fuse(model)
    assert [s.reason for s in report.selections] == [""]
    feeds = arrays(inputs(spelling, 3, keys=20))
    for by in ({}, {name: np.float32(-0.5)}):  # below 0: other products pass the relu
        want, got = (runtime.run(m, feeds | by) for m in (model, report.model))
        np.testing.assert_array_equal(got["indices"], want["indices"])


def test_before_version_4_of_the_format_every_stored_tensor_is_an_input() -> None:
    model = spelt(Spelling(mask="table"))
    name = _offered(model, KINDS["table"][1])
    index = GraphIndex.of(model)
    assert (index.is_graph_input(name), index.constant(name)) == (True, None)
    model.ir_version = 3
    index = GraphIndex.of(model)
    assert not index.is_graph_input(name)
    assert index.constant(name) is not None
