"""Our operators between the flavours: names, attributes, the exact scale, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from sfa_onnx.ascend.flavour import model as flavour
from sfa_onnx.errors import ContractError, ModelError, UsageError
from sfa_onnx.operator import op
from tests.test_flavour import SCALE, attr, fused, ours

# A cache write keeps the arithmetic in front of it: see test_flavour_cache_writes.
ALONE = [contract for contract in op.ALL_OPS if contract is not op.KV_CACHE_WRITE]


@pytest.mark.parametrize("contract", ALONE, ids=lambda c: c.name)
@pytest.mark.parametrize("binding", op.CHOICES)
def test_round_trip_gives_the_canonical_node_back(contract, binding):
    model = fused(contract)
    atc = flavour.to_atc(model, binding=binding)
    assert [(i.domain, i.version) for i in atc.opset_import] == [("", 18)]
    assert [n.domain for n in atc.graph.node] == [""]
    back = flavour.from_atc(atc)
    if contract is not op.KV_CACHE_PACK:
        assert back == model  # to the last field
    assert len(back.graph.node) == 1
    assert back.graph.node[0] == model.graph.node[0]
    assert back.graph.input == model.graph.input
    assert back.graph.output == model.graph.output
    assert {(i.domain, i.version) for i in back.opset_import} == {("", 18), (contract.domain, 1)}


def test_kv_quant_binding_renames_and_orders_the_attributes_as_the_ge_operator():
    node = flavour.to_atc(fused()).graph.node[0]
    contract = op.KV_QUANT_SPARSE_FLASH_ATTENTION
    assert node.op_type == "NPUKvQuantSparseFlashAttention"
    names = [a.name for a in node.attribute]
    assert names == [*(a.name for a in contract.attributes), "scale_value_exact"]
    assert attr(node, "pre_tokens") == attr(node, "next_tokens") == 2**63 - 1
    assert attr(node, "sparse_mode") == 0
    assert attr(node, "scale_value_exact") == [SCALE]


def test_recipes_binding_keeps_the_name_and_has_no_window():
    node = flavour.to_atc(fused(), binding="recipes").graph.node[0]
    assert node.op_type == "NPUSparseFlashAttentionAntiquant"
    assert attr(node, "pre_tokens") is None
    assert attr(node, "scale_value_exact") == [SCALE]


@settings(max_examples=40, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_scale_survives_both_ways_to_the_last_bit(scale):
    model = fused(node=ours(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, scale_value=scale))
    atc = flavour.to_atc(model)
    assert np.float32(attr(atc.graph.node[0], "scale_value_exact")[0]) == np.float32(scale)
    assert flavour.from_atc(atc).graph.node[0] == model.graph.node[0]


@pytest.mark.parametrize(
    ("override", "drop", "reason"),
    [
        ({"sparse_mode": "three"}, None, "sparse_mode is STRING, expected int"),
        ({}, "scale_value", "required attribute scale_value is missing"),
        ({}, "key_quant_mode", "required attribute key_quant_mode is missing"),
    ],
)
def test_bad_attributes_are_refused_by_name(override, drop, reason):
    node = ours(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, **override)
    for a in [a for a in node.attribute if a.name == drop]:
        node.attribute.remove(a)
    with pytest.raises(ContractError, match=reason):
        flavour.to_atc(fused(node=node))


def test_unknown_attribute_and_binding_are_refused():
    node = ours(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    node.attribute.append(helper.make_attribute("foo", 3))
    with pytest.raises(ContractError, match="attribute foo is not part of the operator"):
        flavour.to_atc(fused(node=node))
    with pytest.raises(UsageError, match=", ".join(op.CHOICES)):
        flavour.to_atc(fused(), binding="sfa")


def test_a_sliding_window_has_no_canonical_form():
    atc = flavour.to_atc(fused())
    next(a for a in atc.graph.node[0].attribute if a.name == "pre_tokens").i = 128
    with pytest.raises(
        ContractError, match="pre_tokens 128 has no form in NPUSparseFlashAttentionAntiquant"
    ):
        flavour.from_atc(atc)


@pytest.mark.parametrize("binding", op.CHOICES)
@pytest.mark.parametrize("name", ["npu_kv_quant_sparse_flash_attention", None])
def test_a_sliding_window_is_not_dropped_on_the_way_to_atc(binding, name):
    """Found in CANN's parser: the GE operator had no window where the node had one."""
    model = fused()
    node = model.graph.node[0]
    node.op_type = name or node.op_type
    node.attribute.append(helper.make_attribute("pre_tokens", 5))
    with pytest.raises(
        ContractError, match="pre_tokens 5 has no form in NPUSparseFlashAttentionAntiquant"
    ):
        flavour.to_atc(model, binding=binding)
    node.attribute[-1].i = op.INT64_MAX
    assert flavour.to_atc(model, binding=binding)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ContractError, match=f"scale_value is {scale}, expected a finite number"):
        flavour.to_atc(fused(node=ours(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, scale_value=scale)))


@pytest.mark.parametrize("name", ["GatherND", "ScatterND", "Split", "ReduceMean", "Mod", "Pad"])
def test_an_operator_of_another_domain_is_refused_not_taken_for_onnx_own(name):
    node = helper.make_node(name, [], ["y"], "n0", domain="npu")
    graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", 7, [2])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.opset_import.append(helper.make_opsetid("npu", 1))
    with pytest.raises(ModelError, match=f"{name} in domain 'npu'"):
        flavour.to_atc(model)
