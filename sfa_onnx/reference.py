"""The operators as formulas in NumPy, under their public name."""

from __future__ import annotations

from sfa_onnx.operator.reference import (
    lightning_indexer,
    quant_lightning_indexer,
    selected_tokens,
    sparse_flash_attention,
    sparse_flash_attention_antiquant,
    sparse_flash_attention_antiquant_lse,
    sparse_flash_attention_lse,
)

__all__ = [
    "lightning_indexer",
    "quant_lightning_indexer",
    "selected_tokens",
    "sparse_flash_attention",
    "sparse_flash_attention_antiquant",
    "sparse_flash_attention_antiquant_lse",
    "sparse_flash_attention_lse",
]
