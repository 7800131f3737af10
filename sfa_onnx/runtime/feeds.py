"""Random inputs that a real caller could have sent: token ids, positions, masks, lengths, pages.

What an integer input means is read off the graph: it is followed through casts and views to the
first node that uses it (an embedding, a position, our operators). Only what the graph leaves open
is decided by the input's name.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, helper

from sfa_onnx import kv_cache
from sfa_onnx.contract import PackedRow
from sfa_onnx.errors import UsageError
from sfa_onnx.model import load_model
from sfa_onnx.op import find_op
from sfa_onnx.runtime.ort import Model

__all__ = ["describe", "random_feeds"]

Array = NDArray[Any]
_VIEWS: Final = frozenset(
    ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Transpose", "Identity", "Slice", "Add",
     "Concat", "Where", "Sub", "Max", "Min", "Clip", "Tile", "Gather", "ScatterND",
     "ScatterElements", "Flatten", "Split")
)  # fmt: skip
_BATCH: Final = ("batch", "b", "bs", "bsz", "n")
_KEYS: Final = ("past", "kv", "cache", "ctx", "context", "total", "s2", "key", "history")
_FEW: Final = 3  # new tokens when there is a past
_MOST: Final = 8192


def random_feeds(
    model: Model | ort.InferenceSession,
    seed: int = 0,
    given: Mapping[str, Array] | None = None,
    sizes: Mapping[str, int] | None = None,
    fused: ModelProto | None = None,
) -> dict[str, Array]:
    """Plausible inputs for a model.

    Args:
        model: path, ModelProto or open session.
        seed: of the random generator.
        given: inputs that the caller has; they also fix the symbolic dims they share.
        sizes: symbolic dim -> size; the rest is chosen (batch 2, a past beyond every top-k).
        fused: the same model after fusing, where our operators tell what an input means.

    Returns:
        Input name -> array, in the model's order; `given` ones are passed through.

    Raises:
        UsageError: `given` names no input of the model.
    """
    proto = _proto(model) if isinstance(model, ort.InferenceSession) else load_model(model)
    return _Feeds(proto, seed, dict(given or {}), dict(sizes or {}), fused).all()


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
        sizes: dict[str, int],
        fused: ModelProto | None,
    ) -> None:
        self.graph, self.given, self.sizes = model.graph, given, sizes
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
        for name, array in given.items():
            self._learn(self.inputs[name], array)
        self._choose_sizes()

    def all(self) -> dict[str, Array]:
        """Every input; lengths and tables come after the caches they describe."""
        made = dict(self.given)
        for name, value in self.inputs.items():
            if name not in made:
                made[name] = self._one(value)
        return {name: made[name] for name in self.inputs}

    # ------------------------------------------------------------------ sizes

    def _learn(self, value: ValueInfoProto, array: Array) -> None:
        for dim, size in zip(value.type.tensor_type.shape.dim, array.shape, strict=False):
            if dim.dim_param:
                self.sizes.setdefault(dim.dim_param, size)

    def _choose_sizes(self) -> None:
        symbols = {
            d.dim_param: None
            for v in self.inputs.values()
            for d in v.type.tensor_type.shape.dim
            if d.dim_param and d.dim_param.isidentifier()
        }
        keys = min(max(2 * self._largest_selection(), 32), _MOST)
        is_key = {s: any(k in s.lower() for k in _KEYS) for s in symbols}
        for symbol in symbols:
            if symbol in self.sizes:
                continue
            lowered = symbol.lower()
            if lowered.startswith("batch") or lowered in _BATCH:
                size = 2
            elif "block" in lowered or "page" in lowered:
                size = 2 + keys // 16
            elif is_key[symbol]:
                size = keys
            else:
                size = _FEW if any(is_key.values()) else keys
            self.sizes[symbol] = size

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

    def _shape(self, value: ValueInfoProto) -> tuple[int, ...]:
        return tuple(
            d.dim_value if d.HasField("dim_value") else self._size(d.dim_param)
            for d in value.type.tensor_type.shape.dim
        )

    def _size(self, text: str) -> int:
        """A symbol or an expression of symbols ("past_len + 1")."""
        if text in self.sizes:
            return self.sizes[text]
        try:
            return max(int(_evaluate(ast.parse(text, mode="eval").body, self.sizes)), 0)
        except (SyntaxError, KeyError, TypeError, ValueError):
            return 2

    # ------------------------------------------------------------------ values

    def _one(self, value: ValueInfoProto) -> Array:
        shape, elem_type = self._shape(value), value.type.tensor_type.elem_type
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
        return np.broadcast_to(np.tri(rows, keys, keys - rows, dtype=np.bool_), shape).copy()

    def _use(self, name: str) -> tuple[NodeProto | None, str]:
        """The first node that gives an input its meaning, and the slot's name."""
        queue, seen = [name], set()
        while queue:
            value = queue.pop(0)
            for node, slot in self.readers.get(value, ()):
                op = find_op(node.domain, node.op_type) if node.domain else None
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
            return self._positions(shape)
        if "len" in lowered:
            return np.full(shape, self._past())
        if node is not None and role == "gather":
            table = self.shapes.get(node.input[0])
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            if table:
                return self.rng.integers(0, table[axis], shape)
        if "slot" in lowered:
            return np.arange(int(np.prod(shape))).reshape(shape)
        if any(word in lowered for word in ("ind", "topk", "idx", "select")):
            return self._selection(shape, self._past())
        return self.rng.integers(0, 2, shape)

    def _positions(self, shape: tuple[int, ...]) -> Array:
        """Consecutive positions that end at the last key (a decode step) or start at zero."""
        length = shape[-1] if len(shape) > 1 else 1
        past = self._past()
        start = past if any(self._is_past(v.name) for v in self.inputs.values()) else 0
        if len(shape) == 1 and not start:
            return np.arange(shape[0])
        return np.broadcast_to(start + np.arange(length) if len(shape) > 1 else start, shape)

    @staticmethod
    def _is_past(name: str) -> bool:
        return any(word in name.lower() for word in ("past", "cache", "packed"))

    def _past(self) -> int:
        """Keys in the past: the longest second axis of a cache-like input."""
        lengths = [
            self._shape(v)[1]
            for v in self.inputs.values()
            if self._is_past(v.name) and len(v.type.tensor_type.shape.dim) > 2
        ]
        keys = [size for s, size in self.sizes.items() if any(k in s.lower() for k in _KEYS)]
        return max(lengths or keys or [max(self.sizes.values(), default=8)])

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
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        op = find_op(node.domain, node.op_type)
        sources = (
            {} if op is None else dict(zip((t.name for t in op.inputs), node.input, strict=False))
        )
        if role == "key" and dtype == np.int8 and "tile_size" in attrs:
            rope, tile = attrs["rope_head_dim"], attrs["tile_size"]
            query = self._shape_of(sources["query"])
            widths = [query[-1]] if query else range(rope + tile, rope + 64 * tile + 1, tile)
            for width in widths:
                for itemsize in (2, 4):
                    if PackedRow(width - rope, rope, tile, itemsize).bytes == shape[-1]:
                        return self._rows(shape, width - rope, rope, tile, itemsize)
        if role == "sparse_indices":
            key = self._shape_of(sources["key"]) or (0, self._past())
            table = self._shape_of(sources.get("block_table", ""))
            keys = key[1] * table[1] if table else key[1]
            size = attrs.get("sparse_block_size", 1)
            return self._selection(shape, max(keys // size, 1)).astype(dtype)
        if role == "block_table":
            blocks = (self._shape_of(sources["key"]) or (int(np.prod(shape)),))[0]
            order = np.resize(self.rng.permutation(blocks), int(np.prod(shape)))
            return order.reshape(shape).astype(dtype)
        if role.startswith("actual_seq_lengths"):
            return self._lengths(role, shape, attrs, sources).astype(dtype)
        return None

    def _lengths(
        self, role: str, shape: tuple[int, ...], attrs: dict[str, Any], sources: dict[str, str]
    ) -> Array:
        side = "query" if role.endswith("query") else "key"
        layout = attrs.get("layout_query" if side == "query" else "layout_kv", b"BSND").decode()
        tensor = self._shape_of(sources[side]) or (1, self._past())
        if layout == "TND":
            return np.linspace(0, tensor[0], shape[0] + 1)[1:].astype(np.int64)
        table = self._shape_of(sources.get("block_table", ""))
        room = tensor[1] * table[1] if layout == "PA_BSND" and table else tensor[1]
        return np.full(shape, room)

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        return self._shape(self.inputs[name]) if name in self.inputs else None

    def _rows(
        self, shape: tuple[int, ...], nope: int, rope: int, tile: int, itemsize: int
    ) -> Array:
        lead = shape[:-1]
        kind = np.dtype(np.float32 if itemsize == 4 else np.float16)
        latent = self.rng.standard_normal((*lead, nope)).astype(np.float32)
        key_rope = self.rng.standard_normal((*lead, rope)).astype(kind)
        if itemsize == 2:  # valid as float16 and as bfloat16 alike: small powers of two
            key_rope = np.ones_like(key_rope)
        return kv_cache.pack(latent, key_rope if rope else None, tile_size=tile)


def _evaluate(node: ast.AST, sizes: Mapping[str, int]) -> int:
    """An integer expression over known symbols."""
    if isinstance(node, ast.Constant):
        return int(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, sizes), _evaluate(node.right, sizes)
        steps = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}
        if isinstance(node.op, ast.FloorDiv) and right:
            return left // right
        return steps[type(node.op)]
    raise ValueError(f"not an expression of dims: {ast.dump(node)}")
