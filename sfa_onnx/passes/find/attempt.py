"""One attempt to bind a site: it starts again where sizes turn out to be one, and may fail."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Final

from sfa_onnx.errors import BudgetError, ContractError
from sfa_onnx.passes.axes.trace import Stop, Tracer, UnifyError
from sfa_onnx.passes.candidate import Candidate, Refusal
from sfa_onnx.passes.shapes.concrete import SizesMeetError

__all__ = ["FAULTS", "plain", "refused", "unified"]

_log = logging.getLogger("sfa_onnx")

# What a graph that contradicts itself (ranks, shapes) makes recognition raise.
_INVALID: Final = (
    *(ArithmeticError, AssertionError, AttributeError),
    *(LookupError, TypeError, ValueError),
)
# What an attempt raises besides `Stop`: it refuses its own site and must not stop the others.
FAULTS: Final = (SizesMeetError, BudgetError, ContractError, RecursionError, *_INVALID)

# Labels of tracing, which are numbered over all sites that this process has looked at.
_LABEL = re.compile(r"(?<![\w#])(axis\d+|column|d|n|part|slot|t|v|w)(#\d+)")


def refused(fault: Exception, scores: str, name: str) -> Refusal:
    """The refusal that one of `FAULTS` is.

    Args:
        fault: what was raised, inside its handler.
        scores: the value to point at.
        name: the site, for the log.
    """
    if isinstance(fault, SizesMeetError):
        return Refusal(str(fault), scores, "export with these sizes fixed, or as one name")
    if isinstance(fault, ContractError):
        return Refusal(f"no operator takes what was found: {fault}", scores)
    if isinstance(fault, BudgetError):
        return Refusal(str(fault), scores)
    if isinstance(fault, RecursionError):
        return Refusal("the graph is nested too deeply to be traced", scores)
    _log.debug("recognition of %s failed", name, exc_info=True)
    text = f"recognition itself failed ({type(fault).__name__}: {fault})"
    return Refusal(text, scores, "check the model with onnx.checker, then report it")


def unified(tracer: Tracer, scores: str, what: str, make: Callable[[], Candidate]) -> Candidate:
    """What `make` makes; symbols that turn out to be one size are made so, and it starts again."""
    for _ in range(len(tracer.sizes.symbols) + 1):
        try:
            return make()
        except UnifyError as same:
            tracer.sizes.unify(*same.pair)
            for pair in tracer.sizes.equal:
                tracer.other.unify(*pair)
    raise Stop(f"the dynamic sizes of the {what} contradict each other", scores)


def plain(reason: str) -> str:
    """A reason with index labels for people: d, and d2, d3 where there are several."""
    seen: dict[str, list[str]] = {}

    def short(found: re.Match[str]) -> str:
        numbers = seen.setdefault(found[1], [])
        if found[2] not in numbers:
            numbers.append(found[2])
        place = numbers.index(found[2]) + 1
        return found[1] if place == 1 else f"{found[1]}{place}"

    return _LABEL.sub(short, reason)
