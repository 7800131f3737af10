"""Numbers that sizes must be probed around: constants, and where a Min or Max turns."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sfa_onnx.passes.candidate import Candidate
from sfa_onnx.passes.graph.index import GraphIndex
from sfa_onnx.passes.shapes.concrete import Concrete
from sfa_onnx.passes.shapes.form import Call, Form
from sfa_onnx.passes.shapes.size import form_of

__all__ = ["integer_constants", "turns"]

_CONSTANT_MAX = 600  # integer constants up to this size are straddled by S2


def turns(index: GraphIndex, sizes: Concrete, candidate: Candidate) -> list[Form]:
    """Differences of sizes whose sign decides: keys - 8 for Min(8, keys)."""
    values = dict.fromkeys(o.value for o in candidate.operands)
    for i in (*candidate.nodes, *candidate.support):
        values.update(dict.fromkeys(v for v in index.nodes[i].output if v))
    calls: dict[Call, None] = {}
    for value in values:
        for size in sizes.shape(value) or ():
            calls.update(dict.fromkeys(form_of(size).calls))
        if index.elem_type(value) in (0, 6, 7) and (given := sizes.entries(value)) is not None:
            calls.update(dict.fromkeys(c for x in given[:64] for c in form_of(x).calls))
    found: dict[Form, None] = {}
    for call in sorted(calls, key=str):
        if call.name in ("Min", "Max"):
            pairs = itertools.combinations(call.arguments, 2)
            found.update(dict.fromkeys(b.plus(a, -1) for a, b in pairs))
    return list(found)


def integer_constants(region: onnx.ModelProto) -> set[int]:
    """Small integers that a region's constants mention; -8 for the last eight is one."""
    graph = region.graph
    arrays = [numpy_helper.to_array(t) for t in graph.initializer]
    for attribute in (a for n in graph.node if n.op_type == "Constant" for a in n.attribute):
        value = helper.get_attribute_value(attribute)
        is_tensor = attribute.type == onnx.AttributeProto.TENSOR
        arrays.append(numpy_helper.to_array(value) if is_tensor else np.asarray(value))
    found: set[int] = set()
    for array in arrays:
        if array.dtype.kind in "iu" and array.size <= 8:
            found |= {abs(int(v)) for v in array.reshape(-1) if 2 <= abs(int(v)) <= _CONSTANT_MAX}
    return found
