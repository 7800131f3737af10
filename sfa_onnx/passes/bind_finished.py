"""Sites whose rows are read by an index tensor that the graph has computed, whatever it means.

Following index arithmetic to its source tells batches, pages and sequences apart, and an operator
over the cache itself can follow. Where the source cannot be told (offsets of sequences, blocks of
keys, tables in front of tables), one fact is left, and it is enough: every key row is read at
finished index tensors. The replacement reads the very same ones, so region and replacement are
compared over all indices that are in range, and masks over all their values.
"""

from __future__ import annotations

from dataclasses import replace

from sfa_onnx.passes.axes import Expr, Read
from sfa_onnx.passes.axes_trace import Ref
from sfa_onnx.passes.bind_packed import PackedSite
from sfa_onnx.passes.bind_rows import Columns
from sfa_onnx.passes.bind_site import Site
from sfa_onnx.passes.build import axis_labels

__all__ = ["by_finished_indices"]


def by_finished_indices(site: Site) -> Site | None:
    """`site`, bound with `Tracer.opaque`, with each stored tensor replaced by the one gathered.

    Returns:
        The site whose rows are `tensor[.., index, ..]` (or `tensor[page, slot, ..]`), the same
        indices for all parts of a row; None when they are not.
    """
    if site.selected:
        return None
    nope, rope = _cut(site.nope), _cut(site.rope) if site.rope is not None else None
    if nope is None or (rope is None) != (site.rope is None):
        return None
    reads = _reads(nope)
    if rope is not None and _reads(rope) != reads:
        return None
    if not isinstance(site, PackedSite):
        return replace(site, nope=nope, rope=rope, finished=True)
    packed = _cut(site.packed)
    if packed is None or _reads(packed) != reads:
        return None
    return replace(site, nope=nope, rope=rope, packed=packed, finished=True)


def _reads(columns: Columns) -> list[Read]:
    """What addresses the rows, in the order of the axes."""
    return [r for c in columns.deep.ref.coords for r in c.reads]


def _cut(columns: Columns) -> Columns | None:
    """The columns, traced up to the innermost tensor that an index alone addresses."""
    path = columns.path
    at = [i for i, s in enumerate(path) if i >= columns.behind and _plain(s.ref)]
    if not at:
        return None
    scale = columns.scale
    if scale:
        plain = [i for i, s in enumerate(scale) if _plain(s.ref, tiles=True)]
        if not plain:
            return None
        scale = scale[: plain[-1] + 1]
        if [r for c in scale[-1].ref.coords for r in c.reads] != _reads(columns):
            return None
    return replace(columns, path=path[: at[-1] + 1], scale=scale)


def _plain(ref: Ref, *, tiles: bool = False) -> bool:
    """Whether some axes are read at an index each and all others run over labels.

    `tiles`: the last axis runs over the tiles of columns.
    """
    read = [c for c in ref.coords if c.reads]
    alone = all(c == Expr.of(c.reads[0]) and not _nested(c.reads[0]) for c in read)
    others = ref.coords[:-1] if tiles else ref.coords
    return bool(read) and alone and all(c.reads or axis_labels(c) is not None for c in others)


def _nested(read: Read) -> bool:
    return any(c.reads for c in read.coords)
