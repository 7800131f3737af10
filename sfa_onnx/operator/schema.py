"""The contract as onnx schemas: op schemas with types, attributes and shape inference.

Importing `sfa_onnx` registers them, so `onnx.checker`, `onnx.shape_inference` and torch's exporter
know our operators. onnx before 1.19 cannot take an inference function from Python and crashes on a
schema without one, so there nothing is registered: unknown domains pass its checker unchecked.
onnx's table outlives the interpreter, and up to 1.22 it hangs or crashes when it lets go of a
Python function after the end: the operators leave it before.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any, Final

import onnx
from onnx import TypeProto, helper
from onnx.defs import OpSchema

from sfa_onnx.errors import ContractError
from sfa_onnx.operator.contract import Attribute, OpContract, Tensor
from sfa_onnx.operator.op import ALL_OPS, written_as
from sfa_onnx.operator.shape_rules import Shape, infer_outputs

__all__ = ["register"]

_KINDS: Final = {
    "float": OpSchema.AttrType.FLOAT,
    "int": OpSchema.AttrType.INT,
    "string": OpSchema.AttrType.STRING,
}


def register() -> None:
    """Register every operator with onnx, once per process."""
    if not hasattr(OpSchema, "set_type_and_shape_inference_function"):
        return
    ways = (way for contract in ALL_OPS for way in written_as(contract))
    for op in (*ALL_OPS, *ways):
        if not onnx.defs.has(op.name, domain=op.domain):
            onnx.defs.register_schema(_schema(op))
            atexit.register(onnx.defs.deregister_schema, op.name, op.version, op.domain)


def _schema(op: OpContract) -> OpSchema:
    constraints = [(name, list(types), "") for name, types in op.type_variables]

    def parameter(tensor: Tensor) -> OpSchema.FormalParameter:
        option = OpSchema.FormalParameterOption.Optional
        single = OpSchema.FormalParameterOption.Single
        kind = tensor.types if isinstance(tensor.types, str) else tensor.types[0]
        return OpSchema.FormalParameter(
            tensor.name, kind, tensor.shape, param_option=option if tensor.optional else single
        )

    schema = OpSchema(
        op.name,
        op.domain,
        op.version,
        op.doc,
        inputs=[parameter(t) for t in op.inputs],
        outputs=[parameter(t) for t in op.outputs],
        type_constraints=constraints,
        attributes=[_attribute(a) for a in op.attributes],
    )
    schema.set_type_and_shape_inference_function(_inference(op))
    return schema


def _attribute(attribute: Attribute) -> OpSchema.Attribute:
    legal = "" if attribute.cpu is None else f"one of {attribute.cpu}"
    if attribute.default is None:
        kind = _KINDS[attribute.kind]
        return OpSchema.Attribute(attribute.name, kind, legal, required=True)
    value = float(attribute.default) if attribute.kind == "float" else attribute.default
    return OpSchema.Attribute(attribute.name, helper.make_attribute(attribute.name, value), legal)


def _inference(op: OpContract) -> Callable[[Any], None]:
    """The callback that onnx calls with its inference context."""

    def infer(context: Any) -> None:
        inputs = {}
        for i, tensor in enumerate(op.inputs[: context.get_num_inputs()]):
            kind = context.get_input_type(i)
            if kind is not None and kind.HasField("tensor_type"):
                inputs[tensor.name] = kind.tensor_type.elem_type, _shape(kind)
        given = {a.name: context.get_attribute(a.name) for a in op.attributes}
        attributes = {
            name: _value(attribute)
            for name, attribute in given.items()
            if attribute is not None and attribute.name
        }
        if op.inputs[0].name not in inputs:
            return
        try:
            results = infer_outputs(op, inputs, attributes)
        except ContractError as error:
            raise onnx.shape_inference.InferenceError(str(error)) from error
        for i, (elem, shape) in enumerate(results[: context.get_num_outputs()]):
            context.set_output_type(i, _type(elem, shape))

    return infer


def _value(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _shape(kind: TypeProto) -> Shape:
    if not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims)


def _type(elem: int, shape: Shape) -> TypeProto:
    if shape is None:
        kind = TypeProto()
        kind.tensor_type.elem_type = elem
        return kind
    return helper.make_tensor_type_proto(elem, shape)


register()
