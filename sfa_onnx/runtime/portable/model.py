"""Models that run without our library: each operator also ships as a function of standard ones.

`make_portable` adds a model-local function per signature (which optional inputs are present, which
attributes, which types): onnxruntime inlines it when our library is not registered and takes our
kernel when it is. `unfuse` puts the standard nodes in the operator's place for good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import onnx
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper

from sfa_onnx.errors import ContractError, ModelError
from sfa_onnx.files.model import load_model
from sfa_onnx.files.onnx_attrs import attributes, graphs, subgraphs
from sfa_onnx.guard.doors import door
from sfa_onnx.operator.contract import OpContract, Rounding
from sfa_onnx.operator.op import (
    ALL_OPS,
    KV_CACHE_PACK,
    KV_CACHE_WRITE,
    LIGHTNING_INDEXER,
    QUANT_LIGHTNING_INDEXER,
)
from sfa_onnx.runtime.elem_types import ElemTypes
from sfa_onnx.runtime.portable.attention import attention_body
from sfa_onnx.runtime.portable.body import MIN_OPSET, Body
from sfa_onnx.runtime.portable.cache_write import cache_write_body
from sfa_onnx.runtime.portable.hints import write_hint
from sfa_onnx.runtime.portable.indexer import indexer_body
from sfa_onnx.runtime.portable.pack import pack_body

__all__ = [
    "OPS",
    "Signature",
    "Style",
    "has_body",
    "make_portable",
    "unfuse",
    "with_bodies",
    "write_body",
]

OPS: Final[dict[tuple[str, str], OpContract]] = {op.key: op for op in ALL_OPS}
_OVERLOAD_IR: Final = 10  # IR version that brought FunctionProto.overload
_AT_RUN_TIME: Final = ("scale_value",)  # attributes that the body reads from the node


def has_body(node: NodeProto) -> bool:
    """Whether this node is one of the operators that a function body exists for."""
    return (node.domain, node.op_type) in OPS


@dataclass(frozen=True)
class Style:
    """How bodies are written."""

    opset: int
    rounding: Rounding


@dataclass(frozen=True)
class Signature:
    """What decides the body of one node."""

    key: tuple[str, str]
    present: frozenset[str]
    attributes: tuple[tuple[str, Any], ...]
    types: tuple[tuple[str, int], ...]
    outputs: int  # that the node has, up to the last named one

    @property
    def op(self) -> OpContract:
        """The operator."""
        return OPS[self.key]

    def tell(self, style: Style) -> dict[str, Any]:
        """The signature as a hint."""
        return {
            "operator": list(self.key),
            "present": sorted(self.present),
            "attributes": dict(self.attributes),
            "types": dict(self.types),
            "outputs": self.outputs,
            "opset": style.opset,
            "rounding": style.rounding,
        }

    @classmethod
    def told(cls, hint: dict[str, Any]) -> Signature:
        """The signature that a hint holds.

        Raises:
            KeyError, TypeError, ValueError: it is none of ours.
        """
        domain, name = hint["operator"]
        op = OPS[domain, name]
        at_run_time = {n: 1.0 for n in _AT_RUN_TIME if any(a.name == n for a in op.attributes)}
        op.check_attributes(hint["attributes"] | at_run_time)
        return cls(
            (domain, name),
            frozenset(hint["present"]),
            tuple(sorted(hint["attributes"].items())),
            tuple(sorted((k, int(v)) for k, v in hint["types"].items())),
            int(hint["outputs"]),
        )


@door
def make_portable(model: ModelProto, *, rounding: Rounding = "exact") -> ModelProto:
    """A copy of `model` whose operators of ours also are model-local functions.

    Weights are not read. Nodes of an unusual second signature get an `overload`, and the model then
    IR version 10.

    Args:
        model: the model.
        rounding: of the functions; the kernels take the session's (`runtime.session`).

    Raises:
        ModelError: the model breaks the format's rules, its opset is too old, or the type of an
            operator's input is unknown.
        ContractError: a node's attributes are illegal.
    """
    return with_bodies(load_model(model), rounding)


def with_bodies(model: ModelProto, rounding: Rounding = "exact") -> ModelProto:
    """`make_portable` for a model that was looked at already."""
    out, opset, types = _prepared(model)
    known: dict[Signature, str] = {}
    for node in (n for graph in graphs(out.graph) for n in graph.node if has_body(n)):
        signature = _signature(node, types)
        if signature not in known:
            count = sum(s.key == signature.key for s in known)
            known[signature] = f"signature{count + 1}" if count else ""
            out.functions.append(_function(signature, known[signature], opset, rounding))
        node.overload = known[signature]
        del node.output[signature.outputs :]  # a function has as many as its calls
    if any(known.values()):
        out.ir_version = max(out.ir_version, _OVERLOAD_IR)
    return out


@door
def unfuse(model: ModelProto, *, rounding: Rounding = "exact") -> ModelProto:
    """A copy of `model` in which our operators are replaced by standard nodes.

    Output names stay; every other node and all initializers are untouched.

    Args:
        model: the model.
        rounding: "npu": the standard nodes round as CANN's kernels do.

    Raises:
        ModelError: the model breaks the format's rules, its opset is too old, or the type of an
            operator's input is unknown.
        ContractError: a node's attributes are illegal.
    """
    return with_standard_nodes(load_model(model), rounding)


def with_standard_nodes(model: ModelProto, rounding: Rounding = "exact") -> ModelProto:
    """`unfuse` for a model that was looked at already."""
    out, opset, types = _prepared(model)
    _inline(out.graph, types, Style(opset, rounding), _names(out.graph))
    left = {node.domain for graph in graphs(out.graph) for node in graph.node}
    for entry in [o for o in out.opset_import if o.domain in {op.domain for op in OPS.values()}]:
        if entry.domain not in left:
            out.opset_import.remove(entry)
    return out


def _prepared(model: ModelProto) -> tuple[ModelProto, int, ElemTypes]:
    """A copy without bodies of our operators, its opset, and the types of its values."""
    out = ModelProto()
    out.CopyFrom(model)
    kept = [f for f in out.functions if (f.domain, f.name) not in OPS]
    if len(kept) != len(out.functions):
        del out.functions[:]
        out.functions.extend(kept)
    return out, _opset(out), ElemTypes(out)


def _opset(model: ModelProto) -> int:
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    if version < MIN_OPSET:
        raise ModelError(
            f"the model has opset {version}; a standard-operator body needs {MIN_OPSET} or later:"
            " convert it with onnx.version_converter first"
        )
    return version


def _signature(node: NodeProto, types: ElemTypes) -> Signature:
    op = OPS[(node.domain, node.op_type)]
    op.check_inputs(node.input)
    values = {
        tensor.name: name
        for tensor, name in zip(op.inputs, node.input, strict=False)
        if name and tensor.name != "value"
    }
    given = attributes(node)
    op.check_attributes(given)
    attrs = {a.name: given.get(a.name, a.default) for a in op.attributes}
    floats = {"query", "nope", "rope"} & values.keys()
    elem_types: dict[str, int] = {}
    for name in sorted(floats):
        found = types.of(values[name])
        if found is None:
            raise ModelError(
                f"the type of {values[name]!r}, input {name} of {node.op_type} {node.name!r}, is"
                " not in the model and cannot be inferred: add it to graph.value_info"
            )
        _check_type(op, node, name, found)
        elem_types[name] = found
    kept = tuple(sorted((k, v) for k, v in attrs.items() if k not in _AT_RUN_TIME))
    outputs = max((i + 1 for i, name in enumerate(node.output) if name), default=1)
    return Signature(op.key, frozenset(values), kept, tuple(elem_types.items()), outputs)


def _check_type(op: OpContract, node: NodeProto, name: str, found: int) -> None:
    tensor = next(t for t in op.inputs if t.name == name)
    given = TensorProto.DataType.Name(found).lower()
    if f"tensor({given})" not in op.types_of(tensor):
        legal = ", ".join(t.removeprefix("tensor(")[:-1] for t in op.types_of(tensor))
        raise ContractError(
            f"{op.name} {node.name!r}: its input {name} is of type {given}, expected one of"
            f" {legal}: cast it in front of the operator"
        )


def write_body(signature: Signature, style: Style) -> tuple[list[NodeProto], list[str]]:
    """The body's nodes and the names of its results, as many as the calling node has.

    The nodes that make results say what they are the body of (`hints`).
    """
    nodes, results = _everything(signature, style)
    results = results[: signature.outputs]
    kept = _needed(nodes, results)
    told = signature.tell(style)
    for position, result in enumerate(results):
        maker = next(n for n in kept if result in n.output)
        write_hint(maker, told, position)
    return kept, results


def _needed(nodes: list[NodeProto], results: list[str]) -> list[NodeProto]:
    """The nodes that some of `results` depends on."""
    wanted, kept = set(results), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _everything(signature: Signature, style: Style) -> tuple[list[NodeProto], list[str]]:
    body, attrs, types = Body(style.opset), dict(signature.attributes), dict(signature.types)
    op, present = signature.op, signature.present
    if op is KV_CACHE_PACK:
        return body.nodes, [pack_body(body, present, attrs, types)]
    if op is KV_CACHE_WRITE:
        return body.nodes, [cache_write_body(body)]
    if op in (LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER):
        written = indexer_body(body, op, present, attrs, types["query"], style.rounding)
        return body.nodes, written
    return body.nodes, attention_body(body, op, present, attrs, types["query"], style.rounding)


def _function(signature: Signature, overload: str, opset: int, rounding: Rounding) -> FunctionProto:
    op = signature.op
    nodes, results = write_body(signature, Style(opset, rounding))
    names = dict(zip(results, (t.name for t in op.outputs), strict=False))
    for node in nodes:
        node.output[:] = [names.get(name, name) for name in node.output]
    function = helper.make_function(
        op.domain,
        op.name,
        [t.name for t in op.inputs],
        list(names.values()),
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=[a.name for a in op.attributes],
        doc_string=f"{op.doc} In standard operators, for runtimes without the kernel.",
    )
    function.overload = overload
    return function


def _names(graph: onnx.GraphProto) -> set[str]:
    """Every value and node name of the model."""
    names: set[str] = set()
    for part in graphs(graph):
        names.update(v.name for v in (*part.input, *part.initializer))
        for node in part.node:
            names.update((*node.input, *node.output, node.name))
    return names


def _inline(graph: onnx.GraphProto, types: ElemTypes, style: Style, taken: set[str]) -> None:
    nodes: list[NodeProto] = []
    for node in graph.node:
        for sub in subgraphs(node):
            _inline(sub, types, style, taken)
        ours = has_body(node)
        nodes += _expanded(node, _signature(node, types), style, taken) if ours else [node]
    del graph.node[:]
    graph.node.extend(nodes)


def _expanded(
    node: NodeProto, signature: Signature, style: Style, taken: set[str]
) -> list[NodeProto]:
    """Copies of the body's nodes between the node's own inputs and output."""
    prefix = base = f"{node.name or node.output[0]}/"
    suffix = 0
    while any(name.startswith(prefix) for name in taken):
        suffix += 1
        prefix = f"{base[:-1]}_{suffix}/"
    taken.add(prefix)
    body, results = write_body(signature, style)
    inner = {t.name: n for t, n in zip(signature.op.inputs, node.input, strict=False) if n}
    inner |= {r: n for r, n in zip(results, node.output, strict=False) if n}
    scale = next((a.f for a in node.attribute if a.name in _AT_RUN_TIME), 0.0)
    for copy in body:
        # The body numbers its values; the model's own names of results may end alike.
        copy.name = prefix + copy.op_type + "_" + copy.output[0].rsplit("_", 1)[-1]
        for names in (copy.input, copy.output):
            for i, name in enumerate(names):
                names[i] = inner.get(name, prefix + name)
        for attribute in copy.attribute:
            if attribute.ref_attr_name:
                attribute.CopyFrom(helper.make_attribute(attribute.name, float(scale)))
    return body
