"""The products with W_UK and W_UV beside a site: one MatMul over heads in place of an Einsum.

Models that absorb the expansion weight themselves write `bshd,hdc->bshc` in front of the attention
and `bshc,hdc->bshd` behind it. Runtimes bring both operands of an Einsum into order on every call,
weights of tens of megabytes too. Here the weight is turned once (a Transpose of a constant, which
runtimes fold when they load the model, or `materialize` writes) and the rest is a MatMul whose
batch axis is the heads. Sums and products stay the same; the labels of the Einsum decide alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.passes.candidate import Candidate, Operand, Role
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["VALUE_PRODUCT", "weight_products"]

VALUE_PRODUCT: Final = "product with W_UV"
Owner = TypeVar("Owner")
_KEY_PRODUCT: Final = "product with W_UK"
_VIEWS: Final = frozenset(("Identity", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Transpose"))
_WEIGHT_VIEWS: Final = _VIEWS | {"Slice", "Split"}
_ON_THE_WAY: Final = _VIEWS | {"Concat", "Mul"}
_MOST: Final = 64  # nodes looked at around one site
_EXPLICIT: Final = re.compile(r"([A-Za-z]+),([A-Za-z]+)->([A-Za-z]+)")


def weight_products(
    index: GraphIndex, sites: Iterable[tuple[Candidate, Owner]]
) -> list[tuple[Candidate, Owner]]:
    """Replacements for the Einsum nodes that multiply by a weight per head beside sites.

    Args:
        index: of the graph before any edit.
        sites: candidates of that graph that will be spliced, each with whatever belongs to it.

    Returns:
        One candidate per Einsum, its weight an operand of role EXPANSION, with what belongs to the
        site that it stands beside.
    """
    listed = list(sites)
    taken = {i for site, _ in listed for i in site.nodes}
    found: list[tuple[Candidate, Owner]] = []
    for site, owner in listed:
        for i, family in _around(index, site):
            product = None if i < index.first or i in taken else _Product.of(index, i)
            if product is not None:
                taken.add(i)
                found.append((product.candidate(site, family), owner))
    return found


def _around(index: GraphIndex, site: Candidate) -> Iterator[tuple[int, str]]:
    """Einsum nodes that make a site's query, or read its output, with views between."""
    queue = [o.value for o in site.operands if o.role in (Role.QUERY, Role.QUERY_ROPE)]
    for _ in range(_MOST):
        if not queue:
            break
        name = queue.pop()
        node = index.maker(name)
        if node is not None and node.op_type == "Einsum":
            yield index.producer[name], _KEY_PRODUCT
        elif node is not None and node.op_type in _ON_THE_WAY:
            queue += node.input if node.op_type in ("Concat", "Mul") else node.input[:1]
    queue = list(site.outputs)
    for _ in range(_MOST):
        if not queue:
            break
        for i, _position in index.readers(queue.pop()):
            node = index.nodes[i]
            if node.op_type == "Einsum":
                yield i, VALUE_PRODUCT
            elif node.op_type in _VIEWS:
                queue += node.output


@dataclass(frozen=True)
class _Product:
    """One Einsum of activations with a stored weight, head by head.

    Attributes:
        heads, summed, made: the labels of the heads, of what is summed, of what the weight adds.
        free: the other labels of the activations, in their order.
    """

    index: GraphIndex
    position: int
    data: str
    weight: str
    data_labels: str
    weight_labels: str
    out_labels: str
    heads: str
    summed: str
    made: str
    free: str

    @classmethod
    def of(cls, index: GraphIndex, position: int) -> _Product | None:
        """The product that a node is; None for any other Einsum."""
        node = index.nodes[position]
        written = _EXPLICIT.fullmatch(str(attribute(node, "equation", "")).replace(" ", ""))
        if node.domain or written is None or len(node.input) != 2:
            return None
        one, two, out = written.groups()
        pairs = [(node.input[0], one), (node.input[1], two)]
        for (data, mine), (weight, its) in (pairs, pairs[::-1]):
            if _stored(index, weight) and not _stored(index, data):
                roles = _roles(mine, its, out)
                if roles is not None and _sizes_meet(index, (data, mine), (weight, its)):
                    return cls(index, position, data, weight, mine, its, out, *roles)
        return None

    def candidate(self, site: Candidate, family: str) -> Candidate:
        """The Einsum and the nodes that do the same."""
        node = self.index.nodes[self.position]
        made = _Nodes(node.output[0])
        sizes: dict[str, Any] = dict(
            zip(self.weight_labels, self.index.shape(self.weight) or (), strict=True)
        )
        heads, summed, columns = (sizes[n] for n in (self.heads, self.summed, self.made))
        weight = made.transpose(
            self.weight, self.weight_labels, self.heads + self.summed + self.made
        )
        x = made.transpose(self.data, self.data_labels, self.heads + self.free + self.summed)
        if len(self.free) > 1:
            x = made.op("Reshape", [x, made.ints([heads, -1, summed])])
        elif not self.free:
            x = made.op("Unsqueeze", [x, made.ints([1])])
        y = made.op("MatMul", [x, weight])
        if len(self.free) > 1:
            y = made.op("Reshape", [y, self._grown(made, heads, columns)])
        elif not self.free:
            y = made.op("Squeeze", [y, made.ints([1])])
        made.finish(y, self.heads + self.free + self.made, self.out_labels)
        elem_type = self.index.elem_type(self.weight)
        axes = tuple("N1" if n == self.heads else "D" for n in self.weight_labels)
        return Candidate(
            graph=self.index.graph,
            anchor=self.position,
            op=site.op,
            family=family,
            nodes=(self.position,),
            support=(),
            operands=(Operand(self.weight, Role.EXPANSION, axes, elem_type),),
            outputs=(node.output[0],),
            replacement=made.nodes,
            replacement_initializers=made.constants,
            layer=site.layer,
            site_id=site.site_id,
        )

    def _grown(self, made: _Nodes, heads: int, columns: int) -> str:
        """The shape [heads, free sizes, columns], whatever the free sizes are."""
        shape = made.op("Shape", [self.data])
        places = [self.data_labels.index(n) for n in self.free]
        free = made.op("Gather", [shape, made.ints(places)])
        return made.op("Concat", [made.ints([heads]), free, made.ints([columns])], axis=0)


def _stored(index: GraphIndex, name: str) -> bool:
    """Whether a value is an initializer, or a view of one."""
    for _ in range(_MOST):
        if name in index.initializers:
            return True
        node = index.maker(name)
        if node is None or node.domain or node.op_type not in _WEIGHT_VIEWS:
            return False
        name = node.input[0]
    return False


def _roles(data: str, weight: str, out: str) -> tuple[str, str, str, str] | None:
    """Labels (heads, summed, made, free) of a product head by head; None for another."""
    if any(len(set(labels)) != len(labels) for labels in (data, weight, out)) or len(weight) != 3:
        return None
    heads = [n for n in weight if n in data and n in out]
    summed = [n for n in weight if n in data and n not in out]
    made = [n for n in weight if n not in data and n in out]
    free = "".join(n for n in data if n not in weight)
    if (len(heads), len(summed), len(made)) != (1, 1, 1) or set(out) != {*heads, *made, *free}:
        return None
    return heads[0], summed[0], made[0], free


def _sizes_meet(index: GraphIndex, data: tuple[str, str], weight: tuple[str, str]) -> bool:
    """Whether shared labels have one known size: an Einsum would broadcast a 1."""
    shapes = [index.shape(name) for name, _ in (data, weight)]
    if shapes[0] is None or shapes[1] is None:
        return False
    if any(len(s) != len(n) for s, n in ((shapes[0], data[1]), (shapes[1], weight[1]))):
        return False
    sizes = dict(zip(weight[1], shapes[1], strict=True))
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        return False
    own = dict(zip(data[1], shapes[0], strict=True))
    return all(own[n] == size for n, size in sizes.items() if n in own)


class _Nodes:
    """The nodes of one replacement, and their constants."""

    def __init__(self, output: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._output = output

    def op(self, kind: str, inputs: Sequence[str], **attrs: Any) -> str:
        """One node with one output."""
        name = f"{self._output}/{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attrs))
        return name

    def ints(self, values: Sequence[int]) -> str:
        """A constant vector."""
        name = f"{self._output}/sizes_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, np.int64), name))
        return name

    def transpose(self, value: str, have: str, want: str) -> str:
        """`value` with its labels in another order; nothing where they are."""
        if have == want:
            return value
        return self.op("Transpose", [value], perm=[have.index(n) for n in want])

    def finish(self, value: str, have: str, want: str) -> None:
        """Let the last node make the output, its labels in the order `want`."""
        value = self.transpose(value, have, want)
        node = next(n for n in self.nodes if n.output[0] == value)
        node.output[0] = self._output
