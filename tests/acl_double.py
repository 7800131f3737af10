"""A double of pyACL for run_om.py: real memory, real checks, and `y = x + x` as the model.

Copied as `acl.py` onto the path of the script. The "compiled model" is a JSON file: shape and type
of x, the largest size of every buffer, whether a gear has to be chosen, and in-place outputs.
"""

from __future__ import annotations

import ctypes
import json
import types
from pathlib import Path

import numpy as np

_state: dict = {"memory": {}, "gear": None, "open": False}


def init():
    _state["open"] = True
    return 0


def finalize():
    _state["open"] = False
    return 0


def create_data_buffer(memory, size):
    assert size <= len(_state["memory"][memory]), "a buffer beyond its memory"
    return {"memory": memory, "size": size}


def get_data_buffer_addr(buffer):
    return buffer["memory"]


def _malloc(size, policy):
    if size <= 0:
        return 0, 107000
    block = ctypes.create_string_buffer(size)
    _state["memory"][ctypes.addressof(block)] = block
    return ctypes.addressof(block), 0


def _memcpy(target, room, source, size, kind):
    if size > room or kind not in (1, 2):
        return 107000
    ctypes.memmove(target, source, size)
    return 0


def _load(path):
    _state["model"] = json.loads(Path(path).read_text(encoding="utf-8"))
    return 7, 0


def _inputs():
    model = _state["model"]
    return [model["x_bytes"], *([64] if model["gears"] else [])]


def _set_dims(number, dataset, index, dims):
    assert (number, index, dims["name"]) == (7, 1, "")
    assert dims["dimCount"] == len(dims["dims"]) <= 128
    if dims["dims"] not in _state["model"]["gears"]:
        return 145000
    _state["gear"] = dims["dims"]
    return 0


def _shape():
    model = _state["model"]
    return _state["gear"] if model["gears"] else model["shape"]


def _execute(number, sources, targets):
    model = _state["model"]
    if len(sources) != len(_inputs()) or (model["gears"] and _state["gear"] is None):
        return 145001
    count = int(np.prod(_shape()))
    x = ctypes.string_at(sources[0]["memory"], count * 4)
    y = (np.frombuffer(x, np.float32) * 2).tobytes()
    if model["in_place"]:
        assert targets[0]["memory"] == sources[0]["memory"], "the cache is to stay where it is"
    ctypes.memmove(targets[0]["memory"], y, len(y))
    return 0


rt = types.SimpleNamespace(
    set_device=lambda device: 0, reset_device=lambda device: 0, malloc=_malloc, memcpy=_memcpy
)
util = types.SimpleNamespace(
    bytes_to_ptr=lambda raw: ctypes.cast(ctypes.c_char_p(raw), ctypes.c_void_p).value
)
mdl = types.SimpleNamespace(
    load_from_file=_load,
    unload=lambda number: 0,
    create_desc=dict,
    get_desc=lambda desc, number: 0,
    create_dataset=list,
    add_dataset_buffer=lambda dataset, buffer: (dataset.append(buffer) or dataset, 0),
    get_dataset_buffer=lambda dataset, index: dataset[index],
    get_num_inputs=lambda desc: len(_inputs()),
    get_num_outputs=lambda desc: 1,
    get_input_size_by_index=lambda desc, index: _inputs()[index],
    get_output_size_by_index=lambda desc, index: _state["model"]["x_bytes"],
    get_input_index_by_name=lambda desc, name: (
        (1, 0) if name == "ascend_mbatch_shape_data" and _state["model"]["gears"] else (0, 100000)
    ),
    set_input_dynamic_dims=_set_dims,
    get_cur_output_dims=lambda desc, index: ({"name": "y", "dims": list(_shape())}, 0),
    execute=_execute,
)
