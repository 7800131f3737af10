"""Mechanical repairs of what `check` finds, as rules `(Scope, node) -> nodes or None`.

Repairs of what the parser misreads are those of the ATC flavour, taken from there. Here are the
others: ops that convert badly but say the same in another form. The last node of a rewrite keeps
the name and outputs of the node it replaces, as far as it has one output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from sfa_onnx.ascend.checks.einsum import MatMulForm, as_matmul
from sfa_onnx.ascend.checks.move_rewrites import narrow_int64, sorted_top_k, uniform_scatter
from sfa_onnx.ascend.flavour.norms import readable_norms
from sfa_onnx.ascend.flavour.reductions import readable_reductions
from sfa_onnx.ascend.flavour.repairs import (
    cast_like,
    constant_values,
    gather_nd,
    mod_sign,
    scatter_nd,
    shape_range,
    split_outputs,
)
from sfa_onnx.ascend.flavour.scope import Rule, Scope
from sfa_onnx.files.onnx_attrs import attribute, attributes, find_attribute

__all__ = ["NODE_RULES", "PARSER_REPAIRS", "constant_k"]

_T = TensorProto


def _copy(node: NodeProto) -> NodeProto:
    new = NodeProto()
    new.CopyFrom(node)
    return new


def topk_bf16(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """TopK over bf16: in float32, where order and values are exactly the same."""
    if node.op_type != "TopK" or scope.dtype(node.input[0]) != _T.BFLOAT16:
        return None
    dims = scope.dims(node.input[0])
    args = (f"{node.name}/float", _T.FLOAT)
    widen = scope.node("Cast", [node.input[0]], args[0], dtype=_T.FLOAT, dims=dims, to=_T.FLOAT)
    top = _copy(node)
    top.input[0] = widen.output[0]
    if not node.output[0]:
        return [widen, top]
    top.output[0] = scope.value(f"{node.name}/values", _T.FLOAT)
    narrow = scope.node(
        "Cast", [top.output[0]], f"{node.name}/bf16", outputs=[node.output[0]], to=_T.BFLOAT16
    )
    return [widen, top, narrow]


def topk_int64(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """TopK's indices through a Cast to int64: nothing to ONNX, the conversion GE's int32 needs."""
    if node.op_type != "TopK" or len(node.output) < 2 or not node.output[1]:
        return None
    top = _copy(node)
    top.output[1] = scope.value(f"{node.name}/indices", _T.INT64)
    cast = scope.node(
        "Cast", [top.output[1]], f"{node.name}/int64", outputs=[node.output[1]], to=_T.INT64
    )
    return [top, cast]


def constant_k(proven: dict[str, int]) -> Rule:
    """TopK whose k is proven (first output name -> k): k becomes a constant."""

    def rule(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
        key = next((o for o in node.output if o), "")
        if node.op_type != "TopK" or key not in proven:
            return None
        new = _copy(node)
        new.input[1] = scope.constant([proven[key]], f"{node.name}/k")
        return [new]

    return rule


def bool_scatter(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """ScatterElements over bool: in int8, which the operator's definition lists."""
    if node.op_type != "ScatterElements" or scope.dtype(node.input[0]) != _T.BOOL:
        return None
    dims = scope.dims(node.input[0])
    data = scope.node("Cast", [node.input[0]], f"{node.name}/data", dtype=_T.INT8, to=_T.INT8)
    updates = scope.node("Cast", [node.input[2]], f"{node.name}/new", dtype=_T.INT8, to=_T.INT8)
    kept = attributes(node)
    inputs = [data.output[0], node.input[1], updates.output[0]]
    scatter = scope.node(
        "ScatterElements", inputs, f"{node.name}/int8", dtype=_T.INT8, dims=dims, **kept
    )
    return [data, updates, scatter, scope.replace(node, "Cast", [scatter.output[0]], to=_T.BOOL)]


def bool_gather(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """GatherElements over bool: in int8, which AI Core's kernel takes."""
    if node.op_type != "GatherElements" or scope.dtype(node.input[0]) != _T.BOOL:
        return None
    wide = scope.node("Cast", [node.input[0]], f"{node.name}/data", dtype=_T.INT8, to=_T.INT8)
    inputs = [wide.output[0], node.input[1]]
    taken = scope.node(
        "GatherElements", inputs, f"{node.name}/int8", dtype=_T.INT8,
        dims=scope.dims(node.output[0]), **attributes(node),
    )  # fmt: skip
    return [wide, taken, scope.replace(node, "Cast", [taken.output[0]], to=_T.BOOL)]


def einsum(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """Einsum of two operands -> Transpose, Unsqueeze, MatMul, Squeeze, Transpose."""
    if node.op_type != "Einsum" or len(node.input) != 2:
        return None
    shapes = [scope.dims(name) for name in node.input]
    if None in shapes:
        return None
    equation = attribute(node, "equation", "")
    form = as_matmul(equation, [len(s or ()) for s in shapes])
    inner = _inner_size(form, shapes[0] or ()) if form else None
    if form is None or inner is None:
        return None
    return _MatMul(scope, node, form, inner).nodes()


def _inner_size(form: MatMulForm, dims: tuple[int | None, ...]) -> int | None:
    """Product of the summed dims; 0 where it need not be known, None where it is not."""
    if len(form.inner) < 2:
        return 0
    sizes = [dims[form.left_labels.index(c)] for c in form.inner]
    return None if None in sizes else int(np.prod([s for s in sizes if s is not None]))


class _MatMul:
    """Builds the nodes of one Einsum step by step."""

    def __init__(self, scope: Scope, node: NodeProto, form: MatMulForm, inner: int):
        self._scope, self._node, self._form, self._inner = scope, node, form, inner
        self._made: list[NodeProto] = []

    def nodes(self) -> list[NodeProto]:
        """All nodes, in order; the last one carries the Einsum's name and output."""
        form = self._form
        batch, left, right = len(form.batch), len(form.left), len(form.right)
        outer_left, outer_right = max(left - 1, 0), max(right - 1, 0)
        a = self._transpose(self._node.input[0], form.left_perm)
        a = self._merge(a, batch + left, last=True)
        rows = batch + outer_left
        gaps = list(range(rows, rows + outer_right))
        gaps += [rows + outer_right] if not left else []
        size = rows + outer_right + 2
        gaps += [size - 1] if not form.inner else []
        a = self._axes("Unsqueeze", a, gaps)
        b = self._transpose(self._node.input[1], form.right_perm)
        b = self._merge(b, batch + outer_right, last=not right)
        gaps = list(range(batch, batch + outer_left))
        gaps += [size - 2] if not form.inner else []
        gaps += [size - 1] if not right else []
        b = self._axes("Unsqueeze", b, gaps)
        product = self._add("MatMul", [a, b])
        ones = ([] if left else [size - 2]) + ([] if right else [size - 1])
        self._transpose(self._axes("Squeeze", product, ones), form.output_perm)
        return self._close()

    def _add(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        base = f"{self._node.name}/{op_type.lower()}"
        self._made.append(self._scope.node(op_type, inputs, base, **attributes))
        return str(self._made[-1].output[0])

    def _transpose(self, name: str, perm: list[int]) -> str:
        if perm == sorted(perm):
            return name
        return self._add("Transpose", [name], perm=perm)

    def _merge(self, name: str, before: int, last: bool) -> str:
        """Several summed axes, behind `before` others, become one."""
        if len(self._form.inner) < 2:
            return name
        target = [0] * before + [self._inner] + ([] if last else [-1])
        return self._add("Reshape", [name, self._scope.constant(target, "shape")])

    def _axes(self, op_type: str, name: str, axes: list[int]) -> str:
        if not axes:
            return name
        if self._scope.opset < 13:
            return self._add(op_type, [name], axes=axes)
        where = self._scope.constant(axes, f"{self._node.name}/axes")
        return self._add(op_type, [name, where])

    def _close(self) -> list[NodeProto]:
        last = self._made[-1]
        last.name, last.output[0] = self._node.name, self._node.output[0]
        return self._made


def written_perm(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """Transpose without perm: the reversal written out."""
    rank = scope.rank(node.input[0]) if node.op_type == "Transpose" else None
    if rank is None or find_attribute(node, "perm") is not None:
        return None
    if rank == 0:
        return [scope.replace(node, "Identity", node.input)]
    return [scope.replace(node, "Transpose", node.input, perm=list(range(rank))[::-1])]


def open_clip(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """Clip without bounds -> Identity."""
    if node.op_type != "Clip" or any(node.input[1:]) or scope.opset < 11:
        return None
    return [scope.replace(node, "Identity", node.input[:1])]


def gemm_alpha(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """Gemm without C: alpha as a Mul of its own."""
    alpha = float(attribute(node, "alpha", 1.0)) if node.op_type == "Gemm" else 1.0
    dtype = scope.dtype(node.input[0]) if alpha != 1.0 else 0
    if alpha == 1.0 or len(node.input) > 2 or not dtype:
        return None
    flags: dict[str, Any] = {n: int(attribute(node, n, 0)) for n in ("transA", "transB")}
    product = scope.node("Gemm", node.input, f"{node.name}/product", dtype=dtype, **flags)
    kind = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    factor = scope.constant(np.asarray(alpha, np.float32), f"{node.name}/alpha", kind.type)
    return [product, scope.replace(node, "Mul", [product.output[0], factor])]


def shape_fill(scope: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """ConstantOfShape: its value as raw_data, the only form read in every dtype."""
    value = attribute(node, "value") if node.op_type == "ConstantOfShape" else None
    if not isinstance(value, TensorProto) or value.raw_data:
        return None
    raw = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(value), value.name)
    return [scope.replace(node, "ConstantOfShape", node.input, value=raw)]


def dropped_dropout(_: Scope, node: NodeProto) -> Sequence[NodeProto] | None:
    """Dropout whose mask is not used, at inference -> Identity."""
    training = len(node.input) > 2 and bool(node.input[2])
    if node.op_type != "Dropout" or training or any(node.output[1:]):
        return None
    return [onnx.helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name)]


# What the built-in plug-ins refuse or misread beyond the repairs of the ATC flavour; it runs both.
PARSER_REPAIRS: Final[tuple[Rule, ...]] = (written_perm, open_clip, gemm_alpha, shape_fill)

# Rule id of a finding -> the rewrite that removes it.
NODE_RULES: Final[dict[str, Callable[[Scope, NodeProto], Sequence[NodeProto] | None]]] = {
    "clip-without-bounds": open_clip,
    "constant-form": constant_values,
    "constant-of-shape-value": shape_fill,
    "einsum": einsum,
    "gather-bool": bool_gather,
    "gathernd-batch-dims": gather_nd,
    "gathernd-negative": gather_nd,
    "gemm-alpha": gemm_alpha,
    "int64-fits": narrow_int64,
    "mod-sign": mod_sign,
    "norm-epsilon": readable_norms,
    "prototype-not-open": lambda s, n: cast_like(s, n) or dropped_dropout(s, n),
    "scatter-dtype": bool_scatter,
    "scatter-mask": uniform_scatter,
    "scatternd-reduction": scatter_nd,
    "shape-slice": shape_range,
    "split-num-outputs": split_outputs,
    "topk-bf16": topk_bf16,
    "topk-int32-indices": topk_int64,
    "topk-unsorted": sorted_top_k,
    "transpose-without-perm": written_perm,
    "unregistered-op": readable_reductions(None),
}
