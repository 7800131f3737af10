"""The contract's tables reach every place that states a fact about an operator, or are refused.

An attribute or input that somebody enters in `op.py` alone fails here, by the name of the place.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import onnx
import pytest
from onnx import helper

import sfa_onnx
from sfa_onnx.ascend import flavour
from sfa_onnx.ascend.flavour import nodes
from sfa_onnx.errors import ContractError
from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.kv_convert import FORMS, convert
from sfa_onnx.operator import op, reference
from sfa_onnx.operator.contract import Attribute, OpContract
from sfa_onnx.runtime.portable import make_portable
from tests import graphs
from tests.attention_cases import make_case
from tests.op_models import op_model
from tests.test_kv_convert import growing

ATTENTION = (op.SPARSE_FLASH_ATTENTION_ANTIQUANT, op.SPARSE_FLASH_ATTENTION)
FORMULAS = {
    op.SPARSE_FLASH_ATTENTION_ANTIQUANT.name: reference.sparse_flash_attention_antiquant,
    op.SPARSE_FLASH_ATTENTION.name: reference.sparse_flash_attention,
    op.LIGHTNING_INDEXER.name: reference.lightning_indexer,
    op.QUANT_LIGHTNING_INDEXER.name: reference.quant_lightning_indexer,
}


def ours(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, OpContract]]:
    for node in model.graph.node:
        found = op.find_op(node.domain, node.op_type) if node.domain else None
        if found is not None:
            yield node, found


def assert_whole(model: onnx.ModelProto) -> None:
    """Every node of ours carries each attribute of its table, and no more inputs than it has."""
    seen = list(ours(model))
    assert seen
    for node, contract in seen:
        assert set(attributes(node)) == {a.name for a in contract.attributes}, node.op_type
        assert len(node.input) <= len(contract.inputs)


@pytest.mark.parametrize("make", [graphs.dense, graphs.gathered, graphs.dense_int8])
def test_emitters_write_every_attribute(make: Any) -> None:
    assert_whole(sfa_onnx.fuse(make()).model)


@pytest.mark.parametrize("form", FORMS)
def test_cache_conversion_writes_every_attribute(form: str) -> None:
    assert_whole(convert(growing(), to=form).model)


def test_cache_conversion_drops_no_attribute() -> None:
    model = growing()
    node, contract = next(ours(model))
    lost = {a.name for a in contract.attributes} - {
        a.name for a in op.SPARSE_FLASH_ATTENTION_ANTIQUANT.attributes
    }
    assert "pre_tokens" in lost
    kept = [a for a in node.attribute if a.name != "pre_tokens"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("pre_tokens", 7)])
    with pytest.raises(ContractError, match="pre_tokens 7 has no form in"):
        convert(model, to="int8")


ROW_OPS = {o.name for o in op.ALL_OPS if o.domain == op.DOMAIN_OWN}  # of columns, not of calls


def test_every_operator_has_a_formula() -> None:
    assert {o.name for o in op.ALL_OPS} == set(FORMULAS) | ROW_OPS


@pytest.mark.parametrize("contract", op.ALL_OPS[:4], ids=lambda c: c.name)
def test_a_formula_takes_every_input(contract: OpContract) -> None:
    taken = inspect.signature(FORMULAS[contract.name]).parameters
    assert {t.name for t in contract.inputs} <= set(taken)


@pytest.mark.parametrize("contract", ATTENTION, ids=lambda c: c.name)
def test_a_body_takes_every_input_and_attribute(contract: OpContract) -> None:
    model = make_portable(op_model(make_case(contract)))
    (function,) = [f for f in model.functions if f.name == contract.name]
    assert list(function.input) == [t.name for t in contract.inputs]
    assert set(function.attribute) == {a.name for a in contract.attributes}


def grown(contract: OpContract) -> OpContract:
    """The table as after a newcomer's change: one more attribute."""
    fresh = Attribute("fresh_mode", "int", 0)
    return dataclasses.replace(contract, attributes=(*contract.attributes, fresh))


def test_an_attribute_that_one_table_of_a_pair_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`atc` used to drop silently what the other table does not have."""
    canonical = grown(op.SPARSE_FLASH_ATTENTION_ANTIQUANT)
    model = op_model(make_case(op.SPARSE_FLASH_ATTENTION_ANTIQUANT))
    model.graph.node[0].attribute.append(helper.make_attribute("fresh_mode", 3))
    monkeypatch.setattr(nodes, "find_op", lambda *_: canonical)
    with pytest.raises(ContractError, match="fresh_mode 3 has no form in NPUKvQuant"):
        flavour.to_atc(model, binding="kv-quant")
    model.graph.node[0].attribute[-1].i = 0
    assert flavour.to_atc(model, binding="kv-quant")


def test_unknown_attributes_are_refused_by_every_writer() -> None:
    for contract in op.ALL_OPS:
        with pytest.raises(ContractError, match="no attribute 'fresh_mode'"):
            contract.complete({"fresh_mode": 1})
