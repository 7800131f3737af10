"""Masks in whatever arithmetic they are spelt: a selection and a window, joined and negated."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import sfa_onnx
from tests.zoo.judge import run_fused, run_original
from tests.zoo.write import Graph

B, S, N, C, R, K = 2, 24, 4, 16, 8, 6
LOW = np.float32(-1e30)


def chosen_and_near(g: Graph) -> tuple[str, str]:
    """(selected keys [B, S, S], the last three keys [S, S]), bool."""
    _, best = g.op("TopK", "scores", g.ints(K), outputs=2, axis=-1)
    none = g.op("Expand", g.const(0.0, np.float32), g.op("Shape", "scores"))
    one = onnx.numpy_helper.from_array(np.ones(1, np.float32))
    ones = g.op("ConstantOfShape", g.op("Shape", best), value=one)
    chosen = g.cast(g.op("ScatterElements", none, best, ones, axis=-1), "bool")
    row, key = g.const(np.arange(S).reshape(S, 1)), g.const(np.arange(S).reshape(1, S))
    first = g.op("Sub", row, g.const(3))
    near = g.op("And", g.op("LessOrEqual", key, row), g.op("Greater", key, first))
    return chosen, near


def products(g: Graph) -> str:
    x = g.op("Einsum", "query", "kv", equation="bsnd,btd->bsnt")
    return str(g.op("Mul", x, g.const(0.2, np.float32)))


def attention(g: Graph, scores: str) -> onnx.ModelProto:
    weights = g.op("Softmax", scores, axis=-1)
    out = g.op("Einsum", weights, g.cut("kv", 0, C), equation="bsnt,btc->bsnc")
    inputs = {
        "query": ("f32", (B, S, N, C + R)),
        "kv": ("f32", (B, S, C + R)),
        "scores": ("f32", (B, S, S)),
    }
    return g.model(inputs, {"out": ("f32", (B, S, N, C))}, [out])


def masked(spelling: str) -> onnx.ModelProto:
    """Attention to keys that are chosen or near."""
    g = Graph(18)
    chosen, near = chosen_and_near(g)
    a, b = (g.unsqueeze(g.cast(x, "f32"), 2 if x == chosen else 1) for x in (chosen, near))
    chosen, near = g.unsqueeze(chosen, 2), g.unsqueeze(near, 1)
    x = products(g)
    low, one, zero = (g.const(n, np.float32) for n in (LOW, 1.0, 0.0))

    def shown(condition: str) -> str:
        return str(g.op("Where", condition, x, low))

    def less(number: str, than: float) -> str:
        return str(g.op("Less", number, g.const(than, np.float32)))

    def added(mask: str) -> str:
        return str(g.op("Add", x, mask))

    both = g.op("Add", a, b)
    build = {
        "or": lambda: shown(g.op("Or", chosen, near)),
        "nor hides": lambda: g.op(
            "Where", g.op("And", g.op("Not", chosen), g.op("Not", near)), low, x
        ),
        "the larger flag": lambda: shown(
            g.op("Greater", g.op("Max", a, b), g.const(0.5, np.float32))
        ),
        "no flag of two": lambda: g.op("Where", g.op("Equal", both, zero), low, x),
        "less than one": lambda: g.op("Where", less(both, 1.0), low, x),
        "opposite flags": lambda: shown(
            less(g.op("Mul", g.op("Sub", one, a), g.op("Sub", one, b)), 0.5)
        ),
        "added": lambda: added(g.op("Mul", g.op("Sub", g.op("Max", a, b), one), g.op("Neg", low))),
        "log": lambda: added(g.op("Log", g.op("Max", a, b))),
        "one of two": lambda: g.op("Where", g.op("Equal", both, one), x, low),
        "half as much": lambda: added(g.op("Mul", g.op("Sub", g.op("Max", a, b), one), one)),
    }
    return attention(g, build[spelling]())


SPELT = (
    *("or", "nor hides", "the larger flag", "no flag of two", "less than one"),
    *("opposite flags", "added", "log"),
)


@pytest.mark.parametrize("spelling", SPELT)
def test_every_spelling_of_a_union_is_one(spelling: str) -> None:
    computes_the_same(masked(spelling))


def computes_the_same(model: onnx.ModelProto) -> None:
    report = sfa_onnx.fuse(model)
    assert [s.status for s in report.sites] == ["fused"], report.sites[0].reason
    rng = np.random.default_rng(1)
    feeds = {
        v.name: rng.standard_normal([d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in model.graph.input
    }
    feeds = {name: x.astype(np.float32) for name, x in feeds.items()}
    (want,), (got,) = run_original(model, feeds), run_fused(report.model, feeds)
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("spelling", "text"),
    [
        ("one of two", "not bool and not made from one|no mask of this graph|not a selection"),
        ("half as much", "may be a bias|not part of softmax"),
    ],
)
def test_what_is_no_union_is_refused(spelling: str, text: str) -> None:
    (site,) = sfa_onnx.fuse(masked(spelling)).sites
    assert site.status == "refused"
    assert any(part in site.reason for part in text.split("|")), site.reason


def written(spelling: str) -> onnx.ModelProto:
    """Attention to the selected keys whose entries are switched on: a mask written in one go."""
    g = Graph(18)
    worth, best = g.op("TopK", "scores", g.ints(K), outputs=2, axis=-1)
    on, like = g.op("Greater", worth, g.const(0.5, np.float32)), g.op("Shape", "scores")
    zero, one, low = (g.const(n, np.float32) for n in (0.0, 1.0, -np.inf))

    def over(base: str, update: str, at: str = best, **how: str) -> str:
        return str(g.op("ScatterElements", g.op("Expand", base, like), at, update, axis=-1, **how))

    def hidden(flags: str) -> str:
        return str(g.op("Where", g.cast(flags, "bool"), zero, low))

    def ones(at: str) -> str:
        return str(g.op("Expand", one, g.op("Shape", at)))

    one_hot = g.op("OneHot", best, g.const(S), g.const((0, 1), np.float32))
    few = g.op("Concat", ones(best), g.op("Expand", zero, g.ints(B, S, S - K)), axis=-1)
    build = {
        "numbers that hide": lambda: over(low, g.op("Where", on, zero, low)),
        "flags": lambda: hidden(over(zero, g.cast(on, "f32"))),
        "the larger": lambda: hidden(over(zero, g.cast(on, "f32"), reduction="max")),
        "the product": lambda: g.op(
            "Where", g.cast(over(one, zero_like(g, best), reduction="mul"), "bool"), low, zero
        ),
        "hits counted": lambda: hidden(g.op("ReduceSum", one_hot, g.ints(2), keepdims=0)),
        "halved": lambda: over(low, g.op("Where", on, one, low)),
        "in front": lambda: hidden(few),
    }
    mask = g.unsqueeze(build[spelling](), 2)
    return attention(g, str(g.op("Add", products(g), mask)))


def zero_like(g: Graph, value: str) -> str:
    return str(g.op("Expand", g.const(0.0, np.float32), g.op("Shape", value)))


@pytest.mark.parametrize(
    "spelling", ["numbers that hide", "flags", "the larger", "the product", "hits counted"]
)
def test_every_way_to_write_a_selection_is_one(spelling: str) -> None:
    computes_the_same(written(spelling))


@pytest.mark.parametrize(
    ("spelling", "text"),
    [("halved", "1 is added to every score"), ("in front", "is not a selection|are not gathered")],
)
def test_what_writes_no_selection_is_refused(spelling: str, text: str) -> None:
    reasons = [s.reason for s in sfa_onnx.fuse(written(spelling)).sites]
    assert all(any(part in reason for part in text.split("|")) for reason in reasons), reasons


def test_the_trace_names_what_a_key_is_seen_under() -> None:
    (site,) = sfa_onnx.fuse(masked("or"), trace=True).sites
    told = [line for line in site.terms if line.startswith("a key is seen where ")]
    assert len(told) == 1
    for part in (" or ", "any(key0, (topk_", " mod 24 == (t"):
        assert part in told[0]
