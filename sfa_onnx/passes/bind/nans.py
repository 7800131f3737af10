"""Who outside asks whether the result is a number: rows without keys are NaN there, and 0 fused.

What is computed from the result and such a test is read as a term, twice. Who reads the result has
to be walked for: terms are read upwards. Whether masks hide by -inf or by a finite number is noted
as they are read (`Tracer.lows`): the identities make both equal, as they are where a key is seen.
"""

from __future__ import annotations

import math
from typing import Final

from sfa_onnx.passes.axes.expr import Expr, fresh
from sfa_onnx.passes.axes.trace import Ref, Stop, Tracer
from sfa_onnx.passes.bind.site import Site
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import PARTS, PRODUCTS
from sfa_onnx.passes.graph.walk import below
from sfa_onnx.passes.values.attention_op import is_attention
from sfa_onnx.passes.values.read import Reader
from sfa_onnx.passes.values.table import normal
from sfa_onnx.passes.values.terms import FALSE, TRUE, ZERO, Term, element

__all__ = ["check_nan"]

_LIMIT: Final = 64  # values looked at
_PASSING: Final = (PARTS | PRODUCTS) | (
    {"Add", "CastLike", "Concat", "Div", "Gather", "Mul", "Neg", "Sub", "Sum"}
)


def check_nan(site: Site) -> None:
    """Refuse a result whose NaN somebody reads, where rows may be left without keys.

    The softmax of a row that is -inf throughout is NaN; the operator gives 0. What is computed from
    the result and from a test for NaN is the same if it is one term for both: for a result that is
    0 and a test that fails, and for one that is NaN and a test that does not.

    Raises:
        Stop: it is not.
    """
    narrowed = site.visible or site.kept is not None or any(s.valid for s in site.selected)
    tracer = site.tracer
    if not narrowed or is_attention(tracer.index.nodes[site.attention.anchor]):
        return
    reached, tests = _reached(tracer.index, site.out.value)
    finite = tracer.lows and -math.inf not in tracer.lows
    if not tests or finite or _scrubbed(tracer, site):
        return
    for i in tests:
        test = tracer.index.nodes[i]
        inner, ends = _read_by(tracer.index, test.output[0], reached)
        if ends is None or not all(_same(site, reached | inner, tests, end) for end in ends):
            raise Stop(
                f"NaN of rows without keys is read by {test.op_type} {tracer.index.label(i)}",
                test.output[0],
                "put 0 in their place (Where(IsNaN(out), 0, out)): the operator gives 0 there",
            )


def _reached(index: GraphIndex, value: str) -> tuple[set[str], list[int]]:
    """Values that are NaN where `value` is, and the nodes that test them for it."""
    reached, tests = {value}, []
    for i, _ in below(index, [value], lambda n: n.op_type in _PASSING):
        node = index.nodes[i]
        if node.op_type == "IsNaN" or (node.op_type == "Equal" and len(set(node.input)) == 1):
            tests.append(i)
        elif node.op_type in _PASSING:
            reached.update(filter(None, node.output))
    return reached, tests


def _read_by(index: GraphIndex, test: str, reached: set[str]) -> tuple[set[str], set[str] | None]:
    """(values computed from a test, those that what is tested goes into; None: others leave)."""
    inner, ends = {test}, set[str]()
    for i, position in below(index, [test], lambda n: reached.isdisjoint(n.input)):
        node = index.nodes[i]
        if position < 0:
            return inner, None
        made = set(filter(None, node.output))
        inner |= made
        if not reached.isdisjoint(node.input):
            ends |= made
    leaves = len(inner) > _LIMIT or any(index.is_graph_output(v) for v in inner - ends)
    return inner, None if leaves else ends


def _same(site: Site, inner: set[str], tests: list[int], value: str) -> bool:
    """Whether a value is one term for rows of 0 that pass a test and for rows of NaN."""
    shape, terms = site.tracer.sizes.shape(value), []
    if shape is None:
        return False
    ref = Ref(value, tuple(Expr.of(fresh("i", size)) for size in shape))
    for lonely in (False, True):
        reader = _Behind(site, inner, tests, lonely)
        try:
            terms.append(reader.term(ref))
        except Stop:  # a shape on the way is not known
            return False
        if reader.opaque:
            return False
    return terms[0] == terms[1]


class _Behind(Reader):
    """Reads what is computed from the result: 0 or (`lonely`) NaN in a row without keys."""

    def __init__(self, site: Site, inner: set[str], tests: list[int], lonely: bool) -> None:
        super().__init__(site.tracer, normal(), inner)
        self.result, self.lonely = site.out.value, lonely
        nodes = (site.tracer.index.nodes[i] for i in tests)
        self.tests = {n.output[0]: (n.op_type == "IsNaN") == lonely for n in nodes}

    def term(self, ref: Ref) -> Term:
        """What the element `ref` is, in such a row."""
        if ref.value in self.tests:
            return TRUE if self.tests[ref.value] else FALSE
        if ref.value == self.result:
            return element(ref) if self.lonely else ZERO
        return super().term(ref)


def _scrubbed(tracer: Tracer, site: Site) -> bool:
    """Whether a guard between the weights and the result zeroes such rows already."""
    nodes, out = tracer.index.nodes, site.out.value
    inner = below(tracer.index, [site.attention.weights], lambda n: out not in n.output)
    return any(nodes[i].op_type in ("Where", "IsNaN", "ScatterND") for i, _ in inner)
