"""What an axis that is read at an index expression runs over."""

from __future__ import annotations

from sfa_onnx.passes.axes.asking import Tracing
from sfa_onnx.passes.axes.expr import Expr, Label, Quot, Rem
from sfa_onnx.passes.axes.steps import Ref

__all__ = ["axis_labels", "blocks", "chosen", "is_view", "repeated", "single"]


def chosen(tracer: Tracing, ref: Ref, size: int) -> Expr:
    """The place of an axis that an index says; a number below 0 counts from the end.

    Args:
        tracer: of the graph.
        ref: the index.
        size: of the axis; where that is open, `-1` stays what it is in every run.
    """
    at = tracer.index_value(ref, size)
    return at + size if at.const < 0 and not at.terms and not tracer.open(size) else at


def repeated(coordinate: Expr) -> Label | None:
    """The label of an axis that is read at a quotient or remainder: a mask per block of keys."""
    whole = all(isinstance(atom, Quot | Rem) for atom, _ in coordinate.terms)
    labels = coordinate.labels
    return next(iter(labels)) if whole and len(labels) == 1 and not coordinate.reads else None


def single(coordinate: Expr) -> Label | None:
    """The label that an axis runs over, when it is one, from its start."""
    labels = axis_labels(coordinate)
    return labels[0] if labels is not None and len(labels) == 1 and not coordinate.const else None


def blocks(coordinate: Expr, size: int) -> list[tuple[Label, int, int]] | None:
    """(label, length, first) of nested blocks: coordinate = ((n * b1) + m) * b2 + ... + first."""
    rest, const, out = size, coordinate.const, []
    for atom, coefficient in sorted(coordinate.terms, key=lambda t: -t[1]):
        if not isinstance(atom, Label) or rest % coefficient:
            return None
        length = rest // coefficient
        start, const = divmod(const, coefficient)
        if start + atom.size > length:
            return None
        out.append((atom, length, start))
        rest = coefficient
    return out if rest == 1 and const == 0 else None


def axis_labels(coordinate: Expr) -> list[Label] | None:
    """The labels that run row-major along an axis read at `coordinate`; None if it is no view."""
    terms = sorted(coordinate.terms, key=lambda t: -t[1])
    stride = 1
    labels: list[Label] = []
    for atom, coefficient in reversed(terms):
        if not isinstance(atom, Label) or coefficient != stride:
            return None
        labels.insert(0, atom)
        stride *= atom.size
    return labels


def is_view(ref: Ref) -> bool:
    """Whether every axis runs over labels, without an index read."""
    return all(axis_labels(c) is not None for c in ref.coords)
