"""The operators under the vendors' names, against the reference and beside vendors' packages."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx.errors import ContractError, UsageError  # noqa: E402
from sfa_onnx.operator import reference  # noqa: E402
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT  # noqa: E402
from sfa_onnx.torch import names, native  # noqa: E402
from sfa_onnx.torch.tensors import as_numpy, as_torch, check_usable  # noqa: E402
from sfa_onnx.torch.vendor import vendor_operators, vendor_schemas  # noqa: E402
from tests.attention_cases import BF16, LAYOUTS, make_case, softmax_reference  # noqa: E402

pytestmark = pytest.mark.torch
QUANT = ("custom::npu_sparse_flash_attention_antiquant", "npu::npu_kv_quant_sparse_flash_attention")
FLOAT = ("custom::npu_sparse_flash_attention", "npu::npu_sparse_flash_attention")


@pytest.fixture(scope="module", autouse=True)
def enabled():
    return sfa_torch.enable_ascend_names()


def packet(qualified):
    namespace, name = qualified.split("::")
    return getattr(getattr(torch.ops, namespace), name)


def arguments(qualified, case):
    """The case's arguments that this name knows."""
    known = {a.name for a in packet(qualified).default._schema.arguments}
    given = {n: as_torch(a) for n, a in case.inputs.items()} | case.attributes
    return {n: v for n, v in given.items() if n in known}


def first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def close(got, want, bound=8e-3):
    a, b = as_numpy(got).astype(np.float64), want.astype(np.float64)
    norm = np.linalg.norm(b, axis=-1)
    error = np.linalg.norm(a - b, axis=-1)
    assert (error <= bound * norm).all(), (error / np.maximum(norm, 1e-30)).max()


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("qualified", QUANT + FLOAT)
def test_every_attention_name_computes_what_the_npu_computes(qualified, layouts):
    op = SPARSE_FLASH_ATTENTION_ANTIQUANT if qualified in QUANT else SPARSE_FLASH_ATTENTION
    for dtype, size in ((BF16, 1), (np.float16, 4), (np.float32, 1), (BF16, 4)):
        case = make_case(op, layouts, dtype=dtype, sparse_block_size=size, seed=size)
        got = first(packet(qualified)(**arguments(qualified, case)))
        assert got.dtype == as_torch(case.inputs["query"]).dtype
        close(got, case.reference(mode="npu"))


@pytest.mark.parametrize("mode", [0, 3])
def test_the_roundings_are_the_vendors_where_they_decide(mode):
    # Scores of thousands: the softmax has one winner, and rounding the keys moves it.
    case = make_case(dtype=BF16, nope=128, rope=16, tile=64, s2=300, count=200, sparse_mode=mode,
                     heads=8, peak=400.0, seed=3)  # fmt: skip
    want, exact = case.reference(mode="npu"), case.reference()
    got = packet(QUANT[0])(**arguments(QUANT[0], case))
    close(got, want, 1e-2)
    assert np.abs(exact.astype(np.float32) - want.astype(np.float32)).max() > 0.1


def test_the_documents_own_call_with_its_positional_arguments():
    case = make_case(dtype=BF16)
    t = {n: as_torch(a) for n, a in case.inputs.items()}
    got = torch.ops.custom.npu_sparse_flash_attention_antiquant(
        t["query"], t["key"], t["value"], t["sparse_indices"],
        case.attributes["scale_value"], 1, 2, 2,
        block_table=t["block_table"], actual_seq_lengths_query=t["actual_seq_lengths_query"],
        actual_seq_lengths_kv=t["actual_seq_lengths_kv"], layout_query="BSND",
        layout_kv="PA_BSND", sparse_mode=3, attention_mode=2, quant_scale_repo_mode=1,
        tile_size=16, rope_head_dim=8,
    )  # fmt: skip
    close(got, case.reference(mode="npu"))
    with pytest.raises(ContractError, match="attention_mode: expected 2, got 0"):
        torch.ops.custom.npu_sparse_flash_attention_antiquant(
            t["query"], t["key"], t["value"], t["sparse_indices"], 0.1, 1, 2, 2
        )


def test_torch_npus_attention_has_three_results_and_the_recipes_one():
    case = make_case(SPARSE_FLASH_ATTENTION, ("BSND", "BSND"), dtype=BF16)
    out, top, total = packet(FLOAT[1])(**arguments(FLOAT[1], case))
    assert out.shape == case.inputs["query"].shape
    assert [top.shape, total.shape, top.dtype] == [(0,), (0,), torch.float32]
    t = {n: as_torch(a) for n, a in case.inputs.items()}
    lengths = {n: t[n] for n in ("actual_seq_lengths_query", "actual_seq_lengths_kv")}
    single = torch.ops.custom.npu_sparse_flash_attention(
        t["query"], t["key"], t["value"], t["sparse_indices"], case.attributes["scale_value"], 1,
        query_rope=t["query_rope"], key_rope=t["key_rope"], **lengths,
    )  # fmt: skip
    assert isinstance(single, torch.Tensor)
    assert torch.equal(single, out)


@pytest.mark.parametrize("layouts", [("BSND", "PA_BSND"), ("TND", "TND")], ids="-".join)
def test_softmax_results_and_sinks(layouts):
    case = make_case(SPARSE_FLASH_ATTENTION, layouts, dtype=np.float32, seed=4)
    case.attributes["return_softmax_lse"] = 1
    given = arguments(FLOAT[1], case) | {"return_softmax_lse": True}
    sinks = np.linspace(-2, 2, 4).astype(np.float32)
    for extra in ({}, {"sinks": sinks}):
        case.inputs |= extra
        want = (case.reference(), *softmax_reference(case))
        got = packet(FLOAT[1])(**given, **{n: as_torch(a) for n, a in extra.items()})
        for mine, theirs in zip(got, want, strict=True):
            assert mine.shape == theirs.shape
            np.testing.assert_allclose(as_numpy(mine), theirs, rtol=1e-4, atol=1e-5)
    quant = make_case(dtype=BF16, seed=4)
    quant.inputs["sinks"] = sinks
    close(packet(QUANT[1])(**arguments(QUANT[1], quant)), quant.reference(mode="npu"))
    with pytest.raises(ContractError, match=r"sinks: expected torch.float32 \[4\] .*got"):
        packet(QUANT[1])(**(arguments(QUANT[1], quant) | {"sinks": torch.ones(3)}))


def indexer_case(seed=0, batch=2, rows=3, keys=20, heads=4, width=8):
    r = np.random.default_rng(seed)
    query = r.integers(-100, 100, (batch, rows, heads, width)).astype(np.int8)
    key = r.integers(-100, 100, (batch, keys, 1, width)).astype(np.int8)
    weights = r.standard_normal((batch, rows, heads)).astype(np.float16)
    scales = [r.uniform(0.1, 1, s).astype(np.float16) for s in (weights.shape, key.shape[:-1])]
    lengths = np.array([keys, keys - 7], np.int32)
    return query, key, weights, *scales, lengths


def test_the_indexers_of_both_vendors():
    query, key, weights, q_scale, k_scale, lengths = indexer_case()
    floats = [x.astype(np.float32) for x in (query, key, weights)]
    seqs = {"actual_seq_lengths_key": as_torch(lengths)}
    want, scores = reference.lightning_indexer(
        *floats, actual_seq_lengths_key=lengths, sparse_count=6
    )
    args = [as_torch(x) for x in floats]
    got = torch.ops.custom.npu_lightning_indexer(*args, **seqs, sparse_count=6)
    assert (as_numpy(got) == want).all()
    got, empty = torch.ops.npu.npu_lightning_indexer(*args, **seqs, sparse_count=6)
    assert (as_numpy(got) == want).all()
    assert empty.shape == (0,)
    got, values = torch.ops.npu.npu_lightning_indexer(
        *args, **seqs, sparse_count=6, return_value=True
    )
    np.testing.assert_allclose(as_numpy(values), scores, rtol=1e-5)
    quant = [as_torch(x) for x in (query, key, weights, q_scale, k_scale)]
    want = reference.quant_lightning_indexer(
        query, key, weights, q_scale, k_scale, actual_seq_lengths_key=lengths, sparse_count=6,
        query_quant_mode=0, key_quant_mode=0, mode="npu",
    )  # fmt: skip
    got = torch.ops.custom.npu_lightning_indexer_quant(*quant, **seqs, sparse_count=6)
    assert (as_numpy(got) == want).all()
    got = torch.ops.npu.npu_quant_lightning_indexer(
        *quant, 0, 0, **seqs, sparse_count=6, query_dtype=None, key_dtype=None
    )
    assert (as_numpy(got) == want).all()


def test_refusals_name_argument_expectation_and_value():
    case = make_case(dtype=BF16)
    call, given = packet(QUANT[1]), arguments(QUANT[1], case)
    query = given["query"]
    wrong = {
        "key_dtype": (1, "key_dtype: expected None, 290 .*, got 1"),
        "query": (query.transpose(1, 2), r"query: expected a contiguous tensor, got shape .*strid"),
        "value": (given["key"].float(), r"value: expected torch.int8, got torch.float32"),
        "block_table": (given["block_table"].long(), r"block_table: expected torch.int32"),
        "sparse_indices": (
            given["sparse_indices"][..., 0].contiguous(),
            r"sparse_indices: expected shape \[",
        ),
        "tile_size": (24, "tile_size: expected a divisor of the latent's 32 columns .*, got 24"),
        "layout_kv": ("BNSD", "layout_kv: expected BSND or TND or PA_BSND, got 'BNSD'"),
        "next_tokens": (4, "next_tokens: expected 9223372036854775807, got 4"),
        "actual_seq_lengths_kv": (None, r"actual_seq_lengths_kv: expected \[B\].*PA_BSND"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(ContractError, match=message):
            call(**(given | {name: value}))
    with pytest.raises(ContractError, match="query: expected requires_grad=False"):
        call(**(given | {"query": query.clone().requires_grad_()}))
    with pytest.raises(ContractError, match="key: expected a tensor on cpu"):
        check_usable({"query": query, "key": given["key"].to("meta")})
    holes = given["sparse_indices"].clone()
    holes[0, -1, 0, 0] = -1
    with pytest.raises(ContractError, match="sparse_indices"):
        call(**(given | {"sparse_indices": holes}))


def test_the_names_compile_without_a_break_and_pass_torchs_checks():
    case = make_case(dtype=np.float32)
    for qualified in QUANT:
        given = arguments(qualified, case)
        compiled = torch.compile(
            lambda q, **kw: first(packet(qualified)(q, **kw)) * 2,  # noqa: B023
            backend="aot_eager",
            fullgraph=True,
        )
        query = given.pop("query")
        with torch.no_grad():
            assert torch.equal(compiled(query, **given), packet(qualified)(query, **given) * 2)
        names_ = [a.name for a in packet(qualified).default._schema.arguments if not a.kwarg_only]
        given["query"] = query
        positional = tuple(given.pop(n) for n in names_)
        torch.library.opcheck(packet(qualified).default, positional, given)


def test_choices_of_release_and_rounding():
    case = make_case(dtype=BF16, seed=5)
    given = arguments(QUANT[0], case)
    try:
        sfa_torch.enable_ascend_names(rounding="exact")
        close(packet(QUANT[0])(**given), case.reference(), 2e-3)
        sfa_torch.enable_ascend_names(rounding="golden")
        for qualified in QUANT:
            got = as_numpy(packet(qualified)(**arguments(qualified, case)))
            np.testing.assert_array_equal(got, case.reference(mode="golden"))
        sfa_torch.enable_ascend_names(release="2.9.0")
        schema = torch.ops.npu.npu_kv_quant_sparse_flash_attention.default._schema
        assert "key_dtype" not in str(schema)
        with pytest.raises(UsageError, match=r"no schemas of torch_npu 9.9: expected one of 2\."):
            sfa_torch.enable_ascend_names(release="9.9")
        with pytest.raises(
            UsageError, match="rounding: expected exact, npu, golden, got 'nearest'"
        ):
            sfa_torch.enable_ascend_names(rounding="nearest")
    finally:
        sfa_torch.enable_ascend_names()
    assert "sinks" in str(torch.ops.npu.npu_kv_quant_sparse_flash_attention.default._schema)


def test_schema_data_parse_and_say_where_they_come_from():
    for entry in vendor_schemas():
        parsed = torch._C.parse_schema(f"{entry.qualified}{entry.schema}")
        known = {t.name for t in entry.op.inputs} | {a.name for a in entry.op.attributes}
        odd = {a.name for a in parsed.arguments} - known
        assert odd <= {"return_value", "key_dtype", "value_dtype", "query_dtype", "sinks",
                       "pre_tokens", "next_tokens", "return_softmax_lse", "metadata",
                       "cmp_ratio"}  # fmt: skip
        assert entry.source
        assert bool(entry.releases) == (not entry.namespace.startswith("custom"))
    assert len(vendor_operators()) == 17
    # What a package's release has, and only that.
    assert len(vendor_operators(vllm_release="0.18.0")) == 10 + 3
    assert len(vendor_operators(vllm_release="0.13.0")) == 10 + 2


@pytest.mark.parametrize("release", ["2.9.0", "2.13.0"])
def test_schemas_are_those_of_the_published_wheels(release, tmp_path):
    """Downloads one wheel of torch_npu and reads it; nothing of it is installed or loaded."""
    got = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
         "--python-version=3.11", "--implementation=cp", "--abi=cp311", "--timeout=20",
         "--platform=manylinux_2_28_x86_64", f"--dest={tmp_path}", f"torch_npu=={release}"],
        capture_output=True, text=True,
    )  # fmt: skip
    wheels = list(tmp_path.glob("*.whl"))
    if got.returncode or not wheels:
        pytest.skip(f"torch_npu {release} cannot be downloaded here")
    with zipfile.ZipFile(wheels[0]) as wheel:
        library = wheel.read("torch_npu/lib/libtorch_npu.so")
    of_release = [v for v in vendor_operators(release) if v.namespace == "npu"]
    assert len(of_release) == 4
    for vendor in of_release:
        assert f"{vendor.name}{vendor.schema}\0".encode() in library, vendor.qualified


# Beside a vendor's own package.

VENDOR = """
    import torch
    library = torch.library.Library("custom", "DEF")
    library.define("npu_lightning_indexer(Tensor query, Tensor key, Tensor weights) -> Tensor")
    library.define("npu_sparse_flash_attention(Tensor query) -> Tensor")
    library.impl("npu_sparse_flash_attention", lambda query: query + 1, "CPU")
    library.impl("npu_lightning_indexer", lambda q, k, w: q * 7, "PrivateUse1")
"""
SCRIPT = """
    import torch, sfa_onnx.torch
    {order}
    owners = sfa_onnx.torch.names.owners()
    assert owners["custom::npu_lightning_indexer"] == "vendor, CPU by sfa_onnx", owners
    assert owners["custom::npu_sparse_flash_attention"] == "vendor", owners
    assert owners["custom::npu_sparse_flash_attention_antiquant"] == "sfa_onnx", owners
    assert torch.ops.custom.npu_sparse_flash_attention(torch.zeros(2)).tolist() == [1, 1]
    query, key = torch.eye(4).reshape(1, 4, 1, 4), torch.eye(4).reshape(1, 4, 1, 4)
    found = torch.ops.custom.npu_lightning_indexer(query, key, torch.ones(1, 4, 1))
    assert found.shape == (1, 4, 1, 2048) and found[0, :, 0, 0].tolist() == [0, 1, 2, 3]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("custom::npu_lightning_indexer", "PrivateUse1")
    print("fine")
"""


def run(code, folder, **kw):
    text = textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True,
        env={"PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}", "PATH": "/usr/bin"}, **kw,
    )  # fmt: skip


@pytest.mark.parametrize("first_import", ["vendor", "ours"])
def test_a_vendors_names_are_never_shadowed(first_import, tmp_path):
    package = tmp_path / "custom_ops"
    package.mkdir()
    (package / "__init__.py").write_text(textwrap.dedent(VENDOR))
    order = ["import custom_ops", "sfa_onnx.torch.enable_ascend_names()"]
    lines = order if first_import == "vendor" else order[::-1]
    done = run(SCRIPT.replace("{order}", "; ".join(lines)), tmp_path)
    assert done.stdout == "fine\n", done.stderr


def test_torch_npu_without_cann_is_one_sentence(tmp_path):
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open')\n")
    code = """
        import sfa_onnx.torch
        sfa_onnx.torch.enable_ascend_names()
        try:
            import torch_npu
        except ImportError as error:
            print(error)
        print(len(sfa_onnx.torch.names.owners()))
    """
    lines = run(code, tmp_path).stdout.splitlines()
    assert lines[0].startswith(
        "torch_npu is installed but does not load here (libhccl.so: cannot open): it needs CANN"
    )
    assert lines[1:] == ["19"]


def test_names_are_the_modules_facade():
    assert sfa_torch.enable_ascend_names is names.enable_ascend_names


def test_doctor_says_whose_each_name_is():
    from sfa_onnx.doctor import examine

    found = {p.name: p.text for p in examine().probes if p.topic == "torch names"}
    assert found.pop("kernels").startswith("in C" if native.in_use() else "in Python")
    assert found["custom.npu_sparse_flash_attention_antiquant"] == "sfa_onnx"
    assert len(found) == 19
