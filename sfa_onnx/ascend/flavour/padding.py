"""Sizes the NPU's attention has no kernel for, padded with zeros: exact, and what it costs is said.

Heads: zero queries up to the next number there is (24 -> 32); their rows are sliced away behind.
Rope: 64 zero columns of queries and keys where a site has none. A score gains zeros, nothing else.
Packed rows get 128 zero bytes between latent and scales, so the cache inputs and outputs of the
graph become wider (528 -> 656 bytes); names and order stay.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from sfa_onnx.ascend.flavour.rows import widen_rows
from sfa_onnx.ascend.flavour.scope import Facts, Names, Scope, apply
from sfa_onnx.files.onnx_attrs import attribute, find_attribute
from sfa_onnx.operator.contract import OpContract, PackedRow
from sfa_onnx.operator.op import (
    KV_CACHE_PACK,
    NPU,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    find_op,
)

__all__ = ["pad_attention"]

Dims = tuple[int | None, ...]
_ITEM = {int(TensorProto.FLOAT): 4}


def pad_attention(
    model: ModelProto, facts: Facts, names: Names, opset: int, *, narrow: bool
) -> list[str]:
    """Give every attention node of the model sizes that the NPU has; returns notes.

    Args:
        model: the ATC flavour in the making, its nodes canonical.
        facts: of its values; kept true.
        names: of its values and nodes.
        opset: of its standard nodes.
        narrow: float32 queries and ropes become 16-bit ones later.

    Raises:
        ContractError: rows get wider, and an operator on their way looks into them.
    """
    notes: list[str] = []
    padding = _PaddedAttention(notes, narrow)
    apply(model, (padding,), facts, names, opset)
    if padding.rows:
        written, carriers = widen_rows(model, padding.rows, facts, names)
        notes += written
        apply(model, (_PaddedRows(padding, carriers),), facts, names, opset)
    return notes


@dataclass
class _PaddedAttention:
    """Rule: an attention node of other sizes -> zeros, the node, a slice."""

    notes: list[str]
    narrow: bool
    rows: dict[str, PackedRow] = field(default_factory=dict)  # rope-free keys -> their new layout
    kind: int = 0  # of the queries over such keys
    _zeros: dict[tuple[object, ...], str] = field(default_factory=dict)

    def __call__(self, scope: Scope, node: NodeProto) -> list[NodeProto] | None:
        """Rewrite one of our nodes; others are left alone."""
        op = find_op(node.domain, node.op_type)
        if op not in (SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT):
            return None
        op.check_inputs(node.input)
        dims = scope.dims(node.input[0])
        if not dims or len(dims) < 3:
            return None
        made, before = NodeProto(), list[NodeProto]()
        made.CopyFrom(node)
        rope = self._rope(scope, made, op, before)
        heads = dims[-2]
        more = _missing_heads(heads)
        if heads is not None and more:
            self._heads(scope, made, op, before, more)
        if not rope and not more:
            return None
        after = self._sliced(scope, made, heads) if heads is not None and more else []
        return [*before, made, *after]

    def _rope(self, scope: Scope, node: NodeProto, op: OpContract, before: list[NodeProto]) -> bool:
        if op is SPARSE_FLASH_ATTENTION:
            return self._float_rope(scope, node, before)
        nope, rope = scope.dims(node.input[0]), find_attribute(node, "rope_head_dim")
        if not nope or nope[-1] != NPU.nope or rope is None or rope.i:
            return False
        query, kind = node.input[0], scope.dtype(node.input[0])
        self.kind = kind
        tile = int(attribute(node, "tile_size", 128))
        item = 2 if self.narrow else _ITEM.get(kind, 2)
        self.rows[node.input[1]] = PackedRow(NPU.nope, NPU.rope, tile, item)
        node.input[0] = self._wider(scope, node, query, NPU.rope, -1, before)
        rope.i = NPU.rope
        self.notes.append(
            f"{node.name}: no rope, 64 zero columns of queries and keys stand for it (exact; 12 %"
            " more to multiply, rows of 656 bytes for 528)"
        )
        return True

    def _float_rope(self, scope: Scope, node: NodeProto, before: list[NodeProto]) -> bool:
        at = [SPARSE_FLASH_ATTENTION.input_index(n) for n in ("query_rope", "key_rope")]
        given = [node.input[i] if len(node.input) > i else "" for i in at]
        widths = [scope.dims(n) for n in given if n]
        if any(given) and not all(w and w[-1] == 0 for w in widths):
            return False
        while len(node.input) <= at[1]:
            node.input.append("")
        for index, source in zip(at, (node.input[0], node.input[1]), strict=True):
            node.input[index] = self.zeros_like(scope, node, source, NPU.rope, -1, before)
        mode = find_attribute(node, "attention_mode")
        if mode is not None:
            mode.i = 2
        self.notes.append(
            f"{node.name}: no rope, 64 zero columns of queries and keys stand for it (exact; 12 %"
            " more to multiply and a tensor of zeros a token)"
        )
        return True

    def _heads(
        self, scope: Scope, node: NodeProto, op: OpContract, before: list[NodeProto], more: int
    ) -> None:
        names = ["query"] + ["query_rope"] * (op is SPARSE_FLASH_ATTENTION)
        for name in names:
            index = op.input_index(name)
            if len(node.input) > index and node.input[index]:
                node.input[index] = self._wider(
                    scope, node, node.input[index], more, -2, before
                )  # fmt: skip

    def _sliced(self, scope: Scope, node: NodeProto, heads: int) -> list[NodeProto]:
        """The caller's heads of every output; softmax_max and softmax_sum have them last."""
        more = _missing_heads(heads)
        self.notes.append(
            f"{node.name}: {heads} query heads computed as {heads + more}, the further ones zero"
            f" and sliced away (exact; {more / heads:.0%} more to multiply)"
        )
        after, kind = [], scope.dtype(node.input[0])
        for i, name in enumerate(node.output):
            if not name:
                continue
            axis = -2 if i == 0 else -1
            bounds = [
                scope.constant([v], f"{node.name}/{what}")
                for what, v in (("first", 0), ("heads", heads), ("axis", axis))
            ]
            wide = scope.value(f"{node.name}/padded_{i}", kind if i == 0 else TensorProto.FLOAT)
            after.append(
                scope.node("Slice", [wide, *bounds], f"{node.name}/heads_{i}", outputs=[name])
            )
            node.output[i] = wide
        return after

    def _wider(
        self, scope: Scope, node: NodeProto, name: str, more: int, axis: int,
        before: list[NodeProto],
    ) -> str:  # fmt: skip
        """`name` with `more` zeros behind it along an axis."""
        zeros = self.zeros_like(scope, node, name, more, axis, before)
        dims, kind = scope.dims(name), scope.dtype(name)
        wide: Dims | None = None
        if dims:
            sizes = list(dims)
            size = sizes[axis]
            sizes[axis] = None if size is None else size + more
            wide = tuple(sizes)
        joined = scope.node(
            "Concat", [name, zeros], f"{node.name}/padded", dtype=kind, dims=wide, axis=axis
        )
        before.append(joined)
        return str(joined.output[0])

    def zeros_like(
        self, scope: Scope, node: NodeProto, name: str, size: int, axis: int,
        before: list[NodeProto], kind: int = 0,
    ) -> str:  # fmt: skip
        """Zeros of the dims of `name` but for one axis, of its type or `kind`; equal ones once."""
        dims, kind = scope.dims(name), kind or scope.dtype(name)
        fixed: list[Any] = list(dims) if dims else []
        if fixed:
            fixed[axis] = size
        known = bool(fixed) and None not in fixed
        key = (id(scope.graph), kind, *(fixed if known else (name, size, axis)))
        if key not in self._zeros:
            shape = (
                scope.constant(fixed, f"{node.name}/zeros_shape")
                if known
                else _shape_of(scope, node, name, size, axis, before)
            )
            zero = scope.constant(0, f"{node.name}/zero", np.float32)
            after = tuple(fixed) if fixed else None
            made = scope.node("Expand", [zero, shape], f"{node.name}/zeros",
                              dtype=TensorProto.FLOAT, dims=after)  # fmt: skip
            before.append(made)
            if kind not in (0, TensorProto.FLOAT):
                made = scope.node("Cast", [made.output[0]], f"{node.name}/zeros_cast", dtype=kind,
                                  dims=after, to=kind)  # fmt: skip
                before.append(made)
            self._zeros[key] = made.output[0]
        return self._zeros[key]


def _shape_of(
    scope: Scope, node: NodeProto, name: str, size: int, axis: int, before: list[NodeProto]
) -> str:
    """The shape of `name` with another size along its last axis or the one before."""
    base = f"{node.name}/zeros"
    shape = scope.node("Shape", [name], f"{base}_of", dtype=TensorProto.INT64)
    before.append(shape)
    parts = []
    for start, end in ((0, axis), (axis + 1, None)):
        if start == 0 and end is None:
            continue
        bounds = [scope.constant([start], f"{base}_start"), scope.constant(
            [np.iinfo(np.int64).max if end is None else end], f"{base}_end")]  # fmt: skip
        cut = scope.node("Slice", [shape.output[0], *bounds], f"{base}_dims",
                         dtype=TensorProto.INT64)  # fmt: skip
        before.append(cut)
        parts.append(cut.output[0])
    parts.insert(1, scope.constant([size], f"{base}_size"))
    joined = scope.node("Concat", parts, f"{base}_shape", dtype=TensorProto.INT64, axis=0)
    before.append(joined)
    return str(joined.output[0])


def _missing_heads(heads: int | None) -> int:
    """How many zero heads make a number that the kernel takes; 0 where none does, or none is."""
    if not heads or heads in NPU.heads or heads > max(NPU.heads):
        return 0
    return min(n for n in NPU.heads if n > heads) - heads


@dataclass
class _PaddedRows:
    """Rule: a KvCachePack without a rope whose rows get one -> the same with a rope of zeros."""

    padding: _PaddedAttention
    names: Container[str]  # values that carry such rows

    def __call__(self, scope: Scope, node: NodeProto) -> list[NodeProto] | None:
        """Rewrite one pack; other nodes are left alone."""
        if find_op(node.domain, node.op_type) is not KV_CACHE_PACK or (
            node.output[0] not in self.names
        ):
            return None
        made, before = NodeProto(), list[NodeProto]()
        made.CopyFrom(node)
        while len(made.input) < 2:
            made.input.append("")
        made.input[1] = self.padding.zeros_like(
            scope, node, node.input[0], NPU.rope, -1, before, self.padding.kind
        )
        return [*before, made]
