"""Which keys a TopK takes: the smallest of turned scores, along any axis."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sfa_onnx import runtime
from tests.hand_indexers import CAUSAL, feeds, fused, indexer, refused

pytestmark = pytest.mark.kernel
SMALLEST = " best, indices = TopK<largest=0>(m, five)\n"
TURNED = {
    "scores": " m = Neg(s)\n",
    "weights": " m = Mul(s, minus)\n",
    "subtracted": " m = Sub(zero, s)\n",
    "masked in front": f"{CAUSAL} m0 = Where(seen, s, low)\n m = Neg(m0)\n",
    "masked behind": f"{CAUSAL} m0 = Neg(s)\n m = Where(seen, m0, high)\n",
    "masked far away": f"{CAUSAL} m0 = Neg(s)\n m = Where(seen, m0, far)\n",
    "added": f"{CAUSAL} h = Where(seen, zero, low)\n m0 = Add(s, h)\n m = Neg(m0)\n",
    "padding": f"{CAUSAL} p0 = Unsqueeze(kept, one)\n p = And(seen, p0)\n m0 = Where(p, s, low)\n"
    " m = Neg(m0)\n",
}


@pytest.mark.parametrize("kind", TURNED)
def test_the_smallest_of_turned_scores_are_the_largest(kind: str) -> None:
    more = ", bool[B,T] kept" if kind == "padding" else ""
    fused(indexer(more, hidden=TURNED[kind], chosen=SMALLEST))


def test_ties_go_to_the_first_key_either_way() -> None:
    """Also where all scores are -0: the relu of nothing times a negative weight."""
    model = indexer(hidden=TURNED["scores"], chosen=SMALLEST)
    report = fused(model)
    given = feeds(model, 2, 3, 12) | {"q": np.zeros((2, 3, 3, 8), np.float32)}
    given["k"][1] = np.rint(given["k"][1])
    for fed in (given, given | {"w": -np.abs(given["w"])}):
        want, got = (runtime.run(m, fed)["indices"] for m in (model, report.model))
        assert (want == np.arange(5)).all()
        np.testing.assert_array_equal(want, got)


NOT_TURNED = {
    "as they are": " m = Identity(s)\n",
    "hidden ones first": f"{CAUSAL} m0 = Neg(s)\n m = Where(seen, m0, low)\n",
    "turned twice": " n = Neg(s)\n m = Neg(n)\n",
    "turned for the largest": " m = Neg(s)\n",
}


@pytest.mark.parametrize("kind", NOT_TURNED)
def test_what_is_not_turned_is_refused(kind: str) -> None:
    chosen = SMALLEST if kind != "turned for the largest" else SMALLEST.replace("<largest=0>", "")
    refused(indexer(hidden=NOT_TURNED[kind], chosen=chosen), "")


def placed(axis: int, perm: list[int], mask: str = "", largest: int = 1) -> onnx.ModelProto:
    """Scores [B, S, T] brought to other axes, and selected along the one of the keys."""
    turn = " m0 = Identity(s)\n" if largest else " m0 = Neg(s)\n"
    chosen = f" m = Transpose<perm={perm}>(m2)\n"
    chosen += f" best, indices = TopK<axis={axis}, largest={largest}>(m, five)\n"
    hidden = f"{mask}{turn} m2 = {'Where(seen, m0, low)' if mask else 'Identity(m0)'}\n"
    return indexer(hidden=hidden, chosen=chosen)


@pytest.mark.parametrize(
    ("axis", "perm", "mask", "largest"),
    [
        (1, [0, 2, 1], CAUSAL, 1),
        (-2, [0, 2, 1], "", 0),
        (0, [2, 0, 1], CAUSAL, 1),
        (-3, [2, 1, 0], "", 1),
        (2, [1, 0, 2], CAUSAL, 1),
    ],
)
def test_keys_may_lie_along_any_axis(axis: int, perm: list[int], mask: str, largest: int) -> None:
    fused(placed(axis, perm, mask, largest))


def test_a_selection_among_rows_is_none_of_keys() -> None:
    refused(placed(1, [0, 1, 2]), "")
