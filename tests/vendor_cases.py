"""Calls in the forms of the vendors' own tests, and what those tests expect of them.

Shapes, layouts, ranges of values and tolerances are those of the public tests of
cann-recipes-infer, op-plugin, ops-transformer, vllm-ascend and PyPTO; the words are ours. All of
them dequantise to the query's type, multiply in float32, take one softmax and round its normalised
weights ("golden"), but for PyPTO's flash form, which rounds weights that are not yet divided by
their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from sfa_onnx.operator.op import (
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    OpContract,
)

NOPE, ROPE, TILE = 512, 64, 128


@dataclass
class Form:
    """One call of the int8 attention, and how its tensors are drawn."""

    name: str
    batch: int
    heads: int
    keys: int  # room per sequence
    lengths: list[int]
    queries: int = 1
    query_lengths: list[int] | None = None
    page: int = 0  # 0: keys in the query's layout
    tnd: bool = False
    count: int = 2048
    size: int = 1  # sparse_block_size
    mode: int = 3
    dtype: torch.dtype = torch.bfloat16
    scale: float = 1 / 24
    sinks: bool = False
    query: tuple[float, float] = (-10, 10)
    query_rope: tuple[float, float] = (-10, 10)
    key: tuple[float, float] = (-5, 10)
    key_rope: tuple[float, float] = (-10, 10)
    dequant: tuple[float, float] = (-100, 100)
    quantised: bool = False  # latents drawn as floats in `key` and quantised
    shared: bool = False  # one list of indices for the whole batch


def uniform(bounds: tuple[float, float], *shape: int) -> torch.Tensor:
    return torch.empty(shape).uniform_(*bounds)


@dataclass
class Call:
    """Tensors and attributes by name; keys by row for the golden."""

    op: OpContract
    tensors: dict[str, torch.Tensor]
    attributes: dict[str, Any]
    form: Any
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    starts: list[Any] = field(default_factory=list)


def attention_call(form: Form, seed: int = 0) -> Call:
    torch.manual_seed(seed)
    lengths, used_q = form.lengths, form.query_lengths or [form.queries] * form.batch
    pages = [-(-form.keys // form.page)] * form.batch if form.page else []
    if form.quantised:  # no page for tokens that nobody selects
        pages = [-(-min(n, form.count) // form.page) for n in lengths]
    total = sum(pages) * form.page or (sum(lengths) if form.tnd else form.batch * form.keys)
    rows = _packed(form, total)
    tensors: dict[str, torch.Tensor] = {}
    if form.page:
        order, at = torch.randperm(sum(pages)), 0
        table = torch.full((form.batch, -(-max(lengths) // form.page)), -1)
        for b, n in enumerate(pages):
            table[b, : min(n, table.shape[1])] = order[at : at + min(n, table.shape[1])]
            at += n
        if form.quantised:
            table[table < 0] = 0
        tensors["block_table"] = table.int()
        key, starts = rows.view(-1, form.page, 1, rows.shape[-1]), list(table)
    elif form.tnd:
        ends = torch.tensor(lengths).cumsum(0)
        key, starts = rows.unsqueeze(1), [int(e) - n for e, n in zip(ends, lengths, strict=True)]
    else:
        key = rows.view(form.batch, form.keys, 1, -1)
        starts = [b * form.keys for b in range(form.batch)]
    lead = (sum(used_q),) if form.tnd else (form.batch, form.queries)
    query = torch.cat((uniform(form.query, *lead, form.heads, NOPE),
                       uniform(form.query_rope, *lead, form.heads, ROPE)), -1)  # fmt: skip
    tensors |= {"query": query.to(form.dtype), "key": key, "value": key}
    tensors["sparse_indices"] = _indices(form, used_q).view(*lead, 1, form.count)
    sums = (lambda n: torch.tensor(n).cumsum(0).int()) if form.tnd else lambda n: torch.tensor(n).int()  # noqa: E501  # fmt: skip
    tensors["actual_seq_lengths_query"] = sums(used_q)
    tensors["actual_seq_lengths_kv"] = torch.tensor(lengths).int() if form.page else sums(lengths)
    if form.sinks:
        tensors["sinks"] = uniform((-0.2, 0.2), form.heads)
    layout = "TND" if form.tnd else "BSND"
    attributes = {
        "scale_value": form.scale, "sparse_block_size": form.size, "key_quant_mode": 2,
        "value_quant_mode": 2, "layout_query": layout, "attention_mode": 2,
        "layout_kv": "PA_BSND" if form.page else layout, "sparse_mode": form.mode,
        "quant_scale_repo_mode": 1, "tile_size": TILE, "rope_head_dim": ROPE,
    }  # fmt: skip
    return Call(SPARSE_FLASH_ATTENTION_ANTIQUANT, tensors, attributes, form, rows, starts)


def _packed(form: Form, total: int) -> torch.Tensor:
    """[total, 656] int8."""
    latent = uniform(form.key, total, NOPE)
    if form.quantised:
        tiles = latent.to(form.dtype).float().unflatten(-1, (-1, TILE))
        scale = tiles.abs().amax(-1).clamp_min(1e-8) / 127
        nope = torch.round(tiles / scale[..., None]).clamp(-128, 127).flatten(-2).to(torch.int8)
    else:
        nope, scale = latent.to(torch.int8), uniform(form.dequant, total, NOPE // TILE)
    rope = uniform(form.key_rope, total, ROPE).to(form.dtype)
    return torch.cat((nope, rope.view(torch.int8), scale.view(torch.int8)), -1)


def _visible(form: Form, used_q: list[int], b: int, s: int) -> int:
    length = form.lengths[b]
    return max(length if form.mode == 0 else length - used_q[b] + s + 1, 0)


def _indices(form: Form, used_q: list[int]) -> torch.Tensor:
    """Random visible blocks, the last one always among them; -1 behind."""
    shared = torch.randperm(min(form.lengths) - form.queries + 1)[: form.count]
    listed = []
    for b in range(form.batch):
        for s in range(used_q[b] if form.tnd else form.queries):
            row = torch.full((form.count,), -1)
            blocks = -(-_visible(form, used_q, b, s) // form.size)
            chosen = min(blocks, form.count)
            if form.shared:
                row = shared
            elif form.quantised:  # PyPTO's: always among the first
                row[:chosen] = torch.randperm(chosen)
            elif chosen:
                row[: chosen - 1] = torch.randperm(blocks - 1)[: chosen - 1]
                row[chosen - 1] = blocks - 1
            listed.append(row)
    return torch.stack(listed).int()


def attention_golden(call: Call, flash: bool = False) -> torch.Tensor:
    """What the vendors' tests expect, in float32, in the call's output shape."""
    form: Form = call.form
    query = call.tensors["query"]
    out = torch.zeros(*query.shape[:-1], NOPE)
    flat_q, flat_out = query.view(-1, form.heads, NOPE + ROPE), out.view(-1, form.heads, NOPE)
    indices = call.tensors["sparse_indices"].view(-1, form.count)
    sinks = call.tensors.get("sinks")
    for row, b, visible in _rows(form):
        listed = indices[row][: -(-visible // form.size)]
        listed = listed[listed >= 0].long()
        tokens = (listed[:, None] * form.size + torch.arange(form.size)).flatten()
        tokens = tokens[tokens < visible]
        if not len(tokens):
            continue
        keys = _dequantised(call, b, tokens)
        scores = flat_q[row].float() @ keys.float().T * form.scale
        top = scores.amax(-1, keepdim=True)
        if sinks is not None:
            top = torch.maximum(top, sinks[:, None])
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks[:, None] - top)
        if not flash:
            weights, total = weights / total, torch.ones(())
        weights = weights.to(form.dtype).float()
        flat_out[row] = weights @ keys[:, :NOPE].float() / total
    return out


def _rows(form: Form) -> Iterator[tuple[int, int, int]]:
    """Row, its sequence and how many keys it sees."""
    used_q, row = form.query_lengths or [form.queries] * form.batch, 0
    for b in range(form.batch):
        for s in range(used_q[b] if form.tnd else form.queries):
            if s < used_q[b]:
                yield row, b, _visible(form, used_q, b, s)
            row += 1


def _dequantised(call: Call, b: int, tokens: torch.Tensor) -> torch.Tensor:
    """[n, 576] in the query's type."""
    form, start = call.form, call.starts[b]
    if form.page:
        at = start[tokens // form.page] * form.page + tokens % form.page
    else:
        at = start + tokens
    rows = call.rows[at]
    scale = rows[:, -16:].contiguous().view(torch.float32).repeat_interleave(TILE, -1)
    latent = (rows[:, :NOPE].float() * scale).to(form.dtype)
    return torch.cat((latent, rows[:, NOPE:-16].contiguous().view(form.dtype)), -1)


@dataclass
class IndexerForm:
    """One call of the int8 indexer: 64 heads of 128, pages of 128 keys in order."""

    name: str
    batch: int
    keys: int
    lengths: list[int] | None = None
    queries: int = 1
    ends: list[int] | None = None  # of packed queries
    mode: int = 0
    count: int = 2048
    heads: int = 64
    few: bool = False  # PyPTO's: small integers, scales of their own
    scales: tuple[float, float] = (0, 10)
    weights: tuple[float, float] = (0, 0.01)


def indexer_call(form: IndexerForm, seed: int = 0) -> Call:
    torch.manual_seed(seed)
    columns = -(-form.keys // 128)
    lengths = form.lengths or [form.keys] * form.batch
    need = [-(-n // 128) for n in lengths]
    table, pages = torch.zeros(form.batch, columns, dtype=torch.int32), sum(need)
    for b, n in enumerate(need):
        table[b, :n] = torch.arange(n) + sum(need[:b])
    lead = (form.ends[-1],) if form.ends else (form.batch, form.queries)
    draw: Callable[..., torch.Tensor] = lambda *s: uniform((-128, 127), *s).to(torch.int8)  # noqa: E731
    query, key = draw(*lead, form.heads, 128), draw(pages, 128, 1, 128)
    scale_q, scale_k = uniform(form.scales, *lead, form.heads), uniform(form.scales, pages, 128, 1)
    weights = uniform(form.weights, *lead, form.heads)
    if form.few:
        (query, scale_q), (key, scale_k) = (
            _few(torch.randn(x.shape).trunc()) for x in (query, key)
        )
        weights = torch.randn(weights.shape)
    used_q = form.ends or [form.queries] * form.batch
    tensors = {
        "query": query, "key": key, "weights": weights.half(),
        "query_dequant_scale": scale_q.half(), "key_dequant_scale": scale_k.half(),
        "actual_seq_lengths_query": torch.tensor(used_q).int(),
        "actual_seq_lengths_key": torch.tensor(lengths).int(), "block_table": table,
    }  # fmt: skip
    attributes = {
        "query_quant_mode": 0, "key_quant_mode": 0, "layout_key": "PA_BSND",
        "layout_query": "TND" if form.ends else "BSND", "sparse_count": form.count,
        "sparse_mode": form.mode,
    }  # fmt: skip
    return Call(QUANT_LIGHTNING_INDEXER, tensors, attributes, form)


def _few(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().clamp_min(1e-3)
    return torch.round(x / scale).clip(-127, 127).to(torch.int8), scale.squeeze(-1)


def indexer_golden(call: Call) -> torch.Tensor:
    """[rows, count]: weights * scale and relu / 1024 in float16, sums in float32, stable order."""
    form, t = call.form, call.tensors
    flat = t["query"].view(-1, form.heads, 128).float()
    weights = (t["weights"] * t["query_dequant_scale"]).view(-1, form.heads).float()
    out = torch.full((len(flat), form.count), -1, dtype=torch.int32)
    first = 0
    for b in range(form.batch):
        last = form.ends[b] if form.ends else first + form.queries
        length = int(t["actual_seq_lengths_key"][b])
        pages = t["block_table"][b, : math.ceil(length / 128)].long()
        keys = t["key"][pages].view(-1, 128)[:length].float()
        scale = t["key_dequant_scale"][pages].view(-1)[:length].float()
        for row in range(first, last):
            half = (torch.relu(flat[row] @ keys.T) / 1024).half().float()
            scores = (weights[row] @ half) * scale
            visible = length if form.mode == 0 else max(length - (last - row - 1), 0)
            order = torch.sort(scores[:visible], descending=True, stable=True).indices
            out[row, : min(visible, form.count)] = order[: form.count].int()
        first = last
    return out
