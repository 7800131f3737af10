"""What torch does around an operator: vmap, autocast, TorchScript's trace, compile with weights."""

from __future__ import annotations

import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad  # noqa: E402

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx.errors import ContractError  # noqa: E402
from sfa_onnx.operator.op import (  # noqa: E402
    KV_CACHE_PACK,
    LIGHTNING_INDEXER,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
)
from sfa_onnx.torch.ops import OPERATORS as OWN  # noqa: E402
from sfa_onnx.torch.tensors import as_torch  # noqa: E402
from sfa_onnx.torch.vendor import vendor_operators  # noqa: E402
from tests.attention_cases import make_case  # noqa: E402
from tests.indexer_cases import indexer_call  # noqa: E402

pytestmark = pytest.mark.torch
OPERATORS = {
    "npu::npu_kv_quant_sparse_flash_attention": SPARSE_FLASH_ATTENTION_ANTIQUANT,
    "npu::npu_sparse_flash_attention": SPARSE_FLASH_ATTENTION,
    "npu::npu_lightning_indexer": LIGHTNING_INDEXER,
    "custom::npu_lightning_indexer_quant": QUANT_LIGHTNING_INDEXER,
    "sfa_onnx::npu_sparse_flash_attention_antiquant": SPARSE_FLASH_ATTENTION_ANTIQUANT,
}


@pytest.fixture(scope="module", autouse=True)
def enabled():
    sfa_torch.enable_ascend_names()


def call_of(qualified, op):
    """An operator and a call of it over pages, by name."""
    namespace, name = qualified.split("::")
    packet = getattr(getattr(torch.ops, namespace), name)
    if op is KV_CACHE_PACK:
        return packet, {"nope": torch.ones(3, 1, 32), "rope": torch.ones(3, 1, 8), "tile_size": 16}
    if "Indexer" in op.name:
        inputs, attributes = indexer_call(op, ("BSND", "PA_BSND"), np.float16, whole=True)
    else:
        case = make_case(op, dtype=np.float32)
        inputs, attributes = case.inputs, case.attributes
    known = {a.name for a in packet.default._schema.arguments}
    given = {n: as_torch(a) for n, a in inputs.items()} | attributes
    return packet, {n: v for n, v in given.items() if n in known}


def first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def function(qualified):
    """A call of the query alone, and that query."""
    packet, given = call_of(qualified, OPERATORS[qualified])
    query = given.pop("query")
    return lambda query: first(packet(query, **given)), query


@pytest.mark.parametrize("qualified", OPERATORS)
def test_vmap_autocast_and_trace_change_nothing(qualified):
    run, query = function(qualified)
    want = run(query), run(query.flip(0))
    stacked = torch.stack([query, query.flip(0)])
    for got, one in zip(torch.func.vmap(run)(stacked), want, strict=True):
        assert torch.equal(got, one)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert run(query).dtype == want[0].dtype
            assert torch.equal(run(query), want[0])
    kept = io.BytesIO()
    torch.jit.save(torch.jit.trace(run, (query,), check_trace=False), kept)
    kept.seek(0)
    assert torch.equal(torch.jit.load(kept)(query.flip(0)), want[1])


def test_a_compiled_graph_refuses_a_gradient():
    run, query = function("npu::npu_sparse_flash_attention")
    weight = torch.ones((), requires_grad=True)
    compiled = torch.compile(lambda q: run(q * weight), backend="eager", fullgraph=True)
    message = r"query: expected requires_grad=False .*, got True; call it under torch\.no_grad"
    with pytest.raises(RuntimeError, match=message):
        compiled(query)


@pytest.mark.parametrize("qualified", OPERATORS)
def test_forward_derivatives_are_refused_and_nothing_else(qualified):
    run, query = function(qualified)
    want, ones = run(query), torch.ones_like(query)
    real = query.is_floating_point()
    x = query if real else torch.ones(())
    inside = run if real else lambda _: run(query)
    message = r"torch\.func\.jvp: expected no call of the operator inside .*; call it under torch\."
    for _ in range(2):
        with pytest.raises(ContractError, match=message):
            torch.func.jvp(inside, (x,), (torch.ones_like(x),))
        with pytest.raises(ContractError, match=message):
            torch.func.jvp(lambda x: torch.func.vmap(inside)(x[None]), (x,), (torch.ones_like(x),))
        assert torch.equal(run(query), want)

    def constant(x):
        with torch.no_grad():
            return x.sum() * 2 + inside(x).sum()

    _, tangent = torch.func.jvp(constant, (x,), (torch.ones_like(x),))
    assert tangent == 2 * x.numel()
    with forward_ad.dual_level():
        assert torch.equal(run(query), want)
        if real:
            with pytest.raises(ContractError, match=r"query: expected no tangent .*, got a dual"):
                run(forward_ad.make_dual(query, ones))
    assert torch.equal(run(query), want)


def test_a_compiled_graph_refuses_a_forward_derivative():
    run, query = function("npu::npu_sparse_flash_attention")

    def derive(query):
        return torch.func.jvp(run, (query,), (query,))

    for compiled in (derive, torch.compile(derive, backend="eager", fullgraph=True)):
        with pytest.raises((ContractError, RuntimeError), match="jvp: expected no call of the op"):
            compiled(query)


NAMES = {v.qualified: v.op for v in vendor_operators()}
NAMES |= {f"sfa_onnx::{name}": op for name, op in OWN.items()}
# One for each operator: tracing takes half a second.
TRACED = {op.name: qualified for qualified, op in NAMES.items()}


@pytest.mark.parametrize("qualified", NAMES)
def test_every_name_passes_torchs_own_checks(qualified):
    op = NAMES[qualified]
    packet, given = call_of(qualified, op)
    arguments = packet.default._schema.arguments
    needed = [a.name for a in arguments if not a.kwarg_only and not a.has_default_value()]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if TRACED[op.name] == qualified:
        checks.append("test_aot_dispatch_dynamic")
    positional = tuple(given.pop(name) for name in needed)
    torch.library.opcheck(packet.default, positional, given, test_utils=checks)
