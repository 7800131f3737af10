"""Nodes of standard operators against their schemas: inputs, outputs, attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import onnx
from onnx import AttributeProto, GraphProto, NodeProto
from onnx.defs import OpSchema

from sfa_onnx.files.sound_bodies import body_problems
from sfa_onnx.files.sound_tensors import sparse_problem, tensor_problem
from sfa_onnx.files.sound_values import value_problem

__all__ = ["NodeRules", "holds_graphs"]

_A = AttributeProto
_STANDARD: Final = ("", "ai.onnx")
_SINGLE: Final = OpSchema.FormalParameterOption.Single
_VARIADIC: Final = OpSchema.FormalParameterOption.Variadic
_TENSORS: Final = (_A.TENSOR, _A.TENSORS)
_SPARSE: Final = (_A.SPARSE_TENSOR, _A.SPARSE_TENSORS)


def holds_graphs(node: NodeProto) -> dict[str, GraphProto]:
    """The graphs that any attribute of a node holds, by attribute; "name[0]" in a list."""
    found: dict[str, GraphProto] = {}
    for attribute in node.attribute:
        if attribute.type == _A.GRAPH:
            found[attribute.name] = attribute.g
        elif attribute.type == _A.GRAPHS:
            found |= {f"{attribute.name}[{i}]": g for i, g in enumerate(attribute.graphs)}
    return found


class _Rule:
    """What one operator of one opset asks of its nodes."""

    def __init__(self, schema: OpSchema) -> None:
        self.inputs = (schema.min_input, schema.max_input)
        self.outputs = (schema.min_output, schema.max_output)
        options = [parameter.option for parameter in schema.inputs]
        self.needed = tuple(i for i, o in enumerate(options) if o == _SINGLE)
        self.variadic = options.index(_VARIADIC) if _VARIADIC in options else None
        self.kinds = {n: _kind(a.type) for n, a in schema.attributes.items()}
        self.required = frozenset(n for n, a in schema.attributes.items() if a.required)

    def arity(self, node: NodeProto) -> Iterator[str]:
        """Inputs and outputs that are missing or too many."""
        given = node.input
        low, high = self.inputs
        if not low <= len(given) <= high:
            yield f"has {len(given)} inputs, expected {_span(low, high)}"
        elif "" in given:
            empty = [i for i, name in enumerate(given) if not name]
            bad = [i for i in empty if i in self.needed or self._is_listed(i)]
            if bad:
                yield f"leaves input {bad[0]} empty, which is not optional"
        low, high = self.outputs
        if not low <= len(node.output) <= high:
            yield f"has {len(node.output)} outputs, expected {_span(low, high)}"

    def _is_listed(self, position: int) -> bool:
        return self.variadic is not None and position >= self.variadic


def _kind(kind: OpSchema.AttrType) -> int:
    """The number of an attribute type in AttributeProto."""
    return int(getattr(_A, kind.name))  # type: ignore[attr-defined]


def _span(low: int, high: int) -> str:
    if low == high:
        return str(low)
    return f"{low} or more" if high > 1 << 20 else f"{low} to {high}"


class NodeRules:
    """The schemas of one scope of opset imports, looked up once per operator."""

    def __init__(self, opsets: Mapping[str, int]) -> None:
        newest = onnx.defs.onnx_opset_version()
        self._opset = min(opsets.get("", opsets.get("ai.onnx", newest)), newest)
        self._rules: dict[str, _Rule | None] = {}

    def problems(self, node: NodeProto) -> Iterator[str]:
        """What is wrong with a node, as "has 1 inputs, expected 2"."""
        op = node.op_type
        if not op:
            yield "has no operator"
        rule = None
        if node.domain in _STANDARD:
            rule = self._rules[op] if op in self._rules else self._look_up(op)
        if rule is not None:
            yield from rule.arity(node)
            yield from body_problems(node, self._opset)
        yield from self._attributes(node, rule)

    def _look_up(self, op_type: str) -> _Rule | None:
        """The operator as the opset has it; one from a later opset as the newest has it."""
        rule = None
        for opset in (self._opset, onnx.defs.onnx_opset_version()):
            try:
                rule = _Rule(onnx.defs.get_schema(op_type, opset, ""))
                break
            except onnx.defs.SchemaError:
                continue
        self._rules[op_type] = rule
        return rule

    def _attributes(self, node: NodeProto, rule: _Rule | None) -> Iterator[str]:
        given: set[str] = set()
        for attribute in node.attribute:
            name, kind = attribute.name, attribute.type
            if name in given:
                yield f"has two attributes {name!r}"
            given.add(name)
            if attribute.ref_attr_name:
                continue
            expected = None if rule is None else rule.kinds.get(name)
            if kind not in _KNOWN_KINDS or (expected is not None and kind != expected):
                want = "a known one" if expected is None else _A.AttributeType.Name(expected)
                yield f"has the attribute {name!r} of type {_told(kind)}, expected {want}"
                continue
            problem = _content(attribute)
            if not problem and expected is not None:
                problem = value_problem(node, attribute)
            if problem:
                yield f"has the attribute {name!r}, which {problem}"
        if rule is not None and (missing := rule.required - given):
            yield f"lacks the attribute {min(missing)!r}"


_KNOWN_KINDS: Final = frozenset(_A.AttributeType.values()) - {_A.UNDEFINED}


def _told(kind: int) -> str:
    return _A.AttributeType.Name(kind) if kind in _A.AttributeType.values() else str(kind)


def _content(attribute: AttributeProto) -> str:
    """What is wrong inside an attribute; "" when nothing is."""
    kind = attribute.type
    if kind in _TENSORS:
        tensors = [attribute.t] if kind == _A.TENSOR else attribute.tensors
        return next((problem for t in tensors if (problem := tensor_problem(t))), "")
    if kind in _SPARSE:
        thin = [attribute.sparse_tensor] if kind == _SPARSE[0] else attribute.sparse_tensors
        return next((problem for t in thin if (problem := sparse_problem(t))), "")
    if kind == _A.STRING and not _is_text(attribute.s):
        return "is not UTF-8 text"
    if kind == _A.STRINGS and not all(_is_text(s) for s in attribute.strings):
        return "holds text that is not UTF-8"
    return ""


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
