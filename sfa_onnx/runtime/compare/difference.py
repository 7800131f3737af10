"""How far two tensors are apart, and what a comparison of two models found.

Protocol (FlashMLA's): infinities and NaN must stand in the same places; then every element must be
within an absolute *or* a relative bound; then the directions must agree (cosine distance). Unless
the caller gives bounds they follow the type, the tensor's root mean square and the model's own
rounding: an error up to `NOISE_FACTOR` times what the original loses to its own precision passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DECADES",
    "NOISE_FACTOR",
    "CompareReport",
    "Difference",
    "OutputRow",
    "SiteRow",
    "measure",
]

Array = NDArray[Any]
NOISE_FACTOR: Final = 4.0
DECADES: Final = tuple(range(-8, 4))  # of an error in units of its bound: 1e-8 to 1e3
_NOISE_CAP: Final = 0.25  # of the root mean square: beyond it a tensor says nothing any more
_FLIPS: Final = 0.01  # share of integer elements that may differ (a selection at a tie)
# type -> (atol in units of the root mean square, rtol, relative norm): what our kernels promise
_BOUNDS: Final = {
    "float64": (1e-4, 1e-4, 5e-5),
    "float32": (1e-4, 1e-4, 5e-5),
    "float16": (1.2e-2, 5e-3, 4e-3),
    "bfloat16": (1.6e-2, 1.6e-2, 8e-3),
}


@dataclass(frozen=True)
class Difference:
    """Two tensors side by side; `before` is the judge."""

    shape: tuple[int, ...]
    dtype: str
    atol: float
    rtol: float
    cosine_limit: float
    nonfinite_equal: bool  # NaN and infinities stand in the same places
    outside: int  # elements beyond both bounds
    max_abs: float
    relative: float  # norm of the difference over the norm of `before`
    cosine: float  # 1 - cosine similarity
    worst_index: tuple[int, ...]
    worst_before: float
    worst_after: float
    noise: float | None = None  # what `before` loses to its own rounding, at most
    undefined: int = 0  # rows that are NaN throughout in `before` alone; informational
    decades: tuple[int, ...] = ()  # elements that are equal, then per decade of error over bound

    @property
    def multiple(self) -> float | None:
        """The largest difference in units of the model's own rounding."""
        return None if not self.noise else self.max_abs / self.noise

    @property
    def passed(self) -> bool:
        """Whether all three criteria hold."""
        allowed = _FLIPS * int(np.prod(self.shape)) if "int" in self.dtype else 0
        judged = not self.undefined or self.undefined < int(np.prod(self.shape[:-1]))
        agree = self.nonfinite_equal and self.outside <= allowed
        return judged and agree and self.cosine <= self.cosine_limit


@dataclass(frozen=True)
class SiteRow:
    """One fused site alone: the replaced region against what replaced it."""

    name: str  # as `fuse` and `inspect` call the site
    op_type: str
    layer: str
    method: Literal["captured", "random", "rounded", "reference", "skipped"]
    difference: Difference | None = None
    loss: float | None = None  # relative loss by int8 quantisation; informational
    reason: str = ""  # why it was skipped or cannot pass

    @property
    def passed(self) -> bool:
        """Whether it was compared and agreed."""
        return self.difference is not None and self.difference.passed and not self.reason


@dataclass(frozen=True)
class OutputRow:
    """One output of the whole graph."""

    name: str
    difference: Difference
    judged: bool = True  # False: informational (int8 caches change values)

    @property
    def passed(self) -> bool:
        """Whether it agreed, or was not to be judged."""
        return self.difference.passed or not self.judged


@dataclass
class CompareReport:
    """The outcome of `compare`."""

    before: str
    after: str
    sites: list[SiteRow] = field(default_factory=list)
    outputs: list[OutputRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)  # name -> "float16[1, 1, 256], random"
    seconds: float = 0.0
    missing: str = ""  # why the whole models were not compared; "": they were

    @property
    def passed(self) -> bool:
        """The whole models were compared, and everything that was agreed."""
        agreed = all(passed for _, passed in self._verdicts)
        return not self.missing and bool(self._verdicts) and agreed

    @property
    def _verdicts(self) -> list[tuple[str, bool]]:
        sites = [(row.name, row.passed) for row in self.sites]
        return sites + [(row.name, row.passed) for row in self.outputs]

    @property
    def verdict(self) -> str:
        """One sentence."""
        bad = [name for name, passed in self._verdicts if not passed]
        lost = [row for row in self.sites if row.difference is None]
        if len(lost) < len(bad):
            return f"different: {len(bad)} of {len(self._verdicts)}, first {bad[0]}"
        if self.missing:
            alone = len(self.sites) - len(lost)
            agreed = f" ({alone} sites agree on random values)" if alone else ""
            return f"not compared: {self.missing}{agreed}"
        if lost:
            count = f"{len(lost)} of {len(self.sites)} sites"
            return f"not compared: {count} could not be ({lost[0].name}: {lost[0].reason})"
        if not self.passed:
            return "not compared: the models have no output in common"
        losses = [row.loss for row in self.sites if row.loss is not None]
        if losses:
            return f"same on int8-rounded caches; int8 costs up to {max(losses):.1e}"
        judged = [row.difference for row in self.outputs if row.judged]
        multiples = [d.multiple for d in judged if d.multiple]
        if multiples:
            return f"same, within {max(multiples):.1f}x of the model's own rounding"
        return "same"


def measure(
    before: Array,
    after: Array,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    exact: Array | None = None,
    dtype: str | None = None,
) -> Difference:
    """Compare two tensors of one shape.

    Args:
        before: the judge.
        after: the candidate.
        atol: absolute bound; default by type and root mean square, widened by the noise.
        rtol: relative bound; default by type.
        exact: `before` computed in another precision: their distance is the noise floor.
        dtype: the type whose bounds hold (default: before's); a float32 twin of a bfloat16 model
            keeps the model's.
    """
    kind = dtype or str(before.dtype)
    a, b = np.atleast_1d(before).astype(np.float64), np.atleast_1d(after).astype(np.float64)
    # Rows masked from end to end have no softmax: NaN in most graphs, zero in our operator.
    undefined = np.asarray(np.isnan(a).all(-1) & np.isfinite(b).all(-1) & (a.shape[-1] > 1))
    a = np.where(undefined[..., None], b, a)
    finite = np.isfinite(a) & np.isfinite(b)
    same_special = (np.isnan(a) & np.isnan(b)) | (a == b)
    x, y = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    error = np.abs(x - y)
    norm, rms = float(np.linalg.norm(x)), float(np.sqrt(np.mean(x * x))) if x.size else 0.0
    noise, noise_relative = _noise(x, finite, exact, norm)
    scaled, relative_bound, norm_bound = _BOUNDS.get(kind, (0.0, 0.0, 0.0))
    if atol is None:
        extra = min(NOISE_FACTOR * noise, _NOISE_CAP * rms) if noise is not None else 0.0
        atol_used = max(scaled * rms, extra)
    else:
        atol_used = atol
    rtol_used = relative_bound if rtol is None else rtol
    outside = (error > atol_used) & (error > rtol_used * np.abs(x))
    worst = np.unravel_index(int(np.argmax(error)), a.shape) if a.size else ()
    limit = max(norm_bound, min(NOISE_FACTOR * noise_relative, _NOISE_CAP)) ** 2
    given = atol is not None or rtol is not None
    difference = float(np.linalg.norm(x - y))
    return Difference(
        shape=before.shape,
        dtype=kind,
        atol=atol_used,
        rtol=rtol_used,
        cosine_limit=2.0 if given or "int" in kind or kind == "bool" else limit,
        nonfinite_equal=bool((finite | same_special).all()),
        outside=int(outside.sum()),
        max_abs=float(error.max(initial=0.0)),
        relative=difference / norm if norm else (0.0 if not difference else float("inf")),
        cosine=_cosine(x, y),
        worst_index=tuple(int(i) for i in worst),
        worst_before=float(a[worst]) if a.size else 0.0,
        worst_after=float(b[worst]) if a.size else 0.0,
        noise=noise,
        undefined=int(undefined.sum()),
        decades=_decades(error, np.maximum(atol_used, rtol_used * np.abs(x))),
    )


def _decades(error: Array, bound: Array) -> tuple[int, ...]:
    """How many elements are equal, and how many lie in each decade of `DECADES`."""
    off = error > 0
    with np.errstate(over="ignore"):  # whole numbers have no bound: they are off beyond any
        share = error[off] / np.maximum(bound[off], np.finfo(np.float64).tiny)
    place = np.clip(np.floor(np.log10(share)), DECADES[0], DECADES[-1]).astype(int)
    counts = np.bincount(place - DECADES[0], minlength=len(DECADES))
    return (int((~off).sum()), *map(int, counts))


def _noise(x: Array, finite: Array, exact: Array | None, norm: float) -> tuple[float | None, float]:
    """Largest and relative error of x against its float64 twin."""
    if exact is None or exact.shape != x.shape or exact.dtype == object:
        return None, 0.0
    off = np.where(finite & np.isfinite(exact), x - exact, 0.0)
    return float(np.abs(off).max(initial=0.0)), float(np.linalg.norm(off)) / norm if norm else 0.0


def _cosine(x: Array, y: Array) -> float:
    """1 - cosine similarity; two zero tensors agree."""
    norms = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    if not norms[0] or not norms[1]:
        return 0.0 if norms[0] == norms[1] else 1.0
    unit = x / norms[0] - y / norms[1]
    return float(np.sum(unit * unit) / 2)  # exact also where 1 - dot would cancel
