"""`sfa_onnx::KvCachePack` in onnxruntime: bit for bit what `kv_cache.pack` gives."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from sfa_onnx import runtime
from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.op import KV_CACHE_PACK
from tests.attention_cases import BF16
from tests.op_models import needs_library, node_model
from tests.test_ort_ops import infers_shapes

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BF16)


def run(inputs: dict[str, np.ndarray], tile: int) -> np.ndarray:
    names = [t.name if t.name in inputs else "" for t in KV_CACHE_PACK.inputs]
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), [None] * a.ndim)
        for n, a in inputs.items()
    ]
    model = node_model(KV_CACHE_PACK, names, infos, {"tile_size": tile})
    return runtime.run(model, inputs)["packed"]


def latents(r: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Values of every magnitude, with zero tiles, subnormals, NaN and infinities among them."""
    x = r.standard_normal(shape) * 10.0 ** r.integers(-45, 38, (*shape[:-1], 1))
    x[r.random(shape) < 0.3] = 0
    special = r.random(shape)
    for value, share in ((np.nan, 0.002), (np.inf, 0.004), (-np.inf, 0.006), (1e-42, 0.02)):
        x[(special < share) & (special >= share - 0.002)] = value
    with np.errstate(all="ignore"):
        return x.astype(dtype)


@needs_library
@pytest.mark.parametrize("rope", [*FLOATS, None], ids=str)
@pytest.mark.parametrize("nope", [*FLOATS, np.dtype(np.int8)], ids=str)
def test_every_pair_of_types(nope, rope):
    r = np.random.default_rng(5)
    inputs = {"nope": latents(r, (3, 50, 64), nope if nope != np.int8 else np.dtype(np.float32))}
    if nope == np.int8:
        inputs["nope"] = r.integers(-128, 128, (3, 50, 64)).astype(np.int8)
        inputs["scale"] = latents(r, (3, 50, 4), np.dtype(np.float32))
    if rope is not None:
        inputs["rope"] = latents(r, (3, 50, 8), rope)
    inputs = {t.name: inputs[t.name] for t in KV_CACHE_PACK.inputs if t.name in inputs}
    expected = kv_cache.pack(inputs["nope"], inputs.get("rope"), inputs.get("scale"), tile_size=16)
    got = run(inputs, 16)
    assert got.shape == expected.shape
    assert (got == expected).all()


@needs_library
@settings(max_examples=40, deadline=None)
@given(
    tile=st.sampled_from([1, 2, 7, 16, 128]),
    tiles=st.integers(1, 4),
    rope=st.integers(0, 9),
    lead=st.lists(st.integers(0, 5), max_size=3),
    clip=st.one_of(st.none(), st.sampled_from([1.0, 0.5, 0.9, 3.0, 1e-30])),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 999),
)
def test_any_shape_and_clip(tile, tiles, rope, lead, clip, dtype, seed):
    r = np.random.default_rng(seed)
    inputs = {"nope": latents(r, (*lead, tile * tiles), dtype)}
    if rope:
        inputs["rope"] = latents(r, (*lead, rope), dtype)
    expected = kv_cache.pack(inputs["nope"], inputs.get("rope"), clip=clip, tile_size=tile)
    if clip is not None:
        inputs["clip"] = np.array(clip, np.float32)
    got = run(inputs, tile)
    assert got.shape == expected.shape
    assert (got == expected).all()


@needs_library
def test_many_rows_are_shared_out_without_gaps():
    r = np.random.default_rng(9)
    for rows, dtype in itertools.product((63, 64, 65, 1000), FLOATS[:1]):
        nope = latents(r, (rows, 256), dtype)
        assert (run({"nope": nope}, 128) == kv_cache.pack(nope)).all()


@needs_library
def test_the_packed_width_is_inferred():
    r = np.random.default_rng(1)
    inputs = {"nope": latents(r, (2, 512), BF16), "rope": latents(r, (2, 64), BF16)}
    infos = [
        helper.make_tensor_value_info(n, onnx.TensorProto.BFLOAT16, ["rows", a.shape[1]])
        for n, a in inputs.items()
    ]
    model = node_model(KV_CACHE_PACK, ["nope", "rope"], infos, {"tile_size": 128})
    assert run(inputs, 128).shape == (2, 656)
    if infers_shapes():
        assert runtime.session(model).get_outputs()[0].shape == ["rows", 656]
