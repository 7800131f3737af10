"""Decode with a tiny random DeepSeek-V3.2 from transformers, its cache packed to int8 pages.

    python examples/generate.py [--tokens 64] [--folder DIR]

The model is exported by transformers' own exporter, fused (attention, and the lightning indexer
that selects its keys), converted to `paged-int8`, the index keys with it, and run in onnxruntime
with its pages in place, one token at a time, beside the torch model. Both see the tokens that torch
chose, so that one flip does not hide all that follows. Printed: how often the next token agrees,
the difference of the logits, and how much of it the int8 cache explains (the form `int8`, which
keeps the float interface and rounds every row inside, gives that part alone).
Needs torch and transformers (`pip install '.[test]'`).
"""

from __future__ import annotations

import argparse
import inspect
import logging
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.kv_convert import convert
from sfa_onnx.kv_convert.interface import BLOCK_TABLE, LENGTHS_KV, SLOT_MAPPING, read_interface

BLOCK = 16
PROMPT = 24
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 64,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "index_topk": 16,
    "index_n_heads": 32, "index_head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip


def tiny_model() -> Any:
    """A random two-layer DeepSeek-V3.2."""
    from transformers.models.deepseek_v32 import DeepseekV32Config, DeepseekV32ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**SIZES)).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")
    return model


def cache_name(model: Any) -> str:
    """What this release of transformers calls the cache: an argument, and part of names."""
    taken = inspect.signature(model.forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


def prefill(model: Any, tokens: torch.Tensor) -> Any:
    """The cache after the prompt."""
    with torch.no_grad():
        return getattr(model(tokens, use_cache=True), cache_name(model))


def export(model: Any, cache: Any, path: Path) -> None:
    """One decode step with every cache as input and output."""
    import onnx_ir
    from transformers.exporters import OnnxConfig, OnnxExporter

    inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64), cache_name(model): cache}
    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
    program = next(iter(exported.components.values())).program
    onnx_ir.save(getattr(program, "model", program), path)


def caches_of(cache: Any, called: str) -> dict[str, np.ndarray]:
    """The float caches under the exporter's input names."""
    feeds = {}
    for i, layer in enumerate(cache.layers):
        for part in ("keys", "values", "indexer_keys"):
            name = f"input.{called}.layers.{i}.{part}"
            feeds[name] = getattr(layer, part).detach().numpy().copy()
    return feeds


class Decoder:
    """One ONNX model stepping through tokens with its caches carried along."""

    def __init__(self, path: Path, capacity: int) -> None:
        self.session = runtime.session(path)
        self.interface = read_interface(onnx.load(path, load_external_data=False))
        self.capacity = capacity
        self.state: dict[str, np.ndarray] = {}
        self.bound: runtime.BoundSession | None = None
        self.length = 0

    def start(self, caches: dict[str, np.ndarray], length: int) -> None:
        """Take over the caches of the prompt; packed ones are quantised and paged here."""
        from sfa_onnx.kv_convert.interface import adapt_feeds

        self.length = length
        self.state = dict(caches)
        if self.interface is not None and self.interface.form == "paged-int8":
            room = self.capacity - length
            self.state = adapt_feeds(self.interface, caches, new_tokens=room)
            self.state.pop(SLOT_MAPPING)
            pages = {c.packed_in: self.state.pop(c.packed_in) for c in self.interface.caches}
            self.bound = runtime.bind_caches(self.session, pages)  # written in place from now on

    def step(self, token: int) -> np.ndarray:
        """Logits [vocabulary] after one more token."""
        feeds = dict(self.state, input_ids=np.asarray([[token]], np.int64))
        if BLOCK_TABLE in feeds:
            block, offset = divmod(self.length, BLOCK)
            slot = int(feeds[BLOCK_TABLE][0, block]) * BLOCK + offset
            feeds[SLOT_MAPPING] = np.asarray([slot], np.int32)
            feeds[LENGTHS_KV] = np.asarray([self.length + 1], np.int32)
        outputs = self.bound.run(feeds) if self.bound else runtime.run(self.session, feeds)
        self.length += 1
        for name, value in outputs.items():
            if ".layers." in name:
                self.state[name.replace("output.", "input.", 1)] = value
        return outputs["logits"][0, -1]


def report(name: str, reference: list[np.ndarray], got: list[np.ndarray]) -> float:
    """Agreement of the next token, and the logits' difference scaled to their size."""
    a, b = np.stack(reference), np.stack(got)
    agree = float((a.argmax(-1) == b.argmax(-1)).mean())
    error = float(np.abs(a - b).max() / np.abs(a).max())
    print(f"{name:42} same next token {agree:6.1%}   logits differ by {error:.2e}")
    return agree


def main() -> int:
    parser = argparse.ArgumentParser(description="Decode with packed int8 pages beside torch.")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        return decode(args.folder or Path(scratch), args.tokens)


def decode(folder: Path, count: int) -> int:
    """Export, fuse, convert, and step all models side by side."""
    model = tiny_model()
    prompt = torch.randint(0, SIZES["vocab_size"], (1, PROMPT))
    export(model, prefill(model, prompt), folder / "model.onnx")
    fused = sfa_onnx.fuse(
        folder / "model.onnx", folder / "model.sfa.onnx", expect_sites=2, force=True
    )
    print(f"{len(fused.fused)} sites fused: {', '.join(s.layer for s in fused.fused)}")
    paged = convert(
        folder / "model.sfa.onnx", folder / "model.paged.onnx",
        to="paged-int8", block_size=BLOCK, force=True,
    )  # fmt: skip
    convert(folder / "model.sfa.onnx", folder / "model.int8.onnx", to="int8", force=True)
    for name, changed in (("fused", fused.model), ("paged", paged.model)):
        kinds = Counter(n.op_type for n in changed.graph.node if n.domain in ("npu", "sfa_onnx"))
        print(f"operators, {name}: {', '.join(f'{kind} {n}' for kind, n in kinds.items())}")
    print(f"cache: {paged.bytes_per_token_before} -> {paged.bytes_per_token_after} bytes a token")

    decoders = {
        "fused": Decoder(folder / "model.sfa.onnx", PROMPT + count),
        "paged": Decoder(folder / "model.paged.onnx", PROMPT + count),
        "rounded": Decoder(folder / "model.int8.onnx", PROMPT + count),
    }
    cache = prefill(model, prompt[:, :-1])
    for decoder in decoders.values():
        decoder.start(caches_of(cache, cache_name(model)), PROMPT - 1)
    token, expected = int(prompt[0, -1]), []
    logits: dict[str, list[np.ndarray]] = {name: [] for name in decoders}
    for _ in range(count):
        with torch.no_grad():
            given = {cache_name(model): cache, "use_cache": True}
            out = model(torch.tensor([[token]]), **given)
        expected.append(out.logits[0, -1].numpy())
        for name, decoder in decoders.items():
            logits[name].append(decoder.step(token))
        token = int(expected[-1].argmax())

    report("fused (float cache) against torch", expected, logits["fused"])
    agreement = report("paged int8 against torch", expected, logits["paged"])
    report("  of which int8 rounding explains", expected, logits["rounded"])
    report("  paged int8 against int8 rounding alone", logits["rounded"], logits["paged"])
    return 0 if agreement > 0.9 else 1


if __name__ == "__main__":
    raise SystemExit(main())
