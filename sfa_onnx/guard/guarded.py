"""Third-party C++ behind our own checks and in the worker: inference, inlining, small sessions."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, TypeProto

from sfa_onnx.errors import CrashError, ModelError
from sfa_onnx.guard.budgets import INFERENCE, REFERENCE_SECONDS, SECONDS, WORKER_BYTES
from sfa_onnx.guard.worker import Handle, RemoteError, call

__all__ = ["Stage", "evaluate", "infer_node", "infer_shapes", "inline"]

Array = NDArray[Any]
_TASKS: Final = "sfa_onnx.guard.tasks:"
_LARGEST: Final = 1 << 30  # bytes of a model whose shapes are inferred
_INTEGERS: Final = (TensorProto.INT32, TensorProto.INT64)
_LONG_LIST: Final = 1 << 16  # elements; sizes, axes and lengths are far fewer
_REMEMBERED: Final = 32  # graphs whose inference ended the worker
_deadly: dict[tuple[bytes, bool, float], str] = {}
_log = logging.getLogger("sfa_onnx")


def infer_shapes(model: ModelProto, *, data_prop: bool = False) -> tuple[ModelProto | None, str]:
    """Infer types and shapes by onnx's rules.

    Sizes below zero, which some exporters write for open ones and which onnx's C++ takes at their
    word, are opened first.

    Args:
        model: not changed.
        data_prop: follow the values of small integer tensors too.

    Returns:
        A copy with what was inferred and ""; or None and the reason, where onnx gives up or dies.
    """
    if model.ByteSize() > _LARGEST:
        return None, "the model is too large for onnx's shape inference"
    data_prop = data_prop and not any(_is_long_list(v) for v in _infos(model))
    graph = _with_open_dims(model).SerializeToString()
    seconds = INFERENCE.limit + len(graph) / 1e5
    key = (hashlib.blake2b(graph).digest(), data_prop, seconds)
    if key in _deadly:  # a second death of the same graph would only take as long again
        return None, _deadly[key]
    try:
        data = call(
            _TASKS + "infer_shapes", graph, data_prop,
            what="the shapes of this model", memory=WORKER_BYTES, wait=INFERENCE, seconds=seconds,
        )  # fmt: skip
    except (RemoteError, CrashError, ModelError) as error:
        _log.debug("shape inference gave up: %s", error)
        if isinstance(error, CrashError):
            _deadly[key] = str(error)
            while len(_deadly) > _REMEMBERED:
                _deadly.pop(next(iter(_deadly)))
        return None, str(error)
    return ModelProto.FromString(data), ""


def _is_long_list(value: onnx.ValueInfoProto) -> bool:
    """Whether onnx's data propagation would make one symbol per element of a huge list."""
    tensor = value.type.tensor_type
    sizes = tensor.shape.dim
    return len(sizes) == 1 and tensor.elem_type in _INTEGERS and sizes[0].dim_value > _LONG_LIST


def _with_open_dims(model: ModelProto) -> ModelProto:
    """The model itself; a copy where a declared size is below zero."""
    if not any(_negative(v) for v in _infos(model)):
        return model
    copy = ModelProto()
    copy.CopyFrom(model)
    for value in _infos(copy):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0:
                dim.Clear()
    return copy


def _infos(model: ModelProto) -> list[onnx.ValueInfoProto]:
    graph = model.graph
    return [*graph.input, *graph.output, *graph.value_info]


def _negative(value: onnx.ValueInfoProto) -> bool:
    shape = value.type.tensor_type.shape
    return any(dim.dim_value < 0 for dim in shape.dim)


def infer_node(
    node: NodeProto,
    version: int,
    types: Mapping[str, TypeProto],
    data: Mapping[str, TensorProto],
    opsets: Mapping[str, int],
) -> dict[str, TypeProto] | None:
    """Output types of one node by onnx's rules; None where onnx knows none, gives up or dies.

    Args:
        node: a node of a standard operator.
        version: the opset whose rules hold.
        types: the type of every input; sizes must not be below zero.
        data: the values of inputs that are known.
        opsets: the imports of the model.
    """
    sizes = [d.dim_value for t in types.values() for d in t.tensor_type.shape.dim]
    if sizes and min(sizes) < 0:
        return None
    try:
        found = call(
            _TASKS + "infer_node", node.SerializeToString(), version,
            {name: t.SerializeToString() for name, t in types.items()},
            {name: t.SerializeToString() for name, t in data.items()},
            dict(opsets), what=f"{node.op_type} {node.name!r}",
        )  # fmt: skip
    except (RemoteError, CrashError, ModelError) as error:
        _log.debug("no shape of %s %r: %s", node.op_type, node.name, error)
        return None
    return {name: TypeProto.FromString(t) for name, t in found.items()}


def inline(model: ModelProto, functions: Sequence[tuple[str, str]] | None = None) -> ModelProto:
    """A copy with local functions inlined: all, or those named by (domain, name).

    Raises:
        ModelError: onnx cannot inline them.
        CrashError: it died over them.
    """
    try:
        data = call(
            _TASKS + "inline", model.SerializeToString(), functions,
            what="the functions of this model",
        )  # fmt: skip
    except RemoteError as error:
        raise ModelError(
            f"onnx cannot inline this model's functions: {error}; export it without functions"
        ) from error
    done: ModelProto = ModelProto.FromString(data)
    return done


def evaluate(
    model: ModelProto, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
) -> list[Array]:
    """Run a small model once in onnx's own evaluator.

    Raises:
        RemoteError: it does not run.
        CrashError, BudgetError: it dies, or takes more memory than its budget.
    """
    done: list[Array] = call(
        _TASKS + "evaluate", model.SerializeToString(), outputs, dict(feeds),
        what="this node", memory=WORKER_BYTES,
    )  # fmt: skip
    return done


class Stage:
    """A small standard model, open in the worker; opened again where the worker had to restart.

    Attributes:
        engine: "onnxruntime", or "onnx.reference" where that has no kernel for the types.
        types: output name -> "tensor(double)"; empty where the engine does not say.
    """

    def __init__(
        self, model: ModelProto, *, fallback: bool = True, what: str = "this region"
    ) -> None:
        self._data = model.SerializeToString()
        self._fallback, self._what = fallback, what
        self._handle = self._open()

    def _open(self) -> Handle:
        number, self.engine, types = call(
            _TASKS + "open_stage", self._data, self._fallback, what=self._what, memory=WORKER_BYTES
        )
        self.types = dict(types)
        return Handle(number)

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs asked for, in order.

        Raises:
            RemoteError: the runtime rejects the inputs.
            CrashError, BudgetError: it dies, or takes more memory than its budget.
        """
        if not self._handle.alive:
            self._handle = self._open()
        done: list[Array] = call(
            _TASKS + "run_stage", self._handle.number, list(outputs), dict(feeds),
            what=self._what, memory=WORKER_BYTES,
            wait=SECONDS if self.engine == "onnxruntime" else REFERENCE_SECONDS,
        )  # fmt: skip
        return done
