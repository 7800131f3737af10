"""Family: graphs written node by node, in styles that no exporter has but people do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx

from tests.zoo.base import ANTIQUANT, FLOAT_KV, NP_TYPES, Case, Feeds
from tests.zoo.write import Graph


@dataclass(frozen=True)
class Spec:
    """Sizes and style of one graph."""

    B: int = 2
    S1: int = 2
    N: int = 4
    S2: int = 40
    K: int = 12
    C: int = 64
    R: int = 16
    tile: int = 32
    int8: bool = False
    gather: str = "nd_batch"
    dequant: str = "mul"
    body: str = "matmul"
    softmax: str = "softmax"
    scale: str = "mul"
    mask: str = "none"  # "negative", "scatter", "scatter_max", "scatter_add", "equal", "kth"
    constants: str = "initializer"
    opset: int = 17
    dynamic: bool = False
    shadow: str = ""  # what else uses inner values

    @property
    def scale_value(self) -> float:
        return float(np.float32((self.C + self.R) ** -0.5))


def _gather(g: Graph, s: Spec, cache: str, idx: str, width: int, kind: str) -> str:
    """cache [B, S2, W], idx [B, S1, K] int64 -> [B, S1, K, W]."""
    if s.gather == "nd_batch":
        return g.op("GatherND", cache, g.unsqueeze(idx, -1), batch_dims=1)
    if s.gather == "flat":
        base = g.const(np.arange(s.B).reshape(-1, 1, 1) * s.S2, np.int64)
        return g.op("Gather", g.reshape(cache, -1, width), g.op("Add", base, idx), axis=0)
    if s.gather == "elements":
        shape = g.ints(s.B, s.S1 * s.K, width)
        wide = g.op("Expand", g.reshape(idx, s.B, -1, 1), shape)
        rows = g.op("GatherElements", cache, wide, axis=1)
        return g.reshape(rows, s.B, s.S1, s.K, width)
    if s.gather == "one_hot":  # a gather written as a product
        hot = g.op("OneHot", idx, g.ints(s.S2), g.const([0, 1], np.float32), axis=-1)
        rows = g.op("MatMul", hot, g.unsqueeze(g.cast(cache, "f32"), 1))
        return rows if kind == "f32" else g.cast(rows, kind)
    if s.gather == "per_batch":  # unrolled: one Gather per sequence
        parts = []
        for b in range(s.B):
            one = g.op("Gather", cache, g.const(b, np.int64), axis=0)
            which = g.op("Gather", idx, g.const(b, np.int64), axis=0)
            parts.append(g.unsqueeze(g.op("Gather", one, which, axis=0), 0))
        return g.op("Concat", *parts, axis=0)
    raise ValueError(s.gather)


def _dequant(g: Graph, s: Spec, nope: str, scale: str) -> str:
    lead = (s.B, s.S1, s.K)
    if s.dequant == "mul":
        tiles = g.reshape(g.cast(nope, "f32"), *lead, -1, s.tile)
        return g.reshape(g.op("Mul", tiles, g.unsqueeze(scale, -1)), *lead, s.C)
    if s.dequant == "linear":  # one scale per row and tile, via blocks of the last axis
        return g.op("DequantizeLinear", nope, scale, axis=-1, block_size=s.tile)
    if s.dequant == "split":
        parts = g.op(
            "Split", nope, g.ints(*[s.tile] * (s.C // s.tile)), outputs=s.C // s.tile, axis=3
        )
        done = []
        for t, part in enumerate(parts):
            one = g.op("Gather", scale, g.const(t, np.int64), axis=3)
            done.append(g.op("Mul", g.cast(part, "f32"), g.unsqueeze(one, 3)))
        return g.op("Concat", *done, axis=-1)
    if s.dequant == "product":  # scales spread over columns by a 0/1 matrix
        spread = np.kron(np.eye(s.C // s.tile), np.ones((1, s.tile)))
        return g.op("Mul", g.cast(nope, "f32"), g.op("MatMul", scale, g.const(spread, np.float32)))
    raise ValueError(s.dequant)


def _scaled(g: Graph, s: Spec, x: str) -> str:
    if s.scale == "mul":
        return g.op("Mul", x, g.const(s.scale_value, np.float32))
    if s.scale == "left":
        return g.op("Mul", g.const([[[[s.scale_value]]]], np.float32), x)
    if s.scale == "div_sqrt":
        return g.op("Div", x, g.op("Sqrt", g.const([s.C + s.R], np.float32)))
    if s.scale == "twice":
        half = g.const(np.float32(s.scale_value) ** 0.5, np.float32)
        return g.op("Mul", g.op("Mul", x, half), half)
    if s.scale == "negative":  # two minus signs
        return g.op("Neg", g.op("Mul", x, g.const(-s.scale_value, np.float32)))
    raise ValueError(s.scale)


def _softmax(g: Graph, s: Spec, x: str) -> str:
    if s.softmax == "softmax":
        return g.op("Softmax", x)
    if s.softmax == "axis3":
        return g.op("Softmax", x, axis=3)
    if s.softmax == "log":
        return g.op("Exp", g.op("LogSoftmax", x, axis=-1))
    if s.softmax == "plain":  # no maximum subtracted
        e = g.op("Exp", x)
        return g.op("Div", e, g.reduce("ReduceSum", e))
    if s.softmax == "reciprocal":
        e = g.op("Exp", g.op("Sub", x, g.reduce("ReduceMax", x)))
        return g.op("Mul", e, g.op("Reciprocal", g.reduce("ReduceSum", e)))
    if s.softmax == "flat":  # over a two-dimensional view
        keys = s.S2 if s.mask.startswith(("scatter", "equal", "kth")) else s.K
        return g.reshape(g.op("Softmax", g.reshape(x, -1, keys)), s.B, s.S1, s.N, keys)
    raise ValueError(s.softmax)


def _late(g: Graph, s: Spec, x: str, rows: str) -> str:
    """Normalised after the product with the values."""
    e = g.op("Exp", g.op("Sub", x, g.reduce("ReduceMax", x)))
    out = g.op("MatMul", e, g.cut(rows, 0, s.C))
    return g.op("Div", out, g.reduce("ReduceSum", e))


def _gathered(g: Graph, s: Spec) -> tuple[str, str]:
    idx = g.cast("indices", "i64")
    bad = g.op("Less", idx, g.const(0, np.int64)) if s.mask == "negative" else ""
    if bad:
        idx = g.op("Max", idx, g.const(0, np.int64))
    if s.int8:
        nope = _gather(g, s, "nope", idx, s.C, "i8")
        k = _dequant(g, s, nope, _gather(g, s, "scale", idx, s.C // s.tile, "f32"))
        key = g.op("Concat", k, _gather(g, s, "rope", idx, s.R, "f32"), axis=-1)
    else:
        key = _gather(g, s, "kv", idx, s.C + s.R, "f32")
    if s.body == "attention":  # 3-D form: one row of heads per token
        D = s.C + s.R
        out = g.op(
            "Attention",
            g.reshape("query", s.B * s.S1, 1, s.N * D),
            g.reshape(key, s.B * s.S1, s.K, D),
            g.cut(g.reshape(key, s.B * s.S1, s.K, D), 0, s.C),
            q_num_heads=s.N,
            kv_num_heads=1,
            scale=s.scale_value,
        )
        return g.reshape(out, s.B, s.S1, s.N, s.C), key
    if s.body == "einsum":
        x = g.op("Einsum", "query", key, equation="...nd,...kd->...nk")
    elif s.body == "key_first":
        x = g.op("MatMul", key, g.op("Transpose", "query", perm=[0, 1, 3, 2]))
        x = g.op("Transpose", x, perm=[0, 1, 3, 2])
    elif s.body == "broadcast":  # products as Mul and ReduceSum
        x = g.op("Mul", g.unsqueeze("query", 3), g.unsqueeze(key, 2))
        x = g.reduce("ReduceSum", x, -1, 0)
    elif s.body == "gemm":
        raise ValueError("needs two dimensions")
    else:
        x = g.op("MatMul", "query", g.op("Transpose", key, perm=[0, 1, 3, 2]))
    x = _scaled(g, s, x)
    if bad:
        x = g.op("Where", g.unsqueeze(bad, 2), g.const(-np.inf, np.float32), x)
    if s.softmax == "late":
        return _late(g, s, x, key), x
    p = _softmax(g, s, x)
    if s.body == "key_first":
        out = g.op(
            "MatMul", g.op("Transpose", g.cut(key, 0, s.C), perm=[0, 1, 3, 2]),
            g.op("Transpose", p, perm=[0, 1, 3, 2]),
        )  # fmt: skip
        return g.op("Transpose", out, perm=[0, 1, 3, 2]), x
    if s.body == "einsum":
        return g.op("Einsum", p, g.cut(key, 0, s.C), equation="...nk,...kc->...nc"), x
    return g.op("MatMul", p, g.cut(key, 0, s.C)), x


def _mask(g: Graph, s: Spec, idx: str, x: str) -> str:
    """Dense scores [B, S1, N, S2] hidden outside the selection."""
    low = g.const(-np.inf, np.float32)
    shape = (s.B, s.S1, s.S2)
    if s.mask == "scatter":
        m = g.op(
            "ScatterElements", g.const(np.full(shape, -np.inf), np.float32), idx,
            g.const(np.zeros((s.B, s.S1, s.K)), np.float32), axis=-1,
        )  # fmt: skip
        return g.op("Add", x, g.unsqueeze(m, 2))
    if s.mask in ("scatter_max", "scatter_add"):
        m = g.op(
            "ScatterElements", g.const(np.zeros(shape), np.float32), idx,
            g.const(np.ones((s.B, s.S1, s.K)), np.float32), axis=-1, reduction=s.mask[8:],
        )  # fmt: skip
        keep = g.op("Greater", m, g.const(0, np.float32))
        return g.op("Where", g.unsqueeze(keep, 2), x, low)
    if s.mask == "scatter_nd":
        grid = np.stack(np.meshgrid(np.arange(s.B), np.arange(s.S1), indexing="ij"), -1)
        grid = np.broadcast_to(grid[:, :, None], (s.B, s.S1, s.K, 2))
        at = g.op("Concat", g.const(grid, np.int64), g.unsqueeze(idx, -1), axis=-1)
        m = g.op(
            "ScatterND", g.const(np.zeros(shape), bool), at,
            g.const(np.ones((s.B, s.S1, s.K)), bool),
        )  # fmt: skip
        return g.op("Where", g.unsqueeze(m, 2), x, low)
    if s.mask == "equal":
        hit = g.op("Equal", g.unsqueeze(idx, -1), g.const(np.arange(s.S2), np.int64))
        m = g.cast(g.reduce("ReduceMax", g.cast(hit, "i32"), 2, 0), "bool")
        return g.op("Where", g.unsqueeze(m, 2), x, low)
    if s.mask == "one_hot":
        hot = g.op("OneHot", idx, g.ints(s.S2), g.const([0, 1], np.float32), axis=-1)
        m = g.op("Equal", g.reduce("ReduceSum", hot, 2, 0), g.const(0, np.float32))
        return g.op("Where", g.unsqueeze(m, 2), low, x)
    raise ValueError(s.mask)


def _dense(g: Graph, s: Spec) -> tuple[str, str]:
    scores, idx = g.op("TopK", "index_score", g.ints(s.K), outputs=2, axis=-1)
    x = g.op("MatMul", "query", g.unsqueeze(g.op("Transpose", "kv", perm=[0, 2, 1]), 1))
    x = _scaled(g, s, x)
    if s.mask == "kth":  # everything below the K-th best score is hidden (ties are kept)
        low = g.op("Less", "index_score", g.cut(scores, s.K - 1, s.K))
        x = g.op("Where", g.unsqueeze(low, 2), g.const(-np.inf, np.float32), x)
    else:
        x = _mask(g, s, idx, x)
    latent = g.unsqueeze(g.cut("kv", 0, s.C), 1)
    return g.op("MatMul", _softmax(g, s, x), latent), x


DENSE = ("scatter", "scatter_max", "scatter_add", "scatter_nd", "equal", "one_hot", "kth")


def build(s: Spec) -> onnx.ModelProto:
    g = Graph(s.opset, s.constants)
    dense = s.mask in DENSE
    out, _ = (_dense if dense else _gathered)(g, s)
    B, S2 = ("batch", "keys") if s.dynamic else (s.B, s.S2)
    wide = s.C + s.R
    inputs: dict = {"query": ("f32", (B, s.S1, s.N, wide))}
    if s.int8:
        inputs["nope"] = ("i8", (B, S2, s.C))
        inputs["scale"] = ("f32", (B, S2, s.C // s.tile))
        inputs["rope"] = ("f32", (B, S2, s.R))
    else:
        inputs["kv"] = ("f32", (B, S2, wide))
    if dense:
        inputs["index_score"] = ("f32", (B, s.S1, S2))
    else:
        inputs["indices"] = ("i32", (B, s.S1, s.K))
    outputs: dict = {"out": ("f32", (B, s.S1, s.N, s.C))}
    results = [out]
    if s.shadow == "if":  # a branch of an If reads the cache: a use, but no obstacle
        results.append(_branching(g, s, "nope" if s.int8 else "kv"))
        outputs["shadow"] = ("f32", (1,))
    return g.model(inputs, outputs, results)


def _branching(g: Graph, s: Spec, value: str) -> str:
    from onnx import TensorProto, helper

    def branch(kind: str) -> onnx.GraphProto:
        total = helper.make_node("Cast", [value], ["wide_" + kind], to=TensorProto.FLOAT)
        reduce = helper.make_node(kind, ["wide_" + kind], ["r_" + kind], keepdims=0)
        view = helper.make_node("Reshape", ["r_" + kind, one], ["o_" + kind])
        out = helper.make_tensor_value_info("o_" + kind, TensorProto.FLOAT, [1])
        return helper.make_graph([total, reduce, view], kind, [], [out])

    one = g.ints(1)
    flag = g.op("Greater", g.op("ReduceSum", "query", keepdims=0), g.const(0, np.float32))
    return g.op("If", flag, then_branch=branch("ReduceMax"), else_branch=branch("ReduceMin"))


def feeds(s: Spec, seed: int, stress: bool = False) -> Feeds:
    rng = np.random.default_rng(seed)
    f32 = NP_TYPES["f32"]
    wide = s.C + s.R
    out: Feeds = {"query": rng.standard_normal((s.B, s.S1, s.N, wide)).astype(f32)}
    if s.int8:
        out["nope"] = rng.integers(-127, 128, (s.B, s.S2, s.C)).astype(np.int8)
        out["scale"] = rng.uniform(0.005, 0.03, (s.B, s.S2, s.C // s.tile)).astype(f32)
        out["rope"] = rng.standard_normal((s.B, s.S2, s.R)).astype(f32)
    else:
        out["kv"] = rng.standard_normal((s.B, s.S2, wide)).astype(f32)
    if s.mask in DENSE:
        score = np.broadcast_to(np.arange(s.S2, dtype=f32), (s.B, s.S1, s.S2))
        out["index_score"] = rng.permuted(score, axis=-1)
        return out
    order = np.broadcast_to(np.arange(s.S2), (s.B, s.S1, s.S2))
    idx = rng.permuted(order, axis=-1)[..., : s.K].astype(np.int32)
    if s.mask == "negative":
        idx[:, 1:, s.K // 2 :] = -1
        if stress:
            idx[..., 1], idx[..., 4] = -1, idx[..., 2]
    elif stress:
        idx[..., 3] = idx[..., 0]
        if s.gather in ("flat", "one_hot"):
            return out | {"indices": idx}
        idx[..., 2] = -1 - idx[..., 2] % 5
    return out | {"indices": idx}


def case(name: str, s: Spec, **more) -> Case:
    def make_feeds(seed: int) -> Feeds:
        grow = s.dynamic and seed % 2
        return feeds(replace(s, B=s.B + 1, S2=s.S2 + 7) if grow else s, seed)

    tags = {"exporter": "hand", "opset": s.opset, "dtype": "f32", "dynamic": s.dynamic}
    more.setdefault("op", ANTIQUANT if s.int8 else FLOAT_KV)
    stress: Callable[[int], Feeds] | None = None
    if s.mask not in DENSE:
        stress = lambda seed: feeds(s, seed, stress=True)  # noqa: E731
    return Case(
        f"hand-{name}", "handmade", lambda: build(s), make_feeds, stress=stress, tags=tags, **more
    )


def cases() -> Iterator[Case]:
    base = Spec()
    either = {"expect": "either"}
    for gather in ("nd_batch", "flat", "elements", "per_batch"):
        yield case(f"float-{gather}", replace(base, gather=gather))
        yield case(f"int8-{gather}", replace(base, gather=gather, int8=True))
    yield case("float-one_hot", replace(base, gather="one_hot"), **either)
    yield case("int8-one_hot", replace(base, gather="one_hot", int8=True), **either)
    for dequant in ("linear", "split", "product"):
        more = either if dequant == "product" else {}
        opset = 21 if dequant == "linear" else 18
        yield case(
            f"dequant-{dequant}", replace(base, int8=True, dequant=dequant, opset=opset), **more
        )
    for body in ("einsum", "key_first", "broadcast"):
        yield case(
            f"body-{body}", replace(base, body=body), **(either if body == "broadcast" else {})
        )
    for opset in (23, 24):
        yield case(
            f"attention-{opset}", replace(base, body="attention", opset=opset, gather="flat")
        )
    for kind in ("axis3", "log", "plain", "reciprocal", "flat", "late"):
        more = either if kind == "plain" else {}
        yield case(f"softmax-{kind}", replace(base, softmax=kind, mask="negative"), **more)
    for scale in ("left", "div_sqrt", "twice", "negative"):
        yield case(f"scale-{scale}", replace(base, scale=scale, int8=True))
    for mask in DENSE:
        opset = 18 if mask == "scatter_max" else 17
        more = {"expect": "either"} if mask == "kth" else {}
        yield case(f"mask-{mask}", replace(base, mask=mask, opset=opset), **more)
        yield case(
            f"mask-{mask}-nodes", replace(base, mask=mask, opset=opset, constants="node"), **more
        )
    yield case("shadow-if", replace(base, shadow="if"))
    yield case("shadow-if-int8", replace(base, shadow="if", int8=True))
    dynamic = replace(base, dynamic=True)
    yield case("dynamic-nd", dynamic)
    yield case("dynamic-nd-negative", replace(dynamic, mask="negative"))
    for opset in (14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26):
        yield case(f"opset{opset}", replace(base, opset=opset, mask="negative"))
        yield case(
            f"opset{opset}-dense", replace(base, opset=opset, mask="scatter", softmax="flat")
        )
        if opset >= 16:
            s = replace(base, opset=opset, int8=True, constants="node", gather="flat")
            yield case(f"opset{opset}-int8", s)
