"""Our own operators, canonical <-> ATC: names, attributes, the exact scale, the query's type."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from sfa_onnx.ascend.flavour.rows import wide_row
from sfa_onnx.ascend.flavour.scope import Scope
from sfa_onnx.errors import ContractError, UsageError
from sfa_onnx.files.onnx_attrs import find_attribute, value_of
from sfa_onnx.operator.contract import Attribute, AttributeValue, OpContract, PackedRow
from sfa_onnx.operator.op import (
    ALL_OPS,
    BINDINGS,
    CHOICES,
    DOMAIN_NPU,
    EXPANDED,
    KV_CACHE_PACK,
    find_op,
    written_as,
)

__all__ = ["EXACT_SUFFIX", "ROPE_DTYPE", "FromAtc", "ToAtc", "atc_contract", "is_ours"]

EXACT_SUFFIX = (
    "_exact"  # FLOATS companion of a FLOAT attribute: the parser prints FLOAT in 6 digits
)
ROPE_DTYPE = "rope_dtype"  # STRING on KvCachePack: GE's Bitcast must know the rope's type
_KINDS = {"float": onnx.AttributeProto.FLOAT, "int": onnx.AttributeProto.INT}
NPU_DTYPES = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}
_ROPE_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
_ATC_NAMES = frozenset({b.atc_type for b in BINDINGS} | {op.name for op in ALL_OPS})
# Inputs that carry the query's type and are cast with it.
_FLOAT_INPUTS = ("query", "key", "value", "query_rope", "key_rope", "weights")
_HALF_MAX = 65504.0


def is_ours(node: NodeProto) -> bool:
    """Whether a node is one of our operators, in any spelling."""
    return find_op(node.domain, node.op_type) is not None or _atc_name(node)


def _atc_name(node: NodeProto) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in _ATC_NAMES


def atc_contract(op: OpContract, binding: str) -> tuple[str, OpContract]:
    """The ATC node type and its contract for a canonical operator under a binding.

    Raises:
        UsageError: `binding` is not one of those offered.
    """
    if binding not in CHOICES:
        raise UsageError(f"binding {binding!r}: expected one of {', '.join(CHOICES)}")
    ways = [b for b in BINDINGS if b.canonical.name == op.name]
    found = next((b for b in ways if b.name == binding), ways[0] if ways else None)
    return (found.atc_type, found.contract) if found else (op.name, op)


def _read(node: NodeProto, spec: Attribute, op: OpContract) -> AttributeValue:
    attr = find_attribute(node, spec.name)
    where = f"node {node.name or node.output[0]!r} ({op.name})"
    if attr is None:
        if spec.default is None:
            raise ContractError(f"{where}: required attribute {spec.name} is missing")
        return spec.default
    if attr.type != _KINDS.get(spec.kind, onnx.AttributeProto.STRING):
        kind = onnx.AttributeProto.AttributeType.Name(attr.type)
        raise ContractError(f"{where}: attribute {spec.name} is {kind}, expected {spec.kind}")
    value: AttributeValue = value_of(attr)
    return value


def _check_known(node: NodeProto, contracts: tuple[OpContract, ...], extra: set[str]) -> None:
    known = {a.name for c in contracts for a in c.attributes} | extra
    for attr in node.attribute:
        if attr.name not in known:
            raise ContractError(
                f"node {node.name or node.output[0]!r} ({node.op_type}): attribute {attr.name} is"
                f" not part of the operator; known: {', '.join(sorted(known))}"
            )


def _check_carried(node: NodeProto, op: OpContract, target: OpContract) -> None:
    """Refuse what the canonical operator or its target cannot say; it would be dropped."""
    pairs = written_as(op)
    both = {a.name: a for c in (*pairs, op) for a in c.attributes}
    given = {n: _read(node, a, op) for n, a in both.items() if find_attribute(node, n)}
    try:
        for other in pairs:
            other.carried_to(op, given)
        op.carried_to(target, given)
    except ContractError as error:
        raise ContractError(f"node {node.name or node.output[0]!r}: {error}") from error


def _exact_names(contract: OpContract) -> set[str]:
    if contract is KV_CACHE_PACK:
        return {ROPE_DTYPE}
    return {a.name + EXACT_SUFFIX for a in contract.attributes if a.kind == "float"}


def _make(node: NodeProto, op_type: str, domain: str) -> NodeProto:
    made = NodeProto(op_type=op_type, domain=domain, name=node.name)
    if node.doc_string:
        made.doc_string = node.doc_string
    made.input.extend(node.input)
    made.output.extend(node.output)
    made.metadata_props.extend(node.metadata_props)
    return made


def _write(node: NodeProto, spec: Attribute, value: AttributeValue) -> None:
    made = onnx.helper.make_attribute(spec.name, value)
    if spec.kind == "float":
        made = onnx.AttributeProto(name=spec.name, type=onnx.AttributeProto.FLOAT)
        made.f = float(value)
    node.attribute.append(made)


@dataclass
class ToAtc:
    """Rule: canonical node -> ATC node(s) in the default domain."""

    binding: str
    npu_dtype: str | None
    notes: list[str]
    wide: dict[str, PackedRow] = field(default_factory=dict)  # key -> its layout, float32 rope

    def __call__(self, scope: Scope, node: NodeProto) -> list[NodeProto] | None:
        """Rewrite one of our nodes; others are left alone."""
        op = find_op(node.domain, node.op_type)
        if op is None:
            return None
        atc_type, contract = atc_contract(op, self.binding)
        extra = _exact_names(op)
        _check_known(node, (op, *written_as(op)), extra)
        _check_carried(node, op, contract)
        made = _make(node, atc_type, "")
        for spec in contract.attributes:
            _write(made, spec, self._value(node, spec, op))
        for spec in contract.attributes:
            if spec.kind == "float":
                exact = onnx.helper.make_attribute(
                    spec.name + EXACT_SUFFIX, [_exact(node, spec, op)]
                )
                made.attribute.append(exact)
        self._check_inputs(made, contract)
        if op is KV_CACHE_PACK:
            return self._pack(scope, made)
        if self.npu_dtype is None or op in EXPANDED:
            return [made]
        return self._cast(scope, made, contract)

    def _pack(self, scope: Scope, node: NodeProto) -> list[NodeProto]:
        """Say the rope's type (the plug-in cannot see it) and bring it to the NPU's type."""
        rope = node.input[1] if len(node.input) > 1 else ""
        nodes = []
        if rope and scope.dtype(rope) == TensorProto.FLOAT and self.npu_dtype in NPU_DTYPES:
            to = NPU_DTYPES[self.npu_dtype]
            cast = scope.node("Cast", [rope], f"{node.name}/rope_cast", dtype=to, to=to)
            node.input[1] = rope = cast.output[0]
            nodes.append(cast)
            self.notes.append(f"{node.name}: rope cast float32 -> {self.npu_dtype}")
        name = _ROPE_NAMES.get(scope.dtype(rope), "")
        node.attribute.append(onnx.helper.make_attribute(ROPE_DTYPE, name))
        return [*nodes, node]

    def _value(self, node: NodeProto, spec: Attribute, op: OpContract) -> AttributeValue:
        """The canonical node's value, or what the ATC contract alone has (pre/next_tokens)."""
        if any(a.name == spec.name for a in op.attributes):
            if spec.kind == "float":
                return _exact(node, spec, op)
            return _read(node, op.attribute(spec.name), op)
        return spec.default if spec.default is not None else 0

    def _check_inputs(self, node: NodeProto, contract: OpContract) -> None:
        where = f"node {node.name or node.output[0]!r} ({node.op_type})"
        if len(node.input) > len(contract.inputs):
            raise ContractError(
                f"{where}: {len(node.input)} inputs, the operator has {len(contract.inputs)}"
            )
        for i, tensor in enumerate(contract.inputs):
            if not tensor.optional and (i >= len(node.input) or not node.input[i]):
                raise ContractError(f"{where}: required input {i} ({tensor.name}) is missing")

    def _cast(self, scope: Scope, node: NodeProto, contract: OpContract) -> list[NodeProto]:
        """Cast float32 inputs to the NPU's type and results back."""
        if self.npu_dtype not in NPU_DTYPES:
            raise UsageError(f"--npu-dtype {self.npu_dtype}: expected bf16 or fp16")
        own = scope.dtype(node.input[0])
        to = own if own in NPU_DTYPES.values() else NPU_DTYPES[self.npu_dtype]
        int8_rows = own == TensorProto.FLOAT and scope.dtype(node.input[1]) == TensorProto.INT8
        row = wide_row(node, scope.facts) if int8_rows else None
        if row is not None:
            self.wide[node.input[1]] = row
        nodes = self._cast_inputs(scope, node, contract, to)
        if own != TensorProto.FLOAT:
            return [*nodes, node]
        return [*nodes, node, *self._cast_outputs(scope, node, contract, to)]

    def _cast_outputs(
        self, scope: Scope, node: NodeProto, contract: OpContract, to: int
    ) -> list[NodeProto]:
        """Casts behind the outputs that have the query's type."""
        after = []
        for i, tensor in enumerate(contract.outputs[: len(node.output)]):
            if tensor.types != contract.inputs[0].types or not node.output[i]:
                continue  # indices; maxima and sums, which the kernel gives in float32
            inner = scope.value(f"{node.name}/npu_out", to)
            label = f"{node.name}/out_cast"
            after.append(
                scope.node("Cast", [inner], label, outputs=[node.output[i]], to=TensorProto.FLOAT)
            )
            node.output[i] = inner
        self.notes.append(f"{node.name}: query and result cast float32 <-> {self.npu_dtype}")
        return after

    def _cast_inputs(
        self, scope: Scope, node: NodeProto, contract: OpContract, to: int
    ) -> list[NodeProto]:
        """Casts in front of a node's float32 inputs; equal ones are shared."""
        nodes, done = [], dict[str, str]()
        for i, tensor in enumerate(contract.inputs[: len(node.input)]):
            name = node.input[i]
            if tensor.name not in _FLOAT_INPUTS or scope.dtype(name) != TensorProto.FLOAT:
                continue
            if tensor.name == "weights" and to == TensorProto.FLOAT16 and _huge(scope, name):
                self.notes.append(
                    f"{node.name}: weights stay float32: they hide padding by a number that fp16"
                    " cannot hold; --npu-dtype bf16 can"
                )
                continue
            if name not in done:
                cast = scope.node("Cast", [name], f"{node.name}/{tensor.name}_cast", dtype=to,
                                  dims=scope.dims(name), to=to)  # fmt: skip
                nodes.append(cast)
                done[name] = cast.output[0]
            node.input[i] = done[name]
        return nodes


def _huge(scope: Scope, name: str, depth: int = 6) -> bool:
    """Whether a constant that is part of a value is beyond fp16."""
    array = scope.array(name)
    if array is not None:
        return array.dtype.kind == "f" and bool(np.any(np.abs(array) > _HALF_MAX))
    node = scope.producer(name)
    if node is None or not depth or node.op_type not in ("Concat", "Expand", "Pad", "Reshape"):
        return False
    parts = node.input if node.op_type == "Concat" else node.input[:1]
    return any(_huge(scope, part, depth - 1) for part in parts)


def _exact(node: NodeProto, spec: Attribute, op: OpContract) -> float:
    """The FLOAT attribute to the last bit: its companion wins when it agrees to 6 digits."""
    value = float(_read(node, spec, op))
    if not math.isfinite(value):
        raise ContractError(f"node {node.name!r}: {spec.name} is {value}, expected a finite number")
    companion = find_attribute(node, spec.name + EXACT_SUFFIX)
    if companion is None:
        return value
    exact = float(np.float32(companion.floats[0])) if len(companion.floats) == 1 else math.nan
    if not math.isclose(exact, value, rel_tol=1e-5):
        raise ContractError(
            f"node {node.name!r}: {spec.name} is {value!r} but its exact companion says {exact!r}"
        )
    return exact


class FromAtc:
    """Rule: ATC node -> canonical node in its own domain."""

    def __call__(self, _: Scope, node: NodeProto) -> list[NodeProto] | None:
        """Rewrite one of our nodes; others are left alone."""
        op = find_op(node.domain, node.op_type)
        if op is None and _atc_name(node):
            op = next((o for o in ALL_OPS if o.name == node.op_type), None)
        if op is None:
            return self._vendor(node)
        _check_known(node, (op, *written_as(op)), _exact_names(op))
        _check_carried(node, op, op)
        made = _make(node, op.name, op.domain)
        for spec in op.attributes:
            value = _exact(node, spec, op) if spec.kind == "float" else _read(node, spec, op)
            _write(made, spec, value)
        return [made]

    def _vendor(self, node: NodeProto) -> list[NodeProto] | None:
        """Vendor operators (NPURmsNorm ...) that shared the default domain go back to `npu`."""
        if node.domain or not node.op_type.startswith("NPU"):
            return None
        made = NodeProto()
        made.CopyFrom(node)
        made.domain = DOMAIN_NPU
        return [made]
