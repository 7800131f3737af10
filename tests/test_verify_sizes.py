"""Sites whose sizes the file fixes: opened and verified at small sizes, and what must not pass.

The graphs are static prefill and decode with 128 heads, far beyond what could be run in float64.
As in the mutant suite the binder's candidate is kept, as if it had been fooled. `quick=0` has every
site opened, however quickly it would run.
"""

import numpy as np
import pytest
from onnx import numpy_helper

from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION
from sfa_onnx.passes.candidate import Operand, Refusal, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.form import Form
from sfa_onnx.passes.verify import Verifier
from sfa_onnx.passes.verify.sizes.forms import Family, Forms
from sfa_onnx.passes.verify.sizes.tables import Band, Fill, Stairs, rule_of
from sfa_onnx.report import VerifyRecord
from tests.hand_sites import FLOAT, INT64, TOPK, candidate_of, changed, model_of

S, K, N = 1024, 512, 128
DENSE = f"""
<ir_version: 10, opset_import: ["" : 18]>
site (float[1,{S},{N},32] q, float[1,{S},{N},8] qr, float[1,{S},32] lat, float[1,{S},8] rope,
      int64[1,{S},{K}] idx) => (float[1,{S},{N},32] y)
<float scale = {{0.15811388}}, float ninf = {{-inf}}, int64[3] full = {{1, {S}, {S}}},
 int64[3] few = {{1, {S}, {K}}}, int64[1] two = {{2}}, int64[1] zero = {{0}}, int64[1] one = {{1}},
 int64 c0 = {{0}}, int64 c1 = {{1}}, int64 end = {{{S}}}, int64[2] square = {{{S}, {S}}}>
{{
  sn = Einsum<equation="bshc,btc->bsht">(q, lat)
  sr = Einsum<equation="bshr,btr->bsht">(qr, rope)
  sum = Add(sn, sr)
  scaled = Mul(sum, scale)
  base = Expand(ninf, full)
  zeros = ConstantOfShape(few)
  m0 = ScatterElements<axis=-1>(base, idx, zeros)
  keep = Identity(causal)
  m1 = Where(keep, m0, ninf)
  m = Unsqueeze(m1, two)
  masked = Add(scaled, m)
  p = Softmax<axis=-1>(masked)
  y = Einsum<equation="bsht,btc->bshc">(p, lat)
}}
"""
DENSE_NEW = f"""
<ir_version: 10, opset_import: ["" : 18, "npu" : 1]>
r (float[1,{S},{N},32] q, float[1,{S},{N},8] qr, float[1,{S},32] lat, float[1,{S},8] rope,
   int64[1,{S},{K}] idx) => (float[1,{S},{N},32] y)
{{
  axis = Constant<value_ints = [2]>()
  idx32 = Cast<to=6>(idx)
  indices = Unsqueeze(idx32, axis)
  key = Unsqueeze(lat, axis)
  key_rope = Unsqueeze(rope, axis)
  y = npu.NPUSparseFlashAttention<scale_value=0.15811388, sparse_block_size=1, layout_query="BSND",
    layout_kv="BSND", sparse_mode=3, pre_tokens=9223372036854775807,
    next_tokens=9223372036854775807, attention_mode=2, return_softmax_lse=0>(
    q, key, key, indices, "", "", "", qr, key_rope)
}}
"""
OPERANDS = (
    Operand("q", Role.QUERY, ("1", "S1", "N1", "C"), FLOAT),
    Operand("qr", Role.QUERY_ROPE, ("1", "S1", "N1", "R"), FLOAT),
    Operand("lat", Role.LATENT, ("1", "S2", "C"), FLOAT),
    Operand("rope", Role.KEY_ROPE, ("1", "S2", "R"), FLOAT),
    Operand("idx", Role.INDICES, ("1", "S1", "K"), INT64, TOPK),
)
ROW, COLUMN = np.arange(S)[:, None], np.arange(S)
CAUSAL = COLUMN <= ROW
KEEP = "  keep = Identity(causal)"
ORDER = "  iota = Range(c0, end, c1)\n  row = Unsqueeze(iota, one)\n"


def _verdict(changes=None, table=CAUSAL, **options):
    model = model_of(changed(DENSE, changes or {}))
    if table is not None:
        model.graph.initializer.append(numpy_helper.from_array(table, "causal"))
    candidate = candidate_of(model, DENSE_NEW, OPERANDS, SPARSE_FLASH_ATTENTION)
    return Verifier(GraphIndex.of(model), **options).verify(candidate)


def test_a_prefill_that_cannot_be_run_is_verified_at_small_sizes():
    record = _verdict()
    assert isinstance(record, VerifyRecord), record
    assert record.sizes["S1"] == record.sizes["S2"] < 64
    assert f"S2={record.sizes['S2']} instead of {S}" in record.shrunk
    assert f"K={record.sizes['K']} instead of {K}" in record.shrunk
    assert max(p.error for p in record.probes) < 1e-12
    assert next(p.draws for p in record.probes if p.name == "sizes") >= 2
    assert "causal" in record.constants_read
    assert record.seconds < 60


@pytest.mark.parametrize(
    "rule",
    [
        ORDER + "  keep = LessOrEqual(iota, row)",
        "  ones = ConstantOfShape<value = float[1] {1.0}>(square)\n"
        "  tri = Trilu<upper=1>(ones, c1)\n"
        "  nothing = Constant<value = float {0.0}>()\n  keep = Equal(tri, nothing)",
    ],
    ids=["positions", "triangle"],
)
def test_causal_rules_that_the_graph_computes(rule):
    record = _verdict({KEEP: rule}, table=None)
    assert isinstance(record, VerifyRecord), record


WINDOW = ORDER + (
    "  w = Constant<value_int={w}>()\n  from = Sub(row, w)\n  near = Greater(iota, from)\n"
    "  past = LessOrEqual(iota, row)\n  keep = And(near, past)"
)
# name -> (changes, table): what a fooled binder might take for the operator
NEAR = {
    "table off by one": ({}, COLUMN <= ROW + 1),
    "table off by one the other way": ({}, (COLUMN < ROW) | (COLUMN == 0)),
    "no causal rule": ({}, np.ones((S, S), bool)),
    "table shifted by a size": ({}, COLUMN <= ROW + K),
    "window table": ({}, CAUSAL & (COLUMN > ROW - 100)),
    "window table as wide as the selection": ({}, CAUSAL & (COLUMN > ROW - K)),
    "one hole in the table": ({}, CAUSAL & ~((ROW == 700) & (COLUMN == 3))),
    "window of a number that is no size": ({KEEP: WINDOW.replace("{w}", "100")}, None),
    "window of a number that is a size": ({KEEP: WINDOW.replace("{w}", str(K))}, None),
    "window near a size": ({KEEP: WINDOW.replace("{w}", str(S - 3))}, None),
    "keys behind a fixed position": (
        {
            KEEP: ORDER + "  limit = Constant<value_int=60>()\n  early = Less(iota, limit)\n"
            "  past = LessOrEqual(iota, row)\n  keep = And(early, past)"
        },
        None,
    ),
    "keys behind the selection's size": (
        {
            KEEP: ORDER + f"  limit = Constant<value_int={K}>()\n  early = Less(iota, limit)\n"
            "  past = LessOrEqual(iota, row)\n  keep = And(early, past)"
        },
        None,
    ),
    "a sink at a fixed position": (
        {
            KEEP: ORDER + "  at = Constant<value_int=40>()\n  sink = Equal(iota, at)\n"
            "  past = LessOrEqual(iota, row)\n  keep = Or(past, sink)"
        },
        None,
    ),
    "half of the selection": (
        {
            "(base, idx, zeros)": "(base, part, zeros)",
            f"int64[3] few = {{1, {S}, {K}}}": f"int64[3] few = {{1, {S}, 100}}, "
            "int64[1] hundred = {100}",
            "  m0 =": "  part = Slice(idx, zero, hundred, two)\n  m0 =",
        },
        CAUSAL,
    ),
    "scale off by a millionth": ({"{0.15811388}": "{0.15811420}"}, CAUSAL),
    "a threshold in floating point": (
        {
            KEEP: ORDER + "  pos = Cast<to=1>(iota)\n  limit = Constant<value = float {60.0}>()\n"
            "  early = Less(pos, limit)\n  past = LessOrEqual(iota, row)\n  keep = And(early, past)"
        },
        None,
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_refused_at_these_sizes(name):
    verdict = _verdict(*NEAR[name])
    assert isinstance(verdict, Refusal), name
    told = "not verifiable within budget" in verdict.reason
    assert told == (name in ("table off by one the other way", "one hole in the table"))
    if name == "one hole in the table":
        assert "no rule gives the table 'causal'" in verdict.reason


def test_opening_agrees_with_the_sizes_of_the_file():
    """A small prefill: run as it is, or opened; a question at its own sizes confirms the latter."""
    text = changed(DENSE, {"{1, 1024, 1024}": "{1, 64, 64}"}).replace("1024", "64")
    text = text.replace("512", "40").replace("128", "3")
    new = DENSE_NEW.replace("1024", "64").replace("512", "40").replace("128", "3")
    model = model_of(text)
    model.graph.initializer.append(numpy_helper.from_array(CAUSAL[:64, :64], "causal"))
    candidate = candidate_of(model, new, OPERANDS, SPARSE_FLASH_ATTENTION)
    records = [Verifier(GraphIndex.of(model), quick=q).verify(candidate) for q in (60.0, 1e-3)]
    assert all(isinstance(r, VerifyRecord) for r in records)
    true, opened = records
    assert true.sizes["S2"] == 64
    assert not true.shrunk
    assert opened.sizes["S2"] < 64


def _forms(*sizes):
    forms = Forms()
    for size in sizes:
        forms.symbol(size)
    return forms


def test_numbers_are_read_as_sizes_simplest_first():
    forms = _forms(4096, 512)
    assert str(forms.of(4096)[0]) == "size_4096"
    assert str(forms.of(4095)[0]) == "size_4096 - 1"
    assert forms.of(3584)[0]({"size_4096": 30, "size_512": 10}) == 20  # n - m
    products = [f({"size_4096": 30, "size_512": 10}) for f in forms.of(4096 * 512)]
    assert products[0] == 30 * 10
    assert forms.of(7)[0] == Form(const=7)
    assert forms.of(1 << 62)[0].fixed
    assert all(f(forms.sizes) == 1000 for f in forms.of(1000))


def test_tables_are_read_as_rules():
    assert rule_of(np.full((2, 9), 3)) == Fill(3)
    assert rule_of(np.arange(40).reshape(1, 40) * 2 + 5) == Stairs(5, (0, 2))
    table = np.arange(6)[:, None] * 100 + np.arange(40)
    assert rule_of(table) == Stairs(0, (100, 1))
    assert rule_of(CAUSAL) == Band(True, False, None, 0)
    assert rule_of(~CAUSAL) == Band(True, False, 1, None)
    hidden = np.where(CAUSAL, np.float32(0), np.float32(-np.inf))
    assert rule_of(hidden).high == 0
    rng = np.random.default_rng(0)
    assert rule_of(rng.integers(0, 9, (4, 40))) is None
    assert rule_of(rng.random((4, 40)) > 0.5) is None


@pytest.mark.parametrize("numbers", [(64, 40), (64, 64), (40, 64)])
def test_a_family_keeps_the_order_of_sizes_and_constants(numbers):
    """A window between two sizes stays between them, else it could hide at small ones."""
    window = Form(((1, ("size_512",)),), 5)
    family = Family({"size_4096": 4096, "size_512": 512}, frozenset({window}), frozenset())
    both = {"size_4096", "size_512"}
    chosen = dict(zip(("size_4096", "size_512"), numbers, strict=True))
    assert family.admits(chosen, both) == (numbers[1] + 5 < numbers[0])
    assert not family.admits({"size_4096": 20, "size_512": 16}, both)
