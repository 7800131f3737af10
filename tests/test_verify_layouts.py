"""Verification of packed sequences (TND) and paged caches: right graphs pass, wrong ones do not."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from onnx import helper

from sfa_onnx.errors import ContractError
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, PackedRow
from sfa_onnx.passes.candidate import Domain, Operand, Refusal, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.verify import Verifier
from sfa_onnx.passes.verify.execute import _stages
from sfa_onnx.passes.verify.geometry import and_mask
from sfa_onnx.passes.verify.judge import Judge
from sfa_onnx.passes.verify.ordinary import ranked
from sfa_onnx.passes.verify.packed_rows import row_layout
from sfa_onnx.report import VerifyRecord
from tests.hand_sites import FLOAT, INT32, INT64, TOPK, candidate_of, changed, model_of

PACKED = """
<ir_version: 10, opset_import: ["" : 18]>
site (float[T,4,16] q, float[T2,16] lat, int64[T,K] idx, int32[B] cuq, int32[B] cuk)
  => (float[T,4,16] y)
<float scale = {0.25}, float ninf = {-inf}, int64[1] minus = {-1}, int64[1] one = {1},
 int64[1] zero1 = {0}, int64 c0 = {0}, int64 c1 = {1}>
{
  q64 = Cast<to=7>(cuq)
  k64 = Cast<to=7>(cuk)
  qhead = Slice(q64, zero1, minus)
  khead = Slice(k64, zero1, minus)
  qstart = Concat<axis=0>(zero1, qhead)
  kstart = Concat<axis=0>(zero1, khead)
  qshape = Shape(q)
  tokens = Gather(qshape, c0)
  iota = Range(c0, tokens, c1)
  column = Unsqueeze(iota, one)
  past = GreaterOrEqual(column, q64)
  past64 = Cast<to=7>(past)
  batch = ReduceSum<keepdims=0>(past64, one)
  base = Gather(kstart, batch)
  base1 = Unsqueeze(base, one)
  rows = Add(idx, base1)
  kn = Gather(lat, rows)
  qn = Sub(q64, qstart)
  kcount = Sub(k64, kstart)
  extra = Sub(kcount, qn)
  extra_t = Gather(extra, batch)
  first = Gather(qstart, batch)
  position = Sub(iota, first)
  last = Add(extra_t, position)
  last1 = Unsqueeze(last, one)
  keep2 = LessOrEqual(idx, last1)
  keep = Unsqueeze(keep2, one)
  s = Einsum<equation="tnc,tkc->tnk">(q, kn)
  scaled = Mul(s, scale)
  masked = Where(keep, scaled, ninf)
  p = Softmax<axis=-1>(masked)
  y = Einsum<equation="tnk,tkc->tnc">(p, kn)
}
"""
_OP = """npu.NPUSparseFlashAttention<scale_value=0.25, sparse_block_size=1, layout_query="{q}",
    layout_kv="{kv}", sparse_mode=3, pre_tokens=9223372036854775807,
    next_tokens=9223372036854775807, attention_mode=2, return_softmax_lse=0>"""
PACKED_NEW = (
    """
<ir_version: 10, opset_import: ["" : 18, "npu" : 1]>
r (float[T,4,16] q, float[T2,16] lat, int64[T,K] idx, int32[B] cuq, int32[B] cuk)
  => (float[T,4,16] y)
{
  one = Constant<value_ints = [1]>()
  idx32 = Cast<to=6>(idx)
  indices = Unsqueeze(idx32, one)
  key = Unsqueeze(lat, one)
  y = """
    + _OP.format(q="TND", kv="TND")
    + '(q, key, key, indices, "", cuq, cuk)\n}'
)
# In packed sequences of unknown lengths an index may only be promised to be valid or -1.
PACKED_OPERANDS = (
    Operand("q", Role.QUERY, ("T", "N1", "C"), FLOAT),
    Operand("lat", Role.LATENT, ("T2", "C"), FLOAT),
    Operand(
        "idx",
        Role.INDICES,
        ("T", "K"),
        INT64,
        Domain(low=0, high="S2", distinct=True, valid_first=True, negative_allowed=True),
    ),
    Operand("cuq", Role.LENGTHS_QUERY, ("B",), INT32),
    Operand("cuk", Role.LENGTHS_KV, ("B",), INT32),
)
# -1 must not be looked up: the graph clamps and masks it.
CLAMP = {
    "  rows = Add(idx, base1)": "  safe = Max(idx, c0)\n  rows = Add(safe, base1)",
    "  keep2 = LessOrEqual(idx, last1)": "  k1 = LessOrEqual(idx, last1)\n"
    "  k2 = GreaterOrEqual(idx, c0)\n  keep2 = And(k1, k2)",
}

PAGED = """
<ir_version: 10, opset_import: ["" : 18]>
site (float[B,S1,4,16] q, float[P,page,16] lat, int64[B,S1,K] idx, int32[B,M] table, int32[B] len)
  => (float[B,S1,4,16] y)
<float scale = {0.25}, float ninf = {-inf}, int64[1] minus = {-1}, int64[1] two = {2},
 int64 c0 = {0}, int64 c1 = {1}, int64[2] flat = {-1, 16}>
{
  lshape = Shape(lat)
  page = Gather(lshape, c1)
  column = Div(idx, page)
  offset = Mod(idx, page)
  tshape = Shape(table)
  ishape = Shape(idx)
  b1 = Unsqueeze(column, minus)
  pages = GatherND<batch_dims=1>(table, b1)
  pages64 = Cast<to=7>(pages)
  start = Mul(pages64, page)
  row = Add(start, offset)
  rows = Reshape(lat, flat)
  kn = Gather(rows, row)
  len64 = Cast<to=7>(len)
  qshape = Shape(q)
  s1 = Gather(qshape, c1)
  iota = Range(c0, s1, c1)
  base = Sub(len64, s1)
  base2 = Unsqueeze(base, minus)
  seen = Add(base2, iota)
  seen3 = Unsqueeze(seen, minus)
  keep3 = LessOrEqual(idx, seen3)
  keep = Unsqueeze(keep3, two)
  s = Einsum<equation="bshc,bskc->bshk">(q, kn)
  scaled = Mul(s, scale)
  masked = Where(keep, scaled, ninf)
  p = Softmax<axis=-1>(masked)
  y = Einsum<equation="bshk,bskc->bshc">(p, kn)
}
"""
PAGED_NEW = (
    """
<ir_version: 10, opset_import: ["" : 18, "npu" : 1]>
r (float[B,S1,4,16] q, float[P,page,16] lat, int64[B,S1,K] idx, int32[B,M] table, int32[B] len)
  => (float[B,S1,4,16] y)
{
  two = Constant<value_ints = [2]>()
  idx32 = Cast<to=6>(idx)
  indices = Unsqueeze(idx32, two)
  key = Unsqueeze(lat, two)
  y = """
    + _OP.format(q="BSND", kv="PA_BSND")
    + '(q, key, key, indices, table, "", len)\n}'
)
PAGED_OPERANDS = (
    Operand("q", Role.QUERY, ("B", "S1", "N1", "C"), FLOAT),
    Operand("lat", Role.LATENT, ("P", "BS", "C"), FLOAT),
    Operand("idx", Role.INDICES, ("B", "S1", "K"), INT64, TOPK),
    Operand("table", Role.BLOCK_TABLE, ("B", "M"), INT32),
    Operand("len", Role.LENGTHS_KV, ("B",), INT32),
)


def _verdict(text, new, operands, changes):
    model = model_of(changed(text, changes))
    candidate = candidate_of(model, new, operands, SPARSE_FLASH_ATTENTION, {"N1": 4, "C": 16})
    return Verifier(GraphIndex.of(model)).verify(candidate)


def test_packed_sequences_pass():
    record = _verdict(PACKED, PACKED_NEW, PACKED_OPERANDS, CLAMP)
    assert isinstance(record, VerifyRecord), record
    assert record.sizes["B"] > 1


@pytest.mark.parametrize(
    "change",
    [
        {"  base = Gather(kstart, batch)": "  base = Gather(k64, batch)"},
        {"  past = GreaterOrEqual(column, q64)": "  past = Greater(column, q64)"},
        {"  last = Add(extra_t, position)": "  last = Add(extra_t, iota)"},
        {"  last = Add(extra_t, position)": "  last = Identity(extra_t)"},
    ],
)
def test_packed_sequences_with_a_wrong_boundary_are_refused(change):
    assert isinstance(_verdict(PACKED, PACKED_NEW, PACKED_OPERANDS, CLAMP | change), Refusal)


def test_paged_caches_pass():
    record = _verdict(PAGED, PAGED_NEW, PAGED_OPERANDS, {})
    assert isinstance(record, VerifyRecord), record
    assert record.sizes["S2"] > record.sizes["K"]


@pytest.mark.parametrize(
    "change",
    [
        {"  start = Mul(pages64, page)": "  start = Mul(column, page)"},  # table ignored
        {"  pages64 = Cast<to=7>(pages)": "  p0 = Cast<to=7>(pages)\n  pages64 = Add(p0, c1)"},
        {"  offset = Mod(idx, page)": "  o1 = Add(idx, c1)\n  offset = Mod(o1, page)"},
        {"  keep3 = LessOrEqual(idx, seen3)": "  keep3 = Less(idx, seen3)"},
    ],
)
def test_paged_caches_with_a_wrong_address_are_refused(change):
    assert isinstance(_verdict(PAGED, PAGED_NEW, PAGED_OPERANDS, change), Refusal)


def test_stages_end_where_our_own_nodes_stand():
    node = helper.make_node
    own = [node("KvCachePack", [f"s{i}"], [f"p{i}"], domain="sfa_onnx") for i in range(3)]
    nodes = [
        node("Relu", ["x"], ["s0"]), own[0], node("Relu", ["p0"], ["s1"]),
        node("Neg", ["p0"], ["t1"]), own[1], node("Add", ["p1", "t1"], ["s2"]),
        node("Neg", ["x"], ["late"]), own[2],
        node("Relu", ["p2"], ["y"]), node("Neg", ["p2"], ["z"]),
    ]  # fmt: skip
    names = [[n.output[0] for n in stage] for stage in _stages(nodes)]
    want = (["s0", "late"], ["p0"], ["s1", "t1"], ["p1"], ["s2"], ["p2"], ["y", "z"])
    assert names == list(want)


@pytest.mark.parametrize(
    ("rows", "shape"),
    [((1, 2), (1, 2, 1, 3)), ((2, 3), (2, 1, 3, 3)), ((2, 1), (2, 3)), ((2, 3), (3, 3))],
)
def test_a_mask_lines_up_with_the_rows_it_has(rows, shape):
    problem = SimpleNamespace(dims=SimpleNamespace(rows=rows))
    mask = np.arange(np.prod(shape)).reshape(shape) % 3 != 1
    visible = np.ones((int(np.prod(rows)), 3), bool)
    visible[:, 0] = False
    seen = and_mask(problem, visible, mask)
    wide = np.broadcast_to(mask.reshape([n for n in shape[:-1] if n > 1] + [3]),
                           [n for n in rows if n > 1] + [3])  # fmt: skip
    assert (seen == (visible & wide.reshape(-1, 3))).all()
    assert not seen[:, 0].any()
    assert (seen[:, 2] == wide.reshape(-1, 3)[:, 2]).all()


def test_a_mask_of_other_rows_changes_nothing():
    problem = SimpleNamespace(dims=SimpleNamespace(rows=(2, 3)))
    visible = np.ones((6, 4), bool)
    for shape in ((), (4, 3), (5, 4)):
        assert and_mask(problem, visible, np.zeros(shape, bool)) is visible


@pytest.mark.parametrize(
    ("dtype", "nope", "rope", "tile"),
    [(ml_dtypes.bfloat16, 512, 64, 128), (np.float32, 96, 8, 32), (np.float16, 64, 0, 16)],
)
def test_rows_of_bytes_have_one_layout(dtype, nope, rope, tile):
    row = PackedRow(nope, rope, tile, np.dtype(dtype).itemsize)
    told = row_layout(row.bytes, dtype, {"rope_head_dim": rope, "tile_size": tile})
    assert (told.nope, told.rope, told.tile, told.bytes) == (nope, rope, tile, row.bytes)


def test_only_exact_packing_is_verified():
    codes, scale = np.ones((2, 32), np.int8), np.ones((2, 1), np.float32)
    assert Judge()._pack({"tile_size": 32}, [codes, None, scale]).shape == (2, 36)
    for inputs in (
        [codes, None, None],
        [codes.astype(np.float32), None, scale],
        [codes, None, scale, np.array(0.5, np.float32)],
    ):
        with pytest.raises(ContractError, match="only exact packing"):
            Judge()._pack({"tile_size": 32}, inputs)


@pytest.mark.parametrize("handle", [0, -1, 3, 1 << 40])
def test_rows_that_were_never_packed_are_refused(handle):
    judge = Judge()
    packed = judge._pack(
        {"tile_size": 32}, [np.ones((1, 2, 1, 32), np.int8), None, np.ones((1, 2, 1, 1))]
    )
    packed[0, 1, 0, :8] = np.array([handle]).view(np.int8)
    query, indices = np.ones((1, 1, 1, 32)), np.zeros((1, 1, 1, 2), np.int32)
    with pytest.raises(ContractError, match="KvCachePack did not make"):
        judge._antiquant({"tile_size": 32}, [query, packed, packed, indices])


def test_ranked_scores_fall_along_the_last_axis():
    scores = ranked((4, 6))
    assert scores.shape == (4, 6)
    assert (np.diff(scores, axis=-1) < 0).all()
    assert not (np.diff(scores, axis=0) < 0).all()
