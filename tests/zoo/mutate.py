"""Random changes of what a graph computes: `python -m tests.zoo.mutate [-k PATTERN] [-n ROUNDS]`.

Whatever a mutant means, fusing it must not change it: it is refused, or what comes out computes
what went in. Prints every mutant for which that does not hold and saves it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.zoo.base import Case, Feeds
from tests.zoo.edits import copy_of
from tests.zoo.judge import difference, run_original

Rng = np.random.Generator
UNARY = ("Tanh", "Abs", "Relu", "Neg", "Sigmoid", "Round", "Floor", "Exp", "Sqrt", "Sign")
SWAPS = {
    "Mul": ("Add", "Sub", "Div", "Max"),
    "Add": ("Mul", "Sub", "Max", "Min"),
    "Sub": ("Add", "Max"),
    "Div": ("Mul", "Mod"),
    "Less": ("LessOrEqual", "Greater", "Equal"),
    "LessOrEqual": ("Less", "Greater"),
    "Greater": ("GreaterOrEqual", "Less"),
    "GreaterOrEqual": ("Greater", "Less"),
    "And": ("Or",),
    "Or": ("And",),
    "ReduceMax": ("ReduceMin", "ReduceSum"),
    "ReduceSum": ("ReduceMax", "ReduceMean"),
    "Softmax": ("LogSoftmax", "Hardmax"),
    "Max": ("Min",),
    "Exp": ("Tanh", "Identity"),
}


def _values(model: onnx.ModelProto) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Every value's element type and shape (as text), where inference knows."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    table = {}
    for v in (*graph.value_info, *graph.input):
        shape = tuple(d.dim_param or str(d.dim_value) for d in v.type.tensor_type.shape.dim)
        table[v.name] = (v.type.tensor_type.elem_type, shape)
    for t in graph.initializer:
        table[t.name] = (t.data_type, tuple(map(str, t.dims)))
    return table


def _pick(rng: Rng, items: list) -> object:
    return items[rng.integers(len(items))]


def insert_unary(model: onnx.ModelProto, rng: Rng) -> str:
    """A function of one argument on one float edge."""
    table = _values(model)
    edges = [
        (n, i)
        for n, node in enumerate(model.graph.node)
        for i, name in enumerate(node.input)
        if table.get(name, (0,))[0] in (TensorProto.FLOAT, TensorProto.FLOAT16)
    ]
    if not edges:
        return ""
    at, slot = _pick(rng, edges)
    kind = _pick(rng, list(UNARY))
    node = model.graph.node[at]
    new = f"{node.input[slot]}__{kind}"
    model.graph.node.insert(at, helper.make_node(kind, [node.input[slot]], [new]))
    model.graph.node[at + 1].input[slot] = new
    return f"{kind} into {node.op_type} input {slot}"


def swap_operator(model: onnx.ModelProto, rng: Rng) -> str:
    """Another operator of the same signature."""
    nodes = [n for n in model.graph.node if n.op_type in SWAPS]
    if not nodes:
        return ""
    node = _pick(rng, nodes)
    old, node.op_type = node.op_type, _pick(rng, list(SWAPS[node.op_type]))
    return f"{old} -> {node.op_type}"


def swap_operands(model: onnx.ModelProto, rng: Rng) -> str:
    """Two inputs of one node exchanged."""
    nodes = [n for n in model.graph.node if len(n.input) >= 2]
    node = _pick(rng, nodes)
    i, j = rng.choice(len(node.input), 2, replace=False)
    if node.input[i] == node.input[j]:
        return ""
    node.input[i], node.input[j] = node.input[j], node.input[i]
    return f"{node.op_type} inputs {i} and {j}"


def change_constant(model: onnx.ModelProto, rng: Rng) -> str:
    """One element of one constant."""
    tensors = [t for t in model.graph.initializer if 0 < np.prod(t.dims, dtype=int) < 5000]
    tensors += [a.t for n in model.graph.node for a in n.attribute if n.op_type == "Constant"]
    if not tensors:
        return ""
    tensor = _pick(rng, tensors)
    array = np.array(numpy_helper.to_array(tensor))
    flat = array.reshape(-1)
    at = rng.integers(flat.size)
    old = flat[at]
    if array.dtype == bool:
        flat[at] = not old
    elif np.issubdtype(array.dtype, np.integer):
        flat[at] = old + _pick(rng, [-1, 1, 2])
    elif not np.isfinite(old):
        flat[at] = _pick(rng, [-5.0, 0.0, -30000.0])
    else:
        flat[at] = old * _pick(rng, [1.01, -1.0, 0.5]) + _pick(rng, [0.0, 0.1])
    new = flat[at]
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return f"constant {tensor.name}[{at}] {old} -> {new}"


def change_attribute(model: onnx.ModelProto, rng: Rng) -> str:
    """An axis, a permutation, a keepdims, a scale."""
    spots = [
        (n, a)
        for n in model.graph.node
        for a in n.attribute
        if a.name in ("axis", "perm", "keepdims", "scale", "batch_dims", "transB", "largest")
    ]
    if not spots:
        return ""
    node, a = _pick(rng, spots)
    if a.name == "perm":
        i, j = rng.choice(len(a.ints), 2, replace=False)
        order = list(a.ints)
        order[i], order[j] = order[j], order[i]
        a.ints[:] = order
    elif a.type == onnx.AttributeProto.FLOAT:
        a.f *= 1.25
    else:
        a.i = 1 - a.i if a.name != "axis" else a.i + _pick(rng, [-1, 1])
    return f"{node.op_type}.{a.name}"


def reroute(model: onnx.ModelProto, rng: Rng) -> str:
    """One edge starts at another value of the same type and shape."""
    table = _values(model)
    known: list[str] = [v.name for v in model.graph.input] + [
        t.name for t in model.graph.initializer
    ]
    spots = []
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            others = [k for k in known if k != name and table.get(k) == table.get(name, 0)]
            spots += [(node, i, other) for other in others]
        known += node.output
    if not spots:
        return ""
    node, i, other = _pick(rng, spots)
    old, node.input[i] = node.input[i], other
    return f"{node.op_type} input {i}: {old} -> {other}"


def expose(model: onnx.ModelProto, rng: Rng) -> str:
    """An inner value becomes a graph output."""
    table = _values(model)
    final = {v.name for v in model.graph.output}
    names = [o for n in model.graph.node for o in n.output if o in table and o not in final]
    if not names:
        return ""
    name = _pick(rng, names)
    model.graph.output.append(helper.make_tensor_value_info(name, table[name][0], None))
    return f"output {name}"


MUTATIONS: tuple[Callable[[onnx.ModelProto, Rng], str], ...] = (
    *(insert_unary, insert_unary, swap_operator, swap_operands, change_constant),
    *(change_constant, change_attribute, reroute, reroute, expose),
)


def mutant(model: onnx.ModelProto, seed: int) -> tuple[onnx.ModelProto, str]:
    """A changed copy and what was changed ("" when nothing could be)."""
    rng = np.random.default_rng(seed)
    model = copy_of(model)
    del model.graph.value_info[:]
    return model, _pick(rng, list(MUTATIONS))(model, rng)


def runs(model: onnx.ModelProto, feeds: Feeds) -> bool:
    """Whether onnxruntime accepts the mutant at all and it computes something."""
    try:
        names = {v.name for v in model.graph.input}
        onnx.checker.check_model(model)
        outs = run_original(model, {k: v for k, v in feeds.items() if k in names})
    except Exception:
        return False
    return any(np.isfinite(o.astype(np.float64)).any() for o in outs)


def survives(model: onnx.ModelProto, case: Case, bound: float = 1e-4) -> tuple[bool, str]:
    """(whether anything was fused, what is wrong with the result: "" when it is honest)."""
    from sfa_onnx import fuse

    report = fuse(model)
    if not report.fused:
        return False, ""
    draws = [case.feeds(3), *([case.stress(5)] if case.stress else [])]
    for feeds in draws:
        try:
            kind = case.tags["dtype"]
            error = difference(model, report.model, feeds, kind, nan_is_free=True)
        except Exception as problem:
            if runs(model, feeds):
                return True, f"the fused model fails: {' '.join(str(problem).split())[:200]}"
            continue
        if not error <= bound:
            return True, f"wrong numbers: {error:.1e}"
    return True, ""


def main() -> int:
    from tests.zoo.catalogue import cases

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="^hand-")
    parser.add_argument("-n", type=int, default=20, help="mutants of each case")
    parser.add_argument("-s", type=int, default=0, help="first seed")
    parser.add_argument("-o", type=Path, default=Path(tempfile.gettempdir()) / "zoo" / "mutants")
    args = parser.parse_args()
    args.o.mkdir(parents=True, exist_ok=True)
    tried = fused = bad = 0
    for case in cases(args.k):
        if case.expect != "fuse" or case.tags["dtype"] == "bf16":
            continue
        model, feeds = case.build(), case.feeds(3)
        for seed in range(args.s, args.s + args.n):
            try:
                changed, what = mutant(model, seed)
            except Exception:
                continue
            if not what or not runs(changed, feeds):
                continue
            tried += 1
            try:
                done, problem = survives(changed, case)
                fused += done
            except Exception as error:
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if problem:
                bad += 1
                onnx.save(changed, args.o / f"{case.name}-{seed}.onnx")
                print(f"{case.name} seed {seed}: {what}: {problem}", flush=True)
    print(f"{tried} mutants, {fused} fused, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
