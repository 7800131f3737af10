"""The plug-in's tables, C++ and Python, written from the contract (`sfa_onnx.op`).

`python -m sfa_onnx.ascend.handover.package_tables` rewrites both files; a test fails when they
are stale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sfa_onnx.ascend.flavour.nodes import EXACT_SUFFIX, ROPE_DTYPE
from sfa_onnx.operator.contract import Attribute, OpContract
from sfa_onnx.operator.op import BINDINGS, EXPANDED, KV_CACHE_PACK

__all__ = ["CPP_TABLE", "PYTHON_TABLE", "cpp_table", "python_table"]

CPP_TABLE = "plugin/attribute_table.h"
PYTHON_TABLE = "python/sfa_onnx_ge_plugin/_tables.py"
_TYPES = {"float": "kFloat", "int": "kInt", "string": "kString"}
_NOTE = (
    "Written by sfa_onnx.ascend.handover.package_tables from sfa_onnx/operator/op.py; do not edit."
)


def _ops() -> Iterator[tuple[str, OpContract, str, int]]:
    """(ONNX node type, contract, GE type, its outputs) of everything the plug-in registers."""
    for binding in BINDINGS:
        yield binding.atc_type, binding.contract, binding.ge_type, len(binding.ge_outputs)
    for contract in EXPANDED:
        yield contract.name, contract, "PartitionedCall", len(contract.outputs)


def _companions(contract: OpContract) -> list[str]:
    names = [a.name + EXACT_SUFFIX for a in contract.attributes if a.kind == "float"]
    return names + ([ROPE_DTYPE] if contract is KV_CACHE_PACK else [])


def _tuple(names: list[str]) -> str:
    return "(" + ", ".join(f'"{n}"' for n in names) + ("," if len(names) == 1 else "") + ")"


def _attribute(attribute: Attribute) -> str:
    ge_bool = "true" if attribute.ge_kind == "bool" else "false"
    return f'    {{"{attribute.name}", {_TYPES[attribute.kind]}, {ge_bool}}},'


def _cpp_op(onnx_type: str, contract: OpContract, ge_type: str, outputs: int) -> list[str]:
    base = f"k{onnx_type.removeprefix('NPU')}"
    lines = [f"constexpr InputSpec {base}Inputs[] = {{"]
    lines += [
        f'    {{"{t.name}", {"false" if t.optional else "true"}}},' for t in contract.ge_inputs
    ]
    lines.append("};")
    if contract.attributes:
        lines.append(f"constexpr AttributeSpec {base}Attributes[] = {{")
        lines += [*(_attribute(a) for a in contract.attributes), "};"]
    attributes = f"{base}Attributes" if contract.attributes else "nullptr"
    companions = _companions(contract)
    if companions:
        names = ", ".join(f'"{c}"' for c in companions)
        lines.append(f"constexpr const char* {base}Companions[] = {{{names}}};")
    extra = f"{base}Companions, {len(companions)}" if companions else "nullptr, 0"
    lines += [
        f'constexpr OpTable {base} = {{"{onnx_type}", "{contract.domain}", "{ge_type}",',
        f"    {base}Inputs, {len(contract.ge_inputs)}, {attributes},"
        f" {len(contract.attributes)}, {extra}, {outputs}}};",
        "",
    ]
    return lines


def cpp_table() -> str:
    """The text of `attribute_table.h`."""
    lines = [
        f"// {_NOTE}",
        "// clang-format off",
        "#ifndef SFA_ONNX_ASCEND_ATTRIBUTE_TABLE_H_",
        "#define SFA_ONNX_ASCEND_ATTRIBUTE_TABLE_H_",
        "",
        "#include <cstddef>",
        "",
        '#include "attributes.h"',
        "",
        "namespace sfa_onnx {",
        "",
        "struct InputSpec {",
        "  const char* name;",
        "  bool required;",
        "};",
        "",
        "struct AttributeSpec {",
        "  const char* name;",
        "  int type;      // as ONNX writes it",
        "  bool ge_bool;  // GE's attribute is a bool where ONNX has an INT",
        "};",
        "",
        "struct OpTable {",
        "  const char* onnx_type;",
        "  const char* domain;",
        "  const char* ge_type;",
        "  const InputSpec* inputs;",
        "  size_t input_count;",
        "  const AttributeSpec* attributes;",
        "  size_t attribute_count;",
        "  const char* const* companions;  // attributes for this plug-in only, never given to GE",
        "  size_t companion_count;",
        "  size_t output_count;",
        "};",
        "",
    ]
    for entry in _ops():
        lines += _cpp_op(*entry)
    lines += ["}  // namespace sfa_onnx", "", "#endif  // SFA_ONNX_ASCEND_ATTRIBUTE_TABLE_H_", ""]
    return "\n".join(lines)


def python_table() -> str:
    """The text of `_tables.py`, the same facts for GE's Python plug-in interface."""
    lines = [f'"""{_NOTE}"""', "", "OPS = ("]
    for onnx_type, contract, ge_type, outputs in _ops():
        if contract in EXPANDED:
            continue  # that interface cannot expand a node to a graph
        lines += [
            "    {",
            f'        "onnx_type": "{onnx_type}",',
            f'        "domain": "{contract.domain}",',
            f'        "ge_type": "{ge_type}",',
            "        # (name, required)",
            '        "inputs": (',
            *(f'            ("{t.name}", {not t.optional}),' for t in contract.ge_inputs),
            "        ),",
            "        # (name, ONNX kind, GE's attribute is a bool)",
            '        "attributes": (',
            *(
                f'            ("{a.name}", "{a.kind}", {a.ge_kind == "bool"}),'
                for a in contract.attributes
            ),
            "        ),",
            f'        "companions": {_tuple(_companions(contract))},',
            f'        "outputs": {outputs},',
            "    },",
        ]
    return "\n".join([*lines, ")", ""])


def write(root: Path) -> None:
    """Write both tables below `root` (the folder `kernels/ascend`)."""
    (root / CPP_TABLE).write_text(cpp_table())
    (root / PYTHON_TABLE).write_text(python_table())


if __name__ == "__main__":
    write(Path(__file__).parents[3] / "kernels" / "ascend")
