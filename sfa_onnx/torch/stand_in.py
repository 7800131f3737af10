"""Stand-ins for `torch_npu`, `custom_ops`, `torchair` and `vllm_ascend`, for scripts on the CPU.

They hold what scripts around the attention operators use: the operators as attributes, a device
module whose calls do nothing, the test base class, and a compiler backend that keeps the traced
graph. Anything else is an AttributeError that says so. Moving tensors and modules to "npu" keeps
them where they are. All of this changes torch for the whole process, so nothing here happens
unless asked for (`enable_ascend_names(torch_npu=True)`, `python -m sfa_onnx.torch.on_cpu`).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import unittest
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import numpy as np
import torch

from sfa_onnx.torch.float8 import HIFLOAT8
from sfa_onnx.torch.schedules import schedules
from sfa_onnx.torch.vendor import vendor_schemas

__all__ = ["install"]

_VERSION: Final = "0.0.0+sfa_onnx.cpu"
_ABSENT_TYPES: Final = ("float8_e8m0fnu", "float4_e2m1fn_x2", "float4_e1m2fn_x2")
_chip = "Ascend910_9392"


def install(*, first: bool = False, chip: str = "Ascend910_9392") -> None:
    """Make the stand-ins importable, and "npu" a device that means the CPU.

    Args:
        first: before packages of those names that are installed (default: only where none is).
        chip: what `torch.npu.get_device_properties().name` says.
    """
    global _chip
    _chip = chip
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0 if first else len(sys.meta_path), _Finder())
    if not hasattr(torch, "npu"):
        torch.utils.rename_privateuse1_backend("npu")
        torch._register_device_module("npu", _device_module())
        torch.accelerator.is_available = _answering(False)  # dynamo would ask it for its index
        _patch_moves()


def _device_module() -> ModuleType:
    """`torch.npu` and `torch_npu.npu`: one device, nothing to wait for."""
    module = _StandIn("torch_npu.npu", "A device module that means the CPU.")
    nothing = ("set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all",
               "set_option", "set_compile_mode", "init", "reset_peak_memory_stats")  # fmt: skip
    for name in nothing:
        setattr(module, name, _do_nothing)
    answers = {
        "is_available": True, "is_initialized": True, "current_device": 0, "device_count": 1,
        "memory_allocated": 0, "max_memory_allocated": 0, "_is_in_bad_fork": False,
        "get_amp_supported_dtype": [torch.float16, torch.bfloat16],
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(module, name, _answering(answer))
    values: dict[str, Any] = {
        "config": SimpleNamespace(allow_internal_format=False),
        "get_device_name": lambda *_: _chip,
        "get_device_properties": lambda *_: SimpleNamespace(name=_chip, total_memory=0),
        "device": lambda *_: nullcontext(),
        "stream": lambda *_: nullcontext(),
    }
    for name, value in values.items():
        setattr(module, name, value)
    return module


def _do_nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _answering(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: value


def _is_npu(device: Any) -> bool:
    return (isinstance(device, str) and device.split(":")[0] == "npu") or (
        isinstance(device, torch.device) and device.type == "npu"
    )


def _patch_moves() -> None:
    """`.to("npu:0")`, `.npu()`, `device="npu"`: the tensor or module as it is, or made on CPU."""
    for kind in (torch.Tensor, torch.nn.Module):
        kind.to = _staying(kind.to)
        kind.npu = lambda self, *_args, **_kwargs: self
    torch.Tensor.is_npu = property(lambda _self: False)
    makers = ("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "eye", "linspace",
              "rand", "randn", "randint", "randperm", "empty_like", "zeros_like", "ones_like",
              "full_like", "rand_like", "randn_like")  # fmt: skip
    for name in makers:
        setattr(torch, name, _staying(getattr(torch, name)))


def _staying(real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if _is_npu(a) else a for a in args)
        kwargs = {k: "cpu" if _is_npu(v) else v for k, v in kwargs.items()}
        return real(*args, **kwargs)

    call.__name__ = getattr(real, "__name__", "call")
    call.__doc__ = real.__doc__
    return call


# The modules.


def _torch_npu(module: ModuleType) -> None:
    module.__dict__.update(
        __version__=_VERSION,
        npu=torch.npu,
        hifloat8=HIFLOAT8,
        npu_format_cast=lambda tensor, *_args, **_kwargs: tensor,
    )
    for namespace in ("custom", "npu"):  # torch_npu's own wins until custom_ops is imported
        _mount(module, namespace)


def _mount(module: ModuleType, namespace: str) -> None:
    home = getattr(torch.ops, namespace)
    published = [v.qualified for v in vendor_schemas()] + [s.qualified for s in schedules()]
    for space, name in (qualified.split("::") for qualified in published):
        if space == namespace and hasattr(home, name):
            setattr(module, name, getattr(home, name))


def _custom_ops(_module: ModuleType) -> None:
    """The recipes' package puts its operators onto torch_npu when it is imported."""
    import torch_npu

    _mount(torch_npu, "custom")


def _torchair(module: ModuleType) -> None:
    module.__dict__.update(
        __version__=_VERSION,
        get_npu_backend=lambda **_options: _keep_the_graph,
        get_compiler=lambda *_args, **_options: _keep_the_graph,
        CompilerConfig=CompilerConfig,
        register_fx_node_ge_converter=lambda _operator: lambda converter: converter,
    )


def _keep_the_graph(graph: torch.fx.GraphModule, _inputs: Any, **_options: Any) -> Any:
    """A torch.compile backend: what was traced is what runs."""
    return graph.forward


class CompilerConfig:
    """Takes every option; a graph that runs on the CPU heeds none."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        section = CompilerConfig()
        setattr(self, name, section)
        return section


class _TestCase(unittest.TestCase):
    """`torch_npu.testing.testcase.TestCase`."""

    def assertRtolEqual(  # noqa: N802
        self, x: Any, y: Any, prec: float = 1e-4, prec16: float = 1e-3, message: Any = None
    ) -> None:
        """Close within `prec`, or `prec16` for 16-bit types, relative and absolute."""
        left, right = (
            v.detach().float().numpy() if isinstance(v, torch.Tensor) else np.asarray(v)
            for v in (x, y)
        )
        half = any(getattr(v, "dtype", None) in (torch.float16, torch.bfloat16) for v in (x, y))
        bound = prec16 if half else prec
        np.testing.assert_allclose(left, right, rtol=bound, atol=bound, err_msg=str(message or ""))


class _SupportedDevices:
    """Decorator of tests that only some chips can run."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def __call__(self, test: Any) -> Any:
        if any(name in _chip for name in self._names):
            return test
        return unittest.skip(f"needs {' or '.join(self._names)}, this run stands for {_chip}")(test)


_BUILDERS: Final[dict[str, Callable[[ModuleType], None]]] = {
    "torch_npu": _torch_npu,
    "torch_npu.npu": lambda module: module.__dict__.update(vars(torch.npu)),
    "torch_npu.testing": _do_nothing,
    "torch_npu.testing.testcase": lambda module: module.__dict__.update(
        TestCase=_TestCase, run_tests=unittest.main
    ),
    "torch_npu.testing.common_utils": lambda module: module.__dict__.update(
        SupportedDevices=_SupportedDevices
    ),
    "torch_npu.dynamo": _do_nothing,
    "torch_npu.dynamo.torchair": _torchair,
    "custom_ops": _custom_ops,
    "custom_pypto": _do_nothing,
    "vllm_ascend": _do_nothing,
    "vllm_ascend.utils": lambda module: module.__dict__.update(enable_custom_op=_answering(True)),
    "torchair": _torchair,
    "torchair.configs": _do_nothing,
    "torchair.configs.compiler_config": lambda module: module.__dict__.update(
        CompilerConfig=CompilerConfig
    ),
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    stands_in = True  # nothing to make room for while it loads

    def find_spec(
        self, name: str, _path: Any = None, _target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        root = name.partition(".")[0]
        if root not in _BUILDERS:
            return None
        if "." in name and getattr(sys.modules.get(root), "__version__", _VERSION) != _VERSION:
            return None  # a module of the installed package, which just has none of that name
        if name not in _BUILDERS:
            raise ModuleNotFoundError(_lacks(root, "module", name), name=name)
        return importlib.machinery.ModuleSpec(name, self, origin=__file__, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name, f"Stand-in of sfa_onnx for {spec.name}, on the CPU.")

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = __file__
        _BUILDERS[module.__name__](module)


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _ABSENT_TYPES:
            raise AttributeError(
                f"sfa_onnx's CPU stand-in for {self.__name__} has no {name!r}: of the small floats"
                " the CPU's attention reads float8_e4m3fn and hifloat8"
            )
        raise AttributeError(_lacks(self.__name__, "attribute", name))


def _lacks(module: str, kind: str, name: str) -> str:
    return (
        f"sfa_onnx's CPU stand-in for {module} has no {kind} {name!r}: it has the sparse attention"
        " operators and what their scripts need; take what only the NPU has out of this run"
    )
