"""Write docs/reference/ from the code: operators from the contract, the command from its parser.

`python -m scripts.write_reference` rewrites both pages; a test fails when they are stale.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sfa_onnx.cli import build_parser
from sfa_onnx.operator.contract import Attribute, OpContract, Tensor
from sfa_onnx.operator.op import ALL_OPS, BINDINGS

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
_NOTE = "Written by `python -m scripts.write_reference`; do not edit."


def operators() -> str:
    """Every operator: inputs, outputs and attributes in the contract's order."""
    axes = (
        "Axes: B batch, T packed tokens, S1 and S2 length of queries and keys, N1 heads, K entries"
        " of a row of `sparse_indices`, D bytes of a packed row, C latent width, R rope width, Hi"
        " and Di heads and width of the indexer."
    )
    return "\n".join(["# Inputs and attributes", "", _NOTE, "", axes, "", *map(_operator, ALL_OPS)])


def _operator(op: OpContract) -> str:
    bound = [f"`{b.ge_type}` ({b.since})" for b in BINDINGS if b.contract.name == op.name]
    lines = [f"## {op.domain}::{op.name}", "", op.doc, ""]
    if bound:
        lines += [f"On the NPU: {', '.join(bound)}.", ""]
    lines += ["| input | types | shape |", "| --- | --- | --- |"]
    lines += [_tensor(op, t) for t in op.inputs]
    lines += ["", "| output | types | shape |", "| --- | --- | --- |"]
    lines += [_tensor(op, t) for t in op.outputs]
    lines += ["", "| attribute | type | default | on CPU | on the NPU |", f"|{' --- |' * 5}"]
    lines += [_attribute(a) for a in op.attributes]
    return "\n".join([*lines, ""])


def _tensor(op: OpContract, tensor: Tensor) -> str:
    types = ", ".join(t.removeprefix("tensor(").rstrip(")") for t in op.types_of(tensor))
    name = f"{tensor.name} (optional)" if tensor.optional else tensor.name
    return f"| {name} | {types} | {_cell(tensor.shape)} |"


def _attribute(a: Attribute) -> str:
    default = "required" if a.default is None else f"`{a.default}`"
    floor = f">= {a.minimum}" if a.minimum is not None else "any"
    cpu = ", ".join(f"`{v}`" for v in a.cpu) if a.cpu is not None else floor
    npu = ", ".join(f"`{v}`" for v in a.npu) if a.npu is not None else floor
    return f"| {a.name} | {a.kind} | {default} | {cpu} | {npu} |"


def command() -> str:
    """Every verb of `sfa-onnx`, its arguments and its help."""
    parser = build_parser()
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    told = {a.dest: a.help for a in verbs._choices_actions}
    lines = ["# The command", "", _NOTE, "", parser.description or "", ""]
    lines += ["Exit codes: 0 done, 1 error, 2 usage, 3 an expectation or a validation was not met,"]
    lines += ["130 interrupted."]
    for name, verb in verbs.choices.items():
        example, _, codes = (verb.epilog or "").removeprefix("example:\n").partition("\n\n")
        lines += ["", f"## sfa-onnx {name}", "", f"{verb.description or told[name]}", ""]
        lines += ["```text", example.strip(), "```", "", f"{codes.capitalize()}.", ""]
        lines += ["| argument | what it is | default |", "| --- | --- | --- |"]
        lines += [_argument(a) for a in verb._actions if a.dest != "help"]
    return "\n".join([*lines, ""])


def _argument(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or action.dest.upper()
    if action.option_strings and action.nargs != 0:
        name += f" {action.metavar or action.dest.upper()}"
    text = action.help or ""
    if action.choices:
        text += f" ({', '.join(map(str, action.choices))})"
    plain = action.default in (None, False, argparse.SUPPRESS) or action.default == []
    return f"| `{_cell(name)}` | {_cell(text)} | {'' if plain else f'`{action.default}`'} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("%%", "%")


PAGES = {"operators.md": operators, "command.md": command}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (FOLDER / page).write_text(make(), encoding="utf-8")
