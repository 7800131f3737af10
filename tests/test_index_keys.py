"""Index keys in pages: the table, lengths and slots of their attention's cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import sfa_onnx
from sfa_onnx import demo, runtime
from sfa_onnx.cli import main
from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.kv_convert import convert
from sfa_onnx.kv_convert.emit import Emitter
from sfa_onnx.kv_convert.index_keys import quantised
from sfa_onnx.kv_convert.interface import adapt_feeds, float_outputs, read_interface
from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.reference_indexer import quant_lightning_indexer
from sfa_onnx.runtime.compare import compare
from sfa_onnx.runtime.portable.model import unfuse
from tests.index_models import DI, HI, Array, feeds_for, indexed
from tests.test_kv_convert import TILE, K, joint, loss, vi

BLOCK = 8
CACHES = ("c", "r", "k")


def paged(
    m: onnx.ModelProto, index_cache: str | None = None, to: str = "paged-int8"
) -> onnx.ModelProto:
    kind: dict[str, Any] = {"index_cache": index_cache} if index_cache else {}
    return convert(m, to=to, block_size=BLOCK, tile_size=TILE, **kind).model


def kinds(m: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in m.graph.node]


def cut(feeds: dict[str, Array], b: int, past: int) -> dict[str, Array]:
    """One sequence by itself, with `past` cached tokens."""
    own = {n: a[b : b + 1] for n, a in feeds.items()}
    return {n: a[:, :past] if ".past_" in n else a for n, a in own.items()}


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("to", ["paged-int8", "paged"])
def test_ragged_sequences_select_what_each_selects_alone(
    batch: int, tokens: int, lengths: bool, to: str
) -> None:
    source = indexed(2, tokens=tokens, lengths=lengths)
    converted = paged(source, to=to)
    interface = read_interface(converted)
    assert interface is not None
    past = np.array([21, 9, 14])[:batch]
    feeds = feeds_for(source, batch, int(past.max()), tokens)
    if lengths:
        feeds["seen"] = past + tokens - np.array([6, 0, 2])[:batch].astype(np.int32)
        feeds["seen"] = feeds["seen"].astype(np.int32)
    mine = adapt_feeds(interface, feeds, new_tokens=tokens, start=past)
    got = runtime.run(runtime.session(converted), mine)
    session = runtime.session(source)
    for b in range(batch):
        want = runtime.run(session, cut(feeds, b, int(past[b])))
        for i in range(2):
            np.testing.assert_array_equal(got[f"l{i}.idx"][b], want[f"l{i}.idx"][0])
            off = loss(got[f"l{i}.o"][b], want[f"l{i}.o"][0])
            assert off < 2e-2 if to == "paged-int8" else off == 0
    back = float_outputs(interface, got, mine)
    keys = np.concatenate([feeds["l1.past_k"][1, : past[1]], feeds["l1.new_k"][1]])
    np.testing.assert_array_equal(back["l1.k"][1, : len(keys)], keys)


@pytest.mark.parametrize("index_cache", ["float", "int8"])
def test_rows_that_are_sequences_of_their_own(index_cache: str) -> None:
    """Masks by position: each row sees the keys up to its own, of its own batch entry."""
    source = indexed(2, tokens=3, by_row=True)
    converted = paged(source, index_cache)
    interface = read_interface(converted)
    assert interface is not None
    past = np.array([21, 9, 14])
    feeds = feeds_for(source, 3, 21, 3)
    feeds["pos"] = past[:, None] + np.arange(3)
    mine = adapt_feeds(interface, feeds, new_tokens=3, start=past)
    got = runtime.run(converted, mine)
    shared = []
    for b in range(3):
        want = runtime.run(source, cut(feeds, b, int(past[b])))
        for i in range(2):
            pair = got[f"l{i}.idx"][b], want[f"l{i}.idx"][0]
            shared.append(np.mean([np.isin(*rows).mean() for rows in zip(*pair, strict=True)]))
            if index_cache == "float":
                np.testing.assert_array_equal(*pair)
                assert loss(got[f"l{i}.o"][b], want[f"l{i}.o"][0]) < 2e-2
    assert min(shared) > 0.8


def test_a_table_of_pages_that_is_not_one_column_stays() -> None:
    source = indexed(1, tokens=3, by_row=True)
    node = next(n for n in source.graph.node if n.op_type == "NPULightningIndexer")
    node.input[5] = "other"
    source.graph.input.append(vi("other", ["n", 2], TensorProto.INT32))
    with pytest.raises(ModelError, match="layouts BSND / PA_BSND, expected BSND"):
        paged(source, "float")


def test_pages_have_the_models_type_and_one_write_each() -> None:
    source = indexed(2, elem=TensorProto.FLOAT16)
    report = convert(source, to="paged-int8", block_size=BLOCK, tile_size=TILE)
    inputs = {v.name: v.type.tensor_type for v in report.model.graph.input}
    assert inputs["l0.past_k_pages"].elem_type == TensorProto.FLOAT16
    assert [d.dim_value for d in inputs["l0.past_k_pages"].shape.dim] == [0, BLOCK, 1, DI]
    assert kinds(report.model).count("KvCacheWrite") == 4
    assert "Identity" not in kinds(report.model), "a copy behind a write costs its place"
    assert "Concat" not in [n.op_type for n in report.model.graph.node if "cat_" in n.name]
    node = next(n for n in report.model.graph.node if n.op_type == "NPULightningIndexer")
    assert node.input[4:6] == ["actual_seq_lengths_kv", "block_table"]
    assert "l0.past_k" in report.removed_inputs
    assert not report.notes
    onnx.checker.check_model(report.model, full_check=True)


def test_steps_in_place_equal_steps_that_carry_the_caches() -> None:
    source = indexed(1)
    converted = paged(source)
    interface = read_interface(converted)
    assert interface is not None
    lengths = np.array([17, 5], np.int32)
    rng = np.random.default_rng(3)
    history = feeds_for(source, 2, 40)
    room = adapt_feeds(interface, history, new_tokens=0)
    table = room["block_table"]
    pages = {n: room[n] for n in ("l0.past_c_packed", "l0.past_k_pages")}
    bound = runtime.bind_caches(converted, pages)
    session = runtime.session(source)
    seen = {n: [history[f"l0.past_{n}"][b, : lengths[b]] for b in range(2)] for n in CACHES}
    for _ in range(20):
        new = feeds_for(source, 2, 1, seed=int(rng.integers(1000)))
        fed = {n: a for n, a in new.items() if ".past_" not in n}
        slots = [table[b, n // BLOCK] * BLOCK + n % BLOCK for b, n in enumerate(lengths)]
        got = bound.run(
            fed | {
                "block_table": table, "actual_seq_lengths_kv": lengths + 1,
                "slot_mapping": np.asarray(slots, np.int32),
            }
        )  # fmt: skip
        for b in range(2):
            own = {f"l0.past_{n}": rows[b][None] for n, rows in seen.items()}
            want = runtime.run(session, {n: a[b : b + 1] for n, a in fed.items()} | own)
            np.testing.assert_array_equal(got["l0.idx"][b], want["l0.idx"][0])
            for n, rows in seen.items():
                rows[b] = want[f"l0.{n}"][0]
        lengths += 1


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("elem", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_int8_keys_are_what_the_reference_selects(tokens: int, elem: int) -> None:
    source = indexed(1, tokens=tokens, elem=elem)
    converted = paged(source, "int8")
    interface = read_interface(converted)
    assert interface is not None
    past = np.array([21, 9])
    feeds = feeds_for(source, 2, 21, tokens)
    mine = adapt_feeds(interface, feeds, new_tokens=tokens, start=past)
    assert mine["l0.past_k_pages"].dtype == np.int8
    assert mine["l0.past_k_scales"].shape == (*mine["l0.past_k_pages"].shape[:3], 1)
    got = runtime.run(runtime.session(converted), mine)
    query, scale = kv_cache.quantise_keys(feeds["l0.iq"])
    want = quant_lightning_indexer(
        query, got["l0.k_pages"], feeds["l0.iw"].astype(np.float16), scale[..., 0],
        got["l0.k_scales"][..., 0], None, mine["actual_seq_lengths_kv"], mine["block_table"],
        layout_key="PA_BSND", sparse_count=K, sparse_mode=0 if tokens == 1 else 3,
    )  # fmt: skip
    np.testing.assert_array_equal(got["l0.idx"], want)
    rows, scales = kv_cache.quantise_keys(feeds["l0.new_k"][:, :, None])
    flat = [got[n].reshape(-1, w)[mine["slot_mapping"]] for n, w in
            (("l0.k_pages", DI), ("l0.k_scales", 1))]  # fmt: skip
    np.testing.assert_array_equal(flat[0], rows.reshape(-1, DI))
    np.testing.assert_array_equal(flat[1], scales.reshape(-1, 1))
    back = float_outputs(interface, got, mine)["l0.k"]
    assert loss(back[0, :21], feeds["l0.past_k"][0].astype(np.float32)) < 1e-2
    float_run = runtime.run(
        runtime.session(paged(source)),
        adapt_feeds(read_interface(paged(source)), feeds, new_tokens=tokens, start=past),
    )  # type: ignore[arg-type]
    shared = [
        np.isin(a, b).mean()
        for a, b in zip(
            got["l0.idx"].reshape(-1, K), float_run["l0.idx"].reshape(-1, K), strict=True
        )
    ]
    assert min(shared) > 0.7, "int8 flips a few keys near the threshold, no more"


@pytest.mark.parametrize("opset", [13, 18])
def test_quantising_in_the_graph_is_that_of_numpy_to_the_bit(opset: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 5, 1, 48)).astype(np.float32)
    x *= 10.0 ** rng.integers(-7, 5, (64, 5, 1, 1))
    x[0, 0], x[1, 1] = 0, np.round(x[1, 1])
    x[2, 2, 0, :2] = [1e30, -1e30]
    emit = Emitter(set(), opset)
    made = quantised(emit, "x")
    graph = helper.make_graph(
        emit.nodes, "g", [vi("x", list(x.shape))],
        [vi(made[0], list(x.shape), TensorProto.INT8), vi(made[1], [], TensorProto.FLOAT16)],
        emit.initializers,
    )  # fmt: skip
    del graph.output[1].type.tensor_type.shape.dim[:]
    graph.output[1].type.tensor_type.ClearField("shape")
    m = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    got = runtime.run(m, {"x": x})
    for name, want in zip(made, kv_cache.quantise_keys(x), strict=True):
        np.testing.assert_array_equal(got[name], want)


def other_reader(m: onnx.ModelProto) -> onnx.ModelProto:
    m.graph.node.append(helper.make_node("Neg", ["l0.past_k"], ["neg"], "second"))
    m.graph.output.append(vi("neg", ["b", "past", DI]))
    return m


def computed(m: onnx.ModelProto) -> onnx.ModelProto:
    node = next(n for n in m.graph.node if n.op_type == "NPULightningIndexer")
    m.graph.node.insert(len(m.graph.node) - 2, helper.make_node("Neg", ["l0.key_k"], ["other"]))
    node.input[1] = "other"
    m.graph.value_info.append(vi("other", ["b", "total", 1, DI]))
    return m


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_reader, r"second \(Neg\) also reads the float cache l0\.past_k"),
        (computed, "l0.indexer: its keys do not come from a cache"),
    ],
)
def test_keys_that_cannot_be_paged_stay_and_the_report_says_why(change: Any, message: str) -> None:
    source = change(indexed(1))
    report = convert(source, to="paged-int8", block_size=BLOCK, tile_size=TILE)
    assert "l0.past_c_packed" in report.added_inputs
    assert "l0.past_k" not in report.removed_inputs
    with pytest.raises(ModelError, match=message):
        convert(source, to="paged-int8", index_cache="float", tile_size=TILE)
    assert re.search(message, report.notes[-1])
    interface = read_interface(report.model)
    assert interface is not None
    feeds = feeds_for(source, 2, 21)
    got = runtime.run(report.model, adapt_feeds(interface, feeds, new_tokens=1))
    want = runtime.run(source, feeds)
    np.testing.assert_array_equal(got["l0.idx"], want["l0.idx"])


def test_scores_that_are_read_forbid_int8() -> None:
    source = indexed(1, values=True)
    with pytest.raises(ModelError, match="the quantised indexer gives no scores"):
        convert(source, to="paged-int8", index_cache="int8", tile_size=TILE)
    converted = paged(source)
    interface = read_interface(converted)
    assert interface is not None
    feeds = feeds_for(source, 2, 21)
    got, want = (
        runtime.run(m, f)["l0.scores"]
        for m, f in ((converted, adapt_feeds(interface, feeds, new_tokens=1)), (source, feeds))
    )
    np.testing.assert_array_equal(got, want)


def test_the_option_goes_with_pages_alone() -> None:
    with pytest.raises(UsageError, match="index_cache goes with paged forms"):
        convert(indexed(1), to="packed-int8", index_cache="int8")
    with pytest.raises(UsageError, match="expected one of float, int8"):
        convert(indexed(1), to="paged-int8", index_cache="fp8")
    kept = convert(indexed(1), to="packed-int8", tile_size=TILE).model
    assert "l0.past_k" in [v.name for v in kept.graph.input]
    assert HI == 4


def test_lengths_that_the_model_gives_its_attention_stay_a_bound() -> None:
    """They were dropped for the interface's: a fixed buffer then showed rows never written."""
    source = indexed(1, lengths=True)
    site = next(n for n in source.graph.node if n.op_type == "NPUSparseFlashAttention")
    site.input[6] = "seen"
    feeds = feeds_for(source, 2, 21)
    feeds["seen"] = np.array([5, 22], np.int32)
    converted = paged(source)
    interface = read_interface(converted)
    assert interface is not None
    got = runtime.run(converted, adapt_feeds(interface, feeds, new_tokens=1))
    want = runtime.run(source, feeds)
    assert loss(got["l0.o"], want["l0.o"]) < 2e-2


@pytest.mark.parametrize("elem", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_float_pages_round_nothing(tmp_path: Path, elem: int) -> None:
    source = indexed(2, elem=elem)
    report = convert(source, tmp_path / "b.onnx", to="paged", block_size=BLOCK)
    assert report.bytes_per_token_before == report.bytes_per_token_after
    assert {"l0.past_c_pages", "l0.past_r_pages", "l0.past_k_pages"} < set(report.added_inputs)
    assert kinds(report.model).count("KvCacheWrite") == 6
    assert "Identity" not in kinds(report.model)
    onnx.checker.check_model(report.model, full_check=True)
    onnx.save(source, tmp_path / "a.onnx")
    compared = compare(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert compared.passed, compared.verdict
    assert {row.method for row in compared.sites} == {"captured"}
    assert len(compared.outputs) == 10
    assert all(row.judged for row in compared.outputs)
    interface = read_interface(report.model)
    assert interface is not None
    feeds = feeds_for(source, 2, 21)
    mine = adapt_feeds(interface, feeds, new_tokens=1)
    want = runtime.run(source, feeds)
    pages = {n: a for n, a in mine.items() if n.endswith("_pages")}
    rest = {n: a for n, a in mine.items() if n not in pages}
    bound = runtime.bind_caches(report.model, pages)
    for made in (runtime.run(report.model, mine), runtime.run(unfuse(report.model), mine)):
        for name in ("l0.o", "l1.o", "l1.idx"):
            exact = elem == TensorProto.FLOAT16 or "idx" in name
            np.testing.assert_allclose(made[name], want[name], rtol=0, atol=2e-3 if exact else 1e-5)
    got = bound.run(rest)
    np.testing.assert_array_equal(got["l1.o"], want["l1.o"])


def test_float_pages_of_a_joint_cache_are_refused() -> None:
    source = joint()
    with pytest.raises(ModelError, match=r"holds more than .* side by side"):
        convert(source, to="paged")


@pytest.mark.parametrize("index_cache", ["float", "int8"])
def test_compare_judges_selection_and_attention_apart(tmp_path: Path, index_cache: str) -> None:
    source = indexed(2)
    onnx.save(source, tmp_path / "a.onnx")
    onnx.save(paged(source, index_cache), tmp_path / "b.onnx")
    report = compare(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert report.passed, report.verdict
    methods = {row.name: row.method for row in report.sites}
    judge = "captured" if index_cache == "float" else "reference"
    judged = {"indexer": judge, "attn": "rounded"}
    assert methods == {f"l{n}.{part}": how for n in (0, 1) for part, how in judged.items()}
    assert not any("float16" in note for note in report.notes), "scales are no precision"


def test_compare_sees_an_indexer_that_selects_otherwise(tmp_path: Path) -> None:
    source = indexed(1)
    onnx.save(source, tmp_path / "a.onnx")
    for index_cache in ("float", "int8"):
        wrong = paged(source, index_cache)
        node = next(n for n in wrong.graph.node if "LightningIndexer" in n.op_type)
        weights = node.input[2]
        wrong.graph.node.insert(
            list(wrong.graph.node).index(node), helper.make_node("Neg", [weights], ["negative"])
        )
        node.input[2] = "negative"
        onnx.save(wrong, tmp_path / "b.onnx")
        report = compare(tmp_path / "a.onnx", tmp_path / "b.onnx")
        (row,) = (row for row in report.sites if row.name == "l0.indexer")
        assert not row.passed
        assert index_cache == "float" or "more than int8 can explain" in row.reason


@pytest.mark.kernel
def test_compare_of_int8_keys_with_the_model_as_exported(tmp_path: Path) -> None:
    """The original selects by a TopK: what its rows flip to is told, the operators are judged."""
    model = demo.materialise(tmp_path)
    sfa_onnx.fuse(model, tmp_path / "f.onnx", verify=False)
    report = convert(tmp_path / "f.onnx", tmp_path / "p.onnx", to="paged-int8", index_cache="int8")
    assert report.bytes_per_token_after == 656 + 64 + 2
    compared = compare(model, tmp_path / "p.onnx")
    assert compared.passed, compared.verdict
    assert {row.method for row in compared.sites} == {"reference"}


def test_the_command_pages_keys_and_says_what_it_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(indexed(2), tmp_path / "a.onnx")
    call = ["kv-cache", str(tmp_path / "a.onnx"), "-o", str(tmp_path / "b.onnx")]
    assert main([*call, "--to", "paged", "--index-cache", "int8", "--block-size", "16"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 x NPUQuantLightningIndexer, 2 x NPUSparseFlashAttention, form paged" in told
    assert main([*call, "--to", "packed-int8", "--index-cache", "int8", "--force"]) == 2
