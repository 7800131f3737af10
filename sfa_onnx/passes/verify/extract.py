"""Cut a site and its replacement out of the model as two small models of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sfa_onnx.operator.op import ALL_OPS
from sfa_onnx.passes.candidate import Candidate, Refusal
from sfa_onnx.passes.graph.index import GraphIndex

__all__ = ["UnverifiableError", "embedded_constant", "extract_region", "extract_replacement"]

_EMBEDDED_LIMIT = 1 << 20  # bytes of a float table inside the model that a region may use


class UnverifiableError(Exception):
    """Verification cannot go on; carries the refusal."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


def extract_region(index: GraphIndex, candidate: Candidate) -> onnx.ModelProto:
    """The site: from its operands to its outputs, support nodes included.

    Raises:
        UnverifiableError: the outputs depend on something that is neither an operand, nor a region
            or support node, nor a structural constant; or the type of an operand is not known.
    """
    nodes, constants = _upstream(index, candidate, candidate.outputs)
    return _model(index, candidate, nodes, constants, candidate.outputs)


def extract_replacement(index: GraphIndex, candidate: Candidate) -> onnx.ModelProto:
    """The replacement, preceded by the support nodes whose values it reads.

    Raises:
        UnverifiableError: as `extract_region`.
    """
    made = {o for n in candidate.replacement for o in n.output}
    own = {t.name for t in candidate.replacement_initializers}
    entering = {i for n in candidate.replacement for i in n.input if i} - made - own
    nodes, constants = _upstream(index, candidate, sorted(entering))
    constants.extend(candidate.replacement_initializers)
    return _model(index, candidate, [*nodes, *candidate.replacement], constants, candidate.outputs)


def _upstream(
    index: GraphIndex, candidate: Candidate, values: Iterable[str]
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Nodes and constants that `values` need, back to the operands."""
    operands = {o.value for o in candidate.operands}
    allowed = {*candidate.nodes, *candidate.support}
    wanted: set[int] = set()
    constants: dict[str, TensorProto] = {}
    queue = list(values)
    while queue:
        value = queue.pop()
        if not value or value in operands or value in constants:
            continue
        producer = index.producer.get(value)
        if producer is None or _kept_outside(index.nodes[producer]) is not None:
            constants[value] = embedded_constant(index, value)
        elif producer not in wanted:
            if producer not in allowed and index.nodes[producer].op_type != "Constant":
                raise UnverifiableError(
                    Refusal(
                        f"{value!r} enters the site from {index.label(producer)!r}, which was"
                        " bound to no role",
                        value,
                    )
                )
            wanted.add(producer)
            queue.extend(index.nodes[producer].input)
    return [index.nodes[i] for i in sorted(wanted)], list(constants.values())


def embedded_constant(index: GraphIndex, value: str) -> TensorProto:
    """A constant the region needs, as an embedded tensor; weights are never read.

    Raises:
        UnverifiableError: the value is a graph input, a weight or a large table.
    """
    tensor = index.initializers.get(value)
    if tensor is None and (node := index.maker(value)) is not None:
        tensor = _kept_outside(node)
    if tensor is None:
        raise UnverifiableError(
            Refusal(f"the graph input {value!r} enters the site and was bound to no role", value)
        )
    array = index.constant(value)
    if array is None and (fill := index.fill_value(value)) is not None:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        array = np.full(tuple(tensor.dims), fill, dtype)
    if array is not None:
        made: TensorProto = numpy_helper.from_array(array, value)
        return made
    if tensor.data_location == TensorProto.EXTERNAL or tensor.ByteSize() > _EMBEDDED_LIMIT:
        raise UnverifiableError(
            Refusal(
                f"the result depends on the table {value!r} {list(tensor.dims)}, which is neither"
                " an operand of the attention nor a structural constant",
                value,
            )
        )
    embedded: TensorProto = tensor
    return embedded


def _kept_outside(node: onnx.NodeProto) -> TensorProto | None:
    """The tensor of a Constant that lies in an external file."""
    stored = (a.t for a in node.attribute if a.name == "value")
    outside = (t for t in stored if t.data_location == TensorProto.EXTERNAL)
    return next(outside, None) if node.op_type == "Constant" else None


def _model(
    index: GraphIndex,
    candidate: Candidate,
    nodes: Sequence[onnx.NodeProto],
    constants: Iterable[TensorProto],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """A model over `nodes` whose inputs are the operands they read."""
    read = {i for n in nodes for i in n.input} | set(outputs)
    made = {o for n in nodes for o in n.output}
    graph = onnx.GraphProto(name="site")
    graph.node.extend(nodes)
    for node in graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    graph.initializer.extend(constants)
    for operand in candidate.operands:
        if operand.value in read and operand.value not in made:
            if not operand.elem_type:
                raise UnverifiableError(
                    Refusal(
                        f"the element type of {operand.value!r} is not known",
                        operand.value,
                        "export with types, or run onnx.shape_inference on the file first",
                    )
                )
            dims = [None] * len(operand.axes)
            graph.input.append(
                helper.make_tensor_value_info(operand.value, operand.elem_type, dims)
            )
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    opsets = {**{op.domain: op.version for op in ALL_OPS}, **index.opsets}
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)
