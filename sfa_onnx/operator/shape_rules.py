"""Output types and shapes of our operators, symbolic dims included.

A dim is an int, a symbol (str) or None when nothing is known of it; a shape is a tuple of dims or
None when not even the rank is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from onnx import TensorProto

from sfa_onnx.errors import ContractError
from sfa_onnx.operator.contract import AttributeValue, OpContract, PackedRow
from sfa_onnx.operator.op import (
    KV_CACHE_PACK,
    KV_CACHE_WRITE,
    LIGHTNING_INDEXER,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
)

__all__ = ["Dim", "Shape", "infer_outputs"]

Dim = int | str | None
Shape = tuple[Dim, ...] | None
Types = Mapping[str, tuple[int, Shape]]  # input name -> (elem_type, shape); absent: left out
Results = list[tuple[int, Shape]]

_ITEMSIZE: Final[dict[int, int]] = {
    TensorProto.FLOAT: 4,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
}
_RANK: Final = {"BSND": 4, "TND": 3, "PA_BSND": 4}


def infer_outputs(
    op: OpContract, inputs: Types, attributes: Mapping[str, AttributeValue]
) -> Results:
    """(elem_type, shape) of every output that the attributes ask for.

    Args:
        op: the operator.
        inputs: input name -> (onnx elem_type, shape); absent optional inputs are left out.
        attributes: as on the node; defaults are the contract's.

    Raises:
        ContractError: attributes, types or known dims break the operator's contract.
    """
    op.check_attributes(attributes)
    attrs: dict[str, Any] = {a.name: a.default for a in op.attributes} | dict(attributes)
    for tensor in op.inputs:
        if tensor.name not in inputs:
            if not tensor.optional:
                raise ContractError(f"{op.name}: input {tensor.name} is missing")
        elif tensor.shape.startswith("reserved"):
            raise ContractError(f"{op.name}: input {tensor.name} is reserved and must be absent")
    if op is KV_CACHE_PACK:
        return _pack(op, inputs, attrs)
    if op is KV_CACHE_WRITE:
        return _write(op, inputs)
    _check_layouts(op, inputs, attrs)
    elem, query = inputs["query"]
    if op in (LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER):
        shape = None if query is None else (*query[:-2], 1, attrs["sparse_count"])
        indices: Results = [(TensorProto.INT32, shape)]
        return indices + ([(elem, shape)] if attrs.get("return_values") else [])
    if query is None:
        return [(elem, None)]
    _check_sinks(op, inputs, query)
    if op is SPARSE_FLASH_ATTENTION:
        _same(op, "key width", inputs["key"][1], query, -1)
        statistic = _statistic(query) if attrs["return_softmax_lse"] else (0,)
        return [(elem, query), *[(int(TensorProto.FLOAT), statistic)] * 2]
    return [(elem, (*query[:-1], _packed_width(elem, query, inputs["key"][1], attrs)))]


def _statistic(query: tuple[Dim, ...]) -> Shape:
    """softmax_max and softmax_sum of a query [B, S1, N1, C] or [T, N1, C]."""
    return (*query[:-3], 1, *query[-3:-1])


def _check_sinks(op: OpContract, inputs: Types, query: tuple[Dim, ...]) -> None:
    shape = inputs["sinks"][1] if "sinks" in inputs else None
    if shape is None:
        return
    if len(shape) != 1:
        raise ContractError(f"{op.name}: sinks: expected [N1], got {shape}")
    heads, given = query[-2], shape[0]
    if isinstance(heads, int) and isinstance(given, int) and heads != given:
        raise ContractError(f"{op.name}: sinks: expected one per query head, {heads}, got {given}")


def _packed_width(elem: int, query: tuple[Dim, ...], key: Shape, attrs: dict[str, Any]) -> Dim:
    """C, from the query's last dim and rope_head_dim; checks the packed row where known."""
    width = query[-1]
    if not isinstance(width, int):
        return None
    rope = int(attrs["rope_head_dim"])
    if key is not None and isinstance(key[-1], int):
        row = PackedRow.of(key[-1], width, rope, int(attrs["tile_size"]))
        if row.rope and row.itemsize != _ITEMSIZE.get(elem, row.itemsize):
            raise ContractError(
                f"key rows of {key[-1]} bytes hold {row.itemsize}-byte rope, but the query's type"
                f" has {_ITEMSIZE[elem]} bytes: pack the cache in the query's type"
            )
    if width - rope <= 0:
        raise ContractError(f"rope_head_dim {rope} leaves nothing of a query {width} wide")
    return width - rope


def _check_layouts(op: OpContract, inputs: Types, attrs: dict[str, Any]) -> None:
    """Ranks against layouts, and which of the optional inputs a layout needs or forbids."""
    query = attrs["layout_query"]
    key = attrs.get("layout_kv") or attrs["layout_key"]
    if key not in ("PA_BSND", query):
        raise ContractError(
            f"{op.name}: layout {key} of the key: expected PA_BSND or the query's {query}"
        )
    for name, layout in (("query", query), ("key", key), ("sparse_indices", query)):
        shape = inputs[name][1] if name in inputs else None
        if shape is not None and len(shape) != _RANK[layout]:
            raise ContractError(
                f"{op.name}: {name} (layout {layout}): expected rank {_RANK[layout]}, got {shape}"
            )
    if ("block_table" in inputs) != (key == "PA_BSND"):
        verb = "needs" if key == "PA_BSND" else "forbids"
        raise ContractError(f"{op.name}: layout {key} of the key {verb} block_table")
    if query == "TND" and "actual_seq_lengths_query" not in inputs:
        raise ContractError(f"{op.name}: layout_query TND needs actual_seq_lengths_query")
    lengths_key = "actual_seq_lengths_kv" if "layout_kv" in attrs else "actual_seq_lengths_key"
    if key != "BSND" and lengths_key not in inputs:
        raise ContractError(f"{op.name}: layout {key} of the key needs {lengths_key}")
    if "sparse_indices" in inputs:
        for axis in range(_RANK[query] - 2):
            _same(op, "sparse_indices", inputs["sparse_indices"][1], inputs["query"][1], axis)


def _same(op: OpContract, what: str, got: Shape, expected: Shape, axis: int) -> None:
    if got is None or expected is None:
        return
    mine, theirs = got[axis], expected[axis]
    if isinstance(mine, int) and isinstance(theirs, int) and mine != theirs:
        raise ContractError(
            f"{op.name}: {what}, axis {axis}: expected the query's {theirs}, got {mine}"
        )


def _write(op: OpContract, inputs: Types) -> Results:
    (elem, pages), (_, rows), (_, slots) = (inputs[t.name] for t in op.inputs)
    for name, shape, rank in (("pages", pages, 4), ("rows", rows, 3), ("slot_mapping", slots, 1)):
        if shape is not None and len(shape) != rank:
            raise ContractError(f"{op.name}: {name}: expected rank {rank}, got {shape}")
    widths = {s[-1] for s in (pages, rows) if s is not None and isinstance(s[-1], int)}
    if len(widths) > 1:
        raise ContractError(f"{op.name}: rows: expected the pages' width, got {sorted(widths)}")
    return [(elem, pages)]


def _pack(op: OpContract, inputs: Types, attrs: dict[str, Any]) -> Results:
    elem, nope = inputs["nope"]
    if (elem == TensorProto.INT8) != ("scale" in inputs):
        raise ContractError(f"{op.name}: scale is given exactly when nope is int8")
    if nope is None or not isinstance(nope[-1], int):
        return [(TensorProto.INT8, None if nope is None else (*nope[:-1], None))]
    rope_elem, rope = inputs.get("rope", (TensorProto.FLOAT16, (0,)))
    rope_width = None if rope is None else rope[-1]
    if not isinstance(rope_width, int):
        return [(TensorProto.INT8, (*nope[:-1], None))]
    row = PackedRow(nope[-1], rope_width, int(attrs["tile_size"]), _ITEMSIZE.get(rope_elem, 2))
    return [(TensorProto.INT8, (*nope[:-1], row.bytes))]
