"""Who makes and who reads every value of a raw `GraphProto`, and what is known about it.

The proto is never converted or changed. Building the index touches each node's names only; types,
shapes, constants and metadata are looked up on demand, so a graph of 130,000 nodes is indexed in
well under a second. Weights are never read: `constant` serves structural constants only.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from sfa_onnx.passes.graph.constants import READ_LIMIT, byte_size, constant_of, is_structural
from sfa_onnx.passes.graph.kinds import ONNX_DOMAINS, told_apart
from sfa_onnx.passes.graph.provenance import layer_of
from sfa_onnx.passes.graph.sub_graphs import Dim, bodies, captured, declared_dims, returned_info

__all__ = ["READ_LIMIT", "Dim", "ExternalReader", "GraphIndex"]

_DEFAULTS_IR = 4  # the first version in which a stored tensor need not be an input
# (location, offset, length) -> exactly that byte range of the external data file.
ExternalReader = Callable[[str, int, int], bytes]


class GraphIndex:
    """Read-only look-ups over one graph.

    Attributes:
        graph: the proto, untouched.
        nodes: its nodes, in order; an index into this list names a node everywhere.
        producer: value -> index of the node that makes it.
        consumers: value -> (node index, input position); position -1: captured by a sub-graph.
        owners: nodes that hold sub-graphs.
        first: index of the first node of `graph` itself (0 unless outer nodes are seen too).
        path: where the graph lies, "If_3.then_branch/Loop_1.body"; "" for the main graph.
        initializers: name -> TensorProto (sparse ones are left out: nobody reads them).
        defaults: what is stored for an input of the same name: a caller may give another value, so
            it is an input here, and no constant.
        opsets: domain -> version ("" is the default domain).
        constants_read: names of the initializers whose bytes were looked at, in order.
        bytes_read: how many bytes of them came from external data files.
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        opsets: Mapping[str, int] | None = None,
        reader: ExternalReader | None = None,
        *,
        first: int = 0,
        defaults_hold: bool = False,
    ) -> None:
        self.graph = graph
        self.first = first
        self.path = ""
        self.nodes: Sequence[onnx.NodeProto] = [
            n if n.domain in ONNX_DOMAINS else told_apart(n) for n in graph.node
        ]
        self.opsets = {("" if d == "ai.onnx" else d): v for d, v in (opsets or {}).items()}
        self.producer: dict[str, int] = {}
        self.consumers: dict[str, list[tuple[int, int]]] = {}
        self.owners: list[int] = []
        self._captures: dict[int, set[str]] = {}
        self._inputs: dict[str, onnx.ValueInfoProto] = {v.name: v for v in graph.input}
        stored = {t.name: t for t in graph.initializer}
        self.defaults = frozenset() if defaults_hold else stored.keys() & self._inputs.keys()
        self.initializers: dict[str, onnx.TensorProto] = {
            n: t for n, t in stored.items() if n not in self.defaults
        }
        self.constants_read: list[str] = []
        self.bytes_read = 0
        self.reader = reader
        self._outputs = {v.name: v for v in graph.output}
        self._infos: dict[str, onnx.ValueInfoProto] | None = None
        self._constants: dict[str, np.ndarray | None] = {}
        self._connect()

    @classmethod
    def of(
        cls,
        model: onnx.ModelProto,
        reader: ExternalReader | None = None,
        *,
        defaults_hold: bool = False,
    ) -> GraphIndex:
        """The index of a model's main graph.

        Args:
            model: the model.
            reader: of its external data.
            defaults_hold: whether every input that has a default is that. Before version 4 of the
                format each stored tensor was an input as well, and no runtime takes another value.
        """
        opsets = {o.domain: o.version for o in model.opset_import}
        holds = defaults_hold or model.ir_version < _DEFAULTS_IR
        return cls(model.graph, opsets, reader, defaults_hold=holds)

    @property
    def ordered(self) -> bool:
        """Whether every node comes after those it reads, as the format asks."""
        uses, none = self.consumers, [(len(self.nodes) + self.first, 0)]
        return all(uses.get(name, none)[0][0] > i for name, i in self.producer.items())

    def _connect(self) -> None:
        producer, consumers = self.producer, self.consumers
        for i, node in enumerate(self.nodes, self.first):
            for position, name in enumerate(node.input):
                if name:
                    uses = consumers.get(name)
                    if uses is None:
                        consumers[name] = [(i, position)]
                    else:
                        uses.append((i, position))
            for name in node.output:
                if name:
                    producer[name] = i
            if node.attribute and bodies(node):
                self.owners.append(i)
                self._captures[i] = captured(node)
                for name in self._captures[i]:
                    consumers.setdefault(name, []).append((i, -1))

    # -- names ------------------------------------------------------------------------------------

    @property
    def own(self) -> range:
        """Indices of the nodes of `graph` itself; those before belong to outer scopes."""
        return range(self.first, len(self.nodes))

    @functools.cached_property
    def _by_kind(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i in self.own:
            found.setdefault(self.nodes[i].op_type, []).append(i)
        return found

    def of_kinds(self, kinds: Iterable[str]) -> list[int]:
        """Indices of the own nodes of these operator types, in order."""
        return sorted(i for kind in kinds for i in self._by_kind.get(kind, ()))

    @property
    def inputs(self) -> Sequence[onnx.ValueInfoProto]:
        """What is fed from outside: the graph's inputs, and those of the scopes around it."""
        return list(self._inputs.values())

    @property
    def returned(self) -> Sequence[str]:
        """What nodes with bodies make: nobody looks behind it, so it is as good as an input."""
        return [o for i in self.owners for o in self.nodes[i].output if o]

    @functools.cached_property
    def entering(self) -> dict[str, tuple[Dim, ...] | None]:
        """The declared shape of all that is fed or returned, in the order that names its symbols.

        Inputs come first: a dim of theirs is a symbol, or an expression of symbols.
        """
        return {name: self.shape(name) for name in (*(v.name for v in self.inputs), *self.returned)}

    def place(self, node: int) -> str:
        """`label` behind the path of the graph: unique in the model, as site ids are."""
        label = self.label(node)
        if not self.path:
            return label
        return f"{self.path}{label}" if label.startswith("/") else f"{self.path}/{label}"

    def captures(self, node: int) -> set[str]:
        """The outer values that the sub-graphs of a node read."""
        return self._captures.get(node, set())

    def capture(self, value: str, owner: int) -> None:
        """Note that from now on a sub-graph of node `owner` reads `value`."""
        if value not in self._captures[owner]:
            self._captures[owner].add(value)
            self.consumers[value] = [*self.readers(value), (owner, -1)]
            made = self.producer.get(value, -1)
            if made >= self.first and self._lives(owner) and not self._lives(made):
                self._wake(self._living, [made])

    def recapture(self, owner: int) -> set[str]:
        """Look again at what the sub-graphs of node `owner` read, after they were edited.

        Returns:
            The values that they no longer read.
        """
        now = captured(self.nodes[owner])
        lost = self._captures[owner] - now
        self._captures[owner] -= lost
        for value in lost:
            self.consumers[value] = [u for u in self.readers(value) if u != (owner, -1)]
        for value in now:
            self.capture(value, owner)
        return lost

    def maker(self, value: str) -> onnx.NodeProto | None:
        """The node that makes `value`; None for graph inputs and initializers."""
        i = self.producer.get(value)
        return None if i is None else self.nodes[i]

    def unaliased(self, value: str) -> str:
        """`value`, or what it is an Identity of."""
        while (node := self.maker(value)) is not None and node.op_type == "Identity":
            value = node.input[0]
        return value

    def real_maker(self, value: str) -> onnx.NodeProto | None:
        """The node that makes `value`, Identity nodes skipped."""
        return self.maker(self.unaliased(value))

    def uses(self, value: str) -> list[tuple[int, int]]:
        """(node, input position) of every reader; position -1 where a sub-graph captures it.

        Nodes from which no output of the graph can be reached do not count: see `readers`.
        """
        return [use for use in self.readers(value) if self._lives(use[0])]

    def readers(self, value: str) -> list[tuple[int, int]]:
        """As `uses`, nodes that no output needs included."""
        return self.consumers.get(value, [])

    def _lives(self, node: int) -> bool:
        """Whether an output needs what a node makes; outer nodes are not ours to judge."""
        return node < self.first or bool(self._living[node - self.first])

    @functools.cached_property
    def _living(self) -> bytearray:
        """Whether an output needs it, for every own node: one sweep from the last one upwards."""
        first, readers = self.first, self.consumers
        living = bytearray(len(self.nodes) - first)
        early: list[int] = []  # nodes that come before one they read: sorted files have none
        for value, i in reversed(self.producer.items()):
            if i < first or living[i - first]:
                continue
            alive = value in self._outputs
            for user, _ in readers.get(value, ()):
                if first <= user < i:
                    early.append(user)
                alive = alive or user < first or living[user - first] > 0
            living[i - first] = alive
        if early:
            self._wake(living, [i for i in self.own if living[i - first]])
        return living

    def _wake(self, living: bytearray, nodes: list[int]) -> None:
        """Note that `nodes` are needed, and so is all that they read."""
        while nodes:
            i = nodes.pop()
            living[i - self.first] = True
            for name in (*self.nodes[i].input, *self.captures(i)):
                made = self.producer.get(name, -1)
                if made >= self.first and not living[made - self.first]:
                    nodes.append(made)

    def buried_below(self, nodes: Iterable[int], outputs: Iterable[str]) -> list[int]:
        """Nodes that no output needs and that read what `nodes` make, `outputs` left out."""
        found: set[int] = set()
        waiting = {o for i in nodes for o in self.nodes[i].output} - {*outputs, ""}
        while waiting:
            for i, _ in self.readers(waiting.pop()):
                if i not in found and not self._lives(i):
                    found.add(i)
                    waiting.update(o for o in self.nodes[i].output if o)
        return sorted(found)

    def is_graph_output(self, value: str) -> bool:
        """Whether `value` is returned by the graph."""
        return value in self._outputs

    def is_graph_input(self, value: str) -> bool:
        """Whether `value` is fed from outside, or may be."""
        return value in self._inputs and value not in self.initializers

    def is_default(self, value: str) -> bool:
        """Whether the file stores a value that a caller may replace."""
        return value in self.defaults

    def is_given(self, value: str) -> bool:
        """Whether `value` is fed from outside or returned by a node with bodies."""
        return self.is_graph_input(value) or self.producer.get(value) in self._captures

    def giver(self, value: str) -> str:
        """Who answers for a value that nobody computes here, for messages."""
        owner = self.producer.get(value)
        if owner is None or owner not in self._captures:
            return "the caller"
        return f"{self.nodes[owner].op_type} {self.label(owner)}"

    def label(self, node: int) -> str:
        """How messages name a node: its name, else its first output."""
        proto = self.nodes[node]
        return proto.name or next((o for o in proto.output if o), f"{proto.op_type} #{node}")

    # -- types ------------------------------------------------------------------------------------

    def _info(self, value: str) -> onnx.ValueInfoProto | None:
        found: onnx.ValueInfoProto | None = self._inputs.get(value) or self._outputs.get(value)
        if found is not None and found.type.tensor_type.HasField("shape"):
            return found
        if self._infos is None:
            self._infos = {v.name: v for v in self.graph.value_info}
        if (declared := self._infos.get(value)) is not None:
            return declared
        owner = self.producer.get(value)
        if owner is None or owner not in self._captures:
            return found
        self._infos[value] = returned_info(self.nodes[owner], value)
        return self._infos[value]

    def elem_type(self, value: str) -> int:
        """The declared `TensorProto.DataType`; 0 when the file does not declare it."""
        if (tensor := self.initializers.get(value)) is not None:
            return int(tensor.data_type)
        info = self._info(value)
        return int(info.type.tensor_type.elem_type) if info is not None else 0

    def shape(self, value: str) -> tuple[Dim, ...] | None:
        """The declared shape: integers, symbols, or None per dim; None when not declared."""
        if (tensor := self.initializers.get(value)) is not None:
            return tuple(int(d) for d in tensor.dims)
        info = self._info(value)
        if info is None:
            return None
        dims = declared_dims(info)
        enters = value in self._inputs or self.producer.get(value) in self._captures
        if dims is not None and None in dims and enters:
            stem = re.sub(r"\W", "_", f"_{value}")
            dims = tuple(f"{stem}_{axis}" if d is None else d for axis, d in enumerate(dims))
        return dims

    # -- constants --------------------------------------------------------------------------------

    def constant(self, value: str) -> np.ndarray | None:
        """The bytes of a structural constant: Constant nodes, scalars, integer and bool tables.

        Float tables (weights, additive masks) give None, as does anything above `READ_LIMIT`.
        Every initializer read is recorded in `constants_read`.
        """
        if value in self._constants:
            return self._constants[value]
        array: np.ndarray | None = None
        if (tensor := self.initializers.get(value)) is not None:
            array = self._read(tensor) if is_structural(tensor) else None
        elif (node := self.maker(value)) is not None and node.op_type == "Constant":
            stored = next((a.t for a in node.attribute if a.name == "value"), None)
            if stored is not None and stored.data_location == onnx.TensorProto.EXTERNAL:
                array = self._read(stored) if is_structural(stored) else None
            else:
                array = constant_of(node)
        self._constants[value] = array
        return array

    def mask_table(self, value: str) -> np.ndarray | None:
        """A constant float table that stands where a mask is expected; None above `READ_LIMIT`.

        Only mask recognition asks for these: `constant` does not serve float tables.
        """
        tensor = self.initializers.get(value)
        if tensor is None or is_structural(tensor):
            return self.constant(value)
        key = f"{value} (mask table)"
        if key not in self._constants:
            small = byte_size(tensor) <= READ_LIMIT
            self._constants[key] = self._read(tensor) if small else None
        return self._constants[key]

    def fill_value(self, value: str) -> float | None:
        """The one number a constant mask table holds everywhere; None if it varies."""
        array = self.mask_table(value)
        if array is None or array.size == 0:
            return None
        flat = np.asarray(array).reshape(-1)
        return float(flat[0]) if bool((flat == flat[0]).all()) else None

    def _read(self, tensor: onnx.TensorProto) -> np.ndarray | None:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raw = self._external(tensor)
            if raw is None:
                return None
            copy = onnx.TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=raw)
            tensor, name = copy, tensor.name
        else:
            name = tensor.name
        self.constants_read.append(name)
        return np.asarray(numpy_helper.to_array(tensor))

    def _external(self, tensor: onnx.TensorProto) -> bytes | None:
        if self.reader is None:
            return None
        entries = {e.key: e.value for e in tensor.external_data}
        length = int(entries.get("length", 0)) or byte_size(tensor)
        self.bytes_read += length
        return self.reader(entries["location"], int(entries.get("offset", 0)), length)

    def layer(self, node: int) -> str:
        """The torch module a node came from (`layer_of`)."""
        return layer_of(self.nodes[node])
