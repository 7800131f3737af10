"""CPU kernels as C functions where torch and Python allow it, as Python functions elsewhere.

The C side is `kernels/torch/sfa_torch.h`. A call of a known form then meets no Python between
torch's dispatcher and the C++ core. Known forms come from here: Python checks a call that is new,
computes it, and tells the C function of it.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import torch
from torch.autograd import forward_ad

from sfa_onnx.errors import MissingError
from sfa_onnx.runtime.core import IndexerParams, PackParams, Params, core
from sfa_onnx.runtime.ort import library_path
from sfa_onnx.torch.form import Result
from sfa_onnx.torch.vendor import Adapter, Known

__all__ = ["in_use", "kernel"]

_OBJECTS: Final[dict[str, Any]] = {
    "none": None,
    "true": True,
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "tensor": torch.Tensor,
    "parameter": torch.nn.Parameter,
    "cdata": "_cdata",
    "requires_grad": "requires_grad",
    "forward": forward_ad,
    "level": "_current_level",
}
_PYTHON: Final = (
    *("PyObject_Type", "PyObject_GetAttr", "PyObject_CallFunctionObjArgs"),
    *("PyTuple_Size", "PyTuple_GetItem", "PyTuple_New", "PyTuple_SetItem"),
    *("PyDict_Next", "PyList_GetItem", "PyLong_AsLongLong", "PyLong_AsVoidPtr"),
    *("PyFloat_AsDouble", "PyUnicode_AsUTF8AndSize", "PyBytes_FromStringAndSize"),
    *("PyErr_Occurred", "PyErr_Clear", "Py_IncRef", "Py_DecRef"),
    *("PyEval_SaveThread", "PyEval_RestoreThread"),
    *("PyCapsule_New", "PyCapsule_GetPointer", "PyCFunction_NewEx"),
)
# The last one came with torch 2.10.
_TORCH: Final = (
    *("aoti_torch_get_device_type", "aoti_torch_get_layout", "aoti_torch_is_contiguous"),
    *("aoti_torch_get_dtype", "aoti_torch_get_dim", "aoti_torch_get_sizes"),
    *("aoti_torch_get_data_ptr", "aoti_torch_empty_strided", "aoti_torch_delete_tensor_object"),
    *("aoti_torch_grad_mode_is_enabled", "torch_get_num_threads"),
)
_I32: Final = ctypes.c_int32
_KINDS: Final = (Params, IndexerParams, PackParams)
_RANK: Final = 4


class _Api(ctypes.Structure):
    """sfa_torch_api."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        *((name, _I32) for name in ("cpu", "strided", "reserved")),
        *((name, ctypes.py_object) for name in (*_OBJECTS, "wrap")),
        *((name, ctypes.c_void_p) for name in (*_PYTHON, *_TORCH)),
    ]


class _Result(ctypes.Structure):
    """sfa_torch_result."""

    _fields_ = [
        *((name, _I32) for name in ("field", "dtype", "itemsize", "rank", "zeroed", "reserved")),
        ("sizes", ctypes.c_int64 * _RANK),
    ]


class _Block(ctypes.Union):
    _fields_ = [("attention", Params), ("indexer", IndexerParams), ("pack", PackParams)]


class _Form(ctypes.Structure):
    """sfa_torch_form."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        *((name, _I32) for name in ("kind", "inputs", "results", "single", "reserved")),
        ("place", _I32 * 12),
        ("field", _I32 * 12),
        ("result", _Result * 3),
        ("block", _Block),
    ]


class _Native:
    """The library with what its functions work by."""

    def __init__(self) -> None:
        self.shim = ctypes.CDLL(torch._C.__file__)  # finds what that depends on
        core()  # of this version
        self.library = ctypes.PyDLL(str(library_path()))
        self.library.sfa_torch_kernel.restype = ctypes.py_object
        self.library.sfa_torch_kernel.argtypes = [ctypes.c_void_p, *[ctypes.py_object] * 2]
        self.library.sfa_torch_keep.argtypes = [
            *(ctypes.py_object, ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p)
        ]
        functions = {n: getattr(ctypes.pythonapi, n) for n in _PYTHON}
        functions |= {n: getattr(self.shim, n) for n in _TORCH}
        self._api = _Api(
            struct_size=ctypes.sizeof(_Api),
            cpu=self.shim.aoti_torch_device_type_cpu(),
            strided=self.shim.aoti_torch_layout_strided(),
            wrap=torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr,
            **_OBJECTS,
            **{n: ctypes.cast(f, ctypes.c_void_p) for n, f in functions.items()},
        )
        self.address = ctypes.addressof(self._api)

    def dtype(self, dtype: torch.dtype) -> int:
        """The number that torch's C shim has for a type."""
        return int(getattr(self.shim, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")())

    def keep(self, made: Any, key: bytes, known: Known, returned: tuple[Result, ...]) -> None:
        """Tell a kernel of a form that was just computed; none with more dimensions than it has."""
        core_form = known.core
        if any(len(result.shape) > _RANK for result in returned):
            return
        form = _Form(
            struct_size=ctypes.sizeof(_Form),
            kind=_KINDS.index(core_form.kind),
            inputs=len(known.places),
            results=len(returned),
            single=known.single,
        )
        form.place[: len(known.places)] = known.places
        offsets = [getattr(core_form.kind, name).offset for name in core_form.inputs]
        form.field[: len(offsets)] = offsets
        for at, result in enumerate(returned):
            form.result[at] = self._result(result, core_form.kind)
        ctypes.memmove(ctypes.addressof(form.block), core_form.block, len(core_form.block))
        self.library.sfa_torch_keep(made, key, len(key), ctypes.byref(form))

    def _result(self, result: Result, kind: Any) -> _Result:
        assert result.dtype is not None
        made = _Result(
            field=getattr(kind, result.field).offset if result.field else -1,
            dtype=self.dtype(result.dtype),
            itemsize=result.dtype.itemsize,
            rank=len(result.shape),
            zeroed=result.zeroed,
        )
        made.sizes[: len(result.shape)] = result.shape
        return made


@functools.cache
def _native() -> _Native | None:
    """None: an older torch, an interpreter without its lock, no library."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    try:
        native = _Native()
        native.library.sfa_torch_kernel(native.address, _handles_work, None)
        return native if _handles_work(native.shim) else None
    except (MissingError, AttributeError, OSError, ValueError):  # the last: of another version
        return None


def _handles_work(shim: ctypes.CDLL) -> bool:
    """What the C functions take for granted, tried on a tensor.

    A handle is the address of a pointer to what `_cdata` says, and making a tensor of one leaves it
    where it is.
    """
    probe, aoti = torch.zeros(2), torch._C._aoti
    alone = probe._use_count()
    capsule = aoti.unsafe_alloc_void_ptr_from_tensor(probe)
    kind = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    pointer_of = kind(("PyCapsule_GetPointer", ctypes.pythonapi))
    handle = pointer_of(capsule, None)
    if ctypes.c_void_p.from_address(handle).value != probe._cdata:
        return False
    held = probe._use_count()
    again = aoti.alloc_tensor_by_stealing_from_void_ptr(capsule)
    if again.data_ptr() != probe.data_ptr() or probe._use_count() != held:
        return False
    shim.aoti_torch_delete_tensor_object(ctypes.c_void_p(handle))
    return bool(probe._use_count() == alone)


def in_use() -> bool:
    """Whether the operators' kernels are the C functions."""
    return _native() is not None


def kernel(adapter: Adapter, setting: list[str] | None) -> Callable[..., Any]:
    """The CPU kernel of one name.

    Args:
        adapter: what a call means.
        setting: holds the rounding of its calls; None: each call's own argument says it.
    """
    native = _native()

    def slow(
        key: bytes | None, rounding: str | None, args: tuple[Any, ...], given: Any | None
    ) -> Any:
        kwargs: Mapping[str, Any] = given or {}
        chosen = kwargs.get("rounding", "exact") if rounding is None else rounding
        if key is None or native is None:
            return adapter.run(args, kwargs, chosen)

        # `made` is there by the time of a call
        def tell(known: Known, returned: tuple[Result, ...]) -> None:
            native.keep(made.__self__, key, known, returned)

        return adapter.run(args, kwargs, chosen, tell)

    def run(*args: Any, **kwargs: Any) -> Any:
        return slow(None, setting[0] if setting else None, args, kwargs)

    if native is None:
        return run
    made: Any = native.library.sfa_torch_kernel(native.address, slow, setting)
    return cast(Callable[..., Any], made)
