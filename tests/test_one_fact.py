"""The contract's tables reach every place that states a fact about an operator, or are refused.

An attribute or input that somebody enters in `op.py` alone fails here, by the name of the place.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.ascend import flavour
from sfa_onnx.ascend.cann import CANN_VERSIONS
from sfa_onnx.ascend.checks.plugin import EXPANSIONS
from sfa_onnx.ascend.flavour import nodes
from sfa_onnx.cli.parser import CACHE_FORMS
from sfa_onnx.errors import ContractError
from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.kv_convert import FORMS, convert
from sfa_onnx.operator import kv_cache, op, reference
from sfa_onnx.operator.contract import Attribute, OpContract
from sfa_onnx.runtime.portable import make_portable
from sfa_onnx.runtime.portable.model import with_standard_nodes
from tests import graphs
from tests.attention_cases import make_case
from tests.op_models import op_model
from tests.test_flavour import fused
from tests.test_kv_convert import growing

ROOT = Path(__file__).resolve().parent.parent
ATTENTION = (op.SPARSE_FLASH_ATTENTION_ANTIQUANT, op.SPARSE_FLASH_ATTENTION)
FORMULAS = {
    op.SPARSE_FLASH_ATTENTION_ANTIQUANT.name: reference.sparse_flash_attention_antiquant,
    op.SPARSE_FLASH_ATTENTION.name: reference.sparse_flash_attention,
    op.LIGHTNING_INDEXER.name: reference.lightning_indexer,
    op.QUANT_LIGHTNING_INDEXER.name: reference.quant_lightning_indexer,
    op.KV_CACHE_PACK.name: kv_cache.pack,
    op.KV_CACHE_WRITE.name: kv_cache.write_slots,
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


@pytest.mark.parametrize("contract", op.ALL_OPS, ids=lambda c: c.name)
def test_a_formula_takes_every_input(contract: OpContract) -> None:
    assert contract.name in FORMULAS, "write the formula (sfa_onnx/operator) and enter it here"
    taken = inspect.signature(FORMULAS[contract.name]).parameters
    lacking = {t.name for t in contract.inputs} - set(taken)
    assert not lacking, f"teach the formula of {contract.name} the inputs {lacking}"


@pytest.mark.kernel
@pytest.mark.parametrize("contract", op.ALL_OPS, ids=lambda c: c.name)
def test_an_operator_has_a_kernel_and_a_body(contract: OpContract) -> None:
    """Both with as many outputs as asked for: a missing entry used to fall to the attention's."""
    model = fused(contract)
    runtime.session(model)  # refused: no row in kernels/ort/register.cc
    standard = with_standard_nodes(model)  # refused: no line in runtime/portable/model.py
    assert not list(ours(standard))
    given = {v.name for v in standard.graph.input}
    made = {name for n in standard.graph.node for name in n.output}
    read = {name for n in standard.graph.node for name in n.input if name}
    assert read <= given | made | {i.name for i in standard.graph.initializer}


@pytest.mark.kernel
@pytest.mark.parametrize("binding", op.BINDINGS, ids=lambda b: b.name)
def test_the_node_of_a_binding_runs_here_and_comes_back(binding: op.Binding) -> None:
    """Under another name (a pair) the node needs rows in `kernels/ort/register.cc` too."""
    model = fused(binding.canonical)
    choice = binding.name if binding.name in op.CHOICES else op.CHOICES[0]
    written = flavour.to_atc(model, binding=choice)
    assert written.graph.node[0].op_type == binding.atc_type == binding.contract.name
    runtime.session(written)
    assert flavour.from_atc(written) == model


def test_every_operator_has_its_place_on_the_npu() -> None:
    bound = {b.canonical.name for b in op.BINDINGS} | {o.name for o in op.EXPANDED}
    lost = {o.name for o in op.ALL_OPS} - bound
    assert not lost, f"{lost}: add a Binding, or expand it in kernels/ascend/plugin and EXPANDED"
    assert set(EXPANSIONS) == {o.name for o in op.EXPANDED}, "say what it becomes: EXPANSIONS"
    page = (ROOT / "docs/ascend.md").read_text().partition("How our nodes arrive in GE")[2]
    rows = {b.atc_type for b in op.BINDINGS} | {o.name for o in op.EXPANDED}
    untold = [name for name in rows if f"`{name}`" not in page]
    assert not untold, f"docs/ascend.md, How our nodes arrive in GE: a row for {untold}"


@pytest.mark.parametrize("binding", op.BINDINGS, ids=lambda b: b.name)
def test_outputs_have_the_names_of_ges_prototype(binding: op.Binding) -> None:
    """The plug-ins, the torch results and the reference page call them so."""
    named = tuple(t.name for t in binding.contract.outputs)
    assert named == binding.ge_outputs, "rename both: `outputs` of the contract and of its Binding"


def test_every_form_of_a_cache_is_offered_told_and_its_own() -> None:
    assert set(FORMS) == set(CACHE_FORMS), "sfa_onnx/cli/parser.py offers the forms: CACHE_FORMS"
    road = re.search(r"^FORMS = \(.*\)$", (ROOT / "tests/test_road.py").read_text(), re.M)
    assert road is not None
    assert all(f'"{form}"' in road[0] for form in FORMS), "tests/test_road.py walks them: FORMS"
    page = (ROOT / "docs/kv-cache.md").read_text()
    untold = [form for form in FORMS if f"`{form}`" not in page]
    assert not untold, f"docs/kv-cache.md says nothing of {untold}"
    made: dict[Any, str] = {}
    for form in FORMS:
        graph = convert(growing(), to=form).model.graph
        inputs = tuple((v.name, v.type.tensor_type.elem_type) for v in graph.input)
        operators = tuple(n.op_type for n in graph.node)
        other = made.setdefault((inputs, operators), form)
        assert other == form, f"{form} gives what {other} gives: teach sfa_onnx/kv_convert the form"


def test_every_line_of_cann_has_facts_and_is_told() -> None:
    """Only the one table names a line; what it does must have been run or read by somebody."""
    page = (ROOT / "docs/ascend.md").read_text()
    assert f"`--cann {'|'.join(CANN_VERSIONS)}`" in page, (
        "a line of CANN: its row of sfa_onnx/ascend/cann.py from runs or sources, verdicts of its"
        " parser (tests/data/atc), and docs/ascend.md: `--cann`, and what of it was run"
    )


def test_a_spelling_stands_for_one_operator() -> None:
    taken = [s for o in op.ALL_OPS for s in (o.key, *o.spellings)]
    assert len(taken) == len(set(taken))


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


def test_the_limits_are_those_that_cann_documents() -> None:
    """No machine here can try them, and every reader takes them from the one table."""
    known = {"nope": 512, "rope": 64, "block_size_multiple": 16, "block_size_max": 1024}
    known |= {"indexer_heads": 64, "indexer_dim": 128, "sparse_count_max": 2048}
    table = dataclasses.asdict(op.NPU)
    changed = {n: (v, table[n]) for n, v in known.items() if table[n] != v}
    assert not changed, f"{changed}: name the page of CANN that says so, and change it here too"
    assert table["heads"] == tuple(2**n for n in range(8))
