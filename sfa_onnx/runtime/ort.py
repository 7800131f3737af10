"""onnxruntime sessions with our operators, and calls that understand bfloat16.

onnxruntime's Python API neither takes nor gives bfloat16 NumPy arrays. `run` does, in the
`ml_dtypes` types and without copies: such inputs are bound by address, such outputs are views of
the memory that onnxruntime allocated. Works with onnxruntime 1.20 and later.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from numpy.typing import ArrayLike, NDArray

from sfa_onnx.errors import ContractError, MissingError, ModelError, SfaError, UsageError
from sfa_onnx.files.external import iter_tensors
from sfa_onnx.files.model import load_model
from sfa_onnx.guard.doors import door
from sfa_onnx.operator.contract import Rounding
from sfa_onnx.operator.op import ALL_OPS

__all__ = [
    "NUMPY_TYPES",
    "Model",
    "checked_arrays",
    "kernel_isa",
    "library_path",
    "register",
    "run",
    "run_bound",
    "session",
]

Model = str | os.PathLike[str] | onnx.ModelProto
_LIBRARY: Final = "libsfa_onnx_ops.so"
# Session config entries: which library was registered, and how its attention rounds.
_MARK: Final = "sfa_onnx.library"
_ROUNDING: Final = "sfa_onnx.rounding"
_TWO_GIB: Final = 2**31

NUMPY_TYPES: Final[dict[str, Any]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
    **{f"tensor({n})": np.dtype(n) for n in ("int8", "int16", "int32", "int64")},
    **{f"tensor(u{n})": np.dtype(f"u{n}") for n in ("int8", "int16", "int32", "int64")},
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(float8e4m3fn)": ml_dtypes.float8_e4m3fn,
    "tensor(float8e5m2)": ml_dtypes.float8_e5m2,
}
_ONNX_ONLY: Final[dict[str, int]] = {  # types that onnxruntime's own NumPy conversion lacks
    "tensor(bfloat16)": onnx.TensorProto.BFLOAT16,
    "tensor(float8e4m3fn)": onnx.TensorProto.FLOAT8E4M3FN,
    "tensor(float8e5m2)": onnx.TensorProto.FLOAT8E5M2,
}


@door
def library_path() -> Path:
    """Where the compiled operator library lies.

    `SFA_ONNX_LIBRARY` wins; then the library inside this package; then one that was installed
    beside it (a source checkout imports from its own folder, but `pip install .` builds elsewhere).

    Raises:
        MissingError: it was not built.
    """
    chosen = os.environ.get("SFA_ONNX_LIBRARY")
    if chosen:
        if Path(chosen).is_file():
            return Path(chosen)
        raise MissingError(f"SFA_ONNX_LIBRARY names {chosen}, which is not a file; unset or fix it")
    folders = [Path(__file__).parent / "lib"]
    folders += [Path(entry) / "sfa_onnx" / "runtime" / "lib" for entry in sys.path if entry]
    for folder in folders:
        if (folder / _LIBRARY).is_file():
            return folder / _LIBRARY
    raise MissingError(
        f"the operator library {_LIBRARY} was not built: looked in {folders[0]} and beside"
        " installed packages; `pip install .` from the source tree compiles it (g++ is enough)"
    )


@door
def kernel_isa() -> str:
    """The kernel path this machine takes ("avx512_bf16", ..., "scalar").

    Raises:
        MissingError: the library was not built, or for another machine, or SFA_ONNX_ISA names a
            path this machine lacks.
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
        library.sfa_core_isa.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise MissingError(
            f"{path} cannot be loaded on this machine ({error}): it was built for another one, or"
            " is no library of ours; rebuild it with `pip install --force-reinstall .`"
        ) from error
    name = (library.sfa_core_isa() or b"").decode()
    if not name:
        wanted = os.environ.get("SFA_ONNX_ISA", "")
        raise MissingError(
            f"SFA_ONNX_ISA={wanted!r} names no kernel path of this machine; unset it"
        )
    return name


@door
def register(sess_options: ort.SessionOptions, rounding: Rounding = "exact") -> ort.SessionOptions:
    """Register our operator library with `sess_options`, once; returns `sess_options`.

    Args:
        sess_options: extended in place.
        rounding: "exact", or "npu": int8 caches and the quantised indexer round as CANN's kernels
            do (docs/operator.md).

    Raises:
        UsageError: `rounding` is neither, or the options were registered with the other.
        MissingError: the library was not built, or onnxruntime cannot load it.
    """
    if rounding not in ("exact", "npu"):
        raise UsageError(
            f"rounding {rounding!r}: expected exact or npu"
            " (golden: sfa_onnx.reference, sfa_onnx.torch)"
        )
    path = str(library_path().resolve())
    if _entry(sess_options, _MARK):
        given = _entry(sess_options, _ROUNDING) or "exact"
        if given != rounding:
            raise UsageError(
                f"these session options were registered with rounding {given!r}, not {rounding!r}:"
                " make others"
            )
        return sess_options
    sess_options.add_session_config_entry(_ROUNDING, rounding)
    try:
        sess_options.register_custom_ops_library(path)
    except Exception as error:
        raise MissingError(
            f"onnxruntime {ort.__version__} cannot load {path}: {error}; rebuild it with"
            " `pip install --force-reinstall .`"
        ) from error
    sess_options.add_session_config_entry(_MARK, path)
    return sess_options


def _entry(sess_options: ort.SessionOptions, key: str) -> str:
    try:
        return str(sess_options.get_session_config_entry(key))
    except Exception:  # onnxruntime raises RuntimeError or its own types for an unknown key
        return ""


@door
def session(
    model: Model | bytes,
    sess_options: ort.SessionOptions | None = None,
    *,
    rounding: Rounding = "exact",
    allow_external: bool = False,
    **kw: Any,
) -> ort.InferenceSession:
    """An onnxruntime session with our operators registered.

    A model whose operators are all standard loads without our library too.

    Args:
        model: path (the way for models with external data or beyond 2 GiB), ModelProto, or the
            bytes of a file.
        sess_options: extended in place; default: fresh ones.
        rounding: how our operators round: "exact", or "npu" as CANN's kernels do.
        allow_external: the options say in which folder a ModelProto's external data lie.
        kw: handed to `onnxruntime.InferenceSession`; `providers` defaults to the CPU.

    Raises:
        UsageError: no such file, or `rounding` is unknown or not that of `sess_options`.
        MissingError: the model needs our library and it was not built.
        ModelError: the model breaks the format's rules, or onnxruntime refuses it.
    """
    _look_at(model)
    return open_session(model, sess_options, rounding=rounding, allow_external=allow_external, **kw)


def _look_at(model: Model | bytes) -> None:
    """Refuse what breaks the format's rules before onnxruntime, in this process, meets it."""
    if not isinstance(model, bytes):
        load_model(model)
        return
    try:
        load_model(onnx.ModelProto.FromString(model))
    except DecodeError as error:
        raise ModelError(
            f"the bytes given are no binary ONNX model ({error}); pass those of an .onnx file"
        ) from error


def open_session(
    model: Model | bytes,
    sess_options: ort.SessionOptions | None = None,
    *,
    rounding: Rounding = "exact",
    allow_external: bool = False,
    notes: list[str] | None = None,
    **kw: Any,
) -> ort.InferenceSession:
    """`session` for a model that was looked at already; `notes` takes what was changed to run."""
    options = sess_options or ort.SessionOptions()
    missing: MissingError | None = None
    try:
        register(options, rounding)
    except MissingError as error:
        missing = error
    kw.setdefault("providers", ["CPUExecutionProvider"])
    source, name = _source(model, allow_external)
    try:
        return ort.InferenceSession(source, options, **kw)
    except Exception as error:
        if missing and "is not a registered function/op" in str(error):
            raise missing from error
        from sfa_onnx.runtime.refused import mended, next_step

        if other := mended(str(error), model, options, notes):
            return open_session(other, options, rounding=rounding, allow_external=True, **kw)
        said = f"onnxruntime {ort.__version__} refuses {name}: {error}"
        raise ModelError(said + next_step(str(error), model)) from error


def _source(model: Model | bytes, allow_external: bool) -> tuple[str | bytes, str]:
    """What InferenceSession takes, and the model's name for messages."""
    if isinstance(model, bytes):
        return model, "the model in memory"
    if not isinstance(model, onnx.ModelProto):
        if not Path(model).is_file():
            raise UsageError(f"{model}: no such file")
        return os.fspath(model), os.fspath(model)
    name = f"the model {model.graph.name!r}"
    external = (t.data_location == onnx.TensorProto.EXTERNAL for t in iter_tensors(model))
    if not allow_external and any(external):
        raise ModelError(f"{name} keeps weights in external files: save it and pass the path")
    if model.ByteSize() >= _TWO_GIB:
        raise ModelError(f"{name} is beyond 2 GiB: save it with external data and pass the path")
    return model.SerializeToString(), name


@door
def run(
    model: Model | bytes | ort.InferenceSession,
    feeds: Mapping[str, ArrayLike],
    outputs: Sequence[str] | None = None,
    *,
    rounding: Rounding | None = None,
) -> dict[str, NDArray[Any]]:
    """Run a model; bfloat16 (and float8) tensors are `ml_dtypes` arrays, in and out.

    Args:
        model: a path, a ModelProto or an open session.
        feeds: input name -> array; dtypes as the model declares them.
        outputs: names wanted (default: all).
        rounding: of the session opened for a model, "exact" unless given; an open session has its
            own.

    Returns:
        Output name -> array, in the order asked for.

    Raises:
        UsageError: an input is missing, unknown or of another dtype; an output is unknown, or no
            tensor; a rounding is given for an open session.
        ContractError: one of our operators refuses its inputs.
        ModelError: onnxruntime fails.
    """
    if isinstance(model, ort.InferenceSession):
        if rounding is not None:
            raise UsageError("rounding belongs to the session: open it with rounding=...")
        sess = model
    else:
        sess = session(model, rounding=rounding or "exact")
    declared = {o.name: o.type for o in sess.get_outputs()}
    wanted = list(declared) if outputs is None else list(outputs)
    if unknown := [name for name in wanted if name not in declared]:
        raise UsageError(f"the model has no output {unknown}; it has {list(declared)}")
    if odd := [name for name in wanted if not declared[name].startswith("tensor(")]:
        raise UsageError(
            f"output {odd[0]!r} is no tensor but {declared[odd[0]]}, which has no array; ask for"
            " other outputs by name, or make it a tensor in the model (ConcatFromSequence)"
        )
    arrays = checked_arrays(sess, feeds)
    special = any(a.dtype.type.__module__ == "ml_dtypes" for a in arrays.values())
    special = special or any(declared[name] in _ONNX_ONLY for name in wanted)
    if special:
        return run_bound(sess, arrays, wanted)
    try:
        return dict(zip(wanted, sess.run(wanted, arrays), strict=True))
    except Exception as error:
        raise _stopped(error) from error


def _stopped(error: Exception) -> SfaError:
    """What onnxruntime complains about, as an error of ours."""
    text = str(error)
    kind = ContractError if any(op.name in text for op in ALL_OPS) else ModelError
    return kind(f"onnxruntime stopped: {text}")


def checked_arrays(
    sess: ort.InferenceSession, feeds: Mapping[str, ArrayLike]
) -> dict[str, NDArray[Any]]:
    """The feeds as arrays, checked against what the model declares.

    Raises:
        UsageError: an input is missing, unknown or of another dtype.
    """
    declared = {i.name: i.type for i in sess.get_inputs()}
    optional = {i.name: i.type for i in sess.get_overridable_initializers()}
    if missing := [name for name in declared if name not in feeds]:
        raise UsageError(f"inputs {missing} are missing; the model takes {list(declared)}")
    arrays = {}
    for name, value in feeds.items():
        kind = declared.get(name) or optional.get(name)
        if kind is None:
            raise UsageError(f"the model has no input {name!r}; it takes {list(declared)}")
        array = np.asarray(value)
        expected = NUMPY_TYPES.get(kind)
        if expected is not None and array.dtype != expected:
            raise UsageError(f"input {name!r}: expected {np.dtype(expected)}, got {array.dtype}")
        arrays[name] = array
    return arrays


def run_bound(
    sess: ort.InferenceSession,
    arrays: Mapping[str, NDArray[Any]],
    wanted: Sequence[str],
    shared: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, NDArray[Any]]:
    """Run with inputs bound by address.

    Args:
        sess: an open session.
        arrays: as `checked_arrays` made them.
        wanted: outputs to fetch.
        shared: further outputs, each with the input whose memory it takes.

    Raises:
        ContractError: one of our operators refuses its inputs.
        ModelError: onnxruntime fails.
    """
    binding = sess.io_binding()
    inputs = (*sess.get_inputs(), *sess.get_overridable_initializers())
    types = {v.name: v.type for v in (*inputs, *sess.get_outputs())}
    held = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
    try:
        for name, array in held.items():
            if types[name] in _ONNX_ONLY or name in shared.values():
                binding.bind_input(name, *_place(types[name], array))
            else:
                binding.bind_cpu_input(name, array)
        for name in wanted:
            binding.bind_output(name, "cpu")
        for name, source in shared.items():
            binding.bind_output(name, *_place(types[name], held[source]))
        sess.run_with_iobinding(binding)
    except Exception as error:
        raise _stopped(error) from error
    values = zip(wanted, binding.get_outputs(), strict=False)  # the shared ones come behind
    return {n: _view(v, types[n]) if types[n] in _ONNX_ONLY else v.numpy() for n, v in values}


def _place(kind: str, array: NDArray[Any]) -> tuple[str, int, Any, list[int], int]:
    """An array's memory as onnxruntime's bindings want it described."""
    dtype = _ONNX_ONLY.get(kind, array.dtype)
    return "cpu", 0, dtype, list(array.shape), array.ctypes.data


def _view(value: Any, kind: str) -> NDArray[Any]:
    """A NumPy view of an OrtValue whose type NumPy lacks; it keeps the OrtValue alive."""
    dtype = np.dtype(NUMPY_TYPES[kind])
    shape = value.shape()
    count = int(np.prod(shape))
    if not count:
        return np.zeros(shape, dtype)
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(value.data_ptr())
    raw.owner = value
    return np.asarray(np.frombuffer(raw, np.uint8).view(dtype).reshape(shape))
