"""The shapes GE will infer, replayed: which declared output contradicts them.

Rules of our operators and of simple ones around them, as GE's open shape functions have them (they
inferred our static files without a contradiction). What a plug-in loses shows here: a reduction
whose axes are gone keeps its input's shape. Where no rule is known, the file's own word counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.finding import Finding, Severity
from sfa_onnx.ascend.checks.view import Dims, contract_of
from sfa_onnx.ascend.flavour.reductions import form_of
from sfa_onnx.ascend.reductions import REDUCTIONS, Reading, reading
from sfa_onnx.errors import ContractError
from sfa_onnx.files.onnx_attrs import attribute, attributes
from sfa_onnx.operator.shape_rules import infer_outputs

__all__ = ["contradictions", "inferred_shapes"]

Shapes = Sequence[Dims | None]
_SAME: Final = frozenset(
    {
        "Abs", "Cast", "Ceil", "Clip", "Cos", "CumSum", "Erf", "Exp", "Floor", "Identity",
        "IsInf", "IsNaN", "LayerNormalization", "Log", "LogSoftmax", "Neg", "Not", "Reciprocal",
        "Relu", "Round", "ScatterElements", "ScatterND", "Sigmoid", "Sign", "Sin", "Softmax",
        "Softplus", "Sqrt", "Tanh", "Trilu",
    }
)  # fmt: skip
_BROADCAST: Final = frozenset(
    {
        "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max",
        "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Where", "Xor",
    }
)  # fmt: skip
_NORMS: Final = {"NPURmsNorm": 1, "NPUAddRmsNorm": 3}  # outputs whose shapes are known


class _ClashError(Exception):
    """GE's rule refuses the shapes."""


def inferred_shapes(ctx: Context) -> tuple[dict[str, Dims | None], list[tuple[Node, str]]]:
    """Shapes of the main graph's values as GE will see them, and the nodes it refuses with why."""
    root = ctx.view.root
    refused: list[tuple[Node, str]] = []
    shapes: dict[str, Dims | None] = {}
    for name in (*root.inputs, *root.initializers):
        shapes[name] = ctx.view.shape(root, name)
    for node in ctx.nodes_of(root):
        given = [shapes.get(i, ctx.view.shape(root, i)) if i else None for i in node.proto.input]
        try:
            made = _infer(ctx, node, given)
        except _ClashError as clash:
            refused.append((node, str(clash)))
            made = None
        for place, out in enumerate(node.proto.output):
            ours = made[place] if made is not None and place < len(made) else None
            shapes[out] = ours if ours is not None else ctx.view.shape(root, out)
    return shapes, refused


def contradictions(ctx: Context) -> Iterator[Finding]:
    """Declared outputs that GE will infer otherwise, and where it begins."""
    shapes, refused = inferred_shapes(ctx)
    for node, why in refused:
        text = f"GE's shape rule of {node.op_type} refuses: {why}"
        yield _found(node.name, text, "warning")
    wrong = [
        (o.name, declared, shapes.get(o.name))
        for o in ctx.view.root.graph.output
        if _differ(declared := ctx.view.shape(ctx.view.root, o.name), shapes.get(o.name))
    ]
    if not wrong:
        return
    first = next(
        (
            node
            for node in ctx.nodes_of(ctx.view.root)
            for out in node.proto.output
            if _differ(ctx.view.shape(ctx.view.root, out), shapes.get(out))
        ),
        None,
    )
    begins = f"; it begins at {first.op_type} {first.name}" if first is not None else ""
    for name, declared, inferred in wrong:
        text = f"output {name!r} is declared {_text(declared)}, GE will infer {_text(inferred)}"
        yield _found(first.name if first is not None else name, text + begins)


def _found(node: str, message: str, severity: Severity = "error") -> Finding:
    return Finding(
        "shape-contradiction",
        severity,
        "graph",
        message,
        node,
        hint="see what the parser loses there, or correct the declared shape",
        evidence="source",
    )


def _text(dims: Dims | None) -> str:
    return "of unknown rank" if dims is None else str([d if d is not None else "?" for d in dims])


def _differ(left: Dims | None, right: Dims | None) -> bool:
    if left is None or right is None:
        return False
    pairs = zip(left, right, strict=False)
    numbers = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
    return len(left) != len(right) or numbers


def _infer(ctx: Context, node: Node, given: Shapes) -> Shapes | None:
    op = contract_of(node.proto)
    if op is not None:
        return _ours(ctx, node, given)
    kind = node.op_type
    if kind in _NORMS:
        first = given[0] if given else None
        return [first, None, first][: _NORMS[kind]]
    if node.proto.domain not in ("", "ai.onnx") or not ctx.well_formed(node):
        return None
    if kind in REDUCTIONS:
        return _reduced(ctx, node, given)
    if kind in _SAME:
        return [given[0]]
    if kind in _BROADCAST:
        return [_broadcast(given)]
    rule = _RULES.get(kind)
    return None if rule is None or given[0] is None else rule(ctx, node, given)


def _ours(ctx: Context, node: Node, given: Shapes) -> Shapes | None:
    op = contract_of(node.proto)
    if op is None:
        return None
    types = {
        tensor.name: (ctx.view.dtype(node.scope, name), given[i])
        for i, (tensor, name) in enumerate(zip(op.inputs, node.proto.input, strict=False))
        if name
    }
    known = {a.name for a in op.attributes}
    values = {k: v for k, v in attributes(node.proto).items() if k in known}
    try:
        return [shape for _, shape in infer_outputs(op, types, values)]
    except (ContractError, KeyError):
        return None  # reported by the host checks, in the operator's own words


def _reduced(ctx: Context, node: Node, given: Shapes) -> Shapes | None:
    dims, scope = given[0], ctx.rewrite_scope(node.scope)
    form = form_of(scope, node.proto)
    read = reading(node.op_type, node.version or 0, form, ctx.cann.version)
    if dims is None or read is Reading.REFUSED:
        return None
    if form == "noop" or read is Reading.LOST:
        return [dims]  # an empty list of axes: nothing is reduced
    axes: Any = range(len(dims))
    if form == "attribute":
        axes = attribute(node.proto, "axes", ())
    elif form == "input":
        values = scope.array(node.proto.input[1])
        if values is None:
            return None
        axes = values.ravel().tolist()
    if any(not -len(dims) <= a < len(dims) for a in axes):
        raise _ClashError(f"axes {list(axes)} of rank {len(dims)}")
    gone = {int(a) % len(dims) for a in axes}
    if attribute(node.proto, "keepdims", 1):
        return [tuple(1 if i in gone else d for i, d in enumerate(dims))]
    return [tuple(d for i, d in enumerate(dims) if i not in gone)]


def _broadcast(given: Shapes) -> Dims | None:
    known = [g for g in given if g is not None]
    if len(known) < len(given):
        return None
    rank = max((len(g) for g in known), default=0)
    made: list[int | str | None] = []
    for axis in range(-rank, 0):
        sizes = {g[axis] for g in known if len(g) >= -axis and g[axis] != 1}
        numbers = {s for s in sizes if isinstance(s, int)}
        if len(numbers) > 1:
            raise _ClashError(f"{', '.join(_text(g) for g in known)} do not broadcast")
        open_dims = sizes - numbers
        made.append(
            numbers.pop() if numbers else open_dims.pop() if len(open_dims) == 1 else None
            if open_dims else 1
        )  # fmt: skip
    return tuple(made)


def _matmul(_: Context, __: Node, given: Shapes) -> Shapes | None:
    left, right = given[0], given[1]
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    if _differ((left[-1],), (right[-2],)):
        raise _ClashError(f"{_text(left)} times {_text(right)}")
    batch = _broadcast([left[:-2], right[:-2]])
    return None if batch is None else [(*batch, left[-2], right[-1])]


def _transpose(_: Context, node: Node, given: Shapes) -> Shapes | None:
    dims, perm = given[0] or (), attribute(node.proto, "perm")
    if not perm or sorted(perm) != list(range(len(dims))):
        return None
    return [tuple(dims[p] for p in perm)]


def _concat(_: Context, node: Node, given: Shapes) -> Shapes | None:
    known = [g for g in given if g is not None]
    if len(known) < len(given) or len({len(g) for g in known}) != 1:
        return None
    axis = int(attribute(node.proto, "axis", 0)) % max(len(known[0]), 1)
    rest = [(*g[:axis], 0, *g[axis + 1 :]) for g in known]
    if any(_differ(rest[0], r) for r in rest):
        raise _ClashError(f"{', '.join(_text(g) for g in known)} along axis {axis}")
    sizes = [g[axis] for g in known]
    numbers = [s for s in sizes if isinstance(s, int)]
    total = sum(numbers) if len(numbers) == len(sizes) else None
    return [(*known[0][:axis], total, *known[0][axis + 1 :])]


def _axes_of(ctx: Context, node: Node) -> list[int] | None:
    axes = attribute(node.proto, "axes")
    if axes is None and len(node.proto.input) > 1:
        axes = ctx.view.whole_numbers(node.scope, node.proto.input[1])
    return None if axes is None else [int(a) for a in axes]


def _once_each(axes: Sequence[int], rank: int) -> set[int]:
    """The axes of a tensor of this rank, counted from the front."""
    places = {a % rank for a in axes if -rank <= a < rank}
    if len(places) < len(axes):
        raise _ClashError(f"axes {list(axes)} of a tensor of rank {rank}")
    return places


def _unsqueeze(ctx: Context, node: Node, given: Shapes) -> Shapes | None:
    axes, dims = _axes_of(ctx, node), given[0] or ()
    if axes is None:
        return None
    rank = len(dims) + len(axes)
    places, rest = _once_each(axes, rank), iter(dims)
    return [tuple(1 if i in places else next(rest) for i in range(rank))]


def _squeeze(ctx: Context, node: Node, given: Shapes) -> Shapes | None:
    axes, dims = _axes_of(ctx, node), given[0] or ()
    if axes is None or not dims:
        return None
    gone = _once_each(axes, len(dims))
    if any(isinstance(dims[a], int) and dims[a] != 1 for a in gone):
        raise _ClashError(f"axes {axes} of {_text(dims)}")
    return [tuple(d for i, d in enumerate(dims) if i not in gone)]


def _gather(_: Context, node: Node, given: Shapes) -> Shapes | None:
    dims, index = given[0] or (), given[1]
    axis = int(attribute(node.proto, "axis", 0))
    if index is None or not -len(dims) <= axis < len(dims):
        return None
    axis %= len(dims)
    return [(*dims[:axis], *index, *dims[axis + 1 :])]


def _top_k(ctx: Context, node: Node, given: Shapes) -> Shapes | None:
    dims, axis = given[0] or (), int(attribute(node.proto, "axis", -1))
    k = ctx.view.whole_numbers(node.scope, node.proto.input[1])
    if k is None or len(k) != 1 or not -len(dims) <= axis < len(dims):
        return None
    size, wanted = dims[axis], k[0]
    if isinstance(size, int) and wanted > size:
        raise _ClashError(f"k {wanted} of {size}")
    axis %= len(dims)
    return [(*dims[:axis], wanted, *dims[axis + 1 :])] * 2


def _reshape(ctx: Context, node: Node, given: Shapes) -> Shapes | None:
    dims, wanted = given[0] or (), ctx.view.whole_numbers(node.scope, node.proto.input[1])
    if wanted is None or attribute(node.proto, "allowzero", 0):
        return None
    made: list[Any] = [dims[i] if t == 0 and i < len(dims) else t for i, t in enumerate(wanted)]
    numbers = [d for d in dims if isinstance(d, int)]
    if len(numbers) < len(dims) or any(not isinstance(m, int) for m in made):
        return [tuple(None if m == -1 else m for m in made)]
    size, rest = 1, 1
    for number in numbers:
        size *= number
    for number in made:
        rest *= number if number != -1 else 1
    if (-1 in made and (rest == 0 or size % rest)) or (-1 not in made and size != rest):
        raise _ClashError(f"{_text(dims)} to {wanted}")
    return [tuple(size // rest if m == -1 else m for m in made)]


_RULES: Final[dict[str, Callable[[Context, Node, Shapes], Shapes | None]]] = {
    "Concat": _concat,
    "Gather": _gather,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
