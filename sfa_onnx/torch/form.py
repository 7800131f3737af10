"""The form of a call into the C++ core: all of it but its addresses.

A call's shapes, types and attributes are checked once and kept as a filled parameter block; a
further call of the same form only puts in the addresses. What a shape cannot show (lengths, tables,
indices) is checked by the core before it reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from sfa_onnx.runtime.core import Error, IndexerParams, PackParams, Params, core, refuse_if

__all__ = ["Form", "Result"]


@dataclass(frozen=True)
class Result:
    """One result: its field of the parameters, its shape and its type (None: the query's)."""

    field: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    zeroed: bool = False  # rows that no call reaches are read too


@dataclass(frozen=True)
class Form:
    """A checked call of the attention, of an indexer or of packing."""

    kind: type[Params] | type[IndexerParams] | type[PackParams]
    block: bytes
    inputs: tuple[str, ...]  # tensors that the core reads, by the names of their fields
    results: tuple[Result, ...]

    def run(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The call on these tensors, on as many threads as torch uses, without a copy.

        Raises:
            ContractError: lengths, tables or indices break the contract.
        """
        given = [tensors[name] for name in self.inputs]
        like = tensors.get("query", given[0])  # packing has none, and says the type itself
        return self.run_at(like, [tensor.data_ptr() for tensor in given])

    def run_at(self, like: torch.Tensor, addresses: Iterable[int]) -> tuple[torch.Tensor, ...]:
        """As `run`, on the addresses of the inputs; results are made like one of them."""
        params = self.kind.from_buffer_copy(self.block)
        for name, address in zip(self.inputs, addresses, strict=True):
            setattr(params, name, address)
        made = []
        for result in self.results:
            make = like.new_zeros if result.zeroed else like.new_empty
            out = make(result.shape, dtype=result.dtype)
            setattr(params, result.field, out.data_ptr())
            made.append(out)
        if not made[0].numel():
            return tuple(made)
        error = Error()
        status = self._call(params, error)
        if status:
            refuse_if(status, error)
        return tuple(made)

    def _call(self, params: Params | IndexerParams | PackParams, error: Error) -> int:
        library = core()
        if isinstance(params, PackParams):
            whole = 0, params.rows
            return int(library.sfa_core_pack(ctypes.byref(params), *whole, ctypes.byref(error)))
        run = library.sfa_core_run_threads
        if self.kind is IndexerParams:
            run = library.sfa_core_indexer_run_threads
        return int(run(ctypes.byref(params), torch.get_num_threads(), ctypes.byref(error)))
