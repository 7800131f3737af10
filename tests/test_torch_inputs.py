"""Tensors as callers have them: strides, devices, gradients, nothing at all, wrong lengths."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx.errors import ContractError  # noqa: E402
from sfa_onnx.operator.op import (  # noqa: E402
    LIGHTNING_INDEXER,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
)
from sfa_onnx.torch.tensors import as_numpy, as_torch  # noqa: E402
from tests.attention_cases import make_case  # noqa: E402
from tests.indexer_cases import indexer_call, select  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", autouse=True)
def enabled():
    return sfa_torch.enable_ascend_names()


def quant(**kw):
    """The document's operator and its arguments."""
    case = make_case(**kw)
    given = {n: as_torch(a) for n, a in case.inputs.items()} | case.attributes
    return torch.ops.custom.npu_sparse_flash_attention_antiquant, given


def calls():
    """One call of each operator over a paged cache: packet, arguments, names of the caches."""
    yield (*quant(), ("key",))
    case = make_case(SPARSE_FLASH_ATTENTION)
    case.attributes.pop("return_softmax_lse")
    given = {n: as_torch(a) for n, a in case.inputs.items()} | case.attributes
    yield torch.ops.npu.npu_sparse_flash_attention, given, ("key", "value", "key_rope")
    for op, packet, caches in (
        (LIGHTNING_INDEXER, torch.ops.npu.npu_lightning_indexer, ("key",)),
        (
            QUANT_LIGHTNING_INDEXER,
            torch.ops.npu.npu_quant_lightning_indexer,
            ("key", "key_dequant_scale"),
        ),
    ):
        inputs, attributes = indexer_call(op, ("BSND", "PA_BSND"), np.float16, whole=True)
        attributes.pop("return_values", None)
        yield packet, {n: as_torch(a) for n, a in inputs.items()} | attributes, caches


def first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def test_pages_may_lie_apart_and_nothing_else():
    for packet, given, caches in calls():
        want = first(packet(**given))
        apart = dict(given)
        for name in caches:  # keys and values of a layer in one tensor: every second page is ours
            pages = given[name]
            both = pages.new_zeros((len(pages), 2, *pages.shape[1:]))
            both[:, 0] = pages
            apart[name] = both[:, 0]
            assert not apart[name].is_contiguous()
        assert torch.equal(first(packet(**apart)), want)
        wide = torch.cat((given["key"], given["key"]), -1)[..., : given["key"].shape[-1]]
        with pytest.raises(ContractError, match=r"key: expected a contiguous .*key.contiguous\(\)"):
            packet(**(given | {"key": wide}))
        with pytest.raises(ContractError, match="query: expected a contiguous tensor, got shape"):
            packet(**(given | {"query": given["query"][:1].expand(given["query"].shape)}))


def test_what_is_no_dense_tensor_is_refused_by_name():
    for packet, given, _ in calls():
        needed = ["query", "key", *(n for n in ("sparse_indices", "weights") if n in given)]
        for name in needed:
            with pytest.raises(ContractError, match=f"{name}: expected a tensor, got None"):
                packet(**(given | {name: None}))
            sparse = given[name].float().to_sparse()
            with pytest.raises(ContractError, match=rf"{name}: expected a dense .*{name}.to_dense"):
                packet(**(given | {name: sparse}))
    packet, given = quant()
    with pytest.raises(ContractError, match=r"sparse_indices: expected shape \[3, 3, 1, K\], got"):
        packet(**(given | {"sparse_indices": given["sparse_indices"][:1]}))


def test_gradients_are_refused_only_where_they_are_wanted():
    packet, given = quant()
    want, asking = packet(**given), given["query"].clone().requires_grad_()
    with pytest.raises(ContractError, match=r"query: expected requires_grad=False .*got True"):
        packet(**(given | {"query": asking}))
    with torch.no_grad():
        assert torch.equal(packet(**(given | {"query": asking})), want)
    with torch.inference_mode():
        assert torch.equal(packet(**given), want)


def test_tensors_without_values_give_shapes_and_are_not_mixed_with_others():
    for packet, given, _ in calls():
        meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        got, want = first(packet(**meta)), first(packet(**given))
        assert (got.device.type, got.shape, got.dtype) == ("meta", want.shape, want.dtype)
        with pytest.raises(ContractError, match="key: expected a tensor on cpu like query, got me"):
            packet(**(given | {"key": meta["key"]}))
        with pytest.raises(ContractError, match="key: expected a tensor on meta like query, got c"):
            packet(**(given | {"query": meta["query"]}))
        layout = next(n for n in given if n.startswith("layout_") and n != "layout_query")
        with pytest.raises(ContractError, match=f"{layout}: expected .*, got 'PA_NZ'"):
            packet(**(meta | {layout: "PA_NZ"}))


EMPTY = {
    "no batch": {"query": (0, None), "key": (0, None), "sparse_indices": (0, None)},
    "no queries": {"query": (None, 0), "sparse_indices": (None, 0)},
    "no keys": {"key": (None, 0)},
    "nothing chosen": {"sparse_indices": (None, None, None, 0)},
}


@pytest.mark.parametrize("what", EMPTY)
def test_nothing_gives_nothing_or_zeros(what):
    packet, given = quant(layouts=("BSND", "BSND"), lengths=False, batch=2)
    for name, dims in EMPTY[what].items():
        for dim, size in enumerate(dims):
            if size is not None:
                given[name] = given[name].narrow(dim, 0, size).contiguous()
    given["value"] = given["key"]
    out = packet(**given)
    query = given["query"]
    assert out.shape == (*query.shape[:-1], query.shape[-1] - given["rope_head_dim"])
    assert not out.any()


WRONG = {
    "lengths below zero": ("actual_seq_lengths_kv", 0, -1, r"kv\[0\] is -1, allowed is 0\.\.64"),
    "more than the table has": ("actual_seq_lengths_kv", 0, 65, r"4 columns, but .* needs 5 pages"),
    "a page that is not there": ("block_table", (0, 0), -1, r"block_table\[0\]\[0\] is -1, but"),
    "a page past the end": ("block_table", (0, 0), 99, r"\[0\]\[0\] is 99, .* pages 0\.\.\d+"),
    "too many queries": ("actual_seq_lengths_query", 1, 4, r"query\[1\] is 4, allowed is 0\.\.3"),
    "a hole": ("sparse_indices", (0, 2, 0, 0), -1, "holds the valid index .* after a negative one"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_values_are_refused_before_anything_is_read(what):
    packet, given = quant()
    name, at, value, message = WRONG[what]
    wrong = given[name].clone()
    wrong[at] = value
    with pytest.raises(ContractError, match=message):
        packet(**(given | {name: wrong}))


def test_prefix_sums_start_at_nought():
    packet, given = quant(layouts=("TND", "TND"))
    for name in ("actual_seq_lengths_query", "actual_seq_lengths_kv"):
        wrong = given[name].clone()
        wrong[0] = -1
        with pytest.raises(ContractError, match=rf"{name}\[0\] is -1, allowed is 0\.\.\d+"):
            packet(**(given | {name: wrong}))
        wrong = given[name].flip(0).contiguous()
        with pytest.raises(ContractError, match="prefix sums must not decrease"):
            packet(**(given | {name: wrong}))


def test_one_tensor_may_be_several_arguments():
    packet, given = quant(layouts=("BSND", "BSND"), s1=3, count=12, lengths=False)
    want = packet(**given)
    lengths = torch.full((3,), 3, dtype=torch.int32)
    key = given["key"][:, :3].contiguous()
    same = packet(**(given | {"key": key, "value": key, "actual_seq_lengths_query": lengths,
                              "actual_seq_lengths_kv": lengths}))  # fmt: skip
    assert same.shape == want.shape
    assert torch.equal(given["key"][:, :3], key)


def test_golden_sums_of_the_float_indexer_put_near_ties_in_the_order_of_the_vendors_check():
    torch.manual_seed(3)
    query, key = torch.rand(2, 3, 16, 32) * 20 - 10, torch.rand(2, 600, 1, 32) * 20 - 10
    weights, count = torch.rand(2, 3, 16) * 2 - 1, 256
    products = torch.relu(query.permute(0, 2, 1, 3) @ key.transpose(1, 2).transpose(2, 3))
    scores = (products * weights.permute(0, 2, 1)[..., None]).sum(1)
    for s in range(3):
        scores[:, s, 600 - 2 + s :] = -torch.inf
    want = scores.sort(dim=-1, descending=True, stable=True).indices[:, :, None, :count]
    try:
        sfa_torch.enable_ascend_names(rounding="golden")
        got, _ = torch.ops.npu.npu_lightning_indexer(query, key, weights, sparse_count=count)
    finally:
        sfa_torch.enable_ascend_names()
    assert torch.equal(got, want.int())
    near, _ = torch.ops.npu.npu_lightning_indexer(query, key, weights, sparse_count=count)
    assert (near == got).float().mean() > 0.98


def test_golden_sums_over_pages_and_ragged_rows():
    for layouts in (("BSND", "PA_BSND"), ("TND", "TND"), ("TND", "PA_BSND")):
        inputs, attributes = indexer_call(LIGHTNING_INDEXER, layouts, np.float16, whole=True)
        want = select(LIGHTNING_INDEXER, inputs, attributes)
        given = {n: as_torch(a) for n, a in inputs.items()} | attributes
        given.pop("return_values")
        try:
            sfa_torch.enable_ascend_names(rounding="golden")
            got, _ = torch.ops.npu.npu_lightning_indexer(**given)
        finally:
            sfa_torch.enable_ascend_names()
        np.testing.assert_array_equal(as_numpy(got), want)


def test_open_sizes_are_traced_once():
    packet, given = quant(layouts=("BSND", "BSND"), lengths=False)
    names = ("query", "key", "sparse_indices")
    fixed = {n: v for n, v in given.items() if not isinstance(v, torch.Tensor)}
    traces = []

    def backend(graph, _inputs):
        traces.append(graph)
        return graph.forward

    def attend(query, key, indices):
        return packet(query=query, key=key, value=key, sparse_indices=indices, **fixed)

    compiled = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    for batch, s1, s2, count in ((2, 3, 41, 12), (6, 5, 31, 7)):
        _, other = quant(layouts=("BSND", "BSND"), lengths=False, batch=batch, s1=s1, s2=s2,
                         count=count)  # fmt: skip
        args = [other[n] for n in names]
        with torch.no_grad():
            assert torch.equal(compiled(*args), attend(*args))
    assert len(traces) == 1
