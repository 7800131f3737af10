"""Running models that exist in memory only, with weights that stay in their files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from sfa_onnx.errors import ModelError, WeightsError
from sfa_onnx.files.model import load_model
from sfa_onnx.guard.guarded import infer_shapes
from sfa_onnx.guard.worker import RemoteError, call
from sfa_onnx.operator.contract import Rounding
from sfa_onnx.runtime.elem_types import ElemTypes, light_copy
from sfa_onnx.runtime.located import in_folder
from sfa_onnx.runtime.ort import open_session, run
from sfa_onnx.runtime.timing import Timing, time_session
from sfa_onnx.runtime.twin import float32_twin, uses

__all__ = [
    "execute",
    "fill_dims",
    "infos",
    "opened",
    "runnable",
    "with_outputs",
    "with_structure",
]

Array = NDArray[Any]
_TWO_GIB: Final = 2**31
_SMALL: Final = 1 << 12  # elements of an integer tensor that is structure, not weights


def with_structure(model: ModelProto, folder: Path | None) -> ModelProto:
    """The model with small external integer tensors (shapes, axes) inside: inference needs them."""
    small = [
        t
        for t in model.graph.initializer
        if t.data_location == TensorProto.EXTERNAL
        and t.data_type in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
        and np.prod(t.dims) <= _SMALL
    ]
    if not small or folder is None:
        return model
    out = ModelProto()
    out.CopyFrom(model)
    names = {t.name for t in small}
    for tensor in out.graph.initializer:
        if tensor.name in names:
            try:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
            except (OSError, onnx.checker.ValidationError) as error:
                raise WeightsError(f"{tensor.name}: its data cannot be read: {error}") from error
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    return out


def infos(model: ModelProto, feeds: Mapping[str, Array]) -> dict[str, onnx.ValueInfoProto]:
    """Types and shapes of all values, weights included, at the sizes of `feeds`."""
    light = light_copy(model)
    for value in light.graph.input:
        shape = feeds[value.name].shape if value.name in feeds else ()
        for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=False):
            dim.dim_value = size
    inferred = infer_shapes(light, data_prop=True)[0] or light
    values = (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info)
    infos = {v.name: v for v in values if v.type.tensor_type.HasField("shape")}
    for tensor in model.graph.initializer:
        infos[tensor.name] = helper.make_tensor_value_info(
            tensor.name, tensor.data_type, list(tensor.dims)
        )
    return infos


def fill_dims(info: onnx.ValueInfoProto, other: onnx.ValueInfoProto) -> None:
    """Give `info` the dims that only `other` knows."""
    dims = zip(info.type.tensor_type.shape.dim, other.type.tensor_type.shape.dim, strict=False)
    for dim, known in dims:
        if not dim.WhichOneof("value"):
            dim.CopyFrom(known)


def with_outputs(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """A copy of `model` whose outputs are `names`."""
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.output[:]
    types = ElemTypes(model)
    for name in names:
        info = out.graph.output.add(name=name)
        if kind := types.of(name):
            info.type.tensor_type.elem_type = kind
    return out


def opened(
    model: ModelProto,
    folder: Path | None,
    *,
    as_written: bool = False,
    rounding: Rounding = "exact",
) -> ort.InferenceSession:
    """A session of a model in memory whose weights, if external, lie in `folder`."""
    options = ort.SessionOptions()
    if as_written:  # optimisers fuse into operators that lack a float64 kernel
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # errors are raised; the log would repeat them
    if folder is not None:
        model = in_folder(model, folder, options)
    return open_session(model, options, rounding=rounding, allow_external=folder is not None)


def runnable(
    path: str | os.PathLike[str], *, rounding: Rounding = "exact"
) -> tuple[ort.InferenceSession, str]:
    """A session of a file, and a note: as it is, or with what onnxruntime needs changed.

    That is a float32 twin where bfloat16 forbids the model, and sizes that it left open.

    onnxruntime's CPU provider lacks bfloat16 for most operators; ours keep it either way.

    Raises:
        ModelError: onnxruntime refuses the model for another reason.
    """
    notes: list[str] = []
    try:
        return open_session(path, rounding=rounding, notes=notes), "; ".join(notes)
    except ModelError:
        model = load_model(path)
        if not uses(model, TensorProto.BFLOAT16):
            raise
        sess = opened(float32_twin(model), Path(path).resolve().parent, rounding=rounding)
        return sess, (
            "bfloat16: onnxruntime's CPU provider lacks it, so the model's float32 twin was run;"
            " our operators kept bfloat16"
        )


def execute(
    model: ModelProto,
    folder: Path | None,
    feeds: Mapping[str, Array],
    outputs: list[str] | None = None,
    *,
    as_written: bool = False,
    rounding: Rounding = "exact",
) -> dict[str, Array]:
    """Run a model whose weights, if external, lie in `folder`; feeds it does not take are left.

    It runs in the worker: a graph that kills the runtime does not kill the caller.

    Raises:
        CrashError: it killed the runtime.
        ModelError, ContractError: it does not load or does not run.
    """
    if outputs is not None and not outputs:
        return {}
    if model.ByteSize() >= _TWO_GIB:
        raise ModelError("the model is beyond 2 GiB: save it with external data, pass the path")
    place = None if folder is None else str(folder.resolve())
    try:
        done: dict[str, Array] = call(
            f"{__name__}:execute_here",
            *(model.SerializeToString(), place, dict(feeds), outputs, as_written, rounding),
        )
    except RemoteError as error:
        raise ModelError(f"the model does not run: {error}") from error
    return done


def execute_here(
    model: bytes,
    folder: str | None,
    feeds: Mapping[str, Array],
    outputs: list[str] | None,
    as_written: bool,
    rounding: Rounding,
) -> dict[str, Array]:
    """`execute`, inside the worker."""
    place = None if folder is None else Path(folder)
    proto = ModelProto.FromString(model)
    sess = opened(proto, place, as_written=as_written, rounding=rounding)
    taken = {i.name for i in sess.get_inputs()}
    return run(sess, {n: a for n, a in feeds.items() if n in taken}, outputs)


def run_file(
    path: str | os.PathLike[str],
    feeds: Mapping[str, Array],
    *,
    rounding: Rounding = "exact",
    repeat: int = 0,
) -> tuple[dict[str, Array], Timing | None, str]:
    """Run a file once in the worker, then `repeat` times for the clock.

    Returns:
        Its outputs, the times (None without `repeat`), and the note of `runnable`.

    Raises:
        CrashError: it killed the runtime.
        ModelError, ContractError: it does not load or does not run.
    """
    try:
        done: tuple[dict[str, Array], Timing | None, str] = call(
            f"{__name__}:run_file_here", str(Path(path).resolve()), dict(feeds), rounding, repeat
        )
    except RemoteError as error:
        raise ModelError(f"{path}: does not run: {error}") from error
    return done


def run_file_here(
    path: str, feeds: Mapping[str, Array], rounding: Rounding, repeat: int
) -> tuple[dict[str, Array], Timing | None, str]:
    """`run_file`, inside the worker."""
    sess, note = runnable(path, rounding=rounding)
    given = dict(feeds)
    outputs = run(sess, given)
    return outputs, time_session(sess, given, repeat) if repeat else None, note
