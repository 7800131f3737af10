"""Torch tensors as the operators take them: checks without copies, and NumPy views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from sfa_onnx.errors import ContractError

__all__ = ["as_numpy", "as_torch", "check_usable"]


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
        ContractError: a tensor is not on the CPU, is not contiguous, or wants a gradient.
    """
    for name, tensor in tensors.items():
        if not tensor.is_cpu:
            raise ContractError(
                f"{name}: expected a tensor on cpu like the others, got one on {tensor.device};"
                f" move it with {name}.cpu()"
            )
        if not tensor.is_contiguous():
            raise ContractError(
                f"{name}: expected a contiguous tensor, got shape {list(tensor.shape)} with strides"
                f" {list(tensor.stride())}; call {name}.contiguous()"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ContractError(
                f"{name}: expected requires_grad=False (the operator is for inference and has no"
                f" backward), got True; call it under torch.no_grad() or pass {name}.detach()"
            )
