"""Run an .om on the inputs beside this script and keep its outputs for `sfa-onnx compare`.

    python run_om.py model.om [--device 0]
    sfa-onnx compare model.sfa.onnx --against .

Needs numpy and either ais_bench (aclruntime) or pyACL, whichever is installed; pyACL for a file of
build_om.py, whose caches are written in place. A file with gears runs in the gear of the inputs;
one with ranges of shape needs ais_bench. Inputs are taken from inputs/ in graph order; outputs are
written to outputs/ with the names of the ONNX graph. Never run on a device.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
HUGE_PAGES_FIRST, TO_DEVICE, TO_HOST = 0, 1, 2
GEAR_INPUT = "ascend_mbatch_shape_data"  # the input that selects the gear, added by the compiler


def load_inputs() -> list[Any]:
    """The inputs in graph order; bfloat16 travels as uint16, bit for bit."""
    entries = json.loads((HERE / "inputs" / "inputs.json").read_text())
    return [
        np.fromfile(HERE / "inputs" / e["file"], dtype=e["numpy"]).reshape(e["shape"])
        for e in entries
    ]


def shapes() -> str:
    """What the .om was compiled for, in ais_bench's words: static, dymdims (gears), dymshape."""
    call = (HERE / "atc.sh").read_text()
    if "--dynamic_dims=" in call:
        return "dymdims"
    return "dymshape" if re.search(r"--input_shape=\S*~", call) else "static"


def run_ais_bench(model: Path, device: int, inputs: list[Any], mode: str) -> list[Any]:
    """Through ais_bench, which sits on aclruntime."""
    interface = importlib.import_module("ais_bench.infer.interface")
    session = interface.InferSession(device, str(model))
    if mode != "dymshape":
        return list(session.infer(inputs, mode=mode))
    # Nobody knows the outputs' sizes: room for all inputs twice, and for logits, in each.
    room = 2 * sum(array.nbytes for array in inputs) + (1 << 24)
    return list(session.infer(inputs, mode=mode, custom_sizes=room))


def _ok(what: str, code: int) -> None:
    if code:
        sys.exit(f"{what} failed with ACL error {code}")


def in_place(model: Path) -> dict[int, int]:
    """Output -> the input whose memory it shares, as the .om was built; empty for atc's files."""
    told = model.with_suffix(".in_place.json")
    if not told.is_file():
        return {}
    return {p["output_index"]: p["input_index"] for p in json.loads(told.read_text())}


def run_acl(model: Path, device: int, inputs: list[Any], mode: str) -> list[Any]:
    """Through pyACL alone; an output that is a cache written in place gets its input's address."""
    if mode == "dymshape":
        sys.exit("the model was compiled for ranges of shape: install ais_bench to run it")
    acl: Any = importlib.import_module("acl")
    _ok("acl.init", acl.init())
    _ok("acl.rt.set_device", acl.rt.set_device(device))
    number, code = acl.mdl.load_from_file(str(model))
    _ok("loading the model", code)
    desc = acl.mdl.create_desc()
    _ok("acl.mdl.get_desc", acl.mdl.get_desc(desc, number))
    taken, given = acl.mdl.get_num_inputs(desc), len(inputs) + (mode == "dymdims")
    if taken != given:
        sys.exit(f"{model} takes {taken} inputs, inputs/ and its gears make {given}: build it anew")
    sources, addresses = acl.mdl.create_dataset(), []
    for array in inputs:
        raw = np.ascontiguousarray(array).tobytes()
        memory = _room(acl, sources, len(raw))
        pointer = acl.util.bytes_to_ptr(raw)
        _ok("copy to device", acl.rt.memcpy(memory, len(raw), pointer, len(raw), TO_DEVICE))
        addresses.append(memory)
    if mode == "dymdims":
        _choose_gear(acl, number, desc, sources, inputs)
    targets, shared = acl.mdl.create_dataset(), in_place(model)
    for i in range(acl.mdl.get_num_outputs(desc)):
        known = addresses[shared[i]] if i in shared else None
        _room(acl, targets, acl.mdl.get_output_size_by_index(desc, i), known)
    _ok("running the model", acl.mdl.execute(number, sources, targets))
    outputs = [_fetch(acl, desc, targets, i) for i in range(acl.mdl.get_num_outputs(desc))]
    _ok("acl.mdl.unload", acl.mdl.unload(number))
    _ok("acl.rt.reset_device", acl.rt.reset_device(device))
    _ok("acl.finalize", acl.finalize())
    return outputs


def _room(acl: Any, dataset: Any, size: int, memory: Any = None) -> Any:
    """Device memory as the next buffer of a dataset, new unless an address is given."""
    if memory is None:
        memory, code = acl.rt.malloc(size, HUGE_PAGES_FIRST)
        _ok(f"acl.rt.malloc of {size} bytes", code)
    _, code = acl.mdl.add_dataset_buffer(dataset, acl.create_data_buffer(memory, size))
    _ok("acl.mdl.add_dataset_buffer", code)
    return memory


def _choose_gear(acl: Any, number: Any, desc: Any, sources: Any, inputs: list[Any]) -> None:
    """Set the shapes of all inputs of the model, which have to be one of its gears."""
    index, code = acl.mdl.get_input_index_by_name(desc, GEAR_INPUT)
    _ok(f"finding input {GEAR_INPUT}", code)
    _room(acl, sources, acl.mdl.get_input_size_by_index(desc, index))
    dims = [int(size) for array in inputs for size in array.shape]
    gear = {"name": "", "dimCount": len(dims), "dims": dims}
    _ok(
        "choosing the gear of these inputs",
        acl.mdl.set_input_dynamic_dims(number, sources, index, gear),
    )


def _fetch(acl: Any, desc: Any, dataset: Any, index: int) -> Any:
    """An output's bytes; memory is that of the largest gear, the shape that of the one run."""
    buffer = acl.mdl.get_dataset_buffer(dataset, index)
    size = acl.mdl.get_output_size_by_index(desc, index)
    raw = bytes(size)
    pointer = acl.util.bytes_to_ptr(raw)
    memory = acl.get_data_buffer_addr(buffer)
    _ok("copy to host", acl.rt.memcpy(pointer, size, memory, size, TO_HOST))
    told, code = acl.mdl.get_cur_output_dims(desc, index)
    _ok("acl.mdl.get_cur_output_dims", code)
    item = np.dtype(json.loads((HERE / "outputs.json").read_text())[index]["numpy"]).itemsize
    count = int(np.prod(told["dims"], dtype=np.int64)) * item
    return np.frombuffer(raw, dtype=np.uint8)[: min(count, size)]


def save_outputs(outputs: list[Any]) -> None:
    """Outputs as .bin and .npy, named after the ONNX graph's outputs."""
    entries = json.loads((HERE / "outputs.json").read_text())
    if len(outputs) != len(entries):
        sys.exit(f"the model has {len(outputs)} outputs, outputs.json names {len(entries)}")
    folder = HERE / "outputs"
    folder.mkdir(exist_ok=True)
    (folder / "outputs.json").unlink(missing_ok=True)  # it would list outputs of another run
    for entry, output in zip(entries, outputs, strict=True):
        array = np.ascontiguousarray(output)
        if entry["numpy"] != str(array.dtype):
            array = array.reshape(-1).view(np.uint8).view(entry["numpy"])
        _write(folder / entry["file"], array.tobytes())
        packed = io.BytesIO()
        np.save(packed, array)
        _write(folder / Path(entry["file"]).with_suffix(".npy"), packed.getvalue())
    # Last: who finds it finds the outputs that it lists.
    _write(folder / "outputs.json", json.dumps(entries, indent=2).encode())


def _write(path: Path, data: bytes) -> None:
    """The whole file or none: this script stands alone, so it has its own way."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def main() -> None:
    """Run the model with whatever runtime this machine has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="the .om file")
    parser.add_argument("--device", type=int, default=0)
    args = parser.parse_args()
    inputs, mode = load_inputs(), shapes()
    try:
        if in_place(args.model):  # ais_bench gives every output memory of its own
            raise ImportError
        outputs = run_ais_bench(args.model, args.device, inputs, mode)
    except ImportError:
        outputs = run_acl(args.model, args.device, inputs, mode)
    save_outputs(outputs)
    print(f"{len(outputs)} outputs written to {HERE / 'outputs'}")


if __name__ == "__main__":
    main()
