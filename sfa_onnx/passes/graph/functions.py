"""Local functions: those that hold parts of sites are inlined, the others stay byte for byte.

Exporters make a function per module or per operator, so a site may lie in one function or be spread
over twenty. Inlined nodes are named by the calls they come from ("layers.3/attn/softmax"), which
keeps site ids readable and the same from run to run, and carry the calls' metadata.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

from sfa_onnx.errors import ModelError
from sfa_onnx.guard.guarded import inline
from sfa_onnx.operator.op import find_op
from sfa_onnx.passes.candidate import Candidate, RefusedSite
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.sub_graphs import bodies
from sfa_onnx.passes.graph.walk import above

__all__ = ["Finding", "FunctionId", "Inlined", "inline_functions", "inline_sites"]

FunctionId = tuple[str, str]  # domain, name
Finding = tuple[GraphIndex, Candidate | RefusedSite]
_BEGIN, _END, _MARKS = "Begin", "End", "sfa_onnx.inlining"
_NEAR = 64  # nodes above a refused anchor whose functions are inlined too
_METADATA_IR = 10  # first IR version whose NodeProto has metadata_props

# A model without any of these holds no site.
_TELLING = frozenset(
    ("Softmax", "Attention", "Exp", "Pow", "ReduceLogSumExp", "TopK", "GatherElements", "GatherND")
) | frozenset(("ScatterElements", "ScatterND", "Einsum", "MatMul"))


@dataclass
class Inlined:
    """A model some of whose local functions were inlined.

    Attributes:
        model: the model; the one given where nothing was inlined.
        functions: what was inlined, sorted.
        left: functions that would have to be inlined and cannot be, with the reason.
        origin: first output of an inlined node -> the functions it comes from.
    """

    model: ModelProto
    functions: tuple[FunctionId, ...] = ()
    left: dict[FunctionId, str] = field(default_factory=dict)
    origin: dict[str, frozenset[FunctionId]] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What a report says about it."""
        named = ", ".join(f"{domain}::{name}" for domain, name in self.functions)
        told = [f"local functions inlined: {named}"] if named else []
        return told + [f"{'::'.join(f)} was not looked into: {why}" for f, why in self.left.items()]


def inline_sites(model: ModelProto, find: Callable[[ModelProto], Iterable[Finding]]) -> Inlined:
    """Inline the functions that hold parts of sites, and no other.

    Sites are looked for with everything inlined; then only what they touch is, unless that makes
    other findings (a shape that only an inlined function shows).

    Args:
        model: not changed.
        find: every candidate of a model, with the view of the graph it lies in.
    """
    telling = {_id(f) for f in model.functions if _is_telling(f.node)}
    if not model.functions or not (telling or _is_telling(model.graph.node)):
        return Inlined(model)
    own = {_id(f) for f in model.functions if find_op(f.domain, f.name) is None}
    full = inline_functions(model, own)
    full.left = {f: why for f, why in full.left.items() if f in telling}
    if not full.functions:
        return full
    findings = list(find(full.model))
    touched = {f for index, item in findings for f in _functions_of(full, index, item)}
    wanted = _with_callers(model, touched)
    if wanted >= set(full.functions):
        return full
    part = inline_functions(model, wanted)
    part.left = full.left
    return part if _alike(findings, list(find(part.model))) else full


def inline_functions(model: ModelProto, wanted: Collection[FunctionId]) -> Inlined:
    """Inline these functions and every function that calls one of them.

    Args:
        model: not changed.
        wanted: what to inline; functions of our operators stay, and so do those written for an
            opset in which an operator of theirs means something else.
    """
    left = {}
    for function in model.functions:
        if _id(function) in wanted and (why := _foreign(model, function)):
            left[_id(function)] = why
    chosen = _with_callers(model, set(wanted) - set(left))
    if not chosen:
        return Inlined(model, left=left)
    work = ModelProto()
    work.CopyFrom(model)
    del work.functions[:]
    for function in _once(model.functions):
        if _id(function) in chosen:
            work.functions.append(_marked(function, model))
    work = inline(work, sorted(chosen))
    work.functions.extend(f for f in _once(model.functions) if _id(f) not in chosen)
    calls = _Calls({(*_id(f), f.overload): f for f in model.functions}, chosen, model.ir_version)
    calls.tell(model.graph.node, work.graph)
    present = {o.domain for o in work.opset_import}
    for function in model.functions:
        if _id(function) in chosen:
            new = [o for o in function.opset_import if o.domain not in present]
            work.opset_import.extend(new)
            present.update(o.domain for o in new)
    return Inlined(work, tuple(sorted(chosen)), left, calls.origin)


def _id(function: FunctionProto) -> FunctionId:
    return function.domain, function.name


def _is_telling(nodes: Iterable[NodeProto]) -> bool:
    return any(node.op_type in _TELLING for node in _all_nodes(nodes))


def _once(functions: Iterable[FunctionProto]) -> list[FunctionProto]:
    """The functions without copies of one another, which torch 2.5 writes."""
    found: dict[tuple[str, str, str], FunctionProto] = {}
    for function in functions:
        first = found.setdefault((*_id(function), function.overload), function)
        if first != function:
            raise ModelError(
                f"the model has two functions {'::'.join(_id(function))} that differ; give them"
                " different names, or different overloads"
            )
    return list(found.values())


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for body in bodies(node).values():
            yield from _all_nodes(body.node)


def _with_callers(model: ModelProto, chosen: set[FunctionId]) -> set[FunctionId]:
    """`chosen` and every local function that calls one of them."""
    calls = {_id(f): {(n.domain, n.op_type) for n in _all_nodes(f.node)} for f in model.functions}
    found = set(chosen)
    while more := {f for f, called in calls.items() if called & found} - found:
        found |= more
    return found


def _foreign(model: ModelProto, function: FunctionProto) -> str:
    """Why the nodes of a function may not stand in the graph; "" when they may."""
    opsets = {o.domain: o.version for o in model.opset_import}
    for entry in function.opset_import:
        here = opsets.get(entry.domain, entry.version)
        if here == entry.version:
            continue
        for node in _all_nodes(function.node):
            if node.domain == entry.domain and not _same_meaning(node, entry.version, here):
                return (
                    f"it imports opset {entry.version} of {entry.domain or 'ai.onnx'!r}, the model"
                    f" {here}, between which {node.op_type} changed; convert the model to one opset"
                )
    return ""


def _same_meaning(node: NodeProto, one: int, other: int) -> bool:
    """Whether an operator is defined alike in two versions of its domain."""
    try:
        schemas = [onnx.defs.get_schema(node.op_type, v, node.domain) for v in (one, other)]
    except onnx.defs.SchemaError:
        return False
    return bool(schemas[0].since_version == schemas[1].since_version)


def _marked(function: FunctionProto, model: ModelProto) -> FunctionProto:
    """A copy whose nodes stand between marks, on the model's own opsets."""
    copy = FunctionProto()
    copy.CopyFrom(function)
    del copy.node[:]
    copy.node.append(NodeProto(op_type=_BEGIN, domain=_MARKS))
    copy.node.extend(function.node)
    copy.node.append(NodeProto(op_type=_END, domain=_MARKS))
    opsets = {o.domain: o.version for o in model.opset_import}
    for entry in copy.opset_import:
        entry.version = opsets.get(entry.domain, entry.version)
    return copy


@dataclass
class _Frame:
    """One call that is being expanded: its own calls still to come, and what it hands on."""

    calls: Iterator[NodeProto]
    path: str
    functions: frozenset[FunctionId]
    metadata: dict[str, str]


class _Calls:
    """Walks the calls of the original model along the marks of the inlined one."""

    def __init__(
        self,
        functions: dict[tuple[str, str, str], FunctionProto],
        chosen: set[FunctionId],
        ir_version: int,
    ) -> None:
        self.functions, self.chosen = functions, chosen
        self.origin: dict[str, frozenset[FunctionId]] = {}
        self._told = ir_version >= _METADATA_IR
        self._taken: set[str] = set()

    def tell(self, nodes: Iterable[NodeProto], graph: GraphProto) -> None:
        """Name inlined nodes by their calls, in place, and drop the marks.

        Args:
            nodes: the nodes of the graph before inlining.
            graph: the same graph afterwards.
        """
        nodes = list(nodes)
        self._taken.update(n.name for n in _all_nodes(nodes))
        self._walk(graph, _Frame(self._calls_in(nodes), "", frozenset(), {}))

    def _calls_in(self, nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
        """Calls, and nodes with bodies, in order."""
        return (n for n in nodes if self._is_call(n) or bodies(n))

    def _is_call(self, node: NodeProto) -> bool:
        return (node.domain, node.op_type) in self.chosen

    def _walk(self, graph: GraphProto, frame: _Frame) -> None:
        stack = [frame]
        marks = []
        for i, node in enumerate(graph.node):
            if node.domain == _MARKS:
                marks.append(i)
                if node.op_type == _BEGIN:
                    stack.append(self._enter(stack[-1], next(stack[-1].calls)))
                else:
                    stack.pop()
                continue
            here = stack[-1]
            if here.functions:
                self._name(node, here)
            if bodies(node):
                before = bodies(next(here.calls))
                for name, body in bodies(node).items():
                    inner = _Frame(
                        self._calls_in(before[name].node), here.path, here.functions, here.metadata
                    )
                    self._walk(body, inner)
        for i in reversed(marks):
            del graph.node[i]

    def _enter(self, frame: _Frame, call: NodeProto) -> _Frame:
        """The frame of one call inside another."""
        function = self.functions[call.domain, call.op_type, call.overload]
        label = call.name or next((o for o in call.output if o), call.op_type)
        path = f"{frame.path}/{label}" if frame.path else label
        metadata = {**frame.metadata, **{p.key: p.value for p in call.metadata_props}}
        functions = frame.functions | {_id(function)}
        return _Frame(self._calls_in(function.node), path, functions, metadata)

    def _name(self, node: NodeProto, frame: _Frame) -> None:
        """Give an inlined node the name and the metadata of its place."""
        first = next((o for o in node.output if o), "")
        self.origin[first] = frame.functions
        own = re.sub(r"__\d+$", "", node.name).lstrip("/") or node.op_type
        name = f"{frame.path}/{own}"
        count = 1
        while name in self._taken:
            count += 1
            name = f"{frame.path}/{own}_{count}"
        self._taken.add(name)
        node.name = name
        if self._told:
            present = {p.key for p in node.metadata_props}
            for key, value in frame.metadata.items():
                if key not in present:
                    node.metadata_props.add(key=key, value=value)


def _functions_of(
    full: Inlined, index: GraphIndex, item: Candidate | RefusedSite
) -> set[FunctionId]:
    """The functions that a candidate's nodes come from, or what lies near a refused one."""
    if isinstance(item, Candidate):
        nodes = {item.anchor, *item.nodes, *item.support}
    else:
        made = [o for o in index.nodes[item.anchor].output if o]
        nodes = {item.anchor, *above(index, made[:1], lambda _: True, _NEAR)}
    found: set[FunctionId] = set()
    for i in nodes:
        first = next((o for o in index.nodes[i].output if o), "")
        found |= full.origin.get(first, frozenset())
    return found


def _alike(one: list[Finding], other: list[Finding]) -> bool:
    """Whether two searches found the same, up to the names of inlined values."""
    return [_digest(*f) for f in one] == [_digest(*f) for f in other]


def _digest(index: GraphIndex, item: Candidate | RefusedSite) -> tuple[str, ...]:
    place = index.place(item.anchor)
    if isinstance(item, Candidate):
        return (place, item.op.name, item.family, str(len(item.nodes)))
    return (place, re.sub(r"__\d+", "", item.refusal.reason))
