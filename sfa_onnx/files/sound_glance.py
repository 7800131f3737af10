"""Most models are sound: that is seen here, all nodes at once, before anybody looks at each.

A glance says either that nothing is wrong, or nothing at all; then the walk over single nodes finds
out what is wrong, or that it is an unusual spelling of something sound. What is equal is looked at
once: nodes of one operator with the same attributes and as many inputs, tensors of one type, shape
and length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, Final

import numpy as np
from onnx import GraphProto, NodeProto, StringStringEntryProto, TensorProto

from sfa_onnx.files.fields import Column, Fields, Numbers, split
from sfa_onnx.files.sound_nodes import NodeRules, holds_graphs
from sfa_onnx.files.sound_tensors import tensor_problem

__all__ = ["Reader", "free_values", "serialised", "unseen_tensors"]

_NODE: Final = {n: f.number for n, f in NodeProto.DESCRIPTOR.fields_by_name.items()}
_TENSOR: Final = {n: f.number for n, f in TensorProto.DESCRIPTOR.fields_by_name.items()}
_ENTRY: Final = {n: f.number for n, f in StringStringEntryProto.DESCRIPTOR.fields_by_name.items()}
_MANY: Final = 1 << 20  # inputs, outputs, or letters of an operator: nobody has so many
_NOWHERE: Final = -2  # the node that makes what nothing makes
_WORD: Final = 8  # bytes
_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits well mixed
_BEFORE: Final = -1  # of what is there before all nodes

Reader = NodeProto | str  # who reads a value: a node, or what messages say


def serialised(graph: GraphProto, *, small: bool) -> tuple[Iterable[bytes], Iterable[bytes]]:
    """The nodes and the initializers of a graph, as their bytes; a small one is copied at once.

    Of a large graph, initializers that lie in the file itself are left empty.
    """
    if small:
        return split(graph)
    outside = TensorProto.EXTERNAL
    return (node.SerializeToString() for node in graph.node), (
        t.SerializeToString() if t.data_location == outside else b"" for t in graph.initializer
    )


def free_values(
    nodes: Sequence[NodeProto],
    data: Iterable[bytes],
    made: Iterable[str],
    results: Iterable[str],
    rules: NodeRules,
    inside: Callable[[int], dict[str, Reader] | None],
) -> dict[str, Reader] | None:
    """What the nodes of a graph and its outputs read that nothing here makes.

    Args:
        nodes: of one graph.
        data: the same, serialised.
        made: inputs and initializers of the graph.
        results: outputs of the graph.
        rules: what operators ask of their nodes.
        inside: the free values of the graphs that a node holds, by its number; None: something is
            wrong there.

    Returns:
        The free values with who reads them; None where a look at every node is needed: something
        is wrong, or an order that runs has to be found.
    """
    fields = Fields.of(data)
    if fields is None:
        return None
    inputs, outputs = (fields.column(_NODE[name]) for name in ("input", "output"))
    known = dict.fromkeys((name.encode() for name in made), _BEFORE)
    before = len(known)
    makers = outputs.owner.tolist()
    known.update(zip(fields.texts(outputs.begin, outputs.end), makers, strict=True))
    known.pop(b"", None)
    if len(known) - before != np.count_nonzero(outputs.value):
        return None  # a name that is made twice
    early = _read_before(fields, inputs, known)
    inner = None if early is None else _inside(nodes, fields, known, rules, inside)
    if early is None or inner is None:
        return None
    free: dict[str, Reader] = {name.decode(): nodes[at] for name, at in early.items()}
    free |= inner
    wanted = (n for n in results if n not in free and n.encode() not in known)
    return free | {name: f"output {name!r}" for name in wanted}


def _read_before(
    fields: Fields, inputs: Column, known: dict[bytes, int]
) -> dict[bytes, int] | None:
    """Values that are read and not known, by reader; None where one is read before it is made."""
    names = fields.texts(inputs.begin, inputs.end)
    makers = np.fromiter(map(known.get, names, repeat(_NOWHERE)), np.int64, len(names))
    if (makers >= inputs.owner).any():
        return None
    free = dict[bytes, int]()
    for at in np.flatnonzero((makers == _NOWHERE) & (inputs.value > 0)).tolist():
        free.setdefault(names[at], int(inputs.owner[at]))
    return free


def _inside(
    nodes: Sequence[NodeProto],
    fields: Fields,
    known: dict[bytes, int],
    rules: NodeRules,
    inside: Callable[[int], dict[str, Reader] | None],
) -> dict[str, Reader] | None:
    """Look at one node of every kind; the free values of the graphs that nodes hold."""
    free: dict[str, Reader] = {}
    kinds = _kinds(fields)
    if kinds is None:
        return None
    for at in kinds:
        if next(rules.problems(nodes[at]), None) is not None:
            return None
        names = inside(at) if holds_graphs(nodes[at]) else {}
        if names is None or any(known.get(name.encode(), _BEFORE) >= at for name in names):
            return None
        free |= {name: reader for name, reader in names.items() if name.encode() not in known}
    return free


def _kinds(fields: Fields) -> list[int] | None:
    """A node of every kind: operator, attributes, domain, how many inputs and outputs.

    Nodes that leave an input empty are each a kind. None where a node has no operator.
    """
    many = len(fields.starts)
    inputs, outputs, op_type, attribute, domain = (
        fields.column(_NODE[name]) for name in ("input", "output", "op_type", "attribute", "domain")
    )
    if len(op_type.owner) != many:
        return None
    sizes = np.stack([inputs.counts(many), outputs.counts(many), op_type.value])
    if sizes.size and sizes.max() >= _MANY:
        return None
    alike = (sizes[0] * _MANY + sizes[1]) * _MANY + sizes[2]
    short = op_type.value <= 2 * _WORD
    short[attribute.owner] = short[domain.owner] = False
    found = _plain_kinds(fields, op_type, alike, np.flatnonzero(short))
    if found is None:
        return None
    end = op_type.end.copy()
    end[attribute.owner] = attribute.end  # of several the last, and no field lies between
    domains = dict(zip(domain.owner.tolist(), fields.texts(domain.begin, domain.end), strict=True))
    left = np.flatnonzero(~short)
    written = fields.texts(op_type.begin[left], end[left])
    keys = zip(written, alike[left].tolist(), map(domains.get, left.tolist()), strict=True)
    found += dict(zip(keys, left.tolist(), strict=True)).values()
    return [*found, *np.unique(inputs.owner[inputs.value == 0]).tolist()]


def _plain_kinds(
    fields: Fields, op_type: Column, alike: Numbers, nodes: Numbers
) -> list[int] | None:
    """A node of every kind of those that have a short operator and nothing beside it.

    They are sorted by a hash, and what the hash holds to be equal is compared; None where it erred.
    """
    begin, size = op_type.begin[nodes], op_type.value[nodes]
    parts = [alike[nodes].view(np.uint64), fields.words(begin, size)]
    parts.append(fields.words(begin + _WORD, np.maximum(size - _WORD, 0)))
    mixed = np.zeros(len(nodes), np.uint64)
    for part in parts:
        mixed = (mixed ^ part) * _FACTOR
        mixed ^= mixed >> np.uint64(29)
    _, first, kind = np.unique(mixed, return_index=True, return_inverse=True)
    if any((part != part[first][kind]).any() for part in parts):
        return None
    found: list[int] = nodes[first].tolist()
    return found


def unseen_tensors(tensors: Sequence[TensorProto], data: Iterable[bytes]) -> Sequence[TensorProto]:
    """Those tensors with which something may be wrong: the stored ones, all where that is unclear.

    Args:
        tensors: of one graph.
        data: the same, serialised; empty for tensors that are not external.
    """
    fields = Fields.of(data)
    if fields is None:
        return tensors
    place, kind = fields.column(_TENSOR["data_location"]), fields.column(_TENSOR["data_type"])
    outside = place.owner[place.value == TensorProto.EXTERNAL]
    typed = np.full(len(fields.starts), -1, np.int64)
    typed[kind.owner] = kind.end
    entries = _entries(fields, outside)
    if entries is None or (typed[outside] < 0).any():
        return tensors
    locations, lengths = entries
    shapes = fields.texts(fields.starts[outside], typed[outside])  # nothing but shape and type
    first: dict[Any, int] = dict(zip(zip(shapes, lengths, strict=True), outside, strict=True))
    first |= dict(zip(locations, outside, strict=True))
    if any(tensor_problem(tensors[at]) for at in first.values()):
        return tensors
    unseen = np.ones(len(tensors), bool)
    unseen[outside] = False
    return [tensors[at] for at in np.flatnonzero(unseen).tolist()]


def _entries(fields: Fields, outside: Numbers) -> tuple[list[bytes], list[bytes]] | None:
    """Location and length of each external tensor; None where one has something unusual."""
    all_entries = fields.column(_TENSOR["external_data"])
    wanted = np.zeros(len(fields.starts), bool)
    wanted[outside] = True
    theirs = wanted[all_entries.owner]
    owner, begin, end = (c[theirs] for c in (all_entries.owner, all_entries.begin, all_entries.end))
    pairs = fields.within(begin, end)
    if pairs is None:
        return None
    keys, values = pairs.column(_ENTRY["key"]), pairs.column(_ENTRY["value"])
    if not len(keys.owner) == len(values.owner) == len(begin):
        return None
    found: dict[str, tuple[Numbers, list[bytes]]] = {}
    for word in ("location", "offset", "length"):
        at = _spelled(pairs, keys, word.encode())
        whose, texts = owner[at], pairs.texts(values.begin[at], values.end[at])
        if (whose[1:] == whose[:-1]).any() or not values.value[at].all():
            return None  # twice, or empty
        if word != "location" and texts and not b"".join(texts).isdigit():
            return None
        found[word] = whose, texts
    if not np.array_equal(found["location"][0], outside):
        return None
    lengths = [b""] * len(outside)
    for at, text in zip(
        np.searchsorted(outside, found["length"][0]), found["length"][1], strict=True
    ):
        lengths[at] = text
    return found["location"][1], lengths


def _spelled(fields: Fields, texts: Column, word: bytes) -> Numbers:
    """Which of some texts are this word."""
    data = np.frombuffer(fields.data, np.uint8)
    at = np.flatnonzero(texts.value == len(word))
    letters = data[texts.begin[at, None] + np.arange(len(word))]
    same: Numbers = at[(letters == np.frombuffer(word, np.uint8)).all(axis=1)]
    return same
