"""Family: every spelling of scale, softmax and products, and its near-miss twins, node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from tests.zoo.base import FLOAT_KV, NP_TYPES, Case, Feeds
from tests.zoo.write import Graph

B, S1, N, S2, K, C, R = 2, 3, 4, 40, 12, 32, 8
D = C + R
SCALE = float(np.float32(D**-0.5))
Hook = Callable[..., str]


def number(g: Graph, value: Any, kind: str = "f32") -> str:
    """A float constant."""
    return g.const(np.asarray(value, NP_TYPES[kind]))


def flip(g: Graph, x: str) -> str:
    """The last two axes exchanged."""
    return g.op("Transpose", x, perm=[0, 1, 3, 2])


def _scores(g: Graph, s: Steps, q: str, k: str) -> str:
    return g.op("MatMul", q, flip(g, k))


def hide(g: Graph, s: Steps, x: str) -> str:
    if s.dense:
        zeros = number(g, np.zeros((B, S1, K)), s.kind)
        low = number(g, np.full((B, S1, S2), -np.inf), s.kind)
        mask = g.op("ScatterElements", low, s.indices(g), zeros, axis=-1)
        return g.op("Add", x, g.unsqueeze(mask, 2))
    hidden = g.op("Less", g.unsqueeze("indices", 2), g.const(0, np.int32))
    return g.op("Where", hidden, number(g, -np.inf, s.kind), x)


def same(g: Graph, s: Steps, x: str) -> str:
    return x


@dataclass
class Steps:
    """The steps of one attention; a case replaces some of them."""

    query: Hook = same
    keys: Hook = same
    scores: Hook = _scores
    scale: Hook = lambda g, s, x: g.op("Mul", x, number(g, SCALE, s.kind))
    hide: Hook = hide
    soft: Hook = lambda g, s, x: g.op("Softmax", x, axis=-1)
    weigh: Hook = same
    value: Hook = lambda g, s, k: g.cut(k, 0, C)
    product: Hook = lambda g, s, p, v: g.op("MatMul", p, v)
    result: Hook = same
    dense: bool = False
    kind: str = "f32"
    opset: int = 18
    more: dict = field(default_factory=dict)  # further inputs: name -> (kind, shape)
    wide: int = N  # heads of the result
    extra: dict = field(default_factory=dict)  # further outputs: name -> (kind, shape)
    outputs: list = field(default_factory=list)
    domains: tuple = ()

    def indices(self, g: Graph) -> str:
        return g.op("TopK", "wish", g.ints(K), outputs=2, axis=-1)[1]

    def rows(self, g: Graph) -> str:
        if self.dense:
            return g.unsqueeze("kv", 1)
        at = g.op("Max", g.cast("indices", "i64"), g.const(0, np.int64))
        return g.op("GatherND", "kv", g.unsqueeze(at, -1), batch_dims=1)

    def build(self) -> onnx.ModelProto:
        g = Graph(self.opset)
        self.outputs = []
        stored = self.rows(g)
        keys = self.keys(g, self, stored)
        x = self.scores(g, self, self.query(g, self, "query"), keys)
        x = self.hide(g, self, self.scale(g, self, x))
        p = self.weigh(g, self, self.soft(g, self, x))
        out = self.result(g, self, self.product(g, self, p, self.value(g, self, keys)))
        picks = {"wish": ("f32", (B, S1, S2))} if self.dense else {"indices": ("i32", (B, S1, K))}
        inputs = {"query": (self.kind, (B, S1, N, D)), "kv": (self.kind, (B, S2, D))}
        results = {"out": (self.kind, (B, S1, self.wide, C))}
        return g.model(
            {**inputs, **picks, **self.more},
            {**results, **self.extra},
            [out, *self.outputs],
            self.domains,
        )

    def feeds(self, seed: int) -> Feeds:
        rng = np.random.default_rng(seed)
        real = NP_TYPES[self.kind]
        found: Feeds = {
            "query": rng.standard_normal((B, S1, N, D)).astype(real),
            "kv": rng.standard_normal((B, S2, D)).astype(real),
        }
        order = rng.permuted(np.broadcast_to(np.arange(S2), (B, S1, S2)), axis=-1)
        if self.dense:
            found["wish"] = order.astype(np.float32)
        else:
            found["indices"] = order[..., :K].astype(np.int32)
            found["indices"][:, 1:, K // 2 :] = -1
        for name, (kind, shape) in self.more.items():
            found[name] = rng.uniform(0.5, 2.0, shape).astype(NP_TYPES[kind])
        return found


# ---- how the scale is written --------------------------------------------------------------------
def mul(*factors: Any) -> Hook:
    def scale(g: Graph, s: Steps, x: str) -> str:
        for factor in factors:
            x = g.op("Mul", x, number(g, factor, s.kind))
        return x

    return scale


def _of_shape(op: str) -> Hook:
    """1 / sqrt(D) with D read off the query's shape."""

    def scale(g: Graph, s: Steps, x: str) -> str:
        shape = g.op("Shape", "query")
        width = g.cast(g.op("Gather", shape, g.const(3, np.int64)), s.kind)
        if op == "sqrt":
            return g.op("Div", x, g.op("Sqrt", width))
        if op == "pow":
            return g.op("Mul", x, g.op("Pow", width, number(g, -0.5, s.kind)))
        if op == "reciprocal":
            return g.op("Mul", x, g.op("Reciprocal", g.op("Sqrt", width)))
        one = g.op("Div", number(g, 1, s.kind), g.op("Sqrt", width))  # torch's rsqrt, and SDPA's
        if op == "root":  # sqrt(1/sqrt(D)) on either side would be two of these
            return g.op("Mul", g.op("Mul", x, g.op("Sqrt", one)), g.op("Sqrt", one))
        return g.op("Mul", x, one)

    return scale


def _cast_constant(g: Graph, s: Steps, x: str) -> str:
    return g.op("Mul", x, g.cast(number(g, 0.1), s.kind))


SCALES: dict[str, Steps] = {
    "neg-neg": Steps(scale=lambda g, s, x: g.op("Neg", mul(-SCALE)(g, s, x))),
    "minus-one-twice": Steps(scale=mul(-1.0, SCALE, -1.0)),
    "div-negative": Steps(
        scale=lambda g, s, x: g.op("Div", g.op("Neg", x), number(g, -1 / SCALE))
    ),
    "neg-query": Steps(query=lambda g, s, q: g.op("Neg", q), scale=mul(-SCALE)),
    "neg-query-key": Steps(
        query=lambda g, s, q: g.op("Neg", q),
        scores=lambda g, s, q, k: g.op("MatMul", q, g.op("Neg", flip(g, k))),
    ),
    "shape-sqrt": Steps(scale=_of_shape("sqrt")),
    "shape-pow": Steps(scale=_of_shape("pow")),
    "shape-reciprocal": Steps(scale=_of_shape("reciprocal")),
    "shape-one-over": Steps(scale=_of_shape("one")),
    "shape-root": Steps(scale=_of_shape("root")),
    "tensor-1d": Steps(scale=mul([SCALE])),
    "tensor-4d": Steps(scale=mul([[[[SCALE]]]])),
    "tensor-4d-first": Steps(
        scale=lambda g, s, x: g.op("Mul", number(g, [[[[SCALE]]]]), x),
    ),
    "filled": Steps(scale=mul(np.full((1, 1, N, 1), SCALE))),
    "filled-query": Steps(
        query=lambda g, s, q: g.op("Mul", q, number(g, np.full(D, SCALE))), scale=same
    ),
    "div-reciprocal": Steps(
        scale=lambda g, s, x: g.op("Div", x, g.op("Reciprocal", number(g, SCALE)))
    ),
    "cast-constant-f16": Steps(scale=_cast_constant, kind="f16"),
    "expanded": Steps(
        scale=lambda g, s, x: g.op(
            "Mul", x, g.op("Expand", number(g, SCALE), g.ints(B, S1, N, K))
        )
    ),
    "of-shape": Steps(
        scale=lambda g, s, x: g.op(
            "Mul", x,
            g.op("ConstantOfShape", g.op("Shape", x),
                 value=onnx.numpy_helper.from_array(np.array([SCALE], np.float32))),
        )
    ),
    "fused-matmul": Steps(
        scores=lambda g, s, q, k: g.op(
            "FusedMatMul", q, k, domain="com.microsoft", transB=1, alpha=SCALE
        ),
        scale=same,
        domains=(("com.microsoft", 1),),
    ),
    "fused-trans-a": Steps(
        scores=lambda g, s, q, k: g.op(
            "FusedMatMul", flip(g, q), k, domain="com.microsoft", transA=1, transB=1, alpha=SCALE
        ),
        scale=same,
        domains=(("com.microsoft", 1),),
    ),
    "fused-trans-batch": Steps(
        scores=lambda g, s, q, k: g.op(
            "FusedMatMul", q, g.op("Transpose", k, perm=[2, 0, 1, 3]), domain="com.microsoft",
            transBatchB=1, transB=1, alpha=SCALE,
        ),
        scale=same,
        domains=(("com.microsoft", 1),),
    ),
}  # fmt: skip


# ---- how the softmax is written ------------------------------------------------------------------
def shifted(g: Graph, x: str) -> str:
    return g.op("Sub", x, g.reduce("ReduceMax", x))


def over_sum(g: Graph, e: str) -> str:
    return g.op("Div", e, g.reduce("ReduceSum", e))


def _base_two(kind: str) -> Hook:
    def soft(g: Graph, s: Steps, x: str) -> str:
        x = shifted(g, g.op("Mul", x, number(g, 1.4426950408889634)))
        e = (
            g.op("Pow", number(g, 2), x)
            if kind == "pow"
            else g.op("Exp", g.op("Mul", x, number(g, 0.6931471805599453)))
        )
        return over_sum(g, e)

    return soft


def _transposed(g: Graph, s: Steps, x: str) -> str:
    return flip(g, g.op("Softmax", flip(g, x), axis=-2))


def _through_log(g: Graph, s: Steps, x: str) -> str:
    total = g.op("Log", g.reduce("ReduceSum", g.op("Exp", shifted(g, x))))
    return g.op("Exp", g.op("Sub", shifted(g, x), total))


def _log_sum_exp_added(g: Graph, s: Steps, x: str) -> str:
    top = g.reduce("ReduceMax", x)
    total = g.op("Log", g.reduce("ReduceSum", g.op("Exp", g.op("Sub", x, top))))
    return g.op("Exp", g.op("Sub", x, g.op("Add", total, top)))


def _flattened(g: Graph, s: Steps, x: str) -> str:
    keys = S2 if s.dense else K
    return g.reshape(g.op("Softmax", g.reshape(x, -1, keys), axis=1), B, S1, N, keys)


SOFTMAXES: dict[str, Steps] = {
    "plain": Steps(soft=lambda g, s, x: over_sum(g, g.op("Exp", x))),
    "hand": Steps(soft=lambda g, s, x: over_sum(g, g.op("Exp", shifted(g, x)))),
    "log": Steps(soft=lambda g, s, x: g.op("Exp", g.op("LogSoftmax", x, axis=-1))),
    "lse": Steps(soft=lambda g, s, x: g.op("Exp", g.op("Sub", x, g.reduce("ReduceLogSumExp", x)))),
    "through-log": Steps(soft=_through_log),
    "log-plus-max": Steps(soft=_log_sum_exp_added),
    "base-two": Steps(soft=_base_two("pow")),
    "base-two-exp": Steps(soft=_base_two("exp")),
    "shifted-first": Steps(soft=lambda g, s, x: g.op("Softmax", shifted(g, x), axis=-1)),
    "transposed": Steps(soft=_transposed),
    "flattened": Steps(soft=_flattened),
    "norm-l1": Steps(
        soft=lambda g, s, x: (lambda e: g.op("Div", e, g.reduce("ReduceL1", e)))(
            g.op("Exp", shifted(g, x))
        )
    ),
    "lp-normalized": Steps(
        soft=lambda g, s, x: g.op("LpNormalization", g.op("Exp", shifted(g, x)), axis=-1, p=1)
    ),
    "power-minus-one": Steps(
        soft=lambda g, s, x: (
            lambda e: g.op("Mul", e, g.op("Pow", g.reduce("ReduceSum", e), number(g, -1)))
        )(g.op("Exp", shifted(g, x)))
    ),
    "e-power": Steps(soft=lambda g, s, x: over_sum(g, g.op("Pow", number(g, np.e), shifted(g, x)))),
    "cast-chain": Steps(
        soft=lambda g, s, x: g.cast(g.op("Softmax", g.cast(x, "f32"), axis=-1), "f16"), kind="f16"
    ),
    "identities": Steps(
        soft=lambda g, s, x: g.op("Identity", g.op("Softmax", g.op("Identity", x), axis=-1)),
    ),
    "dropout": Steps(
        weigh=lambda g, s, p: g.op("Dropout", p, number(g, 0.5), g.const(False)),
    ),
    "dropout-default": Steps(weigh=lambda g, s, p: g.op("Dropout", p, number(g, 0.5))),
}


# ---- how the products are written ----------------------------------------------------------------
def _einsum(equation: str, swap: bool = False) -> Hook:
    def scores(g: Graph, s: Steps, q: str, k: str) -> str:
        return g.op("Einsum", *((k, q) if swap else (q, k)), equation=equation)

    return scores


def _key_first(g: Graph, s: Steps, q: str, k: str) -> str:
    return g.op("MatMul", k, flip(g, q))  # [B, S1, K, N]


def _value_first(g: Graph, s: Steps, p: str, v: str) -> str:
    return flip(g, g.op("MatMul", flip(g, v), p))


def _summed_scores(axis: int, order: int) -> Hook:
    def scores(g: Graph, s: Steps, q: str, k: str) -> str:
        if axis == -1:
            pair = [g.unsqueeze(q, 3), g.unsqueeze(k, 2)]  # [B, S1, N, K, D]
        else:
            pair = [g.unsqueeze(flip(g, q), 4), g.unsqueeze(flip(g, k), 3)]  # [B, S1, D, N, K]
        return g.reduce("ReduceSum", g.op("Mul", *pair[::order]), axis, 0)

    return scores


def _summed_values(g: Graph, s: Steps, p: str, v: str) -> str:
    pair = g.op("Mul", g.unsqueeze(p, 4), g.unsqueeze(v, 2))  # [B, S1, N, K, C]
    return g.reduce("ReduceSum", pair, 3, 0)


def _scaled_einsum(g: Graph, s: Steps, q: str, k: str) -> str:
    return g.op("Einsum", q, k, number(g, SCALE), equation="bsnd,bskd,->bsnk")


def _batched_three(g: Graph, s: Steps, q: str, k: str) -> str:
    x = g.op(
        "MatMul",
        g.reshape(q, B * S1, N, D),
        g.op("Transpose", g.reshape(k, B * S1, K, D), perm=[0, 2, 1]),
    )
    return g.reshape(x, B, S1, N, K)


PRODUCTS: dict[str, Steps] = {
    "einsum-ellipsis": Steps(scores=_einsum("...nd,...kd->...nk")),
    "einsum-swapped": Steps(scores=_einsum("bskd,bsnd->bsnk", swap=True)),
    "einsum-letters": Steps(scores=_einsum("zyxw,zyvw->zyxv")),
    "einsum-implicit": Steps(scores=_einsum("...ce,...de")),
    "einsum-spaces": Steps(scores=_einsum("b s n d, b s k d -> b s n k")),
    "einsum-permuted": Steps(
        scores=_einsum("bsnd,bskd->kbns"),
        scale=lambda g, s, x: mul(SCALE)(g, s, g.op("Transpose", x, perm=[1, 3, 2, 0])),
    ),
    "einsum-three": Steps(scores=_scaled_einsum, scale=same),
    "einsum-values": Steps(
        product=lambda g, s, p, v: g.op("Einsum", v, p, equation="bskc,bsnk->bsnc")
    ),
    "einsum-values-ellipsis": Steps(
        product=lambda g, s, p, v: g.op("Einsum", p, v, equation="...nk,...kc->...nc")
    ),
    "key-first": Steps(
        scores=_key_first,
        hide=lambda g, s, x: flip(g, hide(g, s, flip(g, x))),
        soft=lambda g, s, x: g.op("Softmax", x, axis=-2),
        product=_value_first,
    ),
    "key-first-matmul": Steps(
        scores=_key_first,
        hide=lambda g, s, x: flip(g, hide(g, s, flip(g, x))),
        soft=lambda g, s, x: g.op("Softmax", x, axis=2),
        product=lambda g, s, p, v: g.op("MatMul", flip(g, p), v),
    ),
    "summed": Steps(scores=_summed_scores(-1, 1)),
    "summed-swapped": Steps(scores=_summed_scores(-1, -1)),
    "summed-inner": Steps(scores=_summed_scores(2, 1)),
    "summed-values": Steps(product=_summed_values),
    "three-dims": Steps(scores=_batched_three),
    "fused-value": Steps(
        product=lambda g, s, p, v: g.op("FusedMatMul", p, v, domain="com.microsoft"),
        domains=(("com.microsoft", 1),),
    ),
}


def case(group: str, name: str, s: Steps, **more: Any) -> Case:
    tags = {"exporter": "hand", "opset": s.opset, "dtype": s.kind, "dynamic": False}
    if s.kind == "f32":
        more.setdefault("op", FLOAT_KV)
    return Case(f"score-{group}-{name}", "scorepath", s.build, s.feeds, tags=tags, **more)


def cases() -> Iterator[Case]:
    for group, table in (("scale", SCALES), ("soft", SOFTMAXES), ("product", PRODUCTS)):
        for name, s in table.items():
            yield case(group, name, s)
    for name, s in SCALES.items():
        if not {"expanded"} & {name}:
            yield case("scale", f"{name}-dense", replace(s, dense=True))
    for name, s in SOFTMAXES.items():
        yield case("soft", f"{name}-dense", replace(s, dense=True))
