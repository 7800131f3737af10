"""Open, run and close sessions with our operators, over and over: memory must stay flat.

    python scripts/cycle-sessions.py --count 10000

Prints the resident memory of this process, in kB, after a tenth of the cycles and at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sfa_onnx import runtime

PAGES, SLOTS = np.zeros((2, 3, 1, 4), np.float32), np.array([4, -1], np.int32)
ROWS = np.ones((2, 1, 4), np.float32)
FEEDS = {"pages": PAGES, "rows": ROWS, "slots": SLOTS}


def model() -> bytes:
    """New rows into a paged cache."""
    float32, int32 = TensorProto.FLOAT, TensorProto.INT32
    node = helper.make_node(
        "KvCacheWrite", ["pages", "rows", "slots"], ["written"], domain="sfa_onnx"
    )
    inputs = [("pages", float32, PAGES), ("rows", float32, ROWS), ("slots", int32, SLOTS)]
    graph = helper.make_graph(
        [node],
        "cycle",
        [helper.make_tensor_value_info(n, t, list(a.shape)) for n, t, a in inputs],
        [helper.make_tensor_value_info("written", float32, list(PAGES.shape))],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("sfa_onnx", 1)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    onnx.ModelProto.FromString(data)
    return data


def cycle(data: bytes, options: ort.SessionOptions | None = None) -> float:
    """One session: open, run, close; what it computed."""
    options = options or ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return float(runtime.run(runtime.session(data, options), FEEDS)["written"].sum())


def resident() -> int:
    """Resident memory in kB."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def main() -> int:
    """Cycle; exit 1 when a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    count = parser.parse_args().count
    data, begin = model(), time.monotonic()
    first = 0
    for number in range(count):
        if cycle(data) != 4.0:
            return 1
        if number == count // 10:
            first = resident()
    report = {"cycles": count, "after a tenth": first, "at the end": resident()}
    print(json.dumps({**report, "seconds": round(time.monotonic() - begin)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
