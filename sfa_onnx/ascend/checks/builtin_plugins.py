"""What CANN's own ONNX plug-ins refuse, op by op (they print EZ9999 with a sentence of their own).

Read in the plug-ins' sources; the cases of GatherND and Split were also recorded. A plug-in acts in
two steps: parameters of the node, then, for ops that become several GE nodes, expansion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.finding import Finding
from sfa_onnx.ascend.flavour.reductions import form_of
from sfa_onnx.ascend.reductions import reads_later
from sfa_onnx.files.onnx_attrs import attribute

__all__ = ["expansion", "parameters"]

_CODE: Final = "EZ9999"


def _refuse(node: Node, rule: str, message: str, hint: str, **kwargs: object) -> Finding:
    evidence = str(kwargs.pop("evidence", "source"))
    fixable, crash = bool(kwargs.pop("fixable", False)), bool(kwargs.pop("crash", False))
    return Finding(
        rule,
        "error",
        "parse",
        f"{node.op_type}: {message}",
        node.name,
        "" if crash else _CODE,
        hint,
        fixable,
        evidence,
        crash=crash,
    )


def parameters(ctx: Context, node: Node) -> Iterator[Finding]:
    """What the plug-in refuses when it reads the node."""
    rule = _PARAMETERS.get(node.op_type)
    if rule is not None:
        yield from rule(ctx, node)


def expansion(ctx: Context, node: Node) -> Iterator[Finding]:
    """What the plug-in refuses when it expands the node, after the whole graph was read."""
    rule = _EXPANSIONS.get(node.op_type)
    if rule is not None:
        yield from rule(ctx, node)


def _gather_nd(_: Context, node: Node) -> Iterator[Finding]:
    batch_dims = attribute(node.proto, "batch_dims", 0)
    if batch_dims:
        yield _refuse(
            node,
            "gathernd-batch-dims",
            f"batch_dims = {batch_dims}; the plug-in takes 0 only",
            "index over flattened batch dims, or use GatherElements",
            evidence="recorded",
            fixable=True,
        )


def _clip(_: Context, node: Node) -> Iterator[Finding]:
    bounds = [name for name in node.proto.input[1:3] if name]
    if (node.version or 0) >= 11 and not bounds:
        yield _refuse(
            node,
            "clip-without-bounds",
            "neither min nor max is given",
            "remove the node: it does nothing",
            fixable=True,
        )


def _is_inf(_: Context, node: Node) -> Iterator[Finding]:
    signs = [attribute(node.proto, f"detect_{s}", 1) for s in ("negative", "positive")]
    if signs != [1, 1]:
        message = "the plug-in detects both signs only (detect_negative = detect_positive = 1)"
        yield _refuse(node, "isinf-one-sign", message, "compare with +inf or -inf (Equal) instead")


def _arg_extreme(_: Context, node: Node) -> Iterator[Finding]:
    if attribute(node.proto, "select_last_index", 0):
        message = "select_last_index = 1 is not taken"
        yield _refuse(node, "arg-last-index", message, "reverse the axis and take the first index")


def _split(_: Context, node: Node) -> Iterator[Finding]:
    outputs = len(node.proto.output)
    declared = attribute(node.proto, "num_outputs", 0) or outputs
    sizes = attribute(node.proto, "split")
    if declared != outputs or (sizes is not None and len(sizes) not in (0, outputs)):
        message = f"{outputs} outputs, but num_outputs or split says otherwise"
        yield _refuse(node, "split-output-count", message, "make them agree")


def _einsum(_: Context, node: Node) -> Iterator[Finding]:
    if not attribute(node.proto, "equation", ""):
        yield _refuse(node, "einsum-equation", "no equation", "give the equation")


def _cast(_: Context, node: Node) -> Iterator[Finding]:
    if attribute(node.proto, "to") is None:
        yield _refuse(node, "cast-to", "no attribute to", "give the target dtype")


def _unsqueeze(_: Context, node: Node) -> Iterator[Finding]:
    if (node.version or 0) < 13 and not attribute(node.proto, "axes"):
        yield _refuse(node, "unsqueeze-axes", "no attribute axes", "give the axes")


def _concat_axis(_: Context, node: Node) -> Iterator[Finding]:
    if attribute(node.proto, "axis") is None:
        yield _refuse(node, "concat-axis", "no attribute axis", "give the axis")


def _transpose(_: Context, node: Node) -> Iterator[Finding]:
    if not attribute(node.proto, "perm"):
        yield _refuse(
            node,
            "transpose-without-perm",
            "no perm: ONNX then reverses all axes, the plug-in refuses",
            "write perm out",
            fixable=True,
        )


def _reduce(ctx: Context, node: Node) -> Iterator[Finding]:
    if len(node.proto.input) > 2:
        message = f"{len(node.proto.input)} inputs; the plug-in takes data and axes"
        yield _refuse(node, "reduce-inputs", message, "drop the surplus inputs")
    form = form_of(ctx.rewrite_scope(node.scope), node.proto)
    listed = len(node.proto.input) > 1 and bool(node.proto.input[1])
    if node.op_type != "ReduceSum" or listed or form not in ("none", "noop"):
        return
    later = reads_later(node.op_type, form, ctx.cann.version)
    newer = " (up to 9.2.0-beta.1; beta.2's takes it, by its sources)" if later else ""
    if form == "noop":
        yield _refuse(
            node,
            "reduce-no-axes",
            f"noop_with_empty_axes = 1 and no axes: the plug-in refuses{newer}",
            "remove the node: it does nothing",
            evidence="recorded",
            fixable=True,
        )
    elif not _sees_rank(ctx, node):
        yield _refuse(
            node,
            "reduce-no-axes",
            "no axes on a computed tensor: the plug-in asks for a rank that does not exist yet"
            + newer,
            "list the axes",
            evidence="recorded",
            fixable=True,
        )


def _sees_rank(ctx: Context, node: Node) -> bool:
    """Whether the plug-in finds a rank while parsing: graph inputs and constants have one."""
    name, root = node.proto.input[0], ctx.view.root
    if node.scope is not root or not (name in root.inputs or name in root.initializers):
        return False
    return bool(ctx.view.shape(node.scope, name))


def _trilu(_: Context, node: Node) -> Iterator[Finding]:
    if len(node.proto.input) > 2:
        message = "the plug-in takes one or two inputs"
        yield _refuse(node, "trilu-inputs", message, "drop the surplus inputs")


def _bit_shift(_: Context, node: Node) -> Iterator[Finding]:
    if attribute(node.proto, "direction", "") not in ("LEFT", "RIGHT"):
        yield _refuse(node, "bitshift-direction", "direction is LEFT or RIGHT", "give it")


def _split_expansion(ctx: Context, node: Node) -> Iterator[Finding]:
    """Equal parts asked for by num_outputs: the plug-in divides the dim it sees while parsing."""
    proto, scope = node.proto, node.scope
    sized = len(proto.input) > 1 or bool(attribute(proto, "split"))
    parts = attribute(proto, "num_outputs", 0)
    if sized or not parts or not proto.input:
        return
    hint = "give the sizes as the second input"
    visible = scope is ctx.view.root and proto.input[0] in scope.inputs
    if not visible:
        yield _refuse(
            node,
            "split-num-outputs",
            "num_outputs without sizes on a computed tensor: the plug-in reads a shape that does"
            " not exist yet, and the process has been seen to die (signal 11)",
            hint,
            evidence="recorded",
            fixable=True,
            crash=True,
        )
        return
    axis = attribute(proto, "axis", 0)
    shape = ctx.view.shape(scope, proto.input[0])
    if axis < 0 or shape is None or axis >= len(shape):
        message = f"num_outputs with axis {axis}: the plug-in indexes the shape with it as it is"
        yield _refuse(node, "split-num-outputs", message, hint, crash=True, fixable=True)
        return
    dim = shape[axis]
    if not isinstance(dim, int):
        if parts > 1:
            message = f"num_outputs = {parts} over a dynamic dim ({dim or '?'})"
            yield _refuse(node, "split-num-outputs", message, hint, evidence="recorded")
    elif dim % parts:
        message = f"num_outputs = {parts} does not divide {dim}"
        yield _refuse(node, "split-num-outputs", message, hint, evidence="recorded", fixable=True)


_REDUCTIONS: Final = ("Max", "Min", "Mean", "Sum", "Prod", "LogSum", "LogSumExp")
_NodeRule = Callable[[Context, Node], Iterator[Finding]]
_PARAMETERS: Final[dict[str, _NodeRule]] = {
    "ArgMax": _arg_extreme,
    "ArgMin": _arg_extreme,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat_axis,
    "Einsum": _einsum,
    "GatherND": _gather_nd,
    "IsInf": _is_inf,
    "Split": _split,
    "Unsqueeze": _unsqueeze,
}
_EXPANSIONS: Final[dict[str, _NodeRule]] = {
    "BitShift": _bit_shift,
    "Split": _split_expansion,
    "Transpose": _transpose,
    "Trilu": _trilu,
    **{f"Reduce{name}": _reduce for name in _REDUCTIONS},
}
