"""Caches that stay in place: the numbers of a session that carries them, without its copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from sfa_onnx import runtime
from sfa_onnx.errors import ContractError, UsageError
from sfa_onnx.kv_convert import convert
from sfa_onnx.operator import kv_cache
from sfa_onnx.runtime import BoundSession, bind_caches
from tests.test_kv_convert import TILE, B, C, K, R, feeds_for, growing, model, vi

STEPS, BLOCK, BLOCKS = 20, 8, 12  # BLOCKS: pages of both sequences
Feeds = dict[str, NDArray[Any]]


def paged(layers: int = 2) -> onnx.ModelProto:
    """Layers over int8 pages, decoding one token per sequence."""
    source = growing(layers)
    for value in source.graph.input:
        dims = value.type.tensor_type.shape.dim
        for dim in dims:
            if dim.dim_param == "s":
                dim.dim_value = 1
    return convert(source, to="paged-int8", block_size=BLOCK, tile_size=TILE).model


def cache_inputs(m: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [v for v in m.graph.input if v.name.endswith("_packed")]


def start(m: onnx.ModelProto) -> tuple[Feeds, Feeds, NDArray[np.int32]]:
    """Empty pages, a shuffled table, and lengths of two sequences that differ."""
    rng = np.random.default_rng(1)
    caches = {}
    for value in cache_inputs(m):
        width = value.type.tensor_type.shape.dim[-1].dim_value
        nope = rng.standard_normal((BLOCKS, BLOCK, 1, C)).astype(np.float32)
        rope = rng.standard_normal((BLOCKS, BLOCK, 1, R)).astype(np.float32)
        caches[value.name] = kv_cache.pack(nope, rope, tile_size=TILE)
        assert caches[value.name].shape[-1] == width
    table = rng.permutation(BLOCKS).reshape(B, -1).astype(np.int32)
    return caches, {"block_table": table}, np.array([23, 9], np.int32)


def step_feeds(m: onnx.ModelProto, rng: np.random.Generator, lengths: Any, table: Any) -> Feeds:
    """One token per sequence; the second one is padding in every fifth step."""
    feeds = {}
    for value in m.graph.input:
        name, dims = value.name, [d.dim_value for d in value.type.tensor_type.shape.dim]
        if name.endswith(("new_c", "new_r", "q", "qr")):
            dims = [d or B for d in dims]
            feeds[name] = rng.standard_normal(dims).astype(np.float32)
        elif name.endswith("idx"):
            rows = [rng.permutation(int(n) + 1)[:K] for n in lengths]
            feeds[name] = np.asarray(rows, np.int32).reshape(B, 1, 1, K)
    slots = [table[b, n // BLOCK] * BLOCK + n % BLOCK for b, n in enumerate(lengths)]
    feeds["slot_mapping"] = np.asarray(slots, np.int32)
    feeds["actual_seq_lengths_kv"] = np.asarray(lengths + 1, np.int32)
    feeds["block_table"] = table
    return feeds


@pytest.mark.parametrize("how", ["session", "file", "model"])
def test_twenty_ragged_steps_equal_those_that_carry_the_caches(tmp_path: Path, how: str) -> None:
    m = paged()
    caches, rest, lengths = start(m)
    onnx.save(m, tmp_path / "m.onnx")
    session = runtime.session(tmp_path / "m.onnx")
    mine = {name: array.copy() for name, array in caches.items()}
    bound = bind_caches({"session": session, "file": tmp_path / "m.onnx", "model": m}[how], mine)
    where = {name: array.ctypes.data for name, array in mine.items()}
    rng = np.random.default_rng(2)
    for step in range(STEPS):
        feeds = step_feeds(m, rng, lengths, rest["block_table"])
        if step % 5 == 4:
            feeds["slot_mapping"][1] = -1
        want = runtime.run(session, {**feeds, **caches})
        caches = {n: want.pop(n.replace("past_c", "c")) for n in caches}
        got = bound.run(feeds)
        assert got.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value)
        for name, array in caches.items():
            np.testing.assert_array_equal(bound.caches[name], array)
            assert bound.caches[name] is mine[name], "no other array may take its place"
            assert mine[name].ctypes.data == where[name]
        lengths += np.array([1, step % 5 != 4], np.int32)


def peak() -> int:
    """The most memory this process held since the last call, in bytes."""
    text = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(text.split("VmHWM:")[1].split()[0])


def test_a_step_copies_no_cache() -> None:
    """A buffer that nobody has touched yet takes no memory; a copy of it would."""
    m = paged(1)
    caches, rest, lengths = start(m)
    ((name, small),) = caches.items()
    pages = np.zeros((40_000, *small.shape[1:]), np.int8)
    assert pages.nbytes > 2**25
    bound = bind_caches(m, {name: pages})
    feeds = step_feeds(m, np.random.default_rng(0), lengths, rest["block_table"])
    bound.run(feeds)
    peak()
    before = peak()
    bound.run(feeds)
    assert peak() - before < pages.nbytes / 4
    runtime.run(bound.session, {**feeds, name: pages})
    assert peak() - before > pages.nbytes / 2, "this is how a copy would show"


def test_a_step_writes_the_new_rows_only() -> None:
    m = paged(1)
    caches, rest, lengths = start(m)
    bound = bind_caches(m, caches)
    (pages,) = bound.caches.values()
    feeds = step_feeds(m, np.random.default_rng(0), lengths, rest["block_table"])
    before = pages.copy()
    bound.run(feeds)
    changed = np.flatnonzero((pages != before).any(-1).ravel())
    assert sorted(changed) == sorted(feeds["slot_mapping"])


def test_a_cache_that_is_asked_for_is_its_buffer() -> None:
    m = paged(1)
    caches, rest, lengths = start(m)
    bound = bind_caches(m, caches)
    feeds = step_feeds(m, np.random.default_rng(0), lengths, rest["block_table"])
    got = bound.run(feeds, ["l0.c_packed", "l0.o"])
    assert list(got) == ["l0.c_packed", "l0.o"]
    assert got["l0.c_packed"] is bound.caches["l0.past_c_packed"]


def buffers(op_type: str, elem: int) -> onnx.ModelProto:
    """Two float buffers of fixed length, written by a scatter and read afterwards."""
    indices = [2, 1] if op_type == "ScatterND" else [2, 4]
    nodes = [
        helper.make_node(op_type, ["k", "at", "new"], ["k_out"], "write_k"),
        helper.make_node(op_type, ["v", "at", "new"], ["v_out"], "write_v"),
        helper.make_node("Cast", ["k_out"], ["k32"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["v_out"], ["v32"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["k32", "v32"], ["seen"]),
    ]
    inputs = [vi("k", ["n", 4], elem), vi("v", ["n", 4], elem), vi("new", [2, 4], elem)]
    inputs.append(vi("at", indices, TensorProto.INT64))
    outputs = [vi("k_out", ["n", 4], elem), vi("v_out", ["n", 4], elem), vi("seen", ["n", 4])]
    return model(nodes, inputs, outputs, [], [])


@pytest.mark.parametrize("op_type", ["ScatterND", "ScatterElements"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_float_buffers_written_by_scatters(op_type: str, dtype: Any) -> None:
    m = buffers(op_type, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    session = runtime.session(m)
    rng = np.random.default_rng(0)
    state = {n: rng.standard_normal((6, 4)).astype(dtype) for n in "kv"}
    bound = bind_caches(session, {n: a.copy() for n, a in state.items()})
    for _ in range(STEPS):
        at = rng.permutation(6)[:2, None]
        at = at if op_type == "ScatterND" else np.repeat(at, 4, 1)
        feeds = {"new": rng.standard_normal((2, 4)).astype(dtype), "at": at.astype(np.int64)}
        want = runtime.run(session, {**feeds, **state})
        np.testing.assert_array_equal(bound.run(feeds)["seen"], want["seen"])
        state = {"k": want["k_out"], "v": want["v_out"]}
        for name, array in state.items():
            np.testing.assert_array_equal(bound.caches[name], array)


def float_pages() -> onnx.ModelProto:
    nodes = [helper.make_node("KvCacheWrite", ["p", "rows", "slots"], ["q"], domain="sfa_onnx")]
    kind = TensorProto.BFLOAT16
    inputs = [vi("p", [3, 4, 1, 5], kind), vi("rows", ["n", 1, 5], kind)]
    inputs.append(vi("slots", ["n"], TensorProto.INT32))
    m = model(nodes, inputs, [vi("q", [3, 4, 1, 5], kind)], [], [])
    m.opset_import.append(helper.make_opsetid("sfa_onnx", 1))
    return m


def test_bfloat16_pages_and_a_refused_write() -> None:
    pages = np.zeros((3, 4, 1, 5), ml_dtypes.bfloat16)
    bound = bind_caches(float_pages(), {"p": pages})
    rows = np.ones((2, 1, 5), ml_dtypes.bfloat16)
    assert bound.run({"rows": rows, "slots": np.array([3, 11], np.int32)}) == {}
    assert np.flatnonzero(pages.reshape(12, 5)[:, 0]).tolist() == [3, 11]
    with pytest.raises(ContractError, match=r"slot_mapping\[1\] is 12"):
        bound.run({"rows": rows, "slots": np.array([0, 12], np.int32)})
    assert np.flatnonzero(pages.reshape(12, 5)[:, 0]).tolist() == [3, 11]


ARRAY = np.zeros((6, 4), np.float32)
BAD: list[tuple[Feeds, str]] = [
    ({}, r"no cache was given; this model's caches are \['k', 'v'\]"),
    ({"new": ARRAY}, "'new' cannot stay in place: no output is this input"),
    ({"x": ARRAY}, "the model has no input 'x'"),
    ({"k": ARRAY.astype(np.float64)}, r"'k': expected tensor\(float\), got float64"),
    ({"k": np.zeros((6, 5), np.float32)}, r"'k': expected \['n', 4\], got \[6, 5\]"),
    ({"k": np.zeros(6, np.float32)}, r"'k': expected \['n', 4\], got \[6\]"),
    ({"k": np.zeros((4, 6), np.float32).T}, "expected a writeable array in C order"),
    ({"k": np.broadcast_to(np.float32(0), (6, 4))}, "expected a writeable array in C order"),
    ({"k": [[0.0] * 4]}, "expected a NumPy array, got list"),  # type: ignore[dict-item]
    ({"k": ARRAY, "v": ARRAY}, "'k' and 'v' share memory"),
]


@pytest.mark.parametrize(("caches", "message"), BAD)
def test_what_cannot_be_bound_is_refused(caches: Feeds, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bind_caches(buffers("ScatterND", TensorProto.FLOAT), caches)


def test_a_growing_cache_is_told_why() -> None:
    past = np.zeros((B, 1, 5, C), np.float32)
    with pytest.raises(UsageError, match=r"l0.cc \(Concat\) makes a longer tensor .* kv-cache"):
        bind_caches(growing(), {"l0.past_c": past})
    assert "l0.past_c" in feeds_for(growing())


def change(m: onnx.ModelProto, *nodes: onnx.NodeProto, out: str = "") -> onnx.ModelProto:
    m.graph.node.extend(nodes)
    if out:
        m.graph.output.append(vi(out, ["n", 4]))
    return m


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("Neg", ["k"], ["old"], "late"), r"late \(Neg\) reads it too"),
        (helper.make_node("Identity", ["k"], ["old"], "late"), "output old reads it too"),
    ],
)
def test_a_reader_of_the_old_rows_is_not_shown_the_new_ones(node: Any, message: str) -> None:
    m = change(buffers("ScatterND", TensorProto.FLOAT), node, out="old")
    with pytest.raises(UsageError, match=message):
        bind_caches(m, {"k": ARRAY.copy()})
    assert isinstance(bind_caches(m, {"v": ARRAY.copy()}), BoundSession)


def test_a_row_that_the_write_itself_waits_for_is_read_before_it() -> None:
    """The row at `from` is moved to `at`: read, then written."""
    m = buffers("ScatterND", TensorProto.FLOAT)
    m.graph.node[0].input[2] = "moved"
    m.graph.node.insert(0, helper.make_node("Gather", ["k", "from"], ["moved"]))
    m.graph.input.append(vi("from", [2], TensorProto.INT64))
    k = np.arange(24, dtype=np.float32).reshape(6, 4)
    want = k.copy()
    want[[1, 0]] = want[[0, 1]]
    swap = {"from": np.array([0, 1]), "at": np.array([[1], [0]])}
    bound = bind_caches(m, {"k": k})
    bound.run({**swap, "new": ARRAY[:2], "v": ARRAY})
    np.testing.assert_array_equal(k, want)


def test_feeds_are_checked_as_ever() -> None:
    m = buffers("ScatterND", TensorProto.FLOAT)
    bound = bind_caches(m, {"k": ARRAY.copy(), "v": ARRAY.copy()})
    feeds = {"new": ARRAY[:2], "at": np.array([[0], [1]])}
    with pytest.raises(UsageError, match="'k' is a bound cache"):
        bound.run({**feeds, "k": ARRAY})
    with pytest.raises(UsageError, match="'new' lies in the buffer of 'k'"):
        bound.run({**feeds, "new": bound.caches["k"][:2]})
    with pytest.raises(UsageError, match=r"\['at'\] are missing"):
        bound.run({"new": ARRAY[:2]})
    with pytest.raises(UsageError, match=r"no output \['z'\]"):
        bound.run(feeds, ["z"])


def test_a_session_of_plain_onnxruntime_is_taken(tmp_path: Path) -> None:
    m = buffers("ScatterND", TensorProto.FLOAT)
    onnx.save(m, tmp_path / "m.onnx")
    plain = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert bind_caches(plain, {"k": ARRAY.copy()}).outputs == {"k_out": "k"}
    (tmp_path / "m.onnx").unlink()
    assert bind_caches(plain, {"k": ARRAY.copy()}, graph=m).outputs == {"k_out": "k"}
