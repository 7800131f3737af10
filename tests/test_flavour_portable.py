"""Models that ship our operators' bodies: the ATC flavour has none, and they come back."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from sfa_onnx.ascend.flavour import model as flavour
from sfa_onnx.runtime.portable import model as portable
from tests.test_portable import two_sites


@pytest.fixture(scope="module")
def shipped():
    model, feeds, _ = two_sites()
    return portable.make_portable(model), feeds


def test_bodies_go_and_come_back(shipped):
    model, _ = shipped
    atc = flavour.to_atc(model)
    assert not atc.functions
    assert {n.overload for n in atc.graph.node} == {""}
    back = flavour.from_atc(atc)
    assert len({f.overload for f in back.functions}) == 2
    for one, other in zip(model.functions, back.functions, strict=True):
        assert (one.domain, one.name, one.overload) == (other.domain, other.name, other.overload)
    assert [n.overload for n in back.graph.node] == [n.overload for n in model.graph.node]
    assert back.ir_version == model.ir_version
    onnx.checker.check_model(back)


def test_the_restored_model_runs_without_our_library(shipped):
    model, feeds = shipped
    back = flavour.from_atc(flavour.to_atc(model))
    sessions = [
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
        for m in (model, back)
    ]
    for want, got in zip(*(s.run(None, feeds) for s in sessions), strict=True):
        np.testing.assert_array_equal(want, got)


def test_models_without_bodies_get_none():
    model, _, _ = two_sites()
    assert not flavour.from_atc(flavour.to_atc(model)).functions
