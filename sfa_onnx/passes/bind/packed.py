"""Packed rows (int8 nope | rope bytes | float32 scale bytes) that the graph decodes itself.

Where nope, rope and scales all come from the bytes of one int8 tensor, in the order and sizes of
the operator's row, that tensor is proposed as the key. The arithmetic in between is not read:
execution on drawn rows decides whether it decodes them as the operator does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx

from sfa_onnx.errors import ContractError
from sfa_onnx.operator.op import PackedRow
from sfa_onnx.passes.axes.expr import Expr, Label, Quot
from sfa_onnx.passes.axes.trace import Ref, Stop, Tracer
from sfa_onnx.passes.bind.decode import stored_bytes
from sfa_onnx.passes.bind.paths import State
from sfa_onnx.passes.bind.rows import Columns
from sfa_onnx.passes.bind.site import Site

__all__ = ["PackedSite", "bind_packed"]

_T = onnx.TensorProto
_HALF = (_T.FLOAT16, _T.BFLOAT16)
_ORDER = "the operator's rows are int8 nope | rope | one little-endian float32 scale per tile"


@dataclass(kw_only=True)
class PackedSite(Site):
    """A site that decodes packed rows; its parts keep only factors applied behind the decoding.

    Attributes:
        packed: whole rows, as columns over one label of D bytes.
        row: how a row is laid out.
        row_type: the operator's float type, in which the rope bytes are read.
    """

    packed: Columns
    row: PackedRow
    row_type: int


@dataclass(frozen=True)
class _Part:
    """Bytes of one part of a row: the first one's column, where it is known."""

    name: str
    ref: Ref
    first: int | None


def bind_packed(site: Site) -> Site:
    """`site` with its packed rows named, when it decodes such rows; else `site` as it is.

    Raises:
        Stop: it decodes rows of one int8 tensor that are laid out in another way.
    """
    if site.nope.kind != "int8" or site.nope.inverse:
        return site
    tracer, deep = site.tracer, site.nope.deep.ref
    scale = stored_bytes(tracer, site.nope.scale[-1].ref)
    rope = stored_bytes(tracer, site.rope.deep.ref) if site.rope is not None else None
    if not scale or scale[-1].value != deep.value:
        return site
    if rope is not None and (not rope or rope[-1].value != deep.value):
        return site
    width = tracer.shape(deep.value)[-1]
    parts = [_part("nope", deep), _part("scales", scale[-1])]
    if rope is not None:
        parts.append(_part("rope", rope[-1]))
    row = _row(site, width, _tile(site, scale[-1]), deep.value)
    _check_order(row, parts, deep.value)
    elem_type = _row_type(site, row)
    if not elem_type:
        return site
    return _packed(site, row, elem_type)


def _part(name: str, ref: Ref) -> _Part:
    """The first byte of a part: the last coordinate where every label is at its beginning."""
    bounds = ref.coords[-1].bounds
    return _Part(name, ref, None if bounds is None else bounds[0])


def _tile(site: Site, scale: Ref) -> int:
    """Columns that share a scale, from the byte at which column d finds its own."""
    label = site.nope.label
    over = [(a, c) for a, c in scale.coords[-1].terms if label in Expr.of(a).labels]
    if not over:
        return label.size
    if len(over) == 1 and over[0][1] == 4:
        atom = over[0][0]
        if isinstance(atom, Quot) and atom.expr == Expr.of(label):
            return atom.by
        if atom == label:
            return 1
    place = scale.coords[-1].substitute({label: Expr.of(Label("d", label.size))})
    raise Stop(
        f"the scale of column d is read at byte {place} of a packed row",
        scale.value,
        _ORDER,
    )


def _row(site: Site, width: int, tile: int, value: str) -> PackedRow:
    nope = site.nope.label.size
    rope = site.rope.label.size if site.rope is not None else 0
    try:
        return PackedRow.of(width, nope + rope, rope, tile)
    except ContractError as error:
        raise Stop(
            f"rows of {width} bytes in {value} are no packed rows of the operator: {error}",
            value,
            _ORDER,
        ) from error


def _check_order(row: PackedRow, parts: list[_Part], value: str) -> None:
    """Each part begins where the operator has it (within one item: bytes may come in any order)."""
    wanted = {"nope": 0, "rope": row.rope_offset, "scales": row.scale_offset}
    sizes = {"nope": 1, "rope": row.itemsize, "scales": 4}
    for part in parts:
        if part.first is None:
            continue
        if not 0 <= part.first - wanted[part.name] < sizes[part.name]:
            raise Stop(
                f"the {part.name} begin at byte {part.first} of the packed rows in {value}, in the"
                f" operator's rows at byte {wanted[part.name]}",
                value,
                _ORDER,
            )


def _row_type(site: Site, row: PackedRow) -> int:
    """The operator's float type for these rows; 0 when the query does not exist in it."""
    if row.itemsize == 4:
        return _T.FLOAT
    types = [[site.tracer.sizes.elem_type(s.ref.value) for s in path] for _, path in site.queries]
    halves = [next((t for t in own if t in _HALF), 0) for own in types]
    if len(set(halves)) == 1 and halves[0]:
        return halves[0]
    return 0 if row.rope else _T.FLOAT


def _packed(site: Site, row: PackedRow, elem_type: int) -> PackedSite:
    """Rows as columns over one label of D bytes; nope, rope and value without their decoding."""
    own, label = site.nope.label, Label("row bytes", row.bytes)
    path = tuple(
        State(s.ref.substitute({own: Expr.of(label)}))
        for s in site.nope.path[site.nope.behind :]
        if _is_row(site.tracer, s, own, row.bytes)
    )
    factor, rope = _outer(site.nope), site.rope
    plain = {
        "nope": _plain(site, site.nope, factor),
        "rope": None if rope is None else _plain(site, rope, factor),
        "value": _plain(site, site.value, _outer(site.value)),
    }
    return PackedSite(
        **{**vars(site), **plain}, packed=Columns(label, 0, path), row=row, row_type=elem_type
    )


def _is_row(tracer: Tracer, state: State, own: Label, width: int) -> bool:
    ref = state.ref
    whole = tracer.sizes.elem_type(ref.value) == _T.INT8 and tracer.shape(ref.value)[-1] == width
    return whole and ref.coords[-1] == Expr.of(own)


def _outer(columns: Columns) -> float:
    """The factor that is applied to decoded columns."""
    return columns.path[max(columns.behind - 1, 0)].factor


def _plain(site: Site, columns: Columns, factor: float) -> Columns:
    """The same columns with one factor, no scale, and the stored rows as where they come from."""
    path = (State(site.nope.deep.ref, factor),)
    return replace(columns, path=path, scale=(), behind=0)
