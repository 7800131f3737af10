"""Sizes and positions that fit together, as the graph says: what indexes what, what meets what.

Exporters name sizes apart that must belong together (the length of a mask, and past + new). The
parts of a graph that sizes and integers alone decide are evaluated here without running it; where
an index would leave its axis, or two sizes meet that differ, the symbol or the position that makes
it so is moved. What nothing in the graph ties stays as it was chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.operator.op import find_op
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete, SizesMeetError

__all__ = ["fit_positions", "fit_sizes", "misfit", "with_constants"]

Array = NDArray[Any]
_ROUNDS: Final = 12
_MOST: Final = 4096  # keys beyond a selection are enough at any size
_LIMIT: Final = 1 << 20  # elements of an array of positions that is looked into
_MEETS: Final = frozenset(
    ("Add", "Sub", "Mul", "Div", "Pow", "Where", "And", "Or", "Equal", "Less", "LessOrEqual",
     "Greater", "GreaterOrEqual", "Max", "Min", "MatMul")
)  # fmt: skip
_QUERY_SIDE: Final = ("query", "query_rope", "sparse_indices", "weights", "query_dequant_scale")
_KEY_SIDE: Final = ("key", "key_rope", "key_dequant_scale")
_LENGTHS: Final = tuple(f"actual_seq_lengths_{side}" for side in ("query", "kv", "key"))
_PER_SEQUENCE: Final = (*_LENGTHS, "block_table")
_INDEXES: Final = frozenset(
    ("Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND")
)


@dataclass(frozen=True)
class _Short:
    """An axis that is too short by some entries, or where two sizes meet."""

    value: str
    axis: int
    by: int
    index: str  # the indices that leave it; "" for sizes that meet
    chosen: bool = False  # a top-k takes (nearly) all of it
    least: int = 0  # entries without which that top-k cannot be

    @property
    def place(self) -> tuple[str, int]:
        """The axis itself."""
        return self.value, self.axis


def fit_sizes(
    model: ModelProto,
    sizes: Mapping[str, int],
    fixed: Collection[str] = (),
    first: Collection[str] = (),
) -> dict[str, int]:
    """Sizes at which no index leaves its axis, no two sizes meet unequal, and a top-k chooses.

    Args:
        model: read only.
        sizes: symbol -> size, as chosen; none is made smaller.
        fixed: symbols that may not be moved.
        first: symbols that are moved before others (lengths of caches).

    Returns:
        The sizes, some of them larger; as given where nothing helps.
    """
    index, found = GraphIndex.of(model, defaults_hold=True), dict(sizes)
    order = [s for s in (*first, *(s for s in sizes if s not in first)) if s not in fixed]
    hopeless: set[tuple[str, int]] = set()
    for _ in range(_ROUNDS + len(order)):
        short = next((s for s in _misfits(index, found) if s.place not in hopeless), None)
        if short is None:
            break
        moved = _grown(index, found, short, order)
        if moved is None:
            hopeless.add(short.place)
        else:
            found[moved] += short.by
    return found


def misfit(model: ModelProto, sizes: Mapping[str, int]) -> str:
    """Why a graph stops at these sizes, as far as sizes alone show; "" where nothing is seen.

    Args:
        model: read only.
        sizes: symbol -> size, for every open dim of the inputs.
    """
    index = GraphIndex.of(model, defaults_hold=True)
    known = Concrete(index, sizes)
    for short in _misfits(index, dict(sizes)):
        shape = _shape(known, short.value) or ()
        size = shape[short.axis] if short.axis < len(shape) else 0
        where = f"axis {short.axis} of {short.value}"
        if short.chosen:
            if short.least > size:
                return f"a top-k takes {short.least} of the {size} entries on {where}"
        elif short.index:
            return f"{short.index} reaches entry {size + short.by - 1} on {where}, which has {size}"
        else:
            return f"sizes {size} and {size + short.by} meet on {where}"
    return ""


def fit_positions(
    model: ModelProto, sizes: Mapping[str, int], feeds: Mapping[str, Array], free: Collection[str]
) -> dict[str, Array]:
    """Positions moved down until none leaves the table or the cache that it indexes.

    Args:
        model: read only.
        sizes: symbol -> size.
        feeds: the integer inputs as they were drawn.
        free: names of those that may be moved.
    """
    small = {n: a for n, a in feeds.items() if a.size <= _LIMIT}
    known, moved = with_constants(model, small), dict(feeds)
    for _ in range(_ROUNDS):
        index = GraphIndex.of(known, defaults_hold=True)
        short = next((s for s in _misfits(index, dict(sizes)) if s.index), None)
        if short is None:
            break
        above = _above(index, short.index)
        mine = [n for n in free if n in above and n in small and moved[n].min() >= short.by]
        if not mine:
            break
        for name in mine:
            moved[name] = moved[name] - moved[name].dtype.type(short.by)
        known = with_constants(model, {n: moved[n] for n in small})
    return moved


def with_constants(model: ModelProto, arrays: Mapping[str, Array]) -> ModelProto:
    """The model with some inputs known."""
    out = ModelProto()
    out.CopyFrom(model)
    out.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    return out


def _above(index: GraphIndex, value: str) -> set[str]:
    """Every value that `value` is made from."""
    seen, stack = set[str](), [value]
    while stack:
        name = stack.pop()
        if name and name not in seen:
            seen.add(name)
            node = index.maker(name)
            stack += node.input if node is not None else ()
    return seen


def _misfits(index: GraphIndex, sizes: dict[str, int]) -> Iterator[_Short]:
    """Axes that are too short at these sizes, in graph order."""
    known = Concrete(index, sizes)
    for node in index.nodes:
        if not node.input:
            continue
        if node.domain not in ("", "ai.onnx"):
            yield from _slots_meeting(known, node)
        elif node.op_type in _MEETS:
            yield from _meeting(known, node)
        elif node.op_type == "Concat":
            yield from _joining(known, node)
        elif node.op_type in _INDEXES:
            yield from _leaving(known, node)
        elif node.op_type == "TopK":
            yield from _all_chosen(known, node)


def _all_chosen(known: Concrete, node: NodeProto) -> Iterator[_Short]:
    """The axis of a top-k that leaves too little out for a comparison to see."""
    if len(node.input) > 1:
        value = _value(known, node.input[1])
        count = int(value.flat[0]) if value is not None and value.size == 1 else None
    else:
        count = attribute(node, "k")
    shape = _shape(known, node.input[0])
    if count and shape:
        axis = int(attribute(node, "axis", -1)) % len(shape)
        missing = min(2 * int(count), int(count) + _MOST) - shape[axis]
        if missing > 0:
            yield _Short(node.input[0], axis, missing, "", chosen=True, least=int(count))


def _meeting(known: Concrete, node: NodeProto) -> Iterator[_Short]:
    """Sizes that differ where the node broadcasts; the smaller one is short."""
    shapes = [(name, _shape(known, name)) for name in node.input if name]
    told = [(name, shape) for name, shape in shapes if shape]
    if node.op_type == "MatMul":
        told = [(name, (*shape[:-2], 1, 1)) for name, shape in told if len(shape) > 2]
    for i in range(1, max((len(s) for _, s in told), default=0) + 1):
        here = [(s[-i], n, len(s) - i) for n, s in told if len(s) >= i and s[-i] != 1]
        if here and min(here)[0] != max(here)[0]:
            size, name, axis = min(here)
            yield _Short(name, axis, max(here)[0] - size, "")


def _joining(known: Concrete, node: NodeProto) -> Iterator[_Short]:
    """Sizes beside the joined axis that differ (a mask laid beside the keys it hides)."""
    shapes = [(shape, name) for name in node.input if (shape := _shape(known, name))]
    ranks = {len(shape) for shape, _ in shapes}
    if len(ranks) != 1:
        return
    rank = ranks.pop()
    for axis in set(range(rank)) - {int(attribute(node, "axis", 0)) % rank}:
        here = [(shape[axis], name) for shape, name in shapes]
        if min(here)[0] != max(here)[0]:
            size, name = min(here)
            yield _Short(name, axis, max(here)[0] - size, "")


def _slots_meeting(known: Concrete, node: NodeProto) -> Iterator[_Short]:
    """Axes of the slots of an operator of ours that must be equal and are not."""
    op = find_op(node.domain, node.op_type)
    if op is None:
        return
    names = zip((t.name for t in op.inputs), node.input, strict=False)
    shapes = {slot: (name, _shape(known, name)) for slot, name in names if name}
    tokens = attribute(node, "layout_query", "BSND") == "TND"
    keys = str(attribute(node, "layout_kv", attribute(node, "layout_key", "BSND")))
    groups = [[(s, axis) for s in _QUERY_SIDE] for axis in range(1 if tokens else 2)]
    groups += [[(s, axis) for s in _KEY_SIDE] for axis in range(2)]
    heads = 1 if tokens else 2
    groups += [[("query", heads), ("query_rope", heads)]]
    sequences = [(s, 0) for s in _PER_SEQUENCE]
    if tokens:
        groups.append(sequences)
    else:
        groups[0] += [*sequences, *([("key", 0)] if keys == "BSND" else [])]
    yield from _all_selected(shapes, keys)
    for group in groups:
        told = [(*shapes[s], axis) for s, axis in group if s in shapes]
        here = [(x[a], n, a) for n, x, a in told if x is not None and len(x) > a]
        if here and min(here)[0] != max(here)[0]:
            size, name, axis = min(here)
            yield _Short(name, axis, max(here)[0] - size, "")


def _all_selected(
    shapes: Mapping[str, tuple[str, tuple[int, ...] | None]], layout: str
) -> Iterator[_Short]:
    """The axis of keys that a given selection takes whole."""
    key, chosen = (shapes.get(slot, ("", None)) for slot in ("key", "sparse_indices"))
    if layout == "BSND" and key[1] and chosen[1] and len(key[1]) == 4:
        missing = 2 * chosen[1][-1] - key[1][1]
        if missing > 0:
            yield _Short(key[0], 1, missing, "", chosen=True)


def _shape(known: Concrete, name: str) -> tuple[int, ...] | None:
    try:
        return known.shape(name)
    except SizesMeetError:
        return None


def _value(known: Concrete, name: str) -> NDArray[Any] | None:
    try:
        return known.value(name)
    except SizesMeetError:
        return None


def _leaving(known: Concrete, node: NodeProto) -> Iterator[_Short]:
    """Axes that an index known from sizes and integers leaves."""
    if len(node.input) < 2:  # an operator that this opset does not have, so nobody counted
        return
    at = _value(known, node.input[1])
    if at is None or not at.size or at.dtype.kind not in "iu":
        return
    shape = _shape(known, node.input[0])
    if not shape:
        return
    for axis, indices in _by_axis(node, at, len(shape)):
        if axis < len(shape) and int(indices.max()) >= shape[axis] > 0:
            by = int(indices.max()) + 1 - shape[axis]
            yield _Short(node.input[0], axis, by, node.input[1])


def _by_axis(node: NodeProto, at: Array, rank: int) -> Iterator[tuple[int, Array]]:
    if not node.op_type.endswith("ND"):
        yield int(attribute(node, "axis", 0)) % rank, at
        return
    first = int(attribute(node, "batch_dims", 0))
    for i in range(at.shape[-1] if at.ndim else 0):
        yield first + i, at[..., i]


def _grown(index: GraphIndex, sizes: dict[str, int], short: _Short, order: list[str]) -> str | None:
    """The first symbol that makes a short axis longer, and nothing it is measured by."""
    before = _shape(Concrete(index, sizes), short.value) or ()
    for symbol in order:
        if symbol not in sizes or short.axis >= len(before):
            continue
        other = sizes | {symbol: sizes[symbol] + short.by}
        after = _shape(Concrete(index, other), short.value) or before
        if after[short.axis] - before[short.axis] != short.by:
            continue
        # The k of a top-k may grow with its axis, up to the number it is the smaller of.
        if short.chosen or all(
            s.by < short.by for s in _misfits(index, other) if s.place == short.place
        ):
            return symbol
    return None
