"""Following a cache through the graph: labels of dims, slices."""

from __future__ import annotations

import onnx
import pytest

from sfa_onnx.kv_convert.trace import _place_units, slice_on
from sfa_onnx.passes.graph.index import GraphIndex


def test_unit_dims_find_their_place_among_the_others() -> None:
    for labels, want in (("BS1", "BS1"), ("SB1", "1SB"), ("SBN", "NSB"), ("1S1", "1S1")):
        axes = ["1", "S", "1"]
        _place_units(axes, {1}, tuple(labels))
        assert "".join(axes) == want, labels


@pytest.mark.parametrize(
    ("inputs", "want"),
    [
        ("a, b", (0, 2, 7, 1)),
        ("a, b, c", (3, 2, 7, 1)),
        ("a, b, c, d", (3, 2, 7, 5)),
        ('a, b, "", d', (0, 2, 7, 5)),
        ("a, x, c, d", None),
        ("both, both", None),
    ],
)
def test_a_slice_is_read_with_what_it_leaves_out(inputs: str, want: object) -> None:
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[n,8,8,8] data, int64[1] x) => (float y)
        <int64[1] a = {{2}}, int64[1] b = {{7}}, int64[1] c = {{3}}, int64[1] d = {{5}},
         int64[2] both = {{1, 2}}> {{ y = Slice(data, {inputs}) }}""")
    assert slice_on(GraphIndex.of(model), model.graph.node[0]) == want
