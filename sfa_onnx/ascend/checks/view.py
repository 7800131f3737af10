"""A model as CANN's ONNX parser walks it: scopes, the names it gives, dtypes, shapes, constants.

A scope is one graph: the root, or a branch of an `If` (the only control flow the parser expands).
Weights are never read: only constants of up to 1 MiB that lie in the file itself.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from sfa_onnx.ascend.flavour.scope import Facts
from sfa_onnx.guard.guarded import infer_shapes
from sfa_onnx.operator.op import OpContract, find_op
from sfa_onnx.passes.shapes.dims import size_of, write_numbers

__all__ = ["Dims", "ModelView", "Scope", "contract_of", "is_external"]

_log = logging.getLogger("sfa_onnx")

Dims = tuple[int | str | None, ...]
_CONSTANT_LIMIT: Final = 1 << 20
_INFERENCE_LIMIT: Final = 1 << 16
_A = onnx.AttributeProto


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's bytes lie in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def contract_of(node: onnx.NodeProto) -> OpContract | None:
    """The operator contract the node stands for, ATC and foreign spellings included."""
    return _contract("" if node.domain == "ai.onnx" else node.domain, node.op_type)


@cache
def _contract(domain: str, op_type: str) -> OpContract | None:
    op = find_op(domain, op_type)
    return op if op or domain else find_op("npu", op_type) or find_op("sfa_onnx", op_type)


@dataclass(eq=False)
class Scope:
    """One graph. `names[i]` is the name the parser gives node i."""

    graph: onnx.GraphProto
    path: str = ""  # "" for the root, "<if node>/then_branch" below
    parent: Scope | None = None
    names: list[str] = field(default_factory=list)
    outer_values: list[str] = field(default_factory=list)  # become inputs of the branch, sorted

    @cached_property
    def producers(self) -> dict[str, int]:
        """Value name -> index of the node that writes it (the last one, as in the parser)."""
        return {out: i for i, n in enumerate(self.graph.node) for out in n.output if out}

    @cached_property
    def consumers(self) -> dict[str, list[int]]:
        """Value name -> indices of the nodes that read it directly."""
        readers: dict[str, list[int]] = {}
        for i, node in enumerate(self.graph.node):
            for name in node.input:
                readers.setdefault(name, []).append(i)
        return readers

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        """Dense initializers by name."""
        return {t.name: t for t in self.graph.initializer if t.name}

    @cached_property
    def inputs(self) -> dict[str, onnx.ValueInfoProto]:
        """Graph inputs that no initializer fills."""
        return {v.name: v for v in self.graph.input if v.name not in self.initializers}

    @cached_property
    def outputs(self) -> set[str]:
        """Names of the graph outputs."""
        return {v.name for v in self.graph.output}

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node of this scope that writes `name`."""
        index = self.producers.get(name)
        return None if index is None else self.graph.node[index]

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes of this scope that read `name`."""
        return [self.graph.node[i] for i in self.consumers.get(name, [])]

    def known(self, name: str) -> bool:
        """Whether anything in this scope gives `name` a value the parser sees."""
        return name in self.producers or name in self.initializers or name in self.inputs


def _branches(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    if node.op_type == "If":
        for item in node.attribute:
            if item.type == _A.GRAPH:
                yield item.name, item.g


def _outer_values(graph: onnx.GraphProto) -> set[str]:
    read = {name for node in graph.node for name in node.input}
    written = {name for node in graph.node for name in node.output}
    return read - written - {t.name for t in graph.initializer}


class ModelView:
    """Read-only lookups over a model. Paths are relative to `base_dir` (None: unknown)."""

    def __init__(self, model: onnx.ModelProto, base_dir: Path | None = None, *, infer: bool = True):
        self.model = model
        self._infers = infer
        self.base_dir = base_dir
        self._problem = ""
        self.root = Scope(model.graph)
        self.scopes = [self.root]
        self._name_nodes()

    def _name_nodes(self) -> None:
        """Name unnamed nodes as the parser does: one counter over all graphs, outer first."""
        counter, queue = 0, deque([self.root])
        while queue:
            scope = queue.popleft()
            for node in scope.graph.node:
                name = node.name
                if not name:
                    name, counter = f"{node.op_type}_{counter}", counter + 1
                scope.names.append(name)
                if node.op_type != "If":
                    continue
                branches = list(_branches(node))
                outer = sorted(set().union(*(_outer_values(g) for _, g in branches)))
                for label, graph in branches:
                    path = f"{scope.path}/{name}/{label}".lstrip("/")
                    queue.append(Scope(graph, path, scope, [], outer))
                    self.scopes.append(queue[-1])

    @cached_property
    def imports(self) -> dict[str, int]:
        """Opset imports as spelled; a later one of the same spelling wins."""
        return {o.domain: o.version for o in self.model.opset_import}

    @cached_property
    def opset(self) -> int:
        """Version of the default domain (0 when it is not imported)."""
        return self.imports.get("", self.imports.get("ai.onnx", 0))

    def nodes(self) -> Iterator[tuple[Scope, int, onnx.NodeProto]]:
        """Every node of every scope, with its scope and index."""
        for scope in self.scopes:
            for i, node in enumerate(scope.graph.node):
                yield scope, i, node

    def resolve_scope(self, scope: Scope, name: str) -> Scope | None:
        """The scope, from `scope` outwards, in which `name` has its value."""
        at: Scope | None = scope
        while at is not None and not at.known(name):
            at = at.parent
        return at

    def dtype(self, scope: Scope, name: str) -> int:
        """elem_type of a value, 0 when unknown."""
        info = self._info(scope, name)
        return info[0] if info else 0

    def shape(self, scope: Scope, name: str) -> Dims | None:
        """Dims of a value: a number, a symbol or None each; None when the rank is unknown."""
        info = self._info(scope, name)
        return info[1] if info else None

    def _info(self, scope: Scope, name: str) -> tuple[int, Dims | None] | None:
        at: Scope | None = scope
        while at is not None:
            tensor = at.initializers.get(name)
            if tensor is not None:
                return tensor.data_type, tuple(tensor.dims)
            found = self._values.get((at.path, name))
            if found is not None:
                return found
            at = at.parent
        return None

    def constant(self, scope: Scope, name: str) -> np.ndarray[Any, Any] | None:
        """The value of a small constant that lies in the file itself, else None."""
        at = self.resolve_scope(scope, name)
        if at is None:
            return None
        tensor = at.initializers.get(name)
        if tensor is None:
            node = at.producer(name)
            if node is None or node.op_type != "Constant":
                return None
            return _constant_node(node)
        return _array(tensor)

    def whole_numbers(self, scope: Scope, name: str) -> list[int] | None:
        """As `constant`, flat, of a constant of whole numbers; None for all others."""
        value = self.constant(scope, name)
        return None if value is None or value.dtype.kind not in "iu" else value.ravel().tolist()

    def origin(self, scope: Scope, name: str, through: frozenset[str]) -> onnx.NodeProto | None:
        """The first producer upstream of `name` whose type is not in `through` (first inputs)."""
        for _ in range(64):
            at = self.resolve_scope(scope, name)
            node = at.producer(name) if at else None
            if node is None or node.op_type not in through or not node.input:
                return node
            name = node.input[0]
        return None

    @property
    def inference_problem(self) -> str:
        """Why onnx infers no shapes for this model; empty when it does."""
        return self._problem if self._values is not None else ""

    @cached_property
    def _values(self) -> dict[tuple[str, str], tuple[int, Dims | None]]:
        inferred = None  # onnx's C++ dies over much that a broken model holds
        if self._infers:
            inferred, self._problem = _infer(self.model)
        table: dict[tuple[str, str], tuple[int, Dims | None]] = {}
        other = ModelView(inferred) if inferred is not None else self
        for scope in other.scopes:
            graph = scope.graph
            for value in (*graph.value_info, *graph.output, *graph.input):
                entry = _value(value)
                if entry and (scope.path, value.name) not in table:
                    table[scope.path, value.name] = entry
            for node in graph.node:
                if node.op_type == "Constant" and (array := _constant_node(node)) is not None:
                    elem = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
                    table.setdefault((scope.path, node.output[0]), (elem, array.shape))
        return table

    def facts(self) -> Facts:
        """Dtypes and dims by name, in the form the rewriting rules of the ATC flavour want."""
        facts = Facts()
        for scope, _, node in self.nodes():
            for name in (*node.input, *node.output):
                info = self._info(scope, name) if name else None
                elem, dims = info or (0, None)
                if elem:
                    facts.types[name] = elem
                if dims is not None:
                    facts.dims[name] = tuple(d if isinstance(d, int) else None for d in dims)
        return facts


def _value(value: onnx.ValueInfoProto) -> tuple[int, Dims | None] | None:
    if not value.type.HasField("tensor_type"):
        return None
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return (tensor.elem_type, None) if tensor.elem_type else None
    dims: list[int | str | None] = []
    for dim in tensor.shape.dim:
        known = dim.HasField("dim_value") and dim.dim_value >= 0
        size = dim.dim_value if known else size_of(dim.dim_param, {})
        dims.append(dim.dim_param or None if size is None else size)
    return tensor.elem_type, tuple(dims)


def _array(tensor: onnx.TensorProto) -> np.ndarray[Any, Any] | None:
    if is_external(tensor) or tensor.ByteSize() > _CONSTANT_LIMIT:
        return None
    try:
        return onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, NotImplementedError, KeyError):
        return None


def _constant_node(node: onnx.NodeProto) -> np.ndarray[Any, Any] | None:
    for item in node.attribute:
        if item.name == "value" and item.type == _A.TENSOR:
            return _array(item.t)
        if item.name in ("value_float", "value_floats"):
            return np.asarray(onnx.helper.get_attribute_value(item), np.float32)
        if item.name in ("value_int", "value_ints"):
            return np.asarray(onnx.helper.get_attribute_value(item), np.int64)
    return None


def _infer(model: onnx.ModelProto) -> tuple[onnx.ModelProto | None, str]:
    """Infer shapes on a copy whose big initializers are inputs: no weight is copied."""
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    source, graph = model.graph, light.graph
    graph.name = source.name or "graph"
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.value_info.extend(source.value_info)
    write_numbers(graph)
    listed = {v.name for v in source.input}
    for tensor in source.initializer:
        if not is_external(tensor) and tensor.ByteSize() <= _INFERENCE_LIMIT:
            graph.initializer.append(tensor)
        elif tensor.name not in listed:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(info)
    return infer_shapes(light, data_prop=True)
