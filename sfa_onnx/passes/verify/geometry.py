"""Who may see which key: lengths, block tables, masks and selections for one draw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfa_onnx.passes.candidate import Operand, Role
from sfa_onnx.passes.verify.problem import Draw, Problem
from sfa_onnx.passes.verify.sizes.roles import KEYS

__all__ = ["Geometry", "and_mask", "over_slots"]

Array = NDArray[Any]
Tables = dict[str, Array]


@dataclass(frozen=True)
class Geometry:
    """One consistent set of integer inputs.

    Attributes:
        tables: operand -> array of lengths, block table, mask or indices (in row-major order).
        hidden: [key rows] True for key rows that no query row may read.
    """

    tables: Tables
    hidden: Array

    @classmethod
    def draw(cls, problem: Problem, draw: Draw, rng: np.random.Generator) -> Geometry:
        """Lengths first, then what each row sees, then what it selects among that."""
        tables: Tables = {}
        layout = _Layout.draw(problem, draw, rng, tables)
        common = layout.common(rng)
        visible = layout.visible(problem)
        slots = np.ones((problem.dims.count, problem.dims.slots), bool)
        for operand in problem.all(Role.MASK):
            mask = _mask(problem, operand, common, draw, rng)
            tables[operand.value] = _mask_values(operand, mask)
            if over_slots(problem, operand):
                slots = and_mask(problem, slots, mask)
            else:
                visible = and_mask(problem, visible, mask)
        selected = _select(problem, draw, layout, visible, common, rng)  # [rows, K]
        if draw.lonely and problem.indices.domain.negative_allowed:
            selected[0] = -1 if draw.lonely == "no index" else layout.anywhere(problem, rng)
        for operand in problem.all(Role.INDICES):
            tables[operand.value] = _along(problem, operand, rng, selected)
        read = np.where(slots, selected, -1)
        return cls(tables, layout.hidden(problem, read, visible, tables))


@dataclass(frozen=True)
class _Layout:
    """Batches of query rows and keys.

    `batch` [rows] and `position` [rows] of each query row, `queries` [B] and `keys` [B] valid
    counts, `start` [B] first key row of each batch, `capacity` S2.
    """

    batch: Array
    position: Array
    queries: Array
    keys: Array
    start: Array
    capacity: int

    @classmethod
    def draw(
        cls, problem: Problem, draw: Draw, rng: np.random.Generator, tables: Tables
    ) -> _Layout:
        dims, attrs = problem.dims, problem.attributes
        if attrs.get("layout_query") == "TND":
            queries = _composition(rng, dims.count, dims.batches)
            batch = np.repeat(np.arange(dims.batches), queries)
            position = np.concatenate([np.arange(q) for q in queries])
        else:
            batch, position = _rows(problem)
            queries = np.full(dims.batches, dims.count // dims.batches)
        if attrs.get("layout_kv") == "TND":
            spare = dims.keys[0] - int(queries.sum())
            keys = queries + _composition(rng, spare, dims.batches, 0)
            start = np.concatenate([[0], np.cumsum(keys)[:-1]])
            capacity = int(keys.max())
        else:
            capacity = dims.capacity
            keys = _lengths(problem, draw, rng, queries, capacity)
            start = np.arange(dims.batches) * dims.keys[-1]
        for role, counts, key in (
            (Role.LENGTHS_QUERY, queries, "layout_query"),
            (Role.LENGTHS_KV, keys, "layout_kv"),
        ):
            for operand in problem.all(role):
                prefix = attrs.get(key) == "TND" or operand.domain.cumulative
                tables[operand.value] = _prefix(operand, counts) if prefix else counts
        for operand in problem.all(Role.BLOCK_TABLE):
            pages = rng.permutation(dims.keys[0])
            count = dims.batches * (dims.capacity // dims.keys[1])
            tables[operand.value] = np.resize(pages, count).reshape(dims.batches, -1)
        return cls(batch, position, queries, keys, start, capacity)

    def visible(self, problem: Problem) -> Array:
        """[rows, S2]: the keys that lengths and the causal rule leave to each row."""
        threshold = self.keys[self.batch]
        if problem.attributes.get("sparse_mode") == 3:
            threshold = threshold - self.queries[self.batch] + self.position + 1
        seen: Array = np.less(np.arange(self.capacity), threshold[:, None])
        return seen

    def common(self, rng: np.random.Generator) -> Array:
        """[B]: per sequence a key that every rule leaves visible to all of its rows."""
        certain = np.maximum(self.keys - self.queries + 1, 1)
        return np.asarray(rng.integers(0, certain))

    def anywhere(self, problem: Problem, rng: np.random.Generator) -> Array:
        """[K] entries of the first row, whatever it may see."""
        packed = problem.attributes.get("layout_kv") == "TND"  # the next sequence follows at once
        there = int(self.keys[self.batch[0]]) if packed else self.capacity
        blocks = -(-there // int(problem.attributes.get("sparse_block_size", 1)))
        return rng.integers(0, max(blocks, 1), problem.dims.slots)

    def hidden(self, problem: Problem, read: Array, visible: Array, tables: Tables) -> Array:
        """[key rows]: True where no query row selects the key and may see it."""
        entries = _tokens(problem, read)
        rows = np.repeat(np.arange(len(entries)), entries.shape[1])
        tokens = entries.reshape(-1)
        keep = (tokens >= 0) & (tokens < self.capacity)
        keep &= visible[rows, np.clip(tokens, 0, self.capacity - 1)]
        batches, tokens = self.batch[rows[keep]], tokens[keep]
        hidden = np.ones(math.prod(problem.dims.keys), bool)
        hidden[self._addresses(problem, batches, tokens, tables)] = False
        return hidden

    def _addresses(self, problem: Problem, batches: Array, tokens: Array, tables: Tables) -> Array:
        """Flat key rows of tokens."""
        operand = problem.first(Role.BLOCK_TABLE)
        if operand is None:
            return np.asarray(np.minimum(self.start[batches] + tokens, self._last(problem)))
        size = problem.dims.keys[1]
        return np.asarray(tables[operand.value][batches, tokens // size] * size + tokens % size)

    def _last(self, problem: Problem) -> int:
        return math.prod(problem.dims.keys) - 1


def _rows(problem: Problem) -> tuple[Array, Array]:
    """(batch, position) of each query row, in row-major order of the indices."""
    dims = problem.dims
    grid = np.indices(dims.rows).reshape(len(dims.rows), dims.count)
    if dims.batch_axis is None:
        each = max(dims.count // dims.batches, 1)
        batch, position = np.divmod(np.arange(dims.count), each)
        return np.minimum(batch, dims.batches - 1), position
    batch = grid[dims.batch_axis]
    position = np.zeros(dims.count, np.int64)
    for b in range(dims.batches):
        position[batch == b] = np.arange(int((batch == b).sum()))
    return batch, position


def _prefix(operand: Operand, counts: Array) -> Array:
    """Prefix sums; with a leading zero where the operand's axis is "B+1"."""
    sums = np.cumsum(counts)
    return np.concatenate([[0], sums]) if operand.axes == ("B+1",) else sums


def _composition(rng: np.random.Generator, total: int, parts: int, least: int = 1) -> Array:
    """Random counts >= least that add up to `total`."""
    extra = rng.multinomial(max(total - least * parts, 0), np.full(parts, 1 / parts))
    return np.asarray(extra + least)


def _lengths(
    problem: Problem, draw: Draw, rng: np.random.Generator, queries: Array, capacity: int
) -> Array:
    """Valid keys per batch; no causal row is empty (length >= number of queries)."""
    operand = problem.first(Role.LENGTHS_KV)
    if operand is None or draw.lengths == "full":
        return np.full(len(queries), capacity)
    low = np.minimum(queries, capacity)
    if draw.lengths == "short":
        lengths = np.array(low)
    elif draw.lengths == "edge":
        lengths = rng.choice(_edges(problem, capacity), len(queries))
    else:
        lengths = rng.integers(low, capacity + 1, len(queries))
    lengths = np.clip(lengths, low, capacity)
    if draw.lonely == "no key":
        lengths[0] = 0
    if math.prod(problem.shapes[operand.value]) == 1:
        lengths[:] = lengths[0]
    return np.asarray(lengths)


def _edges(problem: Problem, capacity: int) -> list[int]:
    """Lengths on either side of every boundary: K, a page, the whole cache."""
    marks = {problem.dims.slots, capacity, 1}
    if problem.paged:
        marks |= {problem.dims.keys[1], 2 * problem.dims.keys[1]}
    return sorted({m + d for m in marks for d in (-1, 0, 1)})


def _mask(
    problem: Problem,
    operand: Operand,
    common: Array,
    draw: Draw,
    rng: np.random.Generator,
) -> Array:
    """A random mask, True is visible, in the operand's shape.

    Over slots (last axis K) the first slot stays visible, over keys each sequence's common key.
    """
    shape, _ = _trimmed(problem, operand)
    if not shape:  # one switch for everything: off leaves every row empty
        return np.asarray(draw.lonely != "no key")
    mask = rng.random(shape) < (1.0 if draw.lengths == "full" else draw.visible)
    if over_slots(problem, operand):
        mask[..., 0] = True
    else:
        for key in common if len(common) > 1 else common[:1]:
            if key < shape[-1]:
                mask[..., key] = True
    if draw.lonely == "no key":
        mask.reshape(-1, shape[-1])[0] = False
    return mask


def over_slots(problem: Problem, operand: Operand) -> bool:
    """Whether a mask runs over index entries rather than over keys."""
    shape, axes = _trimmed(problem, operand)
    if not shape or axes[-1] == "K":
        return True
    return axes[-1] != "S2" and shape[-1] == problem.dims.slots != problem.dims.capacity


def _trimmed(problem: Problem, operand: Operand) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Shape and axes of a mask without axes of size 1 behind what it runs over."""
    shape, axes = problem.shapes[operand.value], operand.axes
    while len(shape) > 1 and (shape[-1], axes[-1]) == (1, "1") and max(shape) > 1:
        shape, axes = shape[:-1], axes[:-1]
    return shape, axes


def and_mask(problem: Problem, visible: Array, mask: Array) -> Array:
    """[rows, n] and a mask over the same last axis, where its shape lines up with the rows."""
    if not mask.shape or mask.shape[-1] != visible.shape[1]:
        return visible
    rows = problem.dims.rows
    squeezed = mask.reshape([n for n in mask.shape[:-1] if n > 1] + [mask.shape[-1]])
    try:
        wide = np.broadcast_to(squeezed, (*[n for n in rows if n > 1], mask.shape[-1]))
    except ValueError:
        return visible
    return np.asarray(visible & wide.reshape(visible.shape))


def _mask_values(operand: Operand, mask: Array) -> Array:
    """The mask as the operand spells it: booleans, or (visible, masked) of its domain."""
    if operand.domain.values is None:
        return mask
    visible, masked = operand.domain.values[:2]
    return np.where(mask, visible, masked)


def _along(problem: Problem, operand: Operand, rng: np.random.Generator, selected: Array) -> Array:
    """What a row selects, or positions on the one axis of the keys that the operand numbers."""
    if operand.domain.apart:
        count, slots = len(selected), problem.shapes[operand.value][-1]
        places = -(-problem.dims.capacity // operand.domain.block)
        order = np.tile(np.arange(max(places, slots)) % places, (count, 1))
        return rng.permuted(order, axis=1)[:, :slots]
    if operand.domain.along is None:
        return selected
    keys = problem.first(*KEYS)
    assert keys is not None
    size = problem.shapes[keys.value][operand.domain.along]
    return rng.integers(0, size, problem.shapes[operand.value])


def _tokens(problem: Problem, entries: Array) -> Array:
    """[rows, K * sparse_block_size]: tokens of the entries; negative where there is none."""
    size = int(problem.attributes.get("sparse_block_size", 1))
    starts = entries[..., None] * size
    tokens = np.where(starts < 0, -1, starts + np.arange(size))
    return tokens.reshape(*entries.shape[:-1], -1)


def _select(
    problem: Problem,
    draw: Draw,
    layout: _Layout,
    visible: Array,
    common: Array,
    rng: np.random.Generator,
) -> Array:
    """[rows, K] entries of `sparse_indices`, inside the operand's domain."""
    size = int(problem.attributes.get("sparse_block_size", 1))
    blocks = -(-visible.shape[1] // size)
    padded = np.zeros((len(visible), blocks * size), bool)
    padded[:, : visible.shape[1]] = visible
    seen = np.asarray(padded.reshape(len(visible), blocks, size).any(-1))
    packed = problem.attributes.get("layout_kv") == "TND"  # the next sequence follows at once
    owned = np.minimum(-(-layout.keys // size), blocks) if packed else np.full(len(common), blocks)
    order = {b: rng.permutation(owned[b]) for b in np.unique(layout.batch)}
    picker = _Picker(problem, draw, problem.dims.slots, rng)
    batch = layout.batch
    return np.stack(
        [
            picker.row(seen[r], order[batch[r]], int(common[batch[r]]) // size)
            for r in range(len(seen))
        ]
    )


@dataclass(frozen=True)
class _Picker:
    """Fills one row of indices."""

    problem: Problem
    draw: Draw
    slots: int
    rng: np.random.Generator

    def row(self, seen: Array, order: Array, sure: int) -> Array:
        """`slots` entries: visible blocks, then what the domain allows as filling.

        `order` is the batch's own order of blocks; "shared" rows of a batch all follow it, so that
        few keys are read by anybody. `sure` is a block that no rule hides: it is always selected.
        """
        shared = self.draw.selection == "shared"
        order = order if shared else self.rng.permutation(order)
        valid, invalid = order[seen[order]], order[~seen[order]]
        valid = np.concatenate([[sure], valid[valid != sure]])
        count = self._count(len(valid))
        picked = valid[:count]
        if not shared:
            picked = self.rng.permutation(picked)
        domain = self.problem.indices.domain
        if self.draw.selection == "duplicates" and not domain.distinct:
            picked = self.rng.choice(valid, self.slots)
            picked[0] = sure
        filling = self._filling(picked, invalid, self.slots - len(picked))
        row = np.concatenate([picked, filling]).astype(np.int64)
        free = not domain.valid_first and self.draw.selection != "shared"
        return self._slot_rule(self.rng.permutation(row) if free else row, sure)

    def _slot_rule(self, row: Array, sure: int) -> Array:
        """Masks over slots leave the first slot visible: put the sure block there."""
        masks = self.problem.all(Role.MASK)
        if not any(over_slots(self.problem, o) for o in masks):
            return row
        at = int(np.argmax(row == sure))
        row[0], row[at] = row[at], row[0]
        return row

    def _count(self, valid: int) -> int:
        """How many visible blocks a row selects."""
        most = min(self.slots, valid)
        if not self.problem.indices.domain.negative_allowed or self.draw.selection == "shared":
            return most
        return 1 if self.draw.selection == "single" else int(self.rng.integers(1, most + 1))

    def _filling(self, picked: Array, invalid: Array, count: int) -> Array:
        """What follows the visible entries of a row."""
        if count <= 0:
            return np.zeros(0, np.int64)
        if self.problem.indices.domain.negative_allowed:
            pool = np.concatenate([invalid, np.full(max(len(invalid), 1), -1)])
            return np.asarray(self.rng.choice(pool, count))  # "none" and keys that a rule hides
        return np.resize(invalid if len(invalid) else picked, count)
