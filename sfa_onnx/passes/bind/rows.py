"""Keys and values as rows: which stored tensors the columns of a contraction operand come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import onnx

from sfa_onnx.passes.axes.expr import Expr, Label, Quot, Rem, fresh
from sfa_onnx.passes.axes.one_hot import picks
from sfa_onnx.passes.axes.trace import Dot, Move, Pieces, Product, Ref, Scaled, Stop, Tracer
from sfa_onnx.passes.bind.decode import stored_bytes
from sfa_onnx.passes.bind.paths import State, deepen

__all__ = [
    "Columns",
    "apart",
    "cut_columns",
    "require_one",
    "same_addresses",
    "same_rows",
    "trace_columns",
]

_INT8 = onnx.TensorProto.INT8
_PLACE = "column"
_KINDS = {
    "float": "is read as stored",
    "int8": "is dequantised from int8",
    "expanded": "is made by a product with a weight",
}


@dataclass(frozen=True)
class Columns:
    """A range of columns of an operand and the tensors its elements were made from.

    Attributes:
        label: runs over these columns.
        low: first of them among the columns of the whole operand.
        path: from the contraction inwards; it goes on behind a product.
        scale: path of the dequantisation scale (int8 rows); `path` then goes on to the int8 tensor.
        weight: path of W (per-head expansion), summed with `path` over `inner`.
    """

    label: Label
    low: int
    path: tuple[State, ...]
    scale: tuple[State, ...] = ()
    weight: tuple[State, ...] = ()
    inner: Label | None = None
    behind: int = 0  # index in `path` of the first state behind the product with scale or weight
    inverse: bool = False  # rows are divided by the scale

    @property
    def kind(self) -> str:
        """One of: float, int8, expanded."""
        return "int8" if self.scale else "expanded" if self.weight else "float"

    @property
    def deep(self) -> State:
        """Where the rows are stored."""
        return self.path[-1]


def trace_columns(
    tracer: Tracer, ref: Ref, label: Label, wanted: frozenset[str] | None = None
) -> list[Columns]:
    """The columns of operand `ref` (over `label`), each range traced to its tensors.

    A Concat along the columns is entered only when one of its parts is `wanted` (None: always), is
    int8 or is expanded from a latent; otherwise the joined tensor is taken as it is.
    """
    found = _trace(tracer, ref, label, 0, (), 1.0, wanted)
    return _merge_tiles(found)


def _trace(
    tracer: Tracer,
    ref: Ref,
    label: Label,
    low: int,
    prefix: tuple[State, ...],
    factor: float,
    wanted: frozenset[str] | None,
) -> list[Columns]:
    path = [*prefix, State(ref, factor)]
    while True:
        here = path[-1]
        step = tracer.step(here.ref)
        if isinstance(step, Move):
            path.append(State(step.ref, here.factor))
        elif isinstance(step, Scaled):
            path.append(State(step.ref, here.factor * step.factor))
        elif isinstance(step, Pieces) and step.label == label:
            parts = _enter(tracer, step, label, low, tuple(path), wanted)
            enters = wanted is None or _wants(parts, wanted)
            return parts if enters else [Columns(label, low, tuple(path))]
        elif isinstance(step, Product):
            return [_dequantised(tracer, step, label, low, path)]
        elif isinstance(step, Dot):
            return [_expanded(tracer, step, label, low, path)]
        else:
            return [Columns(label, low, tuple(path))]


def _enter(
    tracer: Tracer,
    step: Pieces,
    label: Label,
    low: int,
    path: tuple[State, ...],
    wanted: frozenset[str] | None,
) -> list[Columns]:
    parts: list[Columns] = []
    for start, stop, ref in step.parts:
        own = fresh(_PLACE, stop - start)
        swap = {label: Expr.of(own) + start}
        before = tuple(State(s.ref.substitute(swap), s.factor) for s in path)
        inner = ref.substitute(swap)
        parts += _trace(tracer, inner, own, low + start, before, path[-1].factor, wanted)
    return parts


def _wants(parts: Sequence[Columns], wanted: frozenset[str]) -> bool:
    return any(p.kind != "float" or any(s.ref.value in wanted for s in p.path[-4:]) for p in parts)


def _dequantised(
    tracer: Tracer, step: Product, label: Label, low: int, path: list[State]
) -> Columns:
    factor = path[-1].factor
    sides = [deepen(tracer, step.a, factor), deepen(tracer, step.b)]
    orders = (sides,) if step.inverse else (sides, sides[::-1])
    for rows, scale in orders:
        if any(tracer.sizes.elem_type(s.ref.value) == _INT8 for s in rows):
            found = Columns(label, low, (*path, *rows), tuple(scale), behind=len(path))
            return replace(found, inverse=step.inverse)
    for rows, scale in () if step.inverse else orders:  # bytes that are made numbers step by step
        stored = stored_bytes(tracer, rows[-1].ref)
        if stored and stored[-1].coords[-1] == Expr.of(label) and _of_bytes(tracer, scale):
            whole = (*path, *rows, *(State(r, rows[-1].factor) for r in stored))
            return Columns(label, low, whole, scale=tuple(scale), behind=len(path))
    return Columns(label, low, tuple(path))


def _of_bytes(tracer: Tracer, path: list[State]) -> bool:
    return bool(stored_bytes(tracer, path[-1].ref))


def _expanded(tracer: Tracer, step: Dot, label: Label, low: int, path: list[State]) -> Columns:
    """The latent times a weight, when the columns and only they come from the weight."""
    factor = path[-1].factor * step.factor
    if (one_hot := picks(tracer, step)) is not None:
        raise Stop(
            f"{path[-1].ref.value} gathers rows as one-hot({one_hot.indices}) times"
            f" {one_hot.rows.value}: an index that is no row gives a row of zeros there, and"
            " nothing shows that there is none",
            path[-1].ref.value,
            "gather the rows by the indices, or take these from a TopK over as many keys (one name"
            " for both sizes)",
        )
    for rows, weight in ((step.a, step.b), (step.b, step.a)):
        if label in weight.labels and label not in rows.labels:
            inner = deepen(tracer, rows, factor)
            whole = (*path, *inner)
            return Columns(
                label,
                low,
                whole,
                weight=tuple(deepen(tracer, weight)),
                inner=step.label,
                behind=len(path),
            )
    return Columns(label, low, tuple(path))


def _merge_tiles(parts: list[Columns]) -> list[Columns]:
    """Tiles dequantised one by one and joined are one int8 row with a scale per tile."""
    merged: list[Columns] = []
    for part in parts:
        joined = _joined(merged[-1], part) if merged else None
        if joined is None:
            merged.append(part)
        else:
            merged[-1] = joined
    return merged


def _joined(a: Columns, b: Columns) -> Columns | None:
    alike = a.kind == b.kind == "int8" and a.inverse == b.inverse
    if not alike or a.label.size % b.label.size:
        return None
    both = Label(f"{a.label.name}+", a.label.size + b.label.size)
    place = Expr.of(both)

    def rows(x: Ref, y: Ref) -> Ref | None:
        wide = x.substitute({a.label: place})
        return wide if wide == y.substitute({b.label: place + (-a.label.size)}) else None

    def scales(x: Ref, y: Ref) -> Ref | None:
        return _joined_scale(x, y, a.label, b.label.size, both)

    path, scale = _common(a.path, b.path, rows), _common(a.scale, b.scale, scales)
    if not path or not scale:
        return None
    return replace(a, label=both, path=path, scale=scale, behind=0)


def _common(
    a: tuple[State, ...], b: tuple[State, ...], join: Callable[[Ref, Ref], Ref | None]
) -> tuple[State, ...]:
    """The last states of two paths, as far as they are parts of the same tensors."""
    found: list[State] = []
    for x, y in zip(reversed(a), reversed(b), strict=False):
        ref = join(x.ref, y.ref) if x.ref.value == y.ref.value and x.factor == y.factor else None
        if ref is None:
            break
        found.append(State(ref, x.factor))
    return tuple(reversed(found))


def _joined_scale(x: Ref, y: Ref, label: Label, tile: int, both: Label) -> Ref | None:
    """The scale of the columns of `label` and of one more tile."""
    place = Expr.of(both)
    if label.size == tile:
        first = _last(x)
        if first is None:
            return None
        scale = Ref(x.value, (*x.coords[:-1], place.floordiv(tile) + first))
    else:
        wide = x.substitute({label: place})
        scale = Ref(wide.value, tuple(_widen(c, both, tile) for c in wide.coords))
    return scale if scale.substitute({both: Expr(label.size)}) == y else None


def _last(ref: Ref) -> int | None:
    return ref.coords[-1].const if ref.coords and not ref.coords[-1].terms else None


def _widen(expr: Expr, label: Label, tile: int) -> Expr:
    """Rebuild quotients of a label whose size has grown."""
    total = Expr(expr.const)
    for atom, coefficient in expr.terms:
        known = Expr.of(label).floordiv(tile)
        own = known if isinstance(atom, Quot) and atom.by == tile else Expr(0, ((atom, 1),))
        total = total + own * coefficient
    return total


def same_rows(key: Columns, value: Columns) -> str:
    """Empty when the value's columns are the key's first ones; else what differs."""
    if key.kind != value.kind:
        return (
            f"it {_KINDS[value.kind]} ({value.deep.ref.value}), the key {_KINDS[key.kind]}"
            f" ({key.deep.ref.value})"
        )
    place = Label(_PLACE, value.label.size)
    swap_k, swap_v = {key.label: Expr.of(place)}, {value.label: Expr.of(place)}
    if key.inner is not None and value.inner is not None:
        inner = Expr.of(Label("inner", key.inner.size))
        swap_k[key.inner], swap_v[value.inner] = inner, inner
        return _same_latent(key, value, swap_k, swap_v)
    a, b = key.deep.ref.substitute(swap_k), value.deep.ref.substitute(swap_v)
    if a.value != b.value:
        return f"it is read from {b.value}, the key from {a.value}"
    if a.coords != b.coords:
        return _where_they_differ(a, b)
    if key.kind == "int8":
        c, d = key.scale[-1].ref.substitute(swap_k), value.scale[-1].ref.substitute(swap_v)
        if c != d:
            return f"its scales are {d.value}{_show(d)}, the key's {c.value}{_show(c)}"
        if key.scale[-1].factor != value.scale[-1].factor or key.inverse != value.inverse:
            return "its scales are multiplied by another number"
    if value.label.size > key.label.size:
        return f"it has {value.label.size} columns, the key's nope part {key.label.size}"
    return ""


def cut_columns(columns: Columns, edges: Sequence[int]) -> list[Columns]:
    """The columns between each two of `edges`, which follow each other."""
    parts = []
    for start, stop in pairwise(edges):
        own = Label(f"{columns.label.name}[{start}:{stop}]", stop - start)
        swap = {columns.label: Expr.of(own) + start}
        path = tuple(State(s.ref.substitute(swap), s.factor) for s in columns.path)
        parts.append(replace(columns, label=own, low=columns.low + start, path=path))
    return parts


def apart(key: Columns, value: Columns) -> list[Columns]:
    """The key's columns, cut where the value's begin and end if they lie behind others.

    Rows stored as [rope | nope] are such: the operator takes the parts as two tensors.
    """
    a, b = key.deep.ref, value.deep.ref
    wide, narrow = key.label.size, value.label.size
    if key.kind != "float" or value.kind != "float" or a.value != b.value or narrow >= wide:
        return [key]
    last = len(a.coords) - 1
    start = (b.coords[last] - Expr.of(value.label) - a.coords[last]) + Expr.of(key.label)
    if start.terms or not 0 < start.const <= wide - narrow or a.coords[:last] != b.coords[:last]:
        return [key]
    edges = sorted({0, start.const, start.const + narrow, wide})
    return cut_columns(key, edges)


def same_addresses(tracer: Tracer, nope: Columns, rope: Columns | None) -> None:
    """Check that scales and rope are read by the very indices that the nope part is read by.

    Raises:
        Stop: they are not.
    """
    if tracer.opaque:  # said when indices were followed to their source
        return
    others = [("the scale", s.ref) for s in nope.scale[-1:]]
    others += [("rope", rope.deep.ref)] if rope is not None else []
    own = _addresses(nope.deep.ref)
    for what, ref in others:
        reads = _addresses(ref)
        if reads != own and (rows := stored_bytes(tracer, ref)):  # decoded behind the gather
            reads = _addresses(rows[-1])
        if reads != own:
            raise Stop(
                f"{what} {ref.value} is not read by the same indices as {nope.deep.ref.value}"
                f" ({', '.join(sorted(reads ^ own))[:200]})",
                ref.value,
                "the operator reads a whole row by one index",
            )


def _addresses(ref: Ref) -> set[str]:
    """The index expressions an element is addressed by, however the tensor's axes are merged."""
    found: set[str] = set()
    for coordinate in ref.coords:
        while len(coordinate.terms) == 1 and isinstance(coordinate.terms[0][0], Quot | Rem):
            coordinate = coordinate.terms[0][0].expr
        reading = tuple((a, c) for a, c in coordinate.terms if Expr.of(a).reads)
        if reading:
            found.add(str(Expr(coordinate.const, reading)))
    return found


def _same_latent(
    key: Columns, value: Columns, swap_k: dict[Label, Expr], swap_v: dict[Label, Expr]
) -> str:
    a, b = key.deep.ref.substitute(swap_k), value.deep.ref.substitute(swap_v)
    if a.value != b.value:
        return f"it is expanded from {b.value}, the key from {a.value}"
    return "" if a.coords == b.coords else _where_they_differ(a, b)


def _where_they_differ(a: Ref, b: Ref) -> str:
    for axis, (x, y) in enumerate(zip(a.coords, b.coords, strict=True)):
        if x != y:
            return f"axis {axis} of {a.value} is read at {y}, for the key at {x}"
    return "it is read elsewhere"


def _show(ref: Ref) -> str:
    return "[" + ", ".join(map(str, ref.coords)) + "]"


def require_one(parts: list[Columns], what: str, value: str) -> Columns:
    """The only element, or a refusal that says what it is made of."""
    if len(parts) == 1:
        return parts[0]
    sources = ", ".join(dict.fromkeys(p.deep.ref.value for p in parts))
    raise Stop(
        f"{what} is put together from several tensors ({sources})",
        value,
        "expected the key's nope part alone",
    )
