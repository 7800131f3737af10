"""Ops of exported DSA models that convert badly, slowly, or into something else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import onnx

from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.einsum import MatMulForm, as_matmul
from sfa_onnx.ascend.checks.facts import dtype_name
from sfa_onnx.ascend.checks.finding import Finding, Severity
from sfa_onnx.ascend.checks.fold import provable
from sfa_onnx.ascend.checks.tensors import nbytes
from sfa_onnx.ascend.checks.view import Dims, Scope
from sfa_onnx.files.onnx_attrs import attribute

__all__ = ["INDEX_VIEWS", "einsum_form", "graph_ops"]

_T = onnx.TensorProto
_MB: Final = 1e6
# Ops that hand indices on without computing with them.
INDEX_VIEWS: Final = frozenset(
    ("Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity", "Expand", "Slice", "Flatten")
)
# (op, position) pairs that take int32 and int64 indices alike.
_EITHER: Final = {
    ("Cast", 0),
    ("Gather", 1),
    ("GatherElements", 1),
    ("GatherND", 1),
    ("OneHot", 0),
    ("ScatterElements", 1),
    ("ScatterND", 1),
}
_DATA_DEPENDENT: Final = ("NonZero", "Unique", "Compress", "NonMaxSuppression", "StringSplit")
_INT64_OPS: Final = frozenset(
    ("Add", "Sub", "Mul", "Div", "Mod", "Equal", "Less", "LessOrEqual", "Greater", "Where", "Min")
) | {"GreaterOrEqual", "Max", "CumSum", "ReduceSum", "GatherElements", "ScatterElements", "Concat"}
_HOT: Final = 1 << 16  # elements
_SEARCH: Final = 256  # values looked at upstream of an index
_NOT_SCATTERED: Final = frozenset((_T.BOOL, _T.DOUBLE, _T.UINT16, _T.UINT32, _T.UINT64))


def _found(
    rule: str,
    severity: Severity,
    message: str,
    nodes: Sequence[Node],
    hint: str = "",
    fixable: bool = False,
    evidence: str = "declared",
) -> Finding:
    names = tuple(n.name for n in nodes)
    return Finding(rule, severity, "graph", message, names[0], "", hint, fixable, evidence, names)


def graph_ops(ctx: Context) -> Iterator[Finding]:
    """Everything about single ops, one finding per op and reason."""
    for node in ctx.nodes():
        if not ctx.standard(node) or not ctx.well_formed(node):
            continue
        if node.op_type == "TopK":
            yield from _topk(ctx, node)
        elif node.op_type in ("ScatterElements", "ScatterND"):
            yield from _scatter(ctx, node)
        elif node.op_type == "Einsum":
            yield from _einsum(ctx, node)
    yield from _data_dependent(ctx)
    yield from _experts(ctx)
    yield from _int64(ctx)


def _topk(ctx: Context, node: Node) -> Iterator[Finding]:
    proto, scope = node.proto, node.scope
    if ctx.view.dtype(scope, proto.input[0]) == _T.BFLOAT16 and not attribute(proto, "sorted", 1):
        yield _found(
            "topk-bf16",
            "warning",
            "TopK over bfloat16 with sorted = 0: it stays on AI CPU, which does not list bfloat16",
            [node],
            "Cast to float32 in front: the order and the values stay exactly the same",
            fixable=True,
        )
    reader = _int64_reader(ctx, scope, proto.output[1]) if len(proto.output) > 1 else None
    if reader:
        yield _found(
            "topk-int32-indices",
            "warning",
            f"GE's TopK writes int32 indices where ONNX says int64; {reader} goes on with int64",
            [node],
            "Cast the indices (to int64) right behind TopK: nothing to ONNX, a conversion to GE",
            fixable=True,
        )
    yield from _topk_k(ctx, node)


def _topk_k(ctx: Context, node: Node) -> Iterator[Finding]:
    if len(node.proto.input) < 2:
        return
    name = node.proto.input[1]
    if ctx.view.constant(node.scope, name) is not None:
        return
    at = ctx.view.resolve_scope(node.scope, name)
    if at is not None and name in at.initializers:
        return
    value = provable(ctx.view, node.scope, name)
    known = f"; shapes prove it is {int(value.reshape(-1)[0])}" if value is not None else ""
    yield _found(
        "topk-computed-k",
        "warning",
        f"TopK's k is computed at run time: the output shape is dynamic, and GE wants it to be"
        f" constant for a static .om{known}",
        [node],
        "make k a constant" if value is not None else "export with a fixed k (and padded keys)",
        fixable=value is not None,
    )


def _int64_reader(ctx: Context, scope: Scope, name: str, depth: int = 8) -> str:
    """Who computes with the indices as int64; "" when nobody does."""
    if name in scope.outputs:
        return f"graph output {name!r}"
    for reader in scope.readers(name):
        position = list(reader.input).index(name)
        if (reader.op_type, position) in _EITHER:
            continue
        if reader.op_type in INDEX_VIEWS and position == 0:
            for out in reader.output if depth else ():
                found = _int64_reader(ctx, scope, out, depth - 1)
                if found:
                    return found
        else:
            return f"{reader.op_type} {reader.name or reader.output[0]}"
    return ""


def _scatter(ctx: Context, node: Node) -> Iterator[Finding]:
    data = node.proto.input[0]
    elem = ctx.view.dtype(node.scope, data)
    if elem in _NOT_SCATTERED:
        yield _found(
            "scatter-dtype",
            "unknown" if node.op_type == "ScatterND" else "warning",
            f"{node.op_type} over {dtype_name(elem)}: no open definition lists that dtype",
            [node],
            "Cast to int8 around it" if elem == _T.BOOL else "Cast around it",
            fixable=elem == _T.BOOL and node.op_type == "ScatterElements",
        )
    scope = node.scope
    if node.op_type == "ScatterND" and data in scope.inputs:
        size = _bytes(ctx, scope, data)
        cost = f" ({size / _MB:.1f} MB a call)" if size else ""
        yield _found(
            "scatternd-copies-cache",
            "warning",
            f"ScatterND writes rows of graph input {data!r}, but becomes a functional"
            f" TensorScatterUpdate: the whole cache is copied{cost}, by an AI CPU kernel without"
            " bfloat16 unless TensorScatterUpdateFusionPass (documented from 9.0 for A2 and 950,"
            " not for bool and int32) makes it TensorMove and ScatterNdUpdate",
            [node],
            "write pages by sfa_onnx::KvCacheWrite, which becomes ScatterNdUpdate in place"
            " (`kv-cache --to paged-int8` does), or hand over only the new rows",
        )


def _bytes(ctx: Context, scope: Scope, name: str) -> int:
    dims, elem = ctx.view.shape(scope, name), ctx.view.dtype(scope, name)
    numbers = [d for d in dims or (None,) if isinstance(d, int)]
    if dims is None or len(numbers) != len(dims):
        return 0
    return nbytes(onnx.TensorProto(data_type=elem, dims=numbers)) or 0


def _einsum(ctx: Context, node: Node) -> Iterator[Finding]:
    equation = str(attribute(node.proto, "equation", ""))
    fixable = einsum_form(equation, [ctx.view.shape(node.scope, n) for n in node.proto.input])
    yield _found(
        "einsum",
        "unknown",
        f"Einsum {equation!r} becomes GE's Einsum, which no engine lists: EinsumPass (documented"
        " for A2 and 950, some equations) has to rewrite it",
        [node],
        "write it as Transpose, Reshape and MatMul",
        fixable=fixable is not None,
    )


def einsum_form(equation: str, shapes: Sequence[Dims | None]) -> MatMulForm | None:
    """The MatMul form of an Einsum; summed labels are merged only if their dims are known."""
    if any(s is None for s in shapes):
        return None
    form = as_matmul(equation, [len(s or ()) for s in shapes])
    if form is None or len(form.inner) < 2:
        return form
    dims = dict(zip(form.left_labels, shapes[0] or (), strict=True))
    return form if all(isinstance(dims[c], int) for c in form.inner) else None


def _data_dependent(ctx: Context) -> Iterator[Finding]:
    for op_type in _DATA_DEPENDENT:
        nodes = [n for n in ctx.nodes() if n.op_type == op_type and ctx.standard(n)]
        if nodes:
            yield _found(
                "data-dependent-shape",
                "warning",
                f"{op_type} ({len(nodes)} nodes) has an output whose size depends on values: the"
                " .om becomes dynamic and is no longer sunk to the device as a whole",
                nodes,
                "replace it with masks (Where) of static size",
            )


def _experts(ctx: Context) -> Iterator[Finding]:
    """Gathers of whole weight matrices by a run-time choice: mixture-of-experts as exported."""
    nodes, total, unknown = [], 0, 0
    for node in ctx.nodes():
        if node.op_type not in ("Gather", "GatherND", "GatherElements"):
            continue
        if not ctx.well_formed(node) or len(node.proto.input) < 2:
            continue  # an opset without this operator has no counts
        weight = _weight(ctx, node)
        if weight is None or not _chosen_at_run_time(ctx, node, weight):
            continue
        nodes.append(node)
        size = _bytes(ctx, node.scope, node.proto.output[0])
        total, unknown = total + size, unknown + (size == 0)
    if not nodes:
        return
    cost = f"{total / _MB:.1f} MB a call" if total else "an amount that depends on the inputs"
    cost += f" (and {unknown} of unknown size)" if total and unknown else ""
    yield _found(
        "expert-gather",
        "warning",
        f"{len(nodes)} gathers copy whole expert weights chosen at run time: {cost}, written to"
        " memory and read again",
        nodes,
        "leave the experts to the vendor's MoE operators (MoeInitRouting, GroupedMatmul,"
        " MoeFinalizeRouting); this tool does not fuse them",
        evidence="model",
    )


def _weight(ctx: Context, node: Node) -> onnx.TensorProto | None:
    name = node.proto.input[0]
    source = ctx.view.origin(node.scope, name, frozenset(("Cast", "Identity", "Transpose")))
    if source is not None:
        return None
    for _ in range(8):  # the names on the way to an initializer
        at = ctx.view.resolve_scope(node.scope, name)
        if at is None:
            return None
        if name in at.initializers:
            tensor = at.initializers[name]
            return tensor if len(tensor.dims) >= 3 else None
        producer = at.producer(name)
        if producer is None or not producer.input:
            return None
        name = producer.input[0]
    return None


def _chosen_at_run_time(ctx: Context, node: Node, weight: onnx.TensorProto) -> bool:
    """Whole matrices picked by a router; rotary tables and embeddings pick rows."""
    axis = int(attribute(node.proto, "axis", 0)) if node.op_type == "Gather" else 0
    rest = [d for i, d in enumerate(weight.dims) if i != axis % len(weight.dims)]
    if (
        sum(d > 1 for d in rest) < 2
        or provable(ctx.view, node.scope, node.proto.input[1]) is not None
    ):
        return False
    return math.prod(rest) >= _HOT or _routed(node.scope, node.proto.input[1])


def _routed(scope: Scope, name: str) -> bool:
    """Whether a top-k or argmax decides the value."""
    queue, seen = [name], {name}
    while queue and len(seen) < _SEARCH:
        producer = scope.producer(queue.pop())
        if producer is None:
            continue
        if producer.op_type in ("TopK", "ArgMax"):
            return True
        fresh = [i for i in producer.input if i and i not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return False


def _int64(ctx: Context) -> Iterator[Finding]:
    nodes = []
    for node in ctx.nodes():
        if node.op_type not in _INT64_OPS:
            continue
        big = any(
            name
            and ctx.view.dtype(node.scope, name) == _T.INT64
            and math.prod(d for d in ctx.view.shape(node.scope, name) or (0,) if isinstance(d, int))
            >= _HOT
            for name in node.proto.input
        )
        if big:
            nodes.append(node)
    if nodes:
        kinds = ", ".join(sorted({n.op_type for n in nodes}))
        yield _found(
            "int64-hot",
            "warning",
            f"{len(nodes)} nodes compute on int64 tensors of {_HOT} elements or more ({kinds}):"
            " twice the traffic of int32, and division, modulo and running sums go to AI CPU",
            nodes,
            "Cast indices to int32 early",
            evidence="model",
        )
