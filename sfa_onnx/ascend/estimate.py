"""A model of speed per fused site: a roofline over public chip figures. Never a measurement.

A token is worked on by one core (a cube core and its two vector cores); cores share nothing but
memory. The stages of one token overlap ideally, so the slowest one is the bound:

    gather    selected rows from HBM to the vector cores' buffers
    vector    int8 to 16 bit with its scales (packed caches only), then softmax and rescaling
    cube      q.k over C + R, p.v over C
    copy out  scores and partial results (per 512 keys) from the cube's accumulator to memory

Cycle counts per stage follow a published cost model of the vendor's kernel (256-byte vector
operations: conversion 1 cycle, multiply 2; 13 cycles for 64 scores of softmax). The one public
measurement, bf16 at 16 heads and 2048 keys on a slightly slower chip, is 1.8 times its bound, so
expect 50-60 % of these bounds from a good kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import onnx

from sfa_onnx.ascend.cann import DEFAULT_CANN, cann
from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.operators import Site
from sfa_onnx.ascend.checks.plugin import OWN_PLUGINS
from sfa_onnx.ascend.checks.view import ModelView, contract_of
from sfa_onnx.ascend.chips import Chip, chip_of
from sfa_onnx.ascend.copies import CopyEstimate, copies, dim_size, dims_product
from sfa_onnx.ascend.layer import LayerLine, layer_costs
from sfa_onnx.errors import UsageError
from sfa_onnx.files.model import load_model
from sfa_onnx.guard.doors import door
from sfa_onnx.operator.op import EXPANDED, LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER
from sfa_onnx.passes.graph.provenance import site_of

__all__ = ["LABEL", "CopyEstimate", "Estimate", "SiteEstimate", "estimate"]

LABEL: Final = "a model from public chip figures, not a measurement"
DEFAULT_SOC: Final = "Ascend910_9391"

_GATHER: Final = 33.7e9  # bytes/s of one vector core while all of them gather
_COPY_OUT: Final = 70e9  # bytes/s from a cube core's accumulator to memory
_LANES: Final = 64  # float32 numbers in one vector operation (256 bytes)
_DEQUANT_CYCLES: Final = (
    4.5  # per 64 int8 numbers: to fp16 0.5, to fp32 1, times scale 2, to bf16 1
)
_SOFTMAX_CYCLES: Final = 13.0  # per 64 scores
_SCORE_CYCLES: Final = 4.0  # per 64 index scores: relu 1, times weight 2, sum 1
_BLOCK: Final = 512  # keys per pass of the kernel
_VECTORS: Final = 2  # vector cores per cube core
_US: Final = 1e6


@dataclass(frozen=True)
class SiteEstimate:
    """One fused node. Times in microseconds; None where the model's dims are open.

    `stages` are per query token on one core; `bound` names the slowest. `us` is the whole node on
    the die: ceil(tokens / cores) rounds of one token each.
    """

    node: str  # the site's name, as `fuse` and `inspect` call it
    op_type: str
    tokens: int | None
    heads: int
    keys: int  # selected (or scored) keys per token
    bytes_per_token: int
    flops_per_token: int
    stages: dict[str, float]
    bound: str
    us_per_token: float
    us: float | None
    note: str = ""

    @property
    def flop_per_byte(self) -> float:
        """Arithmetic intensity."""
        return self.flops_per_token / max(self.bytes_per_token, 1)


@dataclass
class Estimate:
    """All sites of a model on one die; `label` must be shown with the numbers."""

    soc_version: str
    chip: Chip
    sites: list[SiteEstimate]
    copies: list[CopyEstimate]
    notes: list[str] = field(default_factory=list)
    label: str = LABEL
    layers: list[LayerLine] = field(default_factory=list)  # one per CANN line
    us: float | None = field(init=False)  # sites and copies together; None when any part is open

    def __post_init__(self) -> None:
        parts = [*(s.us for s in self.sites), *(c.us for c in self.copies)]
        known = [p for p in parts if p is not None]
        self.us = sum(known) if len(known) == len(parts) else None


@door
def estimate(
    model: onnx.ModelProto,
    *,
    soc_version: str | None = None,
    dims: Mapping[str, int] | None = None,
    before: onnx.ModelProto | None = None,
    layer: bool = True,
) -> Estimate:
    """The roofline of every fused node of `model`.

    Args:
        model: a fused model, canonical or ATC flavour; its weights are not read.
        soc_version: the chip ("Ascend910_9391"); None: one die of an A3.
        dims: numbers for symbolic dims ({"batch": 4}).
        before: the model before fusing, to count its nodes and copies beside those of `model`.
        layer: count nodes per engine and copies for every CANN line (it converts the model).

    Raises:
        UsageError: an unknown chip, or one without public figures.
        ModelError: the model breaks the format's rules.
    """
    soc = soc_version or DEFAULT_SOC
    chip = chip_of(soc)
    if chip is None:
        raise UsageError(
            f"no public figures for {soc}: estimates exist for Ascend910B1 to B4 and Ascend910_93xx"
        )
    model = load_model(model)
    ctx = Context(ModelView(model), cann(DEFAULT_CANN), OWN_PLUGINS, soc)
    bound = dict(dims or {})
    sites = [s for node in ctx.nodes() if (s := _site(ctx, node, chip, bound)) is not None]
    copied = list(copies(ctx, chip, bound))
    result = Estimate(soc, chip, sites, copied)
    if layer:
        result.layers = layer_costs(model if before is None else before, model, chip, soc, bound)
    if soc_version is None:
        result.notes.append(f"no SoC given: the figures of {chip.name}")
    if any(s.us is None for s in sites):
        result.notes.append("open dims: give numbers (dims) for times of whole nodes")
    if copied:
        result.notes.append(
            "caches are copied whole, through graph inputs and outputs, at every call"
        )
    return result


def _site(ctx: Context, node: Node, chip: Chip, bound: Mapping[str, int]) -> SiteEstimate | None:
    op = contract_of(node.proto)
    if op is None or op in EXPANDED:
        return None
    site = Site(ctx, node, op)
    query = site.dims("query")
    heads = dim_size(query, -2, bound)
    tokens = dims_product(query[:-2], bound) if query is not None else None
    if heads is None:
        return None
    if op in (LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER):
        return _indexer(site, chip, bound, heads, tokens)
    return _attention(site, chip, bound, heads, tokens)


def _attention(
    site: Site, chip: Chip, bound: Mapping[str, int], heads: int, tokens: int | None
) -> SiteEstimate | None:
    dim, row = dim_size(site.dims("query"), -1, bound), dim_size(site.dims("key"), -1, bound)
    slots = dim_size(site.dims("sparse_indices"), -1, bound)
    if dim is None or row is None or slots is None:
        return None
    packed = site.dtype("key") == onnx.TensorProto.INT8
    rope = int(site.attr("rope_head_dim") or 0) if packed else 0
    rope = rope or (dim_size(site.dims("query_rope"), -1, bound) or 0)
    nope = dim - rope if packed else dim
    keys = _selected(site, slots * int(site.attr("sparse_block_size") or 1), bound)
    row_bytes = row if packed else (row + rope) * _itemsize(site)
    traffic = keys * row_bytes + heads * (2 * nope + rope) * _itemsize(site)
    flops = 2 * heads * keys * (2 * nope + rope)
    stages = _stages(chip, heads, keys, nope, row_bytes, flops, packed)
    return _made(site, chip, tokens, heads, keys, traffic, flops, stages)


def _selected(site: Site, wanted: int, bound: Mapping[str, int]) -> int:
    """Keys per token: what is selected, at most as many as there are."""
    if site.attr("layout_kv") == "BSND":
        have = dim_size(site.dims("key"), 1, bound)
        return wanted if have is None else min(wanted, have)
    return wanted


def _itemsize(site: Site) -> int:
    return 4 if site.dtype("query") == onnx.TensorProto.FLOAT else 2


def _stages(
    chip: Chip, heads: int, keys: int, nope: int, row_bytes: int, flops: int, packed: bool
) -> dict[str, float]:
    """Microseconds per token on one core."""
    vector = _VECTORS * chip.clock_hz
    dequant = keys * nope / _LANES * _DEQUANT_CYCLES / vector if packed else 0.0
    softmax = heads * keys / _LANES * _SOFTMAX_CYCLES / vector
    blocks = -(-keys // _BLOCK)
    copied = 4 * heads * (keys + nope * blocks)
    seconds = {
        "gather": keys * row_bytes / (_VECTORS * _GATHER),
        "vector": dequant + softmax,
        "cube": flops / (chip.flops / chip.cube_cores),
        "copy out": copied / _COPY_OUT,
    }
    return {name: s * _US for name, s in seconds.items()}


def _made(
    site: Site,
    chip: Chip,
    tokens: int | None,
    heads: int,
    keys: int,
    traffic: int,
    flops: int,
    stages: dict[str, float],
) -> SiteEstimate:
    bound = max(stages, key=stages.__getitem__)
    rounds = None if tokens is None else -(-tokens // chip.cube_cores)
    note = ""
    if tokens is not None and tokens < chip.cube_cores:
        note = f"{tokens} tokens keep {tokens} of {chip.cube_cores} cores busy"
    return SiteEstimate(
        site_of(site.node.name),
        site.node.op_type,
        tokens,
        heads,
        keys,
        traffic,
        flops,
        stages,
        bound,
        stages[bound],
        None if rounds is None else rounds * stages[bound],
        note,
    )


def _indexer(
    site: Site, chip: Chip, bound: Mapping[str, int], heads: int, tokens: int | None
) -> SiteEstimate | None:
    """Scores of all keys: compute against the key cache read once per token."""
    dim, key = dim_size(site.dims("query"), -1, bound), site.dims("key")
    keys = dims_product(key[1:-2], bound) if key is not None and len(key) == 4 else None
    if site.attr("layout_key") == "PA_BSND":
        table = site.dims("block_table")
        pages, size = dim_size(table, 1, bound), dim_size(key, 1, bound)
        keys = None if pages is None or size is None else pages * size
    if dim is None or keys is None:
        return None
    item = 1 if site.dtype("key") == onnx.TensorProto.INT8 else 2
    traffic, flops = keys * dim * item, 2 * heads * keys * dim
    rate = chip.flops / chip.cube_cores * (2 if item == 1 else 1)
    seconds = {
        "gather": traffic / (_VECTORS * _GATHER),
        "vector": heads * keys / _LANES * _SCORE_CYCLES / (_VECTORS * chip.clock_hz),
        "cube": flops / rate,
    }
    stages = {name: s * _US for name, s in seconds.items()}
    return _made(site, chip, tokens, heads, keys, traffic, flops, stages)
