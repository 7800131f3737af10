"""What CANN's ONNX parser accepts and gets wrong: no error, no warning, another graph.

All of it was seen on the real parser unless the finding's evidence says "source".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Final

import onnx

from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.facts import arity, dtype_name
from sfa_onnx.ascend.checks.finding import Finding, Severity
from sfa_onnx.ascend.checks.tensors import tensors
from sfa_onnx.ascend.checks.view import Scope, contract_of
from sfa_onnx.ascend.flavour_indices import is_non_negative
from sfa_onnx.onnx_attrs import attribute

__all__ = ["meaning"]

_T = onnx.TensorProto
_ATC = "`sfa-onnx atc` rewrites this"
# Attributes of standard ops that their plug-ins do not read (others are in rules of their own).
_UNREAD: Final = {
    "GRU": ("activations", "activation_alpha", "activation_beta", "clip", "layout"),
    "LSTM": ("activations", "activation_alpha", "activation_beta", "clip", "layout"),
    "Resize": ("cubic_coeff_a", "exclude_outside", "extrapolation_value", "nearest_mode"),
    "Unique": ("axis",),
}


def _found(
    rule: str,
    severity: Severity,
    message: str,
    node: str,
    hint: str = "",
    fixable: bool = False,
    evidence: str = "recorded",
) -> Finding:
    return Finding(rule, severity, "meaning", message, node, "", hint, fixable, evidence)


def meaning(ctx: Context) -> Iterator[Finding]:
    """Every silent change of meaning, nodes in graph order, then initializers and outputs."""
    for node in ctx.nodes():
        rule = _BY_OP.get(node.op_type)
        ours = node.domain != "ai.onnx" or ctx.plugin(node) is not None
        if rule is not None and not ours and ctx.well_formed(node):
            yield from rule(ctx, node)
        yield from _inputs(ctx, node)
    for scope in ctx.view.scopes:
        yield from _empty_output_trap(ctx, scope)
        yield from _two_producers(ctx, scope)
        yield from tensors(ctx, scope)
    yield from _loose_outputs(ctx)


def _constant(_: Context, node: Node) -> Iterator[Finding]:
    names = [a.name for a in node.proto.attribute]
    if isinstance(attribute(node.proto, "value"), onnx.TensorProto):
        return
    form = names[0] if names else "no attribute"
    yield _found(
        "constant-form",
        "error",
        f"Constant given as {form}: it becomes an empty float constant, the value is lost",
        node.name,
        f"write it as `value` (a tensor); {_ATC}",
        fixable=form.startswith(("value_float", "value_int", "value_string")),
    )


def _shape(_: Context, node: Node) -> Iterator[Finding]:
    start, end = attribute(node.proto, "start", 0), attribute(node.proto, "end")
    if start or end is not None:
        yield _found(
            "shape-slice",
            "error",
            f"Shape with start={start}, end={end}: both are ignored, the whole shape comes out",
            node.name,
            f"take the whole Shape and Slice it; {_ATC}",
            fixable=True,
        )


def _scatter_nd(ctx: Context, node: Node) -> Iterator[Finding]:
    reduction = attribute(node.proto, "reduction", "none")
    if reduction in ("none", ""):
        return
    other = (
        " (a second built-in plug-in of 9.2 honours add, max and min; which one is loaded first"
        " decides)"
        if "PartitionedCall" in ctx.registration(node).ge_types
        else ""
    )
    yield _found(
        "scatternd-reduction",
        "error",
        f"ScatterND with reduction={reduction}: the reduction is ignored, updates overwrite{other}",
        node.name,
        f"use ScatterElements with that reduction; {_ATC}",
        fixable=True,
    )


def _mod(ctx: Context, node: Node) -> Iterator[Finding]:
    scope = ctx.rewrite_scope(node.scope)
    if all(is_non_negative(scope, name) for name in node.proto.input) or _either_rule(node):
        return
    yield _found(
        "mod-sign",
        "warning",
        f"Mod with fmod={attribute(node.proto, 'fmod', 0)}: fmod 0 and 1 give the same GE node, so"
        " the sign of the result is not what ONNX says for negative operands",
        node.name,
        f"harmless when no operand is ever negative; {_ATC}",
        fixable=True,
    )


def _either_rule(node: Node) -> bool:
    """Whether the node is part of Mod(Mod(x, y) + y, y), which is right under either sign rule."""
    if len(node.proto.input) != 2:
        return False
    value, divisor = node.proto.input
    added = node.scope.producer(value)
    if added is not None and added.op_type == "Add" and added.input[1] == divisor:
        inner = node.scope.producer(added.input[0])
        return inner is not None and inner.op_type == "Mod" and inner.input[1] == divisor
    readers = node.scope.readers(node.proto.output[0])
    return bool(readers) and all(
        r.op_type == "Add" and list(r.input) == [node.proto.output[0], divisor] for r in readers
    )


def _gather_nd(ctx: Context, node: Node) -> Iterator[Finding]:
    indices = node.proto.input[1] if len(node.proto.input) > 1 else ""
    if not indices or is_non_negative(ctx.rewrite_scope(node.scope), indices):
        return
    value = ctx.view.constant(node.scope, indices)
    shown = value is not None
    yield _found(
        "gathernd-negative",
        "error" if shown else "unknown",
        "GatherND with negative indices: GE's GatherNd does not wrap them"
        if shown
        else "GatherND: GE's GatherNd does not wrap negative indices, and nothing here shows that"
        " these are never negative",
        node.name,
        f"add the dim to negative indices; {_ATC}",
        fixable=True,
    )


def _softmax(_: Context, node: Node) -> Iterator[Finding]:
    if (node.version or 13) < 13:
        yield _found(
            "softmax-coercion",
            "warning",
            f"{node.op_type} before opset 13 flattens to 2-D; the parser leaves that to a later"
            " pass, which was not observed",
            node.name,
            "convert the model to opset 13 or later",
        )


def _gemm(_: Context, node: Node) -> Iterator[Finding]:
    alpha = attribute(node.proto, "alpha", 1.0)
    if alpha != 1.0 and len(node.proto.input) < 3:
        yield _found(
            "gemm-alpha",
            "error",
            f"Gemm without C drops alpha = {alpha:g}",
            node.name,
            "multiply by alpha in a Mul of its own",
            fixable=True,
            evidence="source",
        )


def _constant_of_shape(_: Context, node: Node) -> Iterator[Finding]:
    value = attribute(node.proto, "value")
    readable = (_T.INT64, _T.INT32, _T.FLOAT, _T.DOUBLE)
    if not isinstance(value, onnx.TensorProto) or value.raw_data or value.data_type in readable:
        return
    yield _found(
        "constant-of-shape-value",
        "error",
        f"ConstantOfShape: a {dtype_name(value.data_type)} value is read from raw_data only; this"
        " one lies in a typed field and is lost",
        node.name,
        "store the value as raw_data",
        fixable=True,
    )


def _cast(_: Context, node: Node) -> Iterator[Finding]:
    target = attribute(node.proto, "to", 0)
    if target > _T.BFLOAT16:
        yield _found(
            "cast-dtype",
            "warning",
            f"Cast to {dtype_name(target)}: the plug-in maps it to an undefined dtype",
            node.name,
            "cast to a dtype the plug-in knows",
            evidence="source",
        )


def _ignored(_: Context, node: Node) -> Iterator[Finding]:
    names = [a.name for a in node.proto.attribute if a.name in _UNREAD[node.op_type]]
    if names:
        yield _found(
            "attribute-ignored",
            "warning",
            f"{node.op_type}: the plug-in never reads {', '.join(names)}",
            node.name,
            "leave the attribute at its default, or replace the op",
            evidence="source",
        )


def _inputs(ctx: Context, node: Node) -> Iterator[Finding]:
    """Inputs that stay open: written by nobody, or required and not given."""
    sparse = {s.values.name for s in node.scope.graph.sparse_initializer}
    for name in node.proto.input:
        if name in sparse:
            yield _found(
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
            yield _found("missing-producer", "error", message, node.name, "connect or remove it")
        elif name and not _reaches(node.scope, name):
            yield _found(
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
        yield _found(
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
        yield _found(
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
        yield _found("empty-output", "info", message, culprit.name, hint, fixable=True)


def _two_producers(ctx: Context, scope: Scope) -> Iterator[Finding]:
    seen = set(scope.inputs) | set(scope.initializers)
    for node in ctx.nodes_of(scope):
        for name in node.proto.output:
            if name and name in seen:
                message = f"value {name!r} is written twice: the parser wires both to each reader"
                hint = "give each output a name of its own"
                yield _found("two-producers", "error", message, node.name, hint, evidence="source")
            seen.add(name)


def _loose_outputs(ctx: Context) -> Iterator[Finding]:
    """Graph outputs that no graph input reaches: the parsed graph starts from the inputs."""
    root = ctx.view.root
    reached = _reached(root)
    for value in root.graph.output:
        constant = value.name in root.initializers
        if value.name not in reached and root.known(value.name):
            keeps = constant and ctx.cann.keeps_loose_constants
            yield _found(
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


_BY_OP: Final[dict[str, Callable[[Context, Node], Iterator[Finding]]]] = {
    "Cast": _cast,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "GatherND": _gather_nd,
    "GRU": _ignored,
    "Gemm": _gemm,
    "LSTM": _ignored,
    "Mod": _mod,
    "Resize": _ignored,
    "ScatterND": _scatter_nd,
    "LogSoftmax": _softmax,
    "Shape": _shape,
    "Softmax": _softmax,
    "Unique": _ignored,
}
