"""What CANN's ONNX parser accepts and gets wrong: no error, no warning, another graph.

All of it was seen on the real parser unless the finding's evidence says "source".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import onnx

from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.facts import dtype_name
from sfa_onnx.ascend.checks.finding import Finding, misread
from sfa_onnx.ascend.checks.tensors import tensors
from sfa_onnx.ascend.checks.wiring import loose_outputs, names_that_meet, open_inputs
from sfa_onnx.ascend.flavour.indices import is_non_negative
from sfa_onnx.ascend.flavour.norm_match import PLUGIN_EPSILON, same_epsilon
from sfa_onnx.ascend.flavour.norms import ADD_RMS_NORM, RMS_NORM
from sfa_onnx.ascend.flavour.reductions import form_of
from sfa_onnx.ascend.flavour.scatters import reads_scatter_reduction
from sfa_onnx.ascend.reductions import REDUCTIONS, Reading, reading, reads_later
from sfa_onnx.files.onnx_attrs import attribute

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


def meaning(ctx: Context) -> Iterator[Finding]:
    """Every silent change of meaning, nodes in graph order, then initializers and outputs."""
    for node in ctx.nodes():
        rule = _BY_OP.get(node.op_type)
        ours = node.domain != "ai.onnx" or ctx.plugin(node) is not None
        vendor = node.op_type in (RMS_NORM, ADD_RMS_NORM) and ctx.plugin(node) is None
        if rule is not None and (vendor or not ours) and ctx.well_formed(node):
            yield from rule(ctx, node)
        yield from open_inputs(ctx, node)
    for scope in ctx.view.scopes:
        yield from names_that_meet(ctx, scope)
        yield from tensors(ctx, scope)
    yield from loose_outputs(ctx)


def _constant(_: Context, node: Node) -> Iterator[Finding]:
    names = [a.name for a in node.proto.attribute]
    if isinstance(attribute(node.proto, "value"), onnx.TensorProto):
        return
    form = names[0] if names else "no attribute"
    yield misread(
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
        yield misread(
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
    yield misread(
        "scatternd-reduction",
        "error",
        f"ScatterND with reduction={reduction}: the reduction is ignored, updates overwrite{other}",
        node.name,
        f"use ScatterElements with that reduction; {_ATC}",
        fixable=True,
    )


def _scatter_elements(ctx: Context, node: Node) -> Iterator[Finding]:
    reduction = attribute(node.proto, "reduction", "none")
    if reduction in ("none", "") or reads_scatter_reduction(ctx.cann.version):
        return
    yield misread(
        "scatterelements-reduction",
        "error",
        f"ScatterElements with reduction={reduction}: CANN {ctx.cann.version} ignores the"
        " reduction, updates overwrite (9.1 and later read it)",
        node.name,
        f"compare positions and reduce, or use a later CANN; {_ATC}",
        fixable=True,
        evidence="source",
    )


def _mod(ctx: Context, node: Node) -> Iterator[Finding]:
    scope = ctx.rewrite_scope(node.scope)
    if all(is_non_negative(scope, name) for name in node.proto.input) or _either_rule(node):
        return
    yield misread(
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
    if added is not None and added.op_type == "Add" and list(added.input[1:]) == [divisor]:
        inner = node.scope.producer(added.input[0])
        return inner is not None and inner.op_type == "Mod" and list(inner.input[1:]) == [divisor]
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
    yield misread(
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
        yield misread(
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
        yield misread(
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
    yield misread(
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
        yield misread(
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
        yield misread(
            "attribute-ignored",
            "warning",
            f"{node.op_type}: the plug-in never reads {', '.join(names)}",
            node.name,
            "leave the attribute at its default, or replace the op",
            evidence="source",
        )


def _reduction(ctx: Context, node: Node) -> Iterator[Finding]:
    form = form_of(ctx.rewrite_scope(node.scope), node.proto)
    read = reading(node.op_type, node.version or 0, form, ctx.cann.version)
    if read in (Reading.RIGHT, Reading.REFUSED) or node.op_type in _REFUSED_REDUCTIONS:
        return
    where = {"attribute": "as an attribute", "input": "as an input", "none": "nowhere (all)"}[form]
    line = ctx.cann.version
    some = "by some releases" if read is Reading.VARIES else "silently"
    if reads_later(node.op_type, form, line):
        some = "silently up to 9.2.0-beta.1, the last release recorded (beta.2's sources read them)"
    yield misread(
        "reduce-axes",
        "warning" if read is Reading.VARIES else "error",
        f"{node.op_type} with its axes {where}, opset {node.version}: lost on CANN {line},"
        f" {some}; the GE node gets no axes and reduces nothing of what the file means",
        node.name,
        f"write means as sums, other axes where this release reads them; {_ATC}",
        fixable=True,
        evidence="recorded" if line != "9.0" and node.op_type in _RECORDED else "source",
    )


def _norm(_: Context, node: Node) -> Iterator[Finding]:
    epsilon = float(attribute(node.proto, "epsilon", PLUGIN_EPSILON))
    if not same_epsilon(epsilon):
        yield misread(
            "norm-epsilon",
            "error",
            f"{node.op_type} with epsilon = {epsilon:g}: the plug-in never reads it and writes 1e-6"
            " on every CANN line",
            node.name,
            f"scale x by sqrt(1e-6 / epsilon), in float32; {_ATC}",
            fixable=epsilon > 0,
            evidence="source",
        )


# Refused by every recorded run, which is said elsewhere.
_REFUSED_REDUCTIONS: Final = ("ReduceL1", "ReduceLogSum", "ReduceSumSquare")
_RECORDED: Final = ("ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceSum")
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
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "LogSoftmax": _softmax,
    "Shape": _shape,
    "Softmax": _softmax,
    "Unique": _ignored,
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys((RMS_NORM, ADD_RMS_NORM), _norm),
}
