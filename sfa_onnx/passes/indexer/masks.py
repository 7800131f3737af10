"""Which masks the indexer knows: keys up to a bound per row, and keys that are padding.

A mask is the conjunction of literals. Each is one of
  * nothing: visible everywhere;
  * a prefix: the key's number is at most a bound that does not depend on the key (causality, how
    far a cache is filled);
  * padding: it depends on sequence and key only, in any pattern;
  * rows: it hides whole rows, whatever the key.
Everything else (windows, sequence ids, group routing) is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.axes.expr import Expr, Label
from sfa_onnx.passes.axes.places import single
from sfa_onnx.passes.axes.trace import Ref, Stop, Tracer
from sfa_onnx.passes.bind.literals import Visible
from sfa_onnx.passes.bind.mask import additive, boolean
from sfa_onnx.passes.indexer.alike import written
from sfa_onnx.passes.indexer.runs import evaluated, of_sizes, reach, samples
from sfa_onnx.passes.shapes.form import Form
from sfa_onnx.passes.shapes.size import form_of
from sfa_onnx.passes.values.arithmetic import LOW

__all__ = ["Masks", "Prefix", "all_seen", "compared", "sort_masks"]

_TURNED: Final = {  # not (a op b)
    "Less": "GreaterOrEqual",
    "LessOrEqual": "Greater",
    "Greater": "LessOrEqual",
    "GreaterOrEqual": "Less",
}
_SWAPPED: Final = {  # a op b = b swapped a
    "Less": "Greater",
    "LessOrEqual": "GreaterOrEqual",
    "Greater": "Less",
    "GreaterOrEqual": "LessOrEqual",
}
_MOST_REACH: Final = 160  # sizes near which a mask made of sizes alone is looked at


@dataclass(frozen=True)
class Prefix:
    """Keys `t <= bound` are visible.

    Attributes:
        bound: what arithmetic shows of it.
        ref: an element of the tensor that holds it but for `more`; None: it is a constant table.
        more: what is added to the tensor's entries.
    """

    bound: Expr
    ref: Ref | None
    more: int = 0


@dataclass(frozen=True)
class Masks:
    """The literals of one selection, by kind."""

    prefixes: tuple[Prefix, ...] = ()
    padding: tuple[Visible, ...] = ()
    rows: tuple[Visible, ...] = ()


def sort_masks(
    tracer: Tracer, literals: Sequence[Visible], rows: Sequence[Label], batch: Sequence[Label],
    keys: Label,
) -> Masks:  # fmt: skip
    """The masks by kind.

    Args:
        tracer: of the selection.
        literals: what a key is seen under.
        rows: labels of the rows that select.
        batch: those of them that distinguish one sequence's keys from another's.
        keys: runs over the keys.

    Raises:
        Stop: one of them is of another kind.
    """
    prefixes: list[Prefix] = []
    padding: list[Visible] = []
    hidden: list[Visible] = []
    for literal in (x for given in literals for x in _whole(tracer, given, keys)):
        if _everywhere(tracer, literal):
            continue
        prefix = _prefix(tracer, literal, keys) or _of_sizes(tracer, literal, rows, keys)
        if prefix is not None:
            if prefix not in prefixes and not all_seen(prefix, keys):
                prefixes.append(prefix)
        elif literal.ref.labels - {keys} <= set(batch) and keys in literal.ref.labels:
            if (deepest := _deepest(tracer, literal)) not in padding:
                padding.append(deepest)
        elif literal.ref.labels <= set(rows):
            if (deepest := _deepest(tracer, literal)) not in hidden:
                hidden.append(deepest)
        else:
            raise _unknown(tracer, literal)
    return Masks(tuple(prefixes), tuple(padding), tuple(hidden))


def all_seen(prefix: Prefix, keys: Label) -> bool:
    """Whether the bound hides no key of any row."""
    bounds = prefix.bound.bounds
    return bounds is not None and bounds[0] >= keys.size - 1


def _whole(tracer: Tracer, literal: Visible, keys: Label) -> list[Visible]:
    """The literals of a mask that is read from a part of it: a row, or as many keys as are used."""
    *_, ref = _views(tracer, literal.ref)
    if ref == literal.ref:
        return [literal]
    try:
        if literal.is_bool:
            found = boolean(tracer, ref, positive=literal.positive)
        else:
            found = additive(tracer, ref)
    except Stop:
        return [literal]
    known = [x for x in found if isinstance(x, Visible) and _read_whole(tracer, x.ref, keys)]
    return known if len(known) == len(found) else [literal]


def _read_whole(tracer: Tracer, ref: Ref, keys: Label) -> bool:
    """Whether keys are read from the first on; where it is no triangle, all there is of a tensor.

    A part of padding, or of flags of rows, is read from the view that cuts it.
    """
    rows = [c for c in ref.coords if c.terms and keys not in c.labels]
    along = [c for c in ref.coords if keys in c.labels]
    if along and len(rows) > 1:
        return all(single(c) is not None for c in along)
    return _all_there_is(tracer, ref)


def _all_there_is(tracer: Tracer, ref: Ref) -> bool:
    """Whether each label runs over a whole axis."""
    shape = tracer.shape(ref.value)
    labels = [(single(c), size) for c, size in zip(ref.coords, shape, strict=True) if c.terms]
    return all(label is not None and label.size == size for label, size in labels)


def _deepest(tracer: Tracer, literal: Visible) -> Visible:
    """The literal at the tensor that others are views of, so that equal ones are equal.

    Exporters write a mask once for the selection and once for the attention.
    """
    kind, deepest = tracer.sizes.elem_type(literal.ref.value), literal.ref
    for ref in _views(tracer, literal.ref):
        whole = ref is literal.ref or _all_there_is(tracer, ref)
        if not whole or tracer.sizes.elem_type(ref.value) != kind:
            break
        deepest = ref
    return replace(literal, ref=Ref(tracer.representative(deepest.value), deepest.coords))


def _views(tracer: Tracer, ref: Ref) -> Iterator[Ref]:
    """`ref`, and the elements behind it that it is, as long as no index is read."""
    for own in tracer.moves(ref):
        if own is not ref and any(c.reads for c in own.coords):
            return
        yield own


def _unknown(tracer: Tracer, literal: Visible) -> Stop:
    value = written(tracer, literal.ref.value)
    made = tracer.index.maker(value)
    given = "a table of the file" if value in tracer.index.initializers else "a graph input"
    op = given if made is None else f"made by {made.op_type}"
    text = (
        f"the mask {value} ({op}) depends on query row and key, and no order between them"
        " bounds it: a window, sequence ids, or a mask that is handed in"
    )
    return Stop(text, value, "the indexer takes causality, lengths, and padding per sequence")


def _everywhere(tracer: Tracer, literal: Visible) -> bool:
    fill = tracer.fill(literal.ref.value)
    if fill is None:
        return False
    return (bool(fill) == literal.positive) if literal.is_bool else fill > LOW


def _prefix(tracer: Tracer, literal: Visible, keys: Label) -> Prefix | None:
    """The bound that a literal is, where it is one.

    Raises:
        Stop: keys are bounded from below.
    """
    if literal.ref.value in tracer.joined:
        return _by_blocks(tracer, literal, keys)
    for ref in tracer.moves(literal.ref):
        if (found := _table(tracer, replace_ref(literal, ref), keys)) is not None:
            return found
        node = tracer.index.maker(ref.value)
        if node is not None and node.op_type in _TURNED and literal.is_bool:
            return compared(tracer, replace_ref(literal, ref), keys, Expr.of(keys))
        if node is not None and node.op_type == "Trilu":
            return _triangle(tracer, node, replace_ref(literal, ref), keys)
    return None


def _by_blocks(tracer: Tracer, literal: Visible, keys: Label) -> Prefix | None:
    """The bound that each block of keys has, where it is one for all of them."""
    made = tracer.joined[literal.ref.value]
    if literal.ref.coords != tuple(map(Expr.of, (*made.rows, keys, *made.last))):
        return None
    found: list[Prefix] = []
    first = 0
    for ref, own in made.parts:
        part = _prefix(tracer, replace_ref(literal, ref), own)
        if part is None:
            return None
        found.append(replace(part, bound=part.bound + first, more=part.more + first))
        first = first + own.size
    return found[0] if all(p.bound == found[0].bound for p in found) else None


def replace_ref(literal: Visible, ref: Ref) -> Visible:
    """The same literal at a tensor that it is a view of."""
    return Visible(ref, literal.positive, literal.is_bool)


def compared(tracer: Tracer, literal: Visible, along: Label, key: Expr) -> Prefix | None:
    """The bound that a comparison of the key's number is; None: it is another comparison.

    Args:
        tracer: of the selection.
        literal: bool.
        along: what the comparison must run over on the key's side only.
        key: how the key's number is written.

    Raises:
        Stop: keys are bounded from below.
    """
    ref, node = literal.ref, tracer.index.maker(literal.ref.value)
    if node is None or node.op_type not in _TURNED:
        return None
    op = node.op_type if literal.positive else _TURNED[node.op_type]
    left, right = (tracer.operand(n, ref.coords) for n in node.input)
    own = _position(tracer, left, along, key)
    if own is None:
        own, left, right, op = _position(tracer, right, along, key), right, left, _SWAPPED[op]
    if own is None or along in right.labels:
        return None
    if tracer.sizes.elem_type(right.value) not in (onnx.TensorProto.INT32, onnx.TensorProto.INT64):
        return None
    if op in ("Greater", "GreaterOrEqual"):
        raise Stop(
            f"{ref.value} hides keys in front of a row's own: a sliding window",
            ref.value,
            "the indexer looks at every key that lengths and padding leave",
        )
    more = (-1 if op == "Less" else 0) - own
    return Prefix(tracer.index_value(right) + more, right, more)


def _position(tracer: Tracer, ref: Ref, along: Label, key: Expr) -> int | None:
    """The c of key + c, where an integer tensor holds that."""
    if tracer.sizes.elem_type(ref.value) not in (onnx.TensorProto.INT32, onnx.TensorProto.INT64):
        return None
    if along not in ref.labels:
        return None
    found = tracer.index_value(ref)
    return found.const if found.terms == key.terms else None


def _triangle(tracer: Tracer, node: onnx.NodeProto, literal: Visible, keys: Label) -> Prefix | None:
    """Trilu of a tensor that holds one number: a row sees keys up to its own and k more."""
    fill = tracer.fill(node.input[0])
    by = 0.0
    if len(node.input) > 1 and node.input[1]:
        told = tracer.scalar(node.input[1])
        if told is None:
            return None
        by = told
    if fill is None or literal.ref.coords[-1] != Expr.of(keys):
        return None
    upper = bool(attributes(node).get("upper", 1))
    inside = fill > LOW if not literal.is_bool else bool(fill) == literal.positive
    outside = True if not literal.is_bool else not literal.positive
    if inside == outside:
        return None
    if upper == inside:  # a row sees keys from its own on
        raise Stop(f"{literal.ref.value} shows keys behind a row's own", literal.ref.value)
    row = literal.ref.coords[-2]
    return Prefix(row + (int(by) - 1 if upper else int(by)), None)


def _of_sizes(
    tracer: Tracer, literal: Visible, rows: Sequence[Label], keys: Label
) -> Prefix | None:
    """The bound that a mask made of sizes alone is, found by making it at a few of them."""
    axes = [single(c) for c in literal.ref.coords]
    if any(c.terms and a is None for c, a in zip(literal.ref.coords, axes, strict=True)):
        return None
    made = of_sizes(tracer.index, literal.ref.value)
    if keys not in axes or made is None:
        return None
    own = [x for x in axes if x is not None and x in rows]
    found = _everywhere_made(tracer, literal.ref.value, made)
    if found is None:
        return None
    grids = [_grid(literal, np.asarray(a), axes, [*own, keys]) for a in found]
    if all(grid.all() for grid in grids):
        return Prefix(Expr(keys.size - 1), None)
    for row in own[-1:]:
        for bound, offset in (
            (Expr.of(row) + (keys.size - row.size), True),
            (Expr.of(row), False),
        ):
            if all(bool((grid == _up_to(grid, offset)).all()) for grid in grids):
                return Prefix(bound, None)
    return None


def _everywhere_made(
    tracer: Tracer, value: str, made: tuple[list[int], list[str]]
) -> list[NDArray[Any]] | None:
    """The mask at sizes that show all it does; None: no such sizes are known."""
    nodes, shaped = made
    known: dict[str, list[Form]] = {}
    for name in shaped:
        shape = tracer.sizes.shape(name)
        if shape is None:
            return None
        known[name] = [form_of(d) for d in shape]
        if any(tracer.open(d) and form_of(d).fixed for d in shape):
            return None
    symbols = sorted({s for forms in known.values() for form in forms for s in form.symbols})
    span = reach(tracer.index, nodes) if symbols else 0
    if span is None or span > _MOST_REACH:
        return None
    shapes = [
        {name: tuple(form(chosen) for form in forms) for name, forms in known.items()}
        for chosen in samples(symbols, span)
    ]
    return evaluated(tracer.index, value, made, shapes) if shapes else None


def _grid(
    literal: Visible, array: np.ndarray, axes: Sequence[Label | None], order: Sequence[Label]
) -> np.ndarray:
    """Where keys are seen, with one axis per label."""
    shown = (array != 0) == literal.positive if literal.is_bool else array > LOW
    kept = shown[tuple(0 if a is None else slice(None) for a in axes)]
    present = [a for a in axes if a is not None]
    return np.transpose(kept, [present.index(x) for x in order])


def _up_to(grid: np.ndarray, right: bool) -> np.ndarray:
    """The triangle of keys up to a row's number; `right`: the last row sees all."""
    height, width = grid.shape[-2:]
    rows, keys = np.ogrid[:height, :width]
    return np.asarray(keys <= rows + (width - height if right else 0))


def _table(tracer: Tracer, literal: Visible, keys: Label) -> Prefix | None:
    """A constant table [.., rows, keys] that is a triangle."""
    ref = literal.ref
    if not ref.coords or ref.coords[-1] != Expr.of(keys) or len(ref.coords) < 2:
        return None
    table = tracer.index.constant(ref.value)
    if table is None and ref.value in tracer.index.initializers and not literal.is_bool:
        table = tracer.index.mask_table(ref.value)
    if table is None or table.size == 0:
        return None
    every: NDArray[Any] = np.asarray(table).reshape(-1, *table.shape[-2:])
    grid = every[0]
    if not bool((every == grid).all()):  # of each sequence the same
        return None
    shown = (grid != 0) == literal.positive if literal.is_bool else grid > LOW
    counts = shown.sum(axis=-1)
    if not bool((shown == (np.arange(grid.shape[1]) < counts[:, None])).all()):
        return None
    first = int(counts[0]) - 1
    inner = np.minimum(first + np.arange(len(counts)), grid.shape[1] - 1)
    if not bool((counts - 1 == inner).all()):
        return None
    return Prefix(ref.coords[-2] + first, None)
