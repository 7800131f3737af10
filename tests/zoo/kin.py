"""Every kin of DeepSeek's sparse attention in transformers, tiny, through two exporters.

The models keep what tells the kin apart (shared indexers, layers without rope, gates) and lose
their experts. Nothing here depends on how a release of transformers calls its cache.
"""

from __future__ import annotations

import copy
import fcntl
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from tests.zoo.base import Feeds, quiet

VOCAB, LATENT, ROPE, INDEX, TOPK = 96, 64, 16, 32, 8
BATCH, PAST, CAPACITY = 2, 24, 64
PARTS = ("keys", "values", "indexer_keys")


@dataclass(frozen=True)
class Kin:
    """Which model, and how it is exported."""

    model: str = "deepseek_v32"
    exporter: str = "hf"  # transformers' own; "torch": torch.onnx.export
    phase: str = "decode"  # or "prefill"
    padded: bool = False
    cache: str = "dynamic"  # or "static": fixed capacity, written in place
    layers: int = 2
    nope: bool = False  # mistral_large4: the last layer has no rope
    heads: int = 4  # with one, no axis tells a head's rows from the cache

    def __str__(self) -> str:
        pad = "padded" if self.padded else "plain"
        kind = "-static" if self.cache == "static" else ""
        kind += "-nope" if self.nope else ""
        kind += f"-{self.heads}head" if self.heads != 4 else ""
        kind += f"-{self.layers}layer" if self.layers != 2 else ""
        return f"{self.model}-{self.exporter}-{self.phase}-{pad}{kind}"


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "kv_lora_rank": LATENT,
    "q_lora_rank": 48, "qk_rope_head_dim": ROPE, "qk_nope_head_dim": 32, "v_head_dim": 24,
    "index_topk": TOPK, "index_head_dim": INDEX, "index_n_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.15, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _config(kin: Kin) -> tuple[Any, Any]:
    """The tiny configuration and the class to build from it."""
    import transformers

    sizes = _COMMON | {
        "num_hidden_layers": kin.layers,
        "num_attention_heads": kin.heads,
        "num_key_value_heads": kin.heads,
        "mlp_layer_types": ["dense"] * kin.layers,
    }
    if kin.model == "mistral_large4":
        from transformers.models.mistral_large4 import modeling_mistral_large4 as module

        del sizes["q_lora_rank"]
        ropes = [1] * (kin.layers - 1) + [int(not kin.nope)]
        kinds = (["full", "shared"] * kin.layers)[: kin.layers]
        config = transformers.MistralLarge4TextConfig(
            **sizes, no_rope_layers=ropes, indexer_types=kinds
        )
        return config, module.MistralLarge4TextModel
    if kin.model == "dots3_note":
        from transformers.models.dots3_note import modeling_dots3_note as module

        return transformers.Dots3NoteTextConfig(**sizes), module.Dots3NoteForCausalLM
    if kin.model == "axk2":
        return transformers.AXK2Config(**sizes), transformers.AXK2ForCausalLM
    if kin.model == "glm_moe_dsa":
        kinds = (["full", "shared"] * kin.layers)[: kin.layers]
        config = transformers.GlmMoeDsaConfig(**sizes, indexer_types=kinds)
        return config, transformers.GlmMoeDsaForCausalLM
    return transformers.DeepseekV32Config(**sizes), transformers.DeepseekV32ForCausalLM


def make(kin: Kin) -> Any:
    """The random model."""
    config, build = _config(kin)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return build(config).eval()


def cache_name(model: Any) -> str:
    """What this release of transformers calls the cache: an argument, and part of names."""
    taken = inspect.signature(model.forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


def ids(kin: Kin, batch: int, seed: int) -> torch.Tensor:
    """Tokens [batch, 1] or [batch, 24]."""
    generator = torch.Generator().manual_seed(seed)
    width = 1 if kin.phase == "decode" else PAST
    return torch.randint(3, VOCAB, (batch, width), generator=generator)


def mask(batch: int, total: int) -> torch.Tensor:
    """An attention mask [batch, total]: every other sequence starts with three padding tokens."""
    kept = torch.ones(batch, total, dtype=torch.int64)
    kept[0, :3] = 0
    return kept


def prompt(kin: Kin, model: Any, batch: int = BATCH, past: int = PAST, seed: int = 1) -> Any:
    """The cache after `past` tokens."""
    from transformers import StaticCache

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (batch, past), generator=generator)
    given: dict[str, Any] = {"input_ids": tokens, "use_cache": True}
    name = cache_name(model)
    if kin.cache == "static":
        given[name] = StaticCache(config=model.config, max_cache_len=CAPACITY)
    if kin.padded:
        given["attention_mask"] = mask(batch, past)
    with torch.no_grad():
        return getattr(model(**given), name)


def tensors(cache: Any) -> dict[tuple[int, str], torch.Tensor]:
    """The cache's tensors by layer and part."""
    return {
        (i, part): getattr(layer, part)
        for i, layer in enumerate(cache.layers)
        for part in (*PARTS, "cumulative_length", "indexer_cumulative_length")
        if isinstance(getattr(layer, part, None), torch.Tensor)
    }


def inputs(kin: Kin, model: Any, batch: int = BATCH, past: int = PAST, seed: int = 1) -> Any:
    """Keyword arguments of one call."""
    given: dict[str, Any] = {"input_ids": ids(kin, batch, seed)}
    total = given["input_ids"].shape[1]
    if kin.phase == "decode":
        given[cache_name(model)] = prompt(kin, model, batch, past, seed)
        total += past
    given["use_cache"] = kin.phase == "decode"
    if kin.padded:
        given["attention_mask"] = mask(batch, total)
    return given


def export(kin: Kin) -> onnx.ModelProto:
    """One ONNX model with open batch and past."""
    model = make(kin)
    return _hf(kin, model) if kin.exporter == "hf" else _torch(kin, model)


def exported(kin: Kin, folder: Path) -> bytes:
    """The export, made once for all that share `folder`: who comes second waits for it."""
    path = folder / f"{kin}.onnx"
    with (folder / f"{kin}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            fresh = folder / f".{kin}.{os.getpid()}"
            fresh.write_bytes(export(kin).SerializeToString())
            fresh.replace(path)
    return path.read_bytes()


def _hf(kin: Kin, model: Any) -> onnx.ModelProto:
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    with quiet():
        exported = OnnxExporter().export(model, inputs(kin, model), config=OnnxConfig(dynamic=True))
    program = exported.program
    return onnx_ir.to_proto(getattr(program, "model", program))


class _Flat(nn.Module):
    """Tensors in, tensors out, around a model with a cache object."""

    def __init__(self, kin: Kin, model: Any, cache: Any) -> None:
        super().__init__()
        self.kin, self.model, self.cache = kin, model, cache

    def forward(self, tokens: torch.Tensor, kept: Any, flat: Any) -> Any:
        given: dict[str, Any] = {"input_ids": tokens, "use_cache": self.cache is not None}
        if kept is not None:
            given["attention_mask"] = kept
        name = cache_name(self.model)
        if self.cache is not None:
            given[name] = filled(self.cache, flat)
        out = self.model(**given)
        if self.cache is None:
            return (out[0],)
        return out[0], *tensors(getattr(out, name)).values()


def filled(cache: Any, flat: Any) -> Any:
    """A cache of the same kind around other tensors."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for (i, part), value in zip(tensors(cache), flat, strict=True):
        setattr(new.layers[i], part, value)
        if part == "keys" and isinstance(getattr(new.layers[i], "cumulative_length", None), int):
            # A sliding layer counts in Python: left alone, the traced length would be a constant.
            new.layers[i].cumulative_length = value.shape[-2]
    return new


def flat_names(cache: Any) -> list[str]:
    """Input names of the flat export, in order."""
    short = {"keys": "latent", "values": "rope", "indexer_keys": "index"}
    return [f"past_{short.get(part, part)}_{i}" for i, part in tensors(cache)]


def _torch(kin: Kin, model: Any) -> onnx.ModelProto:
    given = inputs(kin, model)
    cache = given.get(cache_name(model))
    flat = [] if cache is None else [t.detach().clone() for t in tensors(cache).values()]
    tokens, kept = given["input_ids"], given.get("attention_mask")
    names = ["input_ids", *(["attention_mask"] if kin.padded else [])]
    names += flat_names(cache) if cache is not None else []
    new = [n.replace("past", "new") for n in names if n.startswith("past_")]
    dims = torch.export.Dim
    wide = {0: dims.DYNAMIC} if kin.phase == "decode" else {0: dims.DYNAMIC, 1: dims.DYNAMIC}
    grown = [dict.fromkeys(_open(kin, t), dims.DYNAMIC) for t in flat]
    shapes = (wide, {0: dims.DYNAMIC, 1: dims.DYNAMIC} if kin.padded else None, grown)
    with quiet():
        program = torch.onnx.export(
            _Flat(kin, model, cache), (tokens, kept, flat), dynamo=True, verbose=False,
            input_names=names, output_names=["logits", *new], dynamic_shapes=shapes,
        )  # fmt: skip
    return program.model_proto


def _open(kin: Kin, tensor: torch.Tensor) -> tuple[int, ...]:
    """Axes of a cache tensor whose size is open."""
    if tensor.ndim < 3:
        return ()
    length = 1 if tensor.ndim == 3 else 2
    return (0,) if kin.cache == "static" else (0, length)


def feeds(kin: Kin, names: list[str], batch: int = BATCH, past: int = PAST, seed: int = 1) -> Feeds:
    """A call's arrays under the input names of an export."""
    return named(kin, names, inputs(kin, make(kin), batch, past, seed))


def named(kin: Kin, names: list[str], given: dict[str, Any]) -> Feeds:
    """Keyword arguments as arrays under the input names of an export."""
    cache = next((given[n] for n in ("cache", "past_key_values") if n in given), None)
    out = {n: given[n].numpy() for n in ("input_ids", "attention_mask") if n in given}
    if cache is not None:
        for (i, part), flat, value in zip(
            tensors(cache), flat_names(cache), tensors(cache).values(), strict=True
        ):
            name = flat if kin.exporter == "torch" else f".layers.{i}.{part}"
            hit = next((n for n in names if n.endswith(name)), None)
            if hit is not None:
                out[hit] = value.detach().numpy().copy()
    return {n: np.ascontiguousarray(out[n]) for n in names if n in out}
