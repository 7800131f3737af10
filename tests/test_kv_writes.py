"""Caches of fixed length, written by scatters; and single tokens behind a reshape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.kv_convert import convert
from sfa_onnx.kv_convert.interface import adapt_feeds, float_outputs, read_interface
from sfa_onnx.runtime.compare.converted import converted_feeds
from tests.index_models import indexer
from tests.test_kv_convert import (
    N1,
    TILE,
    C,
    K,
    R,
    attention,
    const,
    feeds_for,
    loss,
    model,
    run,
    static_cache,
    vi,
)

CAPACITY = 48
FORMS = ["packed-int8", "paged-int8"]


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(n for n in graph.node if n.name == name)


@pytest.mark.parametrize("form", FORMS)
def test_a_write_that_adds_is_refused(form: str) -> None:
    source = static_cache("hf")
    node(source.graph, "scc").attribute.append(helper.make_attribute("reduction", "add"))
    with pytest.raises(ModelError, match=r"scc \(ScatterND\) combines .*reduction = add"):
        convert(source, to=form, tile_size=TILE)
    assert convert(source, to="int8", tile_size=TILE).sites == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_rope_that_goes_elsewhere_is_refused(form: str) -> None:
    source = static_cache("hf")
    source.graph.input.append(vi("pos_r", ["s", 1], TensorProto.INT64))
    node(source.graph, "scr").input[1] = "pos_r"
    with pytest.raises(ModelError, match="not seen to be the same"):
        convert(source, to=form, tile_size=TILE)


def test_float_pages_are_written_at_one_place() -> None:
    source = static_cache("hf")
    feeds = feeds_for(source)
    feeds["idx"][0, 0, 0, :2] = [40, 41]  # the rows just written are read, too
    report = convert(source, to="paged", block_size=16)
    interface = read_interface(report.model)
    assert interface is not None
    mine = adapt_feeds(interface, feeds)
    np.testing.assert_array_equal(run(report.model, mine)["o"], run(source, feeds)["o"])
    source.graph.input.append(vi("pos_r", ["s", 1], TensorProto.INT64))
    node(source.graph, "scr").input[1] = "pos_r"
    with pytest.raises(ModelError, match="buf_c and buf_r are written at places"):
        convert(source, to="paged")


@pytest.mark.parametrize("where", ["keep", None])
def test_the_length_of_a_buffer_is_taken_from_an_input_that_has_it(where: str | None) -> None:
    """Pages are whole blocks: where a mask says how long the buffer was, its rows are as many."""
    source = static_cache("hf")
    if where:
        source.graph.input.append(vi(where, ["b", "cap"]))
        source.graph.node.append(helper.make_node("Neg", [where], ["kept"]))
        source.graph.output.append(vi("kept", ["b", "cap"]))
    source.graph.node.append(helper.make_node("Shape", ["buf_c"], ["dims"]))
    source.graph.output.append(vi("dims", [4], TensorProto.INT64))
    feeds = feeds_for(source)
    report = convert(source, to="paged", block_size=32)
    shapes = {n.input[0] for n in report.model.graph.node if n.op_type == "Shape"}
    assert (where in shapes) == (where is not None)
    interface = read_interface(report.model)
    assert interface is not None
    want = run(source, feeds)["dims"]
    if where is None:
        want[2] = -(-want[2] // 32) * 32
    got = run(report.model, adapt_feeds(interface, feeds))
    np.testing.assert_array_equal(got["dims"], want)


def test_a_counter_that_each_layer_keeps_is_one() -> None:
    """transformers' static caches: every layer has an input of its own, all fed alike."""
    source = static_cache("hf")
    feeds = feeds_for(source)
    source.graph.input.append(vi("layers.1.pos", ["s", 1], TensorProto.INT64))
    node(source.graph, "scr").input[1] = "layers.1.pos"
    for known in (n for n in source.graph.node if "pos" in n.input):
        known.input[list(known.input).index("pos")] = "layers.0.pos"
    next(v for v in source.graph.input if v.name == "pos").name = "layers.0.pos"
    report = convert(source, to="paged", block_size=16)
    assert any("stands for layers.0.pos, layers.1.pos" in note for note in report.notes)
    interface = read_interface(report.model)
    assert interface is not None
    feeds["layers.0.pos"] = feeds["layers.1.pos"] = feeds.pop("pos")
    mine = adapt_feeds(interface, feeds)
    np.testing.assert_array_equal(run(report.model, mine)["o"], run(source, feeds)["o"])
    feeds["layers.1.pos"] = feeds["layers.0.pos"] + 1
    with pytest.raises(UsageError, match="feed equal positions"):
        adapt_feeds(interface, feeds)


@pytest.mark.parametrize("same", [True, False])
def test_index_keys_of_a_fixed_buffer(same: bool) -> None:
    """Written where the latents are they become pages; elsewhere they stay."""
    source = static_cache("official")
    width, at = 32, "pos" if same else "pos_k"
    graph = source.graph
    graph.input.extend(
        [
            vi("buf_k", ["b", "cap", width]), vi("new_k", ["s", "b", width]),
            vi("iq", ["b", "s", 4, width]), vi("iw", ["b", "s", 4]),
        ]
    )  # fmt: skip
    if not same:
        graph.input.append(vi("pos_k", ["s", 1], TensorProto.INT64))
    made = [
        helper.make_node("Transpose", ["buf_k"], ["t_k"], perm=[1, 0, 2]),
        helper.make_node("ScatterND", ["t_k", at, "new_k"], ["w_k"], "sck"),
        helper.make_node("Transpose", ["w_k"], ["out_k"], perm=[1, 0, 2]),
        helper.make_node("Slice", ["out_k", "zero", "end", "one"], ["sl_k"]),
        helper.make_node("Unsqueeze", ["sl_k", "two"], ["k_k"]),
        indexer("", "k_k", ["chosen"], 0, "seen"),
    ]
    feeds = feeds_for(source)
    graph.input.append(vi("seen", ["b"], TensorProto.INT32))
    graph.value_info.append(vi("k_k", ["b", "valid", 1, width]))
    graph.node.extend(made)
    graph.output.extend([vi("out_k", ["b", "cap", width]), vi("chosen", [], TensorProto.INT32)])
    graph.output[-1].type.tensor_type.ClearField("shape")
    report = convert(source, to="paged-int8", block_size=16, tile_size=TILE)
    assert ("buf_k_pages" in report.added_inputs) == same
    assert any("buf_k are written at places" in note for note in report.notes) == (not same)
    feeds["seen"] = np.array([42, 30], np.int32)
    if not same:
        feeds["pos_k"] = np.array([[3], [4]], np.int64)
    interface = read_interface(report.model)
    assert interface is not None
    got = run(report.model, adapt_feeds(interface, feeds))
    np.testing.assert_array_equal(got["chosen"], run(source, feeds)["chosen"])


def test_a_cache_that_grows_beside_a_fixed_one_gets_no_pages() -> None:
    source = static_cache("hf")
    graph = source.graph
    for name in ("t1r", "scr", "t2r"):
        graph.node.remove(node(graph, name))
    graph.node.insert(0, helper.make_node("Concat", ["buf_r", "more_r"], ["out_r"], axis=2))
    graph.input.append(vi("more_r", ["b", 1, "s", R]))
    with pytest.raises(ModelError, match="the cache buf_r grows and buf_c is written at places"):
        convert(source, to="paged")


def test_indices_that_are_computed_twice_alike_are_the_same() -> None:
    source = static_cache("hf")
    for n in "cr":
        add = helper.make_node("Add", ["pos", f"step_{n}"], [f"at_{n}"], f"at_{n}")
        source.graph.node.insert(0, add)
        source.graph.initializer.append(const(f"step_{n}", [1]))
        node(source.graph, f"sc{n}").input[1] = f"at_{n}"
    assert convert(source, to="packed-int8", tile_size=TILE).removed_inputs
    source.graph.initializer[-1].CopyFrom(const("step_r", [2]))
    with pytest.raises(ModelError, match="not seen to be the same"):
        convert(source, to="packed-int8", tile_size=TILE)


def by_elements(axis_first: bool = False, spread: bool = True) -> onnx.ModelProto:
    """[B, 1, S, C] written by ScatterElements along S, as `scatter` and `index_copy` export."""
    dims, new = ["b", 1, CAPACITY], ["b", 1, "s"]
    inputs = [vi("at", ["b", 1, "s", 1], TensorProto.INT64)]
    nodes, outputs, infos = [], [], []
    for n, width in (("c", C), ("r", R)):
        inputs += [vi(f"buf_{n}", [*dims, width]), vi(f"new_{n}", [*new, width])]
        if not spread:
            inputs.append(vi(f"wide_{n}", [*new, width], TensorProto.INT64))
        nodes += [
            helper.make_node("Shape", [f"new_{n}"], [f"size_{n}"], f"size_{n}"),
            helper.make_node("Expand", ["at", f"size_{n}"], [f"every_{n}"], f"every_{n}"),
            helper.make_node(
                "ScatterElements",
                [f"buf_{n}", f"every_{n}" if spread else f"wide_{n}", f"new_{n}"],
                [f"out_{n}"], f"sc{n}", axis=2,
            ),
            helper.make_node("Transpose", [f"out_{n}"], [f"k_{n}"], f"t{n}", perm=[0, 2, 1, 3]),
        ]  # fmt: skip
        outputs.append(vi(f"out_{n}", [*dims, width]))
        infos.append(vi(f"k_{n}", ["b", CAPACITY, 1, width]))
    inputs += [
        vi("q", ["b", "s", N1, C]), vi("qr", ["b", "s", N1, R]),
        vi("idx", ["b", "s", 1, K], TensorProto.INT32),
    ]  # fmt: skip
    nodes.append(attention("", "k_c", "k_r", "o"))
    return model(nodes, inputs, [*outputs, vi("o", ["b", "s", N1, C])], [], infos)


def element_feeds(batch: int, tokens: int, start: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    at = start[:, None] + np.arange(tokens)
    feeds = {"at": at.reshape(batch, 1, tokens, 1)}
    for n, width in (("c", C), ("r", R)):
        feeds[f"buf_{n}"] = rng.standard_normal((batch, 1, CAPACITY, width)).astype(np.float32)
        feeds[f"new_{n}"] = rng.standard_normal((batch, 1, tokens, width)).astype(np.float32)
    feeds["q"] = rng.standard_normal((batch, tokens, N1, C)).astype(np.float32)
    feeds["qr"] = rng.standard_normal((batch, tokens, N1, R)).astype(np.float32)
    idx = np.stack([rng.permutation(start[b])[: K - 2] for b in range(batch)])
    idx = np.repeat(idx[:, None, None], tokens, axis=1)
    new = np.repeat(at[:, None, None, :1], tokens, axis=1)  # the rows just written are read, too
    pad = np.full((batch, tokens, 1, 1), -1)
    feeds["idx"] = np.concatenate([new, idx, pad], -1).astype(np.int32)
    return feeds


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_scatter_elements_at_ragged_places(form: str, batch: int, tokens: int) -> None:
    source = by_elements()
    converted = convert(source, to=form, block_size=16, tile_size=TILE)
    interface = read_interface(converted.model)
    assert interface is not None
    assert interface.caches[0].in_place
    assert interface.caches[0].position == "at"
    start = np.array([30, 11, 23])[:batch]
    feeds = element_feeds(batch, tokens, start)
    mine = adapt_feeds(interface, feeds, new_tokens=tokens)
    if form == "paged-int8":
        slots = mine["slot_mapping"].reshape(batch, tokens)
        assert (slots % 16 == (start[:, None] + np.arange(tokens)) % 16).all()
    want, got = run(source, feeds), run(converted.model, mine)
    assert 1e-4 < loss(got["o"], want["o"]) < 2e-2
    got = float_outputs(interface, got, mine, length=CAPACITY)
    assert loss(got["out_c"], want["out_c"]) < 1.5e-2
    assert loss(got["out_r"], want["out_r"]) == 0


def test_where_rows_went_is_read_off_a_run_of_the_float_model() -> None:
    source = by_elements()
    interface = read_interface(
        convert(source, to="paged-int8", block_size=16, tile_size=TILE).model
    )
    assert interface is not None
    feeds = element_feeds(2, 2, np.array([30, 11]))
    known = adapt_feeds(interface, feeds, new_tokens=2)["slot_mapping"]
    blind = replace(interface, caches=tuple(replace(c, position="") for c in interface.caches))
    made = run(source, feeds)
    np.testing.assert_array_equal(converted_feeds(blind, feeds, made)["slot_mapping"], known)
    cache = interface.caches[0]  # one row was written with what it held: the run does not tell all
    made[cache.latent_out][0, 0, 30] = feeds[cache.latent_in][0, 0, 30]
    told = converted_feeds(interface, feeds, made)["slot_mapping"]
    np.testing.assert_array_equal(told, adapt_feeds(interface, feeds)["slot_mapping"])


def test_elements_at_places_of_their_own_are_no_rows() -> None:
    report = convert(by_elements(spread=False), to="packed-int8", tile_size=TILE)
    assert not report.removed_inputs
    assert "do not come from a cache input" in report.notes[0]
    with pytest.raises(ModelError, match="nothing to page"):
        convert(by_elements(spread=False), to="paged-int8", tile_size=TILE)


def test_a_buffer_that_nobody_says_where_to_write_is_an_error() -> None:
    interface = read_interface(convert(static_cache("hf"), to="paged-int8", tile_size=TILE).model)
    assert interface is not None
    feeds = {
        "buf_c": np.zeros((2, 1, 40, C), np.float32),
        "buf_r": np.zeros((2, 1, 40, R), np.float32),
    }
    with pytest.raises(UsageError, match="pass start"):
        adapt_feeds(interface, feeds, new_tokens=1)
    told = adapt_feeds(interface, feeds, new_tokens=1, start=np.array([7, 3]))
    assert (told["slot_mapping"] % 128).tolist() == [7, 3]
    with pytest.raises(UsageError, match="the buffer has 40"):
        adapt_feeds(interface, feeds, new_tokens=2, start=39)


def one_token() -> onnx.ModelProto:
    """Transformers' single-token decode: [B, 1, C] -> Reshape -> [B, 1, 1, C] -> Concat."""
    nodes, inputs, outputs, infos = [], [], [], []
    inits = []
    for n, width in (("c", C), ("r", R)):
        inputs += [vi(f"past_{n}", ["b", 1, "past", width]), vi(f"new_{n}", ["b", 1, width])]
        inits.append(const(f"to_{n}", [-1, 1, 1, width]))
        nodes += [
            helper.make_node("Reshape", [f"new_{n}", f"to_{n}"], [f"row_{n}"], f"rs{n}"),
            helper.make_node("Concat", [f"past_{n}", f"row_{n}"], [f"all_{n}"], f"cc{n}", axis=2),
            helper.make_node("Transpose", [f"all_{n}"], [f"k_{n}"], f"t{n}", perm=[0, 2, 1, 3]),
        ]
        infos += [vi(f"row_{n}", ["b", 1, 1, width]), vi(f"k_{n}", ["b", "total", 1, width])]
        outputs.append(vi(f"all_{n}", ["b", 1, "total", width]))
    inputs += [
        vi("q", ["b", 1, N1, C]), vi("qr", ["b", 1, N1, R]),
        vi("idx", ["b", 1, 1, K], TensorProto.INT32),
    ]  # fmt: skip
    nodes.append(attention("", "k_c", "k_r", "o"))
    return model(nodes, inputs, [*outputs, vi("o", ["b", 1, N1, C])], inits, infos)


def drawn(m: onnx.ModelProto, rng: np.random.Generator, **sizes: int) -> dict[str, np.ndarray]:
    feeds = {}
    for value in m.graph.input:
        dims = [d.dim_value or sizes[d.dim_param] for d in value.type.tensor_type.shape.dim]
        feeds[value.name] = rng.standard_normal(dims).astype(np.float32)
    return feeds


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_one_token_behind_a_reshape_at_any_batch(form: str, batch: int) -> None:
    source, past = one_token(), 40
    converted = convert(source, to=form, block_size=16, tile_size=TILE)
    interface = read_interface(converted.model)
    assert interface is not None
    rng = np.random.default_rng(batch)
    feeds = drawn(source, rng, b=batch, past=past)
    picks = [[past, *rng.permutation(past)[: K - 1]] for _ in range(batch)]
    feeds["idx"] = np.asarray(picks, np.int32).reshape(batch, 1, 1, K)
    mine = adapt_feeds(interface, feeds, new_tokens=1)
    want, got = run(source, feeds), run(converted.model, mine)
    assert 1e-4 < loss(got["o"], want["o"]) < 2e-2
    got = float_outputs(interface, got, mine)
    assert loss(got["all_c"], want["all_c"]) < 1.5e-2
    assert loss(got["all_r"], want["all_r"]) == 0


def test_ragged_sequences_in_pages_are_each_one_as_alone() -> None:
    source = one_token()
    converted = convert(source, to="paged-int8", block_size=16, tile_size=TILE).model
    interface = read_interface(converted)
    assert interface is not None
    lengths = np.array([40, 17, 30])
    rng = np.random.default_rng(0)
    single = []
    for n in lengths:
        feeds = drawn(source, rng, b=1, past=int(n))
        picks = [n, *rng.permutation(n)[: K - 1]]
        feeds["idx"] = np.asarray(picks, np.int32).reshape(1, 1, 1, K)
        single.append(feeds)
    together = {
        name: np.concatenate(
            [
                np.pad(f[name], ((0, 0), (0, 0), (0, lengths.max() - n), (0, 0)))
                if name.startswith("past")
                else f[name]
                for f, n in zip(single, lengths, strict=True)
            ]
        )
        for name in single[0]
    }
    mine = adapt_feeds(interface, together, new_tokens=1, start=lengths)
    assert mine["actual_seq_lengths_kv"].tolist() == (lengths + 1).tolist()
    got = run(converted, mine)["o"]
    for b, feeds in enumerate(single):
        assert 1e-4 < loss(got[b : b + 1], run(source, feeds)["o"]) < 2e-2


@pytest.mark.parametrize(("picked", "reads"), [([0], False), ([3, 1], False), ([-2], True)])
def test_another_layers_tensor_tells_a_size_only_where_it_is_asked_for(picked, reads) -> None:
    """The capacity of pages: a stage of the layer must not want what only its number is read of."""
    source = static_cache("hf")
    graph = source.graph
    graph.input.append(vi("layers.0.other", ["b", "cap", 5]))
    graph.initializer.append(const("picked", picked))
    graph.node.extend([
        helper.make_node("Shape", ["buf_c"], ["dims"], "dims"),
        helper.make_node("Gather", ["dims", "picked"], ["sizes"], "sizes"),
    ])  # fmt: skip
    graph.output.append(vi("sizes", [len(picked)], TensorProto.INT64))
    feeds = feeds_for(source)
    report = convert(source, to="paged", block_size=16)
    assert any("layers.0.other" in n.input for n in report.model.graph.node) is reads
    interface = read_interface(report.model)
    assert interface is not None
    mine = adapt_feeds(interface, feeds)
    np.testing.assert_array_equal(run(report.model, mine)["sizes"], run(source, feeds)["sizes"])
