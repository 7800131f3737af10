"""One class of sites under verification: run both graphs on every question."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sfa_onnx.errors import ContractError
from sfa_onnx.passes.candidate import Candidate, Refusal, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.verify.distance import (
    UNDEFINED,
    mostly_empty,
    mostly_undefined,
    relative_error,
)
from sfa_onnx.passes.verify.execute import Executable
from sfa_onnx.passes.verify.extract import UnverifiableError
from sfa_onnx.passes.verify.far import far_scores
from sfa_onnx.passes.verify.inputs import in_own_types, inputs
from sfa_onnx.passes.verify.judge import Judge
from sfa_onnx.passes.verify.lonely import mostly_hidden, rows_without_keys
from sfa_onnx.passes.verify.probes import BOUND, PROBES, Probe
from sfa_onnx.passes.verify.problem import Draw, Problem, inputs_as
from sfa_onnx.passes.verify.promote import promote
from sfa_onnx.passes.verify.sizes.concrete import Sizer
from sfa_onnx.passes.verify.sizes.turns import integer_constants
from sfa_onnx.passes.verify.unrunnable import first_line, unrunnable
from sfa_onnx.report import ProbeResult, VerifyRecord

__all__ = ["QUESTIONS", "Site"]

QUESTIONS = 32  # about as many are asked of a site

Array = NDArray[Any]
_SPREADS = (
    "keys that no row attends to hold no NaN: the original spreads it (0 * NaN), the operator not"
)
_EDGES = ("lengths", "selection", "sizes")  # probes of rows with few keys
_DRAWS = 6  # until one shows something
_SLOW = 0.3  # seconds of one run from which on each probe asks one question only
# Rounding of the product of a graph's scale factors, in the type of its query.
_SCALE_SLACK: dict[int, float] = {onnx.TensorProto.FLOAT16: 1e-3, onnx.TensorProto.BFLOAT16: 8e-3}


def _once(problem: Problem) -> Iterator[tuple[Problem, Draw]]:
    yield problem, Draw(seed=11)


class _NothingShownError(Exception):
    """Most rows of a draw have no visible key, or (args: False) are NaN though they have one."""


class _OriginalFailsError(Exception):
    """The original graph rejects a draw."""


class Site:
    """One class of sites under verification."""

    def __init__(
        self,
        index: GraphIndex,
        candidate: Candidate,
        region: onnx.ModelProto,
        replacement: onnx.ModelProto,
        sizer: Sizer,
    ) -> None:
        self._candidate = candidate
        self._sizer = sizer
        self._region_model = region
        self._attributes = inputs_as(candidate)
        self._constants = {
            o.value: array
            for o in candidate.operands
            if o.role is Role.CONSTANT and (array := index.constant(o.value)) is not None
        }
        self._edges: set[str] = set()
        self._most: int | None = None  # questions per probe
        self._problem: Problem | None = None
        self._read = len(index.constants_read)
        self._index = index
        self._judge = Judge(rope_dtype=_rope_dtype(candidate))
        try:
            self._region = Executable(promote(region))
            self._fused = Executable(promote(replacement), self._judge)
        except RuntimeError as error:
            raise UnverifiableError(
                Refusal(
                    f"the site cannot be run in float64: {first_line(error)}",
                    candidate.outputs[0],
                )
            ) from error

    def verify(self, probes: Sequence[Probe], budget: float) -> VerifyRecord | Refusal:
        """Calibrate the scale, then ask every probe; at most `budget` seconds.

        Raises:
            UnverifiableError: the original runs at no size.
        """
        begin = time.monotonic()
        deadline = begin + budget
        problem = self.start()
        if refusal := self._calibrate(problem):
            return refusal
        results = []
        for probe in probes:
            result = self._ask(probe, problem, deadline)
            if isinstance(result, Refusal):
                return result
            if result.draws:
                results.append(result)
        self._edges |= rows_without_keys(problem, self._both) | far_scores(
            problem, self._region_model, self._region
        )
        if refusal := mostly_hidden(problem, self._both, self._edges):
            return refusal
        return VerifyRecord(
            probes=tuple(results),
            sizes=problem.dims.named(),
            shrunk=(),
            assumptions=(*sorted(self._edges), *self._unturned()),
            constants_read=tuple(dict.fromkeys(self._index.constants_read[: self._read])),
            own_rounding=self._own_rounding(problem),
            seconds=time.monotonic() - begin,
        )

    def _both(self, feeds: dict[str, Array]) -> tuple[Array, Array] | None:
        """Results of the original and of the fused form, flat; None where one rejects the feeds."""
        with contextlib.suppress(RuntimeError, ContractError):
            want, got = self._region.run(feeds), self._fused.run(feeds)
            return self._flat(want[:1]), self._flat(got[:1])
        return None

    def _unturned(self) -> list[str]:
        """What the sizes leave open: Mins and Maxes of which one side is too large to be run."""
        return [
            f"{turn} may have either sign: computed in the graph, too large to probe on both sides"
            for turn in self._sizer.unturned
        ]

    def hurry(self, seconds: float) -> None:
        """Ask two questions per probe where all of them would take more than `seconds`.

        Raises:
            UnverifiableError: the original runs at no size.
        """
        if self.seconds() * QUESTIONS > seconds:
            self._most = self._most or 2

    def seconds(self) -> float:
        """How long one question takes at the first sizes: inputs, original and fused form.

        Raises:
            UnverifiableError: the original runs at no size.
        """
        problem = self.start()
        begin = time.thread_time()
        feeds = inputs(problem, Draw())
        with contextlib.suppress(RuntimeError, ContractError):
            self._region.run(feeds)
            self._fused.run(feeds)
        return time.thread_time() - begin

    @property
    def scale(self) -> float:
        """What the operator's scale is multiplied with to be the graph's own, unrounded."""
        return self._judge.scale

    def confirm(self, scale: float) -> ProbeResult | Refusal:
        """One random question at the first sizes, asked of a site that was verified at others.

        Args:
            scale: found at the other sizes.
        """
        self._judge.scale = scale
        probe = Probe(
            "true size", "the result differs from the fused operator's at its true sizes", _once
        )
        return self._ask(probe, self.start(), math.inf)

    def doubts(self, refusal: Refusal) -> bool:
        """Whether this site, at the first sizes, does not show what `refusal` says of others."""
        probe = next((p for p in PROBES if f"probe {p.name!r}" in refusal.reason), None)
        if probe is None:
            return True
        self._most = 1
        problem = self.start()
        verdict = self._calibrate(problem) or self._ask(probe, problem, math.inf)
        return not isinstance(verdict, Refusal)

    def _ask(self, probe: Probe, problem: Problem, deadline: float) -> ProbeResult | Refusal:
        """Put all questions of one probe."""
        error, draws, failed = 0.0, 0, ""
        where = self._candidate.outputs[0]
        most = None if probe.name == "sizes" else self._most  # each size is a question of its own
        for case, draw in itertools.islice(probe.ask(problem), most):
            if time.monotonic() > deadline:
                return Refusal(
                    "not verifiable within budget: the probes at the sizes that the file fixes take"
                    " too long",
                    where,
                    "export with dynamic shapes: the site is then verified at small sizes",
                )
            try:
                outcome = self._shown(case, draw, edge=probe.name in _EDGES)
            except _OriginalFailsError as fault:
                failed = str(fault) if case.shapes == problem.shapes else failed
                continue  # at other sizes: the original does not accept them either
            if isinstance(outcome, str):
                return Refusal(outcome, where)
            draws += 1
            error = max(error, outcome)
        if failed and not draws:
            return Refusal(
                f"the original itself fails on the probe {probe.name!r}: {failed}", where
            )
        if probe.gating and not error <= BOUND:
            return self._refusal(probe, error)
        return ProbeResult(probe.name, error, BOUND, draws)

    def start(self) -> Problem:
        """The first sizes at which the original graph runs.

        Raises:
            UnverifiableError: it runs at none.
        """
        if self._problem is not None:
            return self._problem
        errors = []
        for shapes, dims in self._sizer.bases():
            problem = Problem(self._candidate, shapes, dims, self._attributes, self._constants)
            try:
                feeds = inputs(problem, Draw())
                begin = time.thread_time()  # whatever else the machine does
                self._region.run(feeds)
                self._most = 1 if time.thread_time() - begin > _SLOW else None
            except RuntimeError as error:
                errors.append(first_line(error))
                continue
            marks = integer_constants(self._region_model)
            others = [o for o in self._sizer.others(marks) if o[0] != shapes]
            self._problem = dataclasses.replace(problem, others=tuple(others))
            return self._problem
        raise UnverifiableError(unrunnable(self._region_model, errors, self._candidate.outputs[0]))

    def _calibrate(self, problem: Problem) -> Refusal | None:
        """Find the exact scale of the graph; it may differ from the attribute by rounding only.

        One Gauss-Newton step per round on the residual of a random draw: the output depends
        smoothly on the scale, and only the scale may differ before the probes judge the rest.
        """
        feeds = inputs(problem, Draw(seed=1, lengths="full"))
        try:
            want = self._flat(self._region.run(feeds)[:1])
        except RuntimeError as error:
            return Refusal(
                f"the original itself fails on ordinary inputs: {first_line(error)}",
                self._candidate.outputs[0],
            )
        factor, step = 1.0, 1e-6
        for _ in range(2 if self._most == 1 else 3):
            self._judge.scale = factor
            try:
                got = self._flat(self._fused.run(feeds)[:1])
                self._judge.scale = factor * (1 + step)
                slope = (self._flat(self._fused.run(feeds)[:1]) - got) / step
            except (ContractError, RuntimeError) as error:
                return self._rejected(error)
            finally:
                self._judge.scale = 1.0
            norm = float(slope @ slope) if slope.shape == want.shape else 0.0
            if norm == 0.0 or not np.isfinite(want).all() or not math.isfinite(norm):
                return None  # the probes will show
            factor *= 1 + float(slope @ (want - got)) / norm
        if not abs(factor - 1) <= 0.5:
            return None
        self._judge.scale = factor
        residual = relative_error(want, self._flat(self._fused.run(feeds)[:1]))
        types = [o.elem_type for o in self._candidate.operands if o.role is Role.QUERY]
        if abs(factor - 1) <= min((_SCALE_SLACK.get(t, 2e-7) for t in types), default=2e-7):
            return None
        self._judge.scale = 1.0
        if residual > BOUND:
            return None
        scale = self._attributes["scale_value"]
        return Refusal(
            f"the graph scales its scores by {scale * factor:.8g}, the fused operator would by"
            f" {scale:.8g}",
            self._candidate.outputs[0],
        )

    def _shown(self, problem: Problem, draw: Draw, *, edge: bool) -> float | str:
        """As `_compare`, of the first draw in which most rows have a visible key.

        A table of the file may hide most of what is drawn. At an `edge` rows with keys may be NaN.

        Raises:
            _OriginalFailsError: the original rejects the draw.
        """
        for seed in range(draw.seed, draw.seed + 97 * _DRAWS, 97):
            try:
                return self._compare(problem, dataclasses.replace(draw, seed=seed))
            except _NothingShownError as nothing:
                if edge and not nothing.args[0]:
                    self._edges.add(UNDEFINED)
                    return 0.0
        return math.inf

    def _compare(self, problem: Problem, draw: Draw) -> float | str:
        """Relative error of one draw, or a reason when the operator rejects it.

        Raises:
            _NothingShownError: most rows have no visible key.
            _OriginalFailsError: the original rejects the draw.
        """
        feeds = inputs(problem, draw)
        try:
            want = self._region.run(feeds)
        except RuntimeError as error:
            raise _OriginalFailsError(first_line(error)) from error
        try:
            got = self._fused.run(feeds)
        except (ContractError, RuntimeError) as error:
            return self._rejected(error).reason
        if any(w.shape != g.shape for w, g in zip(want, got, strict=True)):
            shapes = f"{[w.shape for w in want]} but the fused one {[g.shape for g in got]}"
            return f"the original output has shape {shapes} (sizes {problem.dims.named()})"
        flat, fused = self._flat(want[:1]), self._flat(got[:1])
        if draw.poison is not None and math.isnan(draw.poison):
            return self._spread(flat, fused)
        if mostly_undefined(flat, fused):
            raise _NothingShownError(mostly_empty(flat, fused))
        errors = [  # of every output by its own largest value
            relative_error(self._flat([w]), self._flat([g]), self._edges)
            for w, g in zip(want, got, strict=True)
        ]
        return max(errors)

    def _spread(self, want: Array, got: Array) -> float:
        """What NaN in unselected rows makes of a result: an edge, unless the fused one is worse."""
        if (np.isnan(got) & ~np.isnan(want)).any():
            return math.inf
        if not relative_error(want, got) <= BOUND:
            self._edges.add(_SPREADS)
        return 0.0

    def _rejected(self, error: Exception) -> Refusal:
        """The fused form does not run on inputs that the original accepts."""
        return Refusal(
            f"the original accepts inputs that the fused operator rejects: {first_line(error)}",
            self._candidate.outputs[0],
        )

    def _refusal(self, probe: Probe, error: float) -> Refusal:
        shown = "different infinities or NaN" if math.isinf(error) else f"error {error:.1e}"
        return Refusal(
            f"{probe.reason} (probe {probe.name!r}: {shown}, bound {BOUND:.0e})",
            self._candidate.outputs[0],
        )

    def _flat(self, outputs: Sequence[Array]) -> Array:
        return np.concatenate([np.asarray(o, np.float64).reshape(-1) for o in outputs])

    def _own_rounding(self, problem: Problem) -> float | None:
        """Error of the site in the model's own types against float64; None where it cannot run."""
        feeds = inputs(problem, Draw(seed=2, lengths="full"))
        narrow = in_own_types(self._candidate, feeds)
        wide = {
            name: array.astype(np.float64) if feeds[name].dtype == np.float64 else array
            for name, array in narrow.items()
        }
        try:
            own = Executable(self._region_model)
            if own.engine != "onnxruntime":
                return None
            return relative_error(self._flat(self._region.run(wide)), self._flat(own.run(narrow)))
        except (RuntimeError, ValueError, TypeError):
            return None


def _rope_dtype(candidate: Candidate) -> Any:
    """Type of the rope bytes in packed rows: the query's own type."""
    kinds = [o.elem_type for o in candidate.operands if o.role is Role.QUERY]
    if kinds and not kinds[0]:
        raise UnverifiableError(Refusal("the element type of its queries is not known"))
    return onnx.helper.tensor_dtype_to_np_dtype(kinds[0]) if kinds else np.float32
