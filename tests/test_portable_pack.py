"""`KvCachePack` as standard operators: the bits that NumPy and the library pack."""

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from sfa_onnx import runtime
from sfa_onnx.operator import kv_cache
from sfa_onnx.runtime.portable.body import Body
from sfa_onnx.runtime.portable.model import make_portable, unfuse
from sfa_onnx.runtime.portable.numbers import FORMATS, from_bytes, to_bytes
from tests.attention_cases import BF16
from tests.op_models import elem_type, needs_library, pack_model, plain


def awkward(shape, dtype, seed=0):
    """Every kind of float: random bits without NaN payloads, zeros of both signs, subnormals."""
    r = np.random.default_rng(seed)
    size = np.dtype(dtype).itemsize
    bits = r.integers(0, 256, (*shape[:-1], shape[-1] * size)).astype(np.uint8)
    x = bits.view(dtype).copy()
    with np.errstate(invalid="ignore"):
        x[np.isnan(x)] = np.array(-0.0, dtype)
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_bytes_and_numbers_convert_exactly(dtype):
    form = FORMATS[elem_type(dtype)]
    x = awkward((64, 96), dtype)
    info = ml_dtypes.finfo(dtype)
    edges = [0.0, -0.0, 1, info.max, info.min, info.tiny, info.smallest_subnormal, np.inf, -np.inf]
    x[0, : len(edges)] = edges
    x[1, :30] = np.ldexp(1.0, np.arange(-14, 16))
    x[2, :30] = np.nextafter(x[1, :30], np.array(0, dtype))
    body = Body(18)
    numbers = from_bytes(body, "raw", form)
    back = to_bytes(body, numbers, form)
    raw = np.ascontiguousarray(x).view(np.int8)
    graph = helper.make_graph(
        body.nodes,
        "g",
        [helper.make_tensor_value_info("raw", TensorProto.INT8, raw.shape)],
        [
            helper.make_tensor_value_info(numbers, TensorProto.FLOAT, None),
            helper.make_tensor_value_info(back, TensorProto.INT8, None),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    got, again = runtime.run(model, {"raw": raw}).values()
    assert got.tobytes() == x.astype(np.float32).tobytes()
    assert again.tobytes() == raw.tobytes()


@pytest.mark.parametrize("opset", [14, 18])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_packing_is_bit_exact(opset, dtype, clip):
    r = np.random.default_rng(3)
    nope = (r.standard_normal((3, 5, 64)) * 10.0 ** r.integers(-3, 4, (3, 5, 1))).astype(dtype)
    nope[0, 0, :16] = 0
    nope[0, 1, 3] = np.nan
    nope[0, 2, 20] = -np.inf
    nope[0, 3, :16] = ml_dtypes.finfo(dtype).smallest_subnormal
    arrays = {"nope": nope, "rope": awkward((3, 5, 8), dtype)}
    if clip is not None:
        arrays["clip"] = np.array(clip, np.float32)
    got = runtime.run(plain(make_portable(pack_model(arrays, opset, tile_size=16))), arrays)
    want = kv_cache.pack(nope, arrays["rope"], clip=clip, tile_size=16)
    assert (got["packed"] == want).all()


def test_int8_rows_are_copied_exactly():
    r = np.random.default_rng(4)
    arrays = {"nope": r.integers(-128, 128, (7, 32)).astype(np.int8)}
    arrays |= {"rope": awkward((7, 4), BF16), "scale": awkward((7, 2), np.float32)}
    want, model = kv_cache.pack(*arrays.values(), tile_size=16), pack_model(arrays, tile_size=16)
    for rewrite in (make_portable, unfuse):
        assert (runtime.run(plain(rewrite(model)), arrays)["packed"] == want).all()


@needs_library
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_the_library_packs_the_same_bits(dtype):
    r = np.random.default_rng(5)
    nope = (r.standard_normal((9, 128)) * 10.0 ** r.integers(-4, 4, (9, 1))).astype(dtype)
    nope[0, :16], nope[1, 3], nope[2, 20] = 0, np.nan, np.inf
    arrays = {"nope": nope, "rope": awkward((9, 8), dtype), "clip": np.array(0.9, np.float32)}
    got = runtime.run(pack_model(arrays, tile_size=16), arrays)["packed"]
    assert (got == kv_cache.pack(nope, arrays["rope"], clip=0.9, tile_size=16)).all()
