"""Run an .om on the inputs beside this script and keep its outputs for `sfa-onnx compare`.

    python run_om.py model.om [--device 0]
    sfa-onnx compare model.sfa.onnx --against .

Needs numpy and either ais_bench (aclruntime) or pyACL, whichever is installed; pyACL for a file of
build_om.py, whose caches are written in place. Inputs are taken from inputs/ in graph order;
outputs are written to outputs/ with the names of the ONNX graph.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
HUGE_PAGES_FIRST, TO_DEVICE, TO_HOST = 0, 1, 2


def load_inputs() -> list[Any]:
    """The inputs in graph order; bfloat16 travels as uint16, bit for bit."""
    entries = json.loads((HERE / "inputs" / "inputs.json").read_text())
    return [
        np.fromfile(HERE / "inputs" / e["file"], dtype=e["numpy"]).reshape(e["shape"])
        for e in entries
    ]


def run_ais_bench(model: Path, device: int, inputs: list[Any]) -> list[Any]:
    """Through ais_bench, which sits on aclruntime."""
    interface = importlib.import_module("ais_bench.infer.interface")
    session = interface.InferSession(device, str(model))
    return list(session.infer(inputs, mode="static"))


def _ok(what: str, code: int) -> None:
    if code:
        sys.exit(f"{what} failed with ACL error {code}")


def in_place(model: Path) -> dict[int, int]:
    """Output -> the input whose memory it shares, as the .om was built; empty for atc's files."""
    told = model.with_suffix(".in_place.json")
    if not told.is_file():
        return {}
    return {p["output_index"]: p["input_index"] for p in json.loads(told.read_text())}


def run_acl(model: Path, device: int, inputs: list[Any], shared: dict[int, int]) -> list[Any]:
    """Through pyACL alone; an output of `shared` gets the address of its input."""
    acl: Any = importlib.import_module("acl")
    _ok("acl.init", acl.init())
    _ok("acl.rt.set_device", acl.rt.set_device(device))
    number, code = acl.mdl.load_from_file(str(model))
    _ok("loading the model", code)
    desc = acl.mdl.create_desc()
    _ok("acl.mdl.get_desc", acl.mdl.get_desc(desc, number))
    sources, targets = acl.mdl.create_dataset(), acl.mdl.create_dataset()
    addresses = []
    for array in inputs:
        raw = np.ascontiguousarray(array).tobytes()
        memory, code = acl.rt.malloc(len(raw), HUGE_PAGES_FIRST)
        _ok("acl.rt.malloc", code)
        pointer = acl.util.bytes_to_ptr(raw)
        _ok("copy to device", acl.rt.memcpy(memory, len(raw), pointer, len(raw), TO_DEVICE))
        acl.mdl.add_dataset_buffer(sources, acl.create_data_buffer(memory, len(raw)))
        addresses.append(memory)
    sizes = [
        acl.mdl.get_output_size_by_index(desc, i) for i in range(acl.mdl.get_num_outputs(desc))
    ]
    for i, size in enumerate(sizes):
        if i in shared:
            memory = addresses[shared[i]]
        else:
            memory, code = acl.rt.malloc(size, HUGE_PAGES_FIRST)
            _ok("acl.rt.malloc", code)
        acl.mdl.add_dataset_buffer(targets, acl.create_data_buffer(memory, size))
    _ok("running the model", acl.mdl.execute(number, sources, targets))
    return [_fetch(acl, targets, i, size) for i, size in enumerate(sizes)]


def _fetch(acl: Any, dataset: Any, index: int, size: int) -> Any:
    buffer = acl.mdl.get_dataset_buffer(dataset, index)
    raw = bytes(size)
    pointer = acl.util.bytes_to_ptr(raw)
    memory = acl.get_data_buffer_addr(buffer)
    _ok("copy to host", acl.rt.memcpy(pointer, size, memory, size, TO_HOST))
    return np.frombuffer(raw, dtype=np.uint8)


def save_outputs(outputs: list[Any]) -> None:
    """Outputs as .bin and .npy, named after the ONNX graph's outputs."""
    entries = json.loads((HERE / "outputs.json").read_text())
    if len(outputs) != len(entries):
        sys.exit(f"the model has {len(outputs)} outputs, outputs.json names {len(entries)}")
    folder = HERE / "outputs"
    folder.mkdir(exist_ok=True)
    for entry, output in zip(entries, outputs, strict=True):
        array = np.ascontiguousarray(output)
        if entry["numpy"] != str(array.dtype):
            array = array.reshape(-1).view(np.uint8).view(entry["numpy"])
        (folder / entry["file"]).write_bytes(array.tobytes())
        np.save(folder / Path(entry["file"]).with_suffix(".npy"), array)
    (folder / "outputs.json").write_text(json.dumps(entries, indent=2))


def main() -> None:
    """Run the model with whatever runtime this machine has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="the .om file")
    parser.add_argument("--device", type=int, default=0)
    args = parser.parse_args()
    inputs, shared = load_inputs(), in_place(args.model)
    try:
        if shared:  # ais_bench gives every output memory of its own
            raise ImportError
        outputs = run_ais_bench(args.model, args.device, inputs)
    except ImportError:
        outputs = run_acl(args.model, args.device, inputs, shared)
    save_outputs(outputs)
    print(f"{len(outputs)} outputs written to {HERE / 'outputs'}")


if __name__ == "__main__":
    main()
