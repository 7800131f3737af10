"""Write the two weights of an absorbed site as initializers of their own.

Absorption takes W_UK and W_UV out of the expansion weight by views in the graph. Compilers that do
not fold views of constants run them in every step; with this pass they find the two tensors as the
MatMul reads them. It evaluates the very nodes that were verified, on the stored bytes: the only
place where weights are read, one of them at a time, each byte range once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto

from sfa_onnx.errors import UsageError
from sfa_onnx.files.external import StorageReader, external_range
from sfa_onnx.files.onnx_attrs import attributes, find_attribute
from sfa_onnx.files.weights_file import WeightsFile, digest_of, inline_tensor
from sfa_onnx.passes.axes.trace import Stop
from sfa_onnx.passes.candidate import Candidate, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.region import free_name
from sfa_onnx.passes.graph.sub_graphs import bodies, captured
from sfa_onnx.passes.products import VALUE_PRODUCT, weight_products
from sfa_onnx.passes.scopes.index import ScopeIndex
from sfa_onnx.passes.shapes.fold import FOLD
from sfa_onnx.report import MaterializedWeight, SiteReport

__all__ = ["Materializer", "materialized_notes"]

_FREE: Final = frozenset(("Identity", "Reshape", "Squeeze", "Unsqueeze"))  # move no bytes
_VIEWS: Final = _FREE | {"Cast", "Slice", "Split", "Transpose"}
_FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass
class _Found:
    """One stored weight, where it lies, and what is read of it: recipe -> new initializer."""

    tensor: TensorProto
    graph: onnx.GraphProto
    made: dict[str, TensorProto] = field(default_factory=dict)
    report: MaterializedWeight = field(default_factory=lambda: MaterializedWeight("", ()))


@dataclass(frozen=True)
class _Job:
    """What one replacement reads of a stored weight: value -> recipe."""

    found: _Found
    candidate: Candidate
    views: _Views
    wanted: dict[str, str]


class Materializer:
    """Rewrites the replacements of absorbed sites before they are spliced.

    A new initializer lies in the graph that stores the weight; bodies read it as they read that.

    Args:
        graph: the main graph.
        reader: reads the storage and counts its bytes.
        file: takes what external weights become; None: there is no place to write to.
    """

    def __init__(
        self, graph: onnx.GraphProto, reader: StorageReader, file: WeightsFile | None
    ) -> None:
        self._graph = graph
        self._reader = reader
        self._file = file
        self._found: dict[tuple[Any, ...], _Found] = {}
        self._left: list[MaterializedWeight] = []
        self._names: set[str] = set()

    def apply(self, index: GraphIndex, sites: list[tuple[Candidate, SiteReport]]) -> None:
        """Give the absorbed sites of one graph weights of their own; equal ones are written once.

        Products with such weights beside a site join the sites, under its report.

        Raises:
            UsageError: a weight lies in an external file, and there is no output to write beside.
            WeightsError: the storage cannot be read.
        """
        sites += weight_products(index, sites)
        jobs: dict[int, list[_Job]] = {}
        for candidate, _ in sites:
            for operand in candidate.operands:
                if operand.role is Role.EXPANSION:
                    job = self._job(index, candidate, operand.value)
                    if job is not None:
                        jobs.setdefault(id(job.found), []).append(job)
        for together in jobs.values():
            self._make(together)
            for job in together:
                made = job.found.made
                names = {value: made[recipe].name for value, recipe in job.wanted.items()}
                _rename_inputs(job.candidate, names)

    def finish(self) -> list[MaterializedWeight]:
        """Store the new initializers in the spliced graphs; what became of every weight."""
        reports = []
        for found in self._found.values():
            report, tensors = found.report, found.graph.initializer
            if any(tensor.name == report.weight for tensor in tensors):
                report = replace(report, kept=_reader(found.graph, report.weight))
            tensors.extend(found.made.values())
            reports.append(report)
        return reports + self._left

    def _job(self, index: GraphIndex, candidate: Candidate, weight: str) -> _Job | None:
        """What `candidate` reads of `weight`; None where it stays as it is."""
        views = _Views(index, candidate, weight)
        try:
            name, tensor = views.stored()
            wanted = views.wanted()
        except Stop as stop:
            left = MaterializedWeight(weight, (candidate.site_id,), reason=stop.reason)
            self._left.append(left)
            return None
        graph = _home(index, name)
        found = self._found.setdefault((id(graph), *_storage(tensor)), _Found(tensor, graph))
        sites = tuple(dict.fromkeys((*found.report.sites, candidate.site_id)))
        found.report = replace(found.report, weight=name, sites=sites)
        return _Job(found, candidate, views, wanted)

    def _make(self, jobs: list[_Job]) -> None:
        """Read a weight once and write the tensors of it that are still missing."""
        found = jobs[0].found
        missing = {
            r: (j.views, v) for j in jobs for v, r in j.wanted.items() if r not in found.made
        }
        if not missing:
            return
        external = found.tensor.data_location == TensorProto.EXTERNAL
        if external and self._file is None:
            raise UsageError(
                f"materialize_absorbed: {found.tensor.name!r} lies in an external file, so what is"
                " made of it goes to one beside the output; pass an output path"
            )
        array = self._reader.weight(found.tensor)
        made, written = dict(found.report.made), found.report.bytes_written
        for recipe, (views, value) in missing.items():
            part = views.evaluate(value, array)
            name = self._name(f"{found.report.weight}.{views.suffix(value)}")
            tensor = (
                self._file.add(name, part)
                if external and self._file is not None
                else inline_tensor(name, part)
            )
            found.made[recipe] = tensor
            made[name], written = digest_of(part), written + part.nbytes
        read = found.report.bytes_read + array.nbytes
        found.report = replace(found.report, made=made, bytes_read=read, bytes_written=written)

    def _name(self, wanted: str) -> str:
        """A name for a new initializer that no graph of the model uses yet."""
        if not self._names:
            self._names.update(_names(self._graph))
        return free_name(wanted, self._names)


class _Views:
    """What one replacement reads of one weight, behind views."""

    def __init__(self, index: GraphIndex, candidate: Candidate, weight: str) -> None:
        self.weight = weight
        self._index = index
        self._candidate = candidate
        self._producer = {o: n for n in candidate.replacement for o in n.output if o}
        self._constants = {t.name: t for t in candidate.replacement_initializers}

    def stored(self) -> tuple[str, TensorProto]:
        """The tensor behind the weight, and the name of the value that it is.

        Raises:
            Stop: the weight is computed, an input, or of a type that is not handled.
        """
        value, tensor = self._source()
        if tensor.data_type not in _FLOATS:
            raise Stop(
                f"{value} is stored as {TensorProto.DataType.Name(tensor.data_type)}; float32,"
                " float16 and bfloat16 are written"
            )
        return value, tensor

    def _source(self) -> tuple[str, TensorProto]:
        """What the weight is a view of."""
        value = self.weight
        while (tensor := self._index.initializers.get(value)) is None:
            node = self._index.maker(value)
            if node is None:
                default = self._index.is_default(value)
                known = (
                    "its stored value is a default" if default else "its value is not in the file"
                )
                raise Stop(f"{value} is an input of the graph: {known}")
            constant = find_attribute(node, "value") if node.op_type == "Constant" else None
            if constant is not None:
                return value, constant.t
            if node.op_type not in _VIEWS:
                raise Stop(
                    f"{self.weight} is computed by {node.op_type} ({node.name or value}): fold it"
                    " into a stored weight first"
                )
            value = node.input[0]
        return value, tensor

    def wanted(self) -> dict[str, str]:
        """Values to replace -> recipe: the last views before something else reads them.

        Raises:
            Stop: nothing is cut out of the weight, so nothing would be gained.
        """
        above = self._above()
        derived = {self.weight: "|0".join(self._recipe(node) for node in above)}
        moved = {self.weight} if any(node.op_type not in _FREE for node in above) else set()
        frontier: dict[str, str] = {}
        for node in self._candidate.replacement:
            data = node.input[0] if node.input else ""
            if node.op_type in _VIEWS and data in derived and not node.domain:
                for position, output in enumerate(node.output):
                    derived[output] = f"{derived[data]}|{position}{self._recipe(node)}"
                    if node.op_type not in _FREE or data in moved:
                        moved.add(output)
                continue
            for name in node.input:
                if name in derived and name in moved:
                    frontier[name] = derived[name]
        if not frontier:
            raise Stop(f"{self.weight} is read as it is stored: there is nothing to cut out")
        return frontier

    def _above(self) -> list[onnx.NodeProto]:
        """Nodes of the graph that view the stored tensor, the nearest to the weight first."""
        nodes: list[onnx.NodeProto] = []
        node = self._index.maker(self.weight)
        while node is not None and node.op_type != "Constant":
            nodes.append(node)
            node = self._index.maker(node.input[0])
        return nodes

    def _recipe(self, node: onnx.NodeProto) -> str:
        """A node's operation and constants as text: equal recipes make equal values."""
        constants = [self._constant(name) for name in node.input[1:]]
        shown = [None if c is None else (c.tolist(), str(c.dtype)) for c in constants]
        return repr((node.op_type, sorted(attributes(node).items()), shown))

    def _constant(self, name: str) -> np.ndarray | None:
        if not name:
            return None
        if name in self._constants:
            return onnx.numpy_helper.to_array(self._constants[name])
        array = self._index.constant(name)
        if array is None:
            raise Stop(f"the view of {self.weight} depends on {name}, which is computed")
        return array

    def evaluate(self, value: str, stored: np.ndarray) -> np.ndarray:
        """`value`, computed from the stored tensor by the nodes that make it."""
        node = self._producer.get(value) or self._index.maker(value)
        if node is None or node.op_type == "Constant":
            return stored
        data = self.evaluate(node.input[0], stored)
        arrays = [data, *(self._constant(name) for name in node.input[1:])]
        with np.errstate(all="ignore"):
            result = FOLD[node.op_type](attributes(node), arrays)
        if isinstance(result, list):
            return np.asarray(result[list(node.output).index(value)])
        return np.asarray(result)

    def suffix(self, value: str) -> str:
        """The name of the part: W_UK is read before the attention, W_UV after it."""
        if self._candidate.family == VALUE_PRODUCT:
            return "w_uv"
        for node in self._candidate.replacement:
            if node.op_type == self._candidate.op.name:
                return "w_uv"
            if value in node.input:
                return "w_uk"
        return "w_uv"


def _storage(tensor: TensorProto) -> tuple[Any, ...]:
    """What distinguishes stored tensors: the byte range of external ones, the name of others."""
    if tensor.data_location == TensorProto.EXTERNAL:
        return (external_range(tensor), tensor.data_type, tuple(tensor.dims))
    return (tensor.name or id(tensor),)


def _home(index: GraphIndex, name: str) -> onnx.GraphProto:
    """The graph that stores or makes `name`: that of the index, or one around it."""
    while isinstance(index, ScopeIndex) and not index.binds(name):
        index = index.parent
    return index.graph


def _reader(graph: onnx.GraphProto, name: str) -> str:
    """Who reads `name` in a graph or in its bodies."""
    for node in graph.node:
        if name in node.input or (node.attribute and name in captured(node)):
            return str(node.name or node.output[0])
    return "the graph's interface"


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name of a graph and its bodies."""
    for values in (graph.input, graph.output, graph.initializer):
        yield from (value.name for value in values)
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
        for body in bodies(node).values():
            yield from _names(body)


def _rename_inputs(candidate: Candidate, names: dict[str, str]) -> None:
    """Read the new initializers; drop the views and constants that nobody reads any more."""
    for node in candidate.replacement:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
    needed, kept = set(candidate.outputs), []
    for node in reversed(candidate.replacement):
        if any(o in needed for o in node.output):
            kept.append(node)
            needed.update(node.input)
    candidate.replacement[:] = kept[::-1]
    candidate.replacement_initializers[:] = [
        t for t in candidate.replacement_initializers if t.name in needed
    ]


def materialized_notes(
    reports: Sequence[MaterializedWeight], file: WeightsFile | None
) -> list[str]:
    """What a report says of materialised weights, in lines."""
    if not reports:
        return ["materialized: nothing, no fused site expands its keys and values by a weight"]
    done = [r for r in reports if r.made]
    read, written = sum(r.bytes_read for r in done), sum(r.bytes_written for r in done)
    where = f" to {file.path.name}" if file is not None and file.bytes_written else ""
    notes = [
        f"materialized: {sum(len(r.made) for r in done)} initializers from {len(done)} expansion"
        f" weights; {read} bytes of weights read, {written} bytes written{where}"
    ]
    if file is not None and file.kept is not None and file.bytes_written:
        notes.append(f"{file.kept.name} was left for models that read it; remove it when none does")
    notes += [f"{r.weight} stays: {r.kept} reads it too" for r in done if r.kept]
    notes += [f"not materialized at {r.sites[0]}: {r.reason}" for r in reports if r.reason]
    return notes
