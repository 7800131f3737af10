"""Sizes that inputs name differently and the graph makes one; masks too large to be read."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, parser

import sfa_onnx
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.meet import of_quotient, of_view
from sfa_onnx.passes.shapes.size import StandIns
from tests.zoo.judge import run_fused, run_original
from tests.zoo.write import Graph

N, C, R, K = 2, 16, 8, 8


def attention(g: Graph, query: str, rows: str, mask: str = "") -> str:
    x = g.op("MatMul", query, g.op("Transpose", rows, perm=[0, 1, 3, 2]))
    x = g.op("Mul", x, g.const(0.17, np.float32))
    if mask:
        x = g.op("Where", mask, x, g.const(-np.inf, np.float32))
    return g.op("MatMul", g.op("Softmax", x, axis=-1), g.cut(rows, 0, C))


def fixed_batch() -> onnx.ModelProto:
    """The query declares (b, s), keys and indices (2, s): rows b * s and 2 * s meet."""
    g = Graph(18)
    rows = g.op("GatherND", "kv", g.unsqueeze("indices", -1), batch_dims=1)
    query, rows = g.reshape("query", -1, 1, N, C + R), g.reshape(rows, -1, 1, K, C + R)
    inputs = {
        "query": ("f32", ("b", "s", N, C + R)),
        "kv": ("f32", (2, "t", C + R)),
        "indices": ("i64", (2, "s", K)),
    }
    return g.model(inputs, {"out": ("f32", ("n", 1, N, C))}, [attention(g, query, rows)])


def static_table(size: int, kind: str = "bool", *, inverted: bool = False) -> onnx.ModelProto:
    """Causal rule as a [1, 1, size, size] table of the file."""
    g = Graph(18)
    table = np.tril(np.ones((size, size), bool))[None, None]
    t = g.const(~table if inverted else table)
    t = g.op("Not", t) if inverted else t
    if kind == "f32":
        t = g.const(np.where(table, 0, -np.inf).astype(np.float32))
    zeros = g.op("Expand", g.const(0, np.float32), g.ints(1, size, size))
    ones = g.op("Expand", g.const(1, np.float32), g.ints(1, size, K))
    hot = g.cast(g.op("ScatterElements", zeros, "indices", ones, axis=-1), "bool")
    query, keys = g.op("Transpose", "query", perm=[0, 2, 1, 3]), g.unsqueeze("kv", 1)
    hot = g.unsqueeze(hot, 1)
    x = g.op("MatMul", query, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
    x = g.op("Mul", x, g.const(0.17, np.float32))
    hidden = g.const(-np.inf, np.float32)
    if kind == "f32":
        x = g.op("Add", g.op("Where", hot, x, hidden), t)
    else:
        x = g.op("Where", g.op("And", hot, t), x, hidden)
    out = g.op("MatMul", g.op("Softmax", x, axis=-1), g.cut(keys, 0, C))
    inputs = {
        "query": ("f32", (1, size, N, C + R)),
        "kv": ("f32", (1, size, C + R)),
        "indices": ("i64", (1, size, K)),
    }
    out = g.op("Transpose", out, perm=[0, 2, 1, 3])
    return g.model(inputs, {"out": ("f32", (1, size, N, C))}, [out])


def feeds(batch: int, rows: int, keys: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    indices = rng.permuted(np.tile(np.arange(keys), (batch, rows, 1)), axis=-1)[..., :K]
    here = (indices == 0).any(-1)
    indices[..., 0] = np.where(here, indices[..., 0], 0)  # every row sees the first key
    return {
        "query": rng.standard_normal((batch, rows, N, C + R)).astype(np.float32),
        "kv": rng.standard_normal((batch, keys, C + R)).astype(np.float32),
        "indices": indices,
    }


def agree(model: onnx.ModelProto, fused: onnx.ModelProto, given: dict[str, np.ndarray]) -> None:
    (want,), (got,) = run_original(model, given), run_fused(fused, given)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6)


def test_symbol_that_meets_a_number_is_that_number() -> None:
    model = fixed_batch()
    report = sfa_onnx.fuse(model)
    assert len(report.fused) == 1, report.sites[0].reason
    for rows, keys in ((3, 20), (1, 11)):
        agree(model, report.model, feeds(2, rows, keys))


@pytest.mark.parametrize("inverted", [False, True])
def test_bool_table_too_large_to_read_is_a_mask_as_if_fed(inverted: bool) -> None:
    size = 1100  # more than 1 MiB
    model = static_table(size, inverted=inverted)
    report = sfa_onnx.fuse(model)
    assert len(report.fused) == 1, report.sites[0].reason
    record = report.sites[0].record
    assert record is not None
    assert not any(
        np.prod(t.dims) >= size**2
        for t in model.graph.initializer
        if t.name in record.constants_read
    )
    agree(model, report.model, feeds(1, size, size))
    assert any("too large to be read" in text for text in record.assumptions)


def test_float_table_too_large_to_read_is_refused() -> None:
    (site,) = sfa_onnx.fuse(static_table(1100, "f32")).sites
    assert site.status == "refused"
    assert "cannot be shown to hold only 0 and -inf" in site.reason


@pytest.mark.parametrize("keys", [K, 20])
def test_static_window_over_few_rows(keys: int) -> None:
    """A table of the file hides most of what is drawn; rows without keys are no verdict."""
    g, rows = Graph(18), np.arange(3)[:, None] + keys - 3
    at = np.arange(keys)
    window = g.const(((at <= rows) & (at > rows - 4))[None])
    seen = g.op("GatherElements", window, "indices", axis=2)
    picked = g.op("GatherND", "kv", g.unsqueeze("indices", -1), batch_dims=1)
    out = attention(g, "query", picked, g.unsqueeze(seen, 2))
    inputs = {
        "query": ("f32", (1, 3, N, C + R)),
        "kv": ("f32", (1, keys, C + R)),
        "indices": ("i64", (1, 3, K)),
    }
    model = g.model(inputs, {"out": ("f32", (1, 3, N, C))}, [out])
    report = sfa_onnx.fuse(model)
    assert len(report.fused) == 1, report.sites[0].reason
    given = feeds(1, 3, keys)
    given["indices"][..., 0] = keys - 3  # in every window
    if keys > K:
        given["indices"][..., 1:] = np.arange(1, K)
    else:
        given["indices"][...] = np.arange(K)
    agree(model, report.model, given)


def test_two_batch_axes_are_refused() -> None:
    """Only the first rows of such keys could be drawn: a site must not be judged by these alone."""
    g = Graph(18)
    rows = g.op("GatherND", "kv", g.unsqueeze("indices", -1), batch_dims=2)
    rows = g.unsqueeze(rows, 2)
    x = g.op("MatMul", "query", g.op("Transpose", rows, perm=[0, 1, 2, 4, 3]))
    x = g.op("Softmax", g.op("Mul", x, g.const(0.17, np.float32)), axis=-1)
    out = g.op("MatMul", x, g.cut(rows, 0, C))
    inputs = {
        "query": ("f32", (2, 3, 1, N, C + R)),
        "kv": ("f32", (2, 3, 40, C + R)),
        "indices": ("i64", (2, 3, K)),
    }
    model = g.model(inputs, {"out": ("f32", (2, 3, 1, N, C))}, [out])
    (site,) = sfa_onnx.fuse(model).refused
    assert site.reason == "the keys kv have 2 batch axes (B, B_1)"
    assert site.hint == "merge them into one in front of the attention"


def test_sizes_that_contradict_each_other_stop_no_other_site() -> None:
    """A second product over weights meets two axes of one input; the first site fuses."""
    g = Graph(18)
    rows = g.op("GatherND", "kv", g.unsqueeze("indices", -1), batch_dims=1)
    out = attention(g, "query", rows)
    weights = g.op(
        "Softmax", g.op("Add", "square", g.op("Transpose", "square", perm=[1, 0, 2])), axis=-1
    )
    product = g.op("ReduceSum", g.op("Mul", weights, "square"), g.ints(1), keepdims=0)
    inputs = {
        "query": ("f32", ("b", "s", N, C + R)),
        "kv": ("f32", ("b", "t", C + R)),
        "indices": ("i64", ("b", "s", K)),
        "square": ("f32", ("u", "v", 4)),
    }
    outs = {"out": ("f32", ("b", "s", N, C)), "other": ("f32", ("u", 4))}
    report = sfa_onnx.fuse(g.model(inputs, outs, [out, product]))
    assert len(report.fused) == 1


def test_indices_for_a_part_of_the_rows_are_refused() -> None:
    """A scatter may write to the first sequence alone: the batch is not 1 because indices are."""
    g = Graph(18)
    shape = g.op(
        "Concat",
        g.op("Shape", "query", start=0, end=2),
        g.op("Shape", "kv", start=1, end=2),
        axis=0,
    )
    zeros = g.op("Expand", g.const(0, np.float32), shape)
    ones = g.op("Expand", g.const(1, np.float32), g.op("Shape", "indices"))
    hot = g.cast(g.op("ScatterElements", zeros, "indices", ones, axis=-1), "bool")
    out = attention(g, "query", g.unsqueeze("kv", 1), g.unsqueeze(hot, 2))
    inputs = {
        "query": ("f32", ("b", "s", N, C + R)),
        "kv": ("f32", ("b", "t", C + R)),
        "indices": ("i64", (1, "s", K)),
    }
    model = g.model(inputs, {"out": ("f32", ("b", "s", N, C))}, [out])
    given = feeds(2, 3, 20)
    given["indices"] = given["indices"][:1]
    assert np.isnan(run_original(model, given)[0][1]).all(), "the second sequence sees no key"
    (site,) = sfa_onnx.fuse(model).sites
    assert site.status == "refused"
    assert "indices has size 1 on axis 0" in site.reason


def test_quotients_of_sizes_say_what_must_be_one():
    sizes = {"b": 7, "s": 11, "b2": 13, "s2": 17}
    assert of_quotient("(8*b2*s2)//(b*s)", sizes) == (13, 7)
    assert of_quotient("(8*b2*s2)//(b*s)", sizes | {"b2": 7}) == (17, 11)
    assert of_quotient("(8*s2*b2)//(s*b)", sizes) == (13, 7), "axes pair in the order of the inputs"
    assert of_quotient("4*(s2//s)", sizes) == (17, 11)
    for whole in ("(8*b*s)//(b*s)", "(s + 63)//64", "(b*s)//b2", "(b*s)//b", "b*s", "?"):
        assert of_quotient(whole, sizes) is None


def test_views_say_what_must_be_one():
    home = StandIns()
    symbols = {name: home.symbol(name) for name in ("b", "s", "b2", "s2")}
    b, s, b2, s2 = symbols.values()
    assert of_view((b2, s2, 8), (b * s, 8), symbols) == ("b2", "b")
    assert of_view((b, s2, 8), (b * s, 8), symbols) == ("s2", "s"), "what both have is one already"
    for same in (((b, s, 8), (b * s, 8)), ((b, 4), (b, 2)), ((b, 8), (b * s, 8))):
        assert of_view(*same, symbols) is None


DIM = "(8*b2*s2)//(b*s)"  # as exporters declare it
FLAT = """<ir_version: 8, opset_import: ["" : 17]>
site (float[b,s,4,40] q, float[24,40] pages, int64[b2,s2,8] ragged) => (float[n,4,32] o)
<int64[3] rows={-1,4,40}, int64[1] flat={-1}, int64[1] ax1={1}, int64[1] ax2={2}, int64[1] z={0},
 int64[1] c32={32}, int64 nought={0}, float sc={0.15}, float low={-1e30}, int64[1] m1={-1},
 int64[1] width={40}>
{
 ok = GreaterOrEqual(ragged, nought)
 bad = Not(ok)
 idx = Max(ragged, nought)
 line = Reshape(idx, flat)
 got = Gather<axis=0>(pages, line)
 bs = Shape<start=0, end=2>(q)
 n = ReduceProd<keepdims=1>(bs)
 at = Concat<axis=0>(n, m1, width)
 k = Reshape(got, at)
 none = Concat<axis=0>(n, ax1, m1)
 hid = Reshape(bad, none)
 qf = Reshape(q, rows)
 kt = Transpose<perm=[0,2,1]>(k)
 s0 = MatMul(qf, kt)
 s1 = Mul(s0, sc)
 x = Where(hid, low, s1)
 p = Softmax<axis=-1>(x)
 v = Slice(k, z, c32, ax2)
 o = MatMul(p, v)
}"""


def test_views_of_two_inputs_that_share_their_rows():
    """The exporter names the sizes of queries and indices apart; views make them one."""
    model = parser.parse_model(FLAT)
    for name, kind, dims in (("k", 1, ["b*s", DIM, 40]), ("hid", 9, ["b*s", 1, DIM])):
        model.graph.value_info.append(helper.make_tensor_value_info(name, kind, dims))
    report = sfa_onnx.fuse(model)
    assert [s.status for s in report.sites] == ["fused"], report.sites
    record = report.fused[0].record
    assert record is not None
    assert any("sizes" in a and "are equal" in a for a in record.assumptions), record.assumptions
    rng = np.random.default_rng(4)
    for b, s in ((2, 3), (1, 1), (3, 2)):
        ragged = rng.permuted(np.broadcast_to(np.arange(24), (b, s, 24)), axis=-1)[..., :8]
        ragged[0, 0, 3:] = -1
        feeds = {
            "q": rng.standard_normal((b, s, 4, 40), np.float32),
            "pages": rng.standard_normal((24, 40), np.float32),
            "ragged": np.ascontiguousarray(ragged),
        }
        want, got = run_original(model, feeds)[0], run_fused(report.model, feeds)[0]
        assert np.abs(want - got).max() <= 1e-5 * np.abs(want).max()


def test_a_range_of_floats_is_as_long_as_the_size_it_counts_to():
    g = Graph(18)
    count = g.op("Cast", g.op("Squeeze", g.op("Shape", "x", start=1, end=2)), to=1)
    zero, one = g.const(0.0, np.float32), g.const(1.0, np.float32)
    line = g.op("Cast", g.op("Range", zero, count, one), to=6)
    model = g.model({"x": ("f32", (2, "t"))}, {"line": ("i32", ("n",))}, [line])
    sizes = Concrete(GraphIndex(model.graph))
    assert sizes.shape(model.graph.node[-2].output[0]) == (sizes.symbols["t"],)
