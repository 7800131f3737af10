import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx import runtime  # noqa: E402
from sfa_onnx.errors import ContractError  # noqa: E402
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION_ANTIQUANT  # noqa: E402
from sfa_onnx.runtime.portable.model import make_portable  # noqa: E402
from sfa_onnx.torch.tensors import as_numpy, as_torch  # noqa: E402
from tests.attention_cases import BF16, LAYOUTS, make_case, softmax_reference  # noqa: E402

pytestmark = pytest.mark.torch
OPS = torch.ops.sfa_onnx
NAMES = {
    SPARSE_FLASH_ATTENTION_ANTIQUANT.name: "npu_sparse_flash_attention_antiquant",
    SPARSE_FLASH_ATTENTION.name: "npu_sparse_flash_attention",
}
# The argument list that CANN documents for its torch operator.
CANN = """Tensor query, Tensor key, Tensor value, Tensor sparse_indices, float scale_value,
int sparse_block_size, int key_quant_mode, int value_quant_mode, *, Tensor? key_dequant_scale=None,
Tensor? value_dequant_scale=None, Tensor? block_table=None, Tensor? actual_seq_lengths_query=None,
Tensor? actual_seq_lengths_kv=None, str layout_query='BSND', str layout_kv='BSND',
int sparse_mode=3, int attention_mode=0, int quant_scale_repo_mode=0, int tile_size=0,
int rope_head_dim=0"""


def call(case):
    """The case through torch, as a user calls it."""
    tensors = {n: as_torch(a) for n, a in case.inputs.items()}
    attributes = dict(case.attributes)
    if not attributes.get("return_softmax_lse"):  # given, it asks for three results
        attributes.pop("return_softmax_lse", None)
    return getattr(OPS, NAMES[case.op.name])(**tensors, **attributes)


def test_the_argument_list_is_canns():
    op = OPS.npu_sparse_flash_attention_antiquant.default
    ours = sfa_torch.schema_of(SPARSE_FLASH_ATTENTION_ANTIQUANT)
    # Sinks came later, at the end, in CANN's development line.
    assert ours.replace(" Tensor? sinks=None,", "") == f"({re.sub(chr(10), ' ', CANN)}) -> Tensor"
    assert str(op._schema).split("(", 1)[1].startswith("Tensor query, Tensor key, Tensor value")


@pytest.mark.parametrize("op", [SPARSE_FLASH_ATTENTION_ANTIQUANT, SPARSE_FLASH_ATTENTION])
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
def test_eager_calls_are_the_reference(op, layouts):
    case = make_case(op, layouts, dtype=BF16)
    got = call(case)
    assert got.dtype == torch.bfloat16
    assert (as_numpy(got) == case.reference()).all()


def test_illegal_calls_are_refused():
    case = make_case()
    case.attributes["attention_mode"] = 0
    with pytest.raises(ContractError, match="attention_mode: expected 2, got 0"):
        call(case)


def test_operators_pass_torchs_own_checks():
    case = make_case(dtype=np.float32)
    tensors = {n: as_torch(a) for n, a in case.inputs.items()}
    names = ("query", "key", "value", "sparse_indices")
    attributes = dict(case.attributes)
    positional = [tensors.pop(n) for n in names]
    positional += [
        attributes.pop(n)
        for n in ("scale_value", "sparse_block_size", "key_quant_mode", "value_quant_mode")
    ]
    op = OPS.npu_sparse_flash_attention_antiquant.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, tuple(positional), {**tensors, **attributes}, test_utils=checks)


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("sinks", [False, True])
def test_asking_for_the_softmax_gives_three_results(layouts, sinks):
    case = make_case(SPARSE_FLASH_ATTENTION, layouts, dtype=BF16, lse=True, sinks=sinks)
    out, *softmax = call(case)
    assert (as_numpy(out) == case.reference()).all()
    for got, want in zip(softmax, softmax_reference(case), strict=True):
        np.testing.assert_allclose(as_numpy(got), want, rtol=1e-5, atol=1e-5)
    tensors = {n: as_torch(a) for n, a in case.inputs.items()}
    given = dict(case.attributes) | {"return_softmax_lse": 0}
    again, *empty = OPS.npu_sparse_flash_attention(**tensors, **given)
    assert torch.equal(again, out)
    assert [t.shape for t in empty] == [(0,), (0,)]
    assert [t.dtype for t in empty] == [torch.float32] * 2
    del given["return_softmax_lse"]
    assert torch.equal(OPS.npu_sparse_flash_attention(**tensors, **given), out)


def test_the_overload_with_the_softmax_passes_torchs_own_checks():
    for asked in (0, 1):
        case = make_case(SPARSE_FLASH_ATTENTION, ("TND", "PA_BSND"), dtype=np.float32, sinks=True)
        given = {n: as_torch(a) for n, a in case.inputs.items()}
        given |= case.attributes | {"return_softmax_lse": asked}
        positional = [given.pop(n) for n in ("query", "key", "value", "sparse_indices")]
        positional.append(given.pop("scale_value"))
        torch.library.opcheck(OPS.npu_sparse_flash_attention.lse, tuple(positional), given)
        compiled = torch.compile(
            lambda *a, **k: OPS.npu_sparse_flash_attention(*a, **k), backend="aot_eager",
            fullgraph=True,
        )  # fmt: skip
        with torch.no_grad():
            results = compiled(*positional, **given)
            want = OPS.npu_sparse_flash_attention.lse(*positional, **given)
        assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))


class Decode(torch.nn.Module):
    """Pack a fresh cache, select with the indexer, attend."""

    def forward(self, nope, rope, query, index_query, index_key, weights):
        rows = OPS.kv_cache_pack(nope, rope=rope, tile_size=16)
        indices, _ = OPS.npu_lightning_indexer(
            index_query, index_key, weights, sparse_count=4, return_values=1
        )
        return OPS.npu_sparse_flash_attention_antiquant(
            query, rows, rows, indices, 0.25, 1, 2, 2,
            attention_mode=2, quant_scale_repo_mode=1, tile_size=16, rope_head_dim=8,
        )  # fmt: skip


@pytest.fixture(scope="module")
def exported():
    torch.manual_seed(0)
    shapes = ((2, 9, 1, 32), (2, 9, 1, 8), (2, 3, 4, 40), (2, 3, 2, 8), (2, 9, 1, 8), (2, 3, 2))
    args = tuple(torch.randn(s) for s in shapes)
    keys, rows = {0: "batch", 1: "keys"}, {0: "batch", 1: "rows"}
    program = torch.onnx.export(
        Decode().eval(),
        args,
        dynamo=True,
        verbose=False,
        custom_translation_table=sfa_torch.translation_table(),
        dynamic_shapes=(keys, keys, rows, rows, keys, rows),
    )
    return program.model_proto, args


def test_the_exporter_writes_the_contracts_nodes(exported):
    model, args = exported
    onnx.checker.check_model(model, full_check=True)
    kinds = [(n.domain, n.op_type) for n in model.graph.node]
    assert kinds == [
        ("sfa_onnx", "KvCachePack"),
        ("npu", "NPULightningIndexer"),
        ("npu", "NPUSparseFlashAttentionAntiquant"),
    ]
    site = model.graph.node[2]
    assert site.input[1] == site.input[2] == model.graph.node[0].output[0]
    assert {a.name for a in site.attribute} == {
        a.name for a in SPARSE_FLASH_ATTENTION_ANTIQUANT.attributes
    }
    dims = model.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", "rows", 4, 32]
    assert Decode()(*args).shape == (2, 3, 4, 32)


@pytest.mark.parametrize("library", [True, False])
def test_the_exported_model_runs_as_in_eager(exported, library):
    model, args = exported
    portable = make_portable(model)  # the indexer has no kernel of its own
    feeds = {i.name: a.numpy() for i, a in zip(model.graph.input, args, strict=True)}
    plain = ort.InferenceSession(portable.SerializeToString())
    (got,) = runtime.run(portable if library else plain, feeds).values()
    np.testing.assert_allclose(got, Decode()(*args).numpy(), rtol=1e-4, atol=1e-5)


def test_the_package_itself_never_imports_torch():
    code = "import sfa_onnx, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'torch' else real(n, *a)\n"
        "try:\n    import sfa_onnx.torch\nexcept Exception as e: print(type(e).__name__, e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("MissingError sfa_onnx.torch needs torch: pip install")
