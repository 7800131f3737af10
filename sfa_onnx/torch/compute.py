"""What the torch operators compute: one function for every name, own or a vendor's.

The C++ core does the attention and the packing; the NumPy reference does what the core lacks:
everything where no library was built, and the roundings of the vendors' own CPU checks ("golden").
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, Final

import torch

from sfa_onnx.errors import ContractError, MissingError
from sfa_onnx.operator import kv_cache, reference
from sfa_onnx.operator.contract import OpContract, PackedRow
from sfa_onnx.operator.op import (
    KV_CACHE_PACK,
    LIGHTNING_INDEXER,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
)
from sfa_onnx.runtime.core import DTYPES, PackParams, core
from sfa_onnx.torch.attend import attention_form, softmax_shape
from sfa_onnx.torch.checks import FLOATS, check_ints, check_traced, refuse
from sfa_onnx.torch.float8 import as_float_attention
from sfa_onnx.torch.form import Form, Result
from sfa_onnx.torch.index import indexer_form
from sfa_onnx.torch.index_float8 import select_float8
from sfa_onnx.torch.index_golden import select_golden
from sfa_onnx.torch.tensors import as_numpy, as_torch, check_usable, dense_pages

__all__ = ["ROUNDINGS", "compute", "compute_float8", "form_of", "shapes_of", "usable"]

ROUNDINGS: Final = ("exact", "npu", "golden")
# By name: comparing two contracts compares whole tables.
_ATTENTIONS: Final = frozenset({SPARSE_FLASH_ATTENTION.name, SPARSE_FLASH_ATTENTION_ANTIQUANT.name})
_FORMS: Final = dict.fromkeys(_ATTENTIONS, attention_form) | dict.fromkeys(
    (LIGHTNING_INDEXER.name, QUANT_LIGHTNING_INDEXER.name), indexer_form
)


def compute(
    op: OpContract,
    tensors: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    rounding: str,
) -> tuple[torch.Tensor, ...]:
    """All results of one call.

    Args:
        op: the operator.
        tensors: the given inputs by their names in the contract.
        attributes: every attribute of the contract.
        rounding: "exact", "npu" or "golden", see `sfa_onnx.operator.reference`; the last one is
            computed in NumPy, some fifty times as slowly.

    Raises:
        ContractError: the call breaks the contract.
    """
    tensors = usable(tensors, attributes, rounding)
    form = form_of(op, tensors, attributes, rounding)
    if form is not None:
        return form.run(tensors)
    if op is KV_CACHE_PACK:
        return (_pack(op, tensors, attributes),)
    if op is LIGHTNING_INDEXER and rounding == "golden":
        return select_golden(op, tensors, attributes)
    return _by_reference(op, tensors, attributes, rounding)


def form_of(
    op: OpContract,
    tensors: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    rounding: str,
) -> Form | None:
    """The call as the C++ core takes it; None: it has nothing for it, or was not built.

    Raises:
        ContractError: a shape, type or attribute breaks the contract.
    """
    if op is QUANT_LIGHTNING_INDEXER and rounding == "golden":
        rounding = "npu"  # the vendors' checks of it round as its kernel does
    if rounding == "golden" or not _core_is_built():
        return None
    if op is KV_CACHE_PACK:
        return _pack_form(op, tensors, attributes)
    make = _FORMS.get(op.name)
    return None if make is None else make(op, tensors, attributes, rounding)


def compute_float8(
    op: OpContract,
    tensors: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    types: tuple[int | None, ...],
    rounding: str,
) -> tuple[torch.Tensor, ...]:
    """As `compute`, over 8-bit floats: the packed attention and the quantised indexer.

    `types` are the two numbers of types that torch_npu's schema has; see `float8.py` and
    `index_float8.py`.
    """
    tensors = usable(tensors, attributes, rounding)
    if op is QUANT_LIGHTNING_INDEXER:
        return (select_float8(op, tensors, attributes, types, rounding),)
    given, own = as_float_attention(op, tensors, attributes, types, rounding)
    out, *softmax = compute(SPARSE_FLASH_ATTENTION, given, own, rounding)
    return (out.to(tensors["query"].dtype), *softmax)


def usable(
    tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, Any], rounding: str
) -> Mapping[str, torch.Tensor]:
    """The tensors as the kernels read them; pages that lie apart are copied together.

    Raises:
        ContractError: a tensor that cannot be read in place, or an unknown rounding.
    """
    if "PA_BSND" in (attributes.get("layout_kv"), attributes.get("layout_key")):
        tensors = dense_pages(tensors)
    check_usable(tensors)
    if rounding not in ROUNDINGS:
        raise ContractError(f"rounding: expected {', '.join(ROUNDINGS)}, got {rounding!r}")
    return tensors


def _core_is_built() -> bool:
    try:
        core()
    except MissingError:
        return False
    return True


def _by_reference(
    op: OpContract,
    tensors: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    rounding: str,
) -> tuple[torch.Tensor, ...]:
    check_ints(tensors)
    query = tensors["query"]
    if query.dtype not in (*FLOATS, torch.int8):  # the formulas also take float64
        raise refuse("query", "float32, float16 or bfloat16", query.dtype)
    arrays: list[Any] = [
        as_numpy(tensors[t.name]) if t.name in tensors else None for t in op.inputs
    ]
    mode: Any = rounding
    if op.name in _ATTENTIONS:
        count = 3 if attributes.get("return_softmax_lse") else 1
        if op is SPARSE_FLASH_ATTENTION:
            results = reference.sparse_flash_attention_lse(*arrays, mode=mode, **attributes)
        else:
            own = {n: v for n, v in attributes.items() if n != "return_softmax_lse"}
            results = reference.sparse_flash_attention_antiquant_lse(*arrays, mode=mode, **own)
        return tuple(map(as_torch, results[:count]))
    if op is LIGHTNING_INDEXER:
        indices, values = reference.lightning_indexer(*arrays, **attributes)
        return as_torch(indices), as_torch(values)
    if op is QUANT_LIGHTNING_INDEXER:
        return (as_torch(reference.quant_lightning_indexer(*arrays, mode=mode, **attributes)),)
    raise ContractError(f"no implementation of {op.name}")


def _pack(
    op: OpContract, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]
) -> torch.Tensor:
    """`sfa_onnx::KvCachePack` where the call has no form: a clip is known by its value only."""
    op.check_attributes(attributes)
    tile = attributes["tile_size"]
    clip = float(tensors["clip"]) if "clip" in tensors else None
    parts = {name: t for name, t in tensors.items() if name != "clip"}
    if not _core_is_built():
        rows = {name: as_numpy(t) for name, t in parts.items()}
        return as_torch(kv_cache.pack(**rows, clip=clip, tile_size=tile))
    return _rows_form(parts, clip, tile).run(parts)[0]


def _pack_form(
    op: OpContract, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]
) -> Form | None:
    if "clip" in tensors:
        return None
    op.check_attributes(attributes)
    return _rows_form(tensors, None, attributes["tile_size"])


def _rows_form(parts: Mapping[str, torch.Tensor], clip: float | None, tile: int) -> Form:
    """Rows to be packed: checked by the definition on no row at all, computed by the core."""
    _check_rows(parts, clip, tile)
    nope, rope = parts["nope"], parts.get("rope")
    width = 0 if rope is None else rope.shape[-1]
    row = PackedRow(nope.shape[-1], width, tile, 2 if rope is None else rope.element_size())
    params = PackParams(
        struct_size=ctypes.sizeof(PackParams),
        nope_dtype=DTYPES[str(nope.dtype).removeprefix("torch.")],
        rope_dtype=DTYPES["bfloat16" if rope is None else str(rope.dtype).removeprefix("torch.")],
        nope_dim=nope.shape[-1],
        rope_dim=width,
        tile_size=tile,
        clip=1.0 if clip is None else clip,
        rows=nope.shape[:-1].numel(),
    )
    read = tuple(n for n in ("nope", "rope", "scale") if n in parts and (n != "rope" or width))
    out = Result("out", (*nope.shape[:-1], row.bytes), torch.int8)
    return Form(PackParams, bytes(params), read, (out,))


def _check_rows(parts: Mapping[str, torch.Tensor], clip: float | None, tile: int) -> None:
    """Types and shapes, by packing no row at all."""
    lead = parts["nope"].shape[:-1]
    for name, part in parts.items():
        if part.shape[:-1] != lead:
            raise ContractError(
                f"{name}: expected leading dimensions {list(lead)} like nope,"
                f" got {list(part.shape)}"
            )
    empty = {n: as_numpy(p.new_empty((0, p.shape[-1]))) for n, p in parts.items()}
    kv_cache.pack(**empty, clip=clip, tile_size=tile)


def shapes_of(
    op: OpContract, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Results without values, for tracing and for tensors on "meta"; dims may be symbolic.

    Raises:
        ContractError: an attribute is illegal, or tensors with and without values are mixed.
    """
    check_traced(op, tensors, attributes)
    if op is KV_CACHE_PACK:
        nope, rope = tensors["nope"], tensors.get("rope")
        width, itemsize = (0, 2) if rope is None else (int(rope.shape[-1]), rope.element_size())
        row = PackedRow(int(nope.shape[-1]), width, attributes["tile_size"], itemsize)
        return (nope.new_empty((*nope.shape[:-1], row.bytes), dtype=torch.int8),)
    query = tensors["query"]
    if op.name in _ATTENTIONS:
        rope = 0 if op is SPARSE_FLASH_ATTENTION else attributes["rope_head_dim"]
        out = query.new_empty((*query.shape[:-1], query.shape[-1] - rope))
        if not attributes.get("return_softmax_lse"):
            return (out,)
        shape = softmax_shape(query)
        return (out, *(query.new_empty(shape, dtype=torch.float32) for _ in range(2)))
    shape = (*query.shape[:-2], 1, attributes["sparse_count"])
    indices = query.new_empty(shape, dtype=torch.int32)
    return (indices, query.new_empty(shape)) if op is LIGHTNING_INDEXER else (indices,)
