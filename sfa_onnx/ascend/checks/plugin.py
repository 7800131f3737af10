"""ONNX parser plug-ins beyond CANN's own: which keys they register and what they refuse."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from sfa_onnx.errors import UsageError
from sfa_onnx.operator.contract import OpContract
from sfa_onnx.operator.op import BINDINGS, EXPANDED, KV_CACHE_PACK, KV_CACHE_WRITE, Binding

__all__ = ["EXPANSIONS", "OWN_PLUGINS", "Plugin", "parse_plugin"]

_DEFAULT_OPSETS: Final = range(11, 19)
# What the plug-in makes of the operators it expands, all modes of each together.
EXPANSIONS: Final = {
    KV_CACHE_PACK.name: (
        "Abs", "Bitcast", "Cast", "ConcatD", "DivNoNan", "Maximum", "Minimum", "Mul", "Neg",
        "ReduceMax", "Reshape", "Round", "Shape", "StridedSliceV2",
    ),
    KV_CACHE_WRITE.name: ("ConcatD", "Reshape", "ScatterNdUpdate", "Shape", "StridedSliceV2"),
}  # fmt: skip
_KEY = re.compile(r"([\w.]+)::(\d+)(?:\.\.(\d+))?::(\w+)(?:\((\d+)(?:,(\d+))?\))?")


@dataclass(frozen=True)
class Plugin:
    """One op type some plug-in registers.

    `inputs` is (required, all) where known. `required_attributes` are those whose absence (or wrong
    type) the plug-in itself refuses; with `contract`, unknown attributes are refused as well.
    """

    op_type: str
    keys: frozenset[tuple[str, int]]  # (domain, opset version)
    inputs: tuple[int, int] | None = None
    required_attributes: tuple[tuple[str, str], ...] = ()  # (name, "int" | "float" | "string")
    contract: OpContract | None = None
    ge_type: str = ""
    extra_attributes: frozenset[str] = field(default_factory=frozenset)
    expands_to: tuple[str, ...] = ()  # GE types, where the node does not stay one operator
    outputs: int | None = None  # of the GE prototype


def _expanded(contract: OpContract) -> Binding:
    outputs = tuple(t.name for t in contract.outputs)
    return Binding(contract.name, contract, contract.name, "PartitionedCall", outputs, "CANN 8.5.0")


def _own(binding: Binding) -> Plugin:
    contract = binding.contract
    keys = {(contract.domain, 1), *(("ai.onnx", v) for v in _DEFAULT_OPSETS)}
    required = sum(not t.optional for t in contract.inputs)
    attributes = tuple((a.name, a.kind) for a in contract.attributes)
    return Plugin(
        binding.atc_type,
        frozenset(keys),
        (required, len(contract.inputs)),
        attributes,  # all of them: the plug-in does not let a GE default win in silence
        contract,
        binding.ge_type,
        frozenset(("rope_dtype", "scale_value_exact") if contract.attributes else ()),
        EXPANSIONS.get(contract.name, ()),
        len(binding.ge_outputs),
    )


OWN_PLUGINS: Final = tuple(_own(b) for b in (*BINDINGS, *map(_expanded, EXPANDED)))


def parse_plugin(text: str) -> Plugin:
    """A plug-in from its key: `npu::1::Name`, `ai.onnx::11..18::Name`, `npu::1::Name(2,5)`.

    The numbers in parentheses are the required and all inputs of the GE prototype.

    Raises:
        UsageError: the text is not of that form.
    """
    match = _KEY.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"plug-in key {text!r}: expected domain::version::OpType, for example"
            " npu::1::MyOp, ai.onnx::11..18::MyOp or npu::1::MyOp(2,5) with its input counts"
        )
    domain, low, high, name, required, most = match.groups()
    versions = range(int(low), int(high or low) + 1)
    keys = frozenset((domain, v) for v in versions)
    inputs = None if required is None else (int(required), int(most or required))
    ours = next((p for p in OWN_PLUGINS if p.op_type == name), None)
    if ours is None:
        return Plugin(name, keys, inputs)
    # Whoever wrote it: the prototype is the same, and without a scale there is no operator.
    scale = tuple(a for a in ours.required_attributes if a[0] == "scale_value")
    return Plugin(name, keys, inputs or ours.inputs, scale, ge_type=ours.ge_type)
