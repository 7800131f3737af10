import numpy as np
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.runtime.feeds.draw import random_feeds
from tests.test_compare import TOP, VOCABULARY, decoder


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
    assert random_feeds(written)["cache_position"].tolist() == [[29], [30], [31]]


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
