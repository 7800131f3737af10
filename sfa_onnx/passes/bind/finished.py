"""Sites whose rows are read by an index tensor that the graph has computed, whatever it means.

Following index arithmetic to its source distinguishes batches, pages and sequences, and an operator
over the cache itself can follow. Where the source cannot be found (offsets of sequences, blocks of
keys, tables in front of tables), one fact is left, and it is enough: every key row is read at
finished index tensors. The replacement reads the very same ones, so region and replacement are
compared over all indices that are in range, and masks over all their values.
"""

from __future__ import annotations

from dataclasses import replace

from sfa_onnx.passes.axes.expr import Expr, Label, Read
from sfa_onnx.passes.axes.places import axis_labels
from sfa_onnx.passes.axes.trace import Ref
from sfa_onnx.passes.bind.packed import PackedSite
from sfa_onnx.passes.bind.rows import Columns
from sfa_onnx.passes.bind.site import Site
from sfa_onnx.passes.bind.sources import nested

__all__ = ["by_finished_indices"]


def by_finished_indices(site: Site) -> Site | None:
    """`site`, bound with `Tracer.opaque`, with each stored tensor replaced by the one gathered.

    Returns:
        The site whose rows are `tensor[.., index, ..]` (or `tensor[page, slot, ..]`), the same
        indices for all parts of a row; None when they are not.
    """
    if site.selected:
        return replace(site, finished=True)
    nope = _cut(site.nope, site.key)
    rope = _cut(site.rope, site.key) if site.rope is not None else None
    if nope is None or (rope is None) != (site.rope is None):
        return None
    reads = _reads(nope)
    if rope is not None and _reads(rope) != reads:
        return None
    if not isinstance(site, PackedSite):
        return replace(site, nope=nope, rope=rope, finished=True)
    packed = _cut(site.packed, site.key)
    if packed is None or _reads(packed) != reads:
        return None
    return replace(site, nope=nope, rope=rope, packed=packed, finished=True)


def _reads(columns: Columns) -> list[Read]:
    """What addresses the rows, in the order of the axes."""
    return [r for c in columns.deep.ref.coords for r in c.reads]


def _cut(columns: Columns, key: Label) -> Columns | None:
    """The columns, traced up to the innermost tensor that an index alone addresses."""
    path, inner = columns.path, {key, columns.label}
    at = [i for i, s in enumerate(path) if i >= columns.behind and _plain(s.ref, inner)]
    if not at:
        return None
    scale = columns.scale
    if scale:
        plain = [i for i, s in enumerate(scale) if _plain(s.ref, inner)]
        if not plain:
            return None
        scale = scale[: plain[-1] + 1]
        if [r for c in scale[-1].ref.coords for r in c.reads] != _reads(columns):
            return None
    return replace(columns, path=path[: at[-1] + 1], scale=scale)


def _plain(ref: Ref, inner: set[Label]) -> bool:
    """Whether some axes are read at an index each and all others run over labels.

    An axis may run over `inner` labels in any way: tiles of columns, keys of a block.
    """
    read = [c for c in ref.coords if c.reads]
    alone = all(c == Expr.of(c.reads[0]) and not nested(c.reads[0]) for c in read)
    rest = (c for c in ref.coords if not c.reads)
    return (
        bool(read) and alone and all(axis_labels(c) is not None or c.labels <= inner for c in rest)
    )
