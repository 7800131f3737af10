"""Weights of heads: given, learned, of one number, in front of the relu, or none at all."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx import runtime
from tests.hand_indexers import CAUSAL, feeds, fused, indexer, refused

pytestmark = pytest.mark.kernel
HIDDEN = f"{CAUSAL} m = Where(seen, s, low)\n"
LAST = ' x = Einsum<equation="bshd,btd->bsth">(q, k)\n'
VECTOR = np.asarray([0.3, -0.2, 0.9], np.float32)


def learned(*, vector: np.ndarray = VECTOR, **steps: str) -> onnx.ModelProto:
    """An indexer whose heads have weights `v` of the file."""
    model = indexer(hidden=HIDDEN, **steps)
    model.graph.initializer.append(onnx.numpy_helper.from_array(vector, "v"))
    return model


KINDS = {
    "einsum": {"weighed": ' s = Einsum<equation="bsht,h->bst">(r, v)\n', "summed": ""},
    "vector": {"products": LAST, "weighed": " s = MatMul(r, v)\n", "summed": ""},
    "column": {
        "products": LAST,
        "weighed": " v2 = Unsqueeze(v, last)\n s3 = MatMul(r, v2)\n s = Squeeze(s3, last)\n",
        "summed": "",
    },
    "times": {"weighed": " v2 = Unsqueeze(v, last)\n y = Mul(r, v2)\n"},
    "both": {"weighed": " wv = Mul(w, v)\n w4 = Unsqueeze(wv, last)\n y = Mul(r, w4)\n"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_learned_weights_are_the_same_for_every_row(kind: str) -> None:
    fused(learned(**KINDS[kind]))


def test_a_matrix_makes_something_new_of_heads() -> None:
    """Two mixtures of heads, and a relu of them: no weights."""
    mixed = ' y0 = Einsum<equation="bsht,hg->bsgt">(r, v)\n y1 = Relu(y0)\n'
    model = learned(vector=np.ones((3, 2), np.float32), weighed=mixed + " y = Relu(y1)\n")
    assert not [s for s in sfa_onnx.fuse(model).selections if s.status == "fused"]


NONE = {
    "sum": {"weighed": " y = Identity(r)\n"},
    "mean": {"weighed": "", "summed": " s = ReduceMean<axes=[2], keepdims=0>(r)\n"},
    "in front of the relu": {
        "products": " w0 = Softplus(w)\n w5 = Unsqueeze(w0, last)\n q5 = Mul(q, w5)\n"
        " kt = Transpose<perm=[0,2,1]>(k)\n k4 = Unsqueeze(kt, one)\n x = MatMul(q5, k4)\n",
        "weighed": " y = Identity(r)\n",
    },
    "one number": {"weighed": " y = Mul(r, half)\n"},
}


@pytest.mark.parametrize("kind", NONE)
def test_heads_without_weights_have_weights_of_one(kind: str) -> None:
    fused(indexer(hidden=HIDDEN, **NONE[kind]))


def test_every_head_for_itself_is_no_selection_of_all() -> None:
    chosen = " best, chosen = TopK(r, five)\n indices = ReduceMax<axes=[2], keepdims=0>(chosen)\n"
    model = indexer(weighed="", summed="", hidden="", chosen=chosen)
    refused(model, "every head selects keys of its own")


def test_heads_may_be_merged_with_rows_on_the_way() -> None:
    """The size of the rows is read off a tensor that nothing else reads."""
    merged = (
        " z = Shape<end=2>(q)\n flat = Constant<value_ints=[0, -1, 8]>()\n"
        " q3 = Reshape(q, flat)\n kt = Transpose<perm=[0,2,1]>(k)\n x3 = MatMul(q3, kt)\n"
        " h = Constant<value_ints=[3, -1]>()\n z4 = Concat<axis=0>(z, h)\n x = Reshape(x3, z4)\n"
    )
    fused(indexer(hidden=HIDDEN, products=merged))


def test_blocks_in_half_precision_are_joined_as_they_are_stored() -> None:
    text, names = "", []
    for n, key in enumerate(("past", "new")):
        text += f" f{n} = Cast<to=1>({key})\n b{n} = Transpose<perm=[0,2,1]>(f{n})\n"
        text += f" c{n} = Unsqueeze(b{n}, one)\n x{n} = MatMul(qf, c{n})\n"
        names.append(f"x{n}")
    text = f" qf = Cast<to=1>(qh)\n{text} x = Concat<axis=-1>({', '.join(names)})\n"
    more = ", float16[B,S,3,8] qh, float16[B,P,8] past, float16[B,T,8] new"
    model = indexer(more, products=text)
    report = sfa_onnx.fuse(model)
    assert [s.reason for s in report.selections] == [""]
    (joined,) = (n for n in report.model.graph.node if n.op_type == "Concat")
    assert list(joined.input) == ["past", "new"]
    assert "Cast" not in [n.op_type for n in report.model.graph.node[:-2]]
    given = feeds(model, 2, 3, 4, P=9)
    want, got = (runtime.run(m, given)["indices"] for m in (model, report.model))
    np.testing.assert_array_equal(want, got)


@pytest.mark.parametrize(
    ("relu", "noted"),
    [
        (" r = Relu(x)\n", False),
        (" b = Greater(x, zero)\n r = Where(b, x, zero)\n", False),
        (" b = Greater(x, zero)\n f = Cast<to=1>(b)\n r = Mul(x, f)\n", True),
        (" a = Abs(x)\n b = Add(x, a)\n r = Mul(b, half)\n", True),
    ],
    ids=["relu", "where", "switched", "half a sum"],
)
def test_a_relu_that_makes_nan_of_infinity_is_noted(relu: str, noted: bool) -> None:
    (site,) = sfa_onnx.fuse(indexer(relu=relu)).selections
    assert site.record is not None
    assert any(a.startswith("products are finite") for a in site.record.assumptions) == noted
