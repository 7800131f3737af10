"""Every name with every layout, type, mode and rounding: as the reference, or refused by name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx.errors import ContractError  # noqa: E402
from sfa_onnx.operator import reference  # noqa: E402
from sfa_onnx.operator.op import (  # noqa: E402
    LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
)
from sfa_onnx.torch.ops import NAMESPACE, OPERATORS  # noqa: E402
from sfa_onnx.torch.tensors import as_numpy, as_torch  # noqa: E402
from sfa_onnx.torch.vendor import vendor_operators  # noqa: E402
from tests.attention_cases import BF16, make_case  # noqa: E402
from tests.indexer_cases import indexer_call, select  # noqa: E402

pytestmark = pytest.mark.torch
ATTENTIONS = (SPARSE_FLASH_ATTENTION_ANTIQUANT.name, SPARSE_FLASH_ATTENTION.name)
NAMES = [(v.qualified, v.op) for v in vendor_operators()]
NAMES += [(f"{NAMESPACE}::{n}", op) for n, op in OPERATORS.items() if op.name != "KvCachePack"]
ATTENTION_NAMES = [pytest.param(n, op, id=n) for n, op in NAMES if op.name in ATTENTIONS]
INDEXER_NAMES = [pytest.param(n, op, id=n) for n, op in NAMES if op.name not in ATTENTIONS]
# What one rounding of the result may move a row by, of its norm.
BOUND = {np.dtype(np.float32): 2e-6, np.dtype(np.float16): 2e-3, BF16: 8e-3}


@pytest.fixture(scope="module", autouse=True)
def enabled():
    yield sfa_torch.enable_ascend_names()
    sfa_torch.enable_ascend_names()


def choices(op, name):
    return next(a for a in op.attributes if a.name == name).cpu


def layouts_of(op):
    """Every pair that the contract's table and the NPU's documents have words for."""
    kv = "layout_kv" if op.name in ATTENTIONS else "layout_key"
    beyond = ("BNSD", "PA_NZ", "PA_BBND")
    for query, key in itertools.product(
        (*choices(op, "layout_query"), "BNSD"), (*choices(op, kv), *beyond)
    ):
        yield (query, key), key in ("PA_BSND", query) and query != "BNSD"


def call(qualified, inputs, attributes, **kw):
    """The call under this name, with the words that its schema has; None where it lacks one."""
    namespace, name = qualified.split("::")
    packet = getattr(getattr(torch.ops, namespace), name)
    asked = "return_softmax_lse" in kw and "lse" in packet.overloads()
    overload = packet.lse if asked else packet.default
    words = {"return_values": "return_value"} if namespace != NAMESPACE else {}
    given = {n: as_torch(a) for n, a in inputs.items()} | attributes | kw
    given = {words.get(n, n): v for n, v in given.items()}
    known = {a.name for a in overload._schema.arguments}
    if set(kw) - {"rounding"} - known:
        return None
    result = overload(**{n: v for n, v in given.items() if n in known})
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def close(got, want, bound):
    a, b = as_numpy(got).astype(np.float64), np.asarray(want, np.float64)
    assert a.shape == b.shape
    norm = np.linalg.norm(b, axis=-1)
    assert (np.linalg.norm(a - b, axis=-1) <= bound * norm).all()


def expected(op, case, rounding):
    run = {
        SPARSE_FLASH_ATTENTION.name: reference.sparse_flash_attention_lse,
        SPARSE_FLASH_ATTENTION_ANTIQUANT.name: reference.sparse_flash_attention_antiquant_lse,
    }[op.name]
    attributes = {n: v for n, v in case.attributes.items() if n != "return_softmax_lse"}
    return run(*(case.inputs.get(t.name) for t in op.inputs), **attributes, mode=rounding)


@pytest.mark.parametrize(("qualified", "op"), ATTENTION_NAMES)
def test_attention(qualified, op):
    modes, dtypes = (0, 3), (np.float32, np.float16, BF16)
    compared = 0
    for layouts, legal in layouts_of(op):
        for number, (mode, dtype, rounding) in enumerate(
            itertools.product(modes, dtypes, ("exact", "npu"))
        ):
            made = layouts if legal else ("TND", "PA_BSND")
            case = make_case(
                op, made, dtype=dtype, sparse_mode=mode, seed=number, sparse_block_size=1 + mode
            )
            if not legal:
                case.attributes |= dict(zip(("layout_query", "layout_kv"), layouts, strict=True))
                with pytest.raises(ContractError, match=r"layout_(query|kv): expected .*, got "):
                    call(qualified, case.inputs, case.attributes)
                break
            case.attributes.pop("return_softmax_lse", None)
            extra = {"rounding": rounding} if qualified.startswith(NAMESPACE) else {}
            sfa_torch.enable_ascend_names(rounding=rounding)
            want = expected(op, case, rounding)
            out = call(qualified, case.inputs, case.attributes, **extra)
            close(out[0], want[0], BOUND[np.dtype(dtype)])
            assert all(t.shape == (0,) for t in out[1:])
            asked = call(qualified, case.inputs, case.attributes, return_softmax_lse=True, **extra)
            if asked is not None:
                assert torch.equal(asked[0], out[0])
                for mine, theirs in zip(asked[1:], want[1:], strict=True):
                    np.testing.assert_allclose(as_numpy(mine), theirs, rtol=1e-2, atol=2e-2)
            compared += 1
    assert compared == 4 * 12


@pytest.mark.parametrize(("qualified", "op"), INDEXER_NAMES)
def test_indexer(qualified, op):
    quantised = op is not LIGHTNING_INDEXER
    dtypes = (np.int8,) if quantised else (np.float32, np.float16, BF16)
    compared = 0
    for layouts, legal in layouts_of(op):
        for number, (mode, dtype, rounding) in enumerate(
            itertools.product((0, 3), dtypes, ("exact", "npu", "golden"))
        ):
            made = layouts if legal else ("TND", "PA_BSND")
            # Whole numbers: equal scores are equal in every order of adding.
            inputs, attributes = indexer_call(op, made, dtype, number, whole=True, sparse_mode=mode)
            if not legal:
                attributes |= dict(zip(("layout_query", "layout_key"), layouts, strict=True))
                with pytest.raises(ContractError, match=r"layout_(query|key): expected .*, got "):
                    call(qualified, inputs, attributes)
                break
            own = qualified.startswith(NAMESPACE)
            extra = {"rounding": rounding} if own and quantised else {}
            if own and not quantised and rounding != "exact":
                continue
            sfa_torch.enable_ascend_names(rounding=rounding)
            how = {"mode": "exact" if rounding == "exact" else "npu"} if quantised else {}
            want = select(op, inputs, attributes, **how)
            got = call(qualified, inputs, attributes, **extra)
            np.testing.assert_array_equal(as_numpy(got[0]), want)
            if quantised:
                assert all(t.shape == (0,) for t in got[1:])
            elif len(got) > 1:
                arguments = [inputs.get(t.name) for t in op.inputs]
                values = reference.lightning_indexer(*arguments, **attributes)[1]
                np.testing.assert_array_equal(as_numpy(got[1]), values)
            compared += 1
    assert compared >= 4 * 6


WRONG = {
    "sparse_mode": (1, "expected 0 or 3, got 1"),
    "scale_value": (float("nan"), "expected a finite float32, got nan"),
    "sparse_block_size": (2**32 + 1, "expected <= 2147483647, got 4294967297"),
    "query": (torch.float64, "expected float32, float16 or bfloat16, got (torch.)?float64"),
    "key": (torch.float64, "expected .*, got (torch.)?float64"),
    "sparse_indices": (torch.int64, "expected torch.int32, got torch.int64"),
    "block_table": (torch.int16, "expected torch.int32, got torch.int16"),
    "actual_seq_lengths_kv": (torch.int64, "expected torch.int32, got torch.int64"),
    "sparse_count": (0, "expected >= 1, got 0"),
    "weights": (torch.float64, "expected .*, got (torch.)?float64"),
    "pre_tokens": (1, "expected 9223372036854775807, got 1"),
    "key_quant_mode": (1, "expected [02], got 1"),
    "tile_size": (0, "expected >= 1, got 0"),
    "rope_head_dim": (40, r"expected 0\.\.39, below the query's last dimension 40, got 40"),
}  # fmt: skip


@pytest.mark.parametrize("rounding", ["npu", "golden"])
@pytest.mark.parametrize(("qualified", "op"), [*ATTENTION_NAMES, *INDEXER_NAMES])
def test_what_breaks_the_contract_is_refused_by_name(qualified, op, rounding):
    sfa_torch.enable_ascend_names(rounding=rounding)
    if op.name in ATTENTIONS:
        case = make_case(op)
        inputs, attributes = case.inputs, case.attributes
    else:
        inputs, attributes = indexer_call(op, ("BSND", "PA_BSND"), BF16)
    namespace, name = qualified.split("::")
    overload = getattr(getattr(torch.ops, namespace), name).default
    known = {a.name for a in overload._schema.arguments}
    given = {n: as_torch(a) for n, a in inputs.items()} | attributes
    given = {n: v for n, v in given.items() if n in known}
    if op is LIGHTNING_INDEXER and "return_value" in known:
        given["return_value"] = True
    given |= {"rounding": rounding} if "rounding" in known else {}
    overload(**given)
    tried = 0
    for word in set(WRONG) & set(given):
        value, message = WRONG[word]
        if isinstance(value, torch.dtype):
            if word == "query" and op.name not in ATTENTIONS and op is not LIGHTNING_INDEXER:
                message = "expected int8, got (torch.)?float64"
            value = given[word].to(value)
        with pytest.raises(ContractError, match=f"{word}: {message}"):
            overload(**(given | {word: value}))
        tried += 1
    assert tried >= 6
