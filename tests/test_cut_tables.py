"""Masks cut from a buffer of the module at sizes of the inputs: `causal[S2 - S1 : S2, :S2]`."""

import numpy as np
import onnx
import pytest
import torch

import sfa_onnx
from tests.zoo.judge import run_fused, run_original

pytestmark = pytest.mark.torch

WIDTH, VALUE, K = 24, 16, 5
CUTS = {
    "rows of the newest tokens": lambda table, s1, s2: table[s2 - s1 : s2, :s2],
    "the last rows": lambda table, s1, s2: table[:s2, :s2][-s1:],
    "rows by index": lambda table, s1, s2: table[torch.arange(s2 - s1, s2)][:, :s2],
    "one row late": lambda table, s1, s2: table[s2 - s1 + 1 : s2 + 1, :s2],
    "the first rows": lambda table, s1, s2: table[:s1, :s2],
}


class _Buffered(torch.nn.Module):
    """A selection scattered into a mask, and a causal buffer longer than any input."""

    def __init__(self, size, cut):
        super().__init__()
        self.register_buffer("causal", torch.tril(torch.ones(size, size, dtype=torch.bool)))
        self.cut = CUTS[cut]

    def forward(self, kv, indices, query):
        s1, s2 = query.shape[1], kv.shape[1]
        chosen = torch.zeros(query.shape[0], s1, s2).scatter(-1, indices, 1.0).bool()
        keep = chosen & self.cut(self.causal, s1, s2)
        scores = torch.einsum("bshd,btd->bsht", query, kv) * 0.2
        scores = scores.masked_fill(~keep.unsqueeze(2), float("-inf"))
        return torch.einsum("bsht,btd->bshd", scores.softmax(-1), kv[..., :VALUE])


def _inputs(batch, s1, s2):
    others = torch.rand(batch, s1, s2 - 1).argsort(-1)[..., : K - 1] + 1
    indices = torch.cat([torch.zeros(batch, s1, 1, dtype=torch.long), others], -1)
    return torch.randn(batch, s2, WIDTH), indices, torch.randn(batch, s1, 2, WIDTH)


@pytest.mark.parametrize("size", [64, 1100], ids=["read", "too-large-to-read"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_mask_cut_from_a_buffer_is_asked_at_the_selected_keys(size, cut, tmp_path):
    names, path = ["kv", "indices", "query"], tmp_path / "m.onnx"
    axes = {"kv": {0: "b", 1: "t"}, "indices": {0: "b", 1: "s"}, "query": {0: "b", 1: "s"}}
    torch.onnx.export(
        _Buffered(size, cut),
        _inputs(2, 3, 20),
        path,
        input_names=names,
        dynamic_axes=axes,
        opset_version=18,
        dynamo=False,
    )
    model = onnx.load(path)
    report = sfa_onnx.fuse(model)
    assert len(report.fused) == 1, report.sites[0].reason
    for sizes in ((2, 3, 20), (1, 1, 33), (3, 6, 50)):
        feeds = {name: value.numpy() for name, value in zip(names, _inputs(*sizes), strict=True)}
        (want,), (got,) = run_original(model, feeds), run_fused(report.model, feeds)
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-6)


_GATHERED = """<ir_version: 8, opset_import: ["" : 17]>
site (float[B,2,6] wish, float[B,2,3,24] query, float[B,6,24] kv) => (float[B,2,3,24] o)
<int64[1] k={3}, int64[1] last={-1}, int64[1] two={2}, float by={0.2}> {
 best, idx = TopK(wish, k)
 at = Unsqueeze(idx, last)
 rows = GatherND<batch_dims=1>(kv, at)
 shape = Shape(wish)
 wide = Expand(table, shape)
 low = GatherElements<axis=-1>(wide, idx)
 low4 = Unsqueeze(low, two)
 s = Einsum<equation="bsnc,bskc->bsnk">(query, rows)
 scaled = Mul(s, by)
 masked = Add(scaled, low4)
 p = Softmax<axis=-1>(masked)
 o = Einsum<equation="bsnk,bskc->bsnc">(p, rows)
}"""


@pytest.mark.parametrize(
    ("lows", "reason"),
    [
        ([-1e9] * 6, "hides every key of a row"),
        ([-1e9, -1e4] * 3, "hides every key of a row"),
        ([0.0] + [-1e9] * 5, ""),
        ([-np.inf] * 6, ""),
    ],
)
def test_a_table_that_shows_a_row_no_key_hides_them_all_by_infinity(lows, reason):
    model = onnx.parser.parse_model(_GATHERED)
    table = np.array([[0.0] * 5 + [-1e9], lows], np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    (site,) = sfa_onnx.fuse(model).sites
    assert (site.status == "refused") == bool(reason)
    assert reason in site.reason
