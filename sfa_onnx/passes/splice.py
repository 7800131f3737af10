"""Replace exactly the regions of verified candidates; everything else stays byte for byte.

The raw `GraphProto` is edited in place: region nodes are deleted by descending index, replacement
nodes are inserted where all their inputs exist and before every reader of their outputs. No other
node moves. What only the replaced nodes used (initializers, value_info, annotations) goes too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx

from sfa_onnx.errors import ModelError
from sfa_onnx.operator.op import ALL_OPS
from sfa_onnx.passes.candidate import Candidate, Refusal
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.region import edit_region, free_name, ordered_nodes, rename_region
from sfa_onnx.passes.graph.sub_graphs import bodies, owners

__all__ = ["Spliced", "check_region", "splice", "taken_names"]

_OWN_DOMAINS = {op.domain: op.version for op in ALL_OPS}
_NODE_METADATA_IR = 10  # first IR version whose NodeProto has metadata_props


@dataclass(frozen=True)
class Spliced:
    """What one candidate's splice did: names of nodes (or their outputs) removed and added."""

    removed: tuple[str, ...]
    added: tuple[str, ...]


def check_region(index: GraphIndex, candidate: Candidate) -> Refusal | None:
    """Whether the region can be cut out: its inner values must be used nowhere else.

    Returns:
        None when it can; otherwise a refusal that names the value and who uses it.
    """
    region = set(candidate.nodes)
    for i in candidate.nodes:
        for value in index.nodes[i].output:
            if not value or value in candidate.outputs:
                continue
            if index.is_graph_output(value):
                return Refusal(
                    f"the intermediate value {value!r} is an output of the graph",
                    value,
                    "remove it from the graph's outputs, or keep this site as it is",
                )
            for user, position in index.uses(value):
                if user not in region:
                    how = "captured by a sub-graph of" if position < 0 else "also used by"
                    return Refusal(
                        f"the intermediate value {value!r} is {how} {index.label(user)!r}", value
                    )
    return _check_order(index, candidate)


def _check_order(index: GraphIndex, candidate: Candidate) -> Refusal | None:
    """Whether a position exists after all inputs and before all readers."""
    low, high = _window(index, candidate)
    if low < high:
        return None
    return Refusal(
        f"the output is read by {index.label(high)!r} before all inputs of the fused op exist"
        f" ({index.label(low)!r} comes later)",
        candidate.outputs[0],
        "sort the graph so that the site's inputs come first",
    )


def _window(index: GraphIndex, candidate: Candidate) -> tuple[int, int]:
    """(last node that makes an input of the replacement, first outside reader of an output)."""
    made = {o for n in candidate.replacement for o in n.output}
    entering = {i for n in candidate.replacement for i in n.input if i} - made
    low = max((index.producer[v] for v in entering if v in index.producer), default=-1)
    region = set(candidate.nodes)
    readers = (u for v in candidate.outputs for u, _ in index.readers(v) if u not in region)
    high = min(readers, default=len(index.nodes))
    return low, high


def splice(
    model: onnx.ModelProto,
    index: GraphIndex,
    candidates: Sequence[Candidate],
    taken: set[str] | None = None,
    freed: Iterable[str] = (),
) -> list[Spliced]:
    """Replace the regions of all `candidates` in `model`, in place.

    Args:
        model: the model that owns `index.graph`.
        index: the index of the graph before any edit; it is stale afterwards.
        candidates: verified sites of that graph; `check_region` accepted each.
        taken: every name of the model, which learns the new ones; None: the graph has no outer one.
        freed: values of the graph that its bodies no longer read.

    Returns:
        One `Spliced` per candidate, in the order given.

    Raises:
        ModelError: two candidates share a node, or an opset import of ours has another version.
    """
    graph = index.graph
    _reject_overlap(index, candidates)
    import_domains(model, candidates)
    buried = [index.buried_below(c.nodes, c.outputs) for c in candidates]
    gone = {i for c in candidates for i in c.nodes}.union(*buried)
    dead = _dead_nodes(index, candidates, gone, freed)
    taken = taken_names(index) if taken is None else taken
    tensors = _constants(candidates, taken)
    inserts = [_replacement(model, index, c, taken) for c in candidates]
    results = []
    for n, (candidate, (_, nodes)) in enumerate(zip(candidates, inserts, strict=True)):
        extra = dead if n == 0 else ()  # support of several sites: listed once
        removed = tuple(index.place(i) for i in sorted({*candidate.nodes, *buried[n], *extra}))
        results.append(Spliced(removed, tuple(node.name for node in nodes)))
    gone |= set(dead)
    values = _orphans(index, candidates, gone, freed)
    _edit_nodes(graph, {i - index.first for i in gone}, inserts)
    _drop_values(graph, values)
    graph.initializer.extend(tensors)
    return results


def _reject_overlap(index: GraphIndex, candidates: Sequence[Candidate]) -> None:
    """No node may belong to two sites."""
    owner: dict[int, Candidate] = {}
    for candidate in candidates:
        for i in candidate.nodes:
            if i in owner:
                raise ModelError(
                    f"node {index.label(i)!r} belongs to the sites {owner[i].site_id!r} and"
                    f" {candidate.site_id!r}; fuse only one of them"
                )
            owner[i] = candidate


def import_domains(model: onnx.ModelProto, candidates: Iterable[Candidate]) -> None:
    """Add the opset imports that the replacements need.

    Raises:
        ModelError: the model imports one of our domains in another version.
    """
    needed = {n.domain for c in candidates for n in c.replacement} & set(_OWN_DOMAINS)
    present = {o.domain: o.version for o in model.opset_import}
    for domain in sorted(needed):
        version = _OWN_DOMAINS[domain]
        if domain not in present:
            model.opset_import.add(domain=domain, version=version)
        elif present[domain] != version and not _uses(model.graph, domain):
            # onnxruntime's optimiser writes the imports of every operator library it has loaded.
            next(o for o in model.opset_import if o.domain == domain).version = version
        elif present[domain] != version:
            raise ModelError(
                f"the model imports domain {domain!r} version {present[domain]}, but our operators"
                f" are defined in version {version}; change the import before fusing"
            )


def _uses(graph: onnx.GraphProto, domain: str) -> bool:
    """Whether a node of a graph or of its bodies is of this domain."""
    inner = (body for node in owners(graph) for body in bodies(node).values())
    return any(n.domain == domain for n in graph.node) or any(_uses(b, domain) for b in inner)


def _dead_nodes(
    index: GraphIndex, candidates: Sequence[Candidate], gone: set[int], freed: Iterable[str]
) -> list[int]:
    """Nodes of the graph that nobody reads any more (scattered masks, shape chains)."""
    read = {v for c in candidates for n in c.replacement for v in n.input}
    dead: set[int] = set()
    waiting = [*freed, *(v for i in gone for v in index.nodes[i].input)]
    while waiting:
        i = index.producer.get(waiting.pop(), -1)
        if i < index.first or i in gone or i in dead:
            continue
        outputs = [o for o in index.nodes[i].output if o]
        if not any(_is_read(index, o, read, gone | dead) for o in outputs):
            dead.add(i)
            waiting += [*index.nodes[i].input, *index.captures(i)]
    return sorted(dead)


def _is_read(index: GraphIndex, value: str, read: set[str], gone: set[int]) -> bool:
    """Whether anything that stays reads `value`."""
    if value in read or index.is_graph_output(value):
        return True
    return any(user not in gone for user, _ in index.readers(value))


def taken_names(index: GraphIndex) -> set[str]:
    """Every node and value name of a main graph and of all bodies in it.

    Names are kept apart across scopes too: no value may shadow another.
    """
    taken = {n.name for n in index.nodes} | index.producer.keys() | index.consumers.keys()
    taken.update(index.initializers, (v.name for v in index.inputs))
    taken.update(v.name for v in index.graph.output)
    for owner in index.owners:
        taken |= _inner_names(index.nodes[owner])
    return taken


def _inner_names(owner: onnx.NodeProto) -> set[str]:
    """Every name in the bodies of a node."""
    found: set[str] = set()
    for body in bodies(owner).values():
        found.update(v.name for v in (*body.initializer, *body.input, *body.output))
        for node in body.node:
            found.update((node.name, *node.input, *node.output))
        found = found.union(*(_inner_names(node) for node in owners(body)))
    return found


def _constants(candidates: Sequence[Candidate], taken: set[str]) -> list[onnx.TensorProto]:
    """The constants of all replacements, under names that are free; their readers follow.

    Sites in bodies that were written alike have constants of one name.
    """
    made: list[onnx.TensorProto] = []
    shared: dict[str, str] = {}
    own: list[dict[str, str]] = []
    for candidate in candidates:
        own.append({})
        for tensor in candidate.replacement_initializers:
            made.append(copy.copy(tensor))
            made[-1].name = own[-1][tensor.name] = free_name(tensor.name, taken)
        shared |= own[-1]
    for candidate, names in zip(candidates, own, strict=True):
        for node in candidate.replacement:
            node.input[:] = [names.get(i) or shared.get(i, i) for i in node.input]
    return made


def _replacement(
    model: onnx.ModelProto, index: GraphIndex, candidate: Candidate, taken: set[str]
) -> tuple[int, list[onnx.NodeProto]]:
    """(position among the graph's own nodes, nodes to insert in front of it) for one candidate."""
    anchor = index.nodes[candidate.anchor]
    made = {o for n in candidate.replacement for o in n.output}
    entering = {i for n in candidate.replacement for i in n.input if i} - made
    region = edit_region(candidate.replacement, candidate.outputs)
    rename_region(region, taken, entering | set(candidate.outputs), index.label(candidate.anchor))
    nodes = ordered_nodes(region)
    for node in nodes:
        if anchor.metadata_props or model.ir_version >= _NODE_METADATA_IR:
            _merge_metadata(node, anchor)
    low, high = _window(index, candidate)
    last = max(candidate.nodes) + 1
    return min(max(last, low + 1), high) - index.first, nodes


def _merge_metadata(node: onnx.NodeProto, anchor: onnx.NodeProto) -> None:
    """The anchor's provenance (module, stack trace) also holds for what replaces it."""
    present = {p.key for p in node.metadata_props}
    node.metadata_props.extend(p for p in anchor.metadata_props if p.key not in present)


def _orphans(
    index: GraphIndex, candidates: Sequence[Candidate], gone: set[int], freed: Iterable[str]
) -> set[str]:
    """Values that exist only for the removed nodes: inner values, their own initializers."""
    kept = {v for c in candidates for v in c.outputs}
    read = {v for c in candidates for n in c.replacement for v in n.input}
    touched = {v for v in freed if v in index.initializers}
    for i in gone:
        touched.update(v for v in index.nodes[i].output if v)
        read_here = (*index.nodes[i].input, *index.captures(i))
        touched.update(v for v in read_here if v in index.initializers)
    return {
        v
        for v in touched - kept - read
        if not index.is_graph_output(v) and all(user in gone for user, _ in index.readers(v))
    }


def _edit_nodes(
    graph: onnx.GraphProto, gone: set[int], inserts: list[tuple[int, list[onnx.NodeProto]]]
) -> None:
    """Delete and insert from the end to the start, so that no pending index moves."""
    pending = sorted(enumerate(inserts), key=lambda item: (item[1][0], item[0]))
    doomed = sorted(gone)
    while pending or doomed:
        position = pending[-1][1][0] if pending else -1
        if doomed and doomed[-1] >= position:
            del graph.node[doomed.pop()]
            continue
        for node in reversed(pending.pop()[1][1]):
            graph.node.insert(position, node)


def _drop_values(graph: onnx.GraphProto, values: set[str]) -> None:
    """Remove initializers, value_info and quantisation annotations of vanished values."""
    for field, key in (
        (graph.initializer, "name"),
        (graph.value_info, "name"),
        (graph.quantization_annotation, "tensor_name"),
    ):
        doomed = [i for i, item in enumerate(field) if getattr(item, key) in values]
        for i in reversed(doomed):
            del field[i]
