"""A glance at all nodes says "sound" only where a look at each node would; and it mostly does."""

from __future__ import annotations

import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, helper

from sfa_onnx.errors import BudgetError
from sfa_onnx.files import sound
from sfa_onnx.files.columns import Columns, counts, rows
from sfa_onnx.files.names import escape_names, is_utf8
from sfa_onnx.files.sound_glance import free_values, serialised, unseen_tensors
from sfa_onnx.files.sound_nodes import NodeRules
from tests import big_model
from tests.broken_models import BROKEN
from tests.broken_models import sound as sound_model
from tests.fuzz.corpus import seeds
from tests.fuzz.mutate import mutant


@pytest.fixture(scope="module")
def models():
    """What mutations start from."""
    return list(seeds())


def judged(call, *args):
    """What is wrong, or the budget that is exceeded."""
    try:
        return call(*args)
    except BudgetError as error:
        return [str(error)]


def looked_at_each(monkeypatch, model):
    """What is wrong with a model, found without a glance."""
    with monkeypatch.context() as patch:
        patch.setattr(sound, "free_values", lambda *_: None)
        patch.setattr(sound, "unseen_tensors", lambda tensors, _: tensors)
        return sound.problems(model)


def glance(model, monkeypatch):
    """Whether no graph of the model needed a look at each node."""
    walked = []
    each = sound._Reader._each
    with monkeypatch.context() as patch:
        patch.setattr(sound._Reader, "_each", lambda self, *a: walked.append(1) or each(self, *a))
        assert sound.problems(model) == []
    return not walked


def test_mutants_are_judged_alike(models, monkeypatch):
    broken = 0
    for number in range(600):
        try:
            model = onnx.ModelProto.FromString(data := mutant(models, number))
        except DecodeError:
            continue
        if not is_utf8(data):
            escape_names(model)
        whole = judged(sound.problems, model, 0)
        parts = judged(sound.problems, model, 1 << 40)  # nodes one after the other
        each = judged(looked_at_each, monkeypatch, model)
        assert whole == parts == each, number
        broken += bool(whole)
    assert 100 < broken < 500


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rules_are_found_alike(name, monkeypatch):
    model = sound_model()
    BROKEN[name][0](model)
    assert sound.problems(model) == looked_at_each(monkeypatch, model) != []


def test_sound_seeds_need_a_glance_only(models, monkeypatch):
    for name, model in models:
        if not name.startswith("broken-"):
            assert glance(model, monkeypatch), name


def test_tensors_in_files_need_a_glance_only():
    graph = big_model.build(layers=4, experts=2, filler=1).graph
    _, data = serialised(graph, small=True)
    left = unseen_tensors(graph.initializer, data)
    assert {t.name for t in left} == {t.name for t in graph.initializer if not t.external_data}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("offset", value) for value in ("12kb", "-1", "", "\u0663", "\0")),
        *(("length", "6"), ("location", ""), ("location", "a\0b"), ("checksum", "x")),
    ],
)
def test_one_odd_tensor_among_many_is_looked_at(key, value):
    graph = big_model.build(layers=4, experts=2, filler=1).graph
    odd = [t for t in graph.initializer if t.external_data][3]
    entry = next((e for e in odd.external_data if e.key == key), None) or odd.external_data.add()
    entry.key, entry.value = key, value
    _, data = serialised(graph, small=True)
    assert odd.name in {t.name for t in unseen_tensors(graph.initializer, data)}


def test_names_that_look_like_a_mark_are_no_surprise():
    nodes = [helper.make_node("Relu", ["\0"], ["\0"]), helper.make_node("Relu", ["a"], ["b"])]
    data = [node.SerializeToString() for node in nodes]
    assert free_values(nodes, data, ["a"], NodeRules({"": 17}), lambda _: {}) is None


def test_free_values_are_told_with_who_reads_them():
    nodes = [helper.make_node("Add", ["a", "w"], ["b"]), helper.make_node("Mul", ["b", "w"], ["c"])]
    data = [node.SerializeToString() for node in nodes]
    rules = NodeRules({"": 17})
    known, free = free_values(nodes, data, ["a"], rules, lambda _: {})
    assert list(known) == ["a", "b", "c"]
    assert free == {"w": nodes[0]}
    assert free_values(nodes[::-1], data[::-1], ["a"], rules, lambda _: {}) is None  # unsorted


def test_columns_hold_every_message():
    columns = Columns(NodeProto.DESCRIPTOR, ("input", "attribute"), single=("op_type",))
    nodes = [
        helper.make_node("Concat", ["a", "", "b"], ["c"], axis=1),
        helper.make_node("Shape", [], ["d"]),
        helper.make_node("Relu", ["c"], ["e"]),
    ]
    read = columns.read(nodes)
    assert read["input"] == ["a", "", "b", "\0", "\0", "c", "\0"]
    assert counts(read["input"], "\0") == [3, 0, 1]
    assert list(rows(read["input"], [3, 0, 1])) == [["a", "", "b"], [], ["c"]]
    assert read["op_type"] == ["Concat", "Shape", "Relu"]
    assert [len(r) for r in rows(read["attribute"], counts(read["attribute"], b"\0"))] == [1, 0, 0]
    assert columns.read([NodeProto(input=["x"])]) is None  # it has no operator
    assert columns.read([]) == {"input": [], "attribute": [], "op_type": []}
    assert counts([], "\0") == []


def test_numbers_have_a_column_too():
    columns = Columns(TensorProto.DESCRIPTOR, ("dims",), single=("data_type",))
    tensors = [TensorProto(dims=d, data_type=1) for d in ([], [2, 3], [1 << 40])]
    read = columns.read(tensors)
    assert read == {"dims": [-1, 2, 3, -1, 1 << 40, -1], "data_type": [1, 1, 1]}
    assert columns.read([TensorProto(dims=[-1], data_type=1)]) is None
