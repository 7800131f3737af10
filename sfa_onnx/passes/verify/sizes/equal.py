"""Shapes of a site's operands once the sizes that must be equal are made one."""

from __future__ import annotations

from sfa_onnx.passes.candidate import Candidate, Refusal
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.form import Atom, Form
from sfa_onnx.passes.shapes.size import form_of
from sfa_onnx.passes.verify.extract import UnverifiableError

__all__ = ["Shapes", "assumed_equal", "canonical_shapes", "operand_shapes", "settled", "unified"]

Shapes = dict[str, tuple[int, ...]]
_ROWS = ("B", "S1", "N1", "S2", "K")  # a width may be 0: a rope that is not there


def unified(index: GraphIndex, candidate: Candidate) -> Concrete:
    """Sizes of the graph, those equal that recognition took for equal."""
    sizes = Concrete(index)
    for what, symbol in candidate.equal:
        if symbol in sizes.symbols:
            sizes.unify(what, symbol)
    return sizes


def settled(index: GraphIndex, candidate: Candidate) -> tuple[Concrete, list[str]]:
    """Sizes after all that meet in the site were made one, and the symbols that stay open.

    Inputs often name one size differently (`batch` of the query, `batch_1` of the cache). What
    recognition took for equal and what meets on an axis of the site is one size; a symbol that
    meets a number, or an expression of other symbols, is that, and not open.

    Raises:
        SizesMeetError: sizes meet that cannot be equal.
    """
    sizes = unified(index, candidate)
    for i in sorted({*candidate.nodes, *candidate.support}):
        for name in (*index.nodes[i].input, *index.nodes[i].output):
            if name:
                sizes.shape(name)
    return sizes, [s for s, size in sizes.symbols.items() if form_of(size).plain == s]


def assumed_equal(index: GraphIndex, candidate: Candidate) -> list[tuple[str, str]]:
    """What was taken for equal on the way to this site: (what it is, symbol of an input)."""
    sizes = Concrete(index)
    dims = [d for o in candidate.operands for d in sizes.shape(o.value) or ()]
    for i in sorted({*candidate.nodes, *candidate.support}):
        sizes.check(index.nodes[i])
    read = {s for d in dims for s in form_of(d).symbols} | {s for _, s in sizes.equal}
    return [(what, s) for what, s in candidate.equal if s in read]


def operand_shapes(concrete: Concrete, candidate: Candidate) -> Shapes:
    """Shape of every operand at the sizes of `concrete`.

    Raises:
        UnverifiableError: a shape cannot be determined.
    """
    shapes: Shapes = {}
    for operand in candidate.operands:
        shape = concrete.shape(operand.value)
        if shape is None or len(shape) != len(operand.axes):
            raise UnverifiableError(
                Refusal(
                    f"the shape of {operand.value!r} cannot be known without running the model",
                    operand.value,
                    "export with shapes, or run onnx.shape_inference on the file first",
                )
            )
        shapes[operand.value] = shape
    return shapes


def canonical_shapes(concrete: Concrete, candidate: Candidate) -> list[tuple[str, ...]]:
    """Operand shapes with symbols numbered by appearance: equal for equal sites.

    Raises:
        UnverifiableError: a shape cannot be determined, or holds nothing in any run.
    """
    names: dict[Atom, Form] = {}

    def told(size: int) -> str:
        form = form_of(size)
        for symbol in sorted(form.symbols - names.keys()):
            names[symbol] = Form.of(f"s{len(names)}")
        return str(form.substitute(names))

    shapes = operand_shapes(concrete, candidate)
    for operand in candidate.operands:
        value, shape = operand.value, shapes[operand.value]
        if any(size == 0 and axis in _ROWS for axis, size in zip(operand.axes, shape, strict=True)):
            raise UnverifiableError(Refusal(f"{value!r} is empty in every run: {shape}", value))
    return [tuple(map(told, shape)) for shape in shapes.values()]
