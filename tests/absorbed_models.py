"""Attention whose keys and values a weight expands per head, for tests of materialised weights."""

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

B, S1, S, K, R = 2, 3, 16, 5, 8
N, C, D, V = 4, 32, 16, 12  # heads, latent, nope columns, value columns
TYPES = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

_SITE = """
 kvb{i} = MatMul(kv, {w})
 kv4{i} = Reshape(kvb{i}, to4)
 kvt{i} = Transpose<perm=[0,2,1,3]>(kv4{i})
 kn{i}, v{i} = Split<axis=3>(kvt{i}, parts)
 k{i} = Concat<axis=3>(kn{i}, kre)
 kT{i} = Transpose<perm=[0,1,3,2]>(k{i})
 s0{i} = MatMul(q, kT{i})
 s1{i} = Mul(s0{i}, scale)
 s{i} = Add(s1{i}, mask4)
 p{i} = Softmax<axis=-1>(s{i})
 y{i} = MatMul(p{i}, v{i})
"""


def model_text(kind, before, sites, extra, outputs):
    """Attention with a scattered mask over keys and values that {w} expands per head."""
    code = helper.np_dtype_to_tensor_dtype(np.dtype(TYPES[kind]))
    body = "".join(_SITE.format(i=i, w="W") for i in range(sites))
    shape = f"[{B},{N},{S1},{V}]"
    results = ", ".join([*(f"{kind}{shape} y{i}" for i in range(sites)), *outputs])
    return f"""<ir_version: 9, opset_import: ["" : 18]>
m ({kind}[{B},{N},{S1},{D + R}] q, {kind}[{B},{S},{C}] kv, {kind}[{B},{S},{R}] kr,
   int64[{B},{S1},{K}] idx) => ({results})
<int64[4] to4 = {{{B},{S},{N},{D + V}}}, int64[2] parts = {{{D},{V}}}, int64[1] ax1 = {{1}},
 int64[4] wide = {{{B},{N},{S},{R}}}, int64[3] dims = {{{B},{S1},{S}}},
 int64[2] flat = {{{C},{N * (D + V)}}}>
{{
 {before}
 one = Constant<value_float=1.0>()
 low = Constant<value_float=-inf>()
 half = Constant<value_float=0.25>()
 scale = Cast<to={code}>(half)
 kr1 = Unsqueeze(kr, ax1)
 kre = Expand(kr1, wide)
 full0 = Expand(low, dims)
 full = Cast<to={code}>(full0)
 zero0 = Sub(one, one)
 ishape = Shape(idx)
 zero1 = Expand(zero0, ishape)
 zeros = Cast<to={code}>(zero1)
 mask = ScatterElements<axis=-1>(full, idx, zeros)
 mask4 = Unsqueeze(mask, ax1)
 {body}
 {extra}
}}"""


def stored_weight(dtype="float", seed=0, shape=(C, N * (D + V))):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return values.astype(TYPES[dtype])


def expanding(kind="float", before="", weight=None, sites=1, extra="", outputs=(), name="W"):
    model = onnx.parser.parse_model(model_text(kind, before, sites, extra, outputs))
    array = stored_weight(kind) if weight is None else weight
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def saved(model, folder, name="W", gap=100):
    """The model with its weight in w.bin, behind `gap` bytes of something else."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    data = tensor.raw_data
    (folder / "w.bin").write_bytes(b"\xff" * gap + data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", gap), ("length", len(data))):
        tensor.external_data.add(key=key, value=str(value))
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def parts_of(weight):
    """[N, nope, C] and [N, C, v]: what the two MatMuls read."""
    heads = weight.reshape(C, N, D + V)
    return heads[:, :, :D].transpose(1, 2, 0), heads[:, :, D:].transpose(1, 0, 2)


def feeds(dtype=np.float32):
    rng = np.random.default_rng(1)
    return {
        "q": rng.standard_normal((B, N, S1, D + R)).astype(dtype),
        "kv": rng.standard_normal((B, S, C)).astype(dtype),
        "kr": rng.standard_normal((B, S, R)).astype(dtype),
        "idx": np.stack([rng.permutation(S)[:K] for _ in range(B * S1)]).reshape(B, S1, K),
    }
