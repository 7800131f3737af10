"""The binding's view of onnxruntime's function table, held against the installed runtime.

`kernels/ort/ort_abi.h` names a few entries by index. Entries that can be called without a session
are called here; the others are proven by every test that runs an operator.
`scripts/test-matrix.sh` repeats this and the operator tests on other releases.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from sfa_onnx import runtime
from tests.op_models import needs_library

HEADER = Path(__file__).resolve().parent.parent / "kernels" / "ort" / "ort_abi.h"
FLOOR = 17
VOID = ctypes.c_void_p
INT64 = ctypes.c_int64


class ApiBase(ctypes.Structure):
    """OrtApiBase: two functions."""

    _fields_ = [
        ("get_api", ctypes.CFUNCTYPE(VOID, ctypes.c_uint32)),
        ("version", ctypes.CFUNCTYPE(VOID)),
    ]


def indices() -> dict[str, int]:
    pairs = re.findall(r"^SFA_ORT_AT\((\w+), (\d+)\);", HEADER.read_text(), re.MULTILINE)
    return {name: int(index) for name, index in pairs}


class Table:
    """The runtime's function table, called by the indices that our header states."""

    def __init__(self) -> None:
        folder = Path(ort.__file__).parent / "capi"
        library = ctypes.CDLL(str(next(folder.glob("libonnxruntime.so.*"))))
        library.OrtGetApiBase.restype = ctypes.POINTER(ApiBase)
        self.base = library.OrtGetApiBase().contents
        self.address = self.base.get_api(FLOOR)
        self.index = indices() | {
            "GetErrorCode": 1,
            "GetErrorMessage": 2,
            "CreateSessionOptions": 10,
            "ReleaseSessionOptions": 100,
            "ReleaseCustomOpDomain": 101,
        }

    def entry(self, name: str, restype: Any = VOID) -> Callable[..., Any]:
        pointer = ctypes.cast(self.address, ctypes.POINTER(VOID))[self.index[name]]
        return ctypes.CFUNCTYPE(restype)(pointer)

    def call(self, name: str, *args: Any) -> None:
        status = self.entry(name)(*args)
        assert status is None, self.message(status)

    def message(self, status: int) -> str:
        text = self.entry("GetErrorMessage", ctypes.c_char_p)(VOID(status))
        return text.decode()


@pytest.fixture(scope="module")
def table() -> Table:
    if not HEADER.is_file():
        pytest.skip("needs the source tree")
    return Table()


def test_the_header_states_every_index_once(table):
    stated = indices()
    assert len(stated) == len(set(stated.values())) == 34
    assert max(stated.values()) == stated["KernelContext_ParallelFor"] == 274


def test_status_entries(table):
    status = table.entry("CreateStatus")(2, b"who am I")
    assert table.message(status) == "who am I"
    assert table.entry("GetErrorCode", ctypes.c_int)(VOID(status)) == 2
    table.entry("ReleaseStatus")(VOID(status))


def test_type_and_shape_entries(table):
    info = VOID()
    table.call("CreateTensorTypeAndShapeInfo", ctypes.byref(info))
    table.call("SetTensorElementType", info, 16)
    table.call("SetDimensions", info, (INT64 * 3)(5, -1, 7), ctypes.c_size_t(3))
    names = (ctypes.c_char_p * 3)(b"", b"tokens", b"")
    table.call("SetSymbolicDimensions", info, names, ctypes.c_size_t(3))

    kind, rank = ctypes.c_int(), ctypes.c_size_t()
    table.call("GetTensorElementType", info, ctypes.byref(kind))
    table.call("GetDimensionsCount", info, ctypes.byref(rank))
    assert (kind.value, rank.value) == (16, 3)
    dims, back = (INT64 * 3)(), (ctypes.c_char_p * 3)()
    table.call("GetDimensions", info, dims, rank)
    table.call("GetSymbolicDimensions", info, back, rank)
    assert list(dims) == [5, -1, 7]
    assert list(back) == [b"", b"tokens", b""]
    table.entry("ReleaseTensorTypeAndShapeInfo")(info)


def test_domain_entries(table):
    domain, options = VOID(), VOID()
    table.call("CreateCustomOpDomain", b"somewhere", ctypes.byref(domain))
    table.call("CreateSessionOptions", ctypes.byref(options))
    table.call("AddCustomOpDomain", options, domain)
    table.entry("ReleaseSessionOptions")(options)
    table.entry("ReleaseCustomOpDomain")(domain)


def test_newer_tables_only_append(table):
    release = int(ort.__version__.split(".")[1])
    newest = table.base.get_api(release)
    assert newest, f"GetApi({release})"
    pointers = [ctypes.cast(a, ctypes.POINTER(VOID)) for a in (table.address, newest)]
    for index in indices().values():
        assert pointers[0][index] == pointers[1][index] is not None


def register(table: Table, version: bytes, oldest: int = 99) -> str:
    """Calls RegisterCustomOps as a runtime of that version; returns the error's text or ""."""
    real, text = table.base.get_api, ctypes.create_string_buffer(version)
    base = ApiBase(
        type(real)(lambda n: real(n) if n <= oldest else None),
        type(table.base.version)(lambda: ctypes.addressof(text)),
    )
    options = VOID()
    table.call("CreateSessionOptions", ctypes.byref(options))
    library = ctypes.CDLL(str(runtime.library_path()))
    library.RegisterCustomOps.restype = VOID
    status = library.RegisterCustomOps(options, ctypes.byref(base))
    message = table.message(status) if status else ""
    table.entry("ReleaseStatus")(VOID(status))
    table.entry("ReleaseSessionOptions")(options)
    return message


@needs_library
@pytest.mark.parametrize("version", [b"1.17.0", b"1.23.2", b"1.24.0", b"2.0.0", b"nightly", b""])
def test_every_version_string_registers(table, version):
    assert register(table, version) == ""


@needs_library
def test_a_runtime_that_is_too_old_gets_a_clean_status(table):
    text = register(table, b"1.16.3", oldest=16)
    assert "needs onnxruntime 1.17 or newer, this is 1.16.3" in text


@needs_library
def test_registering_twice_on_the_same_options_is_a_clean_error():
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(runtime.library_path()))
    options.register_custom_ops_library(str(runtime.library_path()))
    with pytest.raises(Exception, match="already"):
        ort.InferenceSession(_relu(), options)
    fresh = ort.SessionOptions()
    fresh.register_custom_ops_library(str(runtime.library_path()))
    for _ in range(2):
        ort.InferenceSession(_relu(), fresh)


def _relu() -> bytes:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
