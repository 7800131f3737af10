"""Masks and indices as the graph itself makes them: a mask that hides what is selected is none.

Verification feeds masks as free inputs, which is more than the graph can produce. One thing that
hides is their relation to the indices, the lengths and the positions: a graph that masks the
*valid* entries agrees with the operator for every mask, and yet its rows are empty in use. So what
decides masks and indices is cut out, fed with what an ordinary caller gives, and looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.guard.budgets import WORKER_BYTES
from sfa_onnx.passes.candidate import Candidate, Operand, Refusal, Role
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.graph.kinds import BODIES
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.verify.execute import Executable
from sfa_onnx.passes.verify.extract import UnverifiableError, embedded_constant
from sfa_onnx.passes.verify.geometry import and_mask, over_slots
from sfa_onnx.passes.verify.ordinary import WAYS, Way, ordinary, ranked, selected
from sfa_onnx.passes.verify.problem import Problem

__all__ = ["Natural", "hidden_by_mask", "hides_all"]

Array = NDArray[Any]
_ENTRY: Final = 10  # bytes per row and key: one index and two masks
_NODES_MAX: Final = 600
_MOST: Final = 0.5  # share of rows without a visible key from which on a mask is no mask
_T = onnx.TensorProto
_WHOLE: Final = (_T.BOOL, _T.INT32, _T.INT64, _T.INT8, _T.UINT8, _T.INT16)
_PRODUCTS: Final = frozenset(("Attention", "Conv", "Einsum", "Gemm", "MatMul", "Softmax"))


@dataclass
class Natural:
    """What makes the masks and indices of a site.

    Attributes:
        model: from `sources` and `lengths` to the operands in its outputs.
        sources: integers and bools that somebody gives, and what TopK finds: value -> type.
        lengths: results of Shape nodes.
        chosen: sources that indices are computed from.
        among: the sources that a TopK chose -> what it chose among, and along which axis.
    """

    model: onnx.ModelProto
    sources: dict[str, int] = field(default_factory=dict)
    lengths: list[str] = field(default_factory=list)
    chosen: set[str] = field(default_factory=set)
    among: dict[str, tuple[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, index: GraphIndex, candidate: Candidate) -> Natural | None:
        """The model of a site; None where nothing is known of its masks."""
        cuts: dict[str, _Cut] = {}
        for operand in candidate.operands:
            if operand.role in (Role.MASK, Role.INDICES):
                cut = _Cut.of(index, operand.value)
                if cut is not None:
                    cuts[operand.value] = cut
        masks = {o.value for o in candidate.operands if o.role is Role.MASK}
        if not masks & cuts.keys():
            return None
        graph = onnx.GraphProto(name="masks")
        graph.node.extend(
            index.nodes[i] for i in sorted({i for c in cuts.values() for i in c.nodes})
        )
        constants = {n: t for c in cuts.values() for n, t in c.constants.items()}
        graph.initializer.extend(constants.values())
        sources = {n: k for c in cuts.values() for n, k in c.sources.items()}
        lengths = sorted({n for c in cuts.values() for n in c.lengths})
        for name, kind in [*sources.items(), *((n, _T.INT64) for n in lengths)]:
            graph.input.append(helper.make_tensor_value_info(name, kind, None))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in cuts)
        imports = [helper.make_opsetid(d, v) for d, v in index.opsets.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        picked = {o.value for o in candidate.operands if o.role is Role.INDICES} & cuts.keys()
        chosen = {s for value in picked for s in cuts[value].sources}
        among = {n: a for c in cuts.values() for n, a in c.among.items()}
        return cls(model, sources, lengths, chosen, among)

    def run(self, problem: Problem, sizes: Concrete, way: Way) -> dict[str, Array] | None:
        """Masks and indices of an ordinary call; None where none can be made up."""
        feeds: dict[str, Array] = {}
        for name in self.lengths:
            told = sizes.value(name)
            if told is None:
                return None
            feeds[name] = np.asarray(told, np.int64)
        for name, kind in self.sources.items():
            shape = tuple(map(int, sizes.shape(name) or ()))
            array = self._drawn(name, shape, problem, sizes, way) if kind in _WHOLE else None
            array = ranked(shape) if kind not in _WHOLE else array
            if array is None:
                return None
            feeds[name] = array.astype(helper.tensor_dtype_to_np_dtype(kind))
        try:
            results = Executable(self.model).run(feeds)
        except RuntimeError:
            return None
        return dict(zip((o.name for o in self.model.graph.output), results, strict=True))

    def _drawn(
        self, name: str, shape: tuple[int, ...], problem: Problem, sizes: Concrete, way: Way
    ) -> Array | None:
        """Integers for a source: of a TopK's choice, which may be pools of keys, in its range."""
        source, axis = self.among.get(name, ("", 0))
        of = sizes.shape(source) if source else None
        if of is None or of[axis] == problem.dims.capacity:
            return ordinary(name, shape, problem, way, chosen=name in self.chosen)
        # A size of its own name may be drawn too small: nothing chooses k of fewer.
        return selected(shape, max((int(of[axis]), *shape[-1:])), way)


@dataclass
class _Cut:
    """What one value is computed from, as far as integers, bools and sizes decide it."""

    nodes: set[int] = field(default_factory=set)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    lengths: set[str] = field(default_factory=set)
    among: dict[str, tuple[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, index: GraphIndex, value: str) -> _Cut | None:
        """The cut; None where floats that are computed or fed enter."""
        found = cls()
        queue, seen = [value], {value, ""}
        while queue:
            name = queue.pop()
            if not found._enter(index, name, queue, seen) or len(found.nodes) > _NODES_MAX:
                return None
        return found

    def _enter(self, index: GraphIndex, name: str, queue: list[str], seen: set[str]) -> bool:
        producer = index.producer.get(name)
        node = None if producer is None else index.nodes[producer]
        given = producer is None and name not in index.initializers
        if given or (node is not None and node.op_type in (*BODIES, "TopK")):
            kind = index.elem_type(name)
            if not kind and node is not None and node.op_type == "TopK":
                kind = _T.INT64 if name == node.output[1] else _T.FLOAT
            self.sources[name] = kind
            if node is not None and node.op_type == "TopK" and kind in _WHOLE:
                self.among[name] = node.input[0], int(attributes(node).get("axis", -1))
            return kind in _WHOLE or (node is not None and node.op_type == "TopK")
        if node is None or producer is None:
            try:
                self.constants[name] = embedded_constant(index, name)
            except UnverifiableError:
                return False
            return True
        if node.op_type in ("Shape", "Size"):
            self.lengths.add(name)
            return True
        self.nodes.add(producer)
        queue += [i for i in node.input if i not in seen]
        seen.update(node.input)
        return node.op_type not in _PRODUCTS and node.domain in ("", "ai.onnx")


def hidden_by_mask(natural: Natural, problem: Problem, sizes: Concrete) -> Refusal | None:
    """Whether the masks of ordinary calls hide every selected key of most rows.

    Args:
        natural: what makes them.
        problem: the site at some sizes.
        sizes: the graph at these sizes.

    Raises:
        BudgetError: the masks at these sizes take more memory than one verification may.
    """
    entries = problem.dims.count * max(problem.dims.capacity, problem.dims.slots)
    WORKER_BYTES.check(_ENTRY * entries, f"the masks of {problem.dims.count} rows")
    shares = []
    for way in WAYS:
        values = natural.run(problem, sizes, way)
        if values is None:
            return None
        shares.append(float(_hidden(problem, values).mean()))
        if shares[-1] <= _MOST:
            return None
    made = {o.name for o in natural.model.graph.output}
    names = [o.value for o in problem.all(Role.MASK) if o.value in made]
    every = "every index that is in range" if min(shares) == 1 else "all keys of most rows"
    return hides_all(names, every, names[0])


def hides_all(names: Iterable[str], what: str, at: str) -> Refusal:
    """The refusal of masks that hide `what`."""
    masks = f"the mask {' and '.join(map(repr, names))}".removesuffix(" ")
    return Refusal(
        f"{masks} hides {what}, so it is not the usual rule that hides invalid ones (is it"
        " inverted?)",
        at,
        final=True,
    )


def _hidden(problem: Problem, values: Mapping[str, Array]) -> Array:
    """[rows]: True where no selected key is visible."""
    dims = problem.dims
    keys = np.ones((dims.count, dims.capacity), bool)
    slots = np.ones((dims.count, dims.slots), bool)
    for operand in problem.all(Role.MASK):
        if operand.value not in values:
            continue
        mask = _shown(operand, values[operand.value])
        while mask.ndim > 1 and mask.shape[-1] == 1 and mask.size > 1:
            mask = mask[..., 0]
        if over_slots(problem, operand):
            slots = and_mask(problem, slots, mask)
        else:
            keys = and_mask(problem, keys, mask)
    tokens = _tokens(problem, problem.all(Role.INDICES), values)
    if tokens is None:  # chosen by scores, among what is visible
        return np.logical_not(slots.any(-1) & keys.any(-1))
    if problem.indices.domain.negative_allowed:
        slots = slots & (tokens >= 0)
    inside = (tokens >= 0) & (tokens < dims.capacity)
    at = np.where(inside, tokens, 0).astype(np.int64)
    seen = np.take_along_axis(keys, at, axis=1) | ~inside
    return np.logical_not((slots & seen).any(-1))


def _tokens(
    problem: Problem, operands: Iterable[Operand], values: Mapping[str, Array]
) -> Array | None:
    """[rows, K]: the keys that are selected, where one operand numbers them."""
    count = (problem.dims.count, problem.dims.slots)
    for operand in operands:
        plain = operand.domain.along is None and operand.domain.block == 1
        array = values.get(operand.value)
        if (
            array is not None
            and plain
            and not operand.domain.apart
            and array.size == np.prod(count)
        ):
            return array.reshape(count)
    return None


def _shown(operand: Operand, mask: Array) -> Array:
    """True where a mask shows something."""
    if operand.domain.values is None:
        return np.asarray(mask, bool)
    return np.asarray(mask == operand.domain.values[0])
