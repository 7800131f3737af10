"""Replacements compute what they replace: run in onnxruntime, ours against the original."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sfa_onnx import runtime
from sfa_onnx.passes.candidate import Candidate
from sfa_onnx.passes.find.search import find_candidates
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.splice import splice
from tests.graphs import dense, dense_int8, gathered

pytestmark = pytest.mark.kernel


def replaced(model: onnx.ModelProto) -> onnx.ModelProto:
    fused = onnx.ModelProto()
    fused.CopyFrom(model)
    index = GraphIndex.of(fused)
    (site,) = find_candidates(index)
    assert isinstance(site, Candidate), site
    splice(fused, index, [site])
    assert not any(n.op_type == "Softmax" for n in fused.graph.node)
    return fused


def feeds(model: onnx.ModelProto, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value or sizes[d.dim_param] for d in tensor.shape.dim]
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if np.dtype(kind).kind == "i":
            arrays[value.name] = rng.integers(-100, 100, shape).astype(kind)
        else:
            arrays[value.name] = rng.standard_normal(shape).astype(kind)
    return arrays


def agree(model: onnx.ModelProto, arrays: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    want = runtime.run(runtime.session(model), arrays)
    got = runtime.run(runtime.session(replaced(model)), arrays)
    for name in want:
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("sizes", [{"B": 1, "S": 4, "N": 4}, {"B": 3, "S": 19, "N": 4}])
@pytest.mark.parametrize("score", ["", "t = Div(raw, half)\nscaled = Mul(t, scale)"])
def test_dense_float(sizes, score):
    model = dense(score=score)
    agree(model, feeds(model, sizes))


_SUM = 'out = Einsum <equation = "bsht,btc->bshc"> (p, kv)'
_SHIFT = "top = ReduceMax <axes = [-1]> (masked)\nx = Sub(masked, top)"
_TAILS = {
    "exp over sum": f"{_SHIFT}\ne = Exp(x)\nall = ReduceSum(e, last)\np = Div(e, all)\n{_SUM}",
    "base 2": (
        f"{_SHIFT.replace('masked', 'm2')}\ne = Pow(two0, x)\nall = ReduceSum(e, last)\n"
        f"p = Div(e, all)\n{_SUM}"
    ),
    "logsumexp": f"l = ReduceLogSumExp(masked, last)\nx = Sub(masked, l)\np = Exp(x)\n{_SUM}",
    "divided afterwards": (
        f"{_SHIFT}\np = Exp(x)\nall = ReduceSum(p, last)\n"
        f"{_SUM.replace('out', 'sum')}\nout = Div(sum, all)"
    ),
}


@pytest.mark.parametrize("tail", _TAILS.values(), ids=_TAILS.keys())
def test_every_spelling_of_softmax(tail):
    if "m2" in tail:
        tail = f"m2 = Mul(masked, log2e)\n{tail}"
    model = dense(tail=tail)
    reducer = next((n for n in model.graph.node if n.op_type in ("ReduceMax",)), None)
    if reducer is not None:  # axes became an input with opset 18
        del reducer.attribute[:]
        reducer.input.append("last")
    if "ReduceLogSumExp" in tail:
        assert any(n.op_type == "ReduceLogSumExp" for n in model.graph.node)
    model.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(np.array(2, np.float32), "two0"),
            onnx.numpy_helper.from_array(np.array(1.4426950408889634, np.float32), "log2e"),
        ]
    )
    arrays = feeds(model, {"B": 2, "S": 11, "N": 4})
    want = runtime.run(runtime.session(model), arrays)["out"]
    fused = replaced(model)
    assert not any(n.op_type in ("Exp", "Pow", "Div") for n in fused.graph.node)
    got = runtime.run(runtime.session(fused), arrays)["out"]
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_other_masks_are_read_at_the_selected_tokens():
    """A padding mask besides the selection: hidden entries become -1, valid ones first."""
    model = dense(mask="m = Add(scaled, picked)\nmasked = Where(pad4, low, m)")
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("pad", onnx.TensorProto.BOOL, ["B", "S"])
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 2]), "axes12"))
    model.graph.node.insert(0, onnx.helper.make_node("Unsqueeze", ["pad", "axes12"], ["pad4"]))
    arrays = feeds(model, {"B": 3, "S": 19, "N": 4})
    arrays["pad"] = np.random.default_rng(1).random((3, 19)) < 0.3
    arrays["wish"] = np.where(arrays["pad"][:, None], arrays["wish"], arrays["wish"] + 1)
    agree(model, arrays)


@pytest.mark.parametrize("seed", range(2))
def test_int8_with_holes_and_repeats(seed):
    model = gathered()
    arrays = feeds(model, {}, seed)
    index = np.random.default_rng(seed).integers(-1, 32, (2, 3, 6))
    index[..., 0] = index[..., 1] = 7
    arrays["idx"] = index
    agree(model, arrays)


def test_dequantize_linear_by_blocks():
    model = gathered(dequant="nope = DequantizeLinear <axis = -1, block_size = 8> (codes, steps)")
    model.opset_import[0].version = 21
    arrays = feeds(model, {})
    arrays["idx"] = np.random.default_rng(0).integers(0, 32, (2, 3, 6))
    agree(model, arrays)


@pytest.mark.parametrize("batch", ["B", "1"])
def test_a_whole_int8_cache_is_not_dequantised_any_more(batch):
    model = dense_int8(batch=batch)
    agree(model, feeds(model, {"B": 3, "S": 19}))
    fused = replaced(model)
    assert not any(n.op_type == "Cast" and n.input[0] == "cache" for n in fused.graph.node)


def test_float16_stays_float16():
    model = dense(types="float16")
    agree(model, feeds(model, {"B": 2, "S": 9, "N": 4}), 5e-3)
    (node,) = [n for n in replaced(model).graph.node if n.domain == "npu"]
    assert node.op_type == "NPUSparseFlashAttention"
