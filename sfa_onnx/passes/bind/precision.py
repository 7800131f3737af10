"""Roundings between the products: scores and weights must be as precise as query or keys."""

from __future__ import annotations

from typing import Final

import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.trace import Stop, is_float
from sfa_onnx.passes.bind.rows import Columns
from sfa_onnx.passes.bind.site import Site
from sfa_onnx.passes.graph.kinds import SIZES
from sfa_onnx.passes.graph.walk import below
from sfa_onnx.passes.shapes.types import MANTISSA

__all__ = ["check_precision"]

_T = onnx.TensorProto
_NODES: Final = 400  # of one attention; the rest of the graph is not looked at


def check_precision(site: Site) -> None:
    """Check that nothing between scores and weighted sum is rounded more than its operands.

    The operator works in float32 inside: a cast of scores or weights to a type that is narrower
    than both the query's and the keys' is part of the numbers, and float64 cannot show it.

    Raises:
        Stop: there is such a cast.
    """
    own = _least(site)
    index = site.tracer.index
    for i in _between(site):
        node = index.nodes[i]
        if node.op_type != "Cast":
            continue
        target = int(attributes(node)["to"])
        if is_float(target) and MANTISSA[target] < own:
            name = index.label(i)
            raise Stop(
                f"{name} rounds the scores or weights to {_T.DataType.Name(target)}, which is"
                " narrower than the query and the keys",
                node.output[0],
                "drop the cast: the operator keeps scores and weights in float32",
            )


def _least(site: Site) -> int:
    """Bits of the narrowest type that query or keys go through."""
    sizes = site.tracer.sizes
    types = [sizes.elem_type(v) for c in (site.nope, site.rope, site.value) for v in _values(c)]
    types += [sizes.elem_type(s.ref.value) for _, path in site.queries for s in path]
    return min((MANTISSA[t] for t in types if t in MANTISSA), default=0)


def _values(columns: Columns | None) -> list[str]:
    if columns is None:
        return []
    return [s.ref.value for s in (*columns.path, *columns.weight)]


def _between(site: Site) -> list[int]:
    """Nodes on the way from the products of queries and keys to the weighted sum."""
    index = site.tracer.index
    last = index.producer[site.out.value]
    ends = {site.out.value}
    inner = below(index, site.products, lambda n: ends.isdisjoint(n.output), _NODES)
    found = {i for i, _ in inner if index.nodes[i].op_type not in SIZES} - {last}
    reaching = {last}
    for i in sorted(found, reverse=True):
        if any(user in reaching for o in index.nodes[i].output if o for user, _ in index.uses(o)):
            reaching.add(i)
    return sorted(reaching - {last})
