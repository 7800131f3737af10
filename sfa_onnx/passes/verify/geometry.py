"""Who may see which key: lengths, block tables, masks and selections for one draw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sfa_onnx.passes.candidate import Operand, Role
from sfa_onnx.passes.verify.layout import atoms

if TYPE_CHECKING:
    from sfa_onnx.passes.verify.problem import Draw, Problem

__all__ = ["Geometry"]

Array = NDArray[Any]
Tables = dict[Role, tuple[list[str], Array]]


@dataclass(frozen=True)
class Geometry:
    """One consistent set of integer inputs.

    Attributes:
        tables: role -> (labels, array) for lengths, block table, mask and indices.
        hidden: [key labels...] True for key rows that no query row may read.
    """

    tables: Tables
    hidden: Array

    @classmethod
    def draw(cls, problem: Problem, draw: Draw, rng: np.random.Generator) -> Geometry:
        """Lengths first, then what each row sees, then what it selects among that."""
        tables: Tables = {}
        layout = _Layout.draw(problem, draw, rng, tables)
        visible = layout.visible(problem, draw, rng, tables)  # [rows, S2]
        selected = _select(problem, draw, visible, layout.batch, rng)  # [rows, K]
        rows = [problem.sizes[label] for label in problem.rows]
        labels = [*problem.rows, problem.slot_label]
        tables[Role.INDICES] = (labels, selected.reshape(*rows, selected.shape[-1]))
        return cls(tables, layout.hidden(problem, selected, visible, tables))


@dataclass(frozen=True)
class _Layout:
    """Batches of query rows and keys.

    `batch` [rows] and `position` [rows] of each query row, `queries` [B] and `keys` [B] valid
    counts, `start` [B] first key row of each batch in packed (TND) keys, `capacity` S2.
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
        sizes, attrs = problem.sizes, problem.attributes
        batches = sizes.get("B", 1)
        if attrs.get("layout_query") == "TND":
            queries = _composition(rng, sizes["T"], batches)
            tables[Role.LENGTHS_QUERY] = _prefix(problem, Role.LENGTHS_QUERY, queries)
            batch = np.repeat(np.arange(batches), queries)
            position = np.concatenate([np.arange(q) for q in queries])
        else:
            length = math.prod(sizes[label] for label in problem.rows if label != "B")
            queries = np.full(batches, length)
            tables[Role.LENGTHS_QUERY] = (["B"], queries)
            batch, position = np.divmod(np.arange(batches * length), length)
        if attrs.get("layout_kv") == "TND":
            keys = queries + _composition(
                rng, problem.size(problem.key_labels[0]) - int(queries.sum()), batches, 0
            )
            tables[Role.LENGTHS_KV] = _prefix(problem, Role.LENGTHS_KV, keys)
            start = np.concatenate([[0], np.cumsum(keys)[:-1]])
            return cls(batch, position, queries, keys, start, int(keys.max()))
        capacity = _capacity(problem)
        keys = _lengths(problem, draw, rng, queries, capacity)
        tables[Role.LENGTHS_KV] = (["B"], keys)
        if problem.paged:
            tables[Role.BLOCK_TABLE] = _block_table(problem, batches, rng)
        return cls(batch, position, queries, keys, np.arange(batches) * capacity, capacity)

    def visible(
        self, problem: Problem, draw: Draw, rng: np.random.Generator, tables: Tables
    ) -> Array:
        """[rows, S2]: the keys that lengths, the causal rule and the mask leave to each row."""
        threshold = self.keys[self.batch]
        if problem.attributes.get("sparse_mode") == 3:
            threshold = threshold - self.queries[self.batch] + self.position + 1
        seen: Array = np.less(np.arange(self.capacity), threshold[:, None])
        operand = problem.first(Role.MASK)
        if operand is None:
            return seen
        labels, mask = _mask(problem, operand, self.capacity, draw, rng)
        if "S2" in labels:
            everyone = rng.integers(max(int(threshold.min()), 1))  # a key that nobody masks
            mask[..., everyone] = True
            seen = seen & _per_row(problem, mask, labels, self.capacity)
        else:
            mask[..., 0] = True
        tables[Role.MASK] = (labels, _mask_values(operand, mask))
        return seen

    def hidden(self, problem: Problem, selected: Array, visible: Array, tables: Tables) -> Array:
        """[key labels...]: the key rows that no query row reads."""
        read = np.zeros((len(self.keys), self.capacity), bool)
        for row, entries in enumerate(selected):
            for start in _tokens(problem, entries):
                if start < self.capacity and visible[row, start]:
                    read[self.batch[row], start] = True
        sizes = [problem.size(label) for label in problem.key_labels]
        hidden = np.ones(math.prod(sizes), bool)
        batches, tokens = np.nonzero(read)
        hidden[self._addresses(problem, batches, tokens, tables)] = False
        return hidden.reshape(sizes)

    def _addresses(self, problem: Problem, batches: Array, tokens: Array, tables: Tables) -> Array:
        """Flat key rows of tokens."""
        if not problem.paged:
            return np.asarray(self.start[batches] + tokens)
        size = page_size(problem)
        table = tables[Role.BLOCK_TABLE][1]
        return np.asarray(table[batches, tokens // size] * size + tokens % size)


def _mask(
    problem: Problem, operand: Operand, capacity: int, draw: Draw, rng: np.random.Generator
) -> tuple[list[str], Array]:
    """A random mask over the labels that the mask operand has; True is visible."""
    known = [*problem.rows, "S2", problem.slot_label]
    labels = [label for label in known if label in atoms(operand.axes)]
    sizes = {**problem.sizes, "S2": capacity}
    density = 1.0 if draw.lengths == "full" else 0.6
    return labels, rng.random([sizes[label] for label in labels]) < density


def _per_row(problem: Problem, mask: Array, labels: list[str], capacity: int) -> Array:
    """[rows, S2]: a mask over some of the row labels, repeated over the others."""
    sizes = {**problem.sizes, "S2": capacity}
    full = [*problem.rows, "S2"]
    shape = [sizes[label] if label in labels else 1 for label in full]
    wide = np.broadcast_to(mask.reshape(shape), [sizes[label] for label in full])
    return wide.reshape(-1, capacity)


def _mask_values(operand: Operand, mask: Array) -> Array:
    """The mask as the operand spells it: booleans, or (visible, masked) of its domain."""
    if operand.domain.values is None:
        return mask
    visible, masked = operand.domain.values[:2]
    return np.where(mask, visible, masked)


def page_size(problem: Problem) -> int:
    """Rows of one page."""
    return problem.size(problem.key_labels[1])


def _capacity(problem: Problem) -> int:
    """S2: key slots of one sequence."""
    if problem.paged:
        return page_size(problem) * problem.sizes[_pages_label(problem)]
    return problem.sizes["S2"]


def _pages_label(problem: Problem) -> str:
    operand = problem.first(Role.BLOCK_TABLE)
    assert operand is not None
    return atoms(operand.axes)[-1]


def _block_table(
    problem: Problem, batches: int, rng: np.random.Generator
) -> tuple[list[str], Array]:
    """Distinct pages in random order, the tables of all sequences disjoint."""
    label = _pages_label(problem)
    pages = problem.sizes[problem.key_labels[0]]
    count = problem.sizes[label]
    order = rng.permutation(pages)
    return ["B", label], np.resize(order, batches * count).reshape(batches, count)


def _prefix(problem: Problem, role: Role, counts: Array) -> tuple[list[str], Array]:
    """Prefix sums; with a leading zero where the operand's axis is "B+1"."""
    operand = problem.first(role)
    if operand is not None and operand.axes == ("B+1",):
        return ["B+1"], np.concatenate([[0], np.cumsum(counts)])
    return ["B"], np.cumsum(counts)


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
    low = np.minimum(queries if problem.attributes.get("sparse_mode") == 3 else 1, capacity)
    if draw.lengths == "short":
        lengths = np.broadcast_to(low, queries.shape).copy()
    elif draw.lengths == "edge":
        lengths = rng.choice(_edges(problem, capacity), len(queries))
    else:
        lengths = rng.integers(low, capacity + 1, len(queries))
    lengths = np.clip(lengths, low, capacity)
    if "B" not in "".join(operand.axes):
        lengths[:] = lengths[0]
    return np.asarray(lengths)


def _edges(problem: Problem, capacity: int) -> list[int]:
    """Lengths on either side of every boundary: K, a page, the whole cache."""
    marks = {problem.sizes[problem.slot_label], capacity, 1}
    if problem.paged:
        marks |= {page_size(problem), 2 * page_size(problem)}
    return sorted({m + d for m in marks for d in (-1, 0, 1)})


def _tokens(problem: Problem, entries: Array) -> Array:
    """Tokens that entries of one row stand for."""
    size = int(problem.attributes.get("sparse_block_size", 1))
    starts = entries[entries >= 0] * size
    return (starts[:, None] + np.arange(size)).reshape(-1)


def _select(
    problem: Problem, draw: Draw, visible: Array, batch: Array, rng: np.random.Generator
) -> Array:
    """[rows, K] entries of `sparse_indices`, inside the operand's domain."""
    size = int(problem.attributes.get("sparse_block_size", 1))
    blocks = -(-visible.shape[1] // size)
    padded = np.zeros((len(visible), blocks * size), bool)
    padded[:, : visible.shape[1]] = visible
    seen = np.asarray(padded.reshape(len(visible), blocks, size).any(-1))
    slots = problem.sizes[problem.slot_label]
    order = {b: rng.permutation(blocks) for b in np.unique(batch)}
    picker = _Picker(problem, draw, slots, rng)
    return np.stack([picker.row(seen[r], order[batch[r]]) for r in range(len(seen))])


@dataclass(frozen=True)
class _Picker:
    """Fills one row of indices."""

    problem: Problem
    draw: Draw
    slots: int
    rng: np.random.Generator

    def row(self, seen: Array, order: Array) -> Array:
        """`slots` entries: visible blocks, then what the domain allows as filling.

        `order` is the batch's own order of blocks; "shared" rows of a batch all follow it, so that
        few keys are read by anybody.
        """
        shared = self.draw.selection == "shared"
        order = order if shared else self.rng.permutation(len(seen))
        valid, invalid = order[seen[order]], order[~seen[order]]
        picked = valid[: self._count(len(valid))]
        if self.draw.selection == "duplicates" and not self.domain.distinct and len(valid):
            picked = self.rng.choice(valid, self.slots)
        filling = self._filling(picked, invalid, self.slots - len(picked))
        return self._mixed(np.concatenate([picked, filling]).astype(np.int64))

    @property
    def domain(self) -> Any:
        return self.problem.indices.domain

    def _count(self, valid: int) -> int:
        """How many visible blocks a row selects."""
        most = min(self.slots, valid)
        fillable = self.domain.negative_allowed
        if self.draw.selection == "none" and fillable:
            return 0
        if self.draw.selection == "single" and fillable:
            return min(1, most)
        if fillable and self.draw.selection != "shared":
            return int(self.rng.integers(min(1, most), most + 1))
        return most

    def _filling(self, picked: Array, invalid: Array, count: int) -> Array:
        """What follows the visible entries of a row."""
        if count <= 0:
            return np.zeros(0, np.int64)
        if self.domain.negative_allowed:
            return np.full(count, -1)
        return np.resize(invalid if len(invalid) else picked, count)

    def _mixed(self, row: Array) -> Array:
        """The row in any order where the domain does not promise valid entries first."""
        if self.domain.valid_first or self.draw.selection not in ("shuffled", "holes"):
            return row
        return self.rng.permutation(row)
