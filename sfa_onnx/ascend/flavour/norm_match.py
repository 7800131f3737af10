"""Find x / sqrt(mean(x^2) + epsilon) * gamma among standard operators, and prove it in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto

from sfa_onnx.ascend.flavour.scope import Scope
from sfa_onnx.files.onnx_attrs import attribute

__all__ = ["PLUGIN_EPSILON", "Norm", "match", "same_epsilon"]

PLUGIN_EPSILON: Final = 1e-6
_T = TensorProto
_TYPES: Final = (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16)
_TOLERANCE: Final = 1e-9  # relative, float64; constants of the file are float32

Array = npt.NDArray[Any]


@dataclass
class Norm:
    """One norm: where it starts, and the nodes it is written with."""

    x: str
    gamma: str
    epsilon: float
    dtype: int  # of the result, and of x unless epsilon has to be reached by scaling
    nodes: list[NodeProto]

    @property
    def exact_epsilon(self) -> bool:
        """Whether the plug-in's own epsilon is meant."""
        return same_epsilon(self.epsilon)


def same_epsilon(value: float) -> bool:
    """Whether a value is 1e-6, as float32 sees it."""
    return bool(np.float32(value) == np.float32(PLUGIN_EPSILON))


def match(scope: Scope, node: NodeProto) -> Norm | str | None:
    """The norm whose last node is `node`; a text where one is seen that cannot be fused."""
    if node.domain or node.op_type not in ("Mul", "Cast"):
        return None
    return _Match(scope, node).find()


class _Match:
    """Walks back from the last node."""

    def __init__(self, scope: Scope, node: NodeProto):
        self._scope, self._last = scope, node
        self._nodes: list[NodeProto] = []

    def find(self) -> Norm | str | None:
        """Gamma's Mul, the division, the mean, the square."""
        product = self._last
        if product.op_type == "Cast":  # Cast(gamma * normalised)
            inner = self._made(product.input[0], "Mul")
            if inner is None:
                return None
            self._nodes.append(product)
            product = inner
        if len(product.input) != 2:
            return None
        for gamma, unit in (product.input, product.input[::-1]):
            kept = list(self._nodes)
            self._nodes.append(product)
            root = self._unit(unit)
            if root is not None:
                return self._norm(gamma, *root) if self._ends_here(product) else None
            self._nodes = kept
        return None

    def _ends_here(self, product: NodeProto) -> bool:
        """Whether the norm ends with this node: a lone Cast behind belongs to it, no other does."""
        if product is self._last:
            return not self._cast_follows()
        return self._readers(product.output[0]) == 1

    def _cast_follows(self) -> bool:
        """Whether a Cast to a narrower type is all that reads the product of float32."""
        name = self._last.output[0]
        readers = self._scope.readers(name)
        outside = any(o.name == name for o in self._scope.graph.output)
        wide = self._scope.dtype(name) == _T.FLOAT
        return wide and not outside and len(readers) == 1 and readers[0].op_type == "Cast"

    def _readers(self, name: str) -> int:
        outside = sum(o.name == name for o in self._scope.graph.output)
        return int(len(self._scope.readers(name)) + outside)

    def _made(self, name: str, *op_types: str) -> NodeProto | None:
        node = self._scope.producer(name)
        return node if node is not None and not node.domain and node.op_type in op_types else None

    def _through_cast(self, name: str) -> str:
        node = self._made(name, "Cast")
        if node is None or self._scope.dtype(node.input[0]) not in _TYPES:
            return name
        self._nodes.append(node)
        return str(node.input[0])

    def _unit(self, name: str) -> tuple[str, str] | None:
        """(x as it is squared, mean + epsilon) of x * rsqrt(..) or x / sqrt(..)."""
        node = self._made(self._through_cast(name), "Mul", "Div")
        if node is None or len(node.input) != 2:
            return None
        self._nodes.append(node)
        if node.op_type == "Div":
            inside = self._root(node.input[1])
            return None if inside is None else (node.input[0], inside)
        for x, factor in (node.input, node.input[::-1]):
            inside = self._reciprocal_root(factor)
            if inside is not None:
                return x, inside
        return None

    def _reciprocal_root(self, name: str) -> str | None:
        node = self._made(name, "Reciprocal", "Div", "Pow")
        if node is None:
            return None
        if node.op_type == "Reciprocal":
            inside = self._root(node.input[0])
        elif node.op_type == "Div":
            inside = self._root(node.input[1]) if self._is(node.input[0], 1.0) else None
        else:
            inside = node.input[0] if self._is(node.input[1], -0.5) else None
        if inside is None:
            return None
        self._nodes.append(node)
        return str(inside)

    def _root(self, name: str) -> str | None:
        node = self._made(name, "Sqrt", "Pow")
        if node is None or (node.op_type == "Pow" and not self._is(node.input[1], 0.5)):
            return None
        self._nodes.append(node)
        return str(node.input[0])

    def _number(self, name: str) -> float | None:
        value = self._scope.array(name)
        node = self._made(name, "Cast")
        if value is None and node is not None:
            value = self._scope.array(node.input[0])
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    def _is(self, name: str, wanted: float) -> bool:
        return self._number(name) == wanted

    def _norm(self, gamma: str, wide: str, inside: str) -> Norm | str | None:
        """The mean and the square below, the types, the proof."""
        plus = self._made(inside, "Add")
        if plus is None:
            return None
        pairs = ((plus.input[0], plus.input[1]), (plus.input[1], plus.input[0]))
        found = [(m, e) for m, c in pairs if (e := self._number(c)) is not None]
        square = self._square(found[0][0]) if found else None
        if square is None or square[0] != wide:
            return None
        self._nodes.append(plus)
        epsilon, axes = found[0][1], square[1]
        reason = self._misfit(gamma, wide, axes, epsilon)
        if reason:
            return reason
        return self._typed(gamma, wide, epsilon)

    def _square(self, name: str) -> tuple[str, int] | None:
        """(x, number of trailing axes) of a mean of squares over the last axes."""
        node, count = self._made(name, "ReduceMean", "Mul", "Div"), 1.0
        if node is not None and node.op_type != "ReduceMean":
            value = self._number(node.input[1])
            count = 0.0 if not value else value if node.op_type == "Div" else 1 / value
            self._nodes.append(node)
            node = self._made(node.input[0], "ReduceSum")
        if node is None or not int(attribute(node, "keepdims", 1)):
            return None
        self._nodes.append(node)
        power = self._made(node.input[0], "Mul", "Pow")
        axes = self._axes(node)
        if power is None or axes is None or not self._whole(node, axes, count):
            return None
        self._nodes.append(power)
        if power.op_type == "Pow":
            return (power.input[0], axes) if self._is(power.input[1], 2.0) else None
        return (power.input[0], axes) if power.input[0] == power.input[1] else None

    def _axes(self, node: NodeProto) -> int | None:
        """How many last axes a reduction takes; None for any other choice."""
        axes = attribute(node, "axes")
        if axes is None and len(node.input) > 1:
            known = self._scope.array(node.input[1])
            axes = None if known is None else known.ravel().tolist()
        rank = self._scope.rank(node.input[0])
        if not axes or (rank is None and any(a >= 0 for a in axes)):
            return None
        counted = sorted(int(a) if a < 0 else int(a) - (rank or 0) for a in axes)
        return len(counted) if counted == list(range(-len(counted), 0)) else None

    def _whole(self, node: NodeProto, axes: int, count: float) -> bool:
        """Whether a sum is divided by the number of its terms."""
        if node.op_type == "ReduceMean":
            return count == 1.0
        dims = self._scope.dims(node.input[0])
        sizes = dims[-axes:] if dims is not None else (None,)
        terms = math.prod(d or 0 for d in sizes)
        return None not in sizes and abs(terms - count) < 1e-3

    def _misfit(self, gamma: str, wide: str, axes: int, epsilon: float) -> str:
        dims, given = self._scope.dims(wide), self._scope.dims(gamma)
        if dims is None or given is None or None in given or len(given) != axes:
            return "gamma's shape is not known to be that of the normalised axes"
        if dims[-axes:] != given:
            return f"gamma has shape {list(given)}, the normalised axes {list(dims[-axes:])}"
        return "" if epsilon > 0 else f"epsilon is {epsilon}"

    def _typed(self, gamma: str, wide: str, epsilon: float) -> Norm | str | None:
        """The norm with inputs of types that the operator takes together."""
        dtype, scope = scope_type(self._scope, self._last), self._scope
        if dtype not in _TYPES:
            return None
        narrow = self._through_cast(wide)
        scale = self._made(gamma, "Cast")
        widened = scale is not None and scope.dtype(scale.input[0]) in (_T.FLOAT16, _T.BFLOAT16)
        choices = [scale.input[0], gamma] if scale is not None and widened else [gamma]
        wanted = (dtype, _T.FLOAT)
        fit = next((g for g in choices if scope.dtype(g) in wanted), None)
        if fit is None:
            return f"gamma has another type than x and float32 ({scope.dtype(gamma)})"
        if fit != gamma and scale is not None:
            self._nodes.append(scale)
        x = next((v for v in (narrow, wide) if scope.dtype(v) == dtype), "")
        if not x and not same_epsilon(epsilon):
            x = narrow  # it is widened and scaled anyway
        if not x:
            return "x has another type than the result"
        norm = Norm(x, fit, epsilon, dtype, self._nodes)
        return norm if _proved(scope, norm, self._last) else "float64 does not agree"


def scope_type(scope: Scope, node: NodeProto) -> int:
    """The type of a node's result; a Cast says its own."""
    if node.op_type == "Cast":
        return int(attribute(node, "to", 0))
    return scope.dtype(node.output[0]) or scope.dtype(node.input[0])


# ---- the proof -------------------------------------------------------------------------------


def _proved(scope: Scope, norm: Norm, last: NodeProto) -> bool:
    """Whether the matched nodes compute the norm, on random numbers in float64."""
    rng = np.random.default_rng(0)
    dims = scope.dims(norm.x) or ()
    shape = [2] * len(dims)
    width = [d or 0 for d in scope.dims(norm.gamma) or ()]
    shape[len(shape) - len(width) :] = width
    values = {norm.x: rng.standard_normal(shape) * 1e-2, norm.gamma: rng.standard_normal(width)}
    axes = tuple(range(-len(width), 0))
    x, gamma = values[norm.x], values[norm.gamma]
    wanted = x / np.sqrt(np.mean(x * x, axes, keepdims=True) + norm.epsilon) * gamma
    try:
        got = _Evaluator(scope, {id(n) for n in norm.nodes} | {id(last)}, values).value(
            last.output[0]
        )
    except LookupError:
        return False
    return got.shape == wanted.shape and bool(np.allclose(got, wanted, _TOLERANCE, 0))


class _Evaluator:
    """Runs a few nodes in float64, back from a value; other nodes may not be needed."""

    def __init__(self, scope: Scope, allowed: set[int], values: dict[str, Array]):
        self._scope, self._allowed, self._values = scope, allowed, values

    def value(self, name: str) -> Array:
        """The value of `name`.

        Raises:
            LookupError: it depends on something that is not part of the norm.
        """
        if name in self._values:
            return self._values[name]
        known = self._scope.array(name)
        if known is not None:
            return np.asarray(known, np.float64)
        node = self._scope.producer(name)
        if node is None or (id(node) not in self._allowed and node.op_type != "Cast"):
            raise LookupError(name)
        self._values[name] = self._run(node)
        return self._values[name]

    def _run(self, node: NodeProto) -> Array:
        given = [self.value(n) for n in node.input[: 1 if node.op_type[:6] == "Reduce" else None]]
        if node.op_type in ("ReduceMean", "ReduceSum"):
            axes = tuple(_axes_of(self._scope, node))
            total = np.mean if node.op_type == "ReduceMean" else np.sum
            return np.asarray(total(given[0], axis=axes, keepdims=True))
        return np.asarray(_STEPS[node.op_type](given))


def _axes_of(scope: Scope, node: NodeProto) -> Sequence[int]:
    axes = attribute(node, "axes")
    known = None if axes is not None else scope.array(node.input[1])
    return [int(a) for a in (axes if known is None else known.ravel())]


_STEPS: Final[dict[str, Any]] = {
    "Cast": lambda a: a[0],
    "Mul": lambda a: a[0] * a[1],
    "Div": lambda a: a[0] / a[1],
    "Add": lambda a: a[0] + a[1],
    "Pow": lambda a: np.power(a[0], a[1]),
    "Sqrt": lambda a: np.sqrt(a[0]),
    "Reciprocal": lambda a: 1 / a[0],
}
