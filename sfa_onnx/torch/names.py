"""The operators under the vendors' names: `torch.ops.custom`, `.npu` and `._C_ascend`.

A name that a vendor's package has registered keeps its schema and its NPU kernels; only a missing
CPU kernel is added. A name that nobody has is defined here, and handed over as soon as the package
that owns it is imported: torch allows one definition of a name.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

import torch

from sfa_onnx.errors import ContractError, UsageError
from sfa_onnx.torch.compute import ROUNDINGS
from sfa_onnx.torch.native import kernel
from sfa_onnx.torch.schedules import define_schedule, schedules
from sfa_onnx.torch.vendor import Adapter, VendorOperator, schema_in_torch, vendor_operators

__all__ = ["enable_ascend_names", "owners"]

# Modules whose import defines such names.
_PACKAGES: Final = ("torch_npu", "custom_ops", "custom_pypto", "vllm_ascend.vllm_ascend_C")

_chosen: tuple[VendorOperator, ...] = ()
_libraries: dict[str, torch.library.Library] = {}  # by qualified name
_owners: dict[str, str] = {}
_setting = ["npu"]  # the rounding; kernels hold this list


def enable_ascend_names(
    *,
    release: str | None = None,
    vllm_release: str | None = None,
    rounding: str = "npu",
    torch_npu: bool = False,
) -> dict[str, str]:
    """Define the vendors' names for the CPU, and for tracing and export.

    Calls compute what the NPU computes: dequantised latents rounded to the query's type. May be
    called again, with other choices too.

    Args:
        release: of torch_npu, whose schemas `torch.ops.npu.*` get; see `vendor_operators`.
        vllm_release: of vllm-ascend, whose schemas `torch.ops._C_ascend.*` get.
        rounding: "npu"; "exact" for the unrounded mathematics; "golden" for the roundings of the
            checks on CPU that the vendors publish (normalised weights rounded once; in NumPy).
        torch_npu: also put a stand-in for the modules `torch_npu`, `custom_ops`, `torchair` and
            `vllm_ascend` where they are not installed, with the operators as attributes.

    Returns:
        Who owns which name, as `owners`.

    Raises:
        UsageError: an unknown release or rounding.
    """
    global _chosen
    if rounding not in ROUNDINGS:
        raise UsageError(f"rounding: expected {', '.join(ROUNDINGS)}, got {rounding!r}")
    chosen = vendor_operators(release, vllm_release)
    _setting[0] = rounding
    if chosen != _chosen:
        _release()
        _chosen = chosen
        _add()
    _watch_imports()
    if torch_npu:
        from sfa_onnx.torch.stand_in import install

        install()
    return owners()


def owners() -> dict[str, str]:
    """Qualified name -> "sfa_onnx", "vendor" or "vendor, CPU by sfa_onnx"; empty before enabling.

    A name that a vendor defines with a CPU kernel of its own is the vendor's alone.
    """
    return dict(_owners)


def _add() -> None:
    for vendor in _chosen:
        library = torch.library.Library(vendor.namespace, "FRAGMENT")
        schema = schema_in_torch(vendor.qualified)
        if schema is None:
            _define(library, vendor)
        else:
            _complete(library, vendor, schema)
        _libraries[vendor.qualified] = library
    for schedule in schedules():
        library = torch.library.Library(schedule.namespace, "FRAGMENT")
        ours = define_schedule(library, schedule)
        _owners[schedule.qualified] = "sfa_onnx" if ours else "vendor"
        _libraries[schedule.qualified] = library


def _release() -> None:
    for library in _libraries.values():
        library._destroy()
    _libraries.clear()
    _owners.clear()


def _kernels(vendor: VendorOperator, adapter: Adapter) -> tuple[Callable[..., Any], ...]:
    def fake(*args: Any, **kwargs: Any) -> Any:
        return adapter.fake(args, kwargs)

    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        for name, value in adapter.given(args, kwargs).items():
            if isinstance(value, torch.Tensor) and not value.is_cpu:
                raise ContractError(
                    f"{name}: expected a tensor on cpu, got one on {value.device}: no kernel of"
                    f" {vendor.qualified} for that device is loaded (the NPU's come with torch_npu"
                    f" or custom_ops); use {name}.cpu()"
                )
        return adapter.run(args, kwargs, _setting[0])

    return kernel(adapter, _setting), fake, elsewhere


def _define(library: torch.library.Library, vendor: VendorOperator) -> None:
    library.define(vendor.name + vendor.schema, tags=(torch.Tag.pt2_compliant_tag,))
    schema = schema_in_torch(vendor.qualified)
    assert schema is not None
    adapter = Adapter(vendor.op, schema)
    run, fake, elsewhere = _kernels(vendor, adapter)
    library.impl(vendor.name, run, "CPU")
    library.impl(vendor.name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(vendor.qualified, fake, lib=library)
    _owners[vendor.qualified] = "sfa_onnx"


def _complete(
    library: torch.library.Library, vendor: VendorOperator, schema: torch.FunctionSchema
) -> None:
    """Add to a vendor's definition what it lacks."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    adapter = Adapter(vendor.op, schema)
    _owners[vendor.qualified] = "vendor"
    run, fake, _ = _kernels(vendor, adapter)
    if not has(vendor.qualified, "CPU"):
        library.impl(vendor.name, run, "CPU")
        _owners[vendor.qualified] = "vendor, CPU by sfa_onnx"
    registered = torch._library.simple_registry.singleton.find(vendor.qualified).fake_impl.kernel
    if not has(vendor.qualified, "Meta") and registered is None:
        torch.library.register_fake(vendor.qualified, fake, lib=library)


# Importing a package that owns some of the names.


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a vendor's package as ever, and gives its names back while it loads."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _PACKAGES or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is None or spec.loader is None or getattr(spec.loader, "stands_in", False):
            return spec
        if not isinstance(spec.loader, _Loader):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs a package's own loader while none of its names is defined by us."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._real.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        try:
            with _given_back():
                self._real.exec_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            raise ImportError(
                f"{name} is installed but does not load here ({_first_line(error)}): it needs"
                " CANN and its driver (source set_env.sh of the toolkit); to run on this CPU"
                " without them, uninstall it or use `python -m sfa_onnx.torch.on_cpu script.py`",
                name=name,
            ) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_depth = 0


@contextmanager
def _given_back() -> Iterator[None]:
    """A vendor may define its names inside; afterwards those it did not define are ours again."""
    global _depth
    if not _depth:
        _release()
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _add()


def _watch_imports() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    load = torch.ops.load_library
    if getattr(load, "_sfa_onnx", False):
        return

    def load_library(path: Any) -> None:
        with _given_back():
            load(path)

    load_library._sfa_onnx = True  # type: ignore[attr-defined]
    torch.ops.load_library = load_library
