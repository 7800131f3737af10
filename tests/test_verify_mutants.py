"""Graphs that differ from the operator by one detail must be refused, for a true reason.

Each mutant changes one line of a correct graph and keeps the binder's candidate, as if the binder
had been fooled. `NEEDED` shows that no probe is superfluous: for each probe there is a mutant that
passes all the others.
"""

import pytest
from onnx import helper

from sfa_onnx.passes.candidate import Refusal
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.verify import PROBES, Verifier
from sfa_onnx.report import VerifyRecord
from tests.hand_sites import ANY_INDEX, gather_site

SOFTMAX = "  p = Softmax<axis=-1>(masked)"
SCALED = "  scaled = Mul(sum, scale)"
VALUE = "  v = Identity(kn)"
KEEP = "  keep3 = LessOrEqual(idx, seen3)"
LATENT = "  kn = GatherND<batch_dims=1>(lat, idx4)"


def _softmax(lines):
    return {SOFTMAX: lines}


def _const(name, value):
    return f"  {name} = Constant<value = float {{{value}}}>()\n"


EPSILON = """  top = Constant<value_ints = [-1]>()
  big = ReduceMax<keepdims=1>(masked, top)
  diff = Sub(masked, big)
  e = Exp(diff)
  total = ReduceSum<keepdims=1>(e, top)
  eps = Constant<value = float {1e-6}>()
  safe = Add(total, eps)
  p = Div(e, safe)"""

# name -> (changes, words of the reason, int8)
MUTANTS = {
    "sink of logit zero": (
        _softmax(
            "  sh = Shape(masked)\n  up = Constant<value_ints=[3]>()\n  z3 = Slice(sh, c0v, up)\n"
            "  one1 = Constant<value_ints=[1]>()\n  zs = Concat<axis=0>(z3, one1)\n"
            "  sink = Expand(zero, zs)\n  wide = Concat<axis=-1>(masked, sink)\n"
            "  pw = Softmax<axis=-1>(wide)\n  e3 = Constant<value_ints=[-1]>()\n"
            "  p = Slice(pw, c0v, e3, e3)"
        )
        | {"int64 c1 = {1}>": "int64 c1 = {1}, int64[1] c0v = {0}>"},
        "",
        False,
    ),
    "soft-cap at 50": (
        {
            SCALED: _const("cap", 50.0) + "  s0 = Mul(sum, scale)\n  s2 = Div(s0, cap)\n"
            "  s3 = Tanh(s2)\n  scaled = Mul(s3, cap)"
        },
        "",
        False,
    ),
    "soft-cap at a million": (
        {
            SCALED: _const("cap", 1e6) + "  s0 = Mul(sum, scale)\n  s2 = Div(s0, cap)\n"
            "  s3 = Tanh(s2)\n  scaled = Mul(s3, cap)"
        },
        "",
        False,
    ),
    "scores clipped at 200": (
        {
            SCALED: _const("lo", -200.0)
            + _const("hi", 200.0)
            + "  s0 = Mul(sum, scale)\n  scaled = Clip(s0, lo, hi)"
        },
        "",
        False,
    ),
    "scores clipped from above only": (
        {SCALED: _const("hi", 200.0) + "  s0 = Mul(sum, scale)\n  scaled = Min(s0, hi)"},
        "shift of all scores (a clip or a cap)",
        False,
    ),
    "epsilon in the denominator": (_softmax(EPSILON), "", False),
    "tiny bias on the scores": (
        {
            SCALED: _const("bias", 1e-3) + "  s0 = Mul(sum, scale)\n  sq = Mul(s0, s0)\n"
            "  sb = Mul(sq, bias)\n  scaled = Add(s0, sb)"
        },
        "",
        False,
    ),
    "window of 12 keys": (
        {
            KEEP: "  k1 = LessOrEqual(idx, seen3)\n  w = Constant<value_int=12>()\n"
            "  from = Sub(seen3, w)\n  k2 = Greater(idx, from)\n  keep3 = And(k1, k2)"
        },
        "",
        False,
    ),
    "value shifted by one column": (
        {
            VALUE: "  a3 = Constant<value_ints=[3]>()\n  s1a = Constant<value_ints=[1]>()\n"
            "  s16 = Constant<value_ints=[16]>()\n  z0 = Constant<value_ints=[0]>()\n"
            "  left = Slice(kn, s1a, s16, a3)\n  right = Slice(kn, z0, s1a, a3)\n"
            "  v = Concat<axis=-1>(left, right)"
        },
        "",
        False,
    ),
    "value from the next token": (
        {
            VALUE: "  plus = Add(idx, one)\n  lsh = Shape(lat)\n  s2 = Gather(lsh, c1)\n"
            "  wrap = Mod(plus, s2)\n  i2 = Unsqueeze(wrap, minus)\n"
            "  v = GatherND<batch_dims=1>(lat, i2)"
        },
        "",
        False,
    ),
    "scale of the next tile": (
        {
            "  kst = Unsqueeze(ks, minus)": "  a3 = Constant<value_ints=[3]>()\n"
            "  s1a = Constant<value_ints=[1]>()\n  z0 = Constant<value_ints=[0]>()\n"
            "  s2a = Constant<value_ints=[2]>()\n  l = Slice(ks, s1a, s2a, a3)\n"
            "  r = Slice(ks, z0, s1a, a3)\n  kr2 = Concat<axis=-1>(l, r)\n"
            "  kst = Unsqueeze(kr2, minus)"
        },
        "",
        True,
    ),
    "absolute value of the scales": (
        {"  kst = Unsqueeze(ks, minus)": "  ka = Abs(ks)\n  kst = Unsqueeze(ka, minus)"},
        "",
        True,
    ),
    "mask before the scale, finite": (
        {SCALED: "  scaled = Mul(sum, scale)", "float ninf = {-inf}": "float ninf = {-100.0}"},
        "",
        False,
    ),
    "causal rule off by one": (
        {KEEP: "  keep3 = Less(idx, seen3)"},
        "",
        False,
    ),
    "no causal rule": (
        {
            KEEP: "  k1 = LessOrEqual(idx, seen3)\n  keep3 = Or(k1, t)",
            "int64 c1 = {1}>": "int64 c1 = {1}, bool t = {1}>",
        },
        "",
        False,
    ),
    "softmax over the heads": (_softmax("  p = Softmax<axis=2>(masked)"), "", False),
    "scale off by one part in a million": (
        {"float scale = {0.22360679}": "float scale = {0.22360700}"},
        "the graph scales its scores by 0.223607",
        False,
    ),
    "rope left out": (
        {"  sum = Add(sn, sr)": "  nil = Mul(sr, zero)\n  sum = Add(sn, nil)"},
        "",
        False,
    ),
    "rope against the rolled query": (
        {
            "  sr = Einsum": "  a3 = Constant<value_ints=[3]>()\n"
            "  b1 = Constant<value_ints=[1]>()\n  b4 = Constant<value_ints=[4]>()\n"
            "  b0 = Constant<value_ints=[0]>()\n"
            "  ql = Slice(qr, b1, b4, a3)\n  qq = Slice(qr, b0, b1, a3)\n"
            "  rolled = Concat<axis=-1>(ql, qq)\n  sr = Einsum",
            "(qr, kr)": "(rolled, kr)",
        },
        "",
        False,
    ),
    "keys normalised": (
        {
            LATENT: "  k0 = GatherND<batch_dims=1>(lat, idx4)\n"
            "  nrm = ReduceL2<keepdims=1>(k0, minus)\n  kn = Div(k0, nrm)"
        },
        "",
        False,
    ),
    "mean instead of softmax": (
        _softmax(
            "  p0 = Softmax<axis=-1>(masked)\n  half = Constant<value = float {0.5}>()\n"
            "  p1 = Pow(p0, half)\n  t0 = ReduceSum<keepdims=1>(p1, minus)\n  p = Div(p1, t0)"
        ),
        "",
        False,
    ),
}


def _verdict(name, probes=PROBES):
    changes, _, int8 = MUTANTS[name]
    model, candidate = gather_site(changes, int8=int8)
    return Verifier(GraphIndex.of(model), probes).verify(candidate)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_refused(name):
    verdict = _verdict(name)
    assert isinstance(verdict, Refusal), name
    assert MUTANTS[name][1] in verdict.reason, verdict.reason
    assert "cannot be run" not in verdict.reason
    assert "could not be run" not in verdict.reason


@pytest.mark.parametrize("int8", [False, True])
def test_the_original_is_accepted(int8):
    model, candidate = gather_site(int8=int8)
    verdict = Verifier(GraphIndex.of(model)).verify(candidate)
    assert isinstance(verdict, VerifyRecord)
    assert max(p.error for p in verdict.probes) < 1e-12


def _clip(value, limit, out):
    return (
        _const(f"{out}lo", -limit)
        + _const(f"{out}hi", limit)
        + f"  {out} = Clip({value}, {out}lo, {out}hi)"
    )


# probe -> (changes that only this probe notices, words of its reason)
NEEDED = {
    "values": (
        {
            "GatherND<batch_dims=1>(lat, idx4)": "GatherND<batch_dims=1>(latc, idx4)",
            "  idx4 =": _clip("lat", 6.0, "latc") + "\n  idx4 =",
        },
        "random inputs",
    ),
    "read-out": (  # q / |q| * |q|: not a number for a zero query
        {
            "  qs = Identity(q)": "  norm = ReduceL2<keepdims=1>(q, minus)\n  unit = Div(q, norm)\n"
            "  qs = Mul(unit, norm)"
        },
        "not the selected ones",
    ),
    "poison": (  # every key leaks a hundred-billionth
        {
            SOFTMAX: "  p0 = Softmax<axis=-1>(masked)\n"
            + _const("leak", 1e-11)
            + "  p = Add(p0, leak)"
        },
        "a token outside the selection is read",
    ),
    "basis": (
        {"  qs = Identity(q)": _clip("q", 105.0, "qs")},
        "query . key",
    ),
    "shift up": (
        {SCALED: _const("hi", 200.0) + "  s0 = Mul(sum, scale)\n  scaled = Min(s0, hi)"},
        "a clip or a cap",
    ),
    "shift down": ({"float ninf = {-inf}": "float ninf = {-100.0}"}, "a sink"),
    "contrast": (
        {
            SCALED: _const("tiny", 3e-8) + "  s0 = Mul(sum, scale)\n  mag = Abs(s0)\n"
            "  big = Greater(mag, tiny)\n  scaled = Where(big, s0, zero)"
        },
        "far apart or nearly equal",
    ),
    "lengths": (  # off by one where no sequence exceeds its queries, in a larger cache
        {
            "  base = Sub(len64, s1)": "  most = ReduceMax<keepdims=0>(len64)\n"
            "  young = Equal(most, s1)\n  lsh = Shape(lat)\n  s2 = Gather(lsh, c1)\n"
            "  room = Less(s1, s2)\n  both = And(young, room)\n  off = Cast<to=7>(both)\n"
            "  more = Add(len64, off)\n  base = Sub(more, s1)"
        },
        "edge of the valid length",
    ),
    "sizes": (
        {
            KEEP: "  k1 = LessOrEqual(idx, seen3)\n  w = Constant<value_int=40>()\n"
            "  from = Sub(seen3, w)\n  k2 = Greater(idx, from)\n  keep3 = And(k1, k2)"
        },
        "other sizes",
    ),
}


def _without(name):
    return [probe for probe in PROBES if probe.name != name]


@pytest.mark.parametrize("name", NEEDED)
def test_every_probe_is_needed(name):
    changes, words = NEEDED[name]
    model, candidate = gather_site(changes)
    verdict = Verifier(GraphIndex.of(model)).verify(candidate)
    assert isinstance(verdict, Refusal)
    assert words in verdict.reason
    blind = Verifier(GraphIndex.of(model), _without(name)).verify(candidate)
    assert isinstance(blind, VerifyRecord), f"{name} is superfluous: {blind}"


def test_selection_probe_is_needed():
    """Duplicates beyond the threshold: the graph counts each, the operator looks at fewer slots."""
    model, candidate = gather_site(domain=ANY_INDEX)
    verdict = Verifier(GraphIndex.of(model)).verify(candidate)
    assert "counts duplicate" in verdict.reason
    blind = Verifier(GraphIndex.of(model), _without("selection")).verify(candidate)
    assert isinstance(blind, VerifyRecord)


def test_nan_probe_is_needed():
    """A replacement that sums up all keys, times nothing: only NaN among them shows it."""
    model, candidate = gather_site()
    candidate.replacement[-1].output[0] = "y0"
    candidate.replacement += [
        helper.make_node("ReduceSum", ["lat"], ["all"], keepdims=0),
        helper.make_node("Sub", ["all", "all"], ["nothing"]),
        helper.make_node("Add", ["y0", "nothing"], ["y"]),
    ]
    verdict = Verifier(GraphIndex.of(model)).verify(candidate)
    assert "turns the fused result into NaN" in verdict.reason
    blind = Verifier(GraphIndex.of(model), _without("nan")).verify(candidate)
    assert isinstance(blind, VerifyRecord)


def test_nan_that_the_original_spreads_is_an_edge():
    """Rows that are gathered and masked weigh nothing, but 0 * NaN is NaN: noted, not judged."""
    model, candidate = gather_site()
    record = Verifier(GraphIndex.of(model)).verify(candidate)
    assert any("hold no NaN" in a for a in record.assumptions)


NARROWED = {
    "the product": {
        "  kd = Mul(kt, kst)": "  kd0 = Mul(kt, kst)\n"
        "  kdh = Cast<to=16>(kd0)\n  kd = Cast<to=1>(kdh)"
    },
    "codes and scales": {
        "  kf = Cast<to=1>(kq)": "  kf = Cast<to=10>(kq)",
        "  kst = Unsqueeze(ks, minus)": "  ksh = Cast<to=10>(ks)\n  kst = Unsqueeze(ksh, minus)",
        "  kd = Mul(kt, kst)": "  kd0 = Mul(kt, kst)\n  kd = Cast<to=1>(kd0)",
    },
    "the value alone": {"  v = Identity(kn)": "  vh = Cast<to=10>(kn)\n  v = Cast<to=1>(vh)"},
}


@pytest.mark.parametrize("name", NARROWED)
def test_int8_rows_that_are_rounded_in_a_wider_graph(name):
    """Float64 hides it; the fused operator would be 4e-3 off in bfloat16."""
    model, candidate = gather_site(NARROWED[name], int8=True)
    verdict = Verifier(GraphIndex.of(model)).verify(candidate)
    assert "rounds the dequantised rows to" in verdict.reason
    assert "narrower than the query (FLOAT)" in verdict.reason


def test_int8_codes_may_be_cast_to_any_float_type():
    codes = {
        "  kf = Cast<to=1>(kq)": "  kfh = Cast<to=16>(kq)\n  kf = Cast<to=1>(kfh)",
    }
    model, candidate = gather_site(codes, int8=True)
    assert isinstance(Verifier(GraphIndex.of(model)).verify(candidate), VerifyRecord)


def test_the_lists_are_complete():
    """Probes of packed rows ("... bytes") have mutants of their own: graphs that decode rows."""
    general = {p.name for p in PROBES if p.gating and not p.name.endswith("bytes")}
    assert general == {*NEEDED, "selection", "nan"}
