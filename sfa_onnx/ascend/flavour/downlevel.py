"""Bring a graph to opset <= 18, the newest CANN's built-in ONNX plug-ins register.

Three cases: the operator's newer version only added types or attributes (dropped when they carry
their default); the operator is new and onnx defines it by a function body (expanded, then brought
down itself); it is new and we know a rewrite. Everything else is refused by name.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import ModelProto, NodeProto

from sfa_onnx.ascend.flavour.downlevel_ops import REWRITES
from sfa_onnx.ascend.flavour.scope import Facts, Names, Scope, apply
from sfa_onnx.errors import ModelError
from sfa_onnx.files.onnx_attrs import find_attribute

__all__ = ["MAX_OPSET", "MIN_OPSET", "to_opset"]

MAX_OPSET = 18
MIN_OPSET = 11

_FLOAT8 = (17, 18, 19, 20, 24)  # FLOAT8E4M3FN .. FLOAT8E5M2FNUZ, FLOAT8E8M0
# Newer attributes that may be dropped when they hold the value the older version implies.
_DROPPABLE: dict[tuple[str, str], tuple[object, ...]] = {
    ("AveragePool", "dilations"): ("ones",),
    ("Cast", "round_mode"): (b"up",),
    ("CastLike", "round_mode"): (b"up",),
    ("DequantizeLinear", "block_size"): (0,),
    ("DequantizeLinear", "output_dtype"): (0,),
    ("GroupNormalization", "stash_type"): (1,),
    ("QuantizeLinear", "block_size"): (0,),
    ("QuantizeLinear", "output_dtype"): (0,),
    ("QuantizeLinear", "precision"): (0,),
    ("QuantizeLinear", "saturate"): (1,),
}
# Same name, other meaning: the older version cannot stand in.
_CHANGED = {"GroupNormalization": 21, "DFT": 20}


def to_opset(model: ModelProto, opset: int, names: Names, facts: Facts) -> list[str]:
    """Rewrite `model` in place from `opset` to at most 18; the import is set by the caller.

    Returns:
        What was rewritten, one line per operator type.

    Raises:
        ModelError: an operator has no form at opset 18, named with its node.
    """
    notes: list[str] = []
    if opset <= MAX_OPSET:
        return notes
    if opset > onnx.defs.onnx_opset_version():
        raise ModelError(
            f"the model uses opset {opset}, this onnx ({onnx.__version__}) knows up to"
            f" {onnx.defs.onnx_opset_version()}; update onnx, or export at opset 18"
        )
    for _ in range(4):  # a function body may use another function
        seen: set[str] = set()
        if not apply(model, (_Lowering(opset, seen),), facts, names, MAX_OPSET):
            break
        notes += [f"{op}: rewritten for opset {MAX_OPSET}" for op in sorted(seen)]
        fresh = Facts.of(model)
        facts.types.update(fresh.types)
        facts.dims.update(fresh.dims)
    return notes


class _Lowering:
    """The rule: one node of a newer opset to nodes of opset 18."""

    def __init__(self, opset: int, seen: set[str]) -> None:
        self.opset, self.seen = opset, seen

    def __call__(self, scope: Scope, node: NodeProto) -> list[NodeProto] | None:
        if node.domain or not onnx.defs.has(node.op_type, self.opset):
            return None
        schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        if schema.since_version <= MAX_OPSET:
            return None
        older = _schema_at(node.op_type, MAX_OPSET)
        changed = schema.since_version >= _CHANGED.get(node.op_type, 99)
        if older is not None and not changed:
            return self._drop_attributes(node, older)
        if node.op_type in REWRITES:
            new = REWRITES[node.op_type](scope, node)
        else:
            new = _expand(scope, node, schema)
        self.seen.add(node.op_type)
        return new

    def _drop_attributes(
        self, node: NodeProto, older: onnx.defs.OpSchema
    ) -> list[NodeProto] | None:
        extra = [a for a in node.attribute if a.name not in older.attributes]
        if len(node.input) > older.max_input:
            raise _refusal(node, self.opset, f"has more inputs than at opset {MAX_OPSET}")
        if not extra:
            return None
        for attr in extra:
            if not _implied(node, attr):
                raise _refusal(node, self.opset, f"attribute {attr.name} has no form there")
        kept = NodeProto()
        kept.CopyFrom(node)
        del kept.attribute[:]
        kept.attribute.extend(a for a in node.attribute if a.name in older.attributes)
        return [kept]


def _schema_at(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _refusal(node: NodeProto, opset: int, why: str) -> ModelError:
    return ModelError(
        f"node {node.name or node.output[0]!r}: {node.op_type} of opset {opset} {why};"
        f" CANN's parser takes opsets {MIN_OPSET}..{MAX_OPSET}: export the model at opset"
        f" {MAX_OPSET}, or replace this node"
    )


def _implied(node: NodeProto, attr: onnx.AttributeProto) -> bool:
    if node.op_type in ("Cast", "CastLike") and attr.name == "saturate":
        to = find_attribute(node, "to")
        return to is None or to.i not in _FLOAT8  # only float8 targets look at it
    value = onnx.helper.get_attribute_value(attr)
    allowed = _DROPPABLE.get((node.op_type, attr.name), ())
    return value in allowed or ("ones" in allowed and all(v == 1 for v in value))


def _expand(scope: Scope, node: NodeProto, schema: onnx.defs.OpSchema) -> list[NodeProto]:
    """The node's standard function body, with the node's own names."""
    body = _body(scope, node, schema)
    if body is None:
        raise _refusal(node, schema.since_version, f"has no form at opset {MAX_OPSET}")
    label = node.name or node.op_type
    rename = dict(zip(body.input, list(node.input) + [""] * len(body.input), strict=False))
    given = {a.name: a for a in node.attribute}
    for inner, outer in zip(body.output, node.output, strict=False):
        if outer:
            rename[inner] = outer
    nodes = []
    for part in body.node:
        new = NodeProto()
        new.CopyFrom(part)
        new.name = scope.names.fresh(f"{label}/{part.name or part.op_type}")
        _bind_attributes(new, given)
        for i, name in enumerate(part.input):
            new.input[i] = rename.get(name, name)
        for i, name in enumerate(part.output):
            if name and name not in rename:
                rename[name] = scope.names.fresh(f"{label}/{name}")
            new.output[i] = rename.get(name, "")
        if node.output[0] in new.output:
            new.name = node.name or new.name  # who compares dumps by node name finds this one
        nodes.append(new)
    return nodes


def _bind_attributes(node: NodeProto, given: dict[str, onnx.AttributeProto]) -> None:
    for attr in list(node.attribute):
        if not attr.ref_attr_name:
            continue
        value = given.get(attr.ref_attr_name)
        name = attr.name
        node.attribute.remove(attr)
        if value is not None:
            bound = node.attribute.add()
            bound.CopyFrom(value)
            bound.name = name


def _body(scope: Scope, node: NodeProto, schema: Any) -> onnx.FunctionProto | None:
    if schema.has_function:
        function = schema.function_body
        return function if isinstance(function, onnx.FunctionProto) else None
    if not schema.has_context_dependent_function:
        return None
    types = []
    for name in node.input:
        proto = onnx.TypeProto()
        if name:
            if not scope.dtype(name):
                raise _refusal(node, schema.since_version, f"has input {name} of unknown type")
            proto = onnx.helper.make_tensor_type_proto(scope.dtype(name), scope.dims(name))
        types.append(proto.SerializeToString())
    text = schema.get_context_dependent_function(node.SerializeToString(), types)
    return onnx.FunctionProto.FromString(text) if text else None
