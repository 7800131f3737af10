"""A glance at all nodes says "sound" only where a look at each node would; and it mostly does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import AttributeProto, NodeProto, StringStringEntryProto, TensorProto, helper

from sfa_onnx.errors import BudgetError
from sfa_onnx.files import fields, same_texts, sound, spans
from sfa_onnx.files.fields import Fields
from sfa_onnx.files.names import escape_names, is_utf8
from sfa_onnx.files.parts import parts_of_graph, parts_of_model
from sfa_onnx.files.sound_glance import free_values, unseen_tensors
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
    for number in range(400):
        try:
            model = onnx.ModelProto.FromString(data := mutant(models, number))
        except DecodeError:
            continue
        if not is_utf8(data):
            escape_names(model)
            data = None
        whole = judged(sound.problems, model)
        with monkeypatch.context() as patch:
            for module in (fields, same_texts):
                patch.setattr(module, "_FEW", 0)  # arrays, however few nodes there are
            patch.setattr(spans, "_LEAST", 64)
            patch.setattr(sound, "_SMALL", 0)  # nodes of bodies serialised one by one
            parts = judged(sound.problems, model, data)
        each = judged(looked_at_each, monkeypatch, model)
        assert whole == parts == each, number
        broken += bool(whole)
    assert 80 < broken < 320


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
    _, tensors = parts_of_graph(graph, small=True)
    left = unseen_tensors(graph.initializer, tensors)
    assert {t.name for t in left} == {t.name for t in graph.initializer if not t.external_data}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("offset", value) for value in ("12kb", "-1", "", "\u0663", "\0")),
        *(("length", "6"), ("location", ""), ("location", "a\0b"), ("no place", "x")),
    ],
)
def test_one_odd_tensor_among_many_is_looked_at(key, value):
    graph = big_model.build(layers=4, experts=2, filler=1).graph
    odd = [t for t in graph.initializer if t.external_data][3]
    entry = next((e for e in odd.external_data if e.key == key), odd.external_data[0])
    entry.key, entry.value = key, value
    _, tensors = parts_of_graph(graph, small=True)
    assert odd.name in {t.name for t in unseen_tensors(graph.initializer, tensors)}


def read(nodes):
    return Fields.of(NodeProto, [node.SerializeToString() for node in nodes])


def test_free_values_are_told_with_who_reads_them():
    nodes = [helper.make_node("Add", ["a", "w"], ["b"]), helper.make_node("Mul", ["b", "w"], ["c"])]
    data = read(nodes)
    rules = NodeRules({"": 17})
    free = free_values(nodes, data, ["a"], ["c", "a", "w", "z"], rules, lambda _: {})
    assert free == {"w": nodes[0], "z": "output 'z'"}
    assert (
        free_values(nodes[::-1], read(nodes[::-1]), ["a"], [], rules, lambda _: {}) is None
    )  # unsorted
    assert free_values(nodes, data, ["a", "b"], [], rules, lambda _: {}) is None  # made twice
    nodes[0].input[0] = "b"
    assert free_values(nodes, read(nodes), ["a"], [], rules, lambda _: {}) is None  # its own result


def some_tensors():
    dims = [[], [2, 3], [1 << 40, -1], *([n] * (n % 7) for n in range(90))]
    tensors = [TensorProto(name="n" * (7 * i), dims=d, data_type=1) for i, d in enumerate(dims)]
    tensors[4].float_data.extend([1.5, 2.5])
    tensors[5].raw_data = b"\xff" * 3000
    tensors[6].metadata_props.add(key="far", value="behind a tag of two bytes")
    tensors[7].ClearField("name")
    return tensors


@pytest.mark.parametrize("few", [0, 32, 1000])
def test_fields_are_those_that_protobuf_reads(few, monkeypatch):
    monkeypatch.setattr(fields, "_FEW", few)
    tensors = some_tensors()
    read = Fields.of(TensorProto, (t.SerializeToString() for t in tensors))
    dims, names, far = (read.column(number) for number in (1, 8, 16))
    assert dims.owner.tolist() == [i for i, t in enumerate(tensors) for _ in t.dims]
    assert dims.value.tolist() == [d for t in tensors for d in t.dims]
    assert dims.counts(len(tensors)).tolist() == [len(t.dims) for t in tensors]
    told = dict(zip(names.owner.tolist(), read.texts(names.begin, names.end), strict=True))
    assert told == {i: t.name.encode() for i, t in enumerate(tensors) if t.HasField("name")}
    (entry,) = read.texts(far.begin, far.end)
    assert entry == tensors[6].metadata_props[0].SerializeToString()
    inner = Fields.within(StringStringEntryProto, read.data, far.begin, far.end)
    assert read.texts(*(getattr(inner.column(1), end) for end in ("begin", "end"))) == [b"far"]
    floats = [TensorProto(float_data=[1.0]), onnx.AttributeProto(name="a", f=0.5, type=1)]
    one = Fields.of(AttributeProto, [m.SerializeToString() for m in floats[1:]] * 40)
    assert one.column(2).end[-1] - one.column(2).begin[-1] == 4  # a float, by its wire type


@pytest.mark.parametrize("few", [0, 32])
def test_what_protobuf_does_not_write_is_not_read(few, monkeypatch):
    monkeypatch.setattr(fields, "_FEW", few)
    nodes = [helper.make_node("Relu", ["c"], ["e"]).SerializeToString() for _ in range(40)]
    name, inputs = NodeProto(name="n").SerializeToString(), NodeProto(input=["x"])
    for odd in (name + inputs.SerializeToString(), b"\x0b\x0c", b"\x00\x00", b"\x20\x04"):
        assert Fields.of(NodeProto, nodes) is not None
        assert Fields.of(NodeProto, [*nodes, odd]) is None
    assert Fields.of(NodeProto, []).column(1).counts(0).tolist() == []


def test_words_are_numbers_of_up_to_eight_bytes():
    read = Fields.of(NodeProto, [b"\x0a\x0aabcdefghij"])
    at = np.array([2, 2, 2, 11, 99])
    words = read.words(at, np.array([10, 3, 0, 1, 0]))
    assert [int(w).to_bytes(8, "big").strip(b"\0")[::-1] for w in words] == [
        *(b"abcdefgh", b"abc", b"", b"j", b"")
    ]


def field(number, content, wire=2):
    """A field as protobuf writes it."""
    return bytes([number << 3 | wire]) + length(len(content)) + content


def length(size):
    head = bytearray()
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes([*head, size])


@pytest.mark.parametrize("seed", range(6))
def test_many_walkers_see_what_one_sees(seed, monkeypatch):
    """Contents that look like fields, tails of messages, long runs of zeros, and random bytes."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(spans, "_LEAST", int(rng.integers(3, 900)))
    monkeypatch.setattr(spans, "_WINDOW", int(rng.integers(1, 600)))
    monkeypatch.setattr(spans, "_HOPS", int(rng.integers(0, 4)))
    kinds = [
        lambda n: field(1, b"x" * n) * int(rng.integers(0, 4)),
        lambda n: field(1, field(1, field(5, b"\n" * (n % 7)))),
        lambda n: bytes(n * 40),
        lambda n: rng.bytes(n * 9),
    ]
    contents = [kinds[rng.integers(4)](int(rng.integers(0, 30))) for _ in range(900)]
    numbers = rng.choice([1, 5, 13], len(contents))
    whole = b"ahead" + b"".join(map(field, numbers.tolist(), contents))
    data = np.frombuffer(whole + b"\x12behind", np.uint8)
    found, begin, end = spans.spans(data, 5, len(whole), b"\x0a\x2a\x6a")
    assert found.tolist() == numbers.tolist()
    assert [whole[b:e] for b, e in zip(begin, end, strict=True)] == contents
    odd = np.frombuffer(whole + field(1, b"1234", wire=5), np.uint8)
    assert spans.spans(odd, 5, len(odd), b"\x0a") is None


@pytest.mark.parametrize("longest", [3, 8, 40, 300])
def test_equal_texts_have_one_number(longest, monkeypatch):
    rng = np.random.default_rng(longest)
    sizes = rng.integers(0, longest, 700)
    texts = [
        b"ab" * 150 + b"%d" % rng.integers(9) if n > 250 else rng.choice([b"a", b"b"], n).tobytes()
        for n in sizes
    ]
    nodes = Fields.of(NodeProto, [NodeProto(input=texts[:400]).SerializeToString()])
    others = Fields.of(NodeProto, [NodeProto(output=texts[400:]).SerializeToString()])
    columns = (nodes, nodes.column(1)), (others, others.column(2))
    parts = [(data, column.begin, column.value) for data, column in columns]
    (first, second), count = same_texts.numbered(parts)
    numbers = [*first.tolist(), *second.tolist()]
    assert (
        count == len(set(texts)) == len(set(numbers)) == len(set(zip(texts, numbers, strict=True)))
    )
    monkeypatch.setattr(same_texts, "_FACTOR", np.uint64(0))  # a hash that says nothing
    assert same_texts.numbered(parts) is None


RELU = field(1, b"q") + field(2, b"more")
ODD = {  # what is written at the end of a graph
    "an ordinary node": field(1, RELU + field(4, b"Relu")),
    "out of order": field(1, field(4, b"Relu") + RELU),
    "two operators": field(1, RELU + field(4, b"Relu") + field(4, b"")),
    "no operator but a number": field(1, RELU + b"\x20\x04"),
    "two types": field(5, b"\x08\x02\x10\x01\x10\x07" + field(8, b"t") + field(9, bytes(8))),
    "sizes in one field": field(5, b"\x0a\1\2\x10\1" + field(8, b"t") + field(9, bytes(8))),
    "an external tensor that is none": field(
        5, b"\x08\x02\x10\x01" + field(8, b"t") + field(13, field(1, b"location") + field(2, b"w"))
        + b"\x70\x01\x70\x00"
    ),
}  # fmt: skip


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("few", [0, 32])
@pytest.mark.parametrize("name", ODD)
def test_what_others_write_is_judged_as_protobuf_reads_it(name, few, twice, monkeypatch):
    monkeypatch.setattr(fields, "_FEW", few)
    model = sound_model()
    parts = [model.graph.SerializeToString(), ODD[name]]
    graph = b"".join(field(7, part) for part in parts) if twice else field(7, b"".join(parts))
    opsets = onnx.ModelProto(opset_import=model.opset_import).SerializeToString()
    data = b"\x08\x0a" + graph + opsets
    read = onnx.ModelProto.FromString(data)
    assert (parts_of_model(data) is None) == twice  # which protobuf joins
    assert sound.problems(read, data) == looked_at_each(monkeypatch, read)
