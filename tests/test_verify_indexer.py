"""The check of a selection sees what is wrong with a replacement, and compares by scores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import sfa_onnx
from sfa_onnx.passes.candidate import Candidate, Refusal
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.indexer.build import HIDDEN_WEIGHT
from sfa_onnx.passes.indexer.find import find_selections
from sfa_onnx.passes.indexer.same import compare_entries, compare_indices
from sfa_onnx.passes.indexer.verify import SelectionVerifier
from sfa_onnx.report import VerifyRecord
from tests.hand_indexers import CAUSAL, indexer, refused
from tests.indexer_models import Spelling, spelt


@pytest.fixture(scope="module")
def site() -> tuple[SelectionVerifier, Candidate]:
    index = GraphIndex.of(spelt(Spelling(mask="both")))
    (found,) = find_selections(index)
    assert isinstance(found, Candidate)
    return SelectionVerifier(index), found


def operator(nodes: list[onnx.NodeProto]) -> onnx.NodeProto:
    return next(n for n in nodes if n.op_type == "NPULightningIndexer")


def set_mode(nodes: list[onnx.NodeProto], _: list[onnx.TensorProto]) -> None:
    next(a for a in operator(nodes).attribute if a.name == "sparse_mode").i = 0


def swap_weights(nodes: list[onnx.NodeProto], _: list[onnx.TensorProto]) -> None:
    operator(nodes).input[0], operator(nodes).input[1] = operator(nodes).input[1::-1]


def numbers(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., None]:
    def apply(_: list[onnx.NodeProto], tensors: list[onnx.TensorProto]) -> None:
        for tensor in tensors:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(change(array), tensor.name))

    return apply


def unhide(array: np.ndarray) -> np.ndarray:
    return np.zeros_like(array) if (array == np.float32(HIDDEN_WEIGHT)).any() else array


def turn_tail(array: np.ndarray) -> np.ndarray:
    line = array.dtype == np.int32 and array.ndim == 1 and array.size > 2
    return array[::-1].copy() if line else array


WRONG = {
    "not causal": set_mode,
    "padding is seen": numbers(unhide),
    "tail in another order": numbers(turn_tail),
    "query and key swapped": swap_weights,
}


def test_the_selection_itself_is_verified(site: tuple[SelectionVerifier, Candidate]) -> None:
    verifier, candidate = site
    record = verifier.verify(candidate)
    assert isinstance(record, VerifyRecord)
    assert {p.name for p in record.probes} >= {"random", "ties", "short rows"}
    assert all(p.error <= p.bound for p in record.probes)
    assert record.own_rounding == 0.0
    assert 1e-9 < record.margin < 1


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_replacement_is_refused(
    name: str, site: tuple[SelectionVerifier, Candidate]
) -> None:
    verifier, candidate = site
    nodes = copy.deepcopy(candidate.replacement)
    tensors = copy.deepcopy(candidate.replacement_initializers)
    WRONG[name](nodes, tensors)
    wrong = replace(candidate, replacement=nodes, replacement_initializers=tensors)
    assert isinstance(verifier.verify(wrong), Refusal)


SCORES = np.array([[3.0, 1.0, 3.0, -np.inf, 2.0]])


def test_equal_scores_may_be_swapped_only_where_rounding_decides() -> None:
    want, got = np.array([[0, 2, 4]]), np.array([[2, 0, 4]])
    assert compare_indices(SCORES, want, got, exact=False).error == 0.0
    assert "another order" in compare_indices(SCORES, want, got, exact=True).reason


@pytest.mark.parametrize(
    ("got", "reason"),
    [
        ([[0, 2, 2]], "selected twice"),
        ([[0, 2, 5]], "none of the keys"),
        ([[0, 2, 3]], "hidden key"),
        ([[0, 2]], "the indices are"),
    ],
)
def test_what_is_no_selection_is_told(got: list[list[int]], reason: str) -> None:
    found = compare_indices(SCORES, np.array([[0, 2, 4]]), np.array(got), exact=False)
    assert reason in found.reason


def test_another_key_shows_in_the_scores() -> None:
    found = compare_indices(SCORES, np.array([[0, 2, 4]]), np.array([[0, 2, 1]]), exact=False)
    assert found.error > 0.1


def test_rows_may_have_a_longer_tail_but_no_other_keys() -> None:
    want = np.array([[0, 4, -1]])
    assert compare_entries(SCORES, want, np.array([[4, 0, -1, -1]]), exact=True).error == 0.0
    assert compare_entries(SCORES, want, np.array([[0, 4, 1]]), exact=True).reason
    assert compare_entries(SCORES, want, np.array([[0, 1, -1]]), exact=False).error > 0.1


def test_record_names_sizes_that_were_taken_for_equal() -> None:
    """The batch of the keys may be 1 where the file names it apart: nobody has promised that."""
    model = spelt(Spelling(mask="both"))
    del model.graph.value_info[:]
    keys = next(v for v in model.graph.input if v.name == "k")
    keys.type.tensor_type.shape.dim[0].dim_param = "sequences"
    index = GraphIndex.of(model)
    (found,) = find_selections(index)
    assert isinstance(found, Candidate)
    record = SelectionVerifier(index).verify(found)
    assert isinstance(record, VerifyRecord)
    equal = "the sizes batch and sequences are equal: discharged by nobody: the caller of the model"
    assert equal in record.assumptions


def record(hidden: str, **steps: str) -> VerifyRecord:
    (site,) = sfa_onnx.fuse(indexer(hidden=hidden, **steps)).selections
    assert site.record is not None, site.reason
    return site.record


def test_scores_rounded_on_their_way_are_said_and_counted() -> None:
    """Keys that only rounding makes equal are told apart by the operator: no run shows them all."""
    plain = record(" m = Identity(s)\n")
    assert not [a for a in plain.assumptions if "rounds" in a]
    coarse = record(" m0 = Cast<to=10>(s)\n m = Cast<to=1>(m0)\n")
    told = "the original rounds scores to float16: keys that this makes equal are told apart"
    assert told in coarse.assumptions
    assert any(a.startswith("in float16 the original itself selects") for a in coarse.assumptions)
    assert coarse.own_rounding is not None
    assert 0 < coarse.own_rounding < 0.01


def test_what_hides_by_a_number_that_scores_may_meet_is_said() -> None:
    by = " deep = Constant<value_float={}>()\n m = Where(seen, s, deep)\n"
    told = [a for a in record(CAUSAL + by.format(-1e4)).assumptions if "score more than" in a]
    assert told == ["keys that are seen score more than -10000, by which the original hides others"]
    turned = f"{CAUSAL} n = Neg(s)\n" + by.format(1e4).replace("seen, s,", "seen, n,")
    smallest = " best, indices = TopK<largest=0>(m, five)\n"
    assert told[0] in record(turned, chosen=smallest).assumptions
    assert not [a for a in record(CAUSAL + by.format(-1e30)).assumptions if "more than" in a]


def test_a_number_that_is_added_to_hide_is_refused_with_what_helps() -> None:
    """Rows with fewer keys than are selected list hidden ones by what is left of their scores."""
    added = " n = Neg(far)\n h = Where(seen, zero, n)\n m = Add(s, h)\n"
    hint = refused(indexer(hidden=CAUSAL + added), "the original distinguishes hidden keys")
    assert "-inf" in hint
    assert "masked_fill" in hint
