"""Export the model that `sfa-onnx demo` works on: one DeepSeek-V3.2-style decode layer.

    python examples/export_demo.py [-o sfa_onnx/demo/decode_layer.onnx] [--dtype f16|f32]

Attention has the widths of the real thing (latent 512, rope 64), everything else is small. The
file holds the graph only: every weight is a reference into `decode_layer.weights`, which
`sfa_onnx.demo.materialise` fills from a seed. How a weight is drawn stands in its doc string.
Needs torch.
"""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn

HIDDEN, Q_RANK, HEADS, LATENT, ROPE, NOPE, VALUE = 256, 192, 16, 512, 64, 128, 128
INDEX_HEADS, INDEX_WIDTH, TOPK = 16, 64, 256
WEIGHTS = "decode_layer.weights"
INPUTS = ("hidden", "position", "past_latent", "past_rope", "past_index_key")
OUTPUTS = ("hidden_out", "latent", "rope", "index_key")


class RootMeanSquare(nn.Module):
    """Normalises the last axis by its root mean square, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return unit.type_as(x) * self.weight


def rotate(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, 1, ..., ROPE] at `position` [B], first half paired with second."""
    half = ROPE // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = position.reshape(-1, *([1] * (x.dim() - 1))).float() * frequency
    low, high = x.float().split(half, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).type_as(x)


class Indexer(nn.Module):
    """Scores every cached token with small heads and keeps the best TOPK."""

    def __init__(self) -> None:
        super().__init__()
        self.wq_b = nn.Linear(Q_RANK, INDEX_HEADS * INDEX_WIDTH, bias=False)
        self.wk = nn.Linear(HIDDEN, INDEX_WIDTH, bias=False)
        self.k_norm = RootMeanSquare(INDEX_WIDTH)
        self.head_weights = nn.Linear(HIDDEN, INDEX_HEADS, bias=False)

    def forward(self, x, q_rank, past_key):
        query = self.wq_b(q_rank).unflatten(-1, (INDEX_HEADS, INDEX_WIDTH))
        key = torch.cat([past_key, self.k_norm(self.wk(x))], dim=1)
        score = torch.einsum("bshd,btd->bsht", query, key) * INDEX_WIDTH**-0.5
        weight = self.head_weights(x) * INDEX_HEADS**-0.5
        score = (torch.relu(score) * weight.unsqueeze(-1)).float().sum(dim=2)
        return score.topk(TOPK, dim=-1).indices, key


class SparseAttention(nn.Module):
    """Latent attention in its absorbed form, over the tokens the indexer selected."""

    def __init__(self) -> None:
        super().__init__()
        self.wq_a = nn.Linear(HIDDEN, Q_RANK, bias=False)
        self.q_norm = RootMeanSquare(Q_RANK)
        self.wq_b = nn.Linear(Q_RANK, HEADS * (NOPE + ROPE), bias=False)
        self.wkv_a = nn.Linear(HIDDEN, LATENT + ROPE, bias=False)
        self.kv_norm = RootMeanSquare(LATENT)
        self.wkv_b = nn.Linear(LATENT, HEADS * (NOPE + VALUE), bias=False)
        self.wo = nn.Linear(HEADS * VALUE, HIDDEN, bias=False)
        self.indexer = Indexer()

    def forward(self, x, position, past_latent, past_rope, past_index_key):
        q_rank = self.q_norm(self.wq_a(x))
        query = self.wq_b(q_rank).unflatten(-1, (HEADS, NOPE + ROPE))
        q_nope, q_rope = query.split([NOPE, ROPE], dim=-1)
        new_latent, new_rope = self.wkv_a(x).split([LATENT, ROPE], dim=-1)
        latent = torch.cat([past_latent, self.kv_norm(new_latent)], dim=1)
        rope = torch.cat([past_rope, rotate(new_rope, position)], dim=1)
        chosen, index_key = self.indexer(x, q_rank, past_index_key)

        expand = self.wkv_b.weight.view(HEADS, NOPE + VALUE, LATENT)
        q_latent = torch.einsum("bshd,hdc->bshc", q_nope, expand[:, :NOPE])
        score = torch.einsum("bshc,btc->bsht", q_latent, latent)
        score = score + torch.einsum("bshr,btr->bsht", rotate(q_rope, position), rope)
        score = score.float() * (NOPE + ROPE) ** -0.5
        hidden = torch.full_like(score[:, :, 0], float("-inf")).scatter(-1, chosen, 0.0)
        weight = (score + hidden.unsqueeze(2)).softmax(dim=-1).type_as(x)
        mixed = torch.einsum("bsht,btc->bshc", weight, latent)
        out = torch.einsum("bshc,hdc->bshd", mixed, expand[:, NOPE:])
        return self.wo(out.flatten(2)), latent, rope, index_key


class DecoderLayer(nn.Module):
    """Norm, attention, residual; norm, gated feed-forward, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.ffn_norm = RootMeanSquare(HIDDEN), RootMeanSquare(HIDDEN)
        self.self_attn = SparseAttention()
        self.gate = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden, position, *caches):
        attended, *caches = self.self_attn(self.attn_norm(hidden), position, *caches)
        hidden = hidden + attended
        x = self.ffn_norm(hidden)
        gated = nn.functional.silu(self.gate(x)) * self.up(x)
        return (hidden + self.down(gated), *caches)


class Model(nn.Module):
    """The layer under the names that real models use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer()])

    def forward(self, hidden, position, past_latent, past_rope, past_index_key):
        return self.layers[0](hidden, position, past_latent, past_rope, past_index_key)


def export(dtype: torch.dtype, past: int = 2047) -> onnx.ModelProto:
    """The exported layer, batch and cache length open."""
    model = Model().to(dtype).eval()
    args = (
        torch.zeros(2, 1, HIDDEN, dtype=dtype),
        torch.full((2,), past),
        torch.zeros(2, past, LATENT, dtype=dtype),
        torch.zeros(2, past, ROPE, dtype=dtype),
        torch.zeros(2, past, INDEX_WIDTH, dtype=dtype),
    )
    batch, length = torch.export.Dim("batch"), torch.export.Dim("past_len")
    only, both = {0: batch}, {0: batch, 1: length}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            args,
            dynamo=True,
            verbose=False,
            opset_version=18,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_shapes=(only, only, both, both, both),
        )
    return program.model_proto


def _recipe(name: str, dims: list[int]) -> str:
    """How `sfa_onnx.demo` draws this weight: matrices keep the variance of what they multiply."""
    if len(dims) == 1:
        return "normal mean=1 std=0.1"
    fan_in = dims[1] if name.endswith("wkv_b.weight") else dims[0]  # the others are transposed
    return f"normal mean=0 std={fan_in**-0.5:.6f}"


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn every weight into a reference to the weights file; drop traces of this machine."""
    offset = 0
    for tensor in model.graph.initializer:
        count = 1
        for d in tensor.dims:
            count *= d
        if count < 64 or tensor.data_type == onnx.TensorProto.INT64:
            continue
        length = count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        tensor.doc_string = _recipe(tensor.name, list(tensor.dims))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        offset += -(-length // 64) * 64
    for node in model.graph.node:
        kept = [p for p in node.metadata_props if p.key.endswith("name_scopes")]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    del model.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    model.producer_version = re.sub(r"\+.*", "", model.producer_version)
    return model


def main() -> None:
    home = Path(__file__).resolve().parent.parent / "sfa_onnx" / "demo" / "decode_layer.onnx"
    parser = argparse.ArgumentParser(description="Export the demo's decode layer.")
    parser.add_argument("-o", "--output", type=Path, default=home)
    parser.add_argument("--dtype", choices=("f16", "f32"), default="f16")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    dtype = torch.float16 if args.dtype == "f16" else torch.float32
    args.output.write_bytes(without_weights(export(dtype)).SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
