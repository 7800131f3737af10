"""Near misses of `scorepath`: one step away from the operator, and what must be said of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from tests.zoo.base import Case
from tests.zoo.scorepath import (
    S1,
    S2,
    SCALE,
    B,
    C,
    D,
    Hook,
    K,
    N,
    R,
    Steps,
    flip,
    hide,
    mul,
    number,
    over_sum,
    same,
    shifted,
)
from tests.zoo.write import Graph


def _gate(kind: str) -> Hook:
    def soft(g: Graph, s: Steps, x: str) -> str:
        if kind == "hardmax":
            return g.op("Hardmax", x, axis=-1)
        if kind == "argmax":
            best = g.op("ArgMax", x, axis=-1, keepdims=0)
            keys = S2 if s.dense else K
            return g.op("OneHot", best, g.ints(keys), g.const([0, 1], np.float32), axis=-1)
        e = {
            "relu": lambda: g.op("Relu", x),
            "softplus": lambda: g.op("Softplus", x),
            "sigmoid": lambda: g.op("Sigmoid", x),
            "elu": lambda: g.op("Add", g.op("Elu", x), number(g, 1)),
            "square": lambda: g.op("Pow", x, number(g, 2)),
            "tanh": lambda: g.op("Tanh", x),
        }[kind.removesuffix("-norm")]()
        return over_sum(g, e) if kind.endswith("-norm") else e

    return soft


def _finite(g: Graph, s: Steps, x: str) -> str:
    """A finite fill, so that no weight is NaN."""
    hidden = g.op("Less", g.unsqueeze("indices", 2), g.const(0, np.int32))
    return g.op("Where", hidden, number(g, -50.0), x)


def _after(renormalise: bool) -> Hook:
    """Weights zeroed, scores not hidden."""

    def weigh(g: Graph, s: Steps, p: str) -> str:
        hidden = g.op("Less", g.unsqueeze("indices", 2), g.const(0, np.int32))
        p = g.op("Where", hidden, number(g, 0), p)
        return g.op("Div", p, g.reduce("ReduceSum", p)) if renormalise else p

    return weigh


def _kept(kind: str) -> Hook:
    """Weights times a scattered mask, divided by their sum."""

    def weigh(g: Graph, s: Steps, p: str) -> str:
        one = np.full((B, S1, K), 0.5 if kind == "graded" else 1.0)
        zeros = number(g, np.zeros((B, S1, S2)))
        mask = g.op("ScatterElements", zeros, s.indices(g), number(g, one), axis=-1)
        if kind == "graded":
            mask = g.op("Add", mask, number(g, 0.1))
        p = g.op("Mul", p, g.unsqueeze(mask, 2))
        total = g.reduce("ReduceSum", p)
        return g.op("Div", p, g.op("Add", total, number(g, 1e-6)) if kind == "eps" else total)

    return weigh


def _normalised(g: Graph, s: Steps, k: str) -> str:
    mean = g.reduce("ReduceMean", g.op("Mul", k, k))
    return g.op("Div", k, g.op("Sqrt", g.op("Add", mean, number(g, 1e-6))))


def _rotated(g: Graph, s: Steps, k: str) -> str:
    at = g.unsqueeze(g.cast("indices", "f32"), 3)
    nope, rope = g.cut(k, 0, C), g.cut(k, C, D)
    left, right = g.cut(rope, 0, R // 2), g.cut(rope, R // 2, D)
    cos, sin = g.op("Cos", at), g.op("Sin", at)
    turned = g.op("Sub", g.op("Mul", left, cos), g.op("Mul", right, sin))
    other = g.op("Add", g.op("Mul", right, cos), g.op("Mul", left, sin))
    return g.op("Concat", nope, turned, other, axis=-1)


def _layer_norm(g: Graph, s: Steps, k: str) -> str:
    return g.op("LayerNormalization", k, number(g, np.ones(D)), axis=-1)


class Linear(Steps):
    """phi(q) (phi(k)^T v): no weights at all."""

    def build(self) -> onnx.ModelProto:
        g = Graph(self.opset)
        self.outputs = []
        keys = self.rows(g)
        phi = g.op("Add", g.op("Elu", keys), number(g, 1))
        state = g.op("MatMul", flip(g, phi), g.cut(keys, 0, C))
        out = g.op("MatMul", g.op("Add", g.op("Elu", "query"), number(g, 1)), state)
        inputs = {"query": ("f32", (B, S1, N, D)), "kv": ("f32", (B, S2, D))}
        inputs["indices"] = ("i32", (B, S1, K))
        return g.model(inputs, {"out": ("f32", (B, S1, N, C))}, [out])


class Indexer(Steps):
    """Scores of keys that no indexer gives, their best keys, and nothing that attends to them."""

    def build(self) -> onnx.ModelProto:
        g = Graph(self.opset)
        x = g.op(
            "Sigmoid",
            g.op("MatMul", "query", g.unsqueeze(g.op("Transpose", "kv", perm=[0, 2, 1]), 1)),
        )
        score = g.reduce("ReduceSum", g.op("Mul", x, number(g, np.ones((N, 1)))), 2, 0)
        best = g.op("TopK", score, g.ints(K), outputs=2, axis=-1)
        inputs = {"query": ("f32", (B, S1, N, D)), "kv": ("f32", (B, S2, D))}
        return g.model(inputs, {"out": ("i64", (B, S1, K))}, [best[1]])


def _scale_input(g: Graph, s: Steps, x: str) -> str:
    return g.op("Mul", x, "factor")


def _output(g: Graph, s: Steps, x: str) -> str:
    s.outputs.append(x)
    return x


def _through(kind: str, back: str) -> Hook:
    """Rounded to a narrower type and back."""
    return lambda g, s, x: g.cast(g.cast(x, kind), back)


def _negative(g: Graph, s: Steps, x: str) -> str:
    return g.op("Mul", x, number(g, -SCALE))


def _other_cache(g: Graph, s: Steps, k: str) -> str:
    at = g.op("Max", g.cast("indices", "i64"), g.const(0, np.int64))
    return g.op("GatherND", "values", g.unsqueeze(at, -1), batch_dims=1)


def _training(g: Graph, s: Steps, p: str) -> str:
    return g.op("Dropout", p, number(g, 0.5), g.const(True))


def _per_head(g: Graph, s: Steps, q: str, k: str) -> str:
    parts = [g.op("MatMul", g.cut(q, n, n + 1, 2), flip(g, k)) for n in range(N)]
    return g.op("Concat", *parts, axis=2)


NEAR: dict[str, tuple[Steps, str]] = {
    "sigmoid": (Steps(soft=_gate("sigmoid")), "sigmoid"),
    "sigmoid-norm": (Steps(soft=_gate("sigmoid-norm")), "sigmoid"),
    "hardmax": (Steps(soft=_gate("hardmax")), "hardmax"),
    "argmax": (Steps(soft=_gate("argmax"), hide=same), "argmax|OneHot"),
    "relu-norm": (Steps(soft=_gate("relu-norm")), "relu"),
    "softplus-norm": (Steps(soft=_gate("softplus-norm")), "softplus"),
    "elu": (Steps(soft=_gate("elu")), "elu"),
    "square-norm": (Steps(soft=_gate("square-norm"), hide=same), "pow"),
    "tanh": (Steps(soft=_gate("tanh")), "tanh"),
    "relu": (Steps(soft=_gate("relu")), "relu"),
    "none": (Steps(soft=same, hide=same), "softmax"),
    "unnormalised": (Steps(soft=lambda g, s, x: g.op("Exp", shifted(g, x))), "sum"),
    "keys-normalised": (Steps(keys=_normalised), "changed by"),
    "keys-layer-norm": (Steps(keys=_layer_norm), "LayerNormalization"),
    "keys-rotated": (Steps(keys=_rotated), "changed by"),
    "keys-rounded": (Steps(keys=lambda g, s, k: g.op("Round", k)), "Round"),
    "keys-clipped": (
        Steps(keys=lambda g, s, k: g.op("Clip", k, number(g, -3), number(g, 3))), "Clip"
    ),
    "mask-after": (Steps(hide=same, weigh=_after(False)), "zero"),
    "mask-after-sum": (Steps(hide=same, weigh=_after(True)), "FUSES"),
    "mask-after-sum-dense": (Steps(hide=same, weigh=_kept(""), dense=True), "FUSES"),
    "mask-after-padded": (Steps(hide=same, weigh=_kept("eps"), dense=True), "plain sum"),
    "mask-after-graded": (Steps(hide=same, weigh=_kept("graded"), dense=True), "not bool"),
    "axis-heads": (Steps(hide=_finite, soft=lambda g, s, x: g.op("Softmax", x, axis=2)), "axis"),
    "axis-tokens": (Steps(hide=_finite, soft=lambda g, s, x: g.op("Softmax", x, axis=1)), "axis"),
    "head-by-head": (Steps(scores=_per_head), "joins the scores of 4 products"),
    "keys-only": (
        Steps(value=_other_cache, more={"values": ("f32", (B, S2, C))}), "value"
    ),
    "values-ungathered": (
        Steps(value=lambda g, s, k: "values", more={"values": ("f32", (B, S1, K, C))}), "value"
    ),
    "indexer": (Indexer(), "no attention"),
    "linear": (Linear(), "linear|softmax"),
    "scale-input": (
        Steps(scale=_scale_input, more={"factor": ("f32", ())}), "factor"
    ),
    "scale-per-head": (
        Steps(scale=mul(np.linspace(0.1, 0.2, N).reshape(1, 1, N, 1))), "scaled by"
    ),
    "scale-per-token": (
        Steps(scale=_scale_input, more={"factor": ("f32", (B, S1, 1, 1))}), "factor"
    ),
    "scale-negative": (Steps(scale=_negative), "negative|positive"),
    "scale-zero": (Steps(scale=mul(0.0)), "zero|positive"),
    "f16-scores": (
        Steps(hide=lambda g, s, x: hide(g, s, _through("f16", "f32")(g, s, x))), "FLOAT16"
    ),
    "bf16-scores": (
        Steps(hide=lambda g, s, x: hide(g, s, _through("bf16", "f32")(g, s, x))), "BFLOAT16"
    ),
    "f16-weights": (Steps(weigh=_through("f16", "f32")), "FLOAT16"),
    "dropout-training": (Steps(weigh=_training), "Dropout"),
    "softcap": (
        Steps(scale=lambda g, s, x: g.op("Mul", g.op("Tanh", mul(SCALE / 30)(g, s, x)),
                                         number(g, 30.0))),
        "soft-cap",
    ),
    "clipped": (
        Steps(scale=lambda g, s, x: g.op("Clip", x, number(g, -50), number(g, 50))), "clip"
    ),
    "query-normed": (  # fine: outside of the attention
        Steps(query=_normalised), "FUSES"
    ),
    "gated": (
        Steps(result=lambda g, s, o: g.op("Mul", o, g.op("Sigmoid", "gate")),
              more={"gate": ("f32", (B, S1, N, C))}), "FUSES",
    ),
    "averaged": (
        Steps(result=lambda g, s, o: g.reduce("ReduceMean", o, 2), wide=1), "FUSES"
    ),
    "value-shifted": (Steps(value=lambda g, s, k: g.cut(k, 1, C + 1)), "value"),
    "value-tail": (Steps(value=lambda g, s, k: g.cut(k, R, D)), "EITHER"),
    "weights-output": (
        Steps(weigh=_output, extra={"weights": ("f32", (B, S1, N, K))}), "graph output"
    ),
    "scores-output": (
        Steps(scale=lambda g, s, x: _output(g, s, mul(SCALE)(g, s, x)),
              extra={"seen": ("f32", (B, S1, N, K))}), "graph output"
    ),
    "position-bias": (
        Steps(hide=lambda g, s, x: hide(g, s, g.op("Add", x, "table")),
              more={"table": ("f32", (1, 1, N, K))}), "table"
    ),
    "alibi": (
        Steps(hide=lambda g, s, x: hide(g, s, g.op(
            "Add", x, number(g, -np.arange(K) * 0.1)))), "added to"
    ),
    "temperature-learned": (
        Steps(scale=lambda g, s, x: g.op("Div", x, g.op("Exp", "factor")),
              more={"factor": ("f32", (1,))}), "scaled by"
    ),
    "quantised-product": (
        Steps(scores=lambda g, s, q, k: g.op(
            "MatMulInteger", g.cast(q, "i8"), g.cast(flip(g, k), "i8")),
              scale=lambda g, s, x: mul(SCALE)(g, s, g.cast(x, "f32"))), "MatMulInteger"
    ),
    "weights-rounded": (
        Steps(weigh=lambda g, s, p: g.op("Round", p)), "Round"
    ),
    "weights-power": (
        Steps(weigh=lambda g, s, p: g.op("Pow", p, number(g, 2))), "Pow"
    ),
    "weights-scaled": (Steps(weigh=mul(0.5)), "Mul|scaled"),
}  # fmt: skip


def _case(name: str, s: Steps, **more: Any) -> Case:
    tags = {"exporter": "hand", "opset": s.opset, "dtype": s.kind, "dynamic": False}
    build = lambda: s.build()  # noqa: E731 - of this module: its source names the cache
    return Case(f"score-near-{name}", "scoremiss", build, s.feeds, tags=tags, **more)


def cases() -> Iterator[Case]:
    for name, (s, reason) in NEAR.items():
        if reason == "FUSES":
            yield _case(name, s)
        elif reason == "EITHER":  # not how rows are stored elsewhere, but the operator could
            yield _case(name, s, expect="either")
        else:
            yield _case(name, s, expect="refuse", reason=reason)
