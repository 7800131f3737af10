"""Family: the DSA models of transformers, tiny and random, through every exporter.

Per-head keys and values are expanded from the cached latent, the selection is a dense mask:
fusing these means absorbing the expansion weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from tests.zoo.base import FLOAT_KV, NP_TYPES, Case, Feeds, export, quiet, to_torch, torch_dtype
from tests.zoo.kin import cache_name


@dataclass(frozen=True)
class Spec:
    """Model, phase and exporter of one case."""

    model: str = "deepseek"  # or "glm"
    attention: str = "eager"  # or "sdpa"
    phase: str = "prefill"  # or "decode"
    B: int = 1
    S1: int = 24
    past: int = 0
    layers: int = 1
    shared: bool = False  # glm: the second layer reuses the first one's selection
    sparse_mlp: bool = False
    padding: bool = False  # an attention_mask input
    cache: str = "dynamic"  # or "static"
    topk: int = 16
    dtype: str = "f32"
    exporter: str = "dynamo"  # "ts", "hf" (transformers' own), "hf-cpu" (with its ORT fusions)
    opset: int = 18
    dynamic: bool = False


LATENT, ROPE, INDEX = 64, 16, 32
VOCAB = 96


def make_model(s: Spec) -> Any:
    """The tiny random model, with weights large enough to make attention choosy."""
    from transformers import AutoModelForCausalLM
    from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
    from transformers.models.glm_moe_dsa.configuration_glm_moe_dsa import GlmMoeDsaConfig

    common = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": s.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": LATENT,
        "q_lora_rank": 48,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": 32,
        "v_head_dim": 24,
        "index_topk": s.topk,
        "index_head_dim": INDEX,
        "index_n_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "mlp_layer_types": ["sparse" if s.sparse_mlp else "dense"] * s.layers,
        "attn_implementation": s.attention,
    }
    if s.model == "glm":
        kinds = ["full", "shared"] if s.shared else ["full"] * s.layers
        config = GlmMoeDsaConfig(**common, indexer_types=(kinds * s.layers)[: s.layers])
    else:
        config = DeepseekV32Config(**common)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=s.attention)
    if s.sparse_mlp:
        model.set_experts_implementation("batched_mm")
    return model.eval().to(torch_dtype(s.dtype))


class Wrapped(nn.Module):
    """Flat tensors in, flat tensors out, around a model with a cache object."""

    def __init__(self, model: Any, s: Spec) -> None:
        super().__init__()
        self.model, self.s = model, s

    def _cache(self, flat):
        from transformers import DynamicCache, StaticCache

        s = self.s
        if s.cache == "static":
            cache = StaticCache(config=self.model.config, max_cache_len=s.past + s.S1 + 8)
        else:
            cache = DynamicCache(config=self.model.config)
        for layer in range(s.layers):
            keys, values = flat[3 * layer], flat[3 * layer + 1]
            cache.update(keys, values, layer)
            if not (s.shared and layer % 2):
                cache.update_indexer(flat[3 * layer + 2], layer)
        return cache

    def forward(self, input_ids, attention_mask=None, **flat):
        s = self.s
        if s.phase == "prefill":
            out = self.model(input_ids, attention_mask=attention_mask, use_cache=False)
            return out.logits
        cache = self._cache(list(flat.values()))
        name = cache_name(self.model)
        out = self.model(input_ids, attention_mask=attention_mask, use_cache=True, **{name: cache})
        new = []
        for layer in getattr(out, name).layers:
            new += [layer.keys, layer.values]
            if getattr(layer, "indexer_keys", None) is not None:
                new.append(layer.indexer_keys)
        return (out.logits, *new)


class Positional(nn.Module):
    """`Wrapped` for exporters that want positional arguments."""

    def __init__(self, inner: Wrapped, names: list[str]) -> None:
        super().__init__()
        self.inner, self.names = inner, names

    def forward(self, *args):
        return self.inner(**dict(zip(self.names, args, strict=True)))


def cache_names(s: Spec) -> list[str]:
    kinds = ("latent", "rope", "index")
    return [f"past_{k}_{layer}" for layer in range(s.layers) for k in kinds]


def feeds(s: Spec, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    ft = NP_TYPES[s.dtype]
    out: Feeds = {"input_ids": rng.integers(0, VOCAB, (s.B, s.S1))}
    if s.padding:
        mask = np.ones((s.B, s.past + s.S1), np.int64)
        mask[0, :3] = 0
        out["attention_mask"] = mask
    if s.phase == "decode":
        for name in cache_names(s):
            kind = name.split("_")[1]
            width = {"latent": LATENT, "rope": ROPE, "index": INDEX}[kind]
            lead = (s.B, s.past) if kind == "index" else (s.B, 1, s.past)
            out[name] = rng.standard_normal((*lead, width)).astype(ft)
    return out


def outputs(s: Spec) -> list[str]:
    if s.phase == "prefill":
        return ["logits"]
    names = [n.replace("past", "new") for n in cache_names(s)]
    if s.shared:
        names = [n for n in names if not (n.startswith("new_index") and int(n[-1]) % 2)]
    return ["logits", *names]


def axes(s: Spec) -> dict[str, dict[int, str]]:
    out = {"input_ids": {0: "batch", 1: "seq"}}
    if s.phase == "decode" and s.S1 == 1:
        out["input_ids"] = {0: "batch"}
    if s.padding:
        out["attention_mask"] = {0: "batch", 1: "total"}
    for name in cache_names(s) if s.phase == "decode" else []:
        out[name] = {0: "batch", (1 if "index" in name else 2): "past_len"}
    return out


def _own_exporter(s: Spec) -> onnx.ModelProto:
    """Through transformers' exporter, user-facing names and all."""
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = make_model(s)
    ids = to_torch(feeds(s, 0))
    inputs: dict[str, Any] = {"input_ids": ids["input_ids"]}
    if s.padding:
        inputs["attention_mask"] = ids["attention_mask"]
    if s.phase == "decode":
        inputs[cache_name(model)] = Wrapped(model, s)._cache([ids[n] for n in cache_names(s)])
        inputs["use_cache"] = True
    config = OnnxConfig(dynamic=True, ort_fusions="cpu" if s.exporter == "hf-cpu" else None)
    with quiet():
        exported = OnnxExporter().export(model, inputs, config=config)
    return onnx_ir.to_proto(exported.program)


@contextlib.contextmanager
def _traceable() -> Iterator[None]:
    """The tracer lacks `scatter(dim, index, False)` and `diff`: the same in words it knows."""
    scatter, diff = torch.Tensor.scatter, torch.diff

    def scatter_number(self, dim, index, value):
        return scatter(self, dim, index, int(value) if isinstance(value, bool) else value)

    def subtract(x, n=1, dim=-1, prepend=None, append=None):
        parts = [t for t in (prepend, x, append) if t is not None]
        x = torch.cat(parts, dim)
        return x.narrow(dim, 1, x.shape[dim] - 1) - x.narrow(dim, 0, x.shape[dim] - 1)

    torch.Tensor.scatter, torch.diff = scatter_number, subtract
    try:
        yield
    finally:
        torch.Tensor.scatter, torch.diff = scatter, diff


def _count_integers(model: onnx.ModelProto) -> onnx.ModelProto:
    """The tracer counts booleans with CumSum, which ONNX forbids: cast them first."""
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type == "CumSum":
            wide = f"{node.input[0]}_int"
            cast = onnx.helper.make_node(
                "Cast", [node.input[0]], [wide], name=wide, to=onnx.TensorProto.INT64
            )
            model.graph.node.append(cast)
            node.input[0] = wide
        model.graph.node.append(node)
    return model


def build(s: Spec) -> onnx.ModelProto:
    if s.exporter.startswith("hf"):
        return _own_exporter(s)
    inputs = to_torch(feeds(s, 0))
    wrapped = Positional(Wrapped(make_model(s), s), list(inputs))
    if s.exporter == "ts":
        with _traceable():
            model = export(
                wrapped,
                inputs,
                outputs(s),
                exporter="ts",
                opset=s.opset,
                dynamic=axes(s) if s.dynamic else None,
            )
        return _count_integers(model)
    shapes = None
    if s.dynamic:
        shapes = (tuple(dict.fromkeys(axes(s)[n], torch.export.Dim.DYNAMIC) for n in inputs),)
    with quiet():
        program = torch.onnx.export(
            wrapped,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            opset_version=s.opset,
            input_names=list(inputs),
            output_names=outputs(s),
            dynamic_shapes=shapes,
        )
    return program.model_proto


def kind_of_cache() -> str:
    """What this release of transformers calls the cache in exported names."""
    from transformers import DeepseekV32ForCausalLM

    return cache_name(DeepseekV32ForCausalLM)


def hf_feeds(s: Spec, seed: int) -> Feeds:
    """`feeds` under the names transformers' exporter gives."""
    plain = feeds(s, seed)
    out = {}
    for name, value in plain.items():
        if name.startswith("past_"):
            _, kind, layer = name.split("_")
            slot = {"latent": "keys", "rope": "values", "index": "indexer_keys"}[kind]
            name = f"input.{kind_of_cache()}.layers.{layer}.{slot}"
        out[name] = value
    return out


def _without_padding(given: Feeds, outs: list[np.ndarray]) -> list[np.ndarray]:
    """Rows of padding see no key at all: what they become is nobody's business."""
    return [outs[0][given["attention_mask"].astype(bool)], *outs[1:]]


def case(name: str, s: Spec, **more: Any) -> Case:
    make = hf_feeds if s.exporter.startswith("hf") else feeds

    def make_feeds(seed: int) -> Feeds:
        if (s.dynamic or s.exporter.startswith("hf")) and seed % 2:
            past = s.past + 7 if s.phase == "decode" else 0
            grown = s.S1 + 5 if s.phase == "prefill" else s.S1
            return make(replace(s, B=s.B + 1, S1=grown, past=past), seed)
        return make(s, seed)

    tags = {
        "exporter": s.exporter,
        "opset": s.opset,
        "dtype": s.dtype,
        "dynamic": s.dynamic,
        "bound": {"f32": 1e-4, "bf16": 1e-4, "f16": 2e-2}[s.dtype],
    }
    if s.padding and s.phase == "prefill":
        tags["crop"] = _without_padding
    more.setdefault("op", FLOAT_KV)
    more.setdefault("sites", s.layers)
    return Case(f"hf-{name}", "hf", lambda: build(s), make_feeds, tags=tags, **more)


def cases() -> Iterator[Case]:
    pre, dec = Spec(B=2), Spec(phase="decode", B=2, S1=1, past=40)
    for attention in ("eager", "sdpa"):
        for phase, base in (("prefill", pre), ("decode", dec)):
            s = replace(base, attention=attention)
            tag = f"{attention}-{phase}"
            yield case(f"{tag}-dynamo", s)
            yield case(f"{tag}-dynamo-dyn", replace(s, dynamic=True))
            yield case(f"{tag}-ts", replace(s, exporter="ts", opset=17))
            yield case(f"{tag}-ts-dyn", replace(s, exporter="ts", opset=17, dynamic=True))
            yield case(f"{tag}-hf", replace(s, exporter="hf"))
            yield case(f"{tag}-hf-cpu", replace(s, exporter="hf-cpu"))
            yield case(f"{tag}-pad", replace(s, padding=True))
            yield case(f"{tag}-pad-dyn", replace(s, padding=True, dynamic=True))
            yield case(f"{tag}-2layers", replace(s, layers=2))
            yield case(f"{tag}-glm", replace(s, model="glm"))
            yield case(f"{tag}-glm-shared", replace(s, model="glm", layers=2, shared=True))
            for dtype in ("f16", "bf16"):
                yield case(f"{tag}-{dtype}", replace(s, dtype=dtype))
            for opset in (20, 23, 24):
                yield case(f"{tag}-opset{opset}", replace(s, opset=opset))
        mtp = replace(dec, attention=attention, S1=3)
        yield case(f"{attention}-mtp", mtp)
        yield case(f"{attention}-mtp-dyn", replace(mtp, dynamic=True))
        yield case(f"{attention}-static-cache", replace(dec, attention=attention, cache="static"))
    yield case("moe", replace(pre, sparse_mlp=True))
    yield case("short-prefill", replace(pre, S1=10, topk=16))
    yield case("sdpa-opset23-dyn", replace(pre, attention="sdpa", opset=23, dynamic=True))
    yield case("sdpa-decode-opset23-dyn", replace(dec, attention="sdpa", opset=23, dynamic=True))
