"""Top-k of Min(k, keys), axes that are sums of others: fused models run wherever originals do."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx.passes.candidate import Candidate, Refusal
from sfa_onnx.passes.find.search import find_candidates
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.verify.sizes import concrete
from sfa_onnx.passes.verify.sizes.choices import BASES
from sfa_onnx.passes.verify.verifier import Verifier
from tests.zoo.judge import run_fused, run_original
from tests.zoo.write import Graph

N, C, R, D = 4, 16, 8, 6
LOW = np.float32(np.finfo(np.float32).min)


def size(g: Graph, value: str, axis: int) -> str:
    return str(g.op("Shape", value, start=axis, end=axis + 1))


def decode(
    k: int, *, opset: int = 18, padded: bool = True, gathered: bool = False, spelling: str = "min"
) -> onnx.ModelProto:
    """A chunk of new tokens after a past; the indexer selects min(k, past + new) keys.

    Every input names its sizes for itself, as exporters do.
    """
    g = Graph(opset)
    cache = g.op("Concat", "past", "new", axis=1)
    keys = g.op("Concat", "past_index", "new_index", axis=1)
    total = g.op("Add", size(g, "past", 1), size(g, "query", 1))
    if spelling == "min":
        count = g.op("Min", g.ints(k), total)
    elif spelling == "where":
        count = g.op("Where", g.op("Less", total, g.ints(k)), total, g.ints(k))
    else:
        both = g.op("Concat", total, g.ints(k), axis=0)
        count = g.op("ReduceMin", both, g.ints(0), keepdims=1)
    span = g.op("Range", g.const(0, np.int64), g.squeeze(total, 0), g.const(1, np.int64))
    at = g.op("Range", g.const(0, np.int64), g.squeeze(size(g, "query", 1), 0), g.const(1))
    at = g.unsqueeze(g.op("Add", at, size(g, "past", 1)), -1)
    seen = g.op("LessOrEqual", g.unsqueeze(span, 0), at)  # [S, T]
    seen = g.unsqueeze(seen, 0)
    if padded:
        shown = g.unsqueeze(g.cast("attention_mask", "bool"), 1)
        seen = g.op("And", seen, shown)  # [B, S, T]
    hidden = g.const(LOW)
    score = g.op("MatMul", "query_index", g.op("Transpose", keys, perm=[0, 2, 1]))
    score = g.op("Where", seen, score, hidden)
    _, chosen = g.op("TopK", score, count, outputs=2, axis=-1)
    if gathered:
        out = gathered_attention(g, cache, chosen, seen)
    else:
        out = masked_attention(g, cache, chosen, seen, score)
    inputs = {
        "query": ("f32", ("b0", "s0", N, C + R)),
        "past": ("f32", ("b1", "p1", C + R)),
        "new": ("f32", ("b2", "s2", C + R)),
        "query_index": ("f32", ("b3", "s3", D)),
        "past_index": ("f32", ("b4", "p4", D)),
        "new_index": ("f32", ("b5", "s5", D)),
    }
    if padded:
        inputs["attention_mask"] = ("i64", ("b6", "t6"))
    model = g.model(inputs, {"out": ("f32", ("b0", "s0", N, C))}, [out])
    onnx.checker.check_model(model)
    return model


def masked_attention(g: Graph, cache: str, chosen: str, seen: str, score: str) -> str:
    base = g.op("Expand", g.const(LOW), g.op("Shape", score))
    zeros = g.op("ConstantOfShape", g.op("Shape", chosen))
    mask = g.op("ScatterElements", base, chosen, zeros, axis=-1)
    mask = g.unsqueeze(g.op("Where", seen, mask, g.const(LOW)), 2)
    x = g.op("Einsum", "query", cache, equation="bsnd,btd->bsnt")
    x = g.op("Add", g.op("Mul", x, g.const(0.2, np.float32)), mask)
    weights = g.op("Softmax", x, axis=-1)
    return str(g.op("Einsum", weights, g.cut(cache, 0, C), equation="bsnt,btc->bsnc"))


def gathered_attention(g: Graph, cache: str, chosen: str, seen: str) -> str:
    rows = g.op("GatherND", cache, g.unsqueeze(chosen, -1), batch_dims=1)
    wide = g.op("Expand", seen, g.op("Concat", g.ints(1), g.op("Shape", chosen, start=1, end=2),
                                     g.ints(1), axis=0))  # fmt: skip
    wide = g.op("Expand", wide, g.op("Concat", size(g, chosen, 0), g.ints(1, 1), axis=0))
    valid = g.unsqueeze(g.op("GatherElements", wide, chosen, axis=2), 2)
    x = g.op("MatMul", "query", g.op("Transpose", rows, perm=[0, 1, 3, 2]))
    x = g.op("Where", valid, g.op("Mul", x, g.const(0.2, np.float32)), g.const(LOW))
    return str(g.op("MatMul", g.op("Softmax", x, axis=-1), g.cut(rows, 0, C)))


def feeds(model: onnx.ModelProto, batch: int, past: int, new: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(past * 10 + new)
    sizes = {"b": batch, "s": new, "p": past, "t": past + new}
    given = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [d.dim_value or sizes[d.dim_param[0]] for d in dims]
        given[value.name] = rng.standard_normal(shape).astype(np.float32)
    if "attention_mask" in given:
        shape = given["attention_mask"].shape
        left = rng.integers(0, past + 1, (batch, 1))  # padding on the left, never a new token
        given["attention_mask"] = (np.arange(shape[1]) >= left).astype(np.int64)
    return given


def agree(model: onnx.ModelProto, k: int) -> None:
    report = sfa_onnx.fuse(model)
    assert [s.status for s in report.sites] == ["fused"], report.sites[0].reason
    record = report.sites[0].record
    assert record is not None
    assert max(p.error for p in record.probes) < 1e-12
    lengths = (1, k - 1, k, k + 1, 3 * k)
    for batch, past, new in itertools.product((1, 2), lengths, (1, 3)):
        if past < 1:
            continue
        given = feeds(model, batch, past, new)
        (want,), (got,) = run_original(model, given), run_fused(report.model, given)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-6, err_msg=f"{past} + {new}")


@pytest.mark.parametrize(
    ("k", "padded"), [(2, True), (3, False), (4, True), (8, False), (19, True)]
)
def test_top_k_is_never_more_than_there_are_keys(k: int, padded: bool) -> None:
    agree(decode(k, padded=padded), k)


@pytest.mark.parametrize(("opset", "spelling"), [(17, "where"), (20, "reduce"), (23, "min")])
@pytest.mark.parametrize("gathered", [False, True])
def test_spellings_of_the_minimum(opset: int, spelling: str, gathered: bool) -> None:
    agree(decode(5, opset=opset, spelling=spelling, gathered=gathered), 5)


def test_sizes_named_apart_are_assumed_to_be_one() -> None:
    """The mask is as long as past and new tokens together, whatever its axis is called."""
    (site,) = sfa_onnx.fuse(decode(4)).fused
    assert site.record is not None
    said = [text for text in site.record.assumptions if text.startswith("the sizes")]
    assert any("t6" in text and "+" in text for text in said), said
    assert all("discharged by nobody: the caller" in text for text in said)


@pytest.mark.parametrize("looks", [True, False])
def test_a_baked_count_is_seen_on_the_short_side_only(
    looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replacement with 4 in place of Min(4, keys) agrees wherever there are 4 keys."""
    if not looks:
        monkeypatch.setattr(concrete, "turns", lambda *_: [])
        monkeypatch.setattr(concrete.Sizer, "_of_length", lambda *_: None)
    index = GraphIndex.of(decode(4))
    (candidate,) = find_candidates(index)
    assert isinstance(candidate, Candidate)
    (top,) = (n for n in candidate.replacement if n.op_type == "TopK")
    four = onnx.numpy_helper.from_array(np.array([4]), "four")
    candidate.replacement_initializers.append(four)
    top.input[1] = "four"
    verdict = Verifier(index).verify(candidate)
    assert isinstance(verdict, Refusal) == looks


def test_both_sides_of_a_minimum_are_probed() -> None:
    for k in (4, 40, 700):
        index = GraphIndex.of(decode(k))
        (candidate,) = find_candidates(index)
        assert isinstance(candidate, Candidate)
        sizer = concrete.Sizer(index, candidate, "")
        assert sizer.bases()[0][1].batches == BASES[0]["B"]
        around = {(d.capacity, d.slots) for _, d in sizer.others([]) if abs(d.capacity - k) <= 1}
        assert around >= {(k - 1, k - 1), (k, k), (k + 1, k)}
        assert not sizer.unturned


def latest(last: int, *, masked: bool) -> onnx.ModelProto:
    """Keys are selected among the last few of a cache: `cache[:, -last:]`, on an open axis."""
    g = Graph(18)
    ends = g.ints(-last), g.ints(np.iinfo(np.int64).max), g.ints(1)
    recent = g.op("Slice", "cache", *ends)
    _, chosen = g.op("TopK", "scores", g.ints(4), outputs=2, axis=-1)
    if masked:
        seen = g.op("Less", "scores", g.const(9, np.float32))
        out = masked_attention(g, recent, chosen, seen, "scores")
    else:
        rows = g.op("GatherND", recent, g.unsqueeze(chosen, -1), batch_dims=1)
        x = g.op("MatMul", "query", g.op("Transpose", rows, perm=[0, 1, 3, 2]))
        x = g.op("Mul", x, g.const(0.2, np.float32))
        out = g.op("MatMul", g.op("Softmax", x, axis=-1), g.cut(rows, 0, C))
    inputs = {
        "query": ("f32", ("B", "S", N, C + R)),
        "cache": ("f32", ("B", "T", C + R)),
        "scores": ("f32", ("B", "S", last)),
    }
    return g.model(inputs, {"out": ("f32", ("B", "S", N, C))}, [out])


@pytest.mark.parametrize("masked", [False, True])
def test_the_last_keys_are_those_of_each_run(masked: bool) -> None:
    """A slice from the end begins elsewhere in every run: no offset may be baked in."""
    model = latest(8, masked=masked)
    report = sfa_onnx.fuse(model)
    assert [s.status for s in report.sites] == ["fused"], report.sites[0].reason
    rng = np.random.default_rng(0)
    for batch, keys in itertools.product((1, 2), (8, 9, 21)):
        given = {
            "query": rng.standard_normal((batch, 3, N, C + R)).astype(np.float32),
            "cache": rng.standard_normal((batch, keys, C + R)).astype(np.float32),
            "scores": rng.standard_normal((batch, 3, 8)).astype(np.float32),
        }
        (want,), (got,) = run_original(model, given), run_fused(report.model, given)
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-6, err_msg=f"{keys} keys")


def test_repeats_are_read_through_a_one_hot_row_of_counts():
    """`repeat_interleave` by TorchScript: counts per axis are a OneHot of (1, count)."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    f (float[b,1,s,6] x, float[b,n,s] q) => (float[b,n,s,6] y)
    <int64[1] axis={2}, int64 five={5}, int64[1] one={1}, int64[1] first={1}, int64[1] after={2}> {
        shape = Shape(q)
        n = Slice(shape, first, after)
        counts = Concat<axis=0>(one, n)
        hot = OneHot<axis=-1>(axis, five, counts)
        flat = Constant<value=int64[1] {-1}>()
        each = Reshape(hot, flat)
        wide = Unsqueeze(x, axis)
        tiled = Tile(wide, each)
        y = Squeeze(tiled, one)
    }"""
    graph = onnx.parser.parse_model(text).graph
    del graph.output[0].type.tensor_type.shape.dim[:]
    sizes = Concrete(GraphIndex(graph))
    b, n, s = sizes.shape("q")
    assert sizes.shape("tiled") == (b, 1, n, s, 6)
    assert sizes.entries("each") == [1, 1, n, 1, 1]
