"""The operators' contract under its public name: one frozen table per operator."""

from __future__ import annotations

from sfa_onnx.operator.op import (
    ALL_OPS,
    BINDINGS,
    DOMAIN_NPU,
    DOMAIN_OWN,
    INT64_MAX,
    KV_CACHE_PACK,
    KV_CACHE_WRITE,
    KV_QUANT_SPARSE_FLASH_ATTENTION,
    LIGHTNING_INDEXER,
    NPU,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    Attribute,
    Binding,
    NpuLimits,
    OpContract,
    PackedRow,
    Tensor,
    find_op,
)

__all__ = [
    "ALL_OPS",
    "BINDINGS",
    "DOMAIN_NPU",
    "DOMAIN_OWN",
    "INT64_MAX",
    "KV_CACHE_PACK",
    "KV_CACHE_WRITE",
    "KV_QUANT_SPARSE_FLASH_ATTENTION",
    "LIGHTNING_INDEXER",
    "NPU",
    "QUANT_LIGHTNING_INDEXER",
    "SPARSE_FLASH_ATTENTION",
    "SPARSE_FLASH_ATTENTION_ANTIQUANT",
    "Attribute",
    "Binding",
    "NpuLimits",
    "OpContract",
    "PackedRow",
    "Tensor",
    "find_op",
]
