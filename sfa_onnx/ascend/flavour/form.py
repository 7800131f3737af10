"""The outer form CANN's parser needs: names, empty outputs, initializers, outputs, refusals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from sfa_onnx.ascend.flavour.repairs import dense
from sfa_onnx.ascend.flavour.scope import Facts, Names, Scope, inner_graphs, scopes
from sfa_onnx.errors import ModelError, WeightsError
from sfa_onnx.files.external import iter_tensors
from sfa_onnx.files.onnx_attrs import find_attribute

__all__ = [
    "clean_external_data",
    "feed_constant_outputs",
    "lift_initializers",
    "name_nodes",
    "name_outputs",
    "one_domain",
    "refuse_short",
    "refuse_unfit",
]

# Bytes an element takes in raw_data; types that are not listed are not judged (4-bit: see below).
_ITEM_SIZES: dict[int, int] = {
    **dict.fromkeys((TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL, 17, 18, 19, 20), 1),
    **dict.fromkeys((TensorProto.FLOAT16, TensorProto.BFLOAT16), 2),
    **dict.fromkeys((TensorProto.INT16, TensorProto.UINT16), 2),
    **dict.fromkeys((TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT32), 4),
    **dict.fromkeys((TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT64), 8),
}
_EXTERNAL_KEYS = ("location", "offset", "length")
# Names the parser makes up itself, for initializers and for expanded nodes.
_GENERATED = re.compile(r"_Initializer_\d+$|^PartitionedCall_")


def one_domain(graph: GraphProto) -> None:
    """Spell the default domain "" everywhere."""
    for node in graph.node:
        if node.domain == "ai.onnx":
            node.domain = ""
        for inner in inner_graphs(node):
            one_domain(inner)


def name_nodes(graph: GraphProto, names: Names, taken: frozenset[str] = frozenset()) -> list[str]:
    """Give every node a name of its own; returns "old -> new" for names that had to change.

    A name may not be empty, used twice in one graph, a graph input's, or one the parser generates.
    """
    changed = []
    used = set(taken) | {value.name for value in graph.input}
    for node in graph.node:
        if not node.name:
            node.name = names.fresh(f"{node.op_type}_{len(used)}")
        elif node.name in used or _GENERATED.search(node.name):
            old, base = node.name, _GENERATED.sub("_node", node.name)
            node.name = names.fresh(base)
            changed.append(f"{old} -> {node.name}")
        used.add(node.name)
        for inner in inner_graphs(node):
            changed += name_nodes(inner, names)
    return changed


def name_outputs(graph: GraphProto, names: Names) -> int:
    """Drop "" outputs where the operator allows it, else name them.

    The parser would wire an empty output to every empty input of the graph.
    """
    count = 0
    for node in graph.node:
        least = _least_outputs(node)
        while len(node.output) > least and not node.output[-1]:
            del node.output[-1]
            count += 1
        for i, output in enumerate(node.output):
            if not output:
                node.output[i] = names.fresh(f"{node.name}/unused_{i}")
                count += 1
        for inner in inner_graphs(node):
            count += name_outputs(inner, names)
    return count


def _least_outputs(node: NodeProto) -> int:
    known = not node.domain and onnx.defs.has(node.op_type)
    return max(1, onnx.defs.get_schema(node.op_type).min_output) if known else 1


def lift_initializers(model: ModelProto, names: Names) -> int:
    """Sparse initializers become dense; external ones of sub-graphs move to the main graph."""
    count = _densify(model.graph)
    for node in model.graph.node:
        for inner in inner_graphs(node):
            count += _lift(model.graph, inner, names)
    return count


def _densify(graph: GraphProto) -> int:
    count = len(graph.sparse_initializer)
    graph.initializer.extend(dense(sparse) for sparse in graph.sparse_initializer)
    del graph.sparse_initializer[:]
    return count


def _lift(main: GraphProto, graph: GraphProto, names: Names) -> int:
    count = _densify(graph)
    outside = [t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL]
    constants = [n for n in graph.node if _is_external_constant(n)]
    known = {v.name for v in (*main.initializer, *main.input)}
    known.update(out for node in main.node for out in node.output)
    rename: dict[str, str] = {}
    named = [(t.name, t) for t in outside]
    for old, tensor in [*named, *((n.output[0], n.attribute[0].t) for n in constants)]:
        lifted = main.initializer.add()
        lifted.CopyFrom(tensor)
        lifted.name = names.fresh(old) if old in known else old
        rename[old] = lifted.name
    kept = [t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in constants:
        graph.node.remove(node)
    _rename_reads(graph, {a: b for a, b in rename.items() if a != b})
    for node in graph.node:
        for inner in inner_graphs(node):
            count += _lift(main, inner, names)
    return count + len(rename)


def _is_external_constant(node: NodeProto) -> bool:
    value = find_attribute(node, "value") if node.op_type == "Constant" else None
    return value is not None and value.t.data_location == TensorProto.EXTERNAL


def _rename_reads(graph: GraphProto, rename: dict[str, str]) -> None:
    if not rename:
        return
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = rename.get(name, name)
        for inner in inner_graphs(node):
            _rename_reads(inner, rename)
    for output in graph.output:
        output.name = rename.get(output.name, output.name)


def clean_external_data(model: ModelProto) -> int:
    """Keep location, offset and length only; the parser reads any other key as a length.

    Raises:
        WeightsError: a location is absolute or missing, or an offset or length is no number.
    """
    count = 0
    for tensor in iter_tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        if not location or PurePosixPath(location).is_absolute():
            raise WeightsError(
                f"tensor {tensor.name!r}: external location {location!r}; expected a path relative"
                " to the model's folder (the parser does not look anywhere else)"
            )
        for key in ("offset", "length"):
            if not entries.get(key, "0").isdigit():
                raise WeightsError(f"tensor {tensor.name!r}: {key} {entries[key]!r} is no number")
        if len(entries) != len(tensor.external_data) or not entries.keys() <= set(_EXTERNAL_KEYS):
            del tensor.external_data[:]
            for key in _EXTERNAL_KEYS:
                if key in entries:
                    tensor.external_data.add(key=key, value=entries[key])
            count += 1
    return count


def feed_constant_outputs(model: ModelProto, names: Names, facts: Facts, opset: int) -> list[str]:
    """Make outputs that depend on no input depend on one (+ 0): the parser drops them otherwise.

    Raises:
        ModelError: the output's type has no such neutral operation.
    """
    graph = model.graph
    scope = Scope(graph, names, facts, opset)
    live = _from_inputs(graph)
    constants = [o for o in graph.output if o.name not in live]
    if not constants:
        return []
    first = next(v.name for v in graph.input if v.name in live)
    size = scope.node("Size", [first], "constant_outputs/size", dtype=TensorProto.INT64)
    minus = scope.node("Sub", [size.output[0]] * 2, "constant_outputs/zero")
    graph.node.extend([size, minus])
    inner = {o.name: _renamed(scope, o.name) for o in constants}
    _rename_top(graph, inner)
    for name, made in inner.items():
        _tie(scope, name, made, minus.output[0])
    scope.changed()
    return list(inner)


def _renamed(scope: Scope, output: str) -> str:
    """Give what makes a constant output another name; returns it."""
    dtype = scope.dtype(output)
    if dtype in (TensorProto.UNDEFINED, TensorProto.STRING) or (
        dtype in (2, 3, 4, 5) and scope.opset < 14
    ):
        raise ModelError(
            f"graph output {output!r} depends on constants only (CANN's parser drops it) and"
            f" its type {TensorProto.DataType.Name(dtype)} cannot be tied to an input; remove it"
        )
    inner = scope.names.fresh(f"{output}/constant")
    producer, tensor = scope.producer(output), scope.initializer(output)
    if producer is not None:
        producer.output[list(producer.output).index(output)] = inner
    elif tensor is not None:
        tensor.name = inner
    return inner


def _tie(scope: Scope, output: str, inner: str, zero: str) -> None:
    dtype = scope.dtype(output)
    like = scope.node("Cast", [zero], f"{output}/zero", dtype=dtype, to=dtype)
    op = "Or" if dtype == TensorProto.BOOL else "Add"
    tie = scope.node(op, [inner, like.output[0]], f"{output}/tied", outputs=[output])
    scope.graph.node.extend([like, tie])


def _rename_top(graph: GraphProto, new: Mapping[str, str]) -> None:
    """As `_rename_reads`, but the outputs keep their names."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in new:
                node.input[i] = new[name]
        for inner in inner_graphs(node):
            _rename_top(inner, new)


def _from_inputs(graph: GraphProto) -> set[str]:
    initializers = {t.name for t in graph.initializer}
    live = {v.name for v in graph.input if v.name not in initializers}
    if not live:
        raise ModelError("the graph has no input; CANN's parser needs one (E16001)")
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in _reads(node):
            readers.setdefault(name, []).append(node)
    queue = list(live)
    while queue:
        for node in readers.get(queue.pop(), ()):
            new = [o for o in node.output if o and o not in live]
            live.update(new)
            queue.extend(new)
    return live


def _reads(node: NodeProto) -> Iterator[str]:
    yield from node.input
    for graph in inner_graphs(node):
        for inner in graph.node:
            yield from _reads(inner)
        yield from (o.name for o in graph.output)


def refuse_unfit(model: ModelProto, opset: int) -> None:
    """Refuse what no rewrite can give the parser, by name.

    Raises:
        ModelError: no graph output, a value nobody produces, a gap ("" input) inside an If
            branch, raw data that does not fill its dims.
    """
    if not model.graph.output:
        raise ModelError("the graph has no output; CANN's parser needs one (E16001)")
    made: dict[int, set[str]] = {}
    for scope in scopes(model.graph, Names(model), Facts(), opset):
        _refuse_missing(scope, made)
        if scope.parent is not None:
            _refuse_gaps(scope.graph.node)
    refuse_short(iter_tensors(model))


def refuse_short(tensors: Iterable[TensorProto]) -> None:
    """Refuse raw data that does not fill its dims.

    Raises:
        ModelError: a tensor holds fewer bytes than its dims and type need.
    """
    for tensor in tensors:
        if tensor.HasField("raw_data") and tensor.data_type != TensorProto.STRING:
            _refuse_short(tensor)


def _refuse_missing(scope: Scope, made: dict[int, set[str]]) -> None:
    """`made`: what each scope makes, by its identity; it grows by this one."""
    graph = scope.graph
    own = {v.name for v in (*graph.input, *graph.initializer)}
    own.update(out for node in graph.node for out in node.output)
    made[id(scope)] = own
    for node in graph.node:
        for name in node.input:
            if name and not _is_known(scope, name, made):
                raise ModelError(
                    f"node {node.name!r} reads {name!r}, which nothing produces; CANN's parser"
                    " would leave that input open without a word"
                )


def _is_known(scope: Scope | None, name: str, made: dict[int, set[str]]) -> bool:
    while scope is not None and name not in made[id(scope)]:
        scope = scope.parent
    return scope is not None


def _refuse_gaps(nodes: Sequence[NodeProto]) -> None:
    for node in nodes:
        if "" in node.input:
            raise ModelError(
                f"node {node.name!r} ({node.op_type}) leaves out an input inside a sub-graph;"
                " CANN's parser takes the empty name for an outer value and fails (E19999)."
                " Move the node out of the If, or give every input"
            )


def _refuse_short(tensor: TensorProto) -> None:
    itemsize = _ITEM_SIZES.get(tensor.data_type, 0)
    count = int(np.prod(tensor.dims, dtype=np.int64))
    four_bit = tensor.data_type in (21, 22, 23)
    expected = (count + 1) // 2 if four_bit else count * itemsize
    if len(tensor.raw_data) < expected:
        raise ModelError(
            f"tensor {tensor.name!r}: {len(tensor.raw_data)} bytes of raw data, {expected} expected"
            f" for dims {list(tensor.dims)}; the file is damaged"
        )
