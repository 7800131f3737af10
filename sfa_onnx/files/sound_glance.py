"""Most models are sound: that is seen here, all nodes at once, before anybody looks at each.

A glance says either that nothing is wrong, or nothing at all; then the walk over single nodes finds
out what is wrong, or that it is an unusual spelling of something sound. What is equal is looked at
once: nodes of one operator with the same attributes and as many inputs, tensors of one type, shape
and length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any, Final

from onnx import GraphProto, NodeProto, StringStringEntryProto, TensorProto

from sfa_onnx.files.columns import Columns, counts, rows
from sfa_onnx.files.sound_nodes import NodeRules, holds_graphs
from sfa_onnx.files.sound_tensors import tensor_problem

__all__ = ["Reader", "free_values", "serialised", "unseen_tensors"]

_GRAPH: Final = Columns(GraphProto.DESCRIPTOR, ("node", "initializer"))
_NODES: Final = Columns(
    NodeProto.DESCRIPTOR, ("input", "output", "domain", "attribute"), single=("op_type",)
)
_TENSORS: Final = Columns(
    TensorProto.DESCRIPTOR, ("dims", "external_data", "data_location"), single=("data_type",)
)
_ENTRIES: Final = Columns(StringStringEntryProto.DESCRIPTOR, (), single=("key", "value"))
_END: Final = "\0"

Reader = NodeProto | str  # who reads a value: a node, or what messages say


def serialised(graph: GraphProto, *, small: bool) -> tuple[Iterable[bytes], Iterable[bytes]]:
    """The nodes and the initializers of a graph, as their bytes; a small one is copied at once."""
    if small:
        columns = _GRAPH.read([graph])
        assert columns is not None, "no message consists of a zero"
        return columns["node"][:-1], columns["initializer"][:-1]
    nodes = (node.SerializeToString() for node in graph.node)
    return nodes, (tensor.SerializeToString() for tensor in graph.initializer)


def free_values(
    nodes: Sequence[NodeProto],
    data: Iterable[bytes],
    made: Iterable[str],
    rules: NodeRules,
    inside: Callable[[int], dict[str, Reader] | None],
) -> tuple[dict[str, int], dict[str, Reader]] | None:
    """What the nodes of a graph make, and what they read that nothing here makes.

    Args:
        nodes: of one graph.
        data: the same, serialised.
        made: inputs and initializers of the graph.
        rules: what operators ask of their nodes.
        inside: the free values of the graphs that a node holds, by its number; None: something is
            wrong there.

    Returns:
        All that is made, `made` included, and the free values with who reads them; None where a
        look at every node is needed: something is wrong, or an order that runs has to be found.
    """
    columns = _NODES.parse(data)
    if columns is None:
        return None
    outputs = columns["output"]
    known = dict.fromkeys(made, -1)
    before = len(known)
    known.update(_made_at(outputs))
    if len(known) - before != len(outputs) - len(nodes) - outputs.count(""):
        return None  # a name that is made twice
    early = _read_before(columns["input"], known)
    inner = None if early is None else _inside(nodes, columns, known, rules, inside)
    if early is None or inner is None:
        return None
    free: dict[str, Reader] = {name: nodes[at] for name, at in early.items()}
    return known, free | inner


def _made_at(outputs: Iterable[str]) -> dict[str, int]:
    """Value -> the node that makes it."""
    found, at = {}, 0
    for name in outputs:
        if name == _END:
            at += 1
        elif name:
            found[name] = at
    return found


def _read_before(inputs: Iterable[str], known: dict[str, int]) -> dict[str, int] | None:
    """Values that are read and not known, by reader; None where one is read before it is made."""
    free, at = dict[str, int](), 0
    for name in inputs:
        if name == _END:
            at += 1
        elif name not in known:
            free.setdefault(name, at)
        elif known[name] >= at:
            return None
    free.pop("", None)
    return free


def _inside(
    nodes: Sequence[NodeProto],
    columns: dict[str, list[Any]],
    known: dict[str, int],
    rules: NodeRules,
    inside: Callable[[int], dict[str, Reader] | None],
) -> dict[str, Reader] | None:
    """Look at one node of every kind; the free values of the graphs that nodes hold."""
    free: dict[str, Reader] = {}
    for at in _kinds(columns):
        if next(rules.problems(nodes[at]), None) is not None:
            return None
        names = inside(at) if holds_graphs(nodes[at]) else {}
        if names is None or any(known.get(name, -1) >= at for name in names):
            return None
        free |= {name: reader for name, reader in names.items() if name not in known}
    return free


def _kinds(columns: dict[str, list[Any]]) -> list[int]:
    """The first node of every kind: operator, attributes, how many inputs and outputs.

    Nodes that leave an input empty are each a kind.
    """
    inputs = counts(columns["input"], _END)
    nodes = range(len(inputs))
    alike = list(zip(columns["op_type"], inputs, counts(columns["output"], _END), strict=True))
    attributes = _filled(columns["attribute"], b"\0")
    domains = _filled(columns["domain"], _END)
    plain = bytearray(b"\1") * len(nodes)
    first: dict[Any, int] = {}
    for at in sorted({*attributes, *domains}):
        plain[at] = 0
        first.setdefault((alike[at], *attributes.get(at, ()), *domains.get(at, ())), at)
    first |= dict(zip(compress(alike, plain), compress(nodes, plain), strict=True))
    found = list(first.values())
    if "" in columns["input"]:
        found += [i for i, names in enumerate(rows(columns["input"], inputs)) if "" in names]
    return found


def _filled(column: list[Any], mark: Any) -> dict[int, list[Any]]:
    """The entries of those messages that have any."""
    found: dict[int, list[Any]] = {}
    if column.count(mark) < len(column):
        at = 0
        for entry in column:
            if entry == mark:
                at += 1
            else:
                found.setdefault(at, []).append(entry)
    return found


def unseen_tensors(tensors: Sequence[TensorProto], data: Iterable[bytes]) -> Sequence[TensorProto]:
    """Those tensors with which something may be wrong: the stored ones, all where that is unclear.

    Args:
        tensors: of one graph.
        data: the same, serialised.
    """
    columns = _TENSORS.parse(data)
    if columns is None:
        return tensors
    places = _filled(columns["data_location"], -1)
    outside = [at for at, place in places.items() if place == [TensorProto.EXTERNAL]]
    entries = _entries(columns["external_data"], outside)
    if entries is None:
        return tensors
    shapes = [tuple(dims) for dims in rows(columns["dims"], counts(columns["dims"], -1))]
    lengths = entries.get("length", [""] * len(outside))
    alike = list(zip(columns["data_type"], shapes, strict=True))
    kinds = zip(map(alike.__getitem__, outside), lengths, strict=True)
    first: dict[Any, int] = dict(zip(kinds, outside, strict=True))
    first |= dict(zip(entries.get("location", ()), outside, strict=False))
    if any(tensor_problem(tensors[at]) for at in first.values()):
        return tensors
    seen = set(outside)
    return [t for at, t in enumerate(tensors) if at not in seen]


def _entries(column: list[bytes], outside: list[int]) -> dict[str, list[str]] | None:
    """Entry -> what each external tensor has there; None where they differ in what they have."""
    sizes = counts(column, b"\0")
    each = sizes[outside[0]] if outside else 0
    pairs = _ENTRIES.parse(entry for entry in column if entry != b"\0")
    if not each or pairs is None or sum(sizes) != each * len(outside):
        return None
    if any(sizes[at] != each for at in outside):
        return None
    keys, values = pairs["key"], pairs["value"]
    names = keys[:each]
    if keys != names * len(outside) or len(set(names)) != each:
        return None
    found = {name: values[i::each] for i, name in enumerate(names)}
    numbers = [found[name] for name in ("offset", "length") if name in found]
    return found if all(_are_numbers(given) for given in numbers) else None


def _are_numbers(values: list[str]) -> bool:
    """Whether all of these texts are whole numbers of bytes."""
    joined = "".join(values)
    return "" not in values and joined.isascii() and joined.isdecimal()
