"""Float latent caches -> int8 packed rows: `NPUSparseFlashAttention` -> `...Antiquant`.

Four forms:
    int8          `KvCachePack` in front of the operator; the interface stays. For accuracy work.
    packed-int8   the cache inputs and outputs become int8 [B, S, 1, D]; new rows are packed once.
    paged-int8    pages [block_num, block_size, 1, D] with `block_table`, `actual_seq_lengths_kv`
                  and `slot_mapping`: static cache shapes, the form ATC can take. The key caches of
                  lightning indexers become pages of the same table, lengths and slots.
    paged         the same pages in the model's float type, latents and ropes apart: the operator
                  stays `NPUSparseFlashAttention`, and nothing is rounded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from sfa_onnx.errors import ModelError, UsageError
from sfa_onnx.files.model import load_model, save_model
from sfa_onnx.guard.doors import door
from sfa_onnx.kv_convert.index_keys import INDEX_CACHES, indexer_sites
from sfa_onnx.kv_convert.interface import PAGED_FORMS, Interface, read_interface, write_interface
from sfa_onnx.kv_convert.rewire import Conversion, float_sites
from sfa_onnx.operator.op import SPARSE_FLASH_ATTENTION
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.scopes.index import body_views
from sfa_onnx.runtime.portable.restore import restored

__all__ = ["FORMS", "INDEX_CACHES", "KvReport", "convert", "float_sites"]

FORMS = ("int8", "packed-int8", *PAGED_FORMS)


@dataclass
class KvReport:
    """What a conversion changed. Sizes are bytes per cached token, over all layers."""

    model: onnx.ModelProto
    form: str
    sites: int
    removed_inputs: list[str] = field(default_factory=list)
    added_inputs: list[str] = field(default_factory=list)
    removed_outputs: list[str] = field(default_factory=list)
    added_outputs: list[str] = field(default_factory=list)
    bytes_per_token_before: int = 0
    bytes_per_token_after: int = 0
    notes: list[str] = field(default_factory=list)
    path: Path | None = None


@door
def convert(
    model: str | os.PathLike[str] | onnx.ModelProto,
    output: str | os.PathLike[str] | None = None,
    *,
    to: str,
    block_size: int = 128,
    tile_size: int = 128,
    index_cache: str | None = None,
    force: bool = False,
) -> KvReport:
    """Convert every float-cache site of a fused model to the int8 operator.

    Args:
        model: a path or a model; never modified.
        output: where to write the result, beside the weights; None: nowhere.
        to: "int8", "packed-int8", "paged-int8" or "paged".
        block_size: tokens per page (paged forms).
        tile_size: latent columns that share a scale; narrowed to the latent width when that is
            not a multiple of it.
        index_cache: "float" or "int8": what becomes of the key caches of `NPULightningIndexer`
            (paged forms). Pages keep the model's type, or are int8 with float16 scales for
            `NPUQuantLightningIndexer`. None: "float" where that is possible, else they stay as
            they are, with a note that says why.
        force: overwrite `output`.

    Raises:
        UsageError: unknown form or an existing output, or `index_cache` for another form.
        ModelError: no float-cache site, or a cache has a reader that cannot take packed rows.
    """
    if to not in FORMS:
        raise UsageError(f"kv-cache form {to!r}: expected one of {', '.join(FORMS)}")
    if block_size <= 0:
        raise UsageError(f"block size {block_size}: expected a positive number of tokens per page")
    if index_cache is not None:
        _check_index_cache(index_cache, to)
    source, _ = restored(load_model(model))
    _check(source)
    try:
        keys = index_cache or ("float" if to in PAGED_FORMS else "")
        copy, conversion, report = _converted(source, to, block_size, tile_size, keys)
    except ModelError as error:
        if index_cache is not None or not indexer_sites(source.graph):
            raise
        copy, conversion, report = _converted(source, to, block_size, tile_size, "")
        report["notes"].append(f"index keys stay as they are: {error}")
    write_interface(copy, Interface(to, block_size, tuple(conversion.entries), conversion.tokens))
    if inner := _in_bodies(copy):
        report["notes"].append(
            f"{len(inner)} sites in bodies of If, Loop or Scan keep their float caches: {inner[0]}"
        )
    result = KvReport(copy, to, len(conversion.sites), **report)
    if output is not None:
        folder = None if isinstance(model, onnx.ModelProto) else Path(model).parent
        result.path = save_model(copy, output, source_dir=folder, force=force)
    return result


def _converted(
    source: onnx.ModelProto, to: str, block_size: int, tile_size: int, index_cache: str
) -> tuple[onnx.ModelProto, Conversion, dict[str, Any]]:
    """A converted copy, who converted it, and the report's fields."""
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    conversion = Conversion(copy, to, block_size, tile_size, index_cache)
    return copy, conversion, conversion.run()


def _check_index_cache(index_cache: str, to: str) -> None:
    if index_cache not in INDEX_CACHES:
        wanted = ", ".join(INDEX_CACHES)
        raise UsageError(f"index cache {index_cache!r}: expected one of {wanted}")
    if to not in PAGED_FORMS:
        raise UsageError(f"index_cache goes with paged forms: {to} leaves index keys as they are")


def _check(model: onnx.ModelProto) -> None:
    known = read_interface(model)
    if known is not None:
        raise ModelError(
            f"this model's caches were converted already, to {known.form}: convert the fused model"
            " that it was made of"
        )
    if float_sites(model.graph):
        return
    if inner := _in_bodies(model):
        raise ModelError(
            f"the sites of this model lie in bodies of If, Loop or Scan ({inner[0]}), and only"
            " caches of the main graph are rewritten. Convert the branch as a model of its own:"
            " export prefill and decode apart instead of merged"
        )
    raise ModelError(
        "no NPUSparseFlashAttention (float cache) in this model, so there is nothing to"
        " convert; fuse it first: sfa_onnx.fuse(model, kv_cache=...) does both"
    )


def _in_bodies(model: onnx.ModelProto) -> list[str]:
    """The sites that lie in bodies."""
    main = GraphIndex.of(model)
    views = body_views(main, lambda node: node.op_type == SPARSE_FLASH_ATTENTION.name)
    return [
        view.place(i)
        for view in views
        for i in view.own
        if view.nodes[i].op_type == SPARSE_FLASH_ATTENTION.name
    ]
