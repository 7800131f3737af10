"""A vendor norm beside what replaces it, in float64: the epsilon is reached, not the last bit.

A norm of another epsilon is the plug-in's own on x times a number that float32 rounds, so results
agree to float32's rounding of that number and never bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from onnx import NodeProto

from sfa_onnx.ascend.flavour.norm_match import PLUGIN_EPSILON
from sfa_onnx.ascend.flavour.norms import ADD_RMS_NORM, RMS_NORM
from sfa_onnx.ascend.flavour.scope import Scope
from sfa_onnx.files.onnx_attrs import attribute

__all__ = ["TOLERANCE", "compare_norms"]

TOLERANCE: Final = 1e-6  # relative; a factor rounded to float32 is off by 6e-8
_OPEN_DIM: Final = 3
_PLAIN: Final[dict[str, Any]] = {"Add": np.add, "Mul": np.multiply, "Cast": np.asarray}
_SIZES: Final = (1e-4, 1e-2, 1.0)  # of x: around the root of epsilon, and far above it

Array = np.ndarray[Any, Any]


def compare_norms(scope: Scope, old: NodeProto, new: Sequence[NodeProto]) -> str:
    """Why it is not shown that a norm and its replacement agree; empty when it is.

    The old node is evaluated with the epsilon of the file, vendor nodes of the replacement with
    the 1e-6 of CANN's plug-ins.
    """
    for size in _SIZES:
        feeds = _feeds(scope, old, size)
        if feeds is None:
            return f"nothing is known of the shape of {', '.join(map(repr, old.input))}"
        before = dict(feeds)
        epsilon = float(attribute(old, "epsilon", PLUGIN_EPSILON))
        before |= _norm(old, [feeds[n] for n in old.input], epsilon)
        after = dict(feeds)
        for node in new:
            after |= _step(scope, node, after)
        for name in (o for o in old.output if o):
            if name not in after or not np.allclose(after[name], before[name], TOLERANCE, 0):
                return f"output {name!r} differs in float64"
    return ""


def _feeds(scope: Scope, node: NodeProto, size: float) -> dict[str, Array] | None:
    rng = np.random.default_rng(len(node.input))
    feeds: dict[str, Array] = {}
    for name in node.input:
        dims = scope.dims(name)
        if dims is None:
            return None
        feeds[name] = rng.standard_normal([_OPEN_DIM if d is None else d for d in dims]) * size
    return feeds


def _norm(node: NodeProto, given: list[Array], epsilon: float) -> dict[str, Array]:
    *terms, gamma = given
    x = np.asarray(sum(terms[1:], terms[0]))
    axes = tuple(range(-gamma.ndim, 0))
    rstd = 1 / np.sqrt(np.mean(x * x, axis=axes, keepdims=True) + epsilon)
    return dict(zip(node.output, (x * rstd * gamma, rstd, x), strict=False))


def _step(scope: Scope, node: NodeProto, known: dict[str, Array]) -> dict[str, Array]:
    given = [known[n] if n in known else np.asarray(scope.array(n), float) for n in node.input]
    if node.op_type in (RMS_NORM, ADD_RMS_NORM):
        return _norm(node, given, PLUGIN_EPSILON)
    return {node.output[0]: _PLAIN[node.op_type](*given)}
