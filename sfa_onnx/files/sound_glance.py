"""Most models are sound: that is seen here, all nodes at once, before anybody looks at each.

A glance says either that nothing is wrong, or nothing at all; then the walk over single nodes finds
out what is wrong, or that it is an unusual spelling of something sound. What is equal is looked at
once: nodes of one operator with the same attributes and as many inputs, tensors of one type, shape
and length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
from onnx import NodeProto, StringStringEntryProto, TensorProto

from sfa_onnx.files.fields import Column, Fields, Numbers
from sfa_onnx.files.same_texts import Texts, alike, numbered
from sfa_onnx.files.sound_nodes import NodeRules, holds_graphs
from sfa_onnx.files.sound_tensors import DIGITS, tensor_problem

__all__ = ["Reader", "free_values", "unseen_tensors"]

_NODE: Final = {n: f.number for n, f in NodeProto.DESCRIPTOR.fields_by_name.items()}
_TENSOR: Final = {n: f.number for n, f in TensorProto.DESCRIPTOR.fields_by_name.items()}
_ENTRY: Final = {n: f.number for n, f in StringStringEntryProto.DESCRIPTOR.fields_by_name.items()}
_MANY: Final = 1 << 20  # inputs, outputs, or letters of an operator: nobody has so many
_NOWHERE: Final = -2  # the node that makes what nothing makes
_WORD: Final = 8  # bytes
_BEFORE: Final = -1  # of what is there before all nodes

Reader = NodeProto | str  # who reads a value: a node, or what messages say


def free_values(
    nodes: Sequence[NodeProto],
    fields: Fields | None,
    made: Iterable[str],
    results: Iterable[str],
    rules: NodeRules,
    inside: Callable[[int], dict[str, Reader] | None],
) -> dict[str, Reader] | None:
    """What the nodes of a graph and its outputs read that nothing here makes.

    Args:
        nodes: of one graph.
        fields: the same, as their bytes; None where these are unusual.
        made: inputs and initializers of the graph.
        results: outputs of the graph.
        rules: what operators ask of their nodes.
        inside: the free values of the graphs that a node holds, by its number; None: something is
            wrong there.

    Returns:
        The free values with who reads them; None where a look at every node is needed: something
        is wrong, or an order that runs has to be found.
    """
    if fields is None:
        return None
    held = _held(nodes, fields, rules, inside)
    if held is None:
        return None
    made, results = list(made), list(results)
    names = [name for _, free in held for name in free]
    reads, writes = (fields.column(_NODE[name]) for name in ("input", "output"))
    found = numbered(
        [
            *((fields, c.begin, c.value) for c in (reads, writes)),
            *map(_texts, (made, results, names)),
        ]
    )
    if found is None:
        return None
    (read, written, *given), many = found
    makers = _makers(written, writes, given[0], many)
    if makers is None:
        return None
    at = np.repeat([at for at, _ in held], [len(free) for _, free in held]).astype(np.int64)
    if (makers[read] >= reads.owner).any() or (makers[given[2]] >= at).any():
        return None  # read before it is made
    free: dict[str, Reader] = {}
    for i in np.flatnonzero((makers[read] == _NOWHERE) & (reads.value > 0)).tolist():
        free.setdefault(fields.data[reads.begin[i] : reads.end[i]].decode(), nodes[reads.owner[i]])
    inner = {name: reader for _, body in held for name, reader in body.items()}
    free |= {n: inner[n] for n in _nowhere(names, makers[given[2]])}
    return free | {n: f"output {n!r}" for n in _nowhere(results, makers[given[1]]) if n not in free}


def _texts(names: Sequence[str]) -> Texts:
    written = [name.encode() for name in names]
    size = np.fromiter(map(len, written), np.int64, len(written))
    end = np.cumsum(size)
    return Fields(b"".join((*written, bytes(_WORD))), end - size, []), end - size, size


def _makers(written: Numbers, writes: Column, given: Numbers, many: int) -> Numbers | None:
    """The node that makes each name, by the name's number; None where one is made twice."""
    found = np.full(many, _NOWHERE, np.int64)
    found[given] = _BEFORE
    named = writes.value > 0
    if (found[written[named]] == _BEFORE).any():
        return None
    if np.bincount(written[named], minlength=1).max() > 1:
        return None
    found[written[named]] = writes.owner[named]
    return found


def _nowhere(names: Sequence[str], makers: Numbers) -> list[str]:
    return [names[at] for at in np.flatnonzero(makers == _NOWHERE).tolist()]


def _held(
    nodes: Sequence[NodeProto],
    fields: Fields,
    rules: NodeRules,
    inside: Callable[[int], dict[str, Reader] | None],
) -> list[tuple[int, dict[str, Reader]]] | None:
    """Look at one node of every kind; the free values of the graphs that nodes hold, by node."""
    found: list[tuple[int, dict[str, Reader]]] = []
    kinds = _kinds(fields)
    if kinds is None:
        return None
    for at in kinds:
        if next(rules.problems(nodes[at]), None) is not None:
            return None
        if holds_graphs(nodes[at]):
            free = inside(at)
            if free is None:
                return None
            found.append((at, free))
    return found


def _kinds(fields: Fields) -> list[int] | None:
    """A node of every kind: operator, attributes, domain, how many inputs and outputs.

    Nodes that leave an input empty are each a kind. None where a node has no operator.
    """
    many = len(fields.starts)
    inputs, outputs, op_type, attribute, domain = (
        fields.column(_NODE[name]) for name in ("input", "output", "op_type", "attribute", "domain")
    )
    if not _one_each(op_type.owner, many):
        return None
    sizes = np.stack([inputs.counts(many), outputs.counts(many), op_type.value])
    if sizes.size and sizes.max() >= _MANY:
        return None
    sizes_of = (sizes[0] * _MANY + sizes[1]) * _MANY + sizes[2]
    short = op_type.value <= 2 * _WORD
    short[attribute.owner] = short[domain.owner] = False
    found = _plain_kinds(fields, op_type, sizes_of, np.flatnonzero(short))
    if found is None:
        return None
    end = op_type.end.copy()
    end[attribute.owner] = attribute.end  # of several the last, and no field lies between
    domains = dict(zip(domain.owner.tolist(), fields.texts(domain.begin, domain.end), strict=True))
    left = np.flatnonzero(~short)
    written = fields.texts(op_type.begin[left], end[left])
    keys = zip(written, sizes_of[left].tolist(), map(domains.get, left.tolist()), strict=True)
    found += dict(zip(keys, left.tolist(), strict=True)).values()
    return [*found, *np.unique(inputs.owner[inputs.value == 0]).tolist()]


def _plain_kinds(
    fields: Fields, op_type: Column, sizes: Numbers, nodes: Numbers
) -> list[int] | None:
    """A node of every kind of those that have a short operator and nothing beside it; or None."""
    begin, size = op_type.begin[nodes], op_type.value[nodes]
    words = [sizes[nodes].view(np.uint64), fields.words(begin, size)]
    words.append(fields.words(begin + _WORD, size - _WORD))
    found = alike(words)
    return None if found is None else [int(at) for at in nodes[found[0]]]


def unseen_tensors(tensors: Sequence[TensorProto], fields: Fields | None) -> Sequence[TensorProto]:
    """Those tensors with which something may be wrong: the stored ones, all where that is unclear.

    Args:
        tensors: of one graph.
        fields: the same, as their bytes, which may be empty for tensors that are not external.
    """
    if fields is None:
        return tensors
    place, kind = fields.column(_TENSOR["data_location"]), fields.column(_TENSOR["data_type"])
    if _twice(place.owner) or _twice(kind.owner):
        return tensors
    outside = place.owner[place.value == TensorProto.EXTERNAL]
    typed = np.full(len(fields.starts), -1, np.int64)
    typed[kind.owner] = kind.end
    entries = _entries(fields, outside)
    if entries is None or (typed[outside] < 0).any():
        return tensors
    begin = fields.starts[outside]  # nothing but shape and type comes before the type's end
    found = numbered([*entries, (fields, begin, typed[outside] - begin)])
    if found is None:
        return tensors
    location, length, shape = (number.view(np.uint64) for number in found[0])
    groups = [alike([location]), alike([length, shape])]  # numbers collide only by chance
    if any(g is None or any(tensor_problem(tensors[outside[i]]) for i in g[0]) for g in groups):
        return tensors
    unseen = np.ones(len(tensors), bool)
    unseen[outside] = False
    return [tensors[at] for at in np.flatnonzero(unseen).tolist()]


def _entries(fields: Fields, outside: Numbers) -> tuple[Texts, Texts] | None:
    """Location and length of each external tensor; None where one has something unusual."""
    all_entries = fields.column(_TENSOR["external_data"])
    wanted = np.zeros(len(fields.starts), bool)
    wanted[outside] = True
    theirs = wanted[all_entries.owner]
    owner, begin, end = (c[theirs] for c in (all_entries.owner, all_entries.begin, all_entries.end))
    pairs = Fields.within(StringStringEntryProto, fields.data, begin, end)
    if pairs is None:
        return None
    keys, values = pairs.column(_ENTRY["key"]), pairs.column(_ENTRY["value"])
    if not all(_one_each(c.owner, len(begin)) for c in (keys, values)):
        return None
    found: list[Texts] = []
    for word in ("location", "length", "offset"):
        at = _spelled(pairs, keys, word.encode())
        whose, start, size = owner[at], values.begin[at], values.value[at]
        if _twice(whose) or not size.all():
            return None  # twice, or empty
        if word == "location" and not np.array_equal(whose, outside):
            return None
        if word != "location" and size.max(initial=0) > DIGITS:
            return None
        if word != "location" and not b"".join([b"0", *pairs.texts(start, start + size)]).isdigit():
            return None
        every = np.zeros((2, len(outside)), np.int64)  # empty where it is left out
        every[:, np.searchsorted(outside, whose)] = start, size
        found.append((pairs, every[0], every[1]))
    return found[0], found[1]


def _twice(owners: Numbers) -> bool:
    return bool((owners[1:] == owners[:-1]).any())


def _one_each(owners: Numbers, many: int) -> bool:
    return np.array_equal(owners, np.arange(many))


def _spelled(fields: Fields, texts: Column, word: bytes) -> Numbers:
    """Which of some texts are this word."""
    data = np.frombuffer(fields.data, np.uint8)
    at = np.flatnonzero(texts.value == len(word))
    letters = data[texts.begin[at, None] + np.arange(len(word))]
    same: Numbers = at[(letters == np.frombuffer(word, np.uint8)).all(axis=1)]
    return same
