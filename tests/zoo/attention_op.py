"""Family: the `Attention` operator of opsets 23 and 24, and onnxruntime's own, in every form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from tests.zoo.base import FLOAT_KV, NP_TYPES, Case, Feeds
from tests.zoo.scorepath import S1, S2, B, C, D, K, N
from tests.zoo.write import KINDS, Graph


@dataclass(frozen=True)
class Form:
    """One node and what is around it.

    form: "dense" (a mask scattered from top-k) or "gathered" rows; mask: "bool", "float" or "".
    """

    form: str = "dense"
    mask: str = "float"
    flat: bool = False  # [B, S, N * D] inputs
    opset: int = 23
    kind: str = "f32"
    attrs: tuple[tuple[str, Any], ...] = (("scale", 0.15),)
    outputs: int = 1
    used: bool = False  # the last output leaves the graph
    past: bool = False
    lengths: bool = False
    groups: int = 1
    contrib: str = ""

    def build(self) -> onnx.ModelProto:
        g = Graph(self.opset)
        rows = self._rows(g)
        inputs = [*self._operands(g, rows), self._mask(g)]
        if self.past:
            inputs += [g.unsqueeze("past", 1), g.cut(g.unsqueeze("past", 1), 0, C)]
        if self.lengths:
            inputs += [""] * (6 - len(inputs)) + ["lengths"]
        while not inputs[-1]:
            inputs.pop()
        domain = "com.microsoft" if self.contrib else ""
        made = g.op(
            self.contrib or "Attention", *inputs, outputs=self.outputs, domain=domain,
            **dict(self.attrs), **self._heads(),
        )  # fmt: skip
        outs = [made] if self.outputs == 1 else made
        result = self._result(g, outs[0])
        shapes: dict[str, Any] = {"out": (self.kind, (B, S1, N, C))}
        if self.used:
            shapes["second"] = (self.kind, (B, N, S1, S2) if self.outputs == 4 else (B, 1, 48, D))
        results = [result, *([outs[-1 if self.outputs == 4 else 1]] if self.used else [])]
        more = (("com.microsoft", 1),) if self.contrib else ()
        return g.model(self._inputs(), shapes, results, more)

    def _inputs(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "query": (self.kind, (B, S1, N, D)),
            "kv": (self.kind, (B, S2, self.groups * D)),
            "wish": ("f32", (B, S1, S2)),
        }
        if self.past:
            found["past"] = (self.kind, (B, 8, D))
        if self.lengths:
            found["lengths"] = ("i64", (B,))
        return found

    def _heads(self) -> dict[str, int]:
        if self.contrib:
            return {"num_heads": N}
        return {"q_num_heads": N, "kv_num_heads": self.groups} if self.flat else {}

    def _rows(self, g: Graph) -> str:
        best = g.op("TopK", "wish", g.ints(K), outputs=2, axis=-1)[1]
        if self.form == "dense":
            zeros = g.const(np.zeros((B, S1, K)), NP_TYPES[self.kind])
            low = g.const(np.full((B, S1, S2), -np.inf), NP_TYPES[self.kind])
            self.__dict__["scattered"] = g.op("ScatterElements", low, best, zeros, axis=-1)
            return "kv"
        rows = g.op("GatherND", "kv", g.unsqueeze(best, -1), batch_dims=1)
        return g.reshape(rows, B * S1, K, D)

    def _operands(self, g: Graph, rows: str) -> list[str]:
        dense = self.form == "dense"
        heads = N if self.contrib else self.groups
        if self.contrib:  # as many key heads as query heads
            rows = g.op("Tile", rows, g.ints(1, 1, N))
        if self.flat or self.contrib:
            q = g.reshape("query", *((B, S1) if dense else (B * S1, 1)), N * D)
            shape = (B, S2) if dense else (B * S1, K)
            values = g.cut(g.reshape(rows, *shape, heads, D), 0, C)
            return [q, rows, g.reshape(values, *shape, heads * C)]
        shape = (B, S2) if dense else (B * S1, K)
        k = g.op("Transpose", g.reshape(rows, *shape, heads, D), perm=[0, 2, 1, 3])
        q = "query" if dense else g.reshape("query", B * S1, 1, N, D)
        return [g.op("Transpose", q, perm=[0, 2, 1, 3]), k, g.cut(k, 0, C)]

    def _mask(self, g: Graph) -> str:
        if self.form != "dense" or not self.mask:
            return ""
        scattered = g.unsqueeze(self.__dict__["scattered"], 1)
        if self.past:
            scattered = g.op("Pad", scattered, g.ints(0, 0, 0, 8, 0, 0, 0, 0))
        if self.mask == "bool":
            return g.op("Greater", scattered, g.const(-1, NP_TYPES[self.kind]))
        return scattered

    def _result(self, g: Graph, out: str) -> str:
        if not (self.flat or self.contrib):
            out = g.op("Transpose", out, perm=[0, 2, 1, 3])
        return g.reshape(out, B, S1, N, C)

    def feeds(self, seed: int) -> Feeds:
        rng = np.random.default_rng(seed)
        real = NP_TYPES[self.kind]
        found: Feeds = {
            "query": rng.standard_normal((B, S1, N, D)).astype(real),
            "kv": rng.standard_normal((B, S2, self.groups * D)).astype(real),
            "wish": rng.permuted(
                np.broadcast_to(np.arange(S2, dtype=np.float32), (B, S1, S2)), axis=-1
            ),
        }
        if self.past:
            found["past"] = rng.standard_normal((B, 8, D)).astype(real)
        if self.lengths:
            found["lengths"] = np.full(B, S2 - 4)
        return found


def _with(base: Form, **attrs: Any) -> Form:
    return replace(base, attrs=tuple(attrs.items()))


FLOAT16 = KINDS["f16"]
DENSE, GATHERED = Form(), Form("gathered", mask="")
FUSE = {
    "dense-float": DENSE,
    "dense-bool": replace(DENSE, mask="bool"),
    "dense-flat": replace(DENSE, flat=True),
    "dense-24": replace(DENSE, opset=24),
    "gathered": GATHERED,
    "gathered-flat": replace(GATHERED, flat=True),
    "gathered-24": replace(GATHERED, opset=24),
    "no-scale": _with(GATHERED),
    "no-softcap": _with(GATHERED, scale=0.2, softcap=0.0),
    "not-causal": _with(DENSE, scale=0.2, is_causal=0),
    "causal": _with(DENSE, scale=0.2, is_causal=1),
    "unused-scores": replace(_with(DENSE, scale=0.2, qk_matmul_output_mode=3), outputs=4),
    "precise": replace(_with(DENSE, scale=0.2, softmax_precision=1), kind="f16"),
}
REFUSE = {
    "softcap": (_with(GATHERED, scale=0.2, softcap=30.0), "soft-cap"),
    "past": (replace(DENSE, past=True), "cache of its own"),
    "used-scores": (
        replace(_with(DENSE, scale=0.2, qk_matmul_output_mode=3), outputs=4, used=True),
        "second output",
    ),
    "narrow": (_with(GATHERED, scale=0.2, softmax_precision=FLOAT16), "FLOAT16"),
    "groups": (replace(DENSE, groups=2), "have 2 heads"),
    "groups-flat": (replace(DENSE, groups=2, flat=True), "have 2 heads"),
    "lengths": (replace(DENSE, opset=24, lengths=True), "nonpad_kv_seqlen"),
    "ort-multi-head": (
        replace(_with(GATHERED, scale=0.2), contrib="MultiHeadAttention", opset=18),
        "operator of onnxruntime with a softmax inside",
    ),
}  # fmt: skip


def cases() -> Iterator[Case]:
    for name, s in FUSE.items():
        op = {"op": FLOAT_KV} if s.kind == "f32" else {}
        yield _case(name, s, **op)
    for name, (s, reason) in REFUSE.items():
        yield _case(name, s, expect="refuse", reason=reason)


def _case(name: str, s: Form, **more: Any) -> Case:
    tags = {"exporter": "hand", "opset": s.opset, "dtype": s.kind, "dynamic": False}
    return Case(f"attnop-{name}", "attention_op", s.build, s.feeds, tags=tags, **more)
