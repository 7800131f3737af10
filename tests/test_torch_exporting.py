"""Exports of models that call the operators, under every name, by both exporters."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx import runtime  # noqa: E402
from sfa_onnx.operator.op import ALL_OPS, SPARSE_FLASH_ATTENTION  # noqa: E402
from sfa_onnx.torch.tensors import as_numpy, as_torch  # noqa: E402
from sfa_onnx.torch.vendor import vendor_operators  # noqa: E402
from tests.attention_cases import make_case  # noqa: E402

pytestmark = pytest.mark.torch
NAMES = (
    "custom::npu_sparse_flash_attention_antiquant",
    "npu::npu_kv_quant_sparse_flash_attention",
    "sfa_onnx::npu_sparse_flash_attention_antiquant",
    "custom::npu_sparse_flash_attention",
    "npu::npu_sparse_flash_attention",
    "sfa_onnx::npu_sparse_flash_attention",
)
SCRIPTED = hasattr(torch.onnx, "register_custom_op_symbolic")


@pytest.fixture(scope="module", autouse=True)
def enabled():
    sfa_torch.enable_ascend_names(rounding="exact")
    yield
    sfa_torch.enable_ascend_names()


class Call(torch.nn.Module):
    """One call of a name with tensors in order and attributes fixed."""

    def __init__(self, qualified, case):
        super().__init__()
        namespace, name = qualified.split("::")
        self.call = getattr(getattr(torch.ops, namespace), name).default
        known = [a.name for a in self.call._schema.arguments]
        self.inputs = [n for n in case.inputs if n in known]
        self.attributes = {n: v for n, v in case.attributes.items() if n in known}

    def forward(self, *tensors):
        given = dict(zip(self.inputs, tensors, strict=True)) | self.attributes
        result = self.call(**given)
        return result if isinstance(result, torch.Tensor) else result[0]


def case_of(qualified, **kw):
    if "quant" in qualified:
        return make_case(dtype=np.float16, **kw)
    return make_case(SPARSE_FLASH_ATTENTION, dtype=np.float16, **kw)


def exported(qualified, case, path, **kw):
    module = Call(qualified, case).eval()
    args = tuple(as_torch(case.inputs[n]) for n in module.inputs)
    sfa_torch.export(module, args, path, input_names=module.inputs, **kw)
    return module, onnx.load(path)


def check_runs(model, module, case):
    onnx.checker.check_model(model, full_check=True)
    sites = [n for n in model.graph.node if n.domain == "npu"]
    assert [n.op_type for n in sites] == [case.op.name]
    assert sites[0].input[1] == sites[0].input[2]
    assert {a.name for a in sites[0].attribute} == {a.name for a in case.op.attributes}
    feeds = {i.name: case.inputs[i.name] for i in model.graph.input}
    (got,) = runtime.run(model, feeds).values()
    want = as_numpy(module(*(as_torch(case.inputs[n]) for n in module.inputs)))
    np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize("qualified", NAMES)
def test_every_name_becomes_the_canonical_node(qualified, tmp_path):
    case = case_of(qualified)
    module, model = exported(qualified, case, tmp_path / "m.onnx")
    check_runs(model, module, case)


@pytest.mark.skipif(not SCRIPTED, reason="this torch has no TorchScript exporter")
@pytest.mark.parametrize("qualified", NAMES)
def test_the_torchscript_exporter_too(qualified, tmp_path):
    case = case_of(qualified)
    module, model = exported(qualified, case, tmp_path / "m.onnx", dynamo=False)
    check_runs(model, module, case)


def test_open_sizes_stay_open_and_other_sizes_run(tmp_path):
    qualified = NAMES[0]
    dims = {
        "query": {0: "batch", 1: "tokens"},
        "key": {0: "pages"},
        "sparse_indices": {0: "batch", 1: "tokens", 3: "count"},
        "block_table": {0: "batch", 1: "columns"},
        "actual_seq_lengths_query": {0: "batch"},
        "actual_seq_lengths_kv": {0: "batch"},
    }
    case = case_of(qualified)
    module = Call(qualified, case).eval()
    module.inputs.remove("value")
    module.forward = lambda *t: module.call(**dict(zip(module.inputs, t)), value=t[module.inputs.index("key")], **module.attributes)  # noqa: B905, E501  # fmt: skip
    args = tuple(as_torch(case.inputs[n]) for n in module.inputs)
    shapes = (tuple(dims[n] for n in module.inputs),)
    sfa_torch.export(module, args, tmp_path / "m.onnx", input_names=module.inputs,
                     dynamic_shapes=shapes)  # fmt: skip
    model = onnx.load(tmp_path / "m.onnx")
    shape = model.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", "tokens", 4, 32]
    other = case_of(qualified, batch=2, s1=4, count=7, s2=30, seed=9)
    feeds = {i.name: other.inputs[i.name] for i in model.graph.input}
    (got,) = runtime.run(model, feeds).values()
    want = as_numpy(module(*(as_torch(other.inputs[n]) for n in module.inputs)))
    np.testing.assert_array_equal(np.asarray(got), want)


class WithSoftmax(torch.nn.Module):
    """The float attention, asked for its softmax and not asked, by both overloads."""

    def __init__(self, case):
        super().__init__()
        self.attributes = dict(case.attributes)
        del self.attributes["return_softmax_lse"]

    def forward(self, query, key, sparse_indices, query_rope, key_rope):
        call = torch.ops.sfa_onnx.npu_sparse_flash_attention
        given = self.attributes | {"query_rope": query_rope, "key_rope": key_rope}
        asked = call(query, key, key, sparse_indices, **given, return_softmax_lse=1)
        _, empty, _ = call(query, key, key, sparse_indices, **given, return_softmax_lse=0)
        return (*asked, empty, call(query, key, key, sparse_indices, **given))


@pytest.mark.parametrize("dynamo", [True, pytest.param(False, marks=pytest.mark.skipif(
    not SCRIPTED, reason="this torch has no TorchScript exporter"))])  # fmt: skip
def test_the_softmax_is_exported_where_it_is_asked_for(dynamo, tmp_path):
    case = make_case(SPARSE_FLASH_ATTENTION, ("BSND", "BSND"), dtype=np.float16, lengths=False)
    names = ["query", "key", "sparse_indices", "query_rope", "key_rope"]
    args = tuple(as_torch(case.inputs[n]) for n in names)
    module, path = WithSoftmax(case).eval(), tmp_path / "m.onnx"
    sfa_torch.export(module, args, path, input_names=names, dynamo=dynamo)
    asked = [
        a.i for n in onnx.load(path).graph.node for a in n.attribute
        if a.name == "return_softmax_lse"
    ]  # fmt: skip
    assert set(asked) == {0, 1}
    results = runtime.run(str(path), {n: case.inputs[n] for n in names})
    for got, want in zip(results.values(), module(*args), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(np.asarray(got, np.float64), want.double(), rtol=1e-5)


class Indexers(torch.nn.Module):
    """Both vendors' indexers of one call each."""

    def forward(self, query, key, weights, quant_query, quant_key, half, q_scale, k_scale):
        count = {"sparse_count": 4}
        one = torch.ops.custom.npu_lightning_indexer(query, key, weights, **count)
        two, values = torch.ops.npu.npu_lightning_indexer(
            query, key, weights, **count, return_value=True
        )
        three, _ = torch.ops.npu.npu_lightning_indexer(query, key, weights, **count)
        quant = (quant_query, quant_key, half, q_scale, k_scale)
        four = torch.ops.custom.npu_lightning_indexer_quant(*quant, **count)
        five = torch.ops.npu.npu_quant_lightning_indexer(*quant, 0, 0, **count)
        return one, two, values, three, four, five


@pytest.mark.parametrize("dynamo", [True, pytest.param(False, marks=pytest.mark.skipif(
    not SCRIPTED, reason="this torch has no TorchScript exporter"))])  # fmt: skip
def test_the_indexers_are_exported_and_run(dynamo, tmp_path):
    torch.manual_seed(0)
    shapes = ((2, 3, 4, 8), (2, 9, 1, 8), (2, 3, 4))
    floats = [torch.randn(s) for s in shapes]
    quant = [torch.randint(-100, 100, s).to(torch.int8) for s in shapes[:2]]
    halves = [torch.rand(s).half() for s in (shapes[2], shapes[2], shapes[1][:-1])]
    args = (*floats, *quant, *halves)
    names = ["query", "key", "weights", "quant_query", "quant_key", "half", "q_scale", "k_scale"]
    path = tmp_path / "m.onnx"
    sfa_torch.export(Indexers().eval(), args, path, input_names=names, dynamo=dynamo)
    kinds = [n.op_type for n in onnx.load(path).graph.node if n.domain == "npu"]
    assert kinds.count("NPULightningIndexer") >= 2  # equal calls may become one
    assert kinds.count("NPUQuantLightningIndexer") >= 1
    feeds = {n: a.numpy() for n, a in zip(names, args, strict=True)}
    results = runtime.run(str(path), feeds)
    for got, want in zip(results.values(), Indexers()(*args), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), want.double(), rtol=1e-5)


def real_size(qualified):
    case = make_case(
        dtype=np.float16, batch=2, s1=1, heads=16, s2=64, count=32, block_size=16,
        nope=512, rope=64, tile=128,
    )  # fmt: skip
    return case


def test_an_export_is_handed_to_atc(tmp_path):
    case = real_size(NAMES[1])
    path = tmp_path / "m.onnx"
    exported(NAMES[1], case, path)
    done = subprocess.run(
        [sys.executable, "-m", "sfa_onnx", "atc", str(path), "--soc-version", "Ascend910B2",
         "-o", str(tmp_path / "out"), "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report
    flavour = onnx.load(tmp_path / "out" / "model.atc.onnx", load_external_data=False)
    assert "NPUKvQuantSparseFlashAttention" in [n.op_type for n in flavour.graph.node]


def test_the_plain_exporter_with_the_table():
    case = case_of(NAMES[0])
    module = Call(NAMES[0], case).eval()
    args = tuple(as_torch(case.inputs[n]) for n in module.inputs)
    program = torch.onnx.export(
        module, args, dynamo=True, verbose=False,
        custom_translation_table=sfa_torch.translation_table(),
    )  # fmt: skip
    kinds = {n.op_type for n in program.model_proto.graph.node}
    assert kinds == {"NPUSparseFlashAttentionAntiquant"}
    overloads = {str(o) for o in sfa_torch.translation_table()}
    # A cache write is no call of torch's; the float attention has two overloads of ours.
    assert len(overloads) == len(vendor_operators()) + len(ALL_OPS)
    assert "sfa_onnx.npu_sparse_flash_attention.lse" in overloads


@pytest.mark.parametrize("dynamo", [True, pytest.param(False, marks=pytest.mark.skipif(
    not SCRIPTED, reason="this torch has no TorchScript exporter"))])  # fmt: skip
def test_softmax_results_that_no_node_has_are_refused(dynamo, tmp_path):
    qualified = "_C_ascend::npu_kv_quant_sparse_flash_attention"
    case = case_of(qualified)
    module, model = exported(qualified, case, tmp_path / "m.onnx", dynamo=dynamo)
    check_runs(model, module, case)
    module.attributes["return_softmax_lse"] = True
    args = tuple(as_torch(case.inputs[n]) for n in module.inputs)
    with pytest.raises(Exception, match="return_softmax_lse: expected False in an export"):
        sfa_torch.export(module, args, tmp_path / "n.onnx", dynamo=dynamo)
