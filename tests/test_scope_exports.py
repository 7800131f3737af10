"""Control flow as exporters write it: torch.cond, scan, scripted If and loops, onnxscript."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import onnx
import pytest
from onnxscript import FLOAT, script
from onnxscript import opset18 as op

from tests.test_scopes import alike, fused

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

B, S1, N, C, R, S2, K = 2, 3, 4, 16, 8, 24, 6


def attend(q, kv, idx):
    rows = kv.gather(1, idx.flatten(1).unsqueeze(-1).expand(-1, -1, C + R))
    rows = rows.reshape(B, -1, K, C + R)
    p = torch.softmax(torch.matmul(q, rows.transpose(-1, -2)) * 0.2, -1)
    return torch.matmul(p, rows[..., :C])


class Cond(torch.nn.Module):
    """Decode reads the cache, prefill the new rows only."""

    def forward(self, pred, q, past, new, wish):
        def decode(q, past, new, wish):
            return attend(q, torch.cat([past, new], 1), wish.topk(K, -1).indices)

        def prefill(q, past, new, wish):
            kv = torch.cat([past * 0, new], 1)
            return attend(q, kv, wish.topk(K, -1).indices)

        return torch.cond(pred, decode, prefill, (q, past, new, wish))


class Scanned(torch.nn.Module):
    """A scan over the layers' weights and caches."""

    def forward(self, x, weights, caches, wishes):
        def layer(h, given):
            w, kv, wish = given
            q = (h @ w).reshape(B, S1, N, C + R)
            out = attend(q, kv, wish.topk(K, -1).indices).reshape(B, S1, N * C)
            return h + out, out + 0.0

        from torch._higher_order_ops.scan import scan

        return scan(layer, x, (weights, caches, wishes), dim=0)


class ScriptedIf(torch.nn.Module):
    def forward(self, pred: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, wish: torch.Tensor):
        idx = wish.topk(6, -1)[1]
        if bool(pred):
            rows = kv.gather(1, idx.reshape(2, -1, 1).expand(-1, -1, 24)).reshape(2, 3, 6, 24)
            p = torch.softmax(torch.matmul(q, rows.transpose(-1, -2)) * 0.2, -1)
            out = torch.matmul(p, rows[..., :16])
        else:
            out = q[..., :16] * 2.0
        return out


class ScriptedLoop(torch.nn.Module):
    """The cache grows by a row in every step; the exporter declares the sizes of the first."""

    def forward(self, q: torch.Tensor, kv: torch.Tensor, steps: int):
        out = torch.zeros(2, 3, 4, 16)
        for _ in range(steps):
            kv = torch.cat([kv, kv[:, -1:] * 0.5 + 0.1], 1)
            idx = torch.matmul(q.mean(2), kv.transpose(-1, -2)).topk(6, -1)[1]
            rows = kv.gather(1, idx.reshape(2, -1, 1).expand(-1, -1, 24)).reshape(2, 3, 6, 24)
            p = torch.softmax(torch.matmul(q + out.mean(), rows.transpose(-1, -2)) * 0.2, -1)
            out = out + torch.matmul(p, rows[..., :16])
        return out, kv


def export(module, args, path, scripted):
    """The exported model, and the feeds that are the arguments."""
    module = module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            if scripted:
                torch.onnx.export(
                    torch.jit.script(module), args, path, dynamo=False, opset_version=17,
                    input_names=[f"in{i}" for i in range(len(args))],
                )  # fmt: skip
            else:
                torch.onnx.export(module, args, path, dynamo=True, verbose=False)
        finally:
            logging.disable(logging.NOTSET)
    model = onnx.load(path)
    given = [a.numpy() if isinstance(a, torch.Tensor) else np.array(a) for a in args]
    return model, dict(zip((v.name for v in model.graph.input), given, strict=True))


def arguments(module):
    torch.manual_seed(0)
    r = torch.randn
    q, kv, wish = r(B, S1, N, C + R), r(B, S2, C + R), r(B, S1, S2)
    if module is Cond:
        return torch.tensor(True), q, r(B, S2 - S1, C + R), r(B, S1, C + R), wish
    if module is Scanned:
        return r(B, S1, N * C), r(3, N * C, N * (C + R)), r(3, B, S2, C + R), r(3, B, S1, S2)
    if module is ScriptedIf:
        return torch.tensor(True), q, kv, wish
    return q, kv, 3


@pytest.mark.parametrize(
    ("module", "sites", "scope"),
    [
        (Cond, 2, "cond__0.then_branch"),
        (Scanned, 1, "scan__1.body"),
        (ScriptedIf, 1, "/If.then_branch"),
        (ScriptedLoop, 1, "/Loop.body"),
    ],
)
def test_exported_control_flow(tmp_path, module, sites, scope):
    scripted = module.__name__.startswith("Scripted")
    model, feeds = export(module(), arguments(module), tmp_path / "m.onnx", scripted)
    assert {"If", "Loop", "Scan"} & {n.op_type for n in model.graph.node}
    report = fused(model, sites)
    assert report.fused[0].scope.endswith(scope)
    alike(model, report.model, feeds)
    first = next(iter(feeds))
    if feeds[first].dtype == np.bool_:
        alike(model, report.model, feeds | {first: np.array(False)})


@script()
def decode(q: FLOAT[3, 4, 24], kv: FLOAT[20, 24], wish: FLOAT[3, 20]) -> FLOAT[3, 4, 16]:
    scale = op.Constant(value_float=0.2)
    k = op.Constant(value_ints=[6])
    _, idx = op.TopK(wish, k, axis=-1)
    out = op.Expand(op.Constant(value_float=0.0), op.Constant(value_ints=[3, 4, 16]))
    steps = op.Constant(value_int=2)
    for _i in range(steps):
        rows = op.Gather(kv, idx, axis=0)
        scores = op.Mul(op.MatMul(q, op.Transpose(rows, perm=[0, 2, 1])), scale)
        p = op.Softmax(scores, axis=-1)
        value = op.Slice(
            rows,
            op.Constant(value_ints=[0]),
            op.Constant(value_ints=[16]),
            op.Constant(value_ints=[2]),
        )
        out = op.Add(out, op.MatMul(p, value))
    return op.Identity(out)


def test_a_loop_written_in_onnxscript():
    """What every run shares is selected outside."""
    model = decode.to_model_proto()
    report = fused(model, 1)
    assert report.fused[0].scope.endswith(".body")
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("q", (3, 4, 24)), ("kv", (20, 24)), ("wish", (3, 20)))
    }
    alike(model, report.model, feeds)
