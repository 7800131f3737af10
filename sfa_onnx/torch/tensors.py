"""Torch tensors as the operators take them: checks without copies, and NumPy views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from sfa_onnx.errors import ContractError

__all__ = [
    "as_numpy",
    "as_torch",
    "check_no_gradient",
    "check_usable",
    "dense_pages",
    "in_forward_mode",
]

# Of paged caches: the vendors' kernels take pages that lie apart ("not contiguous on axis 0").
_CACHES: Final = ("key", "value", "key_rope", "key_dequant_scale")


def as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """A view of a CPU tensor; bfloat16 becomes ml_dtypes'."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


def as_torch(array: NDArray[Any]) -> torch.Tensor:
    """A tensor on the memory of an array; ml_dtypes' bfloat16 becomes torch's."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def check_usable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse what the kernels cannot read in place or cannot differentiate.

    Raises:
        ContractError: a tensor is not on the CPU, not dense, not contiguous, or wants a gradient.
    """
    for name, tensor in tensors.items():
        if not tensor.is_cpu:
            raise ContractError(
                f"{name}: expected a tensor on cpu like the others, got one on {tensor.device};"
                f" move it with {name}.cpu()"
            )
        if tensor.layout != torch.strided:
            raise ContractError(
                f"{name}: expected a dense tensor, got {tensor.layout}; call {name}.to_dense()"
            )
        if not tensor.is_contiguous():
            raise ContractError(
                f"{name}: expected a contiguous tensor, got shape {list(tensor.shape)} with strides"
                f" {list(tensor.stride())}; call {name}.contiguous()"
            )
    check_no_gradient(tensors)


def check_no_gradient(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse what wants a derivative, backward or forward, unless gradients are off.

    Raises:
        ContractError: a tensor has requires_grad or a tangent, or the call is inside
            `torch.func.jvp`, which shows no kernel whose tensors have one.
    """
    if not torch.is_grad_enabled():
        return
    if in_forward_mode():
        _check_no_tangent(tensors)
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ContractError(
                f"{name}: expected requires_grad=False (the operator is for inference and has no"
                f" backward), got True; call it under torch.no_grad() or pass {name}.detach()"
            )


def in_forward_mode() -> bool:
    """Whether torch computes forward derivatives now: `torch.func.jvp`, `jacfwd`, `dual_level`."""
    return bool(getattr(forward_ad, "_current_level", -1) >= 0)


def _check_no_tangent(tensors: Mapping[str, torch.Tensor]) -> None:
    if getattr(eager_transforms, "JVP_NESTING", 0) > 0:
        raise ContractError(
            "torch.func.jvp: expected no call of the operator inside (it is for inference and has"
            " no forward derivative), got one; call it under torch.no_grad(), as a constant"
        )
    for name, tensor in tensors.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise ContractError(
                f"{name}: expected no tangent (the operator is for inference and has no forward"
                " derivative), got a dual tensor; call it under torch.no_grad() or pass its primal"
            )


def dense_pages(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a call over a paged cache; pages that lie apart are copied together.

    Each page itself has to be contiguous, as the vendors' kernels have it: [block_num, ...] with
    any first stride.
    """
    dense = dict(tensors)
    for name in _CACHES:
        tensor = tensors.get(name)
        if tensor is None or not tensor.dim() or tensor.layout != torch.strided:
            continue
        if tensor[:1].squeeze(0).is_contiguous():
            dense[name] = tensor.contiguous()
    return dense
