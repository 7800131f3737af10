"""`sfa_onnx::KvCacheWrite` in onnxruntime, and its body: what `kv_cache.write_slots` gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from sfa_onnx import runtime
from sfa_onnx.errors import ContractError
from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.op import KV_CACHE_WRITE
from sfa_onnx.runtime.portable.model import make_portable
from tests.attention_cases import BF16
from tests.op_models import elem_type, needs_library

TYPES = {"f32": np.float32, "f16": np.float16, "bf16": BF16, "int8": np.int8}
Inputs = dict[str, np.ndarray]


def call(dtype: Any, slots: list[int], pages: int = 4, size: int = 8, width: int = 5) -> Inputs:
    r = np.random.default_rng(len(slots))
    shapes = {"pages": (pages, size, 1, width), "rows": (len(slots), 1, width)}
    inputs = {n: r.integers(-99, 99, s).astype(dtype) for n, s in shapes.items()}
    return inputs | {"slot_mapping": np.array(slots, np.int32)}


def model(inputs: Inputs, before: str = "", also_read: bool = False) -> onnx.ModelProto:
    """One node, perhaps behind another, and perhaps with its pages read by others too."""
    infos = [
        helper.make_tensor_value_info(n, elem_type(a.dtype), [f"{n}{i}" for i in range(a.ndim)])
        for n, a in inputs.items()
    ]
    names, nodes = ["pages", "rows", "slot_mapping"], []
    if before:
        nodes.append(helper.make_node(before, ["pages"], ["moved"]))
        names[0] = "moved"
    domain = KV_CACHE_WRITE.domain
    nodes.append(helper.make_node("KvCacheWrite", names, ["written"], "write", domain=domain))
    outputs = ["written"]
    if also_read:
        nodes.append(helper.make_node("Neg", [names[0]], ["read"]))
        outputs.append("read")
    kind = elem_type(inputs["pages"].dtype)
    out = [helper.make_tensor_value_info(n, kind, [None] * 4) for n in outputs]
    graph = helper.make_graph(nodes, "write", infos, out)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


SLOTS = {
    "some": [3, 31, 0, 17],
    "padding": [-1, 5, -7, 6, -(2**31)],
    "repeated": [4, 9, 4, 4, 9, -1],
    "none": [],
    "all padding": [-1, -1],
}


@needs_library
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_rows_land_in_their_slots(dtype, slots):
    inputs = call(dtype, slots)
    want = kv_cache.write_slots(*inputs.values())
    before = inputs["pages"].copy()
    got = runtime.run(model(inputs), inputs)["written"]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(inputs["pages"], before)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_the_body_writes_the_same(dtype, slots):
    inputs = call(dtype, slots)
    portable = make_portable(model(inputs))
    onnx.checker.check_model(portable, full_check=True)
    got = runtime.run(ort.InferenceSession(portable.SerializeToString()), inputs)["written"]
    np.testing.assert_array_equal(got, kv_cache.write_slots(*inputs.values()))


@needs_library
def test_one_buffer_for_pages_and_output_is_written_in_place():
    inputs = call(np.float32, [3, 30, 3])
    want = kv_cache.write_slots(*inputs.values())
    session = runtime.session(model(inputs))
    binding, pages = session.io_binding(), inputs["pages"]
    shape = list(pages.shape)
    binding.bind_input("pages", "cpu", 0, np.float32, shape, pages.ctypes.data)
    for name in ("rows", "slot_mapping"):
        binding.bind_cpu_input(name, inputs[name])
    binding.bind_output("written", "cpu", 0, np.float32, shape, pages.ctypes.data)
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(pages, want)


@needs_library
@pytest.mark.parametrize("also_read", [False, True])
def test_pages_that_others_read_are_not_overwritten(also_read):
    inputs = call(np.float32, [1, 2, 3])
    got = runtime.run(model(inputs, "Abs", also_read), inputs)
    moved = np.abs(inputs["pages"])
    want = kv_cache.write_slots(moved, inputs["rows"], inputs["slot_mapping"])
    np.testing.assert_array_equal(got["written"], want)
    if also_read:
        np.testing.assert_array_equal(got["read"], -moved)


@needs_library
def test_the_output_has_the_shape_of_the_pages():
    (out,) = runtime.session(model(call(np.int8, [1]))).get_outputs()
    assert out.shape == ["pages0", "pages1", "pages2", "pages3"]


@needs_library
@pytest.mark.parametrize("slot", [32, 2**30, 2**31 - 1])
def test_a_slot_past_the_end_stops_before_anything_is_written(slot):
    inputs = call(np.float32, [0, slot])
    session = runtime.session(model(inputs))
    binding, pages = session.io_binding(), inputs["pages"]
    before, shape = pages.copy(), list(pages.shape)
    binding.bind_input("pages", "cpu", 0, np.float32, shape, pages.ctypes.data)
    for name in ("rows", "slot_mapping"):
        binding.bind_cpu_input(name, inputs[name])
    binding.bind_output("written", "cpu", 0, np.float32, shape, pages.ctypes.data)
    message = rf"slot_mapping\[1\] is {slot}, but the cache has rows 0..31"
    with pytest.raises(Exception, match=message):
        session.run_with_iobinding(binding)
    np.testing.assert_array_equal(pages, before)
    with pytest.raises(ContractError, match="slot_mapping: expected slots < 32"):
        kv_cache.write_slots(*inputs.values())


@needs_library
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pages", lambda x: x[:, :, 0], r"pages: .*expected 4 dimensions"),
        ("pages", lambda x: np.concatenate([x, x], 2), r"pages: .*expected 1 in dimension 2"),
        ("rows", lambda x: x[..., :3], r"rows: .*expected 5 in dimension 2"),
        ("rows", lambda x: x[:, 0], r"rows: .*expected 3 dimensions"),
        ("slot_mapping", lambda x: x[:1], r"slot_mapping: .*expected 2 in dimension 0"),
    ],
)
def test_bad_shapes_are_refused(name, change, message):
    inputs = call(np.float32, [1, 2])
    inputs[name] = np.ascontiguousarray(change(inputs[name]))
    with pytest.raises(ContractError, match=message):
        runtime.run(model(inputs), inputs)


def test_the_schema_knows_types_and_shapes():
    inputs = call(np.int8, [1, 2])
    inferred = onnx.shape_inference.infer_shapes(model(inputs), strict_mode=True)
    kind = inferred.graph.output[0].type.tensor_type
    assert kind.elem_type == TensorProto.INT8
    assert [d.dim_param for d in kind.shape.dim] == ["pages0", "pages1", "pages2", "pages3"]
