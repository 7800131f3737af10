"""Operators of other domains with names of ONNX's are none of ONNX's."""

from __future__ import annotations

import onnx
import pytest

import sfa_onnx
from sfa_onnx.ascend.flavour.model import to_atc
from sfa_onnx.errors import ModelError
from sfa_onnx.passes.graph.kinds import own_type, told_apart
from tests.graphs import dense, gathered


@pytest.mark.parametrize("make", [dense, gathered])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("domain", ["theirs", "com.microsoft"])
def test_each_node_of_a_site_may_be_somebody_elses(make, bare: bool, domain: str) -> None:
    whole = make()
    (site,) = sfa_onnx.fuse(whole).sites
    inside = {*site.removed}
    whole.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    for i, node in enumerate(whole.graph.node):
        model = onnx.ModelProto.FromString(whole.SerializeToString())
        other = model.graph.node[i]
        other.domain = domain
        if bare:  # what ONNX asks of the name need not hold
            del other.attribute[:], other.input[1:]
        report = sfa_onnx.fuse(model)
        assert not any("failed" in s.reason for s in report.sites), other.op_type
        if (node.name or node.output[0]) in inside:
            assert not report.fused, other.op_type
        with pytest.raises(ModelError, match=rf"in domain '{domain}'"):
            to_atc(model)


def test_a_copy_is_told_from_the_node_and_back() -> None:
    node = onnx.helper.make_node("Softmax", ["x"], ["y"], "n", domain="theirs")
    apart = told_apart(node)
    assert (node.op_type, apart.op_type) == ("Softmax", "theirs::Softmax")
    assert own_type(apart) == own_type(node) == "Softmax"
    vendor = onnx.helper.make_node("NPURmsNorm", ["x"], ["y"], "n", domain="npu")
    assert told_apart(vendor) is vendor
