"""CANN's ONNX parser, replayed: what it refuses, in the order it would notice.

The order matters: the first finding carries the code a user would see. Phases, per graph, outer
graphs first: inputs and outputs, names and plug-in keys of all nodes, parameters of each node
(constants among them), wiring, expansion. A branch of an `If` is parsed like a graph of its own
whose outer values are inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from sfa_onnx.ascend.checks import builtin_plugins
from sfa_onnx.ascend.checks.constants import constant, input_dtype
from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.facts import (
    INTERNAL_OPS,
    NO_PROTOTYPE,
    arity,
    registered_versions,
)
from sfa_onnx.ascend.checks.finding import Finding, refused
from sfa_onnx.ascend.checks.own_plugin import refusals
from sfa_onnx.ascend.checks.view import Scope
from sfa_onnx.ascend.reductions import REDUCTIONS
from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.operator.op import find_op

__all__ = ["replay"]

_ATC_HINT = "run `sfa-onnx atc`, which writes the ATC flavour"


def replay(ctx: Context) -> Iterator[Finding]:
    """Everything the parser would refuse, first what it meets first."""
    yield from _if_attributes(ctx)
    for scope in ctx.view.scopes:
        yield from _interface(ctx, scope)
        yield from _precheck(ctx, scope)
        yield from _parameters(ctx, scope)
        yield from _wiring(ctx, scope)
        yield from _outputs(scope)
        for node in ctx.nodes_of(scope):
            if ctx.builtin(node):
                yield from builtin_plugins.expansion(ctx, node)


def _if_attributes(ctx: Context) -> Iterator[Finding]:
    for node in ctx.nodes():
        names = sorted(a.name for a in node.proto.attribute)
        if node.op_type == "If" and names != ["else_branch", "then_branch"]:
            yield refused(
                "if-attributes",
                f"If carries the attributes {names}: expected exactly then_branch and else_branch",
                "E19999",
                node.name,
                hint="remove the others",
                evidence="source",
            )


def _interface(ctx: Context, scope: Scope) -> Iterator[Finding]:
    graph = scope.graph
    if scope is ctx.view.root and not graph.input:
        message = "the graph has no input: an .om needs at least one"
        yield refused("no-graph-input", message, "E16001", hint="keep one graph input")
    if not graph.output:
        message = f"graph {scope.path or graph.name!r} has no output"
        yield refused("no-graph-output", message, "E16001", hint="name at least one output")


def _precheck(ctx: Context, scope: Scope) -> Iterator[Finding]:
    """Domains, names and keys, node by node. The parser stops at the first domain it misses."""
    seen: set[str] = set()
    stopped = False
    for node in ctx.nodes_of(scope):
        if node.op_type not in INTERNAL_OPS and not node.found and not stopped:
            stopped = True
            yield _no_opset(ctx, node)
        yield from _name(node.name, scope.names[node.index], seen, fixable=True)
        if node.op_type not in INTERNAL_OPS and node.version is not None:
            yield from _key(ctx, node)
    generated = [*scope.inputs, *(() if scope.parent is None else scope.outer_values)]
    generated += [f"{n}_Initializer_{i}" for i, n in enumerate(_parser_order(scope))]
    for name in generated:
        yield from _name(name, name, seen, fixable=True)


def _parser_order(scope: Scope) -> list[str]:
    return sorted(scope.initializers, key=lambda n: n.encode())


def _name(shown: str, name: str, seen: set[str], fixable: bool) -> Iterator[Finding]:
    if name in seen:
        yield refused(
            "duplicate-name",
            f"two nodes of one graph are called {name!r} (graph inputs and the generated"
            " <initializer>_Initializer_<n> count as nodes)",
            "E13009",
            shown,
            hint="give every node a name of its own",
            fixable=fixable,
        )
    seen.add(name)


def _no_opset(ctx: Context, node: Node) -> Finding:
    count = len(ctx.view.imports)
    if not node.proto.domain and not ctx.cann.many_domains:
        return refused(
            "opset-imports",
            f"the model has {count} opset imports ({', '.join(map(repr, ctx.view.imports))}); CANN"
            f" {ctx.cann.version} allows exactly one as soon as a node has no domain",
            "E16005",
            node.name,
            hint=_ATC_HINT if count > 1 else "import one opset of the default domain",
        )
    return refused(
        "opset-missing",
        f"no opset import is spelled {node.domain!r}, the domain of this {node.op_type}",
        "E19999",
        node.name,
        hint=f"import {node.domain!r}, or clear the node's domain; {_ATC_HINT}",
    )


def _key(ctx: Context, node: Node) -> Iterator[Finding]:
    registered = ctx.registration(node)
    if registered.known:
        return
    if registered.known is None:
        yield Finding(
            "plugin-not-open",
            "unknown",
            "parse",
            f"{node.key}: the plug-in is not in the open sources of CANN {ctx.cann.version}, so"
            " nothing here can say whether that release has it",
            node.name,
            hint="try it on the machine that converts, or use a newer CANN",
            evidence="source",
        )
        return
    rule, hint = _no_plugin(ctx, node)
    fixable = node.op_type in REDUCTIONS and node.domain == "ai.onnx"
    message = f"no plug-in parses {node.key}"
    if fixable and registered_versions("ai.onnx", node.op_type):
        message += " in any recorded run (the sources of some releases register it)"
    yield refused(rule, message, "E13010", node.name, hint=hint, fixable=fixable)


def _no_plugin(ctx: Context, node: Node) -> tuple[str, str]:
    """The rule a node without plug-in falls under, and the way out."""
    if node.domain == "com.microsoft":
        return "com-microsoft", (
            "a fusion of onnxruntime's optimiser: start from the model as exported, not from one"
            " that onnxruntime has optimised and saved"
        )
    if any(f.domain == node.proto.domain and f.name == node.op_type for f in _functions(ctx)):
        return (
            "function-call",
            f"the parser does not expand functions: inline them; {_ATC_HINT}",
        )
    if node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
        return "qdq-op", "QDQ ops have no plug-in: dequantise integer weights with Cast and Mul"
    return "unregistered-op", _key_hint(node)


def _key_hint(node: Node) -> str:
    versions = registered_versions("ai.onnx", node.op_type)
    if find_op(node.proto.domain, node.op_type) or find_op("npu", node.op_type):
        return f"our plug-in takes the ATC form of this op: {_ATC_HINT}"
    if node.domain == "ai.onnx" and node.op_type in REDUCTIONS:
        return f"write it with ReduceSum; {_ATC_HINT}"
    if node.domain == "ai.onnx" and versions:
        return f"plug-ins exist for opsets {versions}: convert the model; {_ATC_HINT}"
    if node.domain == "npu" and registered_versions("npu", node.op_type):
        return "the plug-in is registered for npu opset 1: import npu with version 1"
    return f"no release has a plug-in for {node.op_type}: {_ATC_HINT}, or replace the node"


def _functions(ctx: Context) -> Iterator[onnx.FunctionProto]:
    yield from ctx.view.model.functions


def _parameters(ctx: Context, scope: Scope) -> Iterator[Finding]:
    for node in ctx.nodes_of(scope):
        if node.op_type == "Constant":
            value = attribute(node.proto, "value")
            if isinstance(value, onnx.TensorProto):
                yield from constant(ctx, value, node.name)
        elif node.op_type in NO_PROTOTYPE and ctx.builtin(node):
            yield Finding(
                "prototype-not-open",
                "unknown",
                "parse",
                f"{node.op_type} has a plug-in, but its GE prototype is not in the open"
                " repositories: E10501 unless the installed CANN brings it",
                node.name,
                hint=f"replace {node.op_type} (Cast for CastLike; Identity for Dropout)",
                evidence="recorded",
                fixable=node.op_type == "Dropout",
            )
        elif ctx.plugin(node) is not None:
            yield from refusals(ctx, node)
        elif ctx.builtin(node):
            yield from builtin_plugins.parameters(ctx, node)
    if scope is ctx.view.root:
        for name, value in scope.inputs.items():
            yield from input_dtype(ctx, name, value)
    for name in _parser_order(scope):
        yield from constant(ctx, scope.initializers[name], name)


def _wiring(ctx: Context, scope: Scope) -> Iterator[Finding]:
    for node in ctx.nodes_of(scope):
        yield from _surplus(ctx, node)
    if scope.parent is not None and "" in scope.outer_values:
        yield from _branch_gap(ctx, scope)


def _surplus(ctx: Context, node: Node) -> Iterator[Finding]:
    plugin = ctx.plugin(node)
    if plugin is not None and plugin.contract is not None:
        return  # ours refuses them itself
    most = input_count(ctx, node)
    given = [i for i, name in enumerate(node.proto.input) if name]
    if most is None or not given or given[-1] < most:
        return
    message = f"{node.op_type} has {given[-1] + 1} inputs, its GE prototype {most}"
    if ctx.cann.checks_arity:
        yield refused(
            "surplus-inputs", message, "E19999", node.name, hint="drop the surplus inputs"
        )
        return
    schema = onnx_inputs(node)
    yield Finding(
        "surplus-inputs",
        "error" if schema is not None and given[-1] < schema else "warning",
        "meaning",
        f"{message}: CANN {ctx.cann.version} drops the rest without a word",
        node.name,
        hint="drop the surplus inputs",
        evidence="recorded",
    )


def onnx_inputs(node: Node) -> int | None:
    """How many inputs ONNX gives the op; None when it is none of its ops."""
    version = node.version or 0
    if node.domain != "ai.onnx" or not onnx.defs.has(node.op_type, version, ""):
        return None
    return int(onnx.defs.get_schema(node.op_type, version, "").max_input)


def input_count(ctx: Context, node: Node) -> int | None:
    """How many inputs the GE prototype has; None: dynamic or not known."""
    plugin = ctx.plugin(node)
    if plugin is not None:
        return plugin.inputs[1] if plugin.inputs else None
    counts = {arity(t) for t in ctx.registration(node).ge_types}
    found = counts.pop() if len(counts) == 1 else None
    return found[1] if found else None


def _branch_gap(ctx: Context, scope: Scope) -> Iterator[Finding]:
    culprit = next((n for n in ctx.nodes_of(scope) if "" in n.proto.input), None)
    if culprit is None:
        return  # the sibling branch has the gap and reports it
    yield refused(
        "gap-in-branch",
        f'{culprit.op_type} leaves an optional input out ("") inside a branch of an If: the'
        ' parser takes "" for a value of the outer graph and does not find it',
        "E19999",
        culprit.name,
        hint="move the node out of the If, or give all its inputs",
    )


def _outputs(scope: Scope) -> Iterator[Finding]:
    for value in scope.graph.output:
        name = value.name
        if not scope.known(name) and name not in scope.outer_values:
            where = f"branch {scope.path}" if scope.path else "graph"
            yield refused(
                "output-without-producer",
                f"output {name!r} of the {where} is written by no node",
                "E19999",
                name,
                hint="write it with an Identity, or remove it from the outputs",
                evidence="source",
            )
