"""Converting float caches to packed rows: hand-made models in the shapes exporters give them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.ascend.flavour.model import to_atc
from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.kv_convert import convert
from sfa_onnx.kv_convert.interface import adapt_feeds, float_outputs, read_interface
from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.op import DOMAIN_NPU, SPARSE_FLASH_ATTENTION
from sfa_onnx.passes.graph.cache_pairs import cache_pairs

B, N1, C, R, K, TILE = 2, 4, 64, 16, 8, 32
SCALE = 0.125
F32 = TensorProto.FLOAT


def attention(prefix: str, key: str, rope: str, out: str) -> onnx.NodeProto:
    values = {
        a.name: a.write if a.write is not None else a.default
        for a in SPARSE_FLASH_ATTENTION.attributes
    }
    values |= {"scale_value": SCALE, "sparse_mode": 0}
    inputs = [f"{prefix}q", key, key, f"{prefix}idx", "", "", "", f"{prefix}qr", rope]
    node = helper.make_node(
        SPARSE_FLASH_ATTENTION.name, inputs, [out], name=f"{prefix}attn", domain=DOMAIN_NPU
    )
    node.attribute.extend(helper.make_attribute(n, v) for n, v in values.items())
    return node


def const(name: str, values: list[int]) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, np.int64), name)


def vi(name: str, dims: list[object], elem: int = F32) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem, dims)


def growing(layers: int = 1) -> onnx.ModelProto:
    """DynamicCache: Concat(past, new) on axis 2 of [B, 1, S, C]; the grown caches are returned."""
    nodes, inputs, outputs, infos = [], [], [], []
    inits = [const("ax1", [1]), const("ax2", [2])]
    for i in range(layers):
        p = f"l{i}."
        nodes += [
            helper.make_node("Concat", [f"{p}past_c", f"{p}new_c"], [f"{p}c"], f"{p}cc", axis=-2),
            helper.make_node("Concat", [f"{p}past_r", f"{p}new_r"], [f"{p}r"], f"{p}cr", axis=2),
            helper.make_node("Squeeze", [f"{p}c", "ax1"], [f"{p}c3"], f"{p}sq"),
            helper.make_node("Unsqueeze", [f"{p}c3", "ax2"], [f"{p}key"], f"{p}un"),
            helper.make_node("Transpose", [f"{p}r"], [f"{p}krope"], f"{p}tr", perm=[0, 2, 1, 3]),
            attention(p, f"{p}key", f"{p}krope", f"{p}o"),
        ]
        inputs += [
            vi(f"{p}past_c", ["b", 1, "past", C]), vi(f"{p}past_r", ["b", 1, "past", R]),
            vi(f"{p}new_c", ["b", 1, "s", C]), vi(f"{p}new_r", ["b", 1, "s", R]),
            vi(f"{p}q", ["b", "s", N1, C]), vi(f"{p}qr", ["b", "s", N1, R]),
            vi(f"{p}idx", ["b", "s", 1, K], TensorProto.INT32),
        ]  # fmt: skip
        outputs += [
            vi(f"{p}o", ["b", "s", N1, C]),
            vi(f"{p}c", ["b", 1, "total", C]),
            vi(f"{p}r", ["b", 1, "total", R]),
        ]
        infos += [vi(f"{p}key", ["b", "total", 1, C]), vi(f"{p}krope", ["b", "total", 1, R])]
    nodes.append(helper.make_node("Shape", ["l0.past_c"], ["past_shape"], "shape"))
    outputs.append(vi("past_shape", [4], TensorProto.INT64))
    return model(nodes, inputs, outputs, inits, infos)


def model(nodes, inputs, outputs, inits, infos) -> onnx.ModelProto:  # type: ignore[no-untyped-def]
    graph = helper.make_graph(nodes, "g", inputs, outputs, inits, value_info=infos)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN_NPU, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def feeds_for(m: onnx.ModelProto, past: int = 40, s: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"b": B, "past": past, "s": s, "cap": past + 8}
    feeds = {}
    for value in m.graph.input:
        t = value.type.tensor_type
        dims = [d.dim_value or sizes[d.dim_param] for d in t.shape.dim]
        if t.elem_type == TensorProto.INT32:
            rows = [rng.permutation(past)[:K] for _ in range(int(np.prod(dims[:-1])))]
            feeds[value.name] = np.asarray(rows, np.int32).reshape(dims)
        elif t.elem_type == TensorProto.INT64:
            feeds[value.name] = np.arange(past, past + s, dtype=np.int64).reshape(dims)
        else:
            feeds[value.name] = rng.standard_normal(dims).astype(np.float32)
    return feeds


def run(m: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    from sfa_onnx import runtime

    return runtime.run(runtime.session(m), feeds)


def loss(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("form", ["int8", "packed-int8", "paged-int8"])
def test_growing_cache(form: str) -> None:
    source = growing(layers=2)
    before = source.SerializeToString()
    report = convert(source, to=form, block_size=16, tile_size=TILE)
    assert source.SerializeToString() == before, "the input model was modified"
    assert report.sites == 2
    onnx.checker.check_model(report.model)
    feeds = feeds_for(source)
    expected = run(source, feeds)
    interface = read_interface(report.model)
    assert interface is not None
    assert interface.form == form
    mine = feeds if form == "int8" else adapt_feeds(interface, feeds, new_tokens=2)
    got = float_outputs(interface, run(report.model, mine), mine)
    assert set(got) == set(expected)
    for name in ("l0.o", "l1.o"):
        assert 1e-4 < loss(got[name], expected[name]) < 2e-2, "int8 loss expected, no more"
    np.testing.assert_array_equal(got["past_shape"], expected["past_shape"])
    for name in ("l0.c", "l1.r"):
        assert got[name].shape == expected[name].shape
        assert loss(got[name], expected[name]) < 1.5e-2


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_a_row_holds_the_rope_in_the_type_of_the_query(kind: int) -> None:
    source = growing()
    for value in (*source.graph.input, *source.graph.output, *source.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    report = convert(source, to="packed-int8", tile_size=TILE)
    size = 4 if kind == TensorProto.FLOAT else 2
    assert report.bytes_per_token_before == size * (C + R)
    assert report.bytes_per_token_after == C + size * R + 4 * (C // TILE)
    rows = report.model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value
    assert rows == report.bytes_per_token_after


def test_packed_interface_is_listed_and_rows_are_exact() -> None:
    source = growing()
    report = convert(source, to="packed-int8", tile_size=TILE)
    assert report.removed_inputs == ["l0.past_c", "l0.past_r"]
    assert report.added_inputs == ["l0.past_c_packed"]
    assert report.removed_outputs == ["l0.c", "l0.r"]
    assert report.added_outputs == ["l0.c_packed"]
    assert report.model.graph.input[0].name == "l0.past_c_packed", "takes the latent's position"
    assert report.bytes_per_token_after < report.bytes_per_token_before
    feeds = feeds_for(source)
    interface = read_interface(report.model)
    assert interface is not None
    mine = adapt_feeds(interface, feeds)
    out = run(report.model, mine)["l0.c_packed"]
    past = mine["l0.past_c_packed"]
    np.testing.assert_array_equal(out[:, : past.shape[1]], past)
    new = kv_cache.pack(
        feeds["l0.new_c"].transpose(0, 2, 1, 3), feeds["l0.new_r"].transpose(0, 2, 1, 3),
        tile_size=TILE,
    )  # fmt: skip
    np.testing.assert_array_equal(out[:, past.shape[1] :], new)


def test_paged_interface_names_the_dims_it_shares() -> None:
    source = growing()
    for value in source.graph.input:
        if value.name.endswith(("new_c", "new_r")):
            value.type.tensor_type.shape.dim[2].dim_value = 1
    report = convert(source, to="paged-int8", block_size=16, tile_size=TILE)
    dims = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in report.model.graph.input
    }
    assert dims["block_table"] == ["b", "blocks_per_sequence"]
    assert dims["slot_mapping"] == ["b"]
    assert dims["actual_seq_lengths_kv"] == ["b"]


@pytest.mark.parametrize("asked", [True, False])
def test_a_length_that_is_asked_for_as_one_number_is_told(asked: bool) -> None:
    source = growing()
    if not asked:
        del source.graph.node[-1], source.graph.output[-1]
    told = [convert(source, to=form, tile_size=TILE).notes for form in ("packed-int8", "paged")]
    assert told[0] == []
    assert [note.partition(" where")[0] for note in told[1]] == [
        "the model asks for the length of its cache as one number and gets that of the longest"
        " sequence:"
    ] * asked


def test_pages_change_only_at_the_new_slots() -> None:
    source = growing()
    report = convert(source, to="paged-int8", block_size=16, tile_size=TILE)
    assert {"block_table", "actual_seq_lengths_kv", "slot_mapping"} <= set(report.added_inputs)
    interface = read_interface(report.model)
    assert interface is not None
    mine = adapt_feeds(interface, feeds_for(source), new_tokens=2)
    pages = mine["l0.past_c_packed"]
    out = run(report.model, mine)["l0.c_packed"]
    changed = np.flatnonzero((out != pages).any(axis=(2, 3)).ravel())
    np.testing.assert_array_equal(np.sort(changed), np.sort(mine["slot_mapping"]))


def _paged_run(slots: list[int], cached: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """(pages before, pages after) for two new tokens per sequence at `slots`."""
    source = growing()
    report = convert(source, to="paged-int8", block_size=16, tile_size=TILE)
    interface = read_interface(report.model)
    assert interface is not None
    mine = adapt_feeds(interface, feeds_for(source, cached), new_tokens=2)
    mine["slot_mapping"] = np.asarray(slots, np.int32)
    pages = mine["l0.past_c_packed"].copy()
    out = run(report.model, mine)["l0.c_packed"]
    flat = (-1, pages.shape[-1])
    return pages.reshape(flat), out.reshape(flat)


@pytest.mark.parametrize(
    "slots", [[-1, 41, 88, -1], [40, -1, -1, -1], [-1, -1, -1, 0], [0, -7, 15, 16], [-1, -1, 95, 3]]
)
def test_padding_tokens_write_nothing(slots: list[int]) -> None:
    full = [17, 41, 88, 3]  # a slot for every token tells the packed rows
    rows = _paged_run(full)[1][full]
    before, after = _paged_run(slots)
    expected = before.copy()
    for row, slot in zip(rows, slots, strict=True):
        if slot >= 0:
            expected[slot] = row
    np.testing.assert_array_equal(after, expected)


def test_a_step_of_padding_alone_leaves_the_pages() -> None:
    before, after = _paged_run([-1, -1, -1, -1])
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("slots", [[40], [40, 41, 42], [40, 41, 42, 43, 44]])
def test_one_slot_per_new_token_is_required(slots: list[int]) -> None:
    with pytest.raises(Exception, match="as many as rows"):
        _paged_run(slots)


def test_pages_are_written_by_one_operator_that_makes_the_output_itself() -> None:
    paged = convert(growing(layers=2), to="paged-int8", block_size=16, tile_size=TILE).model
    kinds = [n.op_type for n in paged.graph.node]
    assert kinds.count("KvCacheWrite") == 2
    assert not {"ScatterND", "Where"} & set(kinds)
    outputs = {o.name for o in paged.graph.output}
    for write in (n for n in paged.graph.node if n.op_type == "KvCacheWrite"):
        assert write.input[0].endswith("past_c_packed")
        assert write.output[0] in outputs
    pairs = [(p.input, p.output) for p in cache_pairs(paged)]
    assert pairs == [("l0.past_c_packed", "l0.c_packed"), ("l1.past_c_packed", "l1.c_packed")]


@pytest.mark.parametrize("slots", [[40, 41, 88, 3], [-1, 41, 88, -1], [-1, -1, -1, -1]])
def test_the_atc_flavour_of_pages_computes_the_same(slots: list[int]) -> None:
    report = convert(growing(layers=2), to="paged-int8", block_size=16, tile_size=TILE)
    interface = read_interface(report.model)
    assert interface is not None
    feeds = feeds_for(growing(layers=2))
    mine = adapt_feeds(interface, feeds, new_tokens=2) | {
        "slot_mapping": np.asarray(slots, np.int32)
    }
    atc = to_atc(report.model)
    assert len(cache_pairs(atc)) == 2
    assert sum(n.op_type == "Less" for n in atc.graph.node) == 1, "shared by both caches"
    expected, got = run(report.model, dict(mine)), run(atc, dict(mine))
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def static_cache(layout: str) -> onnx.ModelProto:
    """A fixed buffer written by ScatterND on a transposed view, then (official) sliced."""
    if layout == "hf":  # [B, 1, S, C], index_copy along axis 2
        dims, perm, unit = ["b", 1, "cap"], [2, 1, 0, 3], True
    else:  # official: [B, S, C], slice assignment
        dims, perm, unit = ["b", "cap"], [1, 0, 2], False
    nodes, infos, outputs = [], [], []
    inputs = [vi("pos", ["s", 1], TensorProto.INT64)]
    new_dims = ["s", 1, "b"] if unit else ["s", "b"]
    for n, width in (("c", C), ("r", R)):
        inputs += [vi(f"buf_{n}", [*dims, width]), vi(f"new_{n}", [*new_dims, width])]
        nodes += [
            helper.make_node("Transpose", [f"buf_{n}"], [f"t_{n}"], f"t1{n}", perm=perm),
            helper.make_node("ScatterND", [f"t_{n}", "pos", f"new_{n}"], [f"w_{n}"], f"sc{n}"),
            helper.make_node("Transpose", [f"w_{n}"], [f"out_{n}"], f"t2{n}", perm=perm),
        ]
        outputs.append(vi(f"out_{n}", [*dims, width]))
        if unit:
            nodes.append(
                helper.make_node("Transpose", [f"out_{n}"], [f"k_{n}"], f"t3{n}", perm=[0, 2, 1, 3])
            )
        else:
            nodes.append(
                helper.make_node("Slice", [f"out_{n}", "zero", "end", "one"], [f"sl_{n}"], f"sl{n}")
            )
            nodes.append(helper.make_node("Unsqueeze", [f"sl_{n}", "two"], [f"k_{n}"], f"un{n}"))
        infos.append(vi(f"k_{n}", ["b", "valid", 1, width]))
    inputs += [
        vi("q", ["b", "s", N1, C]), vi("qr", ["b", "s", N1, R]),
        vi("idx", ["b", "s", 1, K], TensorProto.INT32),
    ]  # fmt: skip
    nodes.append(attention("", "k_c", "k_r", "o"))
    outputs.append(vi("o", ["b", "s", N1, C]))
    inits = [const("zero", [0]), const("end", [42]), const("one", [1]), const("two", [2])]
    inits = [] if unit else inits
    return model(nodes, inputs, outputs, inits, infos)


@pytest.mark.parametrize("layout", ["hf", "official"])
@pytest.mark.parametrize("form", ["packed-int8", "paged-int8"])
def test_static_cache(layout: str, form: str) -> None:
    source = static_cache(layout)
    report = convert(source, to=form, block_size=16, tile_size=TILE)
    feeds = feeds_for(source)
    feeds["idx"][0, 0, 0, :2] = [40, 41]  # the rows just written are read, too
    expected = run(source, feeds)
    interface = read_interface(report.model)
    assert interface is not None
    mine = adapt_feeds(interface, feeds)
    if form == "paged-int8":
        capacity = feeds["buf_c"].shape[-2]
        blocks = -(-capacity // 16)
        mine["slot_mapping"] = np.asarray(
            [b * blocks * 16 + int(p) for b in range(B) for p in feeds["pos"].ravel()], np.int32
        )
    got = run(report.model, mine)
    assert 1e-4 < loss(got["o"], expected["o"]) < 2e-2


def test_other_reader_of_the_cache_is_refused() -> None:
    source = growing()
    source.graph.node.append(
        helper.make_node("ReduceMean", ["l0.past_c"], ["m"], "norm", keepdims=0)
    )
    source.graph.output.append(vi("m", []))
    with pytest.raises(
        ModelError, match=r"norm \(ReduceMean\) also reads the float cache l0\.past_c"
    ):
        convert(source, to="packed-int8", tile_size=TILE)
    assert convert(source, to="int8", tile_size=TILE).sites == 1


def test_unknown_form_and_second_conversion_are_refused() -> None:
    with pytest.raises(UsageError, match="expected one of int8, packed-int8, paged-int8"):
        convert(growing(), to="fp8")
    once = convert(growing(), to="packed-int8", tile_size=TILE).model
    with pytest.raises(ModelError, match="converted already, to packed-int8"):
        convert(once, to="packed-int8")


def joint() -> onnx.ModelProto:
    """One 80-wide cache, split for the operator by Slice nodes."""
    nodes = [
        helper.make_node("Concat", ["past", "new"], ["all"], "cat", axis=1),
        helper.make_node("Slice", ["all", "zero", "c", "two"], ["lat"], "s1"),
        helper.make_node("Slice", ["all", "c", "end", "two"], ["rot"], "s2"),
        helper.make_node("Unsqueeze", ["lat", "two"], ["key"], "u1"),
        helper.make_node("Unsqueeze", ["rot", "two"], ["krope"], "u2"),
        attention("", "key", "krope", "o"),
    ]
    inputs = [
        vi("past", ["b", "past", C + R]), vi("new", ["b", "s", C + R]),
        vi("q", ["b", "s", N1, C]), vi("qr", ["b", "s", N1, R]),
        vi("idx", ["b", "s", 1, K], TensorProto.INT32),
    ]  # fmt: skip
    outputs = [vi("o", ["b", "s", N1, C]), vi("all", ["b", "total", C + R])]
    inits = [const("zero", [0]), const("c", [C]), const("end", [2**62]), const("two", [2])]
    infos = [vi("key", ["b", "t", 1, C]), vi("krope", ["b", "t", 1, R])]
    return model(nodes, inputs, outputs, inits, infos)


def test_joint_cache_of_latent_and_rope() -> None:
    source = joint()
    report = convert(source, to="packed-int8", tile_size=TILE)
    assert report.removed_inputs == ["past"]
    interface = read_interface(report.model)
    assert interface is not None
    feeds = feeds_for(source)
    expected = run(source, feeds)
    mine = adapt_feeds(interface, feeds)
    got = float_outputs(interface, run(report.model, mine), mine)
    assert loss(got["o"], expected["o"]) < 2e-2
    assert loss(got["all"], expected["all"]) < 1.5e-2


def test_a_model_without_float_sites_is_told_to_fuse() -> None:
    source = growing()
    source.graph.node[5].op_type = "NPUSomethingElse"
    with pytest.raises(ModelError, match="fuse it first"):
        convert(source, to="int8")
