"""Random inputs that a real caller could have sent: token ids, positions, masks, lengths, pages.

What an integer input means is read off the graph: it is followed through casts and views to the
first node that uses it (an embedding, a position, our operators). Only what the graph leaves open
is decided by the input's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from sfa_onnx.errors import UsageError
from sfa_onnx.files.model import load_model
from sfa_onnx.files.onnx_attrs import attribute, attributes
from sfa_onnx.guard.budgets import INPUT_BYTES
from sfa_onnx.guard.doors import door
from sfa_onnx.kv_convert.interface import BLOCK_TABLE, read_interface
from sfa_onnx.operator.op import find_op
from sfa_onnx.passes.assume import FLAGS, MASKS, assumed_inputs
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete, SizesMeetError
from sfa_onnx.runtime.elem_types import ElemTypes
from sfa_onnx.runtime.feeds.pages import plan_pages
from sfa_onnx.runtime.feeds.relations import fit_positions, fit_sizes, with_constants
from sfa_onnx.runtime.feeds.scales import scale_inputs
from sfa_onnx.runtime.feeds.sizes import Sizes, is_cache
from sfa_onnx.runtime.feeds.slots import Slots, layout, selection
from sfa_onnx.runtime.ort import Model

__all__ = ["describe", "random_feeds"]

Array = NDArray[Any]
_VIEWS: Final = frozenset(
    ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Transpose", "Identity", "Slice", "Add",
     "Concat", "Where", "Sub", "Max", "Min", "Clip", "Tile", "Gather", "ScatterND",
     "ScatterElements", "Flatten", "Split")
)  # fmt: skip
_NO_NUMBERS: Final = {TensorProto.UNDEFINED, TensorProto.STRING}
_DRAWN: Final = frozenset(TensorProto.DataType.values()) - _NO_NUMBERS
_WHOLE: Final = (TensorProto.INT32, TensorProto.INT64)


@door
def random_feeds(
    model: Model | ort.InferenceSession,
    seed: int = 0,
    given: Mapping[str, Array] | None = None,
    sizes: Mapping[str, int] | None = None,
    fused: ModelProto | None = None,
    wide: bool = False,
) -> dict[str, Array]:
    """Plausible inputs for a model.

    Args:
        model: path, ModelProto or open session.
        seed: of the random generator.
        given: inputs that the caller has; they also fix the symbolic dims they share.
        sizes: symbolic dim -> size; the rest is chosen (batch 2, a past beyond every top-k).
        fused: the same model after fusing, where our operators show what an input means.
        wide: as many new tokens as keys, for models that select among the new tokens.

    Returns:
        Input name -> array, in the model's order; `given` ones are passed through.

    Raises:
        UsageError: `given` names no input of the model, or the seed is below zero.
    """
    if seed < 0:
        raise UsageError(f"seed={seed}: expected a number from 0 on")
    proto = _proto(model) if isinstance(model, ort.InferenceSession) else load_model(model)
    return _Feeds(proto, seed, dict(given or {}), dict(sizes or {}), fused, wide).all()


def _proto(session: ort.InferenceSession) -> ModelProto:
    """The model that a session was made from."""
    path = getattr(session, "_model_path", None)
    return load_model(path) if path else onnx.load_from_string(session._model_bytes)


def describe(array: Array) -> str:
    """Type and shape in short: float16[1, 1, 256]."""
    return f"{array.dtype}{list(array.shape)}"


class _Feeds:
    def __init__(
        self,
        model: ModelProto,
        seed: int,
        given: dict[str, Array],
        fixed: dict[str, int],
        fused: ModelProto | None,
        wide: bool,
    ) -> None:
        model = _with_named_dims(model)
        self.model, self.graph, self.given = model, model.graph, given
        weights = {t.name for t in self.graph.initializer}
        self.inputs = {v.name: v for v in self.graph.input if v.name not in weights}
        if unknown := [name for name in given if name not in self.inputs]:
            raise UsageError(f"the model has no input {unknown}; it takes {list(self.inputs)}")
        self.masks, self.flags = (assumed_inputs(fused or model, k) for k in (MASKS, FLAGS))
        self.scales = scale_inputs(model, fused)
        self.rng = np.random.default_rng(seed)
        self.readers: dict[str, list[tuple[NodeProto, int]]] = {}
        for graph in (*((fused.graph,) if fused else ()), self.graph):
            for node in graph.node:
                for i, name in enumerate(node.input):
                    self.readers.setdefault(name, []).append((node, i))
        self.shapes = {t.name: tuple(t.dims) for t in self.graph.initializer}
        self.sizes = self._sizes(fixed, wide)
        self.made = dict(given)
        self._page()
        self.slots = self._all_slots(fused)

    def _sizes(self, fixed: dict[str, int], wide: bool) -> Sizes:
        """Sizes by names and places first, then as the graph's own relations say."""
        known = dict(fixed)
        for name, array in self.given.items():
            dims = self.inputs[name].type.tensor_type.shape.dim
            for dim, size in zip(dims, array.shape, strict=False):
                if dim.dim_param:
                    known.setdefault(dim.dim_param, size)
        self.roles = self._roles()
        slots = {n: [node for node, _ in self.readers.get(n, ())] for n in self.roles}
        direct = {n for n, by in slots.items() if any(find_op(x.domain, x.op_type) for x in by)}
        most = self._largest_selection()
        sizes = Sizes(self.inputs, known, self.roles, direct, most, wide)
        first = [s for s, uses in sizes.uses.items() if any(is_cache(n) for n, _ in uses)]
        sizes.sizes = fit_sizes(self.model, sizes.sizes, known, first)
        self.known = known
        return sizes

    def _page(self) -> None:
        """Pages that agree, for a model whose caches were converted to them."""
        interface = read_interface(self.model)
        if interface is None or not interface.paged or BLOCK_TABLE in self.given:
            return
        start = None
        if any(cache.in_place for cache in interface.caches):
            packed = [cache.packed_in for cache in interface.caches]
            floats = [n for n in self.inputs if n not in packed and is_cache(n)]
            start = self._written_at(self.sizes.past(floats), 1)
        pages = plan_pages(interface, self.inputs, self.sizes, start, self.known, self.rng)
        self.made = pages.arrays | self.made
        model = with_constants(self.model, pages.arrays)
        fixed = {*self.known, *pages.sizes}
        self.sizes.sizes = fit_sizes(model, self.sizes.sizes | pages.sizes, fixed)

    def _all_slots(self, fused: ModelProto | None) -> dict[str, Slots]:
        """First output of each of our nodes -> what may stand in its slots.

        The second model's nodes show what the first one's inputs mean, but not their sizes when
        its caches were converted: these are none of the first one's.
        """
        found = {}
        keys = self.sizes.past() + self._grown_by()
        for model in (*((fused,) if fused else ()), self.model):
            nodes = [n for n in model.graph.node if n.domain and find_op(n.domain, n.op_type)]
            if not nodes:
                continue
            same = model is self.model or {v.name for v in model.graph.input} >= set(self.inputs)
            index = GraphIndex.of(model, defaults_hold=True) if same else None
            known = None if index is None else Concrete(index, self.sizes.sizes)
            types = ElemTypes(model)
            for node in nodes:
                shape = partial(_shape, known)
                found[node.output[0]] = Slots(node, shape, self._drawn, types.of, self.rng, keys)
        return found

    def _grown_by(self) -> int:
        """How many rows are put behind a cache before it becomes a key."""
        caches = [n for n, (slot, _) in self.roles.items() if slot in ("key", "key_rope")]
        joins = (node for n in caches for node, _ in self.readers[n] if node.op_type == "Concat")
        new = (self.inputs[n] for node in joins for n in node.input[1:] if n in self.inputs)
        shapes = (self.sizes.shape(v) for v in new)  # [B, S, C], [B, S, 1, C] or [B, 1, S, C]
        return min((int(np.prod(s[1:-1])) for s in shapes), default=0)

    def all(self) -> dict[str, Array]:
        """Every input; whole numbers that say where are moved to where the graph can go."""
        for name in self.inputs:
            self._get(name)
        numbers = {
            n: a for n, a in self.made.items() if a.dtype.kind in "iu" and n not in self.given
        }
        places = [n for n in numbers if self._is_position(n)]
        self._same_counters(numbers, places)
        if places:
            fitted = fit_positions(self.model, self.sizes.sizes, self.made, places)
            self.made |= {n: fitted[n] for n in places}
        return {name: self.made[name] for name in self.inputs}

    def _same_counters(self, numbers: dict[str, Array], places: list[str]) -> None:
        """One number for a counter that each layer keeps (names but for the layer's number)."""
        first: dict[str, str] = {}
        for name in (*places, *numbers):
            if numbers[name].size == 1:
                one = first.setdefault(re.sub(r"\d+", "#", name), name)
                if numbers[name].shape == numbers[one].shape:
                    self.made[name] = numbers[one].astype(numbers[name].dtype)

    def _get(self, name: str) -> Array:
        """The array of an input, drawn at its first use."""
        if name not in self.made:
            self.made[name] = self._one(self.inputs[name])
        return self.made[name]

    def _drawn(self, value: str) -> Array | None:
        """The array of a graph input; None for what the graph computes."""
        return self._get(value) if value in self.inputs else None

    def _roles(self) -> dict[str, tuple[str, str]]:
        """Input -> (slot, layout) for inputs that reach one of our operators."""
        roles = {}
        for name in self.inputs:
            node, slot = self._use(name)
            if node is not None and slot != "gather":
                side = "query" if slot.startswith(("query", "sparse")) else "key"
                roles[name] = slot, layout(attributes(node), side)
        return roles

    def _largest_selection(self) -> int:
        """The largest k of a TopK, or K of a static selection: a past must be longer."""
        constants = {t.name: t for t in self.graph.initializer if int(np.prod(t.dims)) == 1}
        found = [0]
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                constants[node.output[0]] = node.attribute[0].t
        for node in self.graph.node:
            if node.op_type == "TopK" and len(node.input) > 1 and node.input[1] in constants:
                tensor = constants[node.input[1]]
                if not tensor.external_data:
                    count = onnx.numpy_helper.to_array(tensor).ravel()[:1]
                    found += [int(n) for n in count]
        for name, (slot, _) in self.roles.items():
            if slot == "sparse_indices":
                last = self.inputs[name].type.tensor_type.shape.dim[-1:]
                found += [dim.dim_value for dim in last]
        return max(found)

    # ------------------------------------------------------------------ values

    def _one(self, value: ValueInfoProto) -> Array:
        shape, elem_type = self.sizes.shape(value), value.type.tensor_type.elem_type
        if elem_type not in _DRAWN:
            raise UsageError(
                f"input {value.name!r} is declared with the element type {elem_type}, of which no"
                " values are drawn; give it with --inputs (inputs=...)"
            )
        dtype = helper.tensor_dtype_to_np_dtype(elem_type)
        INPUT_BYTES.check(math.prod(shape) * dtype.itemsize, f"drawing input {value.name!r}")
        node, role = self._use(value.name)
        if node is not None and node.output[0] in self.slots:
            made = self.slots[node.output[0]].draw(role, shape, dtype)
            if made is not None:
                return made
        if dtype == np.bool_:
            return self._visible(shape)
        if value.name in self.flags:
            return self._visible(shape).astype(dtype)
        if np.issubdtype(dtype, np.integer):
            return self._integers(value.name, node, role, shape).astype(dtype)
        if value.name in self.masks or ("mask" in value.name.lower() and len(shape) >= 2):
            lowest = float(np.finfo(np.float16).min)
            return np.where(self._visible(shape), 0.0, lowest).astype(dtype)
        drawn = self.rng.standard_normal(shape).astype(dtype)
        return np.abs(drawn) if value.name in self.scales else drawn

    def _visible(self, shape: tuple[int, ...]) -> Array:
        """A causal mask over the last two axes; all visible when there is only one row of keys."""
        if len(shape) < 3:
            return np.ones(shape, np.bool_)
        rows, keys = shape[-2:]
        visible = np.tri(rows, keys, keys - rows, dtype=np.bool_)
        return np.array(np.broadcast_to(visible, shape))

    def _use(self, name: str) -> tuple[NodeProto | None, str]:
        """The first node that gives an input its meaning, and the slot's name."""
        queue, seen = [name], set()
        while queue:
            value = queue.pop(0)
            for node, slot in self.readers.get(value, ()):
                op = find_op(node.domain, node.op_type)
                if op is not None and slot < len(op.inputs):
                    return node, op.inputs[slot].name
                if node.op_type == "Gather" and slot == 1:
                    return node, "gather"
                if node.op_type in _VIEWS and slot < 3 and node.output[0] not in seen:
                    seen.add(node.output[0])
                    queue.append(node.output[0])
        return None, ""

    def _integers(
        self, name: str, node: NodeProto | None, role: str, shape: tuple[int, ...]
    ) -> Array:
        lowered = name.lower()
        if "mask" in lowered:
            return self._visible(shape)
        if self._is_position(name):
            return self._positions(name, shape)
        if "len" in lowered:
            return np.full(shape, self.sizes.past())
        if node is not None and role == "gather":
            table = self.shapes.get(node.input[0])
            axis = attribute(node, "axis", 0)
            if table:
                return self.rng.integers(0, table[axis], shape)
        if "slot" in lowered:
            return np.arange(int(np.prod(shape))).reshape(shape)
        if any(word in lowered for word in ("ind", "topk", "idx", "select")):
            counts = np.full(int(np.prod(shape[:-1])), self.sizes.past())
            return selection(self.rng, counts, shape[-1] if shape else 1).reshape(shape)
        return self.rng.integers(0, 2, shape)

    def _is_whole(self, name: str) -> bool:
        return self.inputs[name].type.tensor_type.elem_type in _WHOLE

    def _is_position(self, name: str) -> bool:
        """Whether an input of whole numbers says where: in a table, or in a cache."""
        lowered = name.lower()
        if "mask" in lowered or not self._is_whole(name):
            return False
        named = "position" in lowered or lowered in ("pos", "start_pos")
        return named or self._scatters(name)

    def _positions(self, name: str, shape: tuple[int, ...]) -> Array:
        """Consecutive positions: behind the past, in the last rows of a buffer, or from zero."""
        if not shape:
            rows = 1
        elif shape[-1] == 1 and len(shape) > 1:  # one column of positions, or one new token
            rows = shape[0] if self._scatters(name) else 1
        else:
            rows = shape[-1] if len(shape) > 1 or not self.sizes.has_past else 1
        past = self.sizes.past() if self.sizes.has_past else 0
        start = self._written_at(past, rows) if self._in_place() else past
        steps = start + np.arange(rows)
        if not shape:
            return np.array(start)
        column = shape[-1] == 1 and len(shape) > 1
        return np.array(np.broadcast_to(steps[:, None] if column else steps, shape))

    def _in_place(self) -> bool:
        """Whether some input says where to write into a cache of fixed length."""
        return any(self._scatters(n) for n in self.inputs if self._is_whole(n))

    def _written_at(self, capacity: int, rows: int) -> int:
        """A place inside a cache, with room behind it and more than a selection before."""
        enough = 2 * self._largest_selection()
        return max(min(capacity - rows, max(3 * capacity // 4, enough)), 0)

    def _scatters(self, name: str) -> bool:
        """Whether an input says where to write."""
        queue, seen = [name], {name}
        while queue:
            for node, slot in self.readers.get(queue.pop(), ()):
                if node.op_type.startswith("Scatter") and slot == 1:
                    return True
                if node.op_type in _VIEWS and node.output[0] not in seen:
                    seen.add(node.output[0])
                    queue.append(node.output[0])
        return False


def _shape(known: Concrete | None, value: str) -> tuple[int, ...] | None:
    """The shape of a value of a graph at chosen sizes."""
    try:
        return None if known is None else known.shape(value)
    except SizesMeetError:
        return None


def _with_named_dims(model: ModelProto) -> ModelProto:
    """The model with a symbol for every dim of an input that has no number and no name."""
    values = [v.type.tensor_type.shape.dim for v in model.graph.input]
    if all(d.dim_param or d.dim_value > 0 or _is_zero(d) for dims in values for d in dims):
        return model
    out = ModelProto()
    out.CopyFrom(model)
    for number, value in enumerate(out.graph.input):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.dim_param and dim.dim_value <= 0 and not _is_zero(dim):
                dim.dim_param = f"unk__{number}{axis}"
    return out


def _is_zero(dim: Any) -> bool:
    """Whether a dim is declared as no entries at all (rather than left open)."""
    return bool(dim.HasField("dim_value") and dim.dim_value == 0)
