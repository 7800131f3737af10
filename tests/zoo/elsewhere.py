"""Family: spellings of exporters that are not torch's: products by Reshape, selects by arithmetic.

TensorFlow's converter writes an einsum as Reshape, MatMul, Reshape and reads the last target off
the shapes of both operands, one of which is the attention weights; it has Where as a sum of two
products, and inputs whose dims have a name of their own each. torch's safe softmax compares all
scores with -inf. Modules of JAX count hits in float one-hot tables and spread a maximum by Reshape
and Expand. torch 2.5 and before called a local function for every operator. Converters to float16
append casts behind the nodes that read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from tests.zoo.base import FLOAT_KV, Case, Feeds
from tests.zoo.write import Graph

LOW = -1e30


@dataclass(frozen=True)
class Spec:
    """Sizes and style of one graph; `wrong` is the one thing a near miss does differently."""

    B: int = 2
    S1: int = 3
    N: int = 4
    S2: int = 20
    K: int = 6
    C: int = 32
    R: int = 8
    product: str = "matmul"  # or "reshaped"
    select: str = "where"  # or "arithmetic"
    guard: str = ""  # "all", "any", "max": how a row without keys is told
    mask: str = "negative"  # or "max", "sum", "line": one_hot over all keys
    flat: bool = False  # rows of all batches on one axis
    opset: int = 17
    nameless: bool = False
    softmax: str = ""  # "spread": by hand, with reductions that drop their axis
    edit: str = ""  # "functions": of single operators; "unsorted": casts come last; or how open
    # dims are written: "unset", "minus" (-1), "dotted" (a name that is no identifier)
    wrong: str = ""


def _f32(g: Graph, value: float) -> str:
    return g.const(value, np.float32)


def _sizes(g: Graph, x: str, *axes: int) -> str:
    return g.op("Gather", g.op("Shape", x), g.ints(*axes), axis=0)


def _times(g: Graph, s: Spec, a: str, b: str) -> str:
    """[B, S1, m, k] x [B, S1, k, n], directly or by way of three dimensions."""
    if s.product == "matmul":
        return g.op("MatMul", a, b)
    minus = g.ints(-1)

    def flat(x: str) -> str:
        rows = g.op("ReduceProd", _sizes(g, x, 0, 1), keepdims=1)
        return g.reshape_to(x, g.op("Concat", rows, _sizes(g, x, 2), minus, axis=0))

    lead = g.op("Max", _sizes(g, a, 0, 1), _sizes(g, b, 0, 1))
    target = g.op("Concat", lead, _sizes(g, a, 2), _sizes(g, b, 3), axis=0)
    return g.reshape_to(g.op("MatMul", flat(a), flat(b)), target)


def _hidden(g: Graph, s: Spec, bad: str, x: str) -> str:
    """`x` where not `bad`, very low elsewhere."""
    if s.select == "where":
        return g.op("Where", bad, _f32(g, LOW if s.guard == "" else -np.inf), x)
    kept, off = g.cast(g.op("Not", bad), "f32"), g.cast(bad, "f32")
    if s.wrong == "kept by another mask":
        kept = g.cast(g.op("Less", g.unsqueeze(g.cast("indices", "i64"), 2), g.ints(9)), "f32")
    return g.op("Add", g.op("Mul", x, kept), g.op("Mul", off, _f32(g, LOW)))


def _spread(g: Graph, s: Spec, x: str) -> str:
    """Exp(x - max) / sum, both brought back to the shape of x by Reshape and Expand."""

    def back(kind: str, y: str) -> str:
        total = g.reduce(kind, y, -1, 0)
        if kind == "ReduceMax":
            total = g.op("Max", _f32(g, -np.inf), total)
        return g.op("Expand", g.reshape(total, s.B, s.S1, s.N, 1), g.ints(s.B, s.S1, s.N, 1))

    e = g.op("Exp", g.op("Sub", x, g.op("Identity", back("ReduceMax", x))))
    return g.op("Div", e, back("ReduceSum", e))


def _softmax(g: Graph, s: Spec, x: str) -> str:
    if s.softmax == "spread":
        return _spread(g, s, x)
    p = g.op("Softmax", x, axis=-1)
    if not s.guard:
        return p
    hidden = _f32(g, 0.0 if s.wrong == "another score" else -np.inf)
    if s.guard == "max":
        empty = g.op("Equal", g.reduce("ReduceMax", x), hidden)
    elif s.guard == "all":
        hit = g.cast(g.cast(g.op("Equal", x, hidden), "bool"), "i64")
        kind = "ReduceMax" if s.wrong == "one hidden key" else "ReduceMin"
        empty = g.cast(g.reduce(kind, hit), "bool")
    else:
        seen = g.op("Not", g.op("Equal", x, hidden))
        empty = g.op("Not", g.cast(g.reduce("ReduceMax", g.cast(seen, "i64")), "bool"))
    return g.op("Where", empty, _f32(g, 0.0), p)


def _rows(g: Graph, s: Spec, idx: str) -> str:
    if not s.flat:
        return g.op("GatherND", "kv", g.unsqueeze(idx, -1), batch_dims=1)
    count, length = (g.squeeze(_sizes(g, "kv", axis), 0) for axis in (0, 1))
    batch = g.op("Range", g.const(0, np.int64), count, g.const(1, np.int64))
    start = g.op("Mul", g.unsqueeze(batch, 1, 2), length)
    return g.op("Gather", g.reshape("kv", -1, s.C + s.R), g.op("Add", idx, start), axis=0)


def _gathered(g: Graph, s: Spec) -> str:
    idx = g.cast("indices", "i64")
    bad = g.unsqueeze(g.op("Less", idx, g.const(0, np.int64)), 2)
    rows = _rows(g, s, g.op("Max", idx, g.ints(0)))
    x = _times(g, s, "query", g.op("Transpose", rows, perm=[0, 1, 3, 2]))
    x = _hidden(g, s, bad, g.op("Mul", x, _f32(g, 0.17)))
    if s.edit == "sequence":  # a split that was not optimised
        parts = g.op("SplitToSequence", rows, g.ints(s.C, s.R), axis=-1)
        value = g.op("SequenceAt", parts, g.const(0, np.int64))
        return _times(g, s, _softmax(g, s, x), value)
    start = 4 if s.wrong == "shifted value" else 0
    return _times(g, s, _softmax(g, s, x), g.cut(rows, start, start + s.C))


def _dense(g: Graph, s: Spec) -> str:
    _, idx = g.op("TopK", "index_score", g.ints(s.K), outputs=2, axis=-1)
    depth = g.const([s.S2], np.int32)
    hot = g.op("OneHot", g.cast(idx, "i32"), depth, g.const([0, 1], np.float32), axis=-1)
    if s.mask == "max":
        bad = g.op("Not", g.op("Greater", g.reduce("ReduceMax", hot, 2, 0), _f32(g, 0.5)))
        if s.wrong == "complement":
            bad = g.op("Not", bad)
        add = g.op(
            "Add",
            g.op("Mul", g.cast(g.op("Not", bad), "f32"), _f32(g, 0.0)),
            g.op("Mul", _f32(g, -1e9), g.cast(bad, "f32")),
        )
    elif s.mask == "line":  # Mul and Add for every scaling
        off = g.reduce("ReduceSum", hot, 2, 0)
        for by, more in ((-1.0, 1.0), (-4.0 if s.wrong == "soft line" else -1e9, 0.0)):
            off = g.op("Add", g.op("Mul", g.op("Identity", off), _f32(g, by)), _f32(g, more))
        add = off
    else:
        off = g.op("Sub", _f32(g, 1.0), g.reduce("ReduceSum", hot, 2, 0))
        add = g.op("Mul", off, _f32(g, -4.0 if s.wrong == "soft" else -1e9))
    keys = g.unsqueeze(g.op("Transpose", "kv", perm=[0, 2, 1]), 1)
    x = g.op("Mul", g.op("MatMul", "query", keys), _f32(g, 0.17))
    p = g.op("Softmax", g.op("Add", x, g.unsqueeze(add, 2)), axis=-1)
    return g.op("MatMul", p, g.unsqueeze(g.cut("kv", 0, s.C), 1))


class _Graph(Graph):
    def reshape_to(self, x: str, target: str) -> str:
        return self.op("Reshape", x, target)


def build(s: Spec) -> onnx.ModelProto:
    g = _Graph(s.opset)
    dense = s.mask != "negative"
    out = _dense(g, s) if dense else _gathered(g, s)

    def dims(name: str, *sizes: int) -> tuple[int | str, ...]:
        return tuple(f"{name}_{i}" if s.nameless and i < 2 else d for i, d in enumerate(sizes))

    inputs = {
        "query": ("f32", dims("q", s.B, s.S1, s.N, s.C + s.R)),
        "kv": ("f32", dims("kv", s.B, s.S2, s.C + s.R)),
    }
    if dense:
        inputs["index_score"] = ("f32", dims("i", s.B, s.S1, s.S2))
    else:
        inputs["indices"] = ("i32", dims("i", s.B, s.S1, s.K))
    model = g.model(inputs, {"out": ("f32", dims("o", s.B, s.S1, s.N, s.C))}, [out])
    return _EDITS.get(s.edit, lambda same: same)(model)


def _functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every operator without attributes becomes a call of a function that holds just it."""
    opset, made = model.opset_import[0], {}
    for node in model.graph.node:
        if node.op_type in _PLAIN:
            ins, own = [f"x{i}" for i in range(len(node.input))], f"plain_{node.op_type.lower()}"
            body = [helper.make_node(node.op_type, ins, ["y"])]
            made[own] = helper.make_function("lib", own, ins, ["y"], body, [opset])
            node.op_type, node.domain = own, "lib"
    model.functions.extend(made.values())
    model.opset_import.append(helper.make_opsetid("lib", 1))
    return model


def _unsorted(model: onnx.ModelProto) -> onnx.ModelProto:
    nodes = sorted(model.graph.node, key=lambda node: node.op_type == "Cast")
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model


def _open(style: str) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    def edit(model: onnx.ModelProto) -> onnx.ModelProto:
        for info in (*model.graph.input, *model.graph.output):
            for dim in info.type.tensor_type.shape.dim:
                name = dim.dim_param
                if name:
                    dim.Clear()
                if name and style == "minus":
                    dim.dim_value = -1
                elif name and style == "dotted":
                    dim.dim_param = f"dynamic axis.{name}"
        return model

    return edit


_PLAIN = ("Less", "Max", "Mul", "Not", "Unsqueeze", "Where")
_EDITS = {"functions": _functions, "unsorted": _unsorted} | {
    style: _open(style) for style in ("unset", "minus", "dotted")
}


def feeds(s: Spec, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    B, S2 = (s.B + 1, s.S2 + 7) if s.nameless and seed % 2 else (s.B, s.S2)
    wide = s.C + s.R
    out = {
        "query": rng.standard_normal((B, s.S1, s.N, wide)).astype(np.float32),
        "kv": rng.standard_normal((B, S2, wide)).astype(np.float32),
    }
    if s.mask != "negative":
        return out | {"index_score": rng.standard_normal((B, s.S1, S2)).astype(np.float32)}
    idx = rng.permuted(np.broadcast_to(np.arange(S2), (B, s.S1, S2)), axis=-1)[..., : s.K]
    idx[:, 1:, s.K // 2 :] = -1
    if s.guard:
        idx[0, 0] = -1  # a row without keys
    return out | {"indices": idx.astype(np.int32)}


def case(name: str, s: Spec, reason: str = "") -> Case:
    expect = {"expect": "refuse", "reason": reason} if reason else {"op": FLOAT_KV}
    tags = {"exporter": "hand", "opset": s.opset, "dtype": "f32", "dynamic": s.nameless}
    make = lambda: build(s)  # noqa: E731
    return Case(f"else-{name}", "elsewhere", make, lambda k: feeds(s, k), tags=tags, **expect)


def cases() -> Iterator[Case]:
    for nameless in (False, True):
        end = "-nameless" if nameless else ""
        yield case("reshaped" + end, Spec(product="reshaped", nameless=nameless))
        both = Spec(product="reshaped", select="arithmetic", nameless=nameless)
        yield case("reshaped-arithmetic" + end, both)
    for guard in ("all", "any", "max"):
        yield case(f"safe-{guard}", Spec(guard=guard, opset=18))
    yield case("spread", Spec(softmax="spread"))
    yield case("functions", Spec(edit="functions"))
    yield case("unsorted", Spec(edit="unsorted", select="arithmetic"))
    for style in ("unset", "minus", "dotted"):
        yield case(f"open-{style}", Spec(edit=style, nameless=True))
    yield case("flat", Spec(flat=True))
    for product in ("matmul", "reshaped"):  # the batch of the query is another name than the keys'
        yield case(f"flat-{product}-nameless", Spec(flat=True, product=product, nameless=True))
    yield case("flat-open-unset", Spec(flat=True, edit="unset", nameless=True))
    yield case("sequence", Spec(edit="sequence"))
    yield case("hot-line", Spec(mask="line"))
    yield case("hot-max", Spec(mask="max"))
    yield case("hot-sum", Spec(mask="sum"))
    near = (
        (
            "shifted value",
            "value is not the key's nope part|besides the value's columns",
            Spec(product="reshaped"),
        ),
        ("kept by another mask", "scaled by", Spec(select="arithmetic")),
        ("another score", "which is no mask|not bool", Spec(guard="all")),
        (
            "one hidden key",
            "differs per head|not bool|joins several flags",
            Spec(guard="all"),
        ),
        ("complement", "hides the selected|not a selection|mask", Spec(mask="max")),
        ("soft", "bias|-4", Spec(mask="sum")),
        ("soft line", "bias|-4|added to", Spec(mask="line")),
    )
    for wrong, reason, s in near:
        fields = {**s.__dict__, "wrong": wrong}
        yield case("near-" + wrong.replace(" ", "-"), Spec(**fields), reason)
