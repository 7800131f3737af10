"""Sizes for dims that a file spells as expressions of symbols."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

import onnx

from sfa_onnx.files.onnx_attrs import graphs
from sfa_onnx.passes.shapes.size import broadcast, greatest, least

__all__ = ["size_of", "text_of", "write_numbers"]

_ENDLESS = 1 << 63  # no dim is so large
_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: lambda a, b: a - a // b * b,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "Min": least,
    "Max": broadcast,
    "min": least,
    "max": greatest,
    "floor": lambda x: x,
}


def size_of(text: str | None, symbols: Mapping[str, int]) -> int | None:
    """The size a dim_param such as "seq", "s27 + 1" or "Min(8, seq)" stands for; None: of none."""
    if not text:
        return None
    if text in symbols:
        return symbols[text]
    if len(text) > 200:
        return None
    try:
        size = _evaluate(ast.parse(text, mode="eval").body, symbols)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, TypeError):
        return None
    return None if type(size) is int and not 0 <= size < _ENDLESS else size


def _evaluate(tree: ast.expr, symbols: Mapping[str, int]) -> int:
    match tree:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return symbols[name]
        case ast.BinOp(left=left, op=op, right=right):
            if isinstance(op, ast.Pow):
                raise ValueError(text_of(tree))
            return _OPERATORS[type(op)](_evaluate(left, symbols), _evaluate(right, symbols))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, symbols)
        case ast.Call(func=ast.Name(id=name), args=args):
            return _FUNCTIONS[name](*(_evaluate(a, symbols) for a in args))
    raise ValueError(text_of(tree))


def text_of(tree: ast.expr) -> str:
    """The source of an expression, for messages."""
    return ast.unparse(tree)


def write_numbers(graph: onnx.GraphProto) -> int:
    """Write dims that are a number spelled as text ("32", as transformers' exporter does) as one.

    In place, in the graph and all below it; returns how many.
    """
    count = 0
    for part in graphs(graph):
        for value in (*part.input, *part.output, *part.value_info):
            for dim in value.type.tensor_type.shape.dim:
                size = size_of(dim.dim_param, {}) if dim.dim_param else None
                if size is not None and size >= 0:
                    dim.dim_value = size
                    count += 1
    return count
