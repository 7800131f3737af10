"""Our operators put back where a portable model's bodies stand in their place.

A portable model may have been merged, prefixed or inlined since: its functions have other names,
or their nodes stand in the graph. Bodies say what they are (`hints`); each is written anew and
compared node by node, from its results upwards, before the operator takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

from sfa_onnx.errors import ContractError, UsageError
from sfa_onnx.files.onnx_attrs import graphs
from sfa_onnx.passes.graph.functions import inline_functions
from sfa_onnx.passes.graph.order import reads
from sfa_onnx.passes.graph.provenance import site_of
from sfa_onnx.report import SiteReport, VerifyRecord
from sfa_onnx.runtime.portable.hints import read_hint
from sfa_onnx.runtime.portable.model import OPS, Signature, Style, has_body, write_body

__all__ = ["refuse_proof", "restored", "restored_sites"]

_SMALL: Final = 1 << 12  # elements of a constant of a body


def restored(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """The model with its bodies turned back into operators, and the first output of each.

    Args:
        model: not changed; returned as it is when it holds no body.
    """
    inner = {(f.domain, f.name) for f in model.functions if _speaks(f.node)} - set(OPS)
    if not inner and not any(_speaks(graph.node) for graph in graphs(model.graph)):
        return model, []
    out = inline_functions(model, inner).model if inner else model
    if out is model:
        out = ModelProto()
        out.CopyFrom(model)
    found: list[str] = []
    for graph in list(graphs(out.graph)):
        found += _Restorer(out, graph).run()
    if not found:
        return model, []
    present = {entry.domain for entry in out.opset_import}
    for op in OPS.values():
        used = any(n.domain == op.domain for g in graphs(out.graph) for n in g.node)
        if used and op.domain not in present:
            out.opset_import.add(domain=op.domain, version=op.version)
            present.add(op.domain)
    return out, found


def restored_sites(model: ModelProto, found: list[str]) -> list[SiteReport]:
    """What a report says of operators that were put back.

    Args:
        model: as `restored` made it.
        found: the first outputs of the operators.
    """
    nodes = {n.output[0]: n for graph in graphs(model.graph) for n in graph.node if n.output}
    record = VerifyRecord(
        (), {}, (), ("put back: its body of standard operators is ours, node for node",), ()
    )
    return [
        SiteReport(
            site_id=site_of(nodes[name].name),
            anchor=nodes[name].name,
            status="fused",
            op_type=nodes[name].op_type,
            family="portable body",
            record=record,
        )
        for name in found
    ]


def refuse_proof(sites: list[SiteReport]) -> None:
    """Certificates record what fusing replaced, not what was put back.

    Raises:
        UsageError: something was.
    """
    if sites:
        raise UsageError(
            f"certificate: {len(sites)} operators of this model were put back from their bodies of"
            " standard operators, which a certificate does not record; fuse the original, or leave"
            " the certificate out"
        )


def _speaks(nodes: Any) -> bool:
    """Whether nodes end a body of ours, or hold an operator of ours inside a function."""
    return any(read_hint(n) is not None or has_body(n) for n in nodes)


@dataclass
class _Match:
    """How a body's values are called in a graph."""

    values: dict[str, str] = field(default_factory=dict)
    nodes: set[int] = field(default_factory=set)
    scale: float | None = None

    def copy(self) -> _Match:
        return _Match(dict(self.values), set(self.nodes), self.scale)


class _Restorer:
    """Puts operators back in one graph."""

    def __init__(self, model: ModelProto, graph: GraphProto) -> None:
        self.graph, self.nodes = graph, list(graph.node)
        self.producer = {o: i for i, n in enumerate(self.nodes) for o in n.output if o}
        self.constants = {t.name: t for g in graphs(model.graph) for t in g.initializer}
        self.given = {v.name for v in graph.input}

    def run(self) -> list[str]:
        """Replace every body; returns the first outputs of the operators."""
        ends: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for i, node in enumerate(self.nodes):
            told = read_hint(node)
            if told is not None:
                ends.setdefault(int(told.get("output", 0)), []).append((i, told))
        made: dict[int, NodeProto] = {}
        gone: set[int] = set()
        for i, told in ends.get(0, []):
            others = [j for k, rest in sorted(ends.items()) if k for j, _ in rest]
            found = self._operator(i, told, others)
            if found is not None:
                made[i], used = found
                gone |= used
        if made:
            self._replace(made, gone)
        return [node.output[0] for node in made.values()]

    def _operator(
        self, end: int, told: dict[str, Any], others: list[int]
    ) -> tuple[NodeProto, set[int]] | None:
        """The operator that a body is, and the body's nodes; None where it is not what it says."""
        try:
            signature = Signature.told(told)
            body, results = write_body(signature, Style(int(told["opset"]), told["rounding"]))
        except (ContractError, KeyError, TypeError, ValueError, IndexError, AttributeError):
            return None
        formal = {t.name for t in signature.op.inputs}
        matcher = _Matcher(self, {o: n for n in body for o in n.output}, formal)
        match = matcher.match(results[0], self.nodes[end].output[0], _Match())
        for result in results[1:]:
            tries = (o for j in others for o in self.nodes[j].output)
            more = (matcher.match(result, o, match.copy()) for o in tries if match is not None)
            match = next((m for m in more if m is not None), None)
        if match is None:
            return None
        return self._node(signature, match, results), match.nodes

    def _node(self, signature: Signature, match: _Match, results: list[str]) -> NodeProto:
        names = ["key" if t.name == "value" else t.name for t in signature.op.inputs]
        inputs = [match.values.get(n, "") if n in signature.present else "" for n in names]
        while inputs and not inputs[-1]:
            inputs.pop()
        outputs = [match.values[r] for r in results]
        attributes = dict(signature.attributes)
        if match.scale is not None:
            attributes["scale_value"] = match.scale
        made = helper.make_node(
            signature.op.name, inputs, outputs, name=f"{outputs[0]}/{signature.op.name}",
            domain=signature.op.domain,
        )  # fmt: skip
        order = [a.name for a in signature.op.attributes if a.name in attributes]
        made.attribute.extend(helper.make_attribute(n, attributes[n]) for n in order)
        return made

    def _replace(self, made: dict[int, NodeProto], bodies: set[int]) -> None:
        """Operators at the places of their bodies' ends; body nodes that nobody else reads go."""
        last = {name: i for i, n in made.items() for name in n.output}
        kept = [made.get(i, n) for i, n in enumerate(self.nodes)]
        live = {v.name for v in self.graph.output}
        dropped: set[int] = set()
        for i in range(len(kept) - 1, -1, -1):
            node = kept[i]
            replaced = i not in made and any(last.get(o, i) != i for o in node.output)
            unread = i in bodies and i not in made and not live & set(node.output)
            if replaced or unread:
                dropped.add(i)
            else:
                live.update(reads(node))
        del self.graph.node[:]
        self.graph.node.extend(n for i, n in enumerate(kept) if i not in dropped)


class _Matcher:
    """Compares a freshly written body with nodes of a graph, from results upwards."""

    def __init__(self, graph: _Restorer, body: dict[str, NodeProto], formal: set[str]) -> None:
        self.graph, self.body, self.formal = graph, body, formal

    def match(self, result: str, value: str, found: _Match) -> _Match | None:
        """`found` with everything above `result`; None where the graph differs."""
        stack = [(result, value)]
        while stack:
            own, theirs = stack.pop()
            known = found.values.get(own)
            if known is not None:
                if known != theirs and not self._same_constant(own, theirs):
                    return None
                continue
            found.values[own] = theirs
            if own in self.formal:
                continue
            more = self._node(own, theirs, found)
            if more is None:
                return None
            stack += more
        return found

    def _node(self, own: str, theirs: str, found: _Match) -> list[tuple[str, str]] | None:
        node = self.body[own]
        if node.op_type == "Constant":
            return [] if self._constant(node, theirs, found) else None
        at = self.graph.producer.get(theirs)
        if at is None:
            return None
        other = self.graph.nodes[at]
        alike = (node.op_type, len(node.input)) == (other.op_type, len(other.input))
        if not alike or other.domain not in ("", "ai.onnx") or _told(node) != _told(other):
            return None
        if list(node.output).index(own) != list(other.output).index(theirs):
            return None
        found.nodes.add(at)
        return list(zip(node.input, other.input, strict=True))

    def _constant(self, node: NodeProto, theirs: str, found: _Match) -> bool:
        array = self._array(theirs)
        if array is None:
            return False
        at = self.graph.producer.get(theirs)
        if at is not None:
            found.nodes.add(at)
        if any(a.ref_attr_name for a in node.attribute):
            if array.size != 1 or found.scale not in (None, float(array.ravel()[0])):
                return False
            found.scale = float(array.ravel()[0])
            return True
        return _equal(_value(node), array)

    def _same_constant(self, own: str, theirs: str) -> bool:
        """Constants that the body shares may have become several."""
        node = self.body.get(own)
        if node is None or node.op_type != "Constant":
            return False
        array = self._array(theirs)
        return array is not None and _equal(_value(node), array)

    def _array(self, name: str) -> NDArray[Any] | None:
        at = self.graph.producer.get(name)
        if at is not None:
            node = self.graph.nodes[at]
            return _value(node) if node.op_type == "Constant" else None
        tensor = self.graph.constants.get(name)
        if tensor is None or name in self.graph.given or np.prod(tensor.dims) > _SMALL:
            return None
        if tensor.data_location == TensorProto.EXTERNAL:
            return None
        return np.asarray(numpy_helper.to_array(tensor))


def _value(node: NodeProto) -> NDArray[Any] | None:
    """What a Constant node holds."""
    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.data_location != TensorProto.EXTERNAL:
            return np.asarray(numpy_helper.to_array(attribute.t))
        if attribute.name == "value_float":
            return np.asarray(attribute.f, np.float32)
        if attribute.name in ("value_int", "value_ints"):
            single = attribute.name == "value_int"
            return np.asarray(attribute.i if single else list(attribute.ints), np.int64)
    return None


def _equal(one: NDArray[Any] | None, other: NDArray[Any]) -> bool:
    if one is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.tobytes() == other.tobytes()


def _told(node: NodeProto) -> list[tuple[str, bytes]]:
    """A node's attributes in a fixed order, without the defaults that tools leave out or add."""
    return sorted((a.name, _plain(a)) for a in node.attribute)


def _plain(attribute: AttributeProto) -> bytes:
    copy = AttributeProto()
    copy.CopyFrom(attribute)
    copy.doc_string = ""
    return bytes(copy.SerializeToString(deterministic=True))
