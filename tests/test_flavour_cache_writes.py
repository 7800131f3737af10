"""Padding in front of cache writes: no negative slot reaches ScatterNdUpdate."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx import runtime
from sfa_onnx.ascend.checks import check
from sfa_onnx.ascend.flavour import model as flavour
from sfa_onnx.errors import ContractError
from sfa_onnx.operator import kv_cache
from sfa_onnx.passes.graph.cache_pairs import cache_pairs
from tests.op_models import needs_library

WIDTH = 5
SLOTS = {
    "none is padding": [3, 31, 0, 17],
    "padding": [-1, 5, -7, 6],
    "all padding": [-1, -1, -9, -(2**31)],
    "the last of equal slots": [9, 9, -1, -1],
    "equal slots around padding": [9, -1, 9, -1],
    "slot 0": [-1, 0, -1, -1],
    "one token": [12],
    "one padding token": [-1],
}


def writes(
    caches: int = 1,
    atc: bool = False,
    count: int | str = 4,
    opset: int = 18,
    slots: list[int] | None = None,
) -> onnx.ModelProto:
    """Writes into several int8 caches at one slot mapping; `slots`: a constant one."""
    nodes, outputs, infos = [], [], []
    for i in range(caches):
        names = [f"pages{i}", f"rows{i}", "slot_mapping"]
        infos += [
            helper.make_tensor_value_info(names[0], TensorProto.INT8, [4, 8, 1, WIDTH]),
            helper.make_tensor_value_info(names[1], TensorProto.INT8, [count, 1, WIDTH]),
        ]
        nodes.append(
            helper.make_node("KvCacheWrite", names, [f"new{i}"], f"write{i}", domain="sfa_onnx")
        )
        outputs.append(helper.make_tensor_value_info(f"new{i}", TensorProto.INT8, [4, 8, 1, WIDTH]))
    inits = []
    if slots is None:
        infos.append(helper.make_tensor_value_info("slot_mapping", TensorProto.INT32, [count]))
    else:
        inits.append(numpy_helper.from_array(np.array(slots, np.int32), "slot_mapping"))
    graph = helper.make_graph(nodes, "g", infos, outputs, inits)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("sfa_onnx", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    return flavour.to_atc(model) if atc else model


def feeds(slots: list[int], caches: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(slots))
    given = {"slot_mapping": np.array(slots, np.int32)}
    for i in range(caches):
        given[f"pages{i}"] = rng.integers(-99, 99, (4, 8, 1, WIDTH)).astype(np.int8)
        given[f"rows{i}"] = rng.integers(-99, 99, (len(slots), 1, WIDTH)).astype(np.int8)
    return given


@needs_library
@pytest.mark.parametrize("opset", [11, 18])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_the_flavour_writes_what_the_contract_says(slots, named, opset) -> None:
    count: int | str = "n" if named else len(slots)
    model = writes(2, atc=True, count=count, opset=opset)
    given = feeds(slots, 2)
    # The values that reach the operators, as GE will see them.
    reached = {n.input[2] for n in model.graph.node if n.op_type == "KvCacheWrite"}
    for name in reached:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT32, None))
    got = runtime.run(runtime.session(model), given)
    for i in range(2):
        pages, rows = given[f"pages{i}"], given[f"rows{i}"]
        expected = kv_cache.write_slots(pages.copy(), rows, given["slot_mapping"])
        np.testing.assert_array_equal(got[f"new{i}"], expected)
    (places,) = (v for n, v in got.items() if not n.startswith("new"))
    assert places.shape == (len(slots),)
    assert (places >= 0).all()


def test_all_caches_share_the_arithmetic_on_slots() -> None:
    one, three = (writes(n, atc=True).graph.node for n in (1, 3))
    for op_type, each in (("ArgMax", 0), ("Less", 0), ("Where", 0), ("KvCacheWrite", 1)):
        first, all_of = (sum(n.op_type == op_type for n in nodes) for nodes in (one, three))
        assert (first, all_of) == (first, first + 2 * each)
    assert len({n.name for n in three}) == len(three)


def test_converting_again_and_back_adds_nothing() -> None:
    atc = writes(2, atc=True)
    back = flavour.from_atc(atc)
    assert {n.domain for n in back.graph.node if n.op_type == "KvCacheWrite"} == {"sfa_onnx"}
    assert flavour.to_atc(back).graph == atc.graph
    assert flavour.to_atc(atc).graph == atc.graph


def test_slots_that_are_never_negative_need_nothing() -> None:
    model = writes(atc=True, slots=[3, 0, 9, 31])
    assert [n.op_type for n in model.graph.node] == ["KvCacheWrite"]
    assert len(writes(atc=True, slots=[3, -1, 9, 31]).graph.node) > 1


def test_the_pairs_of_caches_are_seen_behind_the_arithmetic() -> None:
    pairs = cache_pairs(writes(2, atc=True))
    assert [(p.input, p.output) for p in pairs] == [("pages0", "new0"), ("pages1", "new1")]


def test_other_numbers_of_slots_than_rows_are_refused() -> None:
    model = writes()
    model.graph.input[-1].type.tensor_type.shape.dim[0].dim_value = 3
    with pytest.raises(ContractError, match="3 slots for 4 rows"):
        flavour.to_atc(model)


def test_float_pages_keep_their_type_whatever_the_npu_dtype() -> None:
    model = writes()
    for value in (*model.graph.input[:2], *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    made = flavour.to_atc(model, npu_dtype="bf16")
    assert "KvCacheWrite" in {n.op_type for n in made.graph.node}
    assert made.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    onnx.checker.check_model(flavour.from_atc(made))
    kinds = [n.op_type for n in made.graph.node if set(n.output) & {"new0"}]
    assert kinds == ["KvCacheWrite"]


def test_check_tells_what_padding_and_equal_slots_become() -> None:
    def rules(model: onnx.ModelProto) -> set[str]:
        return {f.rule for f in check(model).findings if f.rule.startswith("cache-write")}

    bare = writes(atc=True)
    bare.graph.node[-1].input[:] = ["pages0", "rows0", "slot_mapping"]
    del bare.graph.node[:-1]
    assert rules(bare) == {"cache-write-padding", "cache-write-order"}
    assert rules(writes(atc=True)) == {"cache-write-order"}
    assert rules(writes(atc=True, count=1)) == set()
    report = check(writes(atc=True), cann="8.5")
    assert (report.parser, report.code) == ("accepted", "")
