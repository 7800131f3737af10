"""Replace exactly the regions of verified candidates; everything else stays byte for byte.

The raw `GraphProto` is edited in place: region nodes are deleted by descending index, replacement
nodes are inserted where all their inputs exist and before every reader of their outputs. No other
node moves. What only the replaced nodes used (initializers, value_info, annotations) goes too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx

from sfa_onnx.errors import ModelError
from sfa_onnx.op import ALL_OPS
from sfa_onnx.passes.candidate import Candidate, Refusal
from sfa_onnx.passes.index import GraphIndex
from sfa_onnx.passes.region import edit_region, ordered_nodes, rename_region

__all__ = ["Spliced", "check_region", "splice"]

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
    readers = (u for v in candidate.outputs for u, _ in index.uses(v) if u not in region)
    high = min(readers, default=len(index.nodes))
    return low, high


def splice(
    model: onnx.ModelProto, index: GraphIndex, candidates: Sequence[Candidate]
) -> list[Spliced]:
    """Replace the regions of all `candidates` in `model`, in place.

    Args:
        model: the model that owns `index.graph`.
        index: the index of the graph before any edit; it is stale afterwards.
        candidates: verified sites of that graph; `check_region` accepted each.

    Returns:
        One `Spliced` per candidate, in the order given.

    Raises:
        ModelError: two candidates share a node, or an opset import of ours has another version.
    """
    graph = index.graph
    _reject_overlap(index, candidates)
    import_domains(model, candidates)
    dead = _dead_nodes(index, candidates)
    taken = _taken_names(index)
    inserts = [_replacement(model, index, c, taken) for c in candidates]
    results = []
    for n, (candidate, (_, nodes)) in enumerate(zip(candidates, inserts, strict=True)):
        extra = dead if n == 0 else ()  # support of several sites: told once
        removed = tuple(index.label(i) for i in sorted({*candidate.nodes, *extra}))
        results.append(Spliced(removed, tuple(node.name for node in nodes)))
    gone = {i for c in candidates for i in c.nodes} | set(dead)
    values = _orphans(index, candidates, gone)
    _edit_nodes(graph, gone, inserts)
    _drop_values(graph, values)
    for candidate in candidates:
        graph.initializer.extend(candidate.replacement_initializers)
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
        elif present[domain] != version and not any(n.domain == domain for n in model.graph.node):
            # onnxruntime's optimiser imports every domain it knows, used or not
            next(o for o in model.opset_import if o.domain == domain).version = version
        elif present[domain] != version and not any(n.domain == domain for n in model.graph.node):
            # onnxruntime's optimiser writes the imports of every operator library it has loaded.
            next(o for o in model.opset_import if o.domain == domain).version = version
        elif present[domain] != version:
            raise ModelError(
                f"the model imports domain {domain!r} version {present[domain]}, but our operators"
                f" are defined in version {version}; change the import before fusing"
            )


def _dead_nodes(index: GraphIndex, candidates: Sequence[Candidate]) -> list[int]:
    """Nodes above the regions that nobody reads any more (scattered masks, shape chains)."""
    gone = {i for c in candidates for i in c.nodes}
    read = {v for c in candidates for n in c.replacement for v in n.input}
    dead: set[int] = set()
    waiting = list(gone)
    while waiting:
        for value in index.nodes[waiting.pop()].input:
            i = index.producer.get(value)
            if i is None or i in gone or i in dead:
                continue
            outputs = [o for o in index.nodes[i].output if o]
            if not any(_is_read(index, o, read, gone | dead) for o in outputs):
                dead.add(i)
                waiting.append(i)
    return sorted(dead)


def _is_read(index: GraphIndex, value: str, read: set[str], gone: set[int]) -> bool:
    """Whether anything that stays reads `value`."""
    if value in read or index.is_graph_output(value):
        return True
    return any(user not in gone for user, _ in index.uses(value))


def _taken_names(index: GraphIndex) -> set[str]:
    """Every node and value name of the graph, names captured by sub-graphs included."""
    graph = index.graph
    taken = {n.name for n in index.nodes} | set(index.producer) | set(index.consumers)
    taken.update(index.initializers, (v.name for v in graph.input), (v.name for v in graph.output))
    for node in index.nodes:
        if node.op_type in ("If", "Loop", "Scan"):
            taken.update(_inner_names(node))
    return taken


def _inner_names(node: onnx.NodeProto) -> Iterable[str]:
    """Names defined inside the sub-graphs of a node: an outer value may not shadow them."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (t.name for t in graph.initializer)
            yield from (v.name for v in graph.input)
            for inner in graph.node:
                yield from inner.output
                yield from _inner_names(inner)


def _replacement(
    model: onnx.ModelProto, index: GraphIndex, candidate: Candidate, taken: set[str]
) -> tuple[int, list[onnx.NodeProto]]:
    """(position among the original nodes, nodes to insert in front of it) for one candidate."""
    anchor = index.nodes[candidate.anchor]
    made = {o for n in candidate.replacement for o in n.output}
    entering = {i for n in candidate.replacement for i in n.input if i} - made
    own = {t.name for t in candidate.replacement_initializers}
    region = edit_region(candidate.replacement, candidate.outputs)
    rename_region(region, taken, entering | set(candidate.outputs), index.label(candidate.anchor))
    nodes = ordered_nodes(region)
    if clash := sorted(own & taken):
        raise ModelError(f"replacement initializer {clash[0]!r}: that name exists already")
    taken |= own
    for node in nodes:
        if anchor.metadata_props or model.ir_version >= _NODE_METADATA_IR:
            _merge_metadata(node, anchor)
    low, high = _window(index, candidate)
    last = max(candidate.nodes) + 1
    return min(max(last, low + 1), high), nodes


def _merge_metadata(node: onnx.NodeProto, anchor: onnx.NodeProto) -> None:
    """The anchor's provenance (module, stack trace) also holds for what replaces it."""
    present = {p.key for p in node.metadata_props}
    node.metadata_props.extend(p for p in anchor.metadata_props if p.key not in present)


def _orphans(index: GraphIndex, candidates: Sequence[Candidate], gone: set[int]) -> set[str]:
    """Values that exist only for the removed nodes: inner values, their own initializers."""
    kept = {v for c in candidates for v in c.outputs}
    read = {v for c in candidates for n in c.replacement for v in n.input}
    touched: set[str] = set()
    for i in gone:
        touched.update(v for v in index.nodes[i].output if v)
        touched.update(v for v in index.nodes[i].input if v in index.initializers)
    return {
        v
        for v in touched - kept - read
        if not index.is_graph_output(v)
        and not (v in index.initializers and v in {x.name for x in index.graph.input})
        and all(user in gone for user, _ in index.uses(v))
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
