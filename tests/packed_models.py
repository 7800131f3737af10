"""Hand-written attention graphs over packed int8 rows, decoded in many ways (and wrong ones)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.op import PackedRow
from tests.zoo.base import NP_TYPES, Feeds
from tests.zoo.write import KINDS, Graph

_FIELDS = {"f16": (10, 5, 15), "bf16": (7, 8, 127), "f32": (23, 8, 127)}


@dataclass(frozen=True)
class Spec:
    """Sizes, how rows are found and how they are decoded; `wrong` names one mistake."""

    B: int = 2
    S1: int = 2
    N: int = 3
    S2: int = 24
    K: int = 8
    C: int = 32
    R: int = 8
    tile: int = 16
    block: int = 8
    dtype: str = "f16"  # of the query and of the rope bytes
    query: str = ""  # of the query, where it differs
    out: str = ""  # type of the output (default: the query's)
    decode: str = "bitcast"
    find: str = "nd"
    rank: int = 4  # of the cache
    late: bool = False  # decode the whole cache, then gather
    tiles: str = "reshape"
    split: bool = False  # query and scores in two parts
    masked: bool = True
    dynamic: bool = False
    wrong: str = ""

    @property
    def opset(self) -> int:
        return 26 if self.decode in ("bitcast", "strided") else 18

    @property
    def row(self) -> PackedRow:
        return PackedRow(self.C, self.R, self.tile, 4 if self.dtype == "f32" else 2)

    @property
    def paged(self) -> bool:
        return self.find.startswith("page")


class _Decoder:
    """Bytes [..., n] int8 to numbers, over tensors of `rank` axes."""

    def __init__(self, g: Graph, s: Spec, rank: int) -> None:
        self.g, self.s, self.lead = g, s, [0] * (rank - 1)

    def byte(self, x: str) -> str:
        """0..255 as int64."""
        g, how = self.g, self.s.decode
        if how == "mod":
            wide = g.op("Add", g.cast(x, "i64"), g.const(256, np.int64))
            return g.op("Mod", wide, g.const(256, np.int64))
        if how == "where":
            wide = g.cast(x, "i64")
            low = g.op("Less", wide, g.const(0, np.int64))
            return g.op("Where", low, g.op("Add", wide, g.const(256, np.int64)), wide)
        return g.op("BitwiseAnd", g.cast(x, "i64"), g.const(255, np.int64))

    def numbers(self, x: str, count: int, kind: str) -> str:
        """[..., count * size] int8 -> [..., count] float32."""
        size = 4 if kind == "f32" else 2
        order = range(size)[::-1] if self.s.wrong == "big-endian" else range(size)
        if self.s.decode in ("bitcast", "strided"):
            return self._cast_bits(x, count, size, list(order), kind)
        code = self._code(x, count, size, list(order))
        if self.s.decode == "table" and size == 2:
            table = np.arange(1 << 16, dtype=np.uint16).view(NP_TYPES[kind]).astype(np.float32)
            return self.g.op("Gather", self.g.const(np.nan_to_num(table)), code)
        return self._fields(code, kind)

    def _cast_bits(self, x: str, count: int, size: int, order: list[int], kind: str) -> str:
        g = self.g
        word = TensorProto.UINT16 if size == 2 else TensorProto.UINT32
        np_word = np.uint16 if size == 2 else np.uint32
        parts = g.op("BitCast", x, to=TensorProto.UINT8)
        if self.s.decode != "strided":
            parts = g.reshape(parts, *self.lead, count, size)
        total = ""
        for i, place in enumerate(order):
            if self.s.decode == "strided":
                cut = [g.ints(i), g.ints(np.iinfo(np.int64).max), g.ints(-1), g.ints(size)]
                one = g.op("Slice", parts, *cut)
            else:
                one = g.op("Gather", parts, g.const(i, np.int64), axis=-1)
            one = g.op("Cast", one, to=word)
            if place:
                one = g.op("BitShift", one, g.const(8 * place, np_word), direction="LEFT")
            total = g.op("BitwiseOr", total, one) if total else one
        return g.cast(g.op("BitCast", total, to=KINDS[kind]), "f32")

    def _code(self, x: str, count: int, size: int, order: list[int]) -> str:
        g = self.g
        parts = g.reshape(self.byte(x), *self.lead, count, size)
        weights = [256**i for i in order]
        if self.s.decode == "where":
            product = g.op("MatMul", g.op("Cast", parts, to=11), g.const(weights, np.float64))
            return g.cast(product, "i64")
        return g.reduce("ReduceSum", g.op("Mul", parts, g.const(weights, np.int64)), -1, 0)

    def _fields(self, code: str, kind: str) -> str:
        """Sign, exponent and mantissa put together in double (float32 for "where")."""
        g = self.g
        mantissa, exponent, bias = _FIELDS[kind]
        real, to = (np.float32, 1) if self.s.decode == "where" else (np.float64, 11)
        f = lambda v: g.op("Cast", v, to=to)  # noqa: E731
        c = lambda v: g.const(v, real)  # noqa: E731
        low = g.op("Mod", code, g.const(2**mantissa, np.int64))
        rest = g.op("Div", code, g.const(2**mantissa, np.int64))
        power = g.op("Mod", rest, g.const(2**exponent, np.int64))
        sign = g.op(
            "Equal", g.op("Div", rest, g.const(2**exponent, np.int64)), g.const(1, np.int64)
        )
        tiny = g.op("Equal", power, g.const(0, np.int64))
        fraction = g.op("Mul", f(low), c(2.0**-mantissa))
        normal = g.op("Mul", g.op("Add", fraction, c(1.0)), self._power(f(power), -bias, c))
        flushed = self.s.wrong == "no subnormals" or (self.s.decode == "where" and kind != "f16")
        small = g.op("Mul", fraction, c(0.0 if flushed else 2.0 ** (1 - bias)))
        size = g.op("Where", tiny, small, normal)
        return g.cast(g.op("Where", sign, g.op("Neg", size), size), "f32")

    def _power(self, exponent: str, bias: int, c) -> str:
        return self.g.op("Pow", c(2.0), self.g.op("Add", exponent, c(float(bias))))

    def nope(self, x: str) -> str:
        g, wrong = self.g, self.s.wrong
        if wrong == "unsigned":
            return g.cast(self.byte(x), "f32")
        if wrong == "fp8":
            import ml_dtypes

            table = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
            table = np.nan_to_num(table.astype(np.float32))
            return g.op("Gather", g.const(table), self.byte(x))
        if self.s.decode == "where":  # a round trip through unsigned bytes
            wide = self.byte(x)
            high = g.op("Greater", wide, g.const(127, np.int64))
            signed = g.op("Sub", wide, g.const(256, np.int64))
            return g.cast(g.op("Where", high, signed, wide), "f32")
        return g.cast(x, "f32")

    def latent(self, nope: str, scale: str) -> str:
        """Scales applied per tile."""
        g, s = self.g, self.s
        count = s.C // s.tile
        if s.wrong == "other tile":
            order = g.const(np.arange(count)[::-1].copy(), np.int64)
            scale = g.op("Gather", scale, order, axis=-1)
        if s.wrong == "interleaved":
            wide = g.reshape(nope, *self.lead, s.tile, count)
            return g.reshape(g.op("Mul", wide, g.unsqueeze(scale, -2)), *self.lead, s.C)
        if s.tiles == "concat":
            parts = [
                g.op("Mul", g.cut(nope, t * s.tile, (t + 1) * s.tile), g.cut(scale, t, t + 1))
                for t in range(count)
            ]
            return g.op("Concat", *parts, axis=-1)
        if s.tiles == "repeat":
            ones = g.const(np.ones(s.tile), np.float32)
            wide = g.op("Mul", g.unsqueeze(scale, -1), ones)
            return g.op("Mul", nope, g.reshape(wide, *self.lead, s.C))
        wide = g.reshape(nope, *self.lead, count, s.tile)
        return g.reshape(g.op("Mul", wide, g.unsqueeze(scale, -1)), *self.lead, s.C)


def _decoded(g: Graph, s: Spec, rows: str, rank: int) -> tuple[str, str]:
    """(latent, rope) float32 of packed rows."""
    row, d = s.row, _Decoder(g, s, rank)
    rope_at, scale_at = row.rope_offset, row.scale_offset
    if s.wrong == "swapped":
        rope_at, scale_at = row.nope + 4 * row.tiles, row.nope
    kind = {"other float": "bf16" if s.dtype == "f16" else "f16"}.get(s.wrong, s.dtype)
    scale = d.numbers(g.cut(rows, scale_at, scale_at + 4 * row.tiles), row.tiles, "f32")
    rope = ""
    if s.R:
        rope = d.numbers(g.cut(rows, rope_at, rope_at + s.R * row.itemsize), s.R, kind)
    clip = lambda x: g.op("Clip", x, *(g.const(v, np.float32) for v in (-100.0, 100.0)))  # noqa: E731
    scale = clip(scale) if s.wrong == "clipped scales" else scale
    rope = clip(rope) if s.wrong == "clipped ropes" else rope
    return d.latent(d.nope(g.cut(rows, 0, s.C)), scale), rope


def _cache(g: Graph, s: Spec) -> str:
    """The cache as [B, S2, D] or [blocks, block, D]."""
    return g.squeeze("key", 2) if s.rank == 4 else "key"


def _gather(g: Graph, s: Spec, x: str, idx: str, width: int) -> str:
    """Rows [B, S1, K, width] of x [B, S2, width] or [blocks, block, width]."""
    if s.find.startswith("paged"):
        page = g.op("Div", idx, g.const(s.block, np.int64))
        slot = g.op("Mod", idx, g.const(s.block, np.int64))
        table = g.cast("block_table", "i64")
        block = g.op("GatherND", table, g.unsqueeze(page, -1), batch_dims=1)
        if s.find == "paged-two":
            both = g.op("Concat", g.unsqueeze(block, -1), g.unsqueeze(slot, -1), axis=-1)
            return g.op("GatherND", x, both)
        flat = g.op("Add", g.op("Mul", block, g.const(s.block, np.int64)), slot)
        return g.op("Gather", g.reshape(x, -1, width), flat, axis=0)
    if s.find == "pages gathered":
        whole = g.op("Gather", x, g.cast("block_table", "i64"), axis=0)
        whole = g.reshape(whole, s.B, s.S2, width)
        return g.op("GatherND", whole, g.unsqueeze(idx, -1), batch_dims=1)
    if s.find == "flat":
        starts = g.const(np.arange(s.B).reshape(-1, 1, 1) * s.S2, np.int64)
        return g.op("Gather", g.reshape(x, -1, width), g.op("Add", idx, starts), axis=0)
    if s.find == "elements":
        flat = g.reshape(idx, s.B, s.S1 * s.K, 1)
        wide = g.op("Expand", flat, g.ints(1, 1, width))
        rows = g.op("GatherElements", x, wide, axis=1)
        return g.reshape(rows, s.B, s.S1, s.K, width)
    return g.op("GatherND", x, g.unsqueeze(idx, -1), batch_dims=1)


def _masked(g: Graph, s: Spec, idx: str) -> str:
    """Additive mask [B, S1, 1, S2] from indices in range."""
    base = g.const(np.full((s.B, s.S1, s.S2), -np.inf), np.float32)
    zeros = g.const(np.zeros((s.B, s.S1, s.K)), np.float32)
    return g.unsqueeze(g.op("ScatterElements", base, idx, zeros, axis=-1), 2)


def build(s: Spec) -> onnx.ModelProto:
    """The model."""
    g = Graph(s.opset)
    idx = g.cast("indices", "i64")
    bad = g.op("Less", idx, g.const(0, np.int64)) if s.masked else ""
    if s.masked:
        idx = g.op("Max", idx, g.const(0, np.int64))
    cache, add = _cache(g, s), ""
    if s.find == "dense":
        latent, rope = _decoded(g, s, cache, 3)
        latent, rope = g.unsqueeze(latent, 1), g.unsqueeze(rope, 1) if rope else ""
        add = _masked(g, s, idx)
    elif s.late:
        latent, rope = _decoded(g, s, cache, 3)
        latent = _gather(g, s, latent, idx, s.C)
        at = g.op("Mod", g.op("Add", idx, g.const(1, np.int64)), g.const(s.S2, np.int64))
        at = at if s.wrong == "rope of another row" else idx
        rope = _gather(g, s, rope, at, s.R) if rope else ""
    else:
        rows = _gather(g, s, cache, idx, s.row.bytes)
        latent, rope = _decoded(g, s, rows, 4)
    x = _scores(g, s, latent, rope)
    if add:
        x = g.op("Add", x, add)
    elif s.masked:
        x = g.op("Where", g.unsqueeze(bad, 2), g.const(-np.inf, np.float32), x)
    out = g.op("MatMul", g.op("Softmax", x, axis=-1), latent)
    kind = s.out or s.query or s.dtype
    out = out if kind == "f32" else g.cast(out, kind)
    return g.model(_inputs(s), {"out": (kind, (*_lead(s), s.N, s.C))}, [out])


def _scores(g: Graph, s: Spec, latent: str, rope: str) -> str:
    scale = g.const((s.C + s.R) ** -0.5, np.float32)
    turn = lambda x: g.op("Transpose", x, perm=[0, 1, 3, 2])  # noqa: E731
    if s.split:
        a = g.op("MatMul", g.cast("query", "f32"), turn(latent))
        b = g.op("MatMul", g.cast("query_rope", "f32"), turn(rope))
        return g.op("Mul", g.op("Add", a, b), scale)
    key = g.op("Concat", latent, rope, axis=-1) if rope else latent
    return g.op("Mul", g.op("MatMul", g.cast("query", "f32"), turn(key)), scale)


def _lead(s: Spec) -> tuple:
    return ("batch", "tokens") if s.dynamic else (s.B, s.S1)


def _inputs(s: Spec) -> dict:
    width, blocks = s.row.bytes, s.B * s.S2 // s.block + 2
    batch, tokens = _lead(s)
    rows = "context" if s.dynamic else s.S2
    lead = (blocks, s.block) if s.paged else (batch, rows)
    kind = s.query or s.dtype
    parts = {"query": s.C, "query_rope": s.R} if s.split else {"query": s.C + s.R}
    inputs: dict = {n: (kind, (batch, tokens, s.N, w)) for n, w in parts.items()}
    inputs["key"] = ("i8", (*lead, 1, width) if s.rank == 4 else (*lead, width))
    inputs["indices"] = ("i32", (batch, tokens, s.K))
    if s.paged:
        inputs["block_table"] = ("i32", (s.B, s.S2 // s.block))
    return inputs


def feeds(s: Spec, seed: int = 0) -> Feeds:
    """Inputs whose rows hold bytes of every kind; index rows end in -1 where they are masked."""
    rng, row = np.random.default_rng(seed), s.row
    blocks = s.B * s.S2 // s.block + 2
    lead = (blocks, s.block) if s.paged else (s.B, s.S2)
    nope = rng.integers(-128, 128, (*lead, s.C)).astype(np.int8)
    scale = rng.uniform(0.005, 0.03, (*lead, row.tiles)) * rng.choice([-1, 1], (*lead, row.tiles))
    rope = rng.standard_normal((*lead, s.R)).astype(NP_TYPES[s.dtype]) if s.R else None
    key = kv_cache.pack(nope, rope, scale.astype(np.float32), tile_size=s.tile)
    idx = rng.permuted(np.broadcast_to(np.arange(s.S2), (s.B, s.S1, s.S2)), axis=-1)[..., : s.K]
    if s.masked and s.find != "dense":
        idx[:, 1:, s.K // 2 :] = -1
    query = rng.standard_normal((s.B, s.S1, s.N, s.C + s.R)).astype(NP_TYPES[s.query or s.dtype])
    out: Feeds = {"query": query}
    if s.split:
        out = {"query": query[..., : s.C].copy(), "query_rope": query[..., s.C :].copy()}
    out["key"] = key[:, :, None] if s.rank == 4 else key
    out["indices"] = idx.astype(np.int32)
    if s.paged:
        table = rng.permutation(blocks)[: s.B * (s.S2 // s.block)].reshape(s.B, -1)
        out["block_table"] = table.astype(np.int32)
    return out
