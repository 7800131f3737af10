"""Family: packed rows (int8 nope | rope bits | float32 scale bits) taken apart inside the graph.

The bytes are decoded by integer arithmetic, or by BitCast (opset 26). The operator's own operand is
a graph input here: fusing must hand it through untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx

from tests.zoo.base import ANTIQUANT, NP_TYPES, Case, Feeds
from tests.zoo.write import Graph


@dataclass(frozen=True)
class Spec:
    """Sizes and the way the row is read."""

    B: int = 2
    S1: int = 2
    N: int = 4
    S2: int = 40
    K: int = 12
    C: int = 64
    R: int = 16
    tile: int = 32
    block: int = 8
    dtype: str = "f16"  # of query and rope
    decode: str = "arithmetic"  # or "bitcast"
    paged: bool = False
    mask: bool = True
    order: str = "gather_first"
    swap: bool = False  # near miss: scales before rope
    opset: int = 18

    @property
    def width(self) -> int:
        return self.C + self.R * 2 + self.C // self.tile * 4


def _bytes(g: Graph, x: str) -> str:
    """int8 -> the byte's value 0..255 as int32."""
    wide = g.cast(x, "i32")
    return g.op("BitwiseAnd", wide, g.const(255, np.int32))


def _number(g: Graph, x: str, size: int, lead: list[int], count: int, kind: str) -> str:
    """Little-endian bytes [..., count*size] int8 -> float32 [..., count], by arithmetic."""
    parts = g.reshape(_bytes(g, x), *lead, count, size)
    weights = g.const([256.0**i for i in range(size)], np.float64)
    value = g.op("Mul", g.op("Cast", parts, to=onnx.TensorProto.DOUBLE), weights)
    bits = g.cast(g.reduce("ReduceSum", value, -1, 0), "i64")
    mantissa, exponent, bias = {"f16": (10, 5, 15), "bf16": (7, 8, 127), "f32": (23, 8, 127)}[kind]
    two = lambda n: g.const(2**n, np.int64)  # noqa: E731
    low = g.op("Mod", bits, two(mantissa))
    rest = g.op("Div", bits, two(mantissa))
    power = g.op("Mod", rest, two(exponent))
    minus = g.op("Div", rest, two(exponent))
    tiny = g.op("Equal", power, g.const(0, np.int64))
    f = lambda v: g.op("Cast", v, to=onnx.TensorProto.DOUBLE)  # noqa: E731
    c = lambda v: g.const(v, np.float64)  # noqa: E731
    fraction = g.op("Div", f(low), c(2.0**mantissa))
    whole = g.op("Add", fraction, g.op("Where", tiny, c(0.0), c(1.0)))
    shift = g.op("Sub", g.op("Where", tiny, c(1.0), f(power)), c(float(bias)))
    size_ = g.op("Mul", whole, g.op("Pow", c(2.0), shift))
    sign = g.op("Sub", c(1.0), g.op("Mul", c(2.0), f(minus)))
    return g.cast(g.op("Mul", sign, size_), "f32")


def _bits(g: Graph, x: str, size: int, lead: list[int], count: int, kind: str) -> str:
    """The same through BitCast, after assembling words with shifts."""
    U16, U32 = onnx.TensorProto.UINT16, onnx.TensorProto.UINT32
    word, np_word = (U16, np.uint16) if size == 2 else (U32, np.uint32)
    parts = g.op("BitCast", g.reshape(x, *lead, count, size), to=onnx.TensorProto.UINT8)
    total = ""
    for i in range(size):
        one = g.op("Gather", g.op("Cast", parts, to=word), g.const(i, np.int64), axis=-1)
        moved = g.op("BitShift", one, g.const(8 * i, np_word), direction="LEFT") if i else one
        total = g.op("BitwiseOr", total, moved) if total else moved
    target = {"f16": 10, "bf16": 16, "f32": 1}[kind]
    return g.cast(g.op("BitCast", total, to=target), "f32")


def _rows(g: Graph, s: Spec, idx: str) -> str:
    if s.paged:
        page = g.op("Div", idx, g.const(s.block, np.int64))
        slot = g.op("Mod", idx, g.const(s.block, np.int64))
        entry = g.op("GatherND", g.cast("block_table", "i64"), g.unsqueeze(page, -1), batch_dims=1)
        flat = g.op("Add", g.op("Mul", entry, g.const(s.block, np.int64)), slot)
        return g.op("Gather", g.reshape("key", -1, s.width), flat, axis=0)
    return g.op("GatherND", g.squeeze("key", 2), g.unsqueeze(idx, -1), batch_dims=1)


def build(s: Spec) -> onnx.ModelProto:
    g = Graph(s.opset)
    idx = g.cast("indices", "i64")
    bad = g.op("Less", idx, g.const(0, np.int64))
    idx = g.op("Max", idx, g.const(0, np.int64))
    rows = _rows(g, s, idx)
    lead = [s.B, s.S1, s.K]
    tiles = s.C // s.tile
    read = _number if s.decode == "arithmetic" else _bits
    first, second = s.C, s.C + 2 * s.R
    if s.swap:
        second, first = s.C, s.C + 4 * tiles
    rope = read(g, g.cut(rows, first, first + 2 * s.R), 2, lead, s.R, s.dtype)
    scale = read(g, g.cut(rows, second, second + 4 * tiles), 4, lead, tiles, "f32")
    nope = g.reshape(g.cast(g.cut(rows, 0, s.C), "f32"), *lead, tiles, s.tile)
    latent = g.reshape(g.op("Mul", nope, g.unsqueeze(scale, -1)), *lead, s.C)
    key = g.op("Concat", latent, rope, axis=-1)
    x = g.op("MatMul", g.cast("query", "f32"), g.op("Transpose", key, perm=[0, 1, 3, 2]))
    x = g.op("Mul", x, g.const((s.C + s.R) ** -0.5, np.float32))
    x = g.op("Where", g.unsqueeze(bad, 2), g.const(-np.inf, np.float32), x)
    out = g.cast(g.op("MatMul", g.op("Softmax", x, axis=-1), latent), s.dtype)
    pages = s.B * (s.S2 // s.block) + 2
    shape = (pages, s.block, 1, s.width) if s.paged else (s.B, s.S2, 1, s.width)
    inputs: dict = {
        "query": (s.dtype, (s.B, s.S1, s.N, s.C + s.R)),
        "key": ("i8", shape),
        "indices": ("i32", (s.B, s.S1, s.K)),
    }
    if s.paged:
        inputs["block_table"] = ("i32", (s.B, s.S2 // s.block))
    return g.model(inputs, {"out": (s.dtype, (s.B, s.S1, s.N, s.C))}, [out])


def feeds(s: Spec, seed: int, holes: bool = False) -> Feeds:
    rng = np.random.default_rng(seed)
    ft = NP_TYPES[s.dtype]
    pages = s.B * (s.S2 // s.block) + 2
    lead = (pages, s.block) if s.paged else (s.B, s.S2)
    nope = rng.integers(-127, 128, (*lead, s.C)).astype(np.int8)
    rope = rng.standard_normal((*lead, s.R)).astype(ft).view(np.int8).reshape(*lead, -1)
    scale = rng.uniform(0.005, 0.03, (*lead, s.C // s.tile)).astype(np.float32)
    tail = [rope, scale.view(np.int8).reshape(*lead, -1)]
    key = np.concatenate([nope, *(tail[::-1] if s.swap else tail)], -1)
    idx = rng.permuted(np.broadcast_to(np.arange(s.S2), (s.B, s.S1, s.S2)), axis=-1)[..., : s.K]
    idx[:, 1:, s.K // 2 :] = -1
    if holes:
        idx[..., 1], idx[..., 4] = -1, idx[..., 2]
    query = rng.standard_normal((s.B, s.S1, s.N, s.C + s.R)).astype(ft)
    out: Feeds = {"query": query, "key": key[:, :, None], "indices": idx.astype(np.int32)}
    if s.paged:
        table = rng.permutation(pages)[: s.B * (s.S2 // s.block)].reshape(s.B, -1)
        out["block_table"] = table.astype(np.int32)
    return out


def case(name: str, s: Spec, **more) -> Case:
    kind = "bf16 rows" if s.dtype == "bf16" else s.dtype
    tags = {"exporter": "hand", "opset": s.opset, "dtype": kind, "dynamic": False}
    more.setdefault("op", ANTIQUANT)
    assert ml_dtypes  # bfloat16 rows need it
    return Case(
        f"packed-{name}",
        "packed",
        lambda: build(s),
        lambda seed: feeds(s, seed),
        stress=lambda seed: feeds(s, seed, holes=True),
        tags=tags,
        **more,
    )


def cases() -> Iterator[Case]:
    base = Spec()
    for dtype in ("f16", "bf16"):
        for paged in (False, True):
            tag = f"{dtype}{'-paged' if paged else ''}"
            yield case(f"arithmetic-{tag}", replace(base, dtype=dtype, paged=paged))
            s = replace(base, dtype=dtype, paged=paged, decode="bitcast", opset=26)
            yield case(f"bitcast-{tag}", s)
    true = Spec(B=1, S1=1, N=16, S2=256, K=64, C=512, R=64, tile=128, block=64)
    yield case("true-bitcast", replace(true, decode="bitcast", opset=26))
    yield case("true-arithmetic-paged", replace(true, paged=True))
    miss = {"expect": "refuse"}
    yield case("miss-other-order", replace(base, swap=True), **miss)
    yield case(
        "miss-other-order-bits", replace(base, swap=True, decode="bitcast", opset=26), **miss
    )
