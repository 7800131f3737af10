"""The `atc` command line of a model: shapes from its inputs, dims from the user.

A symbolic dim is bound by name (`batch=4`), to a range (`seq=1~2048`) or to gears (`batch=1,2,4`:
atc compiles one plan per gear). A dim without a name is called `<input>:<axis>`. What stays unbound
becomes a shell variable that atc.sh asks for.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
from onnx import ModelProto, TensorProto

from sfa_onnx.errors import UsageError

__all__ = ["AtcCommand", "bind_dims", "build", "free_dims"]

_SOC = re.compile(r"Ascend\d{3}[A-Za-z0-9_]*$")
_NUMBER = re.compile(r"[1-9]\d*$")
_RANGE = re.compile(r"([1-9]\d*)~([1-9]\d*)$")
_GEARS = re.compile(r"[1-9]\d*(,[1-9]\d*)+$")
_MOST_GEARS = 100
_EXPANDED = re.compile(r"\$\{(?:DIM|SHAPE)_\w+\}")
_VARIABLE = re.compile(r"\W+")


@dataclass
class AtcCommand:
    """One call of atc, free of the folder it runs in."""

    options: list[tuple[str, str]]  # ("--framework", "5") ...
    unbound: dict[str, str] = field(default_factory=dict)  # dim name -> shell variable
    notes: list[str] = field(default_factory=list)

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
    dim = value.type.tensor_type.shape.dim[axis]
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return None
    return dim.dim_param or f"{value.name}:{axis}"


def free_dims(model: ModelProto) -> dict[str, list[str]]:
    """Dims without a number: name -> the inputs that carry it ("x[0]").

    An input without any shape appears under its own name.
    """
    found: dict[str, list[str]] = {}
    for value in _inputs(model):
        if not value.type.tensor_type.HasField("shape"):
            found[value.name] = [value.name]
        for axis in range(len(value.type.tensor_type.shape.dim)):
            name = _dim_name(value, axis)
            if name is not None:
                found.setdefault(name, []).append(f"{value.name}[{axis}]")
    return found


def bind_dims(model: ModelProto, dims: Mapping[str, str | int]) -> ModelProto:
    """The model with the dims that `--input_shape` makes numbers written into its inputs.

    Other values keep their names; shape inference derives them from the inputs.
    """
    numbers = {name: int(v) for name, v in dims.items() if _NUMBER.match(str(v))}
    if not numbers:
        return model
    bound = ModelProto()
    bound.CopyFrom(model)
    for value in (*bound.graph.input, *bound.graph.output, *bound.graph.value_info):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            name = _dim_name(value, axis)
            if name in numbers:
                dim.dim_value = numbers[name]
    return bound


def build(
    model: ModelProto,
    *,
    soc_version: str,
    dims: Mapping[str, str | int] | None = None,
    external_weights: bool = False,
) -> AtcCommand:
    """The atc options for a model in the ATC flavour.

    Args:
        model: its graph inputs give names, order and shapes.
        soc_version: the exact chip: "Ascend" and the Name that `npu-smi info` shows.
        dims: symbolic dim -> number, "a~b" or gears "a,b,c".
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
    shapes = [_shape(value, bound, command.unbound) for value in _inputs(model)]
    command.options = [
        ("--framework", "5"),
        ("--input_format", "ND"),
        ("--input_shape", ";".join(shapes)),
        *_gears(model, bound),
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


def _shape(value: onnx.ValueInfoProto, bound: dict[str, str], unbound: dict[str, str]) -> str:
    if not value.type.tensor_type.HasField("shape"):  # not even the rank is known
        return f"{value.name}:${{{unbound[value.name]}}}"
    parts = []
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
        name = _dim_name(value, axis)
        if name is None:
            parts.append(str(dim.dim_value))
        elif name in unbound:
            parts.append("${" + unbound[name] + "}")
        else:
            parts.append("-1" if _GEARS.match(bound[name]) else bound[name])
    return f"{value.name}:{','.join(parts)}"


def _gears(model: ModelProto, bound: dict[str, str]) -> list[tuple[str, str]]:
    """--dynamic_dims: per gear the value of every -1, in the order of the input shapes."""
    geared = {n: v.split(",") for n, v in bound.items() if _GEARS.match(v)}
    if not geared:
        return []
    names = list(geared)
    lengths = {len(v) for v in geared.values()}
    choices = (
        list(zip(*geared.values(), strict=True))  # equal lists: gear i takes value i of each
        if len(lengths) == 1
        else list(itertools.product(*geared.values()))
    )
    if len(choices) > _MOST_GEARS:
        raise UsageError(f"--dim: {len(choices)} gears, atc takes at most {_MOST_GEARS}")
    order = [
        name
        for value in _inputs(model)
        for axis in range(len(value.type.tensor_type.shape.dim))
        if (name := _dim_name(value, axis)) in geared
    ]
    gears = []
    for choice in choices:
        values = dict(zip(names, choice, strict=True))
        gears.append(",".join(values[name] for name in order if name is not None))
    return [("--dynamic_dims", ";".join(gears))]


def _notes(model: ModelProto, bound: dict[str, str], command: AtcCommand) -> None:
    dynamic = {n for n, v in bound.items() if not _NUMBER.match(v)}
    for value in _inputs(model):
        axes = range(len(value.type.tensor_type.shape.dim))
        if value.type.tensor_type.elem_type == TensorProto.INT8 and any(
            _dim_name(value, axis) in dynamic for axis in axes
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
