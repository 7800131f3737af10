"""Small attention graphs written by hand, with the candidate a binder would propose for them.

Verification must be able to refuse a wrong graph even where the binder accepts it, so its tests
bypass the binder: `gather_site(changes)` swaps lines of the graph's text and keeps the candidate.
"""

import onnx
from onnx import TensorProto, helper

from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT
from sfa_onnx.passes.candidate import Candidate, Domain, Operand, Role

FLOAT, INT8, INT32, INT64, BOOL = (
    TensorProto.FLOAT,
    TensorProto.INT8,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
)
TOPK = Domain(
    distinct=True,
    low=0,
    high="S2",
    valid_first=True,
    assumption="sparse_indices are distinct",
    discharged_by="TopK",
)
ANY_INDEX = Domain(low=0, high="S2", valid_first=True)

# MQA over gathered rows; N1=4, C=16, R=4. `keep` is false where a key lies past the causal rule.
GATHER_FLOAT = """
<ir_version: 10, opset_import: ["" : 18]>
site (float[B,S1,4,16] q, float[B,S1,4,4] qr, float[B,S2,16] lat, float[B,S2,4] rope,
      int64[B,S1,K] idx, int32[B] len) => (float[B,S1,4,16] y)
<float scale = {0.22360679}, float zero = {0.0}, float ninf = {-inf},
 int64[1] minus = {-1}, int64[1] one = {1}, int64 c0 = {0}, int64 c1 = {1}>
{
  qs = Identity(q)
  idx4 = Unsqueeze(idx, minus)
  kn = GatherND<batch_dims=1>(lat, idx4)
  kr = GatherND<batch_dims=1>(rope, idx4)
  v = Identity(kn)
  sn = Einsum<equation="bshc,bskc->bshk">(qs, kn)
  sr = Einsum<equation="bshr,bskr->bshk">(qr, kr)
  sum = Add(sn, sr)
  scaled = Mul(sum, scale)
  len64 = Cast<to=7>(len)
  qshape = Shape(q)
  s1 = Gather(qshape, c1)
  iota = Range(c0, s1, c1)
  base = Sub(len64, s1)
  base2 = Unsqueeze(base, minus)
  seen = Add(base2, iota)
  seen3 = Unsqueeze(seen, minus)
  keep3 = LessOrEqual(idx, seen3)
  two = Constant<value_ints = [2]>()
  keep = Unsqueeze(keep3, two)
  masked = Where(keep, scaled, ninf)
  p = Softmax<axis=-1>(masked)
  y = Einsum<equation="bshk,bskc->bshc">(p, v)
}
"""

_FLOAT_REPLACEMENT = """
<ir_version: 10, opset_import: ["" : 18, "npu" : 1]>
r (float[B,S1,4,16] q, float[B,S1,4,4] qr, float[B,S2,16] lat, float[B,S2,4] rope,
   int64[B,S1,K] idx, int32[B] len) => (float[B,S1,4,16] y)
{
  axis = Constant<value_ints = [2]>()
  idx32 = Cast<to=6>(idx)
  indices = Unsqueeze(idx32, axis)
  key = Unsqueeze(lat, axis)
  key_rope = Unsqueeze(rope, axis)
  y = npu.NPUSparseFlashAttention<scale_value=0.22360679, sparse_block_size=1, layout_query="BSND",
    layout_kv="BSND", sparse_mode=3, pre_tokens=9223372036854775807,
    next_tokens=9223372036854775807, attention_mode=2, return_softmax_lse=0>(
    q, key, key, indices, "", "", len, qr, key_rope)
}
"""

# The same with an int8 latent and a float32 scale per tile of 8; dequantised after the gather.
GATHER_INT8 = GATHER_FLOAT.replace(
    "float[B,S2,16] lat,", "int8[B,S2,16] lat, float[B,S2,2] kscale,"
).replace(
    "  kn = GatherND<batch_dims=1>(lat, idx4)",
    """  kq = GatherND<batch_dims=1>(lat, idx4)
  ks = GatherND<batch_dims=1>(kscale, idx4)
  kf = Cast<to=1>(kq)
  tiles = Constant<value_ints = [0, 0, 0, 2, 8]>()
  row = Constant<value_ints = [0, 0, 0, 16]>()
  kt = Reshape(kf, tiles)
  kst = Unsqueeze(ks, minus)
  kd = Mul(kt, kst)
  kn = Reshape(kd, row)""",
)

_INT8_REPLACEMENT = """
<ir_version: 10, opset_import: ["" : 18, "npu" : 1, "sfa_onnx" : 1]>
r (float[B,S1,4,16] q, float[B,S1,4,4] qr, int8[B,S2,16] lat, float[B,S2,2] kscale,
   float[B,S2,4] rope, int64[B,S1,K] idx, int32[B] len) => (float[B,S1,4,16] y)
{
  axis = Constant<value_ints = [2]>()
  idx32 = Cast<to=6>(idx)
  indices = Unsqueeze(idx32, axis)
  rows = sfa_onnx.KvCachePack<tile_size=8>(lat, rope, kscale)
  key = Unsqueeze(rows, axis)
  query = Concat<axis=-1>(q, qr)
  y = npu.NPUSparseFlashAttentionAntiquant<scale_value=0.22360679, sparse_block_size=1,
    key_quant_mode=2, value_quant_mode=2, layout_query="BSND", layout_kv="BSND", sparse_mode=3,
    attention_mode=2, quant_scale_repo_mode=1, tile_size=8, rope_head_dim=4>(
    query, key, key, indices, "", "", "", "", len)
}
"""

_COMMON = (
    Operand("q", Role.QUERY, ("B", "S1", "N1", "C"), FLOAT),
    Operand("qr", Role.QUERY_ROPE, ("B", "S1", "N1", "R"), FLOAT),
    Operand("rope", Role.KEY_ROPE, ("B", "S2", "R"), FLOAT),
    Operand("len", Role.LENGTHS_KV, ("B",), INT32),
)
_FLOAT_LATENT = (Operand("lat", Role.LATENT, ("B", "S2", "C"), FLOAT),)
_INT8_LATENT = (
    Operand("lat", Role.LATENT_INT8, ("B", "S2", "C"), INT8),
    Operand("kscale", Role.SCALE, ("B", "S2", "tiles"), FLOAT),
)
SIZES = {"B": "B", "S1": "S1", "S2": "S2", "K": "K", "N1": 4, "C": 16, "R": 4, "tiles": 2}


def changed(text, changes):
    """`text` with every old line replaced; an old text that does not occur is an error."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def model_of(text):
    """Parse, and name every node after its first output."""
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = "n_" + node.output[0]
    return model


def candidate_of(model, replacement, operands, op, sizes=None, outputs=("y",)):
    """A candidate whose region is every node of `model`."""
    new = onnx.parser.parse_model(replacement)
    anchor = next(i for i, n in enumerate(model.graph.node) if outputs[0] in n.output)
    return Candidate(
        graph=model.graph,
        anchor=anchor,
        op=op,
        family="hand",
        nodes=tuple(range(len(model.graph.node))),
        support=(),
        operands=tuple(operands),
        outputs=tuple(outputs),
        replacement=list(new.graph.node),
        sizes=dict(sizes or SIZES),
        site_id="hand",
    )


def gather_site(changes=None, *, int8=False, domain=TOPK, replace=None, sizes=None):
    """(model, candidate) of the gathered form, with lines of the graph changed."""
    text = GATHER_INT8 if int8 else GATHER_FLOAT
    replacement = _INT8_REPLACEMENT if int8 else _FLOAT_REPLACEMENT
    op = SPARSE_FLASH_ATTENTION_ANTIQUANT if int8 else SPARSE_FLASH_ATTENTION
    model = model_of(changed(text, changes or {}))
    indices = Operand("idx", Role.INDICES, ("B", "S1", "K"), INT64, domain)
    operands = (*_COMMON, *(_INT8_LATENT if int8 else _FLOAT_LATENT), indices)
    return model, candidate_of(model, changed(replacement, replace or {}), operands, op, sizes)


def renamed(node, prefix):
    """A copy of `node` with every name prefixed (to build models of several sites)."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = prefix + node.name
    for field in (copy.input, copy.output):
        names = [prefix + n if n else "" for n in field]
        del field[:]
        field.extend(names)
    return copy


def several_sites(count, changes=None):
    """One model with `count` independent gather sites and a filler node after each."""
    nodes, inputs, outputs, tensors, candidates = [], [], [], [], []
    for n in range(count):
        prefix = f"l{n}_"
        model, candidate = gather_site((changes or {}).get(n))
        start = len(nodes)
        nodes += [renamed(node, prefix) for node in model.graph.node]
        nodes.append(helper.make_node("Relu", [prefix + "y"], [prefix + "z"], name=prefix + "relu"))
        for value in model.graph.input:
            value.name = prefix + value.name
            inputs.append(value)
        for tensor in model.graph.initializer:
            tensor.name = prefix + tensor.name
            tensors.append(tensor)
        outputs.append(helper.make_tensor_value_info(prefix + "z", 1, ["B", "S1", 4, 16]))
        candidate.nodes = tuple(start + i for i in candidate.nodes)
        candidate.anchor += start
        candidate.outputs = (prefix + "y",)
        candidate.replacement = [renamed(node, prefix) for node in candidate.replacement]
        candidate.operands = tuple(
            Operand(prefix + o.value, o.role, o.axes, o.elem_type, o.domain)
            for o in candidate.operands
        )
        candidate.site_id = f"site{n}"
        candidates.append(candidate)
    graph = helper.make_graph(nodes, "several", inputs, outputs, tensors)
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    for candidate in candidates:
        candidate.graph = whole.graph
    return whole, candidates
