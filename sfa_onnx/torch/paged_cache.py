"""A cache for `generate()` that keeps latents as packed int8 rows in pages.

    sfa_onnx.torch.patch_attention(model, cache="paged-int8")
    model.generate(ids, past_key_values=sfa_onnx.torch.PagedInt8Cache())

Needs transformers; import it as `sfa_onnx.torch.PagedInt8Cache`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicIndexedLayer

from sfa_onnx.errors import UsageError
from sfa_onnx.torch.patch import pack_rows

__all__ = ["PagedInt8Cache", "PagedInt8Layer"]


class PagedInt8Layer(DynamicIndexedLayer):  # type: ignore[misc]
    """One layer: pages int8 [M * B, block_size, 1, D], page j of sequence b at j * B + b.

    The indexer's keys stay as they are. `update` gives pages and block table, which only an
    attention patched by `patch_attention` understands.
    """

    keys: Any  # the pages
    values: Any  # the block table [B, M]
    indexer_keys: Any
    is_initialized: bool

    def __init__(self, block_size: int = 128, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_size, self.length, self.batch = block_size, 0, 0

    def update(
        self, latent: torch.Tensor, rope: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append latents [B, 1, S, C] with ropes [B, 1, S, R]; the whole cache comes back."""
        if latent.shape[1] != 1:
            raise UsageError(
                f"latents: expected one head, as sparse attention caches them, got {latent.shape}"
            )
        rows = pack_rows(latent, rope)  # [B, S, 1, D]
        if not self.is_initialized:
            self.batch = rows.shape[0]
            self.keys = rows.new_zeros((0, self.block_size, 1, rows.shape[-1]))
            self.is_initialized, self.dtype, self.device = True, rows.dtype, rows.device
        self._grow(self.length + rows.shape[1])
        tokens = torch.arange(self.length, self.length + rows.shape[1])
        pages = (tokens // self.block_size) * self.batch + torch.arange(self.batch)[:, None]
        slots = pages * self.block_size + tokens % self.block_size  # [B, S]
        self.keys.view(-1, rows.shape[-1])[slots] = rows.squeeze(2)
        self.length += rows.shape[1]
        return self.keys, self.values

    def _grow(self, length: int) -> None:
        """Room for `length` rows; at least half as much again, so that copies stay rare."""
        columns = self.keys.shape[0] // max(self.batch, 1)
        needed = -(-length // self.block_size)
        if needed <= columns:
            return
        more = max(needed, columns * 3 // 2) - columns
        room = self.keys.new_zeros((more * self.batch, *self.keys.shape[1:]))
        self.keys = torch.cat((self.keys, room))
        self._number()

    def _number(self) -> None:
        columns = self.keys.shape[0] // max(self.batch, 1)
        table = torch.arange(columns)[None] * self.batch + torch.arange(self.batch)[:, None]
        self.values = table.to(torch.int32)

    def get_seq_length(self) -> int:
        """Rows in use of each sequence."""
        return self.length

    def reset(self) -> None:
        """Forget every row."""
        super().reset()
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last rows."""
        removed = abs(tokens_to_remove)
        if self.is_indexer_initialized and removed:
            self.indexer_keys = self.indexer_keys[:, :-removed]
        self.length = max(self.length - removed, 0)

    def _choose(self, sequences: torch.Tensor) -> None:
        """Keep copies of these sequences: each has pages of its own to write to."""
        if not self.is_initialized:
            return
        by_batch = self.keys.view(-1, self.batch, *self.keys.shape[1:])
        self.keys = by_batch[:, sequences].flatten(0, 1).contiguous()
        self.batch = len(sequences)
        self._number()
        if self.is_indexer_initialized:
            self.indexer_keys = self.indexer_keys[sequences]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequences in the order of the beams."""
        self._choose(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self._choose(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these sequences."""
        self._choose(torch.arange(self.batch)[indices])


class PagedInt8Cache(Cache):  # type: ignore[misc]
    """`past_key_values` of a model patched with `cache="paged-int8"`."""

    def __init__(self, block_size: int = 128) -> None:
        """Make an empty cache.

        Args:
            block_size: rows per page, a multiple of 16 up to 1024 for the NPU.
        """
        super().__init__(layer_class_to_replicate=lambda: PagedInt8Layer(block_size))

    def get_conv_state(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse a linear layer, as glm5_next has them.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "past_key_values: expected a cache with a place for linear attention layers, got a"
            " PagedInt8Cache; leave it out: the model's own is then quantised at every step"
        )
