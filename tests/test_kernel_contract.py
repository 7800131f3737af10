"""The compiled library's readers of attributes against the tables of `op.py`.

A value, default or layout that somebody changes in the table alone fails here, by its name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from benchmarks.kernel_abi import ISAS
from sfa_onnx import runtime
from sfa_onnx.errors import ContractError, ModelError
from sfa_onnx.operator import op
from sfa_onnx.operator.contract import Attribute, OpContract, Tensor
from tests.test_flavour import fused

pytestmark = pytest.mark.kernel
CONTRACTS = {c.name: c for c in (*op.ALL_OPS, *(b.contract for b in op.BINDINGS))}
PAIRS = [(c, a) for c in CONTRACTS.values() for a in c.attributes if a.kind != "float"]
ROOT = Path(__file__).resolve().parent.parent
PLACE = "op.py and the library disagree: change kernels/ort (and kernels/core), or the table"


def model_with(contract: OpContract, **values: Any) -> onnx.ModelProto:
    """One node of an operator, without declared shapes; None leaves an attribute out."""
    model = fused(op.find_op(contract.domain, contract.name))
    node = model.graph.node[0]
    node.op_type = contract.name
    table = {a.name: a for a in contract.attributes}
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in table}
    usual = {n: a.usual for n, a in table.items() if n not in given and a.usual is not None}
    del node.attribute[:]
    for name, value in (given | usual | values).items():
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))
    for info in model.graph.input:
        info.type.tensor_type.ClearField("shape")
    return model


def takes(contract: OpContract, **values: Any) -> bool:
    """Whether the library makes a kernel of such a node; the default is what None stands for."""
    return loads(model_with(contract, **values))


def loads(model: onnx.ModelProto) -> bool:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        runtime.session(model, options)
    except (ContractError, ModelError):
        return False
    return True


def legal(contract: OpContract, attribute: Attribute, value: Any) -> bool:
    """Whether the table allows a value."""
    node = model_with(contract, **{attribute.name: value}).graph.node[0]
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    told = {k: v.decode() if isinstance(v, bytes) else v for k, v in given.items()}
    try:
        contract.check_attributes(told)
    except ContractError:
        return False
    return True


def first_type(contract: OpContract, tensor: Tensor) -> int:
    """The first element type that is legal for an input or output."""
    return element(contract.types_of(tensor)[0])


def element(text: str) -> int:
    """The element type behind onnx's "tensor(float16)"."""
    return TensorProto.DataType.Value(text[len("tensor(") : -1].upper())


def probes(attribute: Attribute) -> set[Any]:
    if attribute.kind == "string":
        return {None, "BSND", "TND", "PA_BSND", "SBND", *(attribute.cpu or ())}
    edge = () if attribute.minimum is None else (attribute.minimum, attribute.minimum - 1)
    return {None, 0, 1, 2, 3, *edge, *(attribute.cpu or ())}


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=lambda c: c.name)
def test_the_library_reads_every_attribute_and_input(contract: OpContract) -> None:
    """onnxruntime hands on what nobody asks for: a new attribute would be taken and ignored."""
    sources = "".join(p.read_text() for p in (ROOT / "kernels/ort").iterdir() if p.is_file())
    unread = [a.name for a in contract.attributes if f'"{a.name}"' not in sources]
    assert not unread, f"{contract.name}: read {unread} in kernels/ort, or refuse what is not usual"
    model = model_with(contract)
    node = model.graph.node[0]
    del node.input[:], model.graph.input[:]
    model.graph.output[0].type.tensor_type.elem_type = first_type(contract, contract.outputs[0])
    for tensor in contract.inputs:
        kind = first_type(contract, tensor)
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, kind, None))
        node.input.append(tensor.name)
    try:
        runtime.session(model)
    except ModelError as error:
        pytest.fail(f"{contract.name} with every input of op.py: {error}. {PLACE}")


VARIABLES = [(c, *v) for c in CONTRACTS.values() for v in c.type_variables]
KINDS = ("float", "float16", "bfloat16", "double", "float8e4m3fn", "int8", "uint8")


@pytest.mark.parametrize(("contract", "variable", "types"), VARIABLES, ids=str)
def test_the_library_takes_the_types_of_the_table(
    contract: OpContract, variable: str, types: tuple[str, ...]
) -> None:
    others = {v: names[0] for v, names in contract.type_variables}
    for kind in KINDS:
        text = f"tensor({kind})"
        model = model_with(contract)
        given = set(model.graph.node[0].input)
        for tensor in contract.inputs:
            named = others | {variable: text}
            told = named.get(tensor.types) if isinstance(tensor.types, str) else tensor.types[0]
            if tensor.name in given and told is not None:
                info = next(v for v in model.graph.input if v.name == tensor.name)
                info.type.tensor_type.elem_type = element(told)
        del model.graph.output[:]
        model.graph.output.append(onnx.ValueInfoProto(name=model.graph.node[0].output[0]))
        assert loads(model) == (text in types), f"{contract.name}: {variable} = {kind}. {PLACE}"


@pytest.mark.parametrize(("contract", "attribute"), PAIRS, ids=lambda x: x.name)
def test_the_library_takes_the_values_of_the_table(
    contract: OpContract, attribute: Attribute
) -> None:
    layouts = [{}]
    if attribute.kind == "string":  # a key layout is legal beside some query layout
        both = [a.name for a in contract.attributes if a.kind == "string"]
        other = next(n for n in both if n != attribute.name)
        layouts = [{other: value} for value in ("BSND", "TND")]
    for value in probes(attribute):
        taken = any(takes(contract, **{attribute.name: value}, **more) for more in layouts)
        wanted = legal(contract, attribute, value)
        assert taken == wanted, f"{contract.name} {attribute.name} = {value!r}. {PLACE}"


@pytest.mark.parametrize("contract", [op.LIGHTNING_INDEXER, op.QUANT_LIGHTNING_INDEXER])
def test_as_many_keys_as_the_table_says_are_selected_by_default(contract: OpContract) -> None:
    """The one default that is a number of its own, in the kernel and in its shape function."""
    model = fused(contract)
    node = model.graph.node[0]
    kept = [a for a in node.attribute if a.name != "sparse_count"]
    del node.attribute[:], node.input[5:]
    node.attribute.extend(kept)
    names = {"query", "key", "weights", "query_dequant_scale", "key_dequant_scale"}
    node.input[:] = [t.name for t in contract.inputs if t.name in names]
    rows = [v for v in model.graph.input if v.name in node.input]
    del model.graph.input[:]
    model.graph.input.extend(rows)
    feeds = {
        v.name: np.zeros(
            [d.dim_value for d in v.type.tensor_type.shape.dim],
            helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type),
        )
        for v in rows
    }
    default = next(a.default for a in contract.attributes if a.name == "sparse_count")
    (indices,) = runtime.run(model, feeds).values()
    assert indices.shape == (1, 1, 1, default), PLACE


def test_every_instruction_set_has_its_places() -> None:
    """The recipe is docs/contributing/instruction-set.md."""
    header = (ROOT / "kernels/core/sfa_core.h").read_text()
    found = {n.lower(): int(v) for n, v in re.findall(r"SFA_CORE_ISA_(\w+) = (\d+)", header)}
    assert found == ISAS, "benchmarks/kernel_abi.py: ISAS has the names and values of sfa_core.h"
    dispatch = (ROOT / "kernels/core/dispatch.cc").read_text()
    page = (ROOT / "docs/onnxruntime.md").read_text()
    for name in found.keys() - {"auto"}:
        step = "name, run-time test and place in the order of preference"
        assert f'"{name}"' in dispatch, f"{name}: kernels/core/dispatch.cc lacks its {step}"
        assert f"`{name}`" in page, f"{name}: docs/onnxruntime.md, under SFA_ONNX_ISA"
