"""`torch.library` operators with CANN's argument lists: eager on CPU, traceable by torch.export.

The schemas are written from the contract tables: required inputs and attributes first, in order,
the optional ones by keyword, and `rounding` after them where it means something. The vendors' own
names, with their spellings, defaults and results, are `sfa_onnx.torch.enable_ascend_names()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from sfa_onnx.operator.contract import Attribute, OpContract
from sfa_onnx.operator.op import (
    KV_CACHE_PACK,
    LIGHTNING_INDEXER,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
)
from sfa_onnx.torch.native import kernel
from sfa_onnx.torch.vendor import Adapter

__all__ = ["NAMESPACE", "OPERATORS", "OVERLOADS", "schema_of"]

NAMESPACE: Final = "sfa_onnx"
# torch name -> contract
OPERATORS: Final[dict[str, OpContract]] = {
    "npu_sparse_flash_attention_antiquant": SPARSE_FLASH_ATTENTION_ANTIQUANT,
    "npu_sparse_flash_attention": SPARSE_FLASH_ATTENTION,
    "npu_lightning_indexer": LIGHTNING_INDEXER,
    "npu_quant_lightning_indexer": QUANT_LIGHTNING_INDEXER,
    "kv_cache_pack": KV_CACHE_PACK,
}
# (torch name, overload): "" is the default one
OVERLOADS: Final = (
    *((name, "") for name in OPERATORS),
    ("npu_sparse_flash_attention", "lse"),
)
_LSE: Final = "return_softmax_lse"
# Operators that the vendor computes with roundings of its own.
ROUNDED: Final = (
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    SPARSE_FLASH_ATTENTION,
    QUANT_LIGHTNING_INDEXER,
)
_SCHEMA_TYPES: Final = {"float": "float", "int": "int", "string": "str"}


def _arguments(op: OpContract, overload: str) -> tuple[list[str], list[str]]:
    """Names of the positional and of the keyword-only arguments, in CANN's order."""
    positional = [t.name for t in op.inputs if not t.optional]
    positional += [a.name for a in op.attributes if a.required]
    keyword = [t.name for t in op.inputs if t.optional]
    keyword += [a.name for a in op.attributes if not a.required]
    return positional, [n for n in keyword if n != _LSE or overload]


def schema_of(op: OpContract, overload: str = "") -> str:
    """The torch schema: "(Tensor query, ..., *, Tensor? block_table=None, ...) -> Tensor".

    Args:
        op: the operator.
        overload: "lse" of NPUSparseFlashAttention is the one with softmax_max and softmax_sum.
    """
    tensors = {t.name: t for t in op.inputs}
    attributes = {a.name: a for a in op.attributes}

    def declare(name: str) -> str:
        if name in tensors:
            return f"Tensor? {name}=None" if tensors[name].optional else f"Tensor {name}"
        return _declare_attribute(attributes[name])

    positional, keyword = (list(map(declare, names)) for names in _arguments(op, overload))
    count = 1 if op is SPARSE_FLASH_ATTENTION and not overload else len(op.outputs)
    results = ", ".join(["Tensor"] * count)
    returns = results if count == 1 else f"({results})"
    return f"({', '.join([*positional, '*', *keyword])}) -> {returns}"


def _definition(op: OpContract, overload: str) -> str:
    """What is registered: CANN's list and, where the vendor rounds, how to round."""
    arguments, returns = schema_of(op, overload).rsplit(") -> ", 1)
    extra = ', str rounding="exact"' if op in ROUNDED else ""
    return f"{arguments}{extra}) -> {returns}"


def _declare_attribute(attribute: Attribute) -> str:
    kind = _SCHEMA_TYPES[attribute.kind]
    if attribute.default is None or attribute.name == _LSE:  # giving it chooses the overload
        return f"{kind} {attribute.name}"
    default = attribute.default
    return f"{kind} {attribute.name}={repr(default) if isinstance(default, str) else default}"


def _kernels(op: OpContract, schema: torch.FunctionSchema) -> tuple[Callable[..., Any], ...]:
    """The CPU implementation and the one for tracing: any split of positional and keyword."""
    adapter = Adapter(op, schema)

    def fake(*args: Any, **kwargs: Any) -> Any:
        return adapter.fake(args, kwargs)

    return kernel(adapter, None), fake


def _register() -> torch.library.Library:
    """Not `torch.library.custom_op`: that has no keyword-only tensors, and CANN's lists do."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, overload in OVERLOADS:
        op, full = OPERATORS[name], f"{name}.{overload}" if overload else name
        definition = _definition(op, overload)
        library.define(full + definition, tags=(torch.Tag.pt2_compliant_tag,))
        run, fake = _kernels(op, torch._C.parse_schema(f"{NAMESPACE}::{full}{definition}"))
        library.impl(full, run, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{full}", fake, lib=library)
    return library


_LIBRARY: Final = _register()  # the registrations live as long as this object
