"""Lightning indexers as ONNX text: every step can be written otherwise, and cheaply."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

import sfa_onnx
from sfa_onnx import runtime
from sfa_onnx.report import FuseReport

HEADS, WIDTH, K = 3, 8, 5
STEPS = {
    "products": " kt = Transpose<perm=[0,2,1]>(k)\n k4 = Unsqueeze(kt, one)\n x = MatMul(q, k4)\n",
    "relu": " r = Relu(x)\n",
    "weighed": " w4 = Unsqueeze(w, last)\n y = Mul(r, w4)\n",
    "summed": " s = ReduceSum<keepdims=0>(y, two)\n",
    "hidden": " m = Identity(s)\n",
    "chosen": " best, indices = TopK(m, five)\n",
}
CAUSAL = (  # query row i sees keys up to the one of its own position
    " h0 = Shape<start=1, end=2>(k)\n h1 = Shape<start=1, end=2>(q)\n h2 = Squeeze(h0)\n"
    " h3 = Squeeze(h1)\n h4 = Sub(h2, h3)\n h5 = Range(nought, h3, unit)\n h6 = Add(h5, h4)\n"
    " h7 = Unsqueeze(h6, one)\n h8 = Range(nought, h2, unit)\n seen = LessOrEqual(h8, h7)\n"
)
_CONSTANTS = (
    "<int64[1] none={0}, int64[1] one={1}, int64[1] two={2}, int64[1] last={-1}, int64[1] five={5},"
    " int64 nought={0}, int64 unit={1}, float zero={0.0}, float half={0.5}, float minus={-1.0},"
    " float low={-inf}, float high={inf}, float far={1e9}, float two0={2.0},"
    " float most={3.4028234663852886e+38}>"
)


def indexer(more: str = "", rows: str = "S", keys: str = "T", opset: int = 17, **steps: str) -> Any:
    """Indices [B, S, 5] of queries [B, S, 3, 8], keys [B, T, 8] and weights [B, S, 3].

    Args:
        more: inputs besides, as text.
        rows, keys: how many, or a symbol.
        opset: of the model.
        steps: texts of steps that are written otherwise (see `STEPS`).
    """
    assert steps.keys() <= STEPS.keys()
    given = f"float[B,{rows},3,8] q, float[B,{keys},8] k, float[B,{rows},3] w{more}"
    nodes = "".join((STEPS | steps).values())
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]>\nix ({given}) => (int64[B,N,M] indices)'
        f"\n{_CONSTANTS}\n{{\n{nodes}}}"
    )


def feeds(
    model: onnx.ModelProto, batch: int, rows: int, keys: int, seed: int = 0, **more: int
) -> Any:
    """Inputs of a model; what is called a scale is not negative; `more` symbols."""
    rng = np.random.default_rng(seed)
    sizes = {"B": batch, "S": rows, "T": keys} | more
    found = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [sizes.get(d.dim_param, d.dim_value) for d in dims]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if dtype == np.bool_:
            drawn = rng.random(shape) < 0.7
            drawn[..., 0] = True
        elif dtype.kind in "iu":
            drawn = rng.integers(-127, 128, shape)
        else:
            drawn = rng.standard_normal(shape)
        found[value.name] = (np.abs(drawn) if "scale" in value.name else drawn).astype(dtype)
    return found


def fused(model: onnx.ModelProto, **options: Any) -> FuseReport:
    """The report of a model whose one selection must fuse and select what the original selects."""
    report = sfa_onnx.fuse(model, **options)
    told = [s.reason for s in report.selections]
    assert told == [""], told
    assert not [n for n in report.model.graph.node if n.op_type == "TopK"]
    fixed = [d.dim_value for v in model.graph.input[:2] for d in v.type.tensor_type.shape.dim[1:2]]
    for batch, rows, keys in ((2, 3, 12), (1, 2, 7), (3, 1, K)):
        given = feeds(model, batch, fixed[0] or rows, fixed[1] or keys, seed=keys)
        want, got = (runtime.run(m, given)["indices"] for m in (model, report.model))
        np.testing.assert_array_equal(want, got)
    return report


def refused(model: onnx.ModelProto, reason: str, **options: Any) -> str:
    """The hint of a model whose selections must all be refused, one with this reason."""
    report = sfa_onnx.fuse(model, **options)
    assert all(site.status == "refused" for site in report.selections)
    told = [site for site in report.selections if reason in site.reason]
    assert told, [site.reason for site in report.selections]
    return str(told[0].hint)
