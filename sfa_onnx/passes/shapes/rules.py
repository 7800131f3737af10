"""Shape rules of the operators that surround attention; onnx's own inference serves the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.shapes.asking import Shape, Shapes, Sizes
from sfa_onnx.passes.shapes.kept import counts_kept, nonzero
from sfa_onnx.passes.shapes.size import is_open

__all__ = ["RULES", "Shape", "Shapes", "Sizes", "einsum_terms", "slice_bounds", "sliced"]

_STANDS_FOR_A_SYMBOL = 10_000  # numbers from here on come from symbols, up to
_TO_THE_END = 1 << 30  # where exporters write "to the end"


_Rule = Callable[[Sizes, onnx.NodeProto], Shapes]


def slice_bounds(
    a: dict[str, Any], inputs: Sequence[np.ndarray | None], rank: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Starts, ends, non-negative axes and steps of a Slice, from attributes or inputs."""

    def ints(position: int, name: str) -> list[int] | None:
        array = inputs[position] if len(inputs) > position else None
        found = array.reshape(-1) if array is not None else a.get(name)
        return None if found is None else [v if is_open(v) else int(v) for v in found]

    starts, ends = ints(1, "starts") or [], ints(2, "ends") or []
    axes = ints(3, "axes") or list(range(len(starts)))
    steps = ints(4, "steps") or [1] * len(starts)
    return starts, ends, [x % rank for x in axes], steps


def sliced(start: int, end: int, step: int, size: int) -> range:
    """Positions that a Slice takes; a table that is cut at a size of the inputs is long enough.

    The sizes that stand for symbols may exceed the table, or be in another order than real ones.
    """
    taken = range(*slice(start, end, step).indices(size))
    beyond = size < _STANDS_FOR_A_SYMBOL <= end
    crossed = start < 0 and not taken
    if step == 1 and 0 < end < _TO_THE_END and (beyond or crossed):
        return range(start, end)
    return taken


def sliced_size(start: int, end: int, step: int, size: int) -> int:
    """How many positions a Slice takes, as an expression where that is open."""
    taken = sliced(int(start), int(end), step, int(size))
    if step != 1 or not any(map(is_open, (start, end, size))):
        return len(taken)
    ends = {int(x): x for x in (0, start, size + start, end, size + end, size)}
    first, last = (ends.get(x) for x in (taken.start, taken.stop))
    return len(taken) if first is None or last is None else last - first


def einsum_terms(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Subscripts of each operand and of the output, the ellipsis spelt out with digits."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    pairs = list(zip(terms, ranks, strict=True))
    widest = max((rank - len(term) + 3 for term, rank in pairs if "..." in term), default=0)
    digits = "0123456789"[:widest]
    spelt = []
    for term, rank in pairs:
        own = rank - len(term) + 3 if "..." in term else 0
        spelt.append(term.replace("...", digits[widest - own :] if own else ""))
    if not arrow:
        joined = "".join(spelt)
        out = digits + "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
    return spelt, out.replace("...", digits)


def _need(shape: Shape | None) -> Shape:
    if shape is None:
        raise ValueError("unknown shape")
    return shape


def _ints(sizes: Sizes, node: onnx.NodeProto, position: int) -> list[int] | None:
    if len(node.input) <= position or not node.input[position]:
        return None
    found = sizes.entries(node.input[position])
    if found is None:
        raise ValueError("unknown value")
    if any(map(is_open, sizes.look_up(node.input[position]) or ())):
        raise ValueError("as many as an open size: other ones in every run")
    return found


def _input(sizes: Sizes, node: onnx.NodeProto, position: int) -> Shape:
    return _need(sizes.look_up(node.input[position]))


def _same(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    return [sizes.look_up(node.input[0])] * len(node.output)


def _broadcast(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    return [sizes.broadcast(*(_need(sizes.look_up(n)) for n in node.input if n))]


def _matmul(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    a, b = list(_input(sizes, node, 0)), list(_input(sizes, node, 1))
    if len(b) == 2 and len(a) > 1 and not node.attribute:
        sizes.meet(a[-1], b[0])
        return [(*a[:-1], b[1])]
    flags = attributes(node)
    if flags.get("transBatchA"):  # onnxruntime: [M, batch ..., K]
        a = [*a[1:-1], a[0], a[-1]]
    if flags.get("transBatchB"):
        b = [*b[1:-1], b[0], b[-1]]
    if flags.get("transA") and len(a) > 1:
        a[-2:] = a[:-3:-1]
    if flags.get("transB") and len(b) > 1:
        b[-2:] = b[:-3:-1]
    if len(b) == 1:
        return [tuple(a[:-1])]
    if len(a) == 1:
        return [(*b[:-2], b[-1])]
    sizes.meet(a[-1], b[-2])
    return [(*sizes.broadcast(tuple(a[:-2]), tuple(b[:-2])), a[-2], b[-1])]


def _gemm(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    a, b, flags = _input(sizes, node, 0), _input(sizes, node, 1), attributes(node)
    return [(a[-1] if flags.get("transA") else a[0], b[0] if flags.get("transB") else b[-1])]


def _transpose(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    shape = _input(sizes, node, 0)
    perm = attributes(node).get("perm") or range(len(shape))[::-1]
    return [tuple(shape[p] for p in perm)]


def _reshape(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    target = _ints(sizes, node, 1)
    if target is None:
        target = [int(d) for d in attributes(node)["shape"]]
    zero = attributes(node).get("allowzero", 0)
    if (zero or 0 not in target) and -1 not in target:
        return [tuple(target)]
    shape = _input(sizes, node, 0)
    if not zero:
        target = [shape[i] if d == 0 else d for i, d in enumerate(target)]
    rest = math.prod(d for d in target if d != -1)
    return [tuple(math.prod(shape) // rest if d == -1 else d for d in target)]


def _concat(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    shapes = [_need(sizes.look_up(n)) for n in node.input]
    axis = int(attributes(node)["axis"]) % len(shapes[0])
    dims = list(shapes[0])
    for shape in shapes[1:]:
        for i, (a, b) in enumerate(zip(dims, shape, strict=True)):
            if i != axis:
                sizes.meet(a, b)
    dims[axis] = sum(s[axis] for s in shapes)
    return [tuple(dims)]


def _gather(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    data, indices = _input(sizes, node, 0), _input(sizes, node, 1)
    axis = int(attributes(node).get("axis", 0)) % len(data)
    return [(*data[:axis], *indices, *data[axis + 1 :])]


def _gather_nd(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    data, indices = _input(sizes, node, 0), _input(sizes, node, 1)
    batch = int(attributes(node).get("batch_dims", 0))
    for a, b in zip(data[:batch], indices[:batch], strict=True):
        sizes.meet(a, b)
    return [(*indices[:-1], *data[batch + indices[-1] :])]


def _slice(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    shape = list(_input(sizes, node, 0))
    given = [sizes.entries(n) if n else None for n in node.input[1:]]
    if any(v is None and n for v, n in zip(given, node.input[1:], strict=True)):
        raise ValueError("unknown slice")
    inputs = [None, *(None if v is None else np.asarray(v, object) for v in given)]
    for start, end, axis, step in zip(
        *slice_bounds(attributes(node), inputs, len(shape)), strict=True
    ):
        size = sliced_size(start, end, step, shape[axis])
        if counts_kept(shape[axis]) and int(size) != int(shape[axis]):
            return [None]  # a mask may keep fewer than are taken here, or none behind the start
        shape[axis] = size
    return [tuple(shape)]


def _unsqueeze(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    axes = _ints(sizes, node, 1)
    if axes is None:
        axes = [int(x) for x in attributes(node)["axes"]]
    shape = list(_input(sizes, node, 0))
    rank = len(shape) + len(axes)
    for axis in sorted(x % rank for x in axes):
        shape.insert(axis, 1)
    return [tuple(shape)]


def _squeeze(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    axes = _ints(sizes, node, 1)
    if axes is None and "axes" in (a := attributes(node)):
        axes = [int(x) for x in a["axes"]]
    shape = _input(sizes, node, 0)
    drop = {i for i, d in enumerate(shape) if d == 1} if axes is None else None
    drop = {x % len(shape) for x in axes} if axes is not None else drop
    return [tuple(d for i, d in enumerate(shape) if i not in (drop or ()))]


def _expand(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    return [sizes.broadcast(_input(sizes, node, 0), tuple(_ints(sizes, node, 1) or ()))]


def _tile(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    repeats = _ints(sizes, node, 1) or []
    return [tuple(d * r for d, r in zip(_input(sizes, node, 0), repeats, strict=True))]


def _split(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    shape, a = _input(sizes, node, 0), attributes(node)
    axis = int(a.get("axis", 0)) % len(shape)
    parts = _ints(sizes, node, 1) or a.get("split")
    if not parts:
        count = int(a.get("num_outputs", len(node.output)))
        chunk = -(-shape[axis] // count)
        parts = [chunk] * (count - 1) + [shape[axis] - chunk * (count - 1)]
    return [(*shape[:axis], int(p), *shape[axis + 1 :]) for p in parts]


def _sequence_at(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    """One part of a SplitToSequence with given sizes, as exports without optimisation have it."""
    maker = sizes.maker(node.input[0])
    if maker is None or maker.op_type != "SplitToSequence" or len(maker.input) < 2:
        return [None]
    shape, parts = list(_input(sizes, maker, 0)), sizes.value(maker.input[1])
    which = sizes.value(node.input[1])
    if parts is None or parts.ndim != 1 or which is None:
        return [None]
    shape[int(attributes(maker).get("axis", 0))] = int(parts[int(which.reshape(-1)[0])])
    return [tuple(shape)]


def _reduce(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    shape, a = _input(sizes, node, 0), attributes(node)
    axes = _ints(sizes, node, 1) if len(node.input) > 1 else a.get("axes")
    if axes is None and "axis" in a:
        axes = [a["axis"]]
    if axes is None:
        axes = [] if a.get("noop_with_empty_axes", 0) else list(range(len(shape)))
    drop = {int(x) % len(shape) for x in axes}
    if a.get("keepdims", 1):
        return [tuple(1 if i in drop else d for i, d in enumerate(shape))]
    return [tuple(d for i, d in enumerate(shape) if i not in drop)]


def _topk(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    shape, a = list(_input(sizes, node, 0)), attributes(node)
    count = _ints(sizes, node, 1) if len(node.input) > 1 else [int(a["k"])]
    shape[int(a.get("axis", -1))] = (count or [0])[0]
    return [tuple(shape)] * 2


def _einsum(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    shapes = [_need(sizes.look_up(n)) for n in node.input]
    terms, out = einsum_terms(attributes(node)["equation"], [len(s) for s in shapes])
    found: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape, strict=True):
            sizes.meet(found.get(letter, size), size)
            found[letter] = max(found.get(letter, 1), size)
    return [tuple(found[c] for c in out)]


def _range(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    ends = [_whole(sizes, node.input[i]) for i in range(3)]
    known = [x for x in ends if x is not None]
    if len(known) == len(ends) and known[2] and any(map(is_open, known)):
        return [(-((known[0] - known[1]) // known[2]),)]
    array = sizes.value(node.output[0])
    return [None if array is None else array.shape]


def _whole(sizes: Sizes, value: str) -> int | None:
    """A whole number, which may be spelled as a float; None: it is none, or not known."""
    node = sizes.maker(value)
    counted = node.input[0] if node is not None and node.op_type == "Cast" else value
    if found := sizes.entries(value) or sizes.entries(counted):
        return found[0]
    array = sizes.value(value)
    one = array is not None and array.size == 1 and array.dtype.kind == "f"
    number = float(np.asarray(array).reshape(-1)[0]) if one else math.nan
    return int(number) if number.is_integer() else None


def _scatter(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    data, indices, updates = (_input(sizes, node, i) for i in range(3))
    if node.op_type != "ScatterND" and len(indices) == len(updates):
        for a, b in zip(indices, updates, strict=True):
            sizes.meet(a, b)
    return [data]


def _shape_op(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    array = sizes.value(node.output[0])
    return [None if array is None else array.shape]


def _flatten(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    shape = _input(sizes, node, 0)
    axis = int(attributes(node).get("axis", 1))
    return [(math.prod(shape[:axis]), math.prod(shape[axis:]))]


def _constant_of_shape(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    return [tuple(_ints(sizes, node, 0) or ())]


def _attention(sizes: Sizes, node: onnx.NodeProto) -> Shapes:
    q, v = _input(sizes, node, 0), _input(sizes, node, 2)
    if len(q) == 4:
        return [(*q[:-1], v[-1])]
    flags = attributes(node)  # [B, S, N * D]
    queries, keys = int(flags.get("q_num_heads", 0)), int(flags.get("kv_num_heads", 0))
    return [(*q[:-1], v[-1] // keys * queries)] if queries and keys else [None]


_SAME = (
    "Abs Cast CastLike Ceil Clip CumSum DequantizeLinear Dropout Erf Exp Floor Gelu"
    " HardSigmoid Identity IsInf IsNaN LayerNormalization Log LogSoftmax Neg Not"
    " RMSNormalization Reciprocal Relu RotaryEmbedding Round Sigmoid"
    " Sign SimplifiedLayerNormalization Sin Cos LeakyRelu SkipSimplifiedLayerNormalization"
    " Softmax Softplus Sqrt Swish Tanh Trilu BitCast BitwiseNot QuickGelu"
)
_BROADCAST = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less"
    " LessOrEqual Max Mean Min Mod Mul Or Pow Sub Sum Where Xor"
)
_REDUCE = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd"
    " ReduceSum ReduceSumSquare ArgMax ArgMin"
)

RULES: Final[dict[str, _Rule]] = {
    **dict.fromkeys(_SAME.split(), _same),
    **dict.fromkeys(_BROADCAST.split(), _broadcast),
    **dict.fromkeys(_REDUCE.split(), _reduce),
    **dict.fromkeys(("Constant", "Shape", "Size"), _shape_op),
    "Attention": _attention,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Einsum": _einsum,
    "Expand": _expand,
    "Gather": _gather,
    "Flatten": _flatten,
    "GatherElements": lambda sizes, node: [sizes.look_up(node.input[1])],
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    **dict.fromkeys(("FusedMatMul", "MatMul"), _matmul),
    "NonZero": nonzero,
    "Range": _range,
    "Reshape": _reshape,
    **dict.fromkeys(("Scatter", "ScatterElements", "ScatterND"), _scatter),
    "SequenceAt": _sequence_at,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "TopK": _topk,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
