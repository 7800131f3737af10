"""How the ONNX plug-ins of each CANN line read the axes of Reduce operators.

Recorded with each release's own plug-ins (8.5.0, 9.1.0, the development line of 9.2), the rest read
in the sources of the tags 8.5.0, 9.0.0, 9.0.1, 9.1.0, 9.2.0-beta.1 and 9.2.0-beta.2. What a
plug-in loses it loses silently: the GE node gets an empty list of axes and its shape function
answers the input's shape.

The line 9.2 has two kinds of plug-ins. Those of 9.2.0-beta.1 are 9.1's; 9.2.0-beta.2 brought new
ones for every Reduce operator, which from opset 13 on read axes as input and as attribute and obey
noop_with_empty_axes. A file must be right for both, so this table is beta.1's where they differ,
and `reads_later` says where beta.2 would have read it. (Of one node the records show both: case 198
was accepted with beta.2's ReduceSum, reduce/ReduceSum-18-noop refused with beta.1's.)
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Literal

__all__ = ["REDUCTIONS", "Form", "Reading", "reading", "reads_later"]

Form = Literal["attribute", "input", "none", "noop"]
"""Where the axes are: an attribute, an input, nowhere (all axes), nowhere with
noop_with_empty_axes = 1 (no axis)."""


class Reading(Enum):
    """What becomes of the axes."""

    RIGHT = "right"
    LOST = "lost"  # the plug-in does not look there: an empty list of axes
    VARIES = "varies"  # lost by some releases of the line, or by its sources only
    REFUSED = "refused"  # the plug-in returns an error (EZ9999)


_EXTREMES: Final = frozenset(("ReduceMax", "ReduceMin", "ReduceProd"))
REDUCTIONS: Final = _EXTREMES | {
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceSum"),
    "ReduceSumSquare",
}
_OLD: Final = ("8.5", "9.0")


def reading(op_type: str, opset: int, form: Form, line: str) -> Reading:
    """How the plug-ins of CANN line `line` read a Reduce operator of that opset and form.

    `ReduceSum` without axes is right only where the plug-in can see the rank (a graph input);
    anywhere else it is refused.
    """
    if form == "noop":
        return Reading.REFUSED if op_type == "ReduceSum" else Reading.RIGHT
    if form == "none":
        return _without_axes(op_type, line)
    if op_type == "ReduceMean":
        return _mean(form, line)
    if op_type in ("ReduceSum", "ReduceL1", "ReduceL2"):
        return Reading.RIGHT
    if op_type == "ReduceSumSquare":
        return Reading.RIGHT if form == "attribute" else Reading.LOST
    if form == "input":
        return Reading.LOST if op_type in _EXTREMES and line in _OLD else Reading.RIGHT
    if line in _OLD:
        return Reading.RIGHT if op_type in _EXTREMES else Reading.LOST
    return Reading.RIGHT if opset < 13 else Reading.LOST


def _without_axes(op_type: str, line: str) -> Reading:
    if op_type not in ("ReduceSum", "ReduceLogSum"):
        return Reading.LOST
    # 9.1's sources list all axes; those of 8.5 and 9.0 write an empty list, the record has all.
    return Reading.VARIES if line in _OLD else Reading.RIGHT


def _mean(form: Form, line: str) -> Reading:
    if form == "attribute":
        return Reading.RIGHT
    return Reading.VARIES if line == "9.2" else Reading.LOST  # right from 9.2.0-beta.2 on


def reads_later(op_type: str, form: Form, line: str) -> bool:
    """Whether a release of the line reads what `reading` says is lost or refused."""
    if line != "9.2" or op_type == "ReduceSumSquare":
        return False
    return form == "attribute" or (op_type == "ReduceSum" and form in ("none", "noop"))
