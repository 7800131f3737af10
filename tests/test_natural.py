"""Masks as ordinary calls make them: what hides every key of most rows is refused.

Rows without a visible key are an assumption wherever a mask can make them, the right one included.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import pytest
from onnx import parser

import sfa_onnx
from sfa_onnx.passes.verify import verifier
from tests.zoo.judge import run_fused, run_original
from tests.zoo.write import Graph

N, C, R, K = 4, 32, 8, 6
TILE = 8  # columns of one scale
AVERAGE = "rows without a visible key: average before, zeros after"
NAN = "rows without a visible key: NaN before, zeros after"
LOWS = {"-1e30": np.float32(-1e30), "least": np.finfo(np.float32).min, "-inf": np.float32(-np.inf)}


def invalid(g: Graph, index: str, kind: str) -> str:
    """What a graph takes for an invalid index; `index` is int64 [B, S, K]."""
    zero, minus = g.const(0, np.int64), g.const(-1, np.int64)
    total = g.squeeze(g.op("Shape", "kv", start=1, end=2), 0)
    match kind:
        case "negative" | "swapped":
            return str(g.op("Less", index, zero))
        case "is -1":
            return str(g.op("Equal", index, minus))
        case "not in range":
            low, high = g.op("Less", index, zero), g.op("GreaterOrEqual", index, total)
            return str(g.op("Or", low, high))
        case "inverted":
            return str(g.op("Less", zero, index))
        case "not negative":
            return str(g.op("GreaterOrEqual", index, zero))
        case "below the end":
            return str(g.op("Less", index, total))
        case "is not -1":
            return str(g.op("Not", g.op("Equal", index, minus)))
        case "always":
            return str(g.op("Less", index, g.const(1 << 27, np.int64)))
        case "constant":
            return str(g.op("Expand", g.const(True), g.op("Shape", index)))
        case "low score":  # of a TopK
            return str(g.op("Less", "scores", g.const(-1e20, np.float32)))
        case "low score, inverted":
            return str(g.op("Greater", "scores", g.const(-1e20, np.float32)))
        case "by length":  # also the lengths that somebody gives
            return str(g.op("GreaterOrEqual", index, g.unsqueeze("lengths", 1, 2)))
        case "by length, inverted":
            return str(g.op("Less", index, g.unsqueeze("lengths", 1, 2)))
    raise AssertionError(kind)


def rows_of(g: Graph, at: str, *, int8: bool) -> str:
    """Gathered rows [B, S, K, C + R]: of floats, or of int8 codes times a scale per 8 columns."""
    at = g.unsqueeze(at, -1)
    if not int8:
        return str(g.op("GatherND", "kv", at, batch_dims=1))
    codes, scale = (g.op("GatherND", x, at, batch_dims=1) for x in ("kv", "scale"))
    tiles = g.reshape(g.cast(codes, "f32"), 0, 0, K, C // TILE, TILE)
    return str(g.reshape(g.op("Mul", tiles, g.unsqueeze(scale, -1)), 0, 0, K, C))


def gathered(
    kind: str, low: str, *, fixed: bool = False, opset: int = 18, int8: bool = False
) -> onnx.ModelProto:
    """Attention over gathered rows, whose mask is made of the indices alone."""
    g = Graph(opset)
    if "score" in kind:
        index = g.op("TopK", "index_scores", g.ints(K), outputs=2, axis=-1)[1]
        g.nodes[-1].output[0] = "scores"
    else:
        index = g.cast("indices", "i64")
    bad = g.unsqueeze(invalid(g, index, kind), 2)
    safe = g.op("Max", index, g.const(0, np.int64))
    rows = rows_of(g, safe, int8=int8)
    x = g.op("MatMul", "query", g.op("Transpose", rows, perm=[0, 1, 3, 2]))
    x = g.op("Mul", x, g.const(0.17, np.float32))
    hidden = g.const(LOWS[low])
    x = g.op("Where", bad, x, hidden) if kind == "swapped" else g.op("Where", bad, hidden, x)
    out = g.op("MatMul", g.op("Softmax", x, axis=-1), g.cut(rows, 0, C))
    b, s, t = (2, 3, 24) if fixed else ("B", "S", "T")
    width = C if int8 else C + R
    inputs = {
        "query": ("f32", (b, s, N, width)),
        "kv": ("i8" if int8 else "f32", (b, t, width)),
        "indices": ("i32", (b, s, K)),
    }
    if int8:
        inputs["scale"] = ("f32", (b, t, C // TILE))
    if "score" in kind:
        del inputs["indices"]
        inputs["index_scores"] = ("f32", (b, s, t))
    if "length" in kind:
        inputs["lengths"] = ("i64", (b,))
    return g.model(inputs, {"out": ("f32", (b, s, N, C))}, [out])


WRONG = (
    *("inverted", "not negative", "below the end", "is not -1", "always", "constant", "swapped"),
    *("by length, inverted", "low score, inverted"),
)


FORMS = itertools.cycle([("-1e30", False), ("least", True), ("-inf", False), ("-inf", True)])


@pytest.mark.parametrize(
    ("kind", "low", "fixed"),
    [
        *((kind, *form) for kind, form in zip(WRONG, FORMS, strict=False)),
        *(("inverted", low, fixed) for low in LOWS for fixed in (False, True)),
    ],
)
def test_a_mask_that_hides_what_is_selected_is_refused(kind: str, low: str, fixed: bool) -> None:
    (site,) = sfa_onnx.fuse(gathered(kind, low, fixed=fixed)).sites
    assert site.status == "refused", f"{kind} with {low}"


@pytest.mark.parametrize(("kind", "status"), [("negative", "fused"), ("not negative", "refused")])
def test_rows_of_int8_are_judged_too(kind: str, status: str) -> None:
    (site,) = sfa_onnx.fuse(gathered(kind, "-1e30", int8=True)).sites
    assert site.status == status, site.reason
    if site.record is not None:
        assert AVERAGE in site.record.assumptions
    else:
        assert "hides every index" in site.reason


def test_the_reason_names_the_mask() -> None:
    (site,) = sfa_onnx.fuse(gathered("inverted", "-1e30")).sites
    assert "hides every index that is in range" in site.reason
    assert "is it inverted?" in site.reason


@pytest.mark.parametrize(
    ("kind", "low", "said"),
    [
        ("negative", "-1e30", AVERAGE),
        ("is -1", "-inf", NAN),
        ("not in range", "least", AVERAGE),
        ("by length", "-inf", NAN),
        ("by length", "least", AVERAGE),
        ("low score", "-1e30", AVERAGE),
    ],
)
def test_rows_without_keys_are_an_assumption_of_the_right_mask(
    kind: str, low: str, said: str
) -> None:
    model = gathered(kind, low)
    (site,) = sfa_onnx.fuse(model).sites
    assert site.status == "fused", site.reason
    assert site.record is not None
    assert [a for a in site.record.assumptions if "visible key" in a] == [said]


def test_certificate_and_report_say_it(tmp_path: Path) -> None:
    proof = tmp_path / "proof.json"
    model = tmp_path / "model.onnx"
    onnx.save(gathered("negative", "-1e30"), model)
    report = sfa_onnx.fuse(model, tmp_path / "fused.onnx", certificate=proof)
    assert AVERAGE in proof.read_text()
    assert AVERAGE in json.dumps(sfa_onnx.report.to_json(report))


def test_what_the_assumption_says_is_what_happens() -> None:
    model = gathered("negative", "-1e30")
    rng = np.random.default_rng(0)
    given = {
        "query": rng.standard_normal((1, 2, N, C + R)).astype(np.float32),
        "kv": rng.standard_normal((1, 9, C + R)).astype(np.float32),
        "indices": np.array([[[3, 1, -1, -1, -1, -1], [-1] * 6]], np.int32),
    }
    (want,), (got,) = run_original(model, given), run_fused(sfa_onnx.fuse(model).model, given)
    np.testing.assert_allclose(got[0, 0], want[0, 0], atol=5e-6)
    np.testing.assert_allclose(want[0, 1], np.tile(given["kv"][0, 0, :C], (N, 1)), atol=1e-6)
    assert not got[0, 1].any()


@pytest.mark.parametrize("kind", ["inverted", "swapped", "low score, inverted"])
def test_only_this_judgement_finds_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, the same graphs are verified for every mask that is fed, and fused."""
    monkeypatch.setattr(verifier, "hidden_by_mask", lambda *_: None)
    (site,) = sfa_onnx.fuse(gathered(kind, "-1e30")).sites
    assert site.status == "fused"


def dense(causal: str, low: str, *, padded: bool) -> onnx.ModelProto:
    """Attention over all keys; a scatter keeps selected ones, a rule of positions hides others."""
    g = Graph(18)
    total = g.op("Shape", "kv", start=1, end=2)
    new = g.op("Shape", "query", start=1, end=2)
    _, chosen = g.op("TopK", "score", g.ints(K), outputs=2, axis=-1)
    wide = g.op("Shape", "score")
    hidden = g.op("Expand", g.const(False), wide)
    kept = g.op("Expand", g.const(True), g.op("Shape", chosen))
    kept = g.op("ScatterElements", hidden, chosen, kept, axis=-1)
    span = g.op("Range", g.const(0), g.squeeze(total, 0), g.const(1))
    at = g.op("Range", g.squeeze(g.op("Sub", total, new), 0), g.squeeze(total, 0), g.const(1))
    at = g.unsqueeze(at, -1)
    rule = g.op(causal, g.unsqueeze(span, 0), at)
    seen = g.op("And", kept, g.unsqueeze(rule, 0))
    if padded:
        seen = g.op("And", seen, g.unsqueeze(g.cast("attention_mask", "bool"), 1))
    x = g.op("Einsum", "query", "kv", equation="bsnd,btd->bsnt")
    x = g.op("Mul", x, g.const(0.17, np.float32))
    x = g.op("Where", g.unsqueeze(seen, 2), x, g.const(LOWS[low]))
    out = g.op("Softmax", x, axis=-1)
    out = g.op("Einsum", out, g.cut("kv", 0, C), equation="bsnt,btc->bsnc")
    inputs = {
        "query": ("f32", ("B", "S", N, C + R)),
        "kv": ("f32", ("B", "T", C + R)),
        "score": ("f32", ("B", "S", "T")),
    }
    if padded:
        inputs["attention_mask"] = ("i64", ("B", "T"))
    return g.model(inputs, {"out": ("f32", ("B", "S", N, C))}, [out])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("low", "said"), [("least", AVERAGE), ("-inf", NAN)])
def test_dense_masks_are_judged_too(padded: bool, low: str, said: str) -> None:
    (right,) = sfa_onnx.fuse(dense("LessOrEqual", low, padded=padded)).sites
    assert right.status == "fused", right.reason
    assert right.record is not None
    assert said in right.record.assumptions
    (wrong,) = sfa_onnx.fuse(dense("Greater", low, padded=padded)).sites
    assert wrong.status == "refused"
    assert "hides" in wrong.reason


OWN_SIZE = """<ir_version: 8, opset_import: ["" : 17]>
site (float[b,s,4,40] q, float[b,t,40] kv, float[b,s,u] w, int64[b,t] there) => (float[b,s,4,32] o)
<int64[1] k4={4}, int64[1] z={0}, int64[1] one={1}, int64[1] two={2}, int64[1] ax3={3},
 int64[1] c32={32}, float sc={0.15}, float low={-1e30}>
{
 best, idx = TopK(w, k4)
 sb = Shape<start=0, end=2>(q)
 sk = Shape<start=1, end=2>(kv)
 whole = Concat<axis=0>(sb, sk)
 none = ConstantOfShape<value=bool[1] {0}>(whole)
 ish = Shape(idx)
 ones = ConstantOfShape<value=bool[1] {1}>(ish)
 sel = ScatterElements<axis=-1>(none, idx, ones)
 t1 = Unsqueeze(there, one)
 keep = Cast<to=9>(t1)
 m = And(sel, keep)
 m4 = Unsqueeze(m, two)
 k = Unsqueeze(kv, one)
 kt = Transpose<perm=[0,1,3,2]>(k)
 s0 = MatMul(q, kt)
 s1 = Mul(s0, sc)
 x = Where(m4, s1, low)
 p = Softmax<axis=-1>(x)
 v = Slice(k, z, c32, ax3)
 o = MatMul(p, v)
}"""


def test_what_a_top_k_chose_among_may_have_a_size_of_its_own_name():
    """Padding of a half-full cache does not hide what is selected, whatever scores are called."""
    for low, status in (("low", "fused"), ("sc", "refused")):
        model = parser.parse_model(OWN_SIZE.replace("s1, low)", f"s1, {low})"))
        assert [s.status for s in sfa_onnx.fuse(model).sites] == [status], low


_CUT = """<ir_version: 8, opset_import: ["" : 17]>
cut (float[B,S,4,40] q, float[B,T,40] kv, int32[B,S,6] given) => (float[B,S,4,32] o)
<int64 zero={0}, int64[1] two={2}, int64[1] first={0}, int64[1] last={-1}, int64[1] width={32},
 float low={-1e30}> {
  idx = Cast<to=7>(given)
  bad = Less(idx, BOUND)
  bad4 = Unsqueeze(bad, two)
  safe = Max(idx, ONE)
  at = Unsqueeze(safe, last)
  rows = GatherND<batch_dims=1>(kv, at)
  keys = Transpose<perm=[0,1,3,2]>(rows)
  scores = MatMul(q, keys)
  seen = Where(bad4, low, scores)
  p = Softmax<axis=-1>(seen)
  v = Slice(rows, first, width, last)
  o = MatMul(p, v)
}"""


@pytest.mark.parametrize(
    ("second", "status"), [(("zero", "given"), "fused"), (("width", "zero"), "refused")]
)
def test_a_verdict_is_shared_only_where_the_masks_are_made_alike(
    second: tuple[str, str], status: str
) -> None:
    # Max of two types runs nowhere, so masks and indices are operands, made outside of the site.
    layers = [
        parser.parse_model(_CUT.replace("BOUND", bound).replace("ONE", one))
        for bound, one in (("zero", "given"), second)
    ]
    both = (onnx.compose.add_prefix(layer, f"l{n}_") for n, layer in enumerate(layers))
    report = sfa_onnx.fuse(onnx.compose.merge_models(*both, io_map=[]))
    assert [s.status for s in report.sites] == ["fused", status]
