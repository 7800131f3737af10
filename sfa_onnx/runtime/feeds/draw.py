"""Random inputs that a real caller could have sent: token ids, positions, masks, lengths, pages.

What an integer input means is read off the graph: it is followed through casts and views to the
first node that uses it (an embedding, a position, our operators). Only what the graph leaves open
is decided by the input's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, helper

from sfa_onnx.errors import UsageError
from sfa_onnx.files.model import load_model
from sfa_onnx.files.onnx_attrs import attribute, attributes
from sfa_onnx.operator import kv_cache
from sfa_onnx.operator.contract import PackedRow
from sfa_onnx.operator.op import find_op
from sfa_onnx.runtime.feeds.sizes import Sizes
from sfa_onnx.runtime.ort import Model

__all__ = ["describe", "random_feeds"]

Array = NDArray[Any]
_VIEWS: Final = frozenset(
    ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Transpose", "Identity", "Slice", "Add",
     "Concat", "Where", "Sub", "Max", "Min", "Clip", "Tile", "Gather", "ScatterND",
     "ScatterElements", "Flatten", "Split")
)  # fmt: skip


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
        fused: the same model after fusing, where our operators tell what an input means.
        wide: as many new tokens as keys, for models that select among the new tokens.

    Returns:
        Input name -> array, in the model's order; `given` ones are passed through.

    Raises:
        UsageError: `given` names no input of the model.
    """
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
        self.graph, self.given = model.graph, given
        weights = {t.name for t in self.graph.initializer}
        self.inputs = {v.name: v for v in self.graph.input if v.name not in weights}
        if unknown := [name for name in given if name not in self.inputs]:
            raise UsageError(f"the model has no input {unknown}; it takes {list(self.inputs)}")
        self.rng = np.random.default_rng(seed)
        self.readers: dict[str, list[tuple[NodeProto, int]]] = {}
        for node in (*(fused.graph.node if fused else ()), *self.graph.node):
            for i, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, i))
        self.shapes = {t.name: tuple(t.dims) for t in self.graph.initializer}
        known = dict(fixed)
        for name, array in given.items():
            dims = self.inputs[name].type.tensor_type.shape.dim
            for dim, size in zip(dims, array.shape, strict=False):
                if dim.dim_param:
                    known.setdefault(dim.dim_param, size)
        self.roles = self._roles()
        most = self._largest_selection()
        self.sizes = Sizes(self.inputs, known, self.roles, most, wide)

    def all(self) -> dict[str, Array]:
        """Every input; lengths and tables come after the caches they describe."""
        made = dict(self.given)
        for name, value in self.inputs.items():
            if name not in made:
                made[name] = self._one(value)
        return {name: made[name] for name in self.inputs}

    def _roles(self) -> dict[str, tuple[str, str]]:
        """Input -> (slot, layout) for inputs that reach one of our operators."""
        roles = {}
        for name in self.inputs:
            node, slot = self._use(name)
            if node is not None and slot != "gather":
                attrs = attributes(node)
                side = "layout_query" if slot.startswith(("query", "sparse")) else "layout_kv"
                layout = attrs.get(side) or attrs.get("layout_key") or "BSND"
                roles[name] = slot, layout
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
                    found.append(int(onnx.numpy_helper.to_array(tensor).ravel()[0]))
        return max(found)

    # ------------------------------------------------------------------ values

    def _one(self, value: ValueInfoProto) -> Array:
        shape, elem_type = self.sizes.shape(value), value.type.tensor_type.elem_type
        dtype = helper.tensor_dtype_to_np_dtype(elem_type)
        node, role = self._use(value.name)
        if node is not None and find_op(node.domain, node.op_type) is not None:
            made = self._for_operator(node, role, shape, dtype)
            if made is not None:
                return made
        if dtype == np.bool_:
            return self._visible(shape)
        if np.issubdtype(dtype, np.integer):
            return self._integers(value.name, node, role, shape).astype(dtype)
        if "mask" in value.name.lower() and len(shape) >= 2:
            lowest = float(np.finfo(np.float16).min)
            return np.where(self._visible(shape), 0.0, lowest).astype(dtype)
        return self.rng.standard_normal(shape).astype(dtype)

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
        if "position" in lowered or lowered in ("pos", "start_pos", "cache_position"):
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
            return self._selection(shape, self.sizes.past())
        return self.rng.integers(0, 2, shape)

    def _positions(self, name: str, shape: tuple[int, ...]) -> Array:
        """Consecutive positions: behind the past, in the last rows of a buffer, or from zero."""
        if not shape:
            rows = 1
        elif shape[-1] == 1 and len(shape) > 1:  # one column of positions, or one new token
            rows = shape[0] if self._scatters(name) else 1
        else:
            rows = shape[-1] if len(shape) > 1 or not self.sizes.has_past else 1
        past = self.sizes.past() if self.sizes.has_past else 0
        start = max(past - rows, 0) if self._scatters(name) else past
        steps = start + np.arange(rows)
        if not shape:
            return np.array(start)
        column = shape[-1] == 1 and len(shape) > 1
        return np.array(np.broadcast_to(steps[:, None] if column else steps, shape))

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

    def _selection(self, shape: tuple[int, ...], bound: int) -> Array:
        """Distinct entries below `bound` in every row, -1 behind them."""
        count = min(shape[-1], bound)
        rows = np.full((int(np.prod(shape[:-1])), shape[-1]), -1, np.int64)
        for row in rows:
            row[:count] = self.rng.permutation(bound)[:count]
        return rows.reshape(shape)

    def _for_operator(
        self, node: NodeProto, role: str, shape: tuple[int, ...], dtype: Any
    ) -> Array | None:
        """A value for a slot of one of our operators; None: any value of its type will do."""
        attrs = attributes(node)
        if role == "key" and dtype == np.int8 and "tile_size" in attrs:
            rope, tile = attrs["rope_head_dim"], attrs["tile_size"]
            query = self._slot_shape("query")
            widths = [query[-1]] if query else range(rope + tile, rope + 64 * tile + 1, tile)
            for width in widths:
                for itemsize in (2, 4):
                    if PackedRow(width - rope, rope, tile, itemsize).bytes == shape[-1]:
                        return self._rows(shape, width - rope, rope, tile, itemsize)
        if role == "sparse_indices":
            key, table = self._slot_shape("key"), self._slot_shape("block_table")
            direct = key is not None and len(key) == 4 and key[2] == 1
            keys = key[1] if key is not None and direct else self.sizes.past()
            keys *= table[1] if table else 1
            keys += shape[1] if self._grows() else 0
            size = attrs.get("sparse_block_size", 1)
            return self._selection(shape, max(keys // size, 1)).astype(dtype)
        if role == "block_table":
            blocks = (self._slot_shape("key") or (int(np.prod(shape)),))[0]
            order = np.resize(self.rng.permutation(blocks), int(np.prod(shape)))
            return order.reshape(shape).astype(dtype)
        if role.startswith("actual_seq_lengths"):
            return self._lengths(role, shape, attrs).astype(dtype)
        return None

    def _grows(self) -> bool:
        """Whether new rows are put behind a cache before it becomes a key."""
        caches = [n for n, (slot, _) in self.roles.items() if slot in ("key", "key_rope")]
        return any(node.op_type == "Concat" for n in caches for node, _ in self.readers[n])

    def _lengths(self, role: str, shape: tuple[int, ...], attrs: dict[str, Any]) -> Array:
        side = "query" if role.endswith("query") else "key"
        layout = attrs.get("layout_query" if side == "query" else "layout_kv", b"BSND").decode()
        tensor = self._slot_shape(side) or (1, self.sizes.past())
        if layout == "TND":
            return np.linspace(0, tensor[0], shape[0] + 1)[1:].astype(np.int64)
        table = self._slot_shape("block_table")
        room = tensor[1] * table[1] if layout == "PA_BSND" and table else tensor[1]
        return np.full(shape, room)

    def _slot_shape(self, slot: str) -> tuple[int, ...] | None:
        """The shape of the input that reaches a slot of our operator, views between or not."""
        name = next((n for n, (role, _) in self.roles.items() if role == slot), None)
        return None if name is None else self.sizes.shape(self.inputs[name])

    def _rows(
        self, shape: tuple[int, ...], nope: int, rope: int, tile: int, itemsize: int
    ) -> Array:
        lead = shape[:-1]
        kind = np.dtype(np.float32 if itemsize == 4 else np.float16)
        latent = self.rng.standard_normal((*lead, nope)).astype(np.float32)
        key_rope = self.rng.standard_normal((*lead, rope)).astype(kind)
        if itemsize == 2:  # float16 or bfloat16, who knows: +-1 is a plain number in both
            key_rope = np.sign(key_rope)
        return kv_cache.pack(latent, key_rope if rope else None, tile_size=tile)
