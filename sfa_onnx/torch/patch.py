"""The operator inside `transformers` models with DeepSeek sparse attention.

`patch_attention` uses the library's own extension points: the attention interface gets a function
of ours, and the expansion of latents into keys and values per head is left out, because the
operator attends to the latents themselves (absorbed form). Weights are not touched.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Final, Literal

import torch

from sfa_onnx.errors import MissingError, UsageError

__all__ = ["patch_attention", "unpatch_attention"]

Cache = Literal["float", "paged-int8"]

# Attention classes whose forward hands the interface the indexer's choice and calls expand_kv once.
_CLASSES: Final = (
    "AXK2Attention",
    "DeepseekV32Attention",
    "Dots3NoteTextAttention",
    "Glm5NextTextAttention",
    "GlmMoeDsaAttention",
    "HYV4Attention",
    "HYV4VLAttention",
    "MistralLarge4TextAttention",
)
# What glm5_next makes of the choice, and hands the interface in place of the choice itself.
_MASKS: Final = "build_attention_mask_from_topk"
_BASES: Final = ("eager", "sdpa")
_MARK: Final = "_sfa_onnx_patched"


def patch_attention(
    model: torch.nn.Module, cache: Cache = "float", *, rounding: str = "exact"
) -> list[str]:
    """Let every sparse attention of a model call the operator.

    The model is changed in place; `unpatch_attention` undoes it. Inference only.

    Args:
        model: of `transformers`' axk2, deepseek_v32, dots3_note, glm5_next, glm_moe_dsa, hy_v4,
            hy_v4_vl or mistral_large4, loaded with "eager" or "sdpa". Layers that attend to a
            window, to all keys or linearly stay as they are.
        cache: "float": latents as they are, the original's results but for float sums.
            "paged-int8": latents quantised to packed int8 rows; give `generate` a `PagedInt8Cache`
            as `past_key_values` to keep them so (another cache is quantised anew at every step).
        rounding: "exact", or "npu" for the roundings of the NPU's int8 kernel.

    Returns:
        Names of the patched modules.

    Raises:
        UsageError: no such attention inside, a module that cannot be patched, or patched already.
        MissingError: transformers is not installed.
    """
    if cache not in ("float", "paged-int8"):
        raise UsageError(f"cache: expected 'float' or 'paged-int8', got {cache!r}")
    found = {name: m for name, m in model.named_modules() if _is_sparse(m)}
    if not found:
        kinds = sorted({type(m).__name__ for m in model.modules() if "Attention" in str(type(m))})
        raise UsageError(
            f"model: expected one with an indexer in {' or '.join(_CLASSES)},"
            f" got {', '.join(kinds) or 'none'}"
        )
    configs = {id(m.config): m.config for m in found.values()}
    for name, module in found.items():
        _check(name, module)
    for config in configs.values():
        _install(config)
    for module in found.values():
        module.expand_kv = _latents
        if hasattr(module, _MASKS):
            setattr(module, _MASKS, _choice)
        setattr(module, _MARK, (cache, rounding))
    return list(found)


def unpatch_attention(model: torch.nn.Module) -> None:
    """Give a model its own attention back.

    Raises:
        UsageError: it was not patched.
    """
    patched = [m for m in model.modules() if hasattr(m, _MARK)]
    if not patched:
        raise UsageError("model: expected one that patch_attention changed, got an untouched one")
    for module in patched:
        del module.expand_kv
        if hasattr(module, _MASKS):
            delattr(module, _MASKS)
        delattr(module, _MARK)
        base = module.config._attn_implementation
        module.config._attn_implementation = base.removeprefix("sfa_onnx_")


def _is_sparse(module: Any) -> bool:
    """Whether a layer attends to an indexer's choice, its own or an earlier layer's."""
    chooses = getattr(module, "indexer", None) is not None or getattr(module, "skip_topk", False)
    return type(module).__name__ in _CLASSES and chooses


def _check(name: str, module: Any) -> None:
    if hasattr(module, _MARK):
        raise UsageError(f"{name}: patched already; call unpatch_attention(model) first")
    expansion = module.kv_b_proj
    if type(expansion) is not torch.nn.Linear or expansion.bias is not None:
        raise UsageError(
            f"{name}.kv_b_proj: expected a plain torch.nn.Linear without bias (the operator absorbs"
            f" its weight), got {type(expansion).__name__}"
        )
    base = module.config._attn_implementation
    if base not in _BASES:
        raise UsageError(f"attn_implementation: expected eager or sdpa, got {base!r}")


def _install(config: Any) -> None:
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    except ImportError as error:
        raise MissingError("patch_attention needs transformers >= 5.20") from error
    base = config._attn_implementation
    name = f"sfa_onnx_{base}"
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    config._attn_implementation = name


def _latents(latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of `expand_kv`: what the cache gave goes to the operator."""
    return latent, rope


def _choice(topk_indices: torch.Tensor, **_others: Any) -> torch.Tensor:
    """In place of the mask over all keys: the choice, -1 wherever nothing was chosen."""
    return topk_indices


def _attention(
    module: Any,
    query: torch.Tensor,
    latent: torch.Tensor,
    rope: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    indices: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """The attention interface: [B, N1, S1, nope+R] -> [B, S1, N1, v].

    `latent` [B, 1, S2, C] and `rope` [B, 1, S2, R] as the model caches them, or the pages and the
    block table of a `PagedInt8Cache`. `s_aux` [N1] are sinks; without `indices` the mask is the
    choice itself. A layer that was not patched gets
    what it had.
    """
    if not hasattr(module, _MARK):
        kwargs |= {} if s_aux is None else {"s_aux": s_aux}
        before = _unpatched(module)
        out, weights = before(
            module, query, latent, rope, attention_mask, scaling=scaling, **kwargs
        )  # fmt: skip
        return out, weights
    sinks = None if s_aux is None else s_aux.detach().float().contiguous()
    nope, width = module.qk_nope_head_dim, module.kv_lora_rank
    weight = module.kv_b_proj.weight.view(module.num_heads, -1, width)  # [N1, nope+v, C]
    q = query.transpose(1, 2)  # [B, S1, N1, nope+R]
    absorbed = torch.einsum("bshd,hdc->bshc", q[..., :nope], weight[:, :nope]).contiguous()
    q_rope = q[..., nope:].contiguous() if query.shape[-1] > nope else None
    cache, rounding = getattr(module, _MARK)
    if indices is None:  # the choice came as the mask; whose order is nothing to the operator
        chosen = attention_mask.sort(-1, descending=True).values.int().unsqueeze(2).contiguous()
    else:
        chosen = _visible(indices, attention_mask)
    if latent.dtype == torch.int8:
        keys = attention_mask.shape[-1]
        out = _packed(absorbed, q_rope, latent, chosen, scaling, rounding, sinks, (rope, keys))
    elif cache == "paged-int8":
        rows = pack_rows(latent, rope)
        out = _packed(absorbed, q_rope, rows, chosen, scaling, rounding, sinks, None)
    else:
        key = latent.transpose(1, 2).contiguous()  # [B, S2, 1, C]
        key_rope = None if q_rope is None else rope.transpose(1, 2).contiguous()
        out = torch.ops.sfa_onnx.npu_sparse_flash_attention(
            absorbed, key, key, chosen, scaling, query_rope=q_rope, key_rope=key_rope,
            sinks=sinks, sparse_mode=0, attention_mode=2,
        )  # fmt: skip
    return torch.einsum("bshc,hvc->bshv", out, weight[:, nope:]), None


def _unpatched(module: Any) -> Any:
    """The attention that a layer of the model had, by its configuration."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    base = module.config._attn_implementation.removeprefix("sfa_onnx_")
    if base == "eager":  # every model's own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def pack_rows(latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Latents [B, 1, S, C] and ropes [B, 1, S, R], R >= 0, as packed rows [B, S, 1, D]."""
    rows: torch.Tensor = torch.ops.sfa_onnx.kv_cache_pack(
        latent.transpose(1, 2).detach().contiguous(),
        rope=rope.transpose(1, 2).detach().contiguous() if rope.shape[-1] else None,
        tile_size=tile_of(latent.shape[-1]),
    )
    return rows


def _visible(indices: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, S1, K] best first -> [B, S1, 1, K] with -1 for hidden keys, whose scores come last."""
    rows = mask[:, 0].expand(indices.shape[0], -1, -1)
    at = torch.gather(rows, -1, indices.long())
    seen = at if mask.dtype == torch.bool else at == 0
    return torch.where(seen, indices, -1).to(torch.int32).unsqueeze(2).contiguous()


def tile_of(width: int) -> int:
    """Latent columns per scale: the NPU's 128 where it divides the width."""
    return math.gcd(width, 128)


def _packed(
    absorbed: torch.Tensor,
    q_rope: torch.Tensor | None,
    rows: torch.Tensor,
    chosen: torch.Tensor,
    scaling: float,
    rounding: str,
    sinks: torch.Tensor | None,
    pages: tuple[torch.Tensor, int] | None,
) -> torch.Tensor:
    """The int8 operator over rows [B, S2, 1, D], or over pages with (block_table, keys in use)."""
    paged: dict[str, Any] = {}
    if pages is not None:
        table, keys = pages
        lengths = torch.full((table.shape[0],), keys, dtype=torch.int32)
        paged = {"block_table": table, "actual_seq_lengths_kv": lengths, "layout_kv": "PA_BSND"}
    width = 0 if q_rope is None else q_rope.shape[-1]
    query = absorbed if q_rope is None else torch.cat((absorbed, q_rope), -1)
    out: torch.Tensor = torch.ops.sfa_onnx.npu_sparse_flash_attention_antiquant(
        query, rows, rows, chosen, scaling, 1, 2, 2,
        sparse_mode=0, attention_mode=2, quant_scale_repo_mode=1, sinks=sinks,
        tile_size=tile_of(absorbed.shape[-1]), rope_head_dim=width,
        rounding=rounding, **paged,
    )  # fmt: skip
    return out
