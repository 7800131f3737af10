"""The table of sizes in docs/untrusted.md is what the core takes and refuses."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from sfa_onnx.runtime.core import Error, IndexerParams, Params, core
from tests.op_models import needs_library

PAGE = Path(__file__).resolve().parent.parent / "docs" / "untrusted.md"
ROW = re.compile(r"^\| `(\w+)`[^|]*\| (\d+) \| (\d+|`nope_dim`) \|$", re.MULTILINE)
_PAGED, _PACKED = 2, 3


def rows() -> dict[str, tuple[int, int]]:
    """Field -> least and most, as the page says."""
    found = ROW.findall(PAGE.read_text().partition("## Sizes that the kernels take")[2])
    return {name: (int(low), 512 if "nope" in high else int(high)) for name, low, high in found}


def attention(**fields: int) -> tuple[int, str, int]:
    """Status, field and limit of a call without a token and with one field as given."""
    sizes = {"num_heads": 1, "nope_dim": 512, "tile_size": 128, "sparse_block_size": 1}
    paged = any(name.startswith("block") for name in fields)
    places = {"cache_dtype": _PACKED, "layout_kv": _PAGED if paged else 0}
    given = Params(struct_size=ctypes.sizeof(Params), **{**sizes, **places})
    if paged:
        given.block_size, given.block_table_cols, given.block_num = 1, 1, 1
    for name, value in fields.items():
        setattr(given, name, value)
    if "nope_dim" in fields:
        given.tile_size = 1
    error = Error()
    status = core().sfa_core_run(ctypes.byref(given), ctypes.byref(error))
    return status, (error.what or b"").decode(), error.limit


def indexer(**fields: int) -> tuple[int, str, int]:
    """The same of an indexer call."""
    given = IndexerParams(struct_size=ctypes.sizeof(IndexerParams))
    given.num_heads = given.head_dim = given.sparse_count = 1
    for name, value in fields.items():
        setattr(given, name, value)
    error = Error()
    status = core().sfa_core_indexer_run(ctypes.byref(given), ctypes.byref(error))
    return status, (error.what or b"").decode(), error.limit


@needs_library
@pytest.mark.parametrize("name", rows())
def test_the_core_takes_the_bounds_and_refuses_what_lies_beyond(name):
    low, high = rows()[name]
    call = indexer if name == "head_dim" else attention
    alone = name not in ("query_t", "num_heads")  # rows and scratch that would have to be there
    assert call(**{name: low})[0] == 0
    if alone:
        assert call(**{name: high})[0] == 0
    assert call(**{name: high + 1}) == (1, name, high)
    assert call(**{name: low - 1}) == (1, name, low)


@needs_library
def test_rows_times_entries_are_bounded():
    status, what, limit = attention(query_t=1 << 20, query_s=1 << 20, batch=1, sparse_count=1 << 21)
    assert (status, what, limit) == (1, "sparse_count", 1 << 20)
    assert len(rows()) == 13
