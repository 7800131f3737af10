"""`torch.library` operators with CANN's argument lists: eager on CPU, traceable by torch.export.

The schemas are written from the contract tables: required inputs and attributes first, in order,
the optional ones by keyword. That is the argument list of `torch_npu.npu_*`, so a model changes
from one to the other by the namespace alone. Eager calls go through the NumPy reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from sfa_onnx.operator import kv_cache, reference
from sfa_onnx.operator.contract import Attribute, OpContract, PackedRow
from sfa_onnx.operator.op import (
    KV_CACHE_PACK,
    LIGHTNING_INDEXER,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
)

__all__ = ["OPERATORS", "arguments_of", "schema_of"]

NAMESPACE: Final = "sfa_onnx"
# torch name -> contract
OPERATORS: Final[dict[str, OpContract]] = {
    "npu_sparse_flash_attention_antiquant": SPARSE_FLASH_ATTENTION_ANTIQUANT,
    "npu_sparse_flash_attention": SPARSE_FLASH_ATTENTION,
    "npu_lightning_indexer": LIGHTNING_INDEXER,
    "npu_quant_lightning_indexer": QUANT_LIGHTNING_INDEXER,
    "kv_cache_pack": KV_CACHE_PACK,
}
_SCHEMA_TYPES: Final = {"float": "float", "int": "int", "string": "str"}


def arguments_of(op: OpContract) -> tuple[list[str], list[str]]:
    """Names of the positional and of the keyword-only arguments, in CANN's order."""
    positional = [t.name for t in op.inputs if not t.optional]
    positional += [a.name for a in op.attributes if a.required]
    keyword = [t.name for t in op.inputs if t.optional]
    keyword += [a.name for a in op.attributes if not a.required]
    return positional, keyword


def schema_of(op: OpContract) -> str:
    """The torch schema: "(Tensor query, ..., *, Tensor? block_table=None, ...) -> Tensor"."""
    tensors = {t.name: t for t in op.inputs}
    attributes = {a.name: a for a in op.attributes}

    def declare(name: str) -> str:
        if name in tensors:
            return f"Tensor? {name}=None" if tensors[name].optional else f"Tensor {name}"
        return _declare_attribute(attributes[name])

    positional, keyword = (list(map(declare, names)) for names in arguments_of(op))
    results = ", ".join(["Tensor"] * len(op.outputs))
    returns = results if len(op.outputs) == 1 else f"({results})"
    return f"({', '.join([*positional, '*', *keyword])}) -> {returns}"


def _declare_attribute(attribute: Attribute) -> str:
    kind = _SCHEMA_TYPES[attribute.kind]
    if attribute.default is None:
        return f"{kind} {attribute.name}"
    default = attribute.default
    return f"{kind} {attribute.name}={repr(default) if isinstance(default, str) else default}"


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """A view of a CPU tensor; bfloat16 becomes ml_dtypes'."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


def _torch(array: NDArray[Any]) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _eager(op: OpContract) -> Callable[..., Any]:
    """The CPU implementation: any split of positional and keyword arguments."""
    names = [name for group in arguments_of(op) for name in group]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        arrays = {t.name: _numpy(given[t.name]) for t in op.inputs if given.get(t.name) is not None}
        attributes = {a.name: given.get(a.name, a.default) for a in op.attributes}
        result = _compute(op, arrays, attributes)
        return tuple(map(_torch, result)) if isinstance(result, tuple) else _torch(result)

    return run


def _compute(op: OpContract, arrays: dict[str, Any], attributes: dict[str, Any]) -> Any:
    inputs = [arrays.get(t.name) for t in op.inputs]
    if op is SPARSE_FLASH_ATTENTION_ANTIQUANT:
        return reference.sparse_flash_attention_antiquant(*inputs, **attributes)  # type: ignore[arg-type]
    if op is SPARSE_FLASH_ATTENTION:
        return reference.sparse_flash_attention(*inputs, **attributes)  # type: ignore[arg-type]
    if op is LIGHTNING_INDEXER:
        return reference.lightning_indexer(*inputs, **attributes)  # type: ignore[arg-type]
    if op is QUANT_LIGHTNING_INDEXER:
        return reference.quant_lightning_indexer(*inputs, **attributes)  # type: ignore[arg-type]
    op.check_attributes(attributes)
    clip = arrays.pop("clip", None)
    alpha = None if clip is None else float(clip)
    return kv_cache.pack(**arrays, clip=alpha, tile_size=attributes["tile_size"])


def _fake(op: OpContract) -> Callable[..., Any]:
    """Shapes and types only; dims may be symbolic."""
    names = [name for group in arguments_of(op) for name in group]
    defaults = {a.name: a.default for a in op.attributes}

    def run(*args: Any, **kwargs: Any) -> Any:
        given: dict[str, Any] = defaults | dict(zip(names, args, strict=False)) | kwargs
        if op is KV_CACHE_PACK:
            return _fake_rows(given)
        query = given["query"]
        if op is SPARSE_FLASH_ATTENTION:
            return torch.empty_like(query, memory_format=torch.contiguous_format)
        if op is SPARSE_FLASH_ATTENTION_ANTIQUANT:
            return query.new_empty((*query.shape[:-1], query.shape[-1] - given["rope_head_dim"]))
        shape = (*query.shape[:-2], 1, given["sparse_count"])
        indices = query.new_empty(shape, dtype=torch.int32)
        return (indices, query.new_empty(shape)) if op is LIGHTNING_INDEXER else indices

    return run


def _fake_rows(given: dict[str, Any]) -> torch.Tensor:
    nope, rope = given["nope"], given.get("rope")
    width, itemsize = (0, 2) if rope is None else (int(rope.shape[-1]), rope.element_size())
    row = PackedRow(int(nope.shape[-1]), width, given["tile_size"], itemsize)
    made: torch.Tensor = nope.new_empty((*nope.shape[:-1], row.bytes), dtype=torch.int8)
    return made


def _register() -> torch.library.Library:
    """Not `torch.library.custom_op`: that has no keyword-only tensors, and CANN's lists do."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, op in OPERATORS.items():
        library.define(name + schema_of(op), tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, _eager(op), "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake(op), lib=library)
    return library


_LIBRARY: Final = _register()  # the registrations live as long as this object
