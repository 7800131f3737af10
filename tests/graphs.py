"""Hand-written graphs of sparse attention in ONNX's text form, with knobs for tests to turn."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

__all__ = ["dense", "dense_int8", "gathered"]

_HEAD = '<ir_version: 9, opset_import: ["" : 18]>\n'


def _model(text: str, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(_HEAD + text)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    return model


def dense(
    *,
    score: str = "",
    value: str = "kv",
    weights: str = "",
    outputs: str = "",
    mask: str = "",
    types: str = "float",
    tail: str = "",
) -> onnx.ModelProto:
    """Dense scores [B, S1, N, S2] under a scattered mask; indices from TopK.

    Args:
        score: nodes that make `scaled` from `raw` (default: a multiplication by a constant).
        value: the value operand of the weighted sum.
        weights: nodes that make `p` from `soft` (default: none).
        outputs: further graph outputs, with types.
        mask: nodes that make `masked` from `scaled` and `picked` [B, S1, 1, S2].
        types: float type of all tensors.
        tail: nodes from `masked` to `out` (default: a softmax and the weighted sum of `value`).
    """
    score = score or "scaled = Mul(raw, scale)"
    weights = weights or "p = Identity(soft)"
    mask = mask or "masked = Add(scaled, picked)"
    tail = tail or (
        f"soft = Softmax <axis = -1> (masked)\n{weights}\n"
        f'out = Einsum <equation = "bsht,btc->bshc"> (p, {value})'
    )
    code = 1 if types == "float" else 10
    text = f"""
    dense ({types}[B,2,4,16] q_nope, {types}[B,2,4,8] q_rope, {types}[B,S,16] kv,
           {types}[B,S,8] pe, float[B,2,S] wish, {types}[B,S,16] other, {types}[N] bias)
        => ({types}[B,2,4,16] out {outputs}) {{
        best, idx = TopK <axis = -1> (wish, k)
        dims = Shape(wish)
        hidden32 = ConstantOfShape <value = float[1] {{-30000.0}}> (dims)
        hidden = Cast <to = {code}> (hidden32)
        rows = Shape(idx)
        zeros32 = ConstantOfShape <value = float[1] {{0}}> (rows)
        zeros = Cast <to = {code}> (zeros32)
        scattered = ScatterElements <axis = -1> (hidden, idx, zeros)
        picked = Unsqueeze(scattered, two)
        s1 = Einsum <equation = "bshc,btc->bsht"> (q_nope, kv)
        s2 = Einsum <equation = "bshr,btr->bsht"> (q_rope, pe)
        raw = Add(s1, s2)
        {score}
        {mask}
        {tail}
    }}"""
    kind = np.float32 if types == "float" else np.float16
    constants = {
        "k": np.array([4]),
        "two": np.array([2]),
        "scale": np.array(0.25, kind),
        "low": np.array(-3e4, kind),
        "half": np.array(0.5, kind),
        "last": np.array([-1]),
    }
    return _model(text, constants)


def gathered(
    *,
    rope_index: str = "at",
    dequant: str = "",
    value: str = "",
    mask: str = "",
    views: str = "",
) -> onnx.ModelProto:
    """int8 rows gathered by given indices, dequantised per tile of 8, attention over them.

    Args:
        rope_index: the index tensor of the rope's gather.
        dequant: nodes that make `nope` [B, S1, K, 16] from `codes` and `steps`.
        value: nodes that make `v` from `nope` and `key`.
        mask: nodes that make `masked` from `scaled` and bool `keep` [B, S1, K].
        views: nodes that make `k_t` [B, S1, 24, K] from `key` [B, S1, K, 24].
    """
    dequant = dequant or (
        "floats = Cast <to = 1> (codes)\ntiled = Reshape(floats, split)\n"
        "step4 = Unsqueeze(steps, last)\nproduct = Mul(tiled, step4)\n"
        "nope = Reshape(product, joined)"
    )
    value = value or "v = Slice(key, zero, width, last, one)"
    mask = (
        mask or "hide = Not(keep)\nhide4 = Unsqueeze(hide, two)\nmasked = Where(hide4, low, scaled)"
    )
    views = views or "k_t = Transpose <perm = [0, 1, 3, 2]> (key)"
    text = f"""
    gathered (float[2,3,4,24] query, int8[2,32,16] cache, float[2,32,2] scales,
              float[2,32,8] rope, int64[2,3,6] idx, float[2,32,2] scales2)
        => (float[2,3,4,16] out) {{
        safe = Max(idx, origin)
        keep = GreaterOrEqual(idx, origin)
        next0 = Add(safe, unit)
        next = Mod(next0, rows)
        flat = Add(safe, base)
        at = Unsqueeze(safe, last)
        wide = Concat <axis = -1> (batch, at)
        at_next = Unsqueeze(next, last)
        wide_next = Concat <axis = -1> (batch, at_next)
        codes = GatherND(cache, wide)
        steps = GatherND(scales, wide)
        {dequant}
        turned = GatherND(rope, {"wide" if rope_index == "at" else rope_index})
        key = Concat <axis = -1> (nope, turned)
        {value}
        {views}
        raw = MatMul(query, k_t)
        scaled = Mul(raw, scale)
        {mask}
        soft = Softmax <axis = -1> (masked)
        out = MatMul(soft, v)
    }}"""
    batch = np.broadcast_to(np.arange(2).reshape(2, 1, 1, 1), (2, 3, 6, 1)).copy()
    constants = {
        "origin": np.array(0),
        "unit": np.array(1),
        "rows": np.array(32),
        "base": np.array([[[0]], [[32]]]),
        "batch": batch,
        "last": np.array([-1]),
        "two": np.array([2]),
        "zero": np.array([0]),
        "one": np.array([1]),
        "width": np.array([16]),
        "split": np.array([2, 3, 6, 2, 8]),
        "joined": np.array([2, 3, 6, 16]),
        "scale": np.array(0.2, np.float32),
        "low": np.array(-np.inf, np.float32),
        "half": np.array(0.5, np.float32),
    }
    return _model(text, constants)


def dense_int8(*, batch: str = "B") -> onnx.ModelProto:
    """A whole int8 cache dequantised per tile of 8, dense scores under a scattered mask."""
    text = f"""
    whole (float[{batch},2,4,16] q_nope, float[{batch},2,4,8] q_rope, int8[{batch},S,16] cache,
           float[{batch},S,2] scales, float[{batch},S,8] pe, float[{batch},2,S] wish)
        => (float[{batch},2,4,16] out) {{
        best, idx = TopK <axis = -1> (wish, k)
        dims = Shape(wish)
        hidden = ConstantOfShape <value = float[1] {{-1e30}}> (dims)
        rows = Shape(idx)
        zeros = ConstantOfShape <value = float[1] {{0}}> (rows)
        scattered = ScatterElements <axis = -1> (hidden, idx, zeros)
        picked = Unsqueeze(scattered, two)
        floats = Cast <to = 1> (cache)
        tiled = Reshape(floats, split)
        steps = Unsqueeze(scales, last)
        product = Mul(tiled, steps)
        kv = Reshape(product, joined)
        s1 = Einsum <equation = "bshc,btc->bsht"> (q_nope, kv)
        s2 = Einsum <equation = "bshr,btr->bsht"> (q_rope, pe)
        raw = Add(s1, s2)
        scaled = Mul(raw, scale)
        masked = Add(scaled, picked)
        soft = Softmax <axis = -1> (masked)
        out = Einsum <equation = "bsht,btc->bshc"> (soft, kv)
    }}"""
    constants = {
        "k": np.array([4]),
        "two": np.array([2]),
        "last": np.array([-1]),
        "split": np.array([0, 0, 2, 8]),
        "joined": np.array([0, 0, 16]),
        "scale": np.array(0.25, np.float32),
    }
    return _model(text, constants)
