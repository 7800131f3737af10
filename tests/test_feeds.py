import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx import runtime
from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.kv_convert import convert
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT
from sfa_onnx.runtime.feeds.draw import random_feeds
from tests.attention_cases import make_case
from tests.op_models import needs_library, op_model
from tests.test_compare import TOP, VOCABULARY, decoder
from tests.test_kv_convert import TILE, growing


def one_node(node, inputs, weights=()):
    infos = [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs]
    out = helper.make_empty_tensor_value_info(node.output[0])
    graph = helper.make_graph([node], "g", infos, [out], list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def test_token_ids_stay_inside_the_vocabulary():
    model = decoder(np.float32)
    for seed in range(3):
        ids = random_feeds(model, seed)["input_ids"]
        assert 0 <= ids.min() <= ids.max() < VOCABULARY
        assert ids.max() > 1
    again = random_feeds(model, 2)
    assert (ids == again["input_ids"]).all()


def test_a_past_is_longer_than_every_selection():
    feeds = random_feeds(decoder(np.float32))
    assert feeds["past_latent0"].shape[1] == feeds["index_key0"].shape[2] >= TOP


def test_masks_are_causal_and_positions_end_the_past():
    table = numpy_helper.from_array(np.zeros((64, 4), np.float32), "table")
    model = one_node(
        helper.make_node("Gather", ["table", "position_ids"], ["y"]),
        [
            ("position_ids", TensorProto.INT64, ["batch", "seq"]),
            ("attention_mask", TensorProto.FLOAT, ["batch", 1, "seq", "past_len + seq"]),
            ("past_key", TensorProto.FLOAT, ["batch", "past_len", 4]),
        ],
        [table],
    )
    feeds = random_feeds(model, sizes={"past_len": 5})
    assert feeds["position_ids"].tolist() == [[5, 6, 7]] * 2
    mask = feeds["attention_mask"][0, 0]
    assert mask.shape == (3, 8)
    assert (mask[0, :6] == 0).all()
    assert (mask[0, 6:] < -6e4).all()
    assert (mask[-1] == 0).all()


def test_a_scalar_position_and_a_cache_that_is_written_in_place():
    table = numpy_helper.from_array(np.zeros((64, 4), np.float32), "table")
    position = one_node(
        helper.make_node("Gather", ["table", "position"], ["y"]),
        [("position", TensorProto.INT64, []), ("past_kv", TensorProto.FLOAT, [2, 48, 4])],
        [table],
    )
    assert random_feeds(position)["position"] == 48
    written = one_node(
        helper.make_node("ScatterND", ["cache", "cache_position", "rows"], ["y"]),
        [
            ("cache", TensorProto.FLOAT, [32, 4]),
            ("cache_position", TensorProto.INT64, ["s", 1]),
            ("rows", TensorProto.FLOAT, ["s", 4]),
            ("kv_cache", TensorProto.FLOAT, [2, 32, 4]),
        ],
    )
    assert random_feeds(written)["cache_position"].tolist() == [[24], [25], [26]]


def test_dynamos_anonymous_symbols_get_sizes_by_their_place():
    model = one_node(
        helper.make_node("Identity", ["q"], ["y"]),
        [
            ("q", TensorProto.FLOAT, ["s10", "s11", 4, 64]),
            ("kv_cache", TensorProto.FLOAT, ["s10", "s19", 64]),
            ("selection", TensorProto.FLOAT, ["s10", "s11", "s71"]),
        ],
    )
    shapes = {n: a.shape for n, a in random_feeds(model).items()}
    assert shapes == {"q": (2, 3, 4, 64), "kv_cache": (2, 32, 64), "selection": (2, 3, 32)}
    assert random_feeds(model, wide=True)["q"].shape == (2, 32, 4, 64)


def attention(case, **more):
    """One node of ours, its dims open, and the inputs drawn for it."""
    model = op_model(case, **more)
    return model, random_feeds(model)


@needs_library
@pytest.mark.parametrize("op", [SPARSE_FLASH_ATTENTION_ANTIQUANT, SPARSE_FLASH_ATTENTION])
@pytest.mark.parametrize("layouts", [("BSND", "BSND"), ("BSND", "PA_BSND"), ("TND", "TND")])
@pytest.mark.parametrize("symbolic", [True, False])
def test_every_layout_runs_on_drawn_inputs(op, layouts, symbolic):
    case = make_case(op, layouts)
    model, feeds = attention(case, symbolic=symbolic)
    out = runtime.run(model, feeds)["attention_out"]
    assert np.isfinite(out.astype(np.float32)).all()
    assert np.abs(out.astype(np.float32)).max() > 0
    indices = feeds["sparse_indices"]
    assert indices.max() > 0


def test_lengths_are_ragged_and_indices_stay_below_them():
    case = make_case(SPARSE_FLASH_ATTENTION)
    _, feeds = attention(case)
    lengths, indices = feeds["actual_seq_lengths_kv"], feeds["sparse_indices"]
    assert len(set(lengths.tolist())) == len(lengths) > 1
    assert all(row.max() < n for row, n in zip(indices, lengths, strict=True))


@needs_library
def test_a_query_in_two_parts_over_packed_rows():
    case = make_case()
    model = op_model(case, symbolic=False)
    node, width = model.graph.node[0], case.inputs["query"].shape[-1]
    rope = case.attributes["rope_head_dim"]
    query = next(v for v in model.graph.input if v.name == "query")
    lead, kind = query.type.tensor_type.shape.dim[:3], query.type.tensor_type.elem_type
    model.graph.input.remove(query)
    for name, size in (("nope_part", width - rope), ("rope_part", rope)):
        dims = [*(d.dim_value for d in lead), size]
        model.graph.input.append(helper.make_tensor_value_info(name, kind, dims))
    joined = helper.make_node("Concat", ["nope_part", "rope_part"], ["query"], axis=-1)
    nodes = [joined, node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    out = runtime.run(model, random_feeds(model))["attention_out"].astype(np.float32)
    assert 0 < np.abs(out).max() < 100


def test_dims_without_a_number_or_a_name_get_a_size():
    model = one_node(
        helper.make_node("MatMul", ["a", "b"], ["y"]),
        [("a", TensorProto.FLOAT, [-1, 4]), ("b", TensorProto.FLOAT, [None, 4, 5])],
    )
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    feeds = random_feeds(model)
    assert all(min(a.shape) > 0 for a in feeds.values())


def relation(nodes, inputs, weights=()):
    infos = [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs]
    out = [helper.make_empty_tensor_value_info(nodes[-1].output[0])]
    graph = helper.make_graph(nodes, "g", infos, out, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def number(name, value):
    return numpy_helper.from_array(np.asarray(value, np.int64), name)


def test_a_mask_that_is_indexed_by_a_range_is_as_long_as_the_range():
    nodes = [
        helper.make_node("Concat", ["past", "new"], ["keys"], axis=1),
        helper.make_node("Shape", ["keys"], ["n"], start=1, end=2),
        helper.make_node("Squeeze", ["n"], ["count"]),
        helper.make_node("Range", ["zero", "count", "one"], ["at"]),
        helper.make_node("Gather", ["mask", "at"], ["y"], axis=1),
    ]
    inputs = [
        ("past", TensorProto.FLOAT, ["i", "j", 4]), ("new", TensorProto.FLOAT, ["i", "k", 4]),
        ("mask", TensorProto.INT64, ["l", "m"]),
    ]  # fmt: skip
    model = relation(nodes, inputs, [number("zero", 0), number("one", 1)])
    feeds = random_feeds(model)
    assert feeds["mask"].shape[1] == feeds["past"].shape[1] + feeds["new"].shape[1]


@pytest.mark.parametrize("names", [("batch", "past"), ("foo", "bar"), ("s7", "s8")])
@pytest.mark.parametrize("capped", [False, True])
def test_a_top_k_leaves_some_keys_out_whatever_the_dims_are_called(names, capped):
    nodes = [
        helper.make_node("Shape", ["scores"], ["n"], start=1, end=2),
        helper.make_node("Min", ["n", "eight"], ["k"]),
        helper.make_node("TopK", ["scores", "k" if capped else "eight"], ["v", "y"]),
    ]
    inputs = [("scores", TensorProto.FLOAT, list(names))]
    feeds = random_feeds(relation(nodes, inputs, [number("eight", [8])]))
    assert feeds["scores"].shape[1] >= 16


def test_a_position_in_a_buffer_leaves_room_and_every_layer_agrees():
    nodes = []
    for i in range(2):
        nodes += [
            helper.make_node("Range", ["zero", "two", "one"], [f"r{i}"]),
            helper.make_node("Add", [f"used_{i}", f"r{i}"], [f"at{i}"]),
            helper.make_node("Unsqueeze", [f"at{i}", "last"], [f"pair{i}"]),
            helper.make_node("ScatterND", [f"buffer_{i}", f"pair{i}", f"new_{i}"], [f"y{i}"]),
        ]
    inputs = [
        info
        for i in range(2)
        for info in (
            (f"buffer_{i}", TensorProto.FLOAT, [40, 4]),
            (f"cache_{i}", TensorProto.FLOAT, [1, 40, 4]),
            (f"used_{i}", TensorProto.INT64, []),
            (f"new_{i}", TensorProto.FLOAT, [2, 4]),
        )
    ]
    weights = [number("zero", 0), number("one", 1), number("two", 2), number("last", [1])]
    feeds = random_feeds(relation(nodes, inputs, weights))
    assert feeds["used_0"] == feeds["used_1"]
    assert 0 < feeds["used_0"] <= 38


@needs_library
@pytest.mark.parametrize("fixed", [{}, {"blocks_per_sequence": 5, "b": 3}])
def test_pages_of_a_converted_model_agree(fixed):
    model = convert(growing(2), to="paged-int8", block_size=16, tile_size=TILE).model
    feeds = random_feeds(model, sizes=fixed)
    table, slots = feeds["block_table"], feeds["slot_mapping"]
    lengths = feeds["actual_seq_lengths_kv"]
    assert len(set(table.ravel().tolist())) == table.size, "no page belongs to two sequences"
    assert len(set(slots.tolist())) == slots.size
    assert (lengths <= 16 * table.shape[1]).all()
    assert table.shape == ((3, 5) if fixed else (2, table.shape[1]))
    last = slots.reshape(len(table), -1)[:, -1]
    assert (last // 16 == table[np.arange(len(table)), (lengths - 1) // 16]).all()
    got = runtime.run(model, feeds)
    assert all(np.isfinite(a).all() for a in got.values() if a.dtype.kind == "f")


def test_a_mask_laid_beside_the_keys_is_as_long_as_they_are() -> None:
    """An indexer takes hidden keys as one more column: past + 1 rows of it."""
    nodes = [
        helper.make_node("Concat", ["past_key", "new_key"], ["keys"], axis=1),
        helper.make_node("Unsqueeze", ["attention_mask", "last"], ["column"]),
        helper.make_node("Concat", ["keys", "column"], ["y"], axis=-1),
    ]
    given = {"past_key": ["s1", "s2", 8], "new_key": ["s1", 1, 8], "attention_mask": ["s3", "s4"]}
    inputs = [helper.make_tensor_value_info(n, 1, d) for n, d in given.items()]
    outputs = [helper.make_tensor_value_info("y", 1, None)]
    last = numpy_helper.from_array(np.array([-1]), "last")
    graph = helper.make_graph(nodes, "g", inputs, outputs, [last])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    feeds = random_feeds(model)
    batch, past, _ = feeds["past_key"].shape
    assert feeds["attention_mask"].shape == (batch, past + 1)


@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("op", [SPARSE_FLASH_ATTENTION_ANTIQUANT, SPARSE_FLASH_ATTENTION])
def test_inputs_of_ranks_that_no_layout_has_end_in_no_fault(op, rank, symbolic):
    """Something is drawn: that the model is wrong is for its run to say."""
    case = make_case(op, ("BSND", "PA_BSND"))
    for name in [v.name for v in op_model(case).graph.input]:
        model = op_model(case, symbolic=symbolic)
        given = next(v for v in model.graph.input if v.name == name)
        kind = given.type.tensor_type.elem_type
        given.CopyFrom(helper.make_tensor_value_info(name, kind, [3] * rank))
        assert random_feeds(model)[name].shape == (3,) * rank, name


@pytest.mark.parametrize("given", [[], ["x"]])
@pytest.mark.parametrize("op", ["GatherND", "ScatterElements", "GatherElements"])
def test_operators_that_the_opset_lacks_need_their_inputs_too(op, given):
    model = one_node(helper.make_node(op, given, ["y"]), [("x", TensorProto.FLOAT, ["n", 3])])
    model.opset_import[0].version = 8
    with pytest.raises(ModelError, match=f"{op} 'y' has {len(given)} inputs?, expected"):
        random_feeds(model, seed=1)


def test_a_seed_below_zero_is_refused():
    with pytest.raises(UsageError, match="seed=-1: expected a number from 0 on"):
        random_feeds(decoder(np.float32), -1)
