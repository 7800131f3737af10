"""Decide whether a bound selection is the indexer: run both in float64, compare by scores.

Lists of indices are no measure: scores that differ by a rounding change places. Compared are the
original scores at the positions that the replacement selects, with those the original selects.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from sfa_onnx.errors import ContractError
from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.candidate import Candidate, Refusal, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.indexer.draws import Question, draw
from sfa_onnx.passes.indexer.runs import at_sizes
from sfa_onnx.passes.indexer.same import (
    ADDED,
    ORDERED,
    Difference,
    compare_entries,
    compare_indices,
    flat_rows,
    margin_at,
)
from sfa_onnx.passes.shapes.concrete import Concrete, SizesMeetError
from sfa_onnx.passes.verify.classes import Classes, Verdict, fingerprint
from sfa_onnx.passes.verify.execute import Executable
from sfa_onnx.passes.verify.extract import (
    UnverifiableError,
    extract_region,
    extract_replacement,
)
from sfa_onnx.passes.verify.inputs import in_own_types
from sfa_onnx.passes.verify.promote import promote
from sfa_onnx.passes.verify.sizes.equal import unified
from sfa_onnx.passes.verify.unrunnable import first_line
from sfa_onnx.report import ProbeResult, VerifyRecord

__all__ = ["SelectionVerifier"]

_T = onnx.TensorProto
Array = NDArray[Any]
BOUND: Final = 1e-9  # relative to the largest score of a row
_WORK: Final = 4e8  # multiply-adds of one run
_MOST_WORK: Final = 2e10  # where the file fixes its sizes
_ROOM: Final = 1e9  # bytes of scores there
_PROBES: Final = (
    Question("random", "the selected keys differ"),
    Question("random again", "the selected keys differ", seed=5),
    Question("ties", "equal scores are ordered differently", kind="ties", seed=1),
    Question("short rows", "rows with few visible keys differ", kind="short", seed=2),
    Question("all visible", "rows with every key visible differ", kind="open", seed=3),
)
_EDGES: Final = (
    Question("NaN", "keys hold no NaN", kind="nan", seed=3),
    Question("infinity", "scores are finite", kind="infinite", seed=4),
    Question("minus infinity", "products are finite", kind="lowest", seed=6),
)


class SelectionVerifier:
    """Verifies selections of one graph; equal ones are run once.

    Args:
        index: the graph.
        budget: seconds that one class may take.
    """

    def __init__(self, index: GraphIndex, budget: float = 120.0) -> None:
        self._index, self._budget = index, budget
        self._classes = Classes(index)
        self._sizes: dict[tuple[tuple[str, str], ...], Concrete] = {}

    def verify(self, candidate: Candidate) -> Verdict:
        """The record of what was verified, or why the selection is not the operator's."""
        index = self._index
        scores = index.nodes[candidate.anchor].input[0]
        try:
            shown = dataclasses.replace(candidate, outputs=(scores, *candidate.outputs))
            region = extract_region(index, shown)
            replacement = extract_replacement(index, candidate)
            sizes = self._sizes.setdefault(candidate.equal, unified(index, candidate))
            own = (sizes.shape(o.value) for o in candidate.operands)
            shapes = [tuple(map(str, shape or ())) for shape in own]
            key = fingerprint(candidate, region, replacement, [], shapes)
        except UnverifiableError as error:
            return error.refusal
        return self._classes.verdict(
            candidate, key, lambda: self._judge(candidate, region, replacement, sizes)
        )

    def _judge(
        self,
        candidate: Candidate,
        region: onnx.ModelProto,
        replacement: onnx.ModelProto,
        sizes: Concrete,
    ) -> Verdict:
        begin = time.monotonic()
        try:
            pair = Executable(promote(region)), Executable(promote(replacement))
        except RuntimeError as error:
            text = f"the selection cannot be run in float64: {first_line(error)}"
            return Refusal(text, candidate.outputs[0])
        run = _Run(self._index, candidate, pair, region)
        cases = _cases(candidate, sizes)
        results: list[ProbeResult] = []
        sized: dict[str, int] = {}
        slow = bool(cases) and cases[0].work > _WORK
        probes = [q for q in _PROBES if not slow or q.name in ("random", "ties")]
        for question, case in [(q, c) for c in cases for q in probes]:
            if time.monotonic() - begin > self._budget:
                break
            outcome = run.ask(question, case)
            if isinstance(outcome, Refusal):
                return outcome
            if outcome is not None:
                sized = sized or case.sizes
                results.append(outcome)
        if not results:
            return Refusal(
                run.failed or "no size of the selection can be run within budget",
                candidate.outputs[0],
                "export with dynamic shapes: the selection is then verified at small sizes",
            )
        edges = [text for q in _EDGES if not slow and (text := run.edge(q, cases[0]))]
        flips, share = ([], None) if slow else run.flips(_wide(candidate, sizes) or cases)
        return VerifyRecord(
            probes=_merged(results),
            sizes=sized,
            shrunk=(),
            assumptions=(*edges, *flips),
            constants_read=tuple(dict.fromkeys(self._index.constants_read)),
            own_rounding=share,
            margin=run.margin,
        )


def _merged(results: list[ProbeResult]) -> tuple[ProbeResult, ...]:
    """One result per question, over all sizes."""
    found: dict[str, ProbeResult] = {}
    for r in results:
        old = found.get(r.name)
        error = r.error if old is None else max(old.error, r.error)
        draws = r.draws if old is None else old.draws + r.draws
        found[r.name] = ProbeResult(r.name, error, BOUND, draws)
    return tuple(found.values())


@dataclass(frozen=True)
class _Case:
    """Sizes of one run: by axis of the operator, and the shape of every operand."""

    sizes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]

    @property
    def work(self) -> float:
        """Multiply-adds of the scores."""
        total = 1.0
        for name in ("B", "S1", "S2", "Hi", "Di"):
            total *= self.sizes.get(name, 1)
        return total

    @property
    def bytes(self) -> float:
        """What the original holds: a score per row, head and key."""
        return 8.0 * self.work / self.sizes.get("Di", 1)

    def kinds(self, count: int) -> set[str]:
        """What a run at these sizes can show."""
        keys = self.sizes.get("S2", 1)
        found = {"few" if keys < count else "many" if keys > count else "equal"}
        found |= {"batch"} if self.sizes.get("B", 1) > 1 else set()
        rows = self.sizes.get("S1", 1)
        found |= {"short"} if rows > keys - count + 2 else set()  # causal rows of two hidden keys
        return found | ({"rows"} if rows > 1 else set())


def _cases(candidate: Candidate, sizes: Concrete) -> list[_Case]:
    """Sizes on both sides of K, several rows and sequences, as far as the file leaves them open."""
    count = int(candidate.sizes["K"])
    free = [n for n in sizes.symbols if n not in {s for _, s in sizes.equal}]
    pool = sorted({1, 2, 3, 5, max(count - 1, 1), count, count + 1, count + 3, 2 * count + 3})
    rng = random.Random(0)
    found: list[_Case] = []
    for chosen in itertools.chain(_first(free, count), _drawn(free, pool, rng)):
        case = _case(candidate, at_sizes(sizes, chosen))
        if case is not None and 0 not in case.sizes.values():
            found.append(case)
        if not free:
            break
    found.sort(key=lambda c: c.work)
    told: set[frozenset[str]] = set()
    kept = []
    for case in found:
        kind = frozenset(case.kinds(count))
        if case.work <= _WORK and kind not in told:
            told.add(kind)
            kept.append(case)
    kept.sort(key=lambda c: -len(c.kinds(count)) - ("many" in c.kinds(count)))
    if not kept:  # sizes that the file fixes
        return [c for c in found if c.work <= _MOST_WORK and c.bytes <= _ROOM][:1]
    kept = kept[:6]
    while len(kept) > 2 and sum(c.work for c in kept) > 2 * _WORK:
        kept.remove(max(kept[1:], key=lambda c: c.work))
    return kept


def _wide(candidate: Candidate, sizes: Concrete) -> list[_Case]:
    """Sizes at which most keys are left out, where that is no work: roundings show there."""
    free = [n for n in sizes.symbols if n not in {s for _, s in sizes.equal}]
    for by in (8, 4) if free else ():
        every = dict.fromkeys(free, by * int(candidate.sizes["K"]))
        case = _case(candidate, at_sizes(sizes, every))
        if case is not None and case.work <= _WORK / 20 and 0 not in case.sizes.values():
            return [case]
    return []


def _first(free: list[str], count: int) -> Iterator[dict[str, int]]:
    yield {name: (3, count + 4)[i % 2] for i, name in enumerate(free)}
    yield {name: (count + 4, 3)[i % 2] for i, name in enumerate(free)}
    yield {name: (2, count + 1, count + 1)[i % 3] for i, name in enumerate(free)}
    yield dict.fromkeys(free, count + 1)


def _drawn(free: list[str], pool: list[int], rng: random.Random) -> Iterator[dict[str, int]]:
    for _ in range(60):
        yield {name: rng.choice(pool) for name in free}


def _case(candidate: Candidate, sizes: Concrete) -> _Case | None:
    shapes: dict[str, tuple[int, ...]] = {}
    node = sizes.index.nodes[candidate.anchor]
    named = {n: size for n, size in candidate.sizes.items() if isinstance(size, int)}
    try:
        scores = sizes.shape(node.input[0])
        if scores is None:
            return None
        named["S2"] = int(scores[attributes(node).get("axis", -1)])
        for operand in candidate.operands:
            shape = sizes.shape(operand.value)
            if shape is None:
                return None
            shapes[operand.value] = tuple(int(d) for d in shape)
            if min(shapes[operand.value], default=0) < 0:  # a difference of sizes
                return None
            for axis, size in zip(operand.axes, shape, strict=True):
                plain = axis not in ("", "1") and "*" not in axis
                if plain and named.setdefault(axis, int(size)) != size:
                    return None
    except (SizesMeetError, ValueError, KeyError):
        return None
    return _Case(named, shapes)


class _Run:
    """Asks questions of one class."""

    def __init__(
        self,
        index: GraphIndex,
        candidate: Candidate,
        pair: tuple[Executable, Executable],
        region: onnx.ModelProto,
    ) -> None:
        self.candidate, (self.region, self.fused) = candidate, pair
        self.own = region
        node = index.nodes[candidate.anchor]
        self.indices, a = candidate.indices, attributes(node)
        self.ordered = bool(a.get("sorted", 1))
        self.axis, self.sign = a.get("axis", -1), 1 if a.get("largest", 1) else -1
        self.failed = ""
        self.margin: float | None = None

    def ask(self, question: Question, case: _Case) -> ProbeResult | Refusal | None:
        """The outcome of one question; None: the original rejects it."""
        found = self._compare(question, case)
        if found is None:
            return None
        if found.reason or not found.error <= BOUND:
            text = f"{question.reason} (probe {question.name!r}: "
            text += found.reason or f"scores differ by {found.error:.1e}"
            hint = ADDED if found.reason == ORDERED else ""
            return Refusal(f"{text}, sizes {case.sizes})", self.candidate.outputs[0], hint)
        return ProbeResult(question.name, found.error, BOUND)

    def edge(self, question: Question, case: _Case) -> str:
        """What differs on inputs that no selection means."""
        found = self._compare(question, case)
        if found is None or (not found.reason and found.error <= BOUND):
            return ""
        return f"{question.reason}: the original and the operator order such keys differently"

    def _compare(self, question: Question, case: _Case) -> Difference | None:
        feeds = draw(self.candidate, case.shapes, case.sizes, question)
        try:
            want = self.region.run(feeds)
        except RuntimeError as error:
            self.failed = f"the original itself fails: {first_line(error)}"
            return None
        try:
            with np.errstate(invalid="ignore", over="ignore"):  # infinite keys are asked for
                got = self.fused.run(feeds)
        except (ContractError, RuntimeError) as error:
            text = f"the operator rejects what the original accepts: {first_line(error)}"
            return Difference(0.0, text)
        scores, exact = (
            self._last(want[0]) * self.sign,
            question.kind not in ("nan", "infinite", "lowest"),
        )
        if question.kind == "random":
            gap = margin_at(scores, int(case.sizes["K"]))
            known = [m for m in (gap, self.margin) if m is not None]
            self.margin = min(known, default=None)
        found = Difference(0.0, "")
        for name, a, b in zip(self.candidate.outputs, want[1:], got, strict=True):
            if name == self.indices:
                pair = self._last(a), self._last(b)
                one = compare_indices(scores, *pair, exact=exact, ordered=self.ordered)
            else:
                one = compare_entries(scores, a, b, exact=exact)
            found = found.worse(one)
        return found

    def _last(self, array: Array) -> Array:
        """Rows with their keys along the last axis."""
        return np.moveaxis(array, self.axis, -1)

    def _narrowest(self) -> str:
        """The narrowest float type of the region, by name."""
        kinds = [o.elem_type for o in self.candidate.operands if o.role is Role.QUERY]
        casts = (n for n in self.own.graph.node if n.op_type == "Cast")
        kinds += [int(attributes(n)["to"]) for n in casts]
        narrow = [k for k in (_T.BFLOAT16, _T.FLOAT16) if k in kinds]
        name: str = _T.DataType.Name((*narrow, kinds[0])[0])
        return name.lower()

    def flips(self, cases: list[_Case]) -> tuple[list[str], float | None]:
        """How many selected keys are others in the model's own type."""
        name = self._narrowest()
        best = max(cases, key=lambda c: ("many" in c.kinds(int(c.sizes["K"])), c.work))
        feeds = draw(self.candidate, best.shapes, best.sizes, _PROBES[0])
        narrow = in_own_types(self.candidate, feeds)
        wide = {n: a.astype(feeds[n].dtype) for n, a in narrow.items()}
        try:
            own = Executable(self.own)
            if own.engine != "onnxruntime":
                return [], None
            made = (r.run(f)[1] for r, f in ((own, narrow), (self.region, wide)))
            listed = self.candidate.outputs[0] == self.indices
            mine, exact = (self._last(x) if listed else x for x in made)
        except (RuntimeError, ValueError, TypeError):
            return [], None
        rows = zip(*(flat_rows(x) for x in (mine, exact)), strict=True)
        other = sum(len(set(a.tolist()) - set(b.tolist())) for a, b in rows)
        total = max(1, exact.size)
        if not other:
            return [], 0.0
        text = (
            f"in {name} the original itself selects {other} of {total} other keys than in float64"
        )
        return [text], other / total
