"""Which keys a TopK takes: the smallest of turned scores, along any axis, the first of a sort."""

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


ALL = " z = Shape<start=1, end=2>(k)\n"
SORTS = {
    "sorted": " best, order = TopK(m, z)\n indices = Slice(order, none, five, two)\n",
    "of turned scores": " n = Neg(m)\n best, order = TopK<largest=0>(n, z)\n"
    " indices = Slice(order, none, five, last)\n",
    "cast": " best, order = TopK(m, z)\n o = Cast<to=6>(order)\n"
    " i = Slice(o, none, five, two)\n indices = Cast<to=7>(i)\n",
}


def sort(chosen: str, mask: str = CAUSAL, keys: str = "T") -> onnx.ModelProto:
    hidden = f"{mask}{ALL} m = {'Where(seen, s, low)' if mask else 'Identity(s)'}\n"
    return indexer(keys=keys, hidden=hidden, chosen=chosen)


@pytest.mark.parametrize("kind", SORTS)
@pytest.mark.parametrize("mask", [CAUSAL, ""], ids=["causal", "open"])
def test_the_first_of_a_sort_are_selected(kind: str, mask: str) -> None:
    model = sort(SORTS[kind], mask)
    report = fused(model)
    given = feeds(model, 2, 2, 3)  # fewer keys than are asked for
    want, got = (runtime.run(m, given)["indices"] for m in (model, report.model))
    assert want.shape == (2, 2, 3)
    np.testing.assert_array_equal(want, got)


def test_the_first_of_a_sort_may_be_gathered() -> None:
    numbers = " g = Constant<value_ints=[0, 1, 2, 3, 4]>()\n"
    fused(sort(f" best, order = TopK(m, z)\n{numbers} indices = Gather<axis=-1>(order, g)\n"))


def test_a_sort_of_fixed_sizes_is_cut_as_well() -> None:
    fused(sort(SORTS["sorted"], keys="12"))


NOT_THE_FIRST = {
    "from the second on": " indices = Slice(order, one, five, two)\n",
    "every second": " indices = Slice(order, none, five, two, two)\n",
    "gathered otherwise": " g = Constant<value_ints=[0, 2, 1]>()\n"
    " indices = Gather<axis=2>(order, g)\n",
    "gathered rows": " g = Constant<value_ints=[0, 1]>()\n indices = Gather<axis=1>(order, g)\n",
    "but the last": " indices = Slice(order, none, last, two)\n",
    "of rows": " indices = Slice(order, none, two, one)\n",
    "two cuts": " a = Slice(order, none, two, two)\n b = Slice(order, none, five, two)\n"
    " indices = Concat<axis=2>(a, b)\n",
    "read as a whole": " a = Slice(order, none, five, two)\n b = Slice(order, one, two, two)\n"
    " c = ReduceMax<axes=[2]>(order)\n d = Add(a, c)\n indices = Add(d, b)\n",
    "all": " indices = Identity(order)\n",
}


@pytest.mark.parametrize("kind", NOT_THE_FIRST)
def test_other_parts_of_a_sort_are_refused(kind: str) -> None:
    refused(sort(f" best, order = TopK(m, z)\n{NOT_THE_FIRST[kind]}"), "")


def test_keys_without_an_order_have_no_first_ones() -> None:
    refused(sort(SORTS["sorted"].replace("TopK(", "TopK<sorted=0>(")), "how many keys")
