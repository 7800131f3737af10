"""One model that calls every name there is: exported by both exporters, run, handed to ATC."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

import sfa_onnx.torch as sfa_torch  # noqa: E402
from sfa_onnx import runtime  # noqa: E402
from sfa_onnx.torch.ops import NAMESPACE, OPERATORS  # noqa: E402
from sfa_onnx.torch.tensors import as_numpy, as_torch  # noqa: E402
from sfa_onnx.torch.vendor import vendor_operators  # noqa: E402
from tests.attention_cases import make_case  # noqa: E402
from tests.indexer_cases import indexer_call  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.kernel]
SCRIPTED = hasattr(torch.onnx, "register_custom_op_symbolic")
NAMES = [(v.qualified, v.op) for v in vendor_operators()]
NAMES += [(f"{NAMESPACE}::{n}", op) for n, op in OPERATORS.items() if op.name != "KvCachePack"]
REAL = {"nope": 512, "rope": 64, "heads": 16, "s2": 48, "count": 16}


def arguments(op, batch, seed):
    """Inputs and attributes of one call over pages, in the NPU's sizes."""
    if "Indexer" in op.name:
        layouts = ("BSND", "PA_BSND")
        return indexer_call(op, layouts, np.float16, seed, whole=True, heads=64, width=128)
    packed = {"tile": 128} if "Antiquant" in op.name else {}
    case = make_case(op, dtype=np.float16, batch=batch, seed=seed, **REAL, **packed)
    return case.inputs, case.attributes


class Everything(torch.nn.Module):
    """Each name once, with inputs of its own where equal ones would merge the calls."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, *tensors):
        results, at = [], 0
        for packet, names, attributes in self.calls:
            given = dict(zip(names, tensors[at : at + len(names)], strict=True))
            at += len(names)
            if "sparse_indices" in given:
                given["value"] = given["key"]
            result = packet(**given, **attributes)
            results.append(result if isinstance(result, torch.Tensor) else result[0])
        return tuple(results)


@pytest.fixture(scope="module")
def everything():
    sfa_torch.enable_ascend_names(rounding="exact")
    calls, tensors, names = [], [], []
    for number, (qualified, op) in enumerate(NAMES):
        namespace, name = qualified.split("::")
        packet = getattr(getattr(torch.ops, namespace), name).default
        known = {a.name for a in packet._schema.arguments}
        inputs, attributes = arguments(op, 2, number)
        chosen = [n for n in inputs if n in known and n != "value"]
        calls.append((packet, chosen, {n: v for n, v in attributes.items() if n in known}))
        tensors += [as_torch(inputs[n]) for n in chosen]
        names += [f"{n}_{number}" for n in chosen]
    yield Everything(calls).eval(), tuple(tensors), names
    sfa_torch.enable_ascend_names()


@pytest.mark.parametrize("dynamo", [True, pytest.param(False, marks=pytest.mark.skipif(
    not SCRIPTED, reason="this torch has no TorchScript exporter"))])  # fmt: skip
def test_every_name_is_exported_run_and_handed_to_atc(everything, dynamo, tmp_path):
    model, tensors, names = everything
    path = tmp_path / "m.onnx"
    sfa_torch.export(model, tensors, path, input_names=names, dynamo=dynamo)
    made = onnx.load(path)
    onnx.checker.check_model(made, full_check=True)
    kinds = Counter(n.op_type for n in made.graph.node if n.domain == "npu")
    assert kinds == Counter(op.name for _, op in NAMES)
    taken = {i.name for i in made.graph.input}
    feeds = {n: as_numpy(t) for n, t in zip(names, tensors, strict=True) if n in taken}
    for got, want in zip(runtime.run(made, feeds).values(), model(*tensors), strict=True):
        np.testing.assert_array_equal(np.asarray(got), as_numpy(want))
    done = subprocess.run(
        [sys.executable, "-m", "sfa_onnx", "atc", str(path), "--soc-version", "Ascend910B2",
         "-o", str(tmp_path / "out"), "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert (report["errors"], done.returncode) == ([], 0), done.stderr
    flavour = onnx.load(tmp_path / "out" / "model.atc.onnx", load_external_data=False)
    written = Counter(n.op_type for n in flavour.graph.node)
    kinds["NPUKvQuantSparseFlashAttention"] = kinds.pop("NPUSparseFlashAttentionAntiquant")
    assert {n: written[n] for n in kinds} == dict(kinds)
