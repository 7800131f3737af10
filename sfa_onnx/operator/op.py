"""THE contract: one frozen table per operator.

Everything else that states a fact about an operator (onnx schema, CPU kernel registration, torch
op, ATC mapping, checks, docs) derives from these tables or is tested against them. Input and
attribute order is CANN's; an attribute's position in its table is its position in the GE prototype.

Axes: B batch, T packed tokens, S1/S2 query/key length, N1 query heads, N2 key heads (always 1),
K entries per row of `sparse_indices`, D the packed row in bytes, C nope width, R rope width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from sfa_onnx.operator.contract import (
    FLOAT,
    FLOATS,
    HALF,
    INT8,
    INT32,
    Attribute,
    Binding,
    NpuLimits,
    OpContract,
    PackedRow,
    Tensor,
)

__all__ = [
    "ALL_OPS",
    "BINDINGS",
    "CHOICES",
    "DOMAIN_NPU",
    "DOMAIN_OWN",
    "EXPANDED",
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
    "written_as",
]

DOMAIN_NPU: Final = "npu"
DOMAIN_OWN: Final = "sfa_onnx"
INT64_MAX: Final = 2**63 - 1

_LAYOUT_Q = ("BSND", "TND")
_LAYOUT_KV = ("BSND", "TND", "PA_BSND")
_SEQ = (INT32,)


def _q(name: str, optional: bool = False, dim: str = "C+R") -> Tensor:
    return Tensor(name, "T", f"BSND [B, S1, N1, {dim}] | TND [T, N1, {dim}]", optional)


def _kv(name: str, types: str | tuple[str, ...], dim: str, optional: bool = False) -> Tensor:
    shape = f"BSND [B, S2, 1, {dim}] | TND [T2, 1, {dim}] | PA_BSND [blocks, block_size, 1, {dim}]"
    return Tensor(name, types, shape, optional)


_SINKS = Tensor(
    "sinks", (FLOAT,), "[N1]: one more score per head, without a value", True, released=False
)
_STATISTIC = "BSND [B, 1, S1, N1] | TND [1, T, N1]; [0] unless return_softmax_lse is 1"
_INDICES = Tensor("sparse_indices", (INT32,), "BSND [B, S1, 1, K] | TND [T, 1, K]")
_BLOCK_TABLE = Tensor("block_table", (INT32,), "[B, blocks per sequence]", optional=True)
_LENGTHS_Q = Tensor("actual_seq_lengths_query", _SEQ, "[B]; TND: prefix sums", optional=True)
_LENGTHS_KV = Tensor("actual_seq_lengths_kv", _SEQ, "[B]; TND keys: prefix sums", optional=True)
_LENGTHS_KEY = Tensor("actual_seq_lengths_key", _SEQ, "[B]; TND keys: prefix sums", optional=True)

_SPARSE_MODE = Attribute("sparse_mode", "int", 3, cpu=(0, 3), npu=(0, 3))
_PRE_NEXT = (
    Attribute("pre_tokens", "int", INT64_MAX, cpu=(INT64_MAX,), npu=(INT64_MAX,), write=INT64_MAX),
    Attribute("next_tokens", "int", INT64_MAX, cpu=(INT64_MAX,), npu=(INT64_MAX,), write=INT64_MAX),
)
_LAYOUTS = (
    Attribute("layout_query", "string", "BSND", cpu=_LAYOUT_Q, npu=_LAYOUT_Q),
    Attribute("layout_kv", "string", "BSND", cpu=_LAYOUT_KV, npu=_LAYOUT_KV),
)

SPARSE_FLASH_ATTENTION_ANTIQUANT: Final = OpContract(
    name="NPUSparseFlashAttentionAntiquant",
    domain=DOMAIN_NPU,
    inputs=(
        _q("query"),
        _kv("key", (INT8,), "D"),
        Tensor("value", (INT8,), "the key tensor again; never read"),
        _INDICES,
        Tensor("key_dequant_scale", (FLOAT,), "reserved, must be absent", optional=True),
        Tensor("value_dequant_scale", (FLOAT,), "reserved, must be absent", optional=True),
        _BLOCK_TABLE,
        _LENGTHS_Q,
        _LENGTHS_KV,
        _SINKS,
    ),
    outputs=(_q("attention_out", dim="C"),),
    attributes=(
        Attribute("scale_value", "float"),
        Attribute("sparse_block_size", "int", npu=(1, 2, 4, 8, 16), minimum=1),
        Attribute("key_quant_mode", "int", cpu=(2,), npu=(2,), write=2),
        Attribute("value_quant_mode", "int", cpu=(2,), npu=(2,), write=2),
        *_LAYOUTS,
        _SPARSE_MODE,
        Attribute("attention_mode", "int", 0, cpu=(2,), npu=(2,), write=2),
        Attribute("quant_scale_repo_mode", "int", 0, cpu=(1,), npu=(1,), write=1),
        Attribute("tile_size", "int", 0, npu=(128,), minimum=1),
        Attribute("rope_head_dim", "int", 0, npu=(64,), minimum=0),
    ),
    type_variables=(("T", FLOATS),),
    doc="Sparse MLA attention (absorbed form) over an int8 KV cache with a float32 scale per tile.",
    spellings=(
        ("custom", "npu_sparse_flash_attention_antiquant"),
        ("npu", "npu_sparse_flash_attention_antiquant"),
        ("npu", "npu_kv_quant_sparse_flash_attention"),
        ("custom", "npu_kv_quant_sparse_flash_attention"),
        ("npu", "SparseFlashAttentionAntiquant"),
        ("npu", "KvQuantSparseFlashAttention"),
        ("custom", "SparseFlashAttentionAntiquant"),
        ("custom", "KvQuantSparseFlashAttention"),
        ("", "NPUSparseFlashAttentionAntiquant"),
    ),
)

# ATC-only node type: the CANN >= 8.5 built-in of the same mathematics (other attribute order).
KV_QUANT_SPARSE_FLASH_ATTENTION: Final = OpContract(
    name="NPUKvQuantSparseFlashAttention",
    domain=DOMAIN_NPU,
    inputs=SPARSE_FLASH_ATTENTION_ANTIQUANT.inputs,
    outputs=SPARSE_FLASH_ATTENTION_ANTIQUANT.outputs,
    attributes=(
        Attribute("scale_value", "float"),
        Attribute("key_quant_mode", "int", cpu=(2,), npu=(2,), write=2),
        Attribute("value_quant_mode", "int", cpu=(2,), npu=(2,), write=2),
        Attribute("sparse_block_size", "int", 1, npu=(1, 2, 4, 8, 16), minimum=1),
        *_LAYOUTS,
        _SPARSE_MODE,
        *_PRE_NEXT,
        Attribute("attention_mode", "int", 0, cpu=(2,), npu=(2,), write=2),
        Attribute("quant_scale_repo_mode", "int", 1, cpu=(1,), npu=(1,), write=1),
        Attribute("tile_size", "int", 128, npu=(128,), minimum=1),
        Attribute("rope_head_dim", "int", 64, npu=(64,), minimum=0),
    ),
    type_variables=(("T", FLOATS),),
    doc="ATC spelling of NPUSparseFlashAttentionAntiquant (KvQuantSparseFlashAttention).",
)

SPARSE_FLASH_ATTENTION: Final = OpContract(
    name="NPUSparseFlashAttention",
    domain=DOMAIN_NPU,
    inputs=(
        _q("query", dim="C"),
        _kv("key", "T", "C"),
        Tensor("value", "T", "the key tensor again; never read"),
        _INDICES,
        _BLOCK_TABLE,
        _LENGTHS_Q,
        _LENGTHS_KV,
        _q("query_rope", optional=True, dim="R"),
        _kv("key_rope", "T", "R", optional=True),
        _SINKS,
    ),
    outputs=(
        _q("attention_out", dim="C"),
        Tensor("softmax_max", (FLOAT,), _STATISTIC, optional=True),
        Tensor("softmax_sum", (FLOAT,), _STATISTIC, optional=True),
    ),
    attributes=(
        Attribute("scale_value", "float"),
        Attribute("sparse_block_size", "int", 1, minimum=1),
        *_LAYOUTS,
        _SPARSE_MODE,
        *_PRE_NEXT,
        Attribute("attention_mode", "int", 0, cpu=(0, 2), npu=(2,), write=2),
        Attribute("return_softmax_lse", "int", 0, cpu=(0, 1), npu=(0, 1), write=0, ge_kind="bool"),
    ),
    type_variables=(("T", FLOATS),),
    doc="Sparse MLA attention (absorbed form) over a float latent cache.",
    spellings=(
        ("custom", "npu_sparse_flash_attention"),
        ("npu", "npu_sparse_flash_attention"),
        ("npu", "SparseFlashAttention"),
        ("custom", "SparseFlashAttention"),
        ("", "NPUSparseFlashAttention"),
    ),
)

LIGHTNING_INDEXER: Final = OpContract(
    name="NPULightningIndexer",
    domain=DOMAIN_NPU,
    inputs=(
        Tensor("query", "T", "BSND [B, S1, Hi, Di] | TND [T, Hi, Di]"),
        _kv("key", "T", "Di"),
        Tensor("weights", "W", "BSND [B, S1, Hi] | TND [T, Hi]"),
        _LENGTHS_Q,
        _LENGTHS_KEY,
        _BLOCK_TABLE,
    ),
    outputs=(
        _INDICES,
        Tensor("sparse_values", "T", "as sparse_indices; present when return_values is 1", True),
    ),
    attributes=(
        Attribute("layout_query", "string", "BSND", cpu=_LAYOUT_Q, npu=_LAYOUT_Q),
        Attribute("layout_key", "string", "BSND", cpu=_LAYOUT_KV, npu=_LAYOUT_KV),
        Attribute("sparse_count", "int", 2048, minimum=1),
        _SPARSE_MODE,
        *_PRE_NEXT,
        Attribute("return_values", "int", 0, cpu=(0, 1), npu=(0, 1), ge_kind="bool"),
    ),
    type_variables=(("T", FLOATS), ("W", FLOATS)),
    doc="Index scores sum_h w_h * relu(q_h . k) and the best sparse_count keys per query token.",
    spellings=(("npu", "npu_lightning_indexer"), ("custom", "npu_lightning_indexer")),
)

QUANT_LIGHTNING_INDEXER: Final = OpContract(
    name="NPUQuantLightningIndexer",
    domain=DOMAIN_NPU,
    inputs=(
        Tensor("query", (INT8,), "BSND [B, S1, Hi, Di] | TND [T, Hi, Di]"),
        _kv("key", (INT8,), "Di"),
        Tensor("weights", (HALF,), "BSND [B, S1, Hi] | TND [T, Hi]"),
        Tensor("query_dequant_scale", (HALF,), "as weights"),
        Tensor("key_dequant_scale", (HALF,), "key without its last axis"),
        _LENGTHS_Q,
        _LENGTHS_KEY,
        _BLOCK_TABLE,
    ),
    outputs=(_INDICES,),
    attributes=(
        Attribute("query_quant_mode", "int", cpu=(0,), npu=(0,), write=0),
        Attribute("key_quant_mode", "int", cpu=(0,), npu=(0,), write=0),
        Attribute("layout_query", "string", "BSND", cpu=_LAYOUT_Q, npu=_LAYOUT_Q),
        Attribute("layout_key", "string", "BSND", cpu=_LAYOUT_KV, npu=_LAYOUT_KV),
        Attribute("sparse_count", "int", 2048, minimum=1),
        _SPARSE_MODE,
        *_PRE_NEXT,
    ),
    type_variables=(),
    doc="The indexer over int8 queries and keys with fp16 scales per token and head.",
    spellings=(("npu", "npu_quant_lightning_indexer"), ("custom", "npu_lightning_indexer_quant")),
)

KV_CACHE_PACK: Final = OpContract(
    name="KvCachePack",
    domain=DOMAIN_OWN,
    inputs=(
        Tensor("nope", "N", "[..., C]"),
        Tensor("rope", "R", "[..., R]; absent when R is 0", optional=True),
        Tensor("scale", (FLOAT,), "[..., C/tile_size]; required iff nope is int8", optional=True),
        Tensor("clip", (FLOAT,), "scalar: alpha of amax*alpha", optional=True),
    ),
    outputs=(Tensor("packed", (INT8,), "[..., D]"),),
    attributes=(Attribute("tile_size", "int", 128, npu=(128,), write=128, minimum=1),),
    type_variables=(("N", (*FLOATS, INT8)), ("R", FLOATS)),
    doc="Latent, rope (and scales) to packed int8 rows: nope | rope | float32 scale per tile.",
)

KV_CACHE_WRITE: Final = OpContract(
    name="KvCacheWrite",
    domain=DOMAIN_OWN,
    inputs=(
        Tensor("pages", "P", "[block_num, block_size, 1, D]"),
        Tensor("rows", "P", "[n, 1, D]"),
        Tensor("slot_mapping", (INT32,), "[n] flat slots; negative: not written"),
    ),
    outputs=(Tensor("written", "P", "as pages"),),
    attributes=(),
    type_variables=(("P", (*FLOATS, INT8)),),
    doc="Pages with some rows replaced, in place where possible; of equal slots the last wins.",
)

ALL_OPS: Final = (
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    SPARSE_FLASH_ATTENTION,
    LIGHTNING_INDEXER,
    QUANT_LIGHTNING_INDEXER,
    KV_CACHE_PACK,
    KV_CACHE_WRITE,
)

# No GE operator of their own: the parser plug-in expands them to built-in ones.
EXPANDED: Final = (KV_CACHE_PACK, KV_CACHE_WRITE)

BINDINGS: Final = (
    Binding(
        "kv-quant",
        KV_QUANT_SPARSE_FLASH_ATTENTION,
        "NPUKvQuantSparseFlashAttention",
        "KvQuantSparseFlashAttention",
        ("attention_out",),
        "CANN 8.5.0 (built in)",
        of=SPARSE_FLASH_ATTENTION_ANTIQUANT,
    ),
    Binding(
        "recipes",
        SPARSE_FLASH_ATTENTION_ANTIQUANT,
        "NPUSparseFlashAttentionAntiquant",
        "SparseFlashAttentionAntiquant",
        ("attention_out",),
        "cann-recipes-infer v0.2.0 / v0.3.0 (package)",
    ),
    Binding(
        "sfa",
        SPARSE_FLASH_ATTENTION,
        "NPUSparseFlashAttention",
        "SparseFlashAttention",
        ("attention_out", "softmax_max", "softmax_sum"),
        "CANN 8.5.0 (built in)",
    ),
    Binding(
        "indexer",
        LIGHTNING_INDEXER,
        "NPULightningIndexer",
        "LightningIndexer",
        ("sparse_indices", "sparse_values"),
        "CANN 8.5.0 (built in)",
    ),
    Binding(
        "quant-indexer",
        QUANT_LIGHTNING_INDEXER,
        "NPUQuantLightningIndexer",
        "QuantLightningIndexer",
        ("sparse_indices",),
        "CANN 8.5.0 (built in)",
    ),
)

# The choices of `atc --binding`: other ways to write one operator.
CHOICES: Final = tuple(b.name for b in BINDINGS if b.canonical is SPARSE_FLASH_ATTENTION_ANTIQUANT)

NPU: Final = NpuLimits()


def written_as(op: OpContract) -> tuple[OpContract, ...]:
    """The contracts under which an ATC file may hold a canonical operator, its own left out."""
    ways = (b.contract for b in BINDINGS if b.canonical.name == op.name)
    return tuple(way for way in ways if way.name != op.name)


def _spelled() -> Iterator[tuple[tuple[str, str], OpContract]]:
    """Every (domain, op_type) of every operator; of a pair, the other name too."""
    for op in ALL_OPS:
        yield op.key, op
        yield from ((spelling, op) for spelling in op.spellings)
        for way in written_as(op):
            yield from (((domain, way.name), op) for domain in (way.domain, ""))


_SPELLED: Final = dict(_spelled())


def find_op(domain: str, op_type: str) -> OpContract | None:
    """The contract a node with this (domain, op_type) stands for, other spellings included."""
    return _SPELLED.get((domain, op_type))
