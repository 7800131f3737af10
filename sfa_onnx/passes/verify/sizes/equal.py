"""Shapes of a site's operands once the sizes that must be equal are made one."""

from __future__ import annotations

from sfa_onnx.passes.candidate import Candidate, Refusal
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.verify.extract import UnverifiableError

__all__ = ["Shapes", "assumed_equal", "canonical_shapes", "operand_shapes", "settled", "unified"]

Shapes = dict[str, tuple[int, ...]]


def unified(index: GraphIndex, candidate: Candidate) -> Concrete:
    """Sizes of the graph, those equal that recognition took for equal."""
    sizes = Concrete(index)
    for a, b in candidate.equal:
        if a in sizes.symbols and b in sizes.symbols:
            sizes.unify(a, b)
    return sizes


def settled(index: GraphIndex, candidate: Candidate) -> tuple[Concrete, list[list[str]]]:
    """Sizes after all that meet in the site were made one, and the symbols of each open size.

    Inputs often name one size differently (`batch` of the query, `batch_1` of the cache). What
    recognition took for equal and what meets on an axis of the site is one size; a symbol that
    meets a number is that number, and in no group.

    Raises:
        SizesMeetError: sizes meet that cannot be equal.
    """
    sizes = unified(index, candidate)
    open_sizes = set(sizes.symbols.values())
    for i in sorted({*candidate.nodes, *candidate.support}):
        for name in (*index.nodes[i].input, *index.nodes[i].output):
            if name:
                sizes.shape(name)
    groups: dict[int, list[str]] = {}
    for symbol, size in sizes.symbols.items():
        if size in open_sizes:
            groups.setdefault(size, []).append(symbol)
    return sizes, list(groups.values())


def assumed_equal(index: GraphIndex, candidate: Candidate) -> list[tuple[str, str]]:
    """Names of sizes of the operands that recognition took for equal, one pair each."""
    sizes = Concrete(index)
    dims = {d for o in candidate.operands for d in sizes.shape(o.value) or ()}
    read = {s for s, size in sizes.symbols.items() if any(d % size == 0 for d in dims)}
    return [(a, b) for a, b in candidate.equal if a in read and b in read]


def operand_shapes(concrete: Concrete, candidate: Candidate) -> Shapes:
    """Shape of every operand at the sizes of `concrete`.

    Raises:
        UnverifiableError: a shape cannot be told.
    """
    shapes: Shapes = {}
    for operand in candidate.operands:
        shape = concrete.shape(operand.value)
        if shape is None or len(shape) != len(operand.axes):
            raise UnverifiableError(
                Refusal(
                    f"the shape of {operand.value!r} cannot be told without running the model",
                    operand.value,
                    "export with shapes, or run onnx.shape_inference on the file first",
                )
            )
        shapes[operand.value] = shape
    return shapes


def canonical_shapes(concrete: Concrete, candidate: Candidate) -> list[tuple[int, ...]]:
    """Operand shapes with symbols numbered by appearance: equal for equal sites."""
    symbols = set(concrete.symbols.values())
    seen: dict[int, int] = {}
    return [
        tuple(seen.setdefault(n, -1 - len(seen)) if n in symbols else n for n in shape)
        for shape in operand_shapes(concrete, candidate).values()
    ]
