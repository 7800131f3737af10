"""Decode token by token over a paged int8 cache, under the name of the operator's document.

    python examples/paged_decode.py

Two sequences of different length. Each step packs one latent per sequence into its page, attends to
2048 keys at most, and is checked against attention over the unpacked cache.
"""

import torch

import sfa_onnx.torch
from sfa_onnx.torch import cache

HEADS, NOPE, ROPE, BLOCK, PAGES, COUNT, SCALE = 16, 512, 64, 16, 8, 2048, 576**-0.5

sfa_onnx.torch.enable_ascend_names()
torch.manual_seed(0)
pages = torch.zeros(2 * PAGES, BLOCK, 1, 656, dtype=torch.int8)
table = torch.randperm(2 * PAGES).reshape(2, PAGES).int()  # pages of a sequence, in any order
lengths = torch.tensor([40, 7], dtype=torch.int32)


def write(tokens: torch.Tensor, sequence: int, rows: torch.Tensor) -> None:
    """Put packed rows [n, 1, 656] at token positions of a sequence, in place."""
    slots = table[sequence, tokens // BLOCK] * BLOCK + tokens % BLOCK
    pages.view(-1, 656)[slots.long()] = rows.squeeze(1)


def latents(count: int) -> torch.Tensor:
    """What a model would give: latents and ropes of some tokens, packed."""
    nope, rope = torch.randn(count, 1, NOPE), torch.randn(count, 1, ROPE).bfloat16()
    return torch.ops.sfa_onnx.kv_cache_pack(nope, rope=rope)


for sequence, length in enumerate(lengths.tolist()):  # the prompts
    write(torch.arange(length), sequence, latents(length))

for step in range(8):
    for sequence in range(2):
        write(lengths[sequence : sequence + 1], sequence, latents(1))
    lengths += 1
    query = torch.randn(2, 1, HEADS, NOPE + ROPE).bfloat16()
    chosen = torch.full((2, 1, 1, COUNT), -1, dtype=torch.int32)  # valid entries first, then -1
    for sequence, length in enumerate(lengths.tolist()):
        chosen[sequence, 0, 0, :length] = torch.randperm(length).int()
    out = torch.ops.custom.npu_sparse_flash_attention_antiquant(
        query, pages, pages, chosen, SCALE, 1, 2, 2, block_table=table,
        actual_seq_lengths_kv=lengths, layout_query="BSND", layout_kv="PA_BSND", sparse_mode=3,
        attention_mode=2, quant_scale_repo_mode=1, tile_size=128, rope_head_dim=64,
    )  # fmt: skip
    nope, rope, scale = cache.unpack(cache.unpage(pages, table, lengths))
    key = torch.cat((cache.dequantise(nope, scale, torch.bfloat16), rope), -1).float()
    hidden = torch.arange(key.shape[1]) >= lengths[:, None]
    scores = torch.einsum("bshd,btkd->bhst", query.float(), key) * SCALE
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    want = torch.einsum("bhst,btkd->bshd", weights, key[..., :NOPE])
    error = ((out.float() - want).norm() / want.norm()).item()
    print(f"step {step}: lengths {lengths.tolist()}, off by {error:.1e}")
    assert error < 5e-3
