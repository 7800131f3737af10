"""No verb's work grows with the square of how many of one thing a model holds.

Calls are counted, not seconds: twice as many may take little more than twice as many calls.
"""

from __future__ import annotations

import sys
from collections import Counter

import onnx
import pytest
from onnx import TensorProto, helper

import sfa_onnx
from sfa_onnx.ascend import checks
from sfa_onnx.ascend.flavour import to_atc
from sfa_onnx.files.model import load_model
from sfa_onnx.passes.certificate import compare_snapshots, snapshot
from tests.fuzz.corpus import gathered

_T = TensorProto


def _value(name, shape=None):
    return helper.make_tensor_value_info(name, _T.FLOAT, shape)


def _constant_outputs(model, count):
    for i in range(count):
        model.graph.node.append(helper.make_node("Relu", ["scale"], [f"o{i}"]))
        model.graph.output.append(_value(f"o{i}", []))


def _inputs_and_outputs(model, count):
    for i in range(count):
        model.graph.input.append(_value(f"i{i}", [1]))
        model.graph.node.append(helper.make_node("Relu", [f"i{i}"], [f"o{i}"]))
        model.graph.output.append(_value(f"o{i}", [1]))


def _initializers(model, count):
    names = [f"k{i}" for i in range(count)]
    model.graph.initializer.extend(helper.make_tensor(n, _T.FLOAT, [1], [1.0]) for n in names)
    model.graph.node.append(helper.make_node("Sum", names, ["o"]))
    model.graph.output.append(_value("o", [1]))


def _branches(model, count):
    model.graph.input.append(helper.make_tensor_value_info("flag", _T.BOOL, []))
    for i in range(count):
        relu = helper.make_node("Relu", ["out"], [f"r{i}"])
        body = helper.make_graph([relu], "body", [], [_value(f"r{i}")])
        node = helper.make_node("If", ["flag"], [f"o{i}"], then_branch=body, else_branch=body)
        model.graph.node.append(node)
    model.graph.output.append(_value("o0"))


def _chain(model, count):
    for i in range(count):
        last = f"o{i - 1}" if i else "out"
        model.graph.node.append(helper.make_node("Identity", [last], [f"o{i}"]))
    model.graph.output.append(_value(f"o{count - 1}"))


def _readers(model, count):
    for i in range(count):
        model.graph.node.append(helper.make_node("Relu", ["rows"], [f"o{i}"]))


def _scale(model, count):
    """The scale of the scores goes through many nodes."""
    new = [helper.make_node("Identity", ["scale"], ["s0"])]
    new += [helper.make_node("Identity", [f"s{i}"], [f"s{i + 1}"]) for i in range(count)]
    old = list(model.graph.node)
    for node in old:
        node.input[:] = [f"s{count}" if name == "scale" else name for name in node.input]
    del model.graph.node[:]
    model.graph.node.extend([*new, *old])


DOORS = {
    "load": (load_model, (_initializers,)),
    "fuse": (lambda model: sfa_onnx.fuse(model, verify=False), (_readers, _scale)),
    "certificate": (lambda m: compare_snapshots(snapshot(m), snapshot(m)), (_chain,)),
    "check": (checks.check, (_branches, _inputs_and_outputs)),
    "atc": (to_atc, (_constant_outputs, _branches)),
}
PAIRS = [(door, kind) for door, (_, kinds) in DOORS.items() for kind in kinds]


def calls(door, kind, count):
    """How many functions were called, by their names."""
    model = gathered()
    kind(model, count)
    model = onnx.ModelProto.FromString(model.SerializeToString())
    found = Counter()

    def see(frame, event, told):
        if event == "call":
            found[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            found[getattr(told, "__qualname__", str(told))] += 1

    sys.setprofile(see)
    try:
        door(model)
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize(("door", "kind"), PAIRS)
def test_work_grows_no_faster_than_the_model(door, kind):
    call, _ = DOORS[door]
    calls(call, kind, 2)  # what is imported and remembered on the first call
    few, more, most = (calls(call, kind, count) for count in (10, 20, 40))
    first, second = more.total() - few.total(), most.total() - more.total()
    faster = Counter({n: most[n] - 2 * more[n] for n in most}).most_common(3)
    assert second <= 2.5 * max(first, 0) + 900, faster
