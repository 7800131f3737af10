"""What the compiled operators refuse, and in which words: what, where, expected, got."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import helper

from sfa_onnx import runtime
from sfa_onnx.errors import ContractError, ModelError
from sfa_onnx.operator.op import (
    KV_CACHE_PACK,
    KV_QUANT_SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    OpContract,
)
from tests.attention_cases import Case, make_case
from tests.op_models import needs_library, node_model, op_model

Change = Callable[[Case], Any]


def feeds(case: Case) -> dict[str, np.ndarray]:
    return {n: a for n, a in case.inputs.items() if n != "value"}


def setting(name: str, value: Any) -> Change:
    """Replaces an input; a function gets the old one, None removes it."""

    def change(case: Case) -> None:
        if value is None:
            del case.inputs[name]
        else:
            case.inputs[name] = value(case.inputs[name]) if callable(value) else value

    return change


def putting(name: str, at: Any, value: int) -> Change:
    def change(case: Case) -> None:
        case.inputs[name] = case.inputs[name].copy()
        case.inputs[name][at] = value

    return change


I32 = np.int32
PAGED = ("BSND", "PA_BSND")
PACKED_REFUSALS: dict[str, tuple[tuple[str, str], Change, str]] = {
    "query rank": (
        PAGED,
        setting("query", lambda q: q[0]),
        r"query: .*expected 4 dim.*got 3",
    ),
    "query width": (PAGED, setting("query", lambda q: q[..., :8]), r"above rope_head_dim 8"),
    "query width and rows": (
        PAGED,
        setting("query", lambda q: q[..., :-16].copy()),
        r"input key: .*expected rows of 36 bytes \(16 int8 nope \+ 8 rope of 2 bytes.*got 56",
    ),
    "row bytes": (PAGED, setting("key", lambda k: k[..., :-1]), r"rows of 56 bytes.*got 55"),
    "key rank": (
        PAGED,
        setting("key", lambda k: k[0]),
        r"key: .*expected 4 .*PA_BSND.*got 3",
    ),
    "key heads": (
        PAGED,
        setting("key", lambda k: np.repeat(k, 2, 2)),
        r"input key: .*expected 1 in dimension 2 .*got 2",
    ),
    "empty pages": (PAGED, setting("key", lambda k: k[:, :0]), r"pages of at least one row"),
    "key batch": (
        ("BSND", "BSND"),
        setting("key", lambda k: k[:2]),
        r"input key: .*expected 3 in dimension 0 \(batch.*got 2",
    ),
    "indices rank": (PAGED, setting("sparse_indices", lambda i: i[0]), r"sparse_indices: .*4 dim"),
    "indices rows": (
        PAGED,
        setting("sparse_indices", lambda i: i[:, :2]),
        r"sparse_indices: .*expected 3 in dimension 1 .*got 2",
    ),
    "indices heads": (
        PAGED,
        setting("sparse_indices", lambda i: np.repeat(i, 4, 2)),
        r"sparse_indices: .*expected 1 in dimension 2 .*got 4",
    ),
    "query lengths": (
        PAGED,
        setting("actual_seq_lengths_query", np.ones(2, I32)),
        r"actual_seq_lengths_query: .*expected 3 in dimension 0 \(batch\), got 2",
    ),
    "kv lengths": (
        PAGED,
        setting("actual_seq_lengths_kv", np.ones((3, 1), I32)),
        r"actual_seq_lengths_kv: .*expected 1 dimensions \[B\], got 2",
    ),
    "no kv lengths": (
        PAGED,
        setting("actual_seq_lengths_kv", None),
        r"actual_seq_lengths_kv: expected, because layout_kv is PA_BSND, but it is absent",
    ),
    "no prefix sums": (
        ("TND", "TND"),
        setting("actual_seq_lengths_query", None),
        r"actual_seq_lengths_query: expected, because layout_query is TND",
    ),
    "no sequence": (
        ("TND", "TND"),
        setting("actual_seq_lengths_query", np.zeros(0, I32)),
        r"actual_seq_lengths_query: .*at least one sequence",
    ),
    "no table": (
        PAGED,
        setting("block_table", None),
        r"block_table: expected, because layout_kv is PA_BSND",
    ),
    "needless table": (
        ("BSND", "BSND"),
        lambda case: case.inputs.update(block_table=np.zeros((3, 2), I32)),
        r"block_table: shape \[3,2\]: expected to be absent",
    ),
    "table batch": (
        PAGED,
        setting("block_table", lambda t: t[:2]),
        r"table: .*expected 3 in",
    ),
    "reserved scale": (
        PAGED,
        lambda case: case.inputs.update(key_dequant_scale=np.ones(4, np.float32)),
        r"key_dequant_scale: shape \[4\]: expected to be absent: reserved",
    ),
    "query length above S1": (
        PAGED,
        putting("actual_seq_lengths_query", 1, 4),
        r"actual_seq_lengths_query\[1\] is 4, allowed is 0\.\.3",
    ),
    "negative length": (
        PAGED,
        putting("actual_seq_lengths_kv", 2, -1),
        r"actual_seq_lengths_kv\[2\] is -1, allowed is 0\.\.64",
    ),
    "length above S2": (
        ("BSND", "BSND"),
        putting("actual_seq_lengths_kv", 0, 41),
        r"actual_seq_lengths_kv\[0\] is 41, allowed is 0\.\.40",
    ),
    "table too short": (
        PAGED,
        putting("actual_seq_lengths_kv", 0, 65),
        r"block_table has 4 columns, but actual_seq_lengths_kv\[0\] needs 5 pages",
    ),
    "prefix sums decrease": (
        ("TND", "TND"),
        putting("actual_seq_lengths_query", 0, 9),
        r"actual_seq_lengths_query\[1\] is \d but the entry before it is 9",
    ),
    "page outside": (
        PAGED,
        lambda case: putting("block_table", (0, 0), len(case.inputs["key"]))(case),
        r"block_table\[0\]\[0\] is \d+, but query row \d needs that page and the cache has pages",
    ),
    "page negative": (PAGED, putting("block_table", (0, 1), -1), r"block_table\[0\]\[1\] is -1"),
    "hole": (
        PAGED,
        putting("sparse_indices", (0, 1, 0, 2), -1),
        r"sparse_indices of query row 1: slot 3 holds .* after a negative one at slot 2",
    ),
}


@needs_library
@pytest.mark.parametrize("name", PACKED_REFUSALS)
def test_packed_calls_are_refused_with_their_cause(name):
    layouts, change, text = PACKED_REFUSALS[name]
    case = make_case(layouts=layouts, s2=40, count=40)
    change(case)
    with pytest.raises(ContractError, match=text):
        runtime.run(op_model(case, symbolic=False), feeds(case))


FLOAT_REFUSALS: dict[str, tuple[Change, str]] = {
    "one rope": (setting("key_rope", None), r"query_rope and key_rope: expected both or none"),
    "rope width": (setting("key_rope", lambda r: r[..., :4]), r"key_rope: .*rope width.*got 4"),
    "rope rows": (
        setting("query_rope", lambda r: r[:, :, :2]),
        r"query_rope: .*expected 4 in dimension 2 \(query\), got 2",
    ),
    "latent width": (setting("key", lambda k: k[..., :16]), r"input key: .*latent width.*got 16"),
    "page of the rope": (
        setting("key_rope", lambda r: r[1:]),
        r"key_rope: .*expected \d+ in dimension 0 \(key\)",
    ),
}


@needs_library
@pytest.mark.parametrize("name", FLOAT_REFUSALS)
def test_float_cache_calls_are_refused_with_their_cause(name):
    change, text = FLOAT_REFUSALS[name]
    case = make_case(SPARSE_FLASH_ATTENTION)
    change(case)
    with pytest.raises(ContractError, match=text):
        runtime.run(op_model(case, symbolic=False), feeds(case))


REMOVED = object()
PACKED, BUILT_IN, FLOAT = (
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    KV_QUANT_SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION,
)
ATTRIBUTE_REFUSALS: list[tuple[OpContract, str, Any, str]] = [
    (PACKED, "scale_value", REMOVED, "expected a float, got none"),
    (PACKED, "scale_value", "0.1", "expected a float, got a string"),
    (PACKED, "scale_value", [0.1], "expected a float, got a list"),
    (PACKED, "scale_value", float("nan"), "expected a finite float"),
    (PACKED, "scale_value_exact", [0.1, 0.2], "expected a list of one float, got 2"),
    (PACKED, "scale_value_exact", 0.1, "expected a list of one float, got"),
    (PACKED, "sparse_block_size", REMOVED, "expected an int, got none"),
    (PACKED, "sparse_block_size", 0, r"expected an int in \[1, 2147483647\], got 0"),
    (PACKED, "sparse_block_size", 2**40, "expected an int in"),
    (PACKED, "sparse_block_size", 1.0, "expected an int, got a float"),
    (PACKED, "key_quant_mode", 0, "expected 2, got 0"),
    (PACKED, "value_quant_mode", REMOVED, "expected an int, got none"),
    (PACKED, "attention_mode", REMOVED, "expected 2, got 0"),
    (PACKED, "quant_scale_repo_mode", 0, "expected 1, got 0"),
    (PACKED, "tile_size", REMOVED, "expected an int in .*, got 0"),
    (PACKED, "rope_head_dim", -1, "expected an int in .*, got -1"),
    (PACKED, "sparse_mode", 4, "expected 0 or 3, got 4"),
    (PACKED, "sparse_mode", [3], "expected an int, got a list"),
    (PACKED, "layout_query", "BNSD", "expected BSND or TND, got 'BNSD'"),
    (PACKED, "layout_query", 1, "expected a string, got an int"),
    (PACKED, "layout_kv", "PA_NZ", "expected BSND or TND or PA_BSND, got 'PA_NZ'"),
    (PACKED, "layout_kv", "x" * 99, r"expected BSND .*99 characters"),
    (PACKED, "layout_kv", "TND", "expected PA_BSND or layout_query's BSND, got TND"),
    (BUILT_IN, "pre_tokens", 5, "expected 9223372036854775807, got 5"),
    (BUILT_IN, "next_tokens", 0, "expected 9223372036854775807, got 0"),
    (FLOAT, "attention_mode", 1, "expected 0 or 2, got 1"),
    (FLOAT, "return_softmax_lse", 2, "expected 0 or 1, got 2"),
]


@needs_library
@pytest.mark.parametrize(("op", "name", "value", "text"), ATTRIBUTE_REFUSALS)
def test_illegal_attributes_are_refused_when_the_model_loads(op, name, value, text):
    model = attribute_model(op, name, value)
    where = f"{op.name} 'site': attribute {name}: "
    with pytest.raises(ModelError, match=re.escape(where) + text):
        runtime.session(model)


def attribute_model(op: OpContract, name: str, value: Any) -> Any:
    case = make_case(SPARSE_FLASH_ATTENTION if op is FLOAT else PACKED)
    given = {a.name: case.attributes[a.name] for a in op.attributes if a.name in case.attributes}
    model = op_model(Case(op, case.inputs, op.complete(given)))
    node = model.graph.node[0]
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not REMOVED:
        node.attribute.append(helper.make_attribute(name, value))
    return model


CONTRACT = [(op, a) for op in (PACKED, BUILT_IN, FLOAT) for a in op.attributes]


@needs_library
@pytest.mark.parametrize(("op", "a"), CONTRACT, ids=lambda x: x.name)
def test_defaults_and_legal_values_are_the_contracts(op, a):
    """The compiled table cannot drift away from `sfa_onnx.op`."""

    def loads(value: Any) -> bool:
        model = attribute_model(op, a.name, value)
        try:
            runtime.session(model)
        except ModelError as error:
            if f"attribute {a.name}: " in str(error):
                return False
            raise
        return True

    default_is_legal = not a.required and (a.cpu is None or a.default in a.cpu)
    if a.name == "tile_size":  # 0 stands for "not given" in the older op
        default_is_legal = a.default != 0
    if a.name in ("layout_query", "layout_kv"):
        return  # legal in pairs only: the tables above have them
    assert loads(REMOVED) == default_is_legal
    for value in a.cpu or ():
        assert loads(value)
    if a.cpu:
        assert not loads(max(a.cpu) - 7)


@needs_library
def test_an_int_scale_is_taken_as_a_float():
    case = make_case()
    case.attributes["scale_value"] = 1.0
    expected = runtime.run(op_model(case), feeds(case))
    model = attribute_model(PACKED, "scale_value", 1)
    assert (runtime.run(model, feeds(case))["attention_out"] == expected["attention_out"]).all()


@needs_library
def test_a_tile_that_does_not_divide_the_latent_is_refused():
    case = make_case()
    model = attribute_model(PACKED, "tile_size", 24)
    with pytest.raises(ContractError, match="tile_size: expected a divisor of the nope width 32"):
        runtime.run(model, feeds(case))


@needs_library
def test_an_unknown_holes_policy_is_refused(monkeypatch):
    monkeypatch.setenv("SFA_ONNX_HOLES", "ignore")
    with pytest.raises(ModelError, match=r"SFA_ONNX_HOLES: expected error, skip or stop, got 'ig"):
        runtime.session(op_model(make_case()))


@needs_library
def test_an_unknown_kernel_path_is_refused(monkeypatch):
    case = make_case()
    monkeypatch.setenv("SFA_ONNX_ISA", "mmx")
    with pytest.raises(ContractError, match="SFA_ONNX_ISA"):
        runtime.run(op_model(case), feeds(case))


PACK_REFUSALS = {
    "no scale": ({"nope": np.zeros((2, 32), np.int8)}, "input scale: expected, because nope is"),
    "scale of float": (
        {"nope": np.zeros((2, 32), np.float32), "scale": np.zeros((2, 2), np.float32)},
        "input scale: expected to be absent",
    ),
    "tile": ({"nope": np.zeros((2, 24), np.float32)}, r"nope: shape \[2,24\]: .*tile_size 16"),
    "scalar": ({"nope": np.zeros((), np.float32)}, r"nope: shape \[\]"),
    "rope rows": (
        {"nope": np.zeros((2, 32), np.float32), "rope": np.zeros((3, 8), np.float32)},
        r"rope: shape \[3,8\]: expected nope's shape \[2,32\]",
    ),
    "scale tiles": (
        {"nope": np.zeros((2, 32), np.int8), "scale": np.zeros((2, 3), np.float32)},
        r"scale: shape \[2,3\]: expected .* with 2 in the last dimension",
    ),
    "clip shape": (
        {"nope": np.zeros((2, 32), np.float32), "clip": np.ones(2, np.float32)},
        r"clip: shape \[2\]: expected a scalar",
    ),
    "clip value": (
        {"nope": np.zeros((2, 32), np.float32), "clip": np.array(-1, np.float32)},
        "clip",
    ),
}


@needs_library
@pytest.mark.parametrize("name", PACK_REFUSALS)
def test_pack_is_refused_with_its_cause(name):
    inputs, text = PACK_REFUSALS[name]
    names = [t.name if t.name in inputs else "" for t in KV_CACHE_PACK.inputs]
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in inputs.items()
    ]
    model = node_model(KV_CACHE_PACK, names, infos, {"tile_size": 16})
    with pytest.raises(ContractError, match=text):
        runtime.run(model, inputs)
