"""Edges that CANN's ONNX parser draws otherwise than the file does, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import onnx

from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.facts import arity
from sfa_onnx.ascend.checks.finding import Finding, misread
from sfa_onnx.ascend.checks.view import Scope, contract_of

__all__ = ["loose_outputs", "names_that_meet", "open_inputs"]

_ATC = "`sfa-onnx atc` rewrites this"


def open_inputs(ctx: Context, node: Node) -> Iterator[Finding]:
    """Inputs that stay open: written by nobody, or required and not given."""
    sparse = {s.values.name for s in node.scope.graph.sparse_initializer}
    for name in node.proto.input:
        if name in sparse:
            yield misread(
                "sparse-initializer",
                "error",
                f"input {name!r} is a sparse initializer, which the parser does not read: the input"
                " stays open",
                node.name,
                "store it dense",
                fixable=True,
            )
        elif name and ctx.view.resolve_scope(node.scope, name) is None:
            message = f"nothing writes input {name!r}: it stays open, without an error"
            yield misread("missing-producer", "error", message, node.name, "connect or remove it")
        elif name and not _reaches(node.scope, name):
            yield misread(
                "nested-branch-value",
                "error",
                f"input {name!r} comes from two graphs further out: the parser hands outer values"
                " to the branches of one If only, so this input stays open",
                node.name,
                "read the value with an Identity in the branch between, or take the inner If out",
                evidence="source",
            )
    required = _required(ctx, node)
    missing = [i for i in range(required) if not "".join(node.proto.input[i : i + 1])]
    if missing:
        yield misread(
            "missing-input",
            "error",
            f"{node.op_type}: required input{'s' if len(missing) > 1 else ''}"
            f" {', '.join(map(str, missing))} not given; the parser leaves it open",
            node.name,
            "give the input",
        )


def _reaches(scope: Scope, name: str) -> bool:
    """Whether each graph on the way to the value reads it itself: only then it is handed on."""
    at: Scope | None = scope
    while at is not None and not at.known(name):
        if name not in at.outer_values:
            return False
        at = at.parent
    return True


def _required(ctx: Context, node: Node) -> int:
    plugin = ctx.plugin(node)
    if plugin is not None:
        return plugin.inputs[0] if plugin.inputs else 0
    if (op := contract_of(node.proto)) is not None:
        return sum(not t.optional for t in op.inputs)
    least = _least_inputs(node.op_type, node.version or 0) if node.domain == "ai.onnx" else None
    if least is not None:
        return least
    found = [arity(t) for t in ctx.registration(node).ge_types]
    return min((a[0] for a in found if a), default=0) if all(found) else 0


@cache
def _least_inputs(op_type: str, version: int) -> int | None:
    if not onnx.defs.has(op_type, version, ""):
        return None
    return int(onnx.defs.get_schema(op_type, version, "").min_input)


def names_that_meet(ctx: Context, scope: Scope) -> Iterator[Finding]:
    """Outputs that share a name, the empty one among them: each reader is wired to all of them."""
    yield from _empty_output_trap(ctx, scope)
    yield from _two_producers(ctx, scope)


def _empty_output_trap(ctx: Context, scope: Scope) -> Iterator[Finding]:
    culprit = next((n for n in ctx.nodes_of(scope) if "" in n.proto.output), None)
    if culprit is None:
        return
    hint = f"give the output of {culprit.name} a name; {_ATC}"
    hit = False
    for node in ctx.nodes_of(scope):
        gaps = [i for i, name in enumerate(node.proto.input) if not name]
        if not gaps or "PartitionedCall" in ctx.registration(node).ge_types:
            continue  # expanding plug-ins look at the name themselves
        hit = True
        yield misread(
            "empty-output",
            "error",
            f"the unnamed output of {culprit.name} ({culprit.op_type}) is wired into the inputs"
            f" this {node.op_type} leaves out ({', '.join(map(str, gaps))})",
            node.name,
            hint,
            fixable=True,
        )
    if not hit:
        message = f"{culprit.op_type} leaves an output unnamed: it would fill every omitted input"
        yield misread("empty-output", "info", message, culprit.name, hint, fixable=True)


def _two_producers(ctx: Context, scope: Scope) -> Iterator[Finding]:
    seen = set(scope.inputs) | set(scope.initializers)
    for node in ctx.nodes_of(scope):
        for name in node.proto.output:
            if name and name in seen:
                message = f"value {name!r} is written twice: the parser wires both to each reader"
                hint = "give each output a name of its own"
                yield misread("two-producers", "error", message, node.name, hint, evidence="source")
            seen.add(name)


def loose_outputs(ctx: Context) -> Iterator[Finding]:
    """Graph outputs that no graph input reaches: the parsed graph starts from the inputs."""
    root = ctx.view.root
    reached = _reached(root)
    for value in root.graph.output:
        constant = value.name in root.initializers
        if value.name not in reached and root.known(value.name):
            keeps = constant and ctx.cann.keeps_loose_constants
            yield misread(
                "constant-output",
                "warning" if keeps else "error",
                f"output {value.name!r} depends on constants alone"
                + (": kept by 9.2, dropped before" if keeps else ": it is not in the parsed graph"),
                value.name,
                f"drop the output, or make it depend on an input; {_ATC}",
            )


def _reached(scope: Scope) -> set[str]:
    """Values connected with a graph input, along edges of either direction."""
    touching: dict[str, list[onnx.NodeProto]] = {}
    for node in scope.graph.node:
        for name in _values(node):
            touching.setdefault(name, []).append(node)
    reached, queue, done = set(scope.inputs), list(scope.inputs), set()
    if not queue:
        return set(touching) | set(scope.initializers)  # the parser then starts from constants
    while queue:
        for node in touching.get(queue.pop(), ()):
            if id(node) not in done:
                done.add(id(node))
                fresh = [n for n in _values(node) if n not in reached]
                reached.update(fresh)
                queue.extend(fresh)
    return reached


def _values(node: onnx.NodeProto) -> list[str]:
    names = {*node.input, *node.output}
    for item in node.attribute:
        if item.type == onnx.AttributeProto.GRAPH:
            names.update(*(_values(n) for n in item.g.node), ())
    return [n for n in names if n]
