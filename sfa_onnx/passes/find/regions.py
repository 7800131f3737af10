"""Where attention may be: from products of queries and keys to the value that all of them reach.

Nothing is asked about spellings. Downstream of a product of two computed tensors, values that
depend on it are followed through pointwise operators, reductions, views and sums of rows. Where
what was weighted by them is one value again, and nothing else is left to join it, an attention may
end: its term shows it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import Final

import onnx

from sfa_onnx.passes.bind.site import AttentionRegion
from sfa_onnx.passes.find.products import is_product, operands
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import (
    BODIES,
    CONDITIONS,
    GATHERS,
    PARTS,
    PRODUCTS,
    REDUCTIONS,
    SIZES,
)
from sfa_onnx.passes.graph.walk import above
from sfa_onnx.passes.graph.weights import is_weight
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.known import known_shape
from sfa_onnx.passes.values.attention_op import is_attention

__all__ = ["FOLLOWED", "attention_regions"]

_MOST: Final = 4000  # nodes followed from one product
_LATER: Final = 3  # values behind the first that all rows reach, which are asked as well
_EXPONENTIALS: Final = frozenset(
    ("Exp", "LogSoftmax", "Pow", "ReduceLogSumExp", "Sigmoid", "Softmax")
)
_SOFTMAX: Final = frozenset(("LogSoftmax", "Softmax"))
FOLLOWED: Final = (
    (CONDITIONS | GATHERS | PARTS | REDUCTIONS)
    | {"Abs", "Add", "Clip", "Concat", "Div", "Dropout", "Exp", "Log", "LogSoftmax", "Max", "Min"}
    | {"LpNormalization", "Mul", "Neg", "NonZero", "Pad", "Pow", "Reciprocal", "ReduceLogSum"}
    | {"ReduceLogSumExp", "Relu", "ScatterElements", "ScatterND", "Sigmoid", "Softmax", "Softplus"}
    | {"Sqrt", "Sub", "Sum", "Tanh", "Tile", "Where"}
)
_ROUTED: Final = FOLLOWED | {"TopK"}  # between a softmax and the scores it is over


def attention_regions(
    index: GraphIndex, sizes: Concrete, products: Iterable[int]
) -> list[AttentionRegion]:
    """Every region of the graph, in graph order; `products` that reach one result share it.

    A softmax that no product leads to, and an Attention operator, begin a region of their own.
    """
    sweeps: dict[str, list[_Sweep]] = {}
    inner: set[str] = set()

    def start(i: int, *, softmax: bool = False) -> None:
        sweep = _Sweep(index, sizes, i, softmax=softmax)
        if sweep.result:
            sweeps.setdefault(sweep.result, []).append(sweep)
            inner.update(sweep.inner)

    whole = (i for i in index.of_kinds(("Attention",)) if is_attention(index.nodes[i]))
    for i in sorted((*products, *whole)):
        start(i)
    for i in index.of_kinds(_SOFTMAX):
        if index.nodes[i].output[0] not in inner and not _routes(index, i):
            start(i, softmax=True)
    found = [_joined(index, result, group) for result, group in sweeps.items()]
    return sorted((r for r in found if r is not None), key=lambda r: r.anchor)


def _routes(index: GraphIndex, softmax: int) -> bool:
    """Whether a softmax is over the best of numbers that no query and key made: a router's."""
    best = False
    nodes = above(index, index.nodes[softmax].output, lambda n: n.op_type in _ROUTED, _MOST)
    for node in map(index.nodes.__getitem__, nodes):
        if is_product(index, node):
            return False
        best = best or node.op_type == "TopK"
    return best


def _joined(index: GraphIndex, result: str, group: list[_Sweep]) -> AttentionRegion | None:
    inner = frozenset().union(*(s.inner for s in group))
    made = sorted({index.producer[v] for v in inner})
    exponentials = _EXPONENTIALS | {"Attention"}
    first = next((i for i in made if index.nodes[i].op_type in exponentials), None)
    if first is None:
        return None
    own = index.nodes[first]
    scores = next((n for n in own.input if n in inner), own.input[0])
    later = [v for v in group[0].singles if all(v in s.singles for s in group)]
    results = (result, *[v for v in later if v != result][:_LATER])
    sides = tuple(dict.fromkeys(v for s in group for v in s.sides if v not in results))
    return AttentionRegion(first, result, inner, scores, group[0].weights, sides, results)


class _Sweep:
    """Downstream of one product (or Attention operator, or softmax), in graph order."""

    def __init__(
        self, index: GraphIndex, sizes: Concrete, start: int, *, softmax: bool = False
    ) -> None:
        self.index, self.sizes = index, sizes
        self.inner: set[str] = set()
        self.rows: set[str] = set()  # what depends on weighted rows
        self.pending: Counter[str] = Counter()  # readers that are still to come
        self._open = self._alone = 0  # how many in all; values that were the only one left
        self.outside: set[str] = set()
        self.singles: list[str] = []
        self.weights = ""
        self._heap: list[int] = []
        self._queued: set[int] = set()
        node = index.nodes[start]
        self._exponential = softmax or is_attention(node)
        self.first = ""  # the first weighted sum
        for name in filter(None, node.output):
            self._enter(name, rows=is_attention(node))
        if is_attention(node):
            self.first = self.weights = node.output[0]
            self.singles.append(self.first)
        self.result = self._run()
        self.sides = tuple(sorted(v for v in self.outside if v not in self.rows))

    def _enter(self, value: str, *, rows: bool) -> None:
        self.inner.add(value)
        if rows:
            self.rows.add(value)
        if self.index.is_graph_output(value):
            self.outside.add(value)
        for i, position in self.index.uses(value):
            if position < 0:
                self.outside.add(value)
            elif self.index.nodes[i].op_type not in SIZES:
                self.pending[value] += 1
                self._open += 1
                if i not in self._queued:
                    self._queued.add(i)
                    heapq.heappush(self._heap, i)

    def _run(self) -> str:
        while self._heap and self._alone <= _LATER:
            if len(self._queued) > _MOST or not self._node(heapq.heappop(self._heap)):
                return ""
        return self.singles[0] if self.singles else self.first

    def _node(self, i: int) -> bool:
        """Look at a reader of inner values; False: these scores select, they do not weigh."""
        node = self.index.nodes[i]
        read = [n for n in node.input if n in self.inner]
        for name in read:
            self.pending[name] -= 1
            self._open -= 1
        selects = node.op_type in ("TopK", "ArgMax", "Hardmax")
        if selects and not self._exponential and not self.rows & set(read):
            return False
        follows = "" if selects else self._follows(i, read)
        if not follows:
            self.outside.update(read)
            return True
        self._exponential = self._exponential or node.op_type in _EXPONENTIALS
        rows = follows == "rows" or any(n in self.rows for n in read)
        if rows and not self.first:
            self.first = node.output[0]
        if rows and any(n not in self.rows for n in read):
            self.singles.clear()  # something joins the weighted rows
        for name in node.output:
            if (name and self.index.uses(name)) or self.index.is_graph_output(name):
                self._enter(name, rows=rows)
        live = [v for v in self.rows if self.pending[v] or v in self.outside]
        if len(live) == 1 and live[0] not in self.singles:
            self.singles.append(live[0])
            self._alone += self._open == self.pending[live[0]]
        return True

    def _follows(self, i: int, read: list[str]) -> str:
        """Say "rows" where rows are weighted, "yes" where values change, "" where they leave."""
        node = self.index.nodes[i]
        if node.op_type in PRODUCTS or (
            node.op_type == "ReduceSum" and len(operands(self.index, node)) == 2
        ):
            return self._weighs(i, read)
        known = node.op_type in FOLLOWED
        if node.domain not in ("", "ai.onnx") or node.op_type in BODIES:
            return ""
        # what has no meaning in front of the rows is named by the refusal
        return "yes" if known or not self.rows & set(read) else ""

    def _weighs(self, i: int, read: list[str]) -> str:
        node = self.index.nodes[i]
        if node.op_type == "ReduceSum":
            sides = operands(self.index, node)
            others = [s for s in sides if s not in self.inner]
            if not is_product(self.index, node) or not others or self._masks(node, sides):
                return "yes"
            own = [s for s in sides if s in self.inner]
        else:
            own = read
            others = [n for n in node.input[:2] if n not in self.inner]
            early = not self._exponential or self.rows & set(read)
            if early and any(is_weight(self.index, n) for n in others):
                return ""  # a projection
        if not self._exponential:
            return ""
        if not any(n in self.rows for n in own):
            self.weights = self.weights or own[0]
        return "rows"

    def _masks(self, node: onnx.NodeProto, sides: list[str]) -> bool:
        """Whether what is summed has no more axes than the weights: they are masked, or scaled."""
        whole = known_shape(self.sizes, node.input[0])
        return whole is not None and any(
            known_shape(self.sizes, side) == whole for side in sides if side in self.inner
        )
