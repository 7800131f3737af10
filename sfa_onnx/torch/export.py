"""How torch.onnx.export(dynamo=True) writes our torch operators: as the nodes of the contract."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from sfa_onnx.errors import MissingError
from sfa_onnx.operator.contract import OpContract
from sfa_onnx.torch.ops import NAMESPACE, OPERATORS, arguments_of, results_of

__all__ = ["translation_table"]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(..., dynamo=True, custom_translation_table=translation_table())`.

    All attributes are written on the node, also those at their defaults.

    Raises:
        MissingError: onnxscript is not installed.
    """
    try:
        import onnxscript
    except ImportError as error:
        raise MissingError("exporting needs onnxscript: pip install 'sfa-onnx[torch]'") from error
    namespace = getattr(torch.ops, NAMESPACE)
    table = {}
    for name, op in OPERATORS.items():
        opset = onnxscript.values.Opset(op.domain, op.version)
        table[getattr(namespace, name).default] = _translation(op, opset)
    return table


def _translation(op: OpContract, opset: Any) -> Callable[..., Any]:
    """A function with the operator's own signature: the exporter reads it to sort arguments."""
    positional, keyword = arguments_of(op)
    tensors = [t.name for t in op.inputs]
    defaults = {a.name: a.default for a in op.attributes}

    def translate(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip((*positional, *keyword), args, strict=False)) | kwargs
        inputs = [given.get(name) for name in tensors]
        while inputs and inputs[-1] is None:
            inputs.pop()
        attributes = {n: given[n] if given.get(n) is not None else d for n, d in defaults.items()}
        node = getattr(opset, op.name)
        if results_of(op) == 1:
            return node(*inputs, **attributes)
        return node(*inputs, **attributes, _outputs=results_of(op))

    translate.__name__ = op.name
    translate.__signature__ = _signature(op, positional, keyword)  # type: ignore[attr-defined]
    return translate


def _signature(op: OpContract, positional: list[str], keyword: list[str]) -> inspect.Signature:
    kinds: dict[str, type] = {"float": float, "int": int, "string": str}
    attributes = {a.name: a for a in op.attributes}
    parameters = []
    for name in (*positional, *keyword):
        attribute = attributes.get(name)
        default = inspect.Parameter.empty if name in positional else None
        if attribute is not None and not attribute.required:
            default = attribute.default  # type: ignore[assignment]
        annotation = inspect.Parameter.empty if attribute is None else kinds[attribute.kind]
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=default,
                annotation=annotation,
            )
        )
    return inspect.Signature(parameters)
