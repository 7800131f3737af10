"""Packed float32 rows on the way to an NPU that reads 16-bit ones."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx import runtime
from sfa_onnx.ascend.flavour import model as flavour
from sfa_onnx.errors import ContractError
from sfa_onnx.operator import kv_cache, op
from tests.test_flavour import attr, build, ours


def float_cache(reader=None):
    """A float32 decode step: new rows packed and appended to an int8 cache input."""
    node = ours(op.SPARSE_FLASH_ATTENTION_ANTIQUANT, layout_kv="BSND")
    node.input[:] = ["query", "present", "present", "sparse_indices"]
    pack = ours(op.KV_CACHE_PACK, name="pack")
    pack.output[:] = ["rows"]
    nodes = [
        pack,
        helper.make_node("Concat", ["past", "rows"], ["present"], "append", axis=1),
        node,
    ]
    nodes += [reader] if reader else []
    inputs = [("query", 1, [1, 1, 16, 576]), ("past", TensorProto.INT8, [1, 63, 1, 784])]
    inputs += [("nope", 1, [1, 1, 1, 512]), ("rope", 1, [1, 1, 1, 64])]
    inputs += [("sparse_indices", TensorProto.INT32, [1, 1, 1, 8])]
    outputs = [
        ("attention_out", 1, [1, 1, 16, 512]),
        ("present", TensorProto.INT8, [1, 64, 1, 784]),
    ]
    return build(nodes, inputs, outputs, domains=("npu", "sfa_onnx"))


@pytest.mark.kernel
def test_float32_cache_rows_get_narrower_for_the_npu():
    result = flavour.convert(float_cache(), npu_dtype="bf16")
    rows = [v.type.tensor_type.shape.dim[3].dim_value for v in
            (result.model.graph.input[1], result.model.graph.output[1])]  # fmt: skip
    assert rows == [656, 656]
    assert "past: rows of 784 bytes become 656 (16-bit rope)" in result.notes
    pack = next(n for n in result.model.graph.node if n.op_type == "KvCachePack")
    assert attr(pack, "rope_dtype") == b"bfloat16"
    rng = np.random.default_rng(0)
    new = [rng.standard_normal((1, n, 1, w)).astype(np.float32) for n in (63, 1) for w in (512, 64)]
    feeds = {"query": rng.standard_normal((1, 1, 16, 576)).astype(np.float32)}
    feeds |= {"nope": new[2], "rope": new[3]}
    feeds |= {"sparse_indices": np.arange(8, dtype=np.int32).reshape(1, 1, 1, 8) * 9}
    wide = runtime.run(float_cache(), feeds | {"past": kv_cache.pack(new[0], new[1])})
    narrow = kv_cache.pack(new[0], new[1].astype(ml_dtypes.bfloat16))
    got = runtime.run(result.model, feeds | {"past": narrow})
    np.testing.assert_allclose(got["attention_out"], wide["attention_out"], rtol=0.05, atol=0.02)


def test_rows_somebody_looks_into_cannot_get_narrower():
    reader = helper.make_node("Slice", ["present", "s", "s", "s"], ["bytes"], "peek")
    model = float_cache(reader)
    model.graph.initializer.append(numpy_helper.from_array(np.array([3]), "s"))
    with pytest.raises(ContractError, match=r"'peek' \(Slice\) looks into the packed rows"):
        flavour.to_atc(model, npu_dtype="fp16")
