"""Writing the torch operators, under every name, as the nodes of the contract.

`export` does it in one call. `translation_table` is for `torch.onnx.export(dynamo=True)` itself,
`register_symbolics` for its older TorchScript exporter. How a call rounds is the caller's choice,
not the node's, and is not written.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import onnx
import torch

from sfa_onnx.errors import ContractError, MissingError
from sfa_onnx.operator.contract import OpContract
from sfa_onnx.operator.op import LIGHTNING_INDEXER
from sfa_onnx.torch.ops import NAMESPACE, OPERATORS, OVERLOADS
from sfa_onnx.torch.vendor import Adapter, schema_in_torch, vendor_operators

__all__ = ["export", "register_symbolics", "translation_table"]

_KINDS: Final = {"float": float, "int": int, "bool": bool, "str": str}
_OPSETS: Final = {"npu": 1, NAMESPACE: 1}


def export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    dynamo: bool = True,
    **options: Any,
) -> None:
    """Export a model that calls the operators, under whatever names, to an ONNX file.

    Args:
        model: in eval mode; gradients are off while it is traced.
        args: example inputs.
        path: the file; weights beyond 2 GiB go beside it.
        kwargs: example inputs by name.
        dynamic_shapes: as for `torch.export.export`; None: every size stays what it is.
        dynamo: False takes the TorchScript exporter, while torch has one; it wants `dynamic_axes`.
        options: handed to `torch.onnx.export`.

    Raises:
        MissingError: onnxscript is missing, or this torch has no TorchScript exporter.
    """
    given: dict[str, Any] = {"kwargs": dict(kwargs or {}), "verbose": False} | options
    if dynamo:
        table = translation_table() | dict(given.pop("custom_translation_table", None) or {})
        given |= {"custom_translation_table": table, "dynamic_shapes": dynamic_shapes}
    else:
        register_symbolics()
        given["custom_opsets"] = _OPSETS | dict(given.get("custom_opsets") or {})
    with torch.no_grad(), warnings.catch_warnings():
        if not dynamo:  # the caller asked for the older exporter and needs no lecture on it
            warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(model, args, os.fspath(path), dynamo=dynamo, **given)


def _adapters() -> list[Adapter]:
    """Every name and overload that torch has now, ours and the vendors'."""
    names = [(f"{NAMESPACE}::{name}", overload, OPERATORS[name]) for name, overload in OVERLOADS]
    names += [(vendor.qualified, "", vendor.op) for vendor in vendor_operators()]
    schemas = [(schema_in_torch(name, overload), op) for name, overload, op in names]
    return [Adapter(op, schema) for schema, op in schemas if schema is not None]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(..., dynamo=True, custom_translation_table=translation_table())`.

    Holds the names that exist when it is made: call `enable_ascend_names()` before. All attributes
    are written on the node, also those at their defaults; `value` is the key again.

    Raises:
        MissingError: onnxscript is not installed.
    """
    try:
        import onnxscript
    except ImportError as error:
        raise MissingError("exporting needs onnxscript: pip install 'sfa-onnx[torch]'") from error
    table = {}
    for adapter in _adapters():
        namespace, name = adapter.schema.name.split("::")
        packet = getattr(getattr(torch.ops, namespace), name)
        overload = getattr(packet, adapter.schema.overload_name or "default")
        opset = onnxscript.values.Opset(adapter.op.domain, adapter.op.version)
        table[overload] = _translation(adapter, opset, onnxscript.opset18)
    return table


def _translation(adapter: Adapter, opset: Any, standard: Any) -> Callable[..., Any]:
    """A function with the operator's own signature: the exporter reads it to sort arguments."""

    def translate(*args: Any, **kwargs: Any) -> Any:
        given, attributes = _bound(adapter, args, kwargs)
        inputs, count = _inputs(adapter.op, given), _outputs(adapter, attributes)
        node = getattr(opset, adapter.op.name)
        made = node(*inputs, **attributes, _outputs=count)
        if count > 1:
            return made
        result = made[0] if isinstance(made, Sequence) else made
        if adapter.results == 1:
            return result
        empty = standard.Constant(value=onnx.helper.make_tensor("", 1, [0], []))
        if adapter.op is LIGHTNING_INDEXER:
            empty = standard.CastLike(empty, given["query"])
        return (result, *[empty] * (adapter.results - 1))

    translate.__name__ = adapter.op.name
    translate.__signature__ = _signature(adapter.schema)  # type: ignore[attr-defined]
    return translate


def _bound(
    adapter: Adapter, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and attributes of the node."""
    given, attributes = adapter.bind(args, kwargs)
    if adapter.lse_beyond_node and attributes.pop("return_softmax_lse"):
        raise ContractError(
            f"return_softmax_lse: expected False in an export ({adapter.op.name} has no softmax"
            " among its outputs: CANN's operator has none), got True"
        )
    kind = adapter.given(args, kwargs).get("key_dtype")
    if kind is not None or "float8" in str(getattr(given.get("key"), "dtype", "")).lower():
        raise ContractError(
            f"key: expected int8 in an export ({adapter.op.name} holds no 8-bit floats), got"
            f" key_dtype {kind} or float8"
        )
    return given, attributes


def _inputs(op: OpContract, given: Mapping[str, Any]) -> list[Any]:
    """Node inputs in order, None where one is absent; `value` is the key."""
    named = dict(given)
    if "value" in (t.name for t in op.inputs):
        named["value"] = named["key"]
    inputs = [named.get(t.name) for t in op.inputs]
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def _outputs(adapter: Adapter, attributes: Mapping[str, Any]) -> int:
    """How many outputs the node has: what a schema returns but nobody asked for is not among."""
    asked = attributes.get("return_values", attributes.get("return_softmax_lse", 0))
    return adapter.results if asked else 1


def _signature(schema: torch.FunctionSchema) -> inspect.Signature:
    parameters = []
    for argument in schema.arguments:
        kind = str(argument.type)
        optional = argument.has_default_value()
        named = inspect.Parameter.KEYWORD_ONLY
        parameters.append(
            inspect.Parameter(
                argument.name,
                named if argument.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value if optional else inspect.Parameter.empty,
                annotation=_KINDS.get(kind, inspect.Parameter.empty),
            )
        )
    return inspect.Signature(parameters)


# The TorchScript exporter.


def register_symbolics() -> None:
    """Teach the TorchScript exporter the names that exist now.

    Exports then need `custom_opsets={"npu": 1, "sfa_onnx": 1}`, which `export` gives.

    Raises:
        MissingError: this torch has no such exporter any more.
    """
    register = getattr(torch.onnx, "register_custom_op_symbolic", None)
    if register is None:
        raise MissingError(
            f"torch {torch.__version__} has no TorchScript exporter: use the default dynamo=True"
        )
    by_name: dict[str, list[Adapter]] = {}
    for adapter in _adapters():
        by_name.setdefault(adapter.schema.name, []).append(adapter)
    for name, overloads in by_name.items():
        register(name, _symbolic(overloads), 11)


def _symbolic(overloads: Sequence[Adapter]) -> Callable[..., Any]:
    """For one name; the exporter does not say which overload is meant, but gives all arguments."""
    by_count = {len(a.schema.arguments): _symbolic_of(a) for a in overloads}

    def symbolic(graph: Any, *values: Any) -> Any:
        return by_count[len(values)](graph, *values)

    return symbolic


def _symbolic_of(adapter: Adapter) -> Callable[..., Any]:
    from torch.onnx import symbolic_helper as helper

    letters = {"float": "f", "int": "i", "string": "s"}
    kinds = {a.name: letters[a.kind] for a in adapter.op.attributes}
    plain = {a.name: str(a.type) for a in adapter.schema.arguments}

    def parsed(name: str, value: Any) -> Any:
        if value.node().mustBeNone():
            return None
        if "Tensor" in plain[name]:
            return value
        kind = plain[name].removeprefix("Optional[").rstrip("]")
        return helper._parse_arg(value, {"float": "f", "str": "s"}.get(kind, "i"))

    def symbolic(graph: Any, *values: Any) -> Any:
        words = dict(zip(plain, values, strict=False))
        tensors, attributes = _bound(adapter, (), {n: parsed(n, v) for n, v in words.items()})
        inputs = [
            helper._optional_input_placeholder_tensor(graph) if v is None else v
            for v in _inputs(adapter.op, tensors)
        ]
        count = _outputs(adapter, attributes)
        written = {f"{n}_{kinds[n]}": v for n, v in attributes.items()}
        node = f"{adapter.op.domain}::{adapter.op.name}"
        made = graph.op(node, *inputs, **written, outputs=count)
        results = list(made) if count > 1 else [made]
        while len(results) < adapter.results:
            results.append(graph.op("Constant", value_t=torch.zeros(0)))
        return tuple(results) if adapter.results > 1 else results[0]

    return symbolic
