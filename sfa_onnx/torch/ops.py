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
from sfa_onnx.torch.compute import compute, shapes_of

__all__ = ["OPERATORS", "arguments_of", "results_of", "schema_of"]

NAMESPACE: Final = "sfa_onnx"
# torch name -> contract
OPERATORS: Final[dict[str, OpContract]] = {
    "npu_sparse_flash_attention_antiquant": SPARSE_FLASH_ATTENTION_ANTIQUANT,
    "npu_sparse_flash_attention": SPARSE_FLASH_ATTENTION,
    "npu_lightning_indexer": LIGHTNING_INDEXER,
    "npu_quant_lightning_indexer": QUANT_LIGHTNING_INDEXER,
    "kv_cache_pack": KV_CACHE_PACK,
}
# Operators that the vendor computes with roundings of its own.
ROUNDED: Final = (
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    SPARSE_FLASH_ATTENTION,
    QUANT_LIGHTNING_INDEXER,
)
_SCHEMA_TYPES: Final = {"float": "float", "int": "int", "string": "str"}


def arguments_of(op: OpContract) -> tuple[list[str], list[str]]:
    """Names of the positional and of the keyword-only arguments, in CANN's order."""
    positional = [t.name for t in op.inputs if not t.optional]
    positional += [a.name for a in op.attributes if a.required]
    keyword = [t.name for t in op.inputs if t.optional]
    keyword += [a.name for a in op.attributes if not a.required]
    return positional, keyword


def results_of(op: OpContract) -> int:
    """How many tensors a call gives: the softmax's own are asked for by the vendor's names only."""
    return 1 if op is SPARSE_FLASH_ATTENTION else len(op.outputs)


def schema_of(op: OpContract) -> str:
    """The torch schema: "(Tensor query, ..., *, Tensor? block_table=None, ...) -> Tensor"."""
    tensors = {t.name: t for t in op.inputs}
    attributes = {a.name: a for a in op.attributes}

    def declare(name: str) -> str:
        if name in tensors:
            return f"Tensor? {name}=None" if tensors[name].optional else f"Tensor {name}"
        return _declare_attribute(attributes[name])

    positional, keyword = (list(map(declare, names)) for names in arguments_of(op))
    count = results_of(op)
    results = ", ".join(["Tensor"] * count)
    returns = results if count == 1 else f"({results})"
    return f"({', '.join([*positional, '*', *keyword])}) -> {returns}"


def _definition(op: OpContract) -> str:
    """What is registered: CANN's list and, where the vendor rounds, how to round."""
    arguments, returns = schema_of(op).rsplit(") -> ", 1)
    extra = ', str rounding="exact"' if op in ROUNDED else ""
    return f"{arguments}{extra}) -> {returns}"


def _declare_attribute(attribute: Attribute) -> str:
    kind = _SCHEMA_TYPES[attribute.kind]
    if attribute.default is None:
        return f"{kind} {attribute.name}"
    default = attribute.default
    return f"{kind} {attribute.name}={repr(default) if isinstance(default, str) else default}"


def _bound(op: OpContract) -> Callable[..., tuple[dict[str, Any], dict[str, Any], str]]:
    """How a call becomes tensors and attributes by name, and its rounding."""
    names = [name for group in arguments_of(op) for name in group]
    tensors = {t.name for t in op.inputs}
    defaults = {a.name: a.default for a in op.attributes} | {"rounding": "exact"}

    def bind(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
        given: dict[str, Any] = defaults | dict(zip(names, args, strict=False)) | kwargs
        rounding = given.pop("rounding")
        present = {n: t for n, t in given.items() if n in tensors and t is not None}
        return present, {n: given[n] for n in defaults if n in given}, rounding

    return bind


def _eager(op: OpContract) -> Callable[..., Any]:
    """The CPU implementation: any split of positional and keyword arguments."""
    bind = _bound(op)

    def run(*args: Any, **kwargs: Any) -> Any:
        results = compute(op, *bind(*args, **kwargs))
        return results[0] if results_of(op) == 1 else results

    return run


def _fake(op: OpContract) -> Callable[..., Any]:
    bind = _bound(op)

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors, attributes, _ = bind(*args, **kwargs)
        results = shapes_of(op, tensors, attributes)
        return results[0] if results_of(op) == 1 else results

    return run


def _register() -> torch.library.Library:
    """Not `torch.library.custom_op`: that has no keyword-only tensors, and CANN's lists do."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, op in OPERATORS.items():
        library.define(name + _definition(op), tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, _eager(op), "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake(op), lib=library)
    return library


_LIBRARY: Final = _register()  # the registrations live as long as this object
