"""The `atc` command line of a model: shapes from its inputs, dims from the user.

A symbolic dim is bound by name (`batch=4`), to a range (`seq=1~2048`) or to gears (`batch=1,2,4`:
atc compiles one plan per gear). Gears of several dims are taken each with each, or, when asked for,
together: the first with the first. A dim that is an expression ("past + 1", "Min(8, past + 1)")
follows the dims in it. A dim without a name is called `<input>:<axis>`. What stays unbound becomes
a shell variable that atc.sh asks for.
"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
from onnx import ModelProto, TensorProto

from sfa_onnx.errors import UsageError
from sfa_onnx.passes.shapes.dims import size_of

__all__ = ["AtcCommand", "bind_dims", "build", "free_dims"]

_SOC = re.compile(r"Ascend\d{3}[A-Za-z0-9_]*$")
_NUMBER = re.compile(r"[1-9]\d*$")
_LARGEST = (1 << 63) - 1  # what a file can hold
_RANGE = re.compile(r"([1-9]\d*)~([1-9]\d*)$")
_GEARS = re.compile(r"[1-9]\d*(,[1-9]\d*)+$")
_MOST_GEARS = 100
_SIGNS: dict[type, str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "/",
}  # fmt: skip
_EXPANDED = re.compile(r"\$\{(?:DIM|SHAPE)_\w+\}|\$\(\([\w +*/()<>?:-]+\)\)")
_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_FUNCTIONS = ("Min", "Max", "min", "max", "floor")
_WORD = re.compile(r"\w+$")
_VARIABLE = re.compile(r"\W+")


@dataclass
class AtcCommand:
    """One call of atc, free of the folder it runs in."""

    options: list[tuple[str, str]]  # ("--framework", "5") ...
    unbound: dict[str, str] = field(default_factory=dict)  # dim name -> shell variable
    notes: list[str] = field(default_factory=list)
    sizes: list[dict[str, int]] = field(default_factory=list)  # every choice, when all are bound

    def numbers(self, model: ModelProto) -> dict[str, int]:
        """The dims that are bound to one number."""
        if len(self.sizes) != 1:
            return {}
        free = free_dims(model)
        return {name: size for name, size in self.sizes[0].items() if name in free}

    def line(self, model: str, output: str) -> str:
        """The command for a shell, one option a line."""
        pairs = [("--model", model), *self.options, ("--output", output)]
        words = [f"{name}={_quote(value)}" for name, value in pairs]
        return "atc " + " \\\n    ".join(words)


def _quote(value: str) -> str:
    """Quoted for a shell; only the variables of unbound dims stay expandable."""
    if not _EXPANDED.search(value):
        return shlex.quote(value)
    parts = re.split(f"({_EXPANDED.pattern})", value)
    words = [f'"{p}"' if _EXPANDED.fullmatch(p) else shlex.quote(p) for p in parts if p]
    return "".join(words)


def _inputs(model: ModelProto) -> list[onnx.ValueInfoProto]:
    constants = {t.name for t in model.graph.initializer}
    return [v for v in model.graph.input if v.name not in constants]


def _dim_name(value: onnx.ValueInfoProto, axis: int) -> str | None:
    """The text of an open dim; None for a number, also one that is spelled as text."""
    dim = value.type.tensor_type.shape.dim[axis]
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return None
    if size_of(dim.dim_param, {}) is not None:
        return None
    return dim.dim_param or f"{value.name}:{axis}"


def _symbols(text: str) -> list[str]:
    """The symbols of a dim: itself, or those of the expression that it is."""
    names = [n for n in _SYMBOL.findall(text) if n not in _FUNCTIONS]
    probe = dict.fromkeys(names, 7)
    return list(probe) if size_of(text, probe) is not None else [text]


def free_dims(model: ModelProto) -> dict[str, list[str]]:
    """Dims without a number: name -> the inputs that carry it ("x[0]").

    Expressions are known by the names in them. An input without any shape appears under its own
    name.
    """
    found: dict[str, list[str]] = {}
    for value in _inputs(model):
        if not value.type.tensor_type.HasField("shape"):
            found[value.name] = [value.name]
        for axis in range(len(value.type.tensor_type.shape.dim)):
            name = _dim_name(value, axis)
            for symbol in [] if name is None else _symbols(name):
                found.setdefault(symbol, []).append(f"{value.name}[{axis}]")
    return found


def bind_dims(model: ModelProto, dims: Mapping[str, str | int]) -> ModelProto:
    """The model with the dims that `--input_shape` makes numbers written into its inputs.

    Other values keep their names; shape inference derives them from the inputs.

    Raises:
        UsageError: a size that no tensor has.
    """
    numbers = {name: int(v) for name, v in dims.items() if _NUMBER.match(str(v))}
    for symbol, number in numbers.items():
        if number > _LARGEST:
            raise UsageError(f"--dim {symbol}={number}: no tensor is so large, expected a size")
    if not numbers:
        return model
    bound = ModelProto()
    bound.CopyFrom(model)
    for value in (*bound.graph.input, *bound.graph.output, *bound.graph.value_info):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            name = _dim_name(value, axis)
            size = None if name is None else numbers.get(name) or size_of(name, numbers)
            if size is not None:
                dim.dim_value = size
    return bound


def build(
    model: ModelProto,
    *,
    soc_version: str,
    dims: Mapping[str, str | int] | None = None,
    paired: bool = False,
    external_weights: bool = False,
) -> AtcCommand:
    """The atc options for a model in the ATC flavour.

    Args:
        model: its graph inputs give names, order and shapes.
        soc_version: the exact chip: "Ascend" and the Name that `npu-smi info` shows.
        dims: symbolic dim -> number, "a~b" or gears "a,b,c".
        paired: gears change together; False: each with each.
        external_weights: the weights are files; the .om keeps them beside itself, too.

    Raises:
        UsageError: the chip's name, a binding's form or a bound dim is not as described.
    """
    if not _SOC.match(soc_version):
        raise UsageError(
            f"--soc-version {soc_version}: expected the exact chip, e.g. Ascend910B2 or"
            " Ascend910_9391 (npu-smi info shows the Name; put Ascend in front)"
        )
    bound = {name: str(value) for name, value in (dims or {}).items()}
    free = free_dims(model)
    _check_bindings(bound, free)
    command = AtcCommand([])
    for name, places in free.items():
        if places == [name]:
            command.unbound[name] = _variable("SHAPE", name)  # "1,2,3", as in --input_shape
        elif name not in bound:
            command.unbound[name] = _variable("DIM", name)
    choices = _choices(bound, paired=paired)
    if not command.unbound:
        command.sizes = choices
    shapes = [_shape(value, bound, choices, command.unbound) for value in _inputs(model)]
    command.options = [
        ("--framework", "5"),
        ("--input_format", "ND"),
        ("--input_shape", ";".join(shapes)),
        *_gears(model, bound, choices),
        ("--soc_version", soc_version),
        ("--precision_mode", "must_keep_origin_dtype"),
        ("--external_weight", "1" if external_weights else "0"),
        ("--log", "error"),
    ]
    _notes(model, bound, command)
    return command


def _variable(kind: str, name: str) -> str:
    return f"{kind}_{_VARIABLE.sub('_', name).strip('_').upper()}"


def _check_bindings(bound: dict[str, str], free: dict[str, list[str]]) -> None:
    for name, value in bound.items():
        if name not in free:
            known = ", ".join(sorted(free)) or "none: every dim is a number"
            raise UsageError(f"--dim {name}={value}: the model has no such dim; it has {known}")
        if not (_NUMBER.match(value) or _RANGE.match(value) or _GEARS.match(value)):
            raise UsageError(f"--dim {name}={value}: expected a number, a~b, or gears a,b,c")
        ends = _RANGE.match(value)
        if ends and int(ends[1]) > int(ends[2]):
            raise UsageError(f"--dim {name}={value}: the range is upside down")
    kinds = {"range" if "~" in v else "gears" for v in bound.values() if not _NUMBER.match(v)}
    if len(kinds) > 1:
        raise UsageError("--dim: atc takes ranges or gears in one model, not both")


def _choices(bound: dict[str, str], *, paired: bool) -> list[dict[str, int]]:
    """Every choice of sizes: one per gear, or the two ends of ranges.

    Raises:
        UsageError: there are more than atc takes, or paired gears of different numbers.
    """
    values = {name: [int(n) for n in re.split("[,~]", text)] for name, text in bound.items()}
    many = {name: sizes for name, sizes in values.items() if len(sizes) > 1}
    single = {name: sizes[0] for name, sizes in values.items() if len(sizes) == 1}
    if paired and len({len(sizes) for sizes in many.values()}) > 1:
        told = ", ".join(f"{name} has {len(sizes)}" for name, sizes in many.items())
        raise UsageError(f"--pair-gears: dims of as many gears each, got: {told}")
    if any(_RANGE.match(text) for text in bound.values()):
        paired = True  # the ends belong together
    rows = zip(*many.values(), strict=True) if paired else itertools.product(*many.values())
    found = [single | dict(zip(many, row, strict=True)) for row in rows] if many else [single]
    if len(found) > _MOST_GEARS:
        raise UsageError(f"--dim: {len(found)} gears, atc takes at most {_MOST_GEARS}")
    return found


def _shape(
    value: onnx.ValueInfoProto,
    bound: dict[str, str],
    choices: list[dict[str, int]],
    unbound: dict[str, str],
) -> str:
    if not value.type.tensor_type.HasField("shape"):  # not even the rank is known
        return f"{value.name}:${{{unbound[value.name]}}}"
    parts = []
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
        name = _dim_name(value, axis)
        if name is None:
            declared = dim.HasField("dim_value")  # 0 too: rows without elements
            parts.append(str(dim.dim_value if declared else size_of(dim.dim_param, {})))
        elif any(symbol in unbound for symbol in _symbols(name)):
            parts.append(_for_shell(name, bound, unbound))
        else:
            parts.append(_bound_shape(name, bound, choices))
    return f"{value.name}:{','.join(parts)}"


def _bound_shape(name: str, bound: dict[str, str], choices: list[dict[str, int]]) -> str:
    """A number, a range, or -1 for gears."""
    sizes = [_size(name, choice) for choice in choices]
    ranged = any(_RANGE.match(bound[symbol]) for symbol in _symbols(name))
    if ranged and min(sizes) != max(sizes):
        return f"{min(sizes)}~{max(sizes)}"
    return str(sizes[0]) if len(set(sizes)) == 1 and not _is_geared(name, bound) else "-1"


def _is_geared(name: str, bound: dict[str, str]) -> bool:
    return any(_GEARS.match(bound.get(symbol, "")) for symbol in _symbols(name))


def _size(name: str, choice: Mapping[str, int]) -> int:
    """The size of a dim under one choice.

    Raises:
        UsageError: the expression has no size there.
    """
    size = choice.get(name) or size_of(name, choice)
    if size is None or size < 0:
        raise UsageError(f"--dim: {name} is no size at {dict(choice)}")
    return size


def _for_shell(name: str, bound: dict[str, str], unbound: dict[str, str]) -> str:
    """An open dim as the shell will fill it in; what it is made of is left to its arithmetic."""
    if name in unbound:
        return "${" + unbound[name] + "}"
    values = {s: unbound.get(s) or bound[s] for s in _symbols(name)}
    text = None
    if all(_WORD.match(v) for v in values.values()):
        text = _arithmetic(ast.parse(name, mode="eval").body, values)
    if text is None:
        raise UsageError(f"--dim: {name} follows {', '.join(values)}: bind them to numbers")
    return f"$(({text[1:-1] if text.startswith('(') else text}))"


def _arithmetic(tree: ast.expr, values: Mapping[str, str]) -> str | None:
    """An expression of dims in the shell's arithmetic; None for what that does not have."""
    match tree:
        case ast.Constant(value=int(number)):
            return str(number)
        case ast.Name(id=name):
            return values.get(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _SIGNS:
            parts = [_arithmetic(side, values) for side in (left, right)]
            return None if None in parts else f"({parts[0]} {_SIGNS[type(op)]} {parts[1]})"
        case ast.Call(func=ast.Name(id="Min" | "min" | "Max" | "max" as name), args=args) if args:
            return _least_or_greatest([_arithmetic(a, values) for a in args], name)
    return None


def _least_or_greatest(parts: list[str | None], name: str) -> str | None:
    known = [p for p in parts if p is not None]
    if len(known) != len(parts):
        return None
    sign, text = "<" if name in ("Min", "min") else ">", known[0]
    for other in known[1:]:
        text = f"({text} {sign} {other} ? {text} : {other})"
    return text


def _gears(
    model: ModelProto, bound: dict[str, str], choices: list[dict[str, int]]
) -> list[tuple[str, str]]:
    """--dynamic_dims: per gear the value of every -1, in the order of the input shapes."""
    order = [
        name
        for value in _inputs(model)
        for axis in range(len(value.type.tensor_type.shape.dim))
        if (name := _dim_name(value, axis)) is not None and _is_geared(name, bound)
    ]
    if not order:
        return []
    gears = [",".join(str(_size(name, choice)) for name in order) for choice in choices]
    return [("--dynamic_dims", ";".join(gears))]


def _notes(model: ModelProto, bound: dict[str, str], command: AtcCommand) -> None:
    dynamic = {n for n, v in bound.items() if not _NUMBER.match(v)}
    for value in _inputs(model):
        axes = range(len(value.type.tensor_type.shape.dim))
        if value.type.tensor_type.elem_type == TensorProto.INT8 and any(
            dynamic & set(_symbols(_dim_name(value, axis) or "")) for axis in axes
        ):
            command.notes.append(
                f"input {value.name} is int8 with a dynamic dim: documented as not supported; bind"
                " its dims to numbers"
            )
    for name, variable in command.unbound.items():
        if variable.startswith("SHAPE_"):
            text = f'input {name} has no shape: run {variable}="1,2,3" bash atc.sh'
        else:
            text = f"dim {name} has no value: give --dim {name}=N, or {variable}=N bash atc.sh"
        command.notes.append(text)
