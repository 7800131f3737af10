"""`--npu-dtype` on float32 models: every form of the cache, an indexer, ropes in packed rows.

What `atc` writes runs in onnxruntime, at batch 2, and is near the float32 model.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from sfa_onnx import runtime
from sfa_onnx.ascend.checks import check
from sfa_onnx.ascend.flavour import model as flavour
from sfa_onnx.errors import ContractError
from sfa_onnx.kv_convert import FORMS, convert
from sfa_onnx.kv_convert.interface import adapt_feeds, read_interface
from sfa_onnx.operator.contract import PackedRow
from tests.index_models import feeds_for, indexed
from tests.op_models import needs_library
from tests.test_kv_convert import TILE, C, R, const

Array = NDArray[Any]
HALVES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
WIDE = PackedRow(C, R, TILE, 4)


def narrow(rows: Array, dtype: np.dtype[Any]) -> Array:
    """Packed rows with a float32 rope -> the same with a 16-bit one."""
    rope = np.ascontiguousarray(rows[..., C : C + 4 * R]).view(np.float32).astype(dtype)
    parts = [rows[..., :C], np.ascontiguousarray(rope).view(np.int8), rows[..., C + 4 * R :]]
    return np.concatenate(parts, -1)


def in_form(source: onnx.ModelProto, form: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model with its cache in a form, and inputs of a step: 21 and 9 tokens in the cache."""
    feeds = feeds_for(source, 2, 21)
    if form == "float":
        return source, feeds
    options = {} if form == "paged" else {"tile_size": TILE}
    made = convert(source, to=form, block_size=16, **options).model
    interface = read_interface(made)
    if interface is None:
        return made, feeds
    paged = {"new_tokens": 1, "start": np.array([20, 9])} if interface.paged else {}
    return made, adapt_feeds(interface, feeds, **paged)


@needs_library
@pytest.mark.parametrize("npu_dtype", HALVES)
@pytest.mark.parametrize("form", ["float", *FORMS])
def test_what_is_written_runs_and_means_the_same(form: str, npu_dtype: str) -> None:
    wide, feeds = in_form(indexed(2, values=True), form)
    made = flavour.convert(wide, npu_dtype=npu_dtype, cann="9.1")
    assert not [f for f in check(made.model).findings if f.rule == "input-dtype"]
    want = runtime.run(wide, feeds)
    told = {
        v.name: narrow(feeds[v.name], HALVES[npu_dtype])
        for v in made.model.graph.input
        if v.type.tensor_type.shape.dim[-1].dim_value == PackedRow(C, R, TILE, 2).bytes
        and feeds[v.name].shape[-1] == WIDE.bytes
    }
    assert bool(told) == (form in ("packed-int8", "paged-int8"))
    got = runtime.run(made.model, feeds | told)
    for name, value in want.items():
        if value.dtype == np.int32:
            # a near tie may turn in 16 bits
            assert np.mean(np.sort(got[name]) == np.sort(value)) > 0.7
        elif value.dtype == np.float32:
            assert got[name].dtype == np.float32
            # a turned tie changes one row in eight
            assert np.linalg.norm(got[name] - value) < 0.3 * np.linalg.norm(value), name


def padded_indexer(low: float) -> onnx.ModelProto:
    """Hidden keys behind the visible ones: a head of weight `low`, as padding is fused."""
    model = indexed(1)
    node = next(n for n in model.graph.node if n.op_type == "NPULightningIndexer")
    weights = node.input[2]
    low_of = helper.make_tensor("low", TensorProto.FLOAT, [1, 1, 1], [low])
    model.graph.initializer.append(low_of)
    made = [
        helper.make_node("Slice", [weights, "nil", "most", "last"], ["seen_heads"], "heads"),
        helper.make_node("Shape", [weights], ["rows"], "rows", start=0, end=2),
        helper.make_node("Concat", ["rows", "unit"], ["dims"], "dims", axis=0),
        helper.make_node("Expand", ["low", "dims"], ["hide"], "hide"),
        helper.make_node("Concat", ["seen_heads", "hide"], ["all_heads"], "join", axis=-1),
    ]
    node.input[2] = "all_heads"
    at = list(model.graph.node).index(node)
    nodes = [*model.graph.node[:at], *made, *model.graph.node[at:]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    known = {"nil": [0], "most": [3], "last": [2], "unit": [1]}
    model.graph.initializer.extend(const(n, v) for n, v in known.items())
    return model


def test_a_weight_that_fp16_cannot_hold_is_not_cast_to_it() -> None:
    """-1e30 times the 0 of a visible key is 0; minus infinity times 0 is no number."""
    for npu_dtype, low, stays in (("fp16", -1e30, 1), ("bf16", -1e30, 0), ("fp16", -6e4, 0)):
        made = flavour.convert(padded_indexer(low), npu_dtype=npu_dtype)
        assert sum("hide padding by a number" in n for n in made.notes) == stays
        wrong = [f for f in check(made.model).findings if f.rule == "input-dtype"]
        assert len(wrong) == stays


BYTES = WIDE.bytes
CONSTANTS = {
    "wide": [-1, 1, BYTES], "flat": [-1], "both": [1, BYTES],
    "nil": [0], "one": [1], "axis2": [2], "axis3": [3],
}  # fmt: skip
KINDS = {"Shape": TensorProto.INT64, "Gather": TensorProto.INT64, "Cast": TensorProto.FLOAT}


def packed(reader: list[onnx.NodeProto]) -> onnx.ModelProto:
    """packed-int8 caches [b, past, 1, bytes], with a look, "seen", at the new cache."""
    model = convert(indexed(1), to="packed-int8", tile_size=TILE).model
    cache = next(v for v in model.graph.output if v.type.tensor_type.elem_type == TensorProto.INT8)
    for made in reader:
        made.input[:] = [cache.name if n == "cache" else n for n in made.input]
    model.graph.node.extend(reader)
    kind = KINDS.get(reader[-1].op_type, TensorProto.INT8)
    model.graph.output.append(helper.make_tensor_value_info("seen", kind, None))
    model.graph.initializer.extend(const(n, v) for n, v in CONSTANTS.items())
    return model


def node(op: str, inputs: list[str], out: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [out], f"peek_{out}", **attributes)


@pytest.mark.parametrize(
    "reader",
    [
        [node("Reshape", ["cache", "wide"], "seen")],
        [node("Slice", ["cache", "nil", "one", "one"], "seen")],
        [node("Transpose", ["cache"], "seen", perm=[1, 0, 2, 3])],
        [node("Squeeze", ["cache", "axis2"], "seen")],
        [
            node("Shape", ["cache"], "whole"),
            node("Gather", ["whole", "one"], "length", axis=0),
            node("Concat", ["length", "both"], "dims", axis=0),
            node("Reshape", ["cache", "dims"], "seen"),
        ],
    ],
    ids=lambda r: "-".join(n.op_type for n in r),
)
@needs_library
def test_views_of_whole_rows_get_narrower_with_them(reader: list[onnx.NodeProto]) -> None:
    model = packed(reader)
    made = flavour.convert(model, npu_dtype="fp16")
    interface = read_interface(model)
    assert interface is not None
    feeds = adapt_feeds(interface, feeds_for(indexed(1), 1, 21))
    wide = runtime.run(model, feeds)["seen"]
    told = {n: narrow(a, HALVES["fp16"]) for n, a in feeds.items() if a.shape[-1] == BYTES}
    got = runtime.run(made.model, feeds | told)["seen"]
    np.testing.assert_array_equal(got, narrow(wide, HALVES["fp16"]))


@pytest.mark.parametrize(
    "reader",
    [
        [node("Reshape", ["cache", "flat"], "seen")],
        [node("Slice", ["cache", "nil", "one", "axis3"], "seen")],
        [node("Transpose", ["cache"], "seen", perm=[0, 1, 3, 2])],
        [node("Shape", ["cache"], "seen")],
        [node("Shape", ["cache"], "whole"), node("Gather", ["whole", "axis3"], "seen", axis=0)],
        [node("Cast", ["cache"], "seen", to=1)],
    ],
    ids=lambda r: "-".join(n.op_type for n in r),
)
def test_a_look_into_rows_keeps_them_wide(reader: list[onnx.NodeProto]) -> None:
    with pytest.raises(ContractError, match="looks into the packed rows"):
        flavour.convert(packed(reader), npu_dtype="fp16")
