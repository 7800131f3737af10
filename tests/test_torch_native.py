"""Calls of known forms in C: never taken for another form, no memory kept, no lock held."""

from __future__ import annotations

import gc
import random
import resource
import sys
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx.errors import ContractError  # noqa: E402
from sfa_onnx.operator import kv_cache  # noqa: E402
from sfa_onnx.operator.op import (  # noqa: E402
    KV_CACHE_PACK,
    LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
)
from sfa_onnx.torch import native  # noqa: E402
from sfa_onnx.torch.checks import HOLES_VARIABLE  # noqa: E402
from sfa_onnx.torch.ops import OPERATORS  # noqa: E402
from sfa_onnx.torch.tensors import as_torch  # noqa: E402
from sfa_onnx.torch.vendor import Adapter  # noqa: E402
from tests.attention_cases import BF16, LAYOUTS, make_case  # noqa: E402
from tests.indexer_cases import indexer_call  # noqa: E402

pytestmark = pytest.mark.torch
IN_C = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
SCHEMAS = {
    op.name: getattr(torch.ops.sfa_onnx, name).default._schema for name, op in OPERATORS.items()
}
SCHEMAS[SPARSE_FLASH_ATTENTION.name + " with softmax"] = (
    torch.ops.sfa_onnx.npu_sparse_flash_attention.lse._schema
)


class Counting(Adapter):
    """Counts the calls that Python has to do."""

    runs = 0

    def run(self, *args, **kwargs):
        self.runs += 1
        return super().run(*args, **kwargs)


def attention(op, changes):
    case = make_case(op, **changes)
    return {n: as_torch(a) for n, a in case.inputs.items()} | case.attributes


def selection(op, changes):
    known = {n: changes[n] for n in ("heads", "seed", "sparse_mode", "lengths")}
    dtype = changes["dtype"] if op is LIGHTNING_INDEXER else np.int8
    inputs, attributes = indexer_call(op, changes["layouts"], dtype, **known)
    attributes["sparse_count"] = changes["count"]
    return {n: as_torch(a) for n, a in inputs.items()} | attributes


def packing(_op, changes):
    """Rows with a rope or none, of numbers or of integers with their scales."""
    r = torch.Generator().manual_seed(changes["seed"])
    lead = (changes["batch"], changes["s2"], 1)[: 1 + changes["heads"] % 3]
    kinds = {np.float32: torch.float32, np.float16: torch.float16, BF16: torch.bfloat16}
    kind, nope = kinds[changes["dtype"]], changes["nope"]
    given = {"nope": torch.randn(*lead, nope, generator=r).to(kind), "tile_size": 16}
    if changes["rope"]:
        given["rope"] = torch.randn(*lead, changes["rope"], generator=r).to(kind)
    if changes["sinks"]:
        given["nope"] = torch.randint(-127, 128, (*lead, nope), generator=r, dtype=torch.int8)
        given["scale"] = torch.rand(*lead, nope // 16, generator=r)
    return given


def split(schema, given):
    """As torch calls a Python kernel: what has no default by position, the rest by name."""
    given = {n: v for n, v in given.items() if n in {a.name for a in schema.arguments}}
    first = [a.name for a in schema.arguments if not a.kwarg_only]
    return tuple(given.pop(n) for n in first), given


def parts(result):
    return result if isinstance(result, tuple) else (result,)


def same(left, right):
    pairs = list(zip(parts(left), parts(right), strict=True))
    return isinstance(left, tuple) == isinstance(right, tuple) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs
    )


# Of each property one value is chosen anew at a time.
CHOICES = {
    "layouts": LAYOUTS,
    "dtype": (np.float32, np.float16, BF16),
    "batch": (1, 2, 3),
    "s1": (1, 3),
    "heads": (1, 4, 5),
    "s2": (17, 40),
    "count": (5, 12),
    "sparse_mode": (0, 3),
    "block_size": (8, 16),
    "nope": (32, 48),
    "rope": (0, 8),
    "lengths": (True, False),
    "sinks": (True, False),
    "lse": (True, False),
    "seed": (0, 1, 2),
}
OWN = {"rounding": ("exact", "npu"), "scale_value": (0.25, 1.0, -0.5), "threads": (1, 2)}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_known_form_is_never_taken_for_another(name):
    r, schema = random.Random(name), SCHEMAS[name]
    op = next(o for o in OPERATORS.values() if o.name == name.split(" ")[0])
    make = selection if "Indexer" in op.name else attention
    make = packing if op is KV_CACHE_PACK else make
    adapter = Counting(op, schema)
    made = native.kernel(adapter, None)
    state = {n: r.choice(v) for n, v in (CHOICES | OWN).items()}
    threads = torch.get_num_threads()
    try:
        for _ in range(60):
            changed = r.choice(list(state))
            state[changed] = r.choice((CHOICES | OWN)[changed])
            changes = {n: state[n] for n in CHOICES}
            if op is SPARSE_FLASH_ATTENTION_ANTIQUANT:
                changes["lse"] = False
            given = make(op, changes)
            if "softmax" not in name:
                given.pop("return_softmax_lse", None)
            if "scale_value" in given:
                given["scale_value"] = state["scale_value"]
            if "rounding" in {a.name for a in schema.arguments}:
                given["rounding"] = state["rounding"]
            torch.set_num_threads(state["threads"])
            args, kwargs = split(schema, given)
            want = Adapter(op, schema).run(args, kwargs, given.get("rounding", "exact"))
            assert same(made(*args, **kwargs), want)
            before = adapter.runs
            assert same(made(*args, **kwargs), want)
            assert adapter.runs == before + (not IN_C)
    finally:
        torch.set_num_threads(threads)


def plain(**changes):
    """A small call of the document's operator: packet, positional arguments, the rest."""
    given = attention(SPARSE_FLASH_ATTENTION_ANTIQUANT, changes)
    packet = torch.ops.sfa_onnx.npu_sparse_flash_attention_antiquant
    args, kwargs = split(packet.default._schema, given)
    return packet, list(args), kwargs


def test_tensors_that_change_in_place_are_looked_at_again():
    packet, args, kwargs = plain(layouts=("BSND", "BSND"), lengths=False)
    want = packet(*args, **kwargs)
    query = args[0] = args[0].clone()
    assert torch.equal(packet(*args, **kwargs), want)
    query.requires_grad_()
    with pytest.raises(ContractError, match="query: expected requires_grad=False"):
        packet(*args, **kwargs)
    with torch.no_grad():
        assert torch.equal(packet(*args, **kwargs), want)
    query.requires_grad_(False)
    with torch.inference_mode():
        assert packet(*args, **kwargs).is_inference()
    query.set_(query.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ContractError, match=r"query: expected a contiguous tensor, got shape \[3"):
        packet(*args, **kwargs)
    query.set_(query[:2].contiguous())
    with pytest.raises(ContractError, match="key batch: expected the query's 2, got 3"):
        packet(*args, **kwargs)
    args[1:4] = (t[:2].contiguous() for t in args[1:4])
    assert torch.equal(packet(*args, **kwargs), want[:2])
    args[0] = torch.nn.Parameter(query, requires_grad=False)
    assert torch.equal(packet(*args, **kwargs), want[:2])
    args[0] = query.double()
    with pytest.raises(ContractError, match="query: expected float32, float16 or bfloat16"):
        packet(*args, **kwargs)


def test_wrong_values_of_a_known_form_are_refused_in_words():
    packet, args, kwargs = plain()
    want = packet(*args, **kwargs)
    lengths = kwargs["actual_seq_lengths_kv"]
    for wrong, words in ((-1, r"\[0\] is -1, allowed"), (4000, r"\[0\] needs 250 pages")):
        kept, lengths[0] = int(lengths[0]), wrong
        with pytest.raises(ContractError, match=f"actual_seq_lengths_kv{words}"):
            packet(*args, **kwargs)
        lengths[0] = kept
        assert torch.equal(packet(*args, **kwargs), want)


def test_the_variable_for_holes_counts_for_each_call(monkeypatch):
    packet, args, kwargs = plain(layouts=("BSND", "BSND"), lengths=False)
    args[3] = args[3].clone()
    args[3][0, -1, 0, 1] = -1
    results = {}
    for _ in range(2):
        for value in ("skip", "stop"):
            monkeypatch.setenv(HOLES_VARIABLE, value)
            out = packet(*args, **kwargs)
            assert torch.equal(results.setdefault(value, out), out)
        monkeypatch.delenv(HOLES_VARIABLE)
        with pytest.raises(ContractError, match="after a negative one"):
            packet(*args, **kwargs)
    assert not torch.equal(results["skip"], results["stop"])


def test_a_vendors_name_follows_the_rounding_that_is_set():
    given = attention(SPARSE_FLASH_ATTENTION_ANTIQUANT, {"dtype": np.float16})
    packet, args, kwargs = plain(dtype=np.float16)
    want = {r: packet(*args, **kwargs, rounding=r) for r in ("exact", "npu")}
    assert not torch.equal(want["exact"], want["npu"])
    sfa_torch.enable_ascend_names()
    vendors = torch.ops.custom.npu_sparse_flash_attention_antiquant
    try:
        for rounding in ("npu", "exact", "npu", "exact"):
            sfa_torch.enable_ascend_names(rounding=rounding)
            assert torch.equal(vendors(**given), want[rounding])
    finally:
        sfa_torch.enable_ascend_names()


def memory():
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_ten_thousand_calls_keep_no_memory():
    packet, args, kwargs = plain(batch=1, s1=1, heads=16, nope=512, layouts=("BSND", "BSND"),
                                 lengths=False, dtype=np.float32)  # fmt: skip
    for scale in range(600):  # more forms than are kept
        args[4] = float(scale)
        packet(*args, **kwargs)
    gc.collect()
    counts = [sys.getrefcount(a) for a in args]
    before = memory()
    for scale in range(10_000):  # results of 32 KiB, 320 MB in all
        args[4] = 1.0 if scale % 100 else float(scale + 1000)
        packet(*args, **kwargs)
    args[4] = 1.0
    assert memory() - before < 8 << 20
    assert [sys.getrefcount(a) for a in args][:4] == counts[:4]


def test_a_result_is_nobodys_but_the_callers():
    packet, args, kwargs = plain()
    first = packet(*args, **kwargs)
    kept = first.clone()
    args[0] = -args[0]
    second = packet(*args, **kwargs)
    assert torch.equal(first, kept)
    assert first.data_ptr() != second.data_ptr()
    del args, kwargs
    gc.collect()
    assert torch.equal(first, kept)


def test_several_threads_call_at_once():
    calls = []
    for seed in range(4):
        packet, args, kwargs = plain(seed=seed, batch=1 + seed, heads=2 + seed)
        calls.append((packet, args, kwargs, packet(*args, **kwargs)))
    wrong = []

    def work(seed):
        r = random.Random(seed)
        for at in range(200):
            packet, args, kwargs, want = r.choice(calls)
            scale = 0.5 + at  # a form of its own now and then, so that the table changes
            if r.random() < 0.3:
                packet(*args[:4], scale, *args[5:], **kwargs)
            if not torch.equal(packet(*args, **kwargs), want):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_interpreter_runs_on_while_the_core_computes():
    packet, args, kwargs = plain(batch=1, s1=64, heads=32, s2=600, count=512, nope=512, rope=64,
                                 tile=128, layouts=("BSND", "BSND"), lengths=False)  # fmt: skip
    packet(*args, **kwargs)
    started, done, turns = threading.Event(), threading.Event(), 0

    def work():
        started.set()
        packet(*args, **kwargs)
        done.set()

    thread = threading.Thread(target=work)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)  # nobody is asked to let go of the lock
    try:
        thread.start()
        started.wait()
        while not done.is_set():
            turns += 1
            done.wait(0.001)
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert turns > 3


def test_a_clip_is_read_each_time_and_many_dimensions_are_packed():
    pack, nope = torch.ops.sfa_onnx.kv_cache_pack, torch.randn(2, 3, 1, 1, 1, 32)
    for _ in range(2):
        for clip in (0.5, 1.0):
            got = pack(nope, clip=torch.tensor(clip), tile_size=16)
            want = kv_cache.pack(nope.numpy(), clip=clip, tile_size=16)
            np.testing.assert_array_equal(got.numpy(), want)
        np.testing.assert_array_equal(pack(nope, tile_size=16).numpy(), want)
        with pytest.raises(ContractError, match="rope: expected leading dimensions"):
            pack(nope, rope=torch.ones(3, 8), tile_size=16)


def test_without_torchs_part_the_kernel_is_pythons(monkeypatch):
    packet, args, kwargs = plain()
    adapter = Counting(SPARSE_FLASH_ATTENTION_ANTIQUANT, packet.default._schema)
    assert native.in_use() == IN_C
    monkeypatch.delattr(torch._C._aoti, "alloc_tensor_by_stealing_from_void_ptr")
    native._native.cache_clear()
    try:
        assert not native.in_use()
        made = native.kernel(adapter, None)
    finally:
        monkeypatch.undo()
        native._native.cache_clear()
    for count in (1, 2):
        assert torch.equal(made(*args, **kwargs), packet(*args, **kwargs))
        assert adapter.runs == count
