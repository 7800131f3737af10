"""What a contract is made of: the vocabulary of the tables in `sfa_onnx.op`."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from sfa_onnx.errors import ContractError

AttributeValue = float | int | str
Kind = Literal["float", "int", "string"]
# What becomes of int8 * scale before it is multiplied on, a choice of the caller: nothing, or the
# roundings of CANN's kernels (attention: to the query's type; quantised indexer: its two float16
# steps).
Rounding = Literal["exact", "npu"]

# Type strings as onnx spells them.
FLOAT, HALF, BF16 = "tensor(float)", "tensor(float16)", "tensor(bfloat16)"
INT8, INT32 = "tensor(int8)", "tensor(int32)"
FLOATS: Final = (FLOAT, HALF, BF16)

INT32_MAX: Final = 2**31 - 1

_PYTHON_TYPES: Final = {"float": (float, int), "int": (int,), "string": (str,)}


@dataclass(frozen=True)
class Tensor:
    """One input or output: its name, legal types and shape (a doc string, axes as above).

    `types` may be a type variable ("T") that `OpContract.type_variables` resolves. `released` says
    whether a released CANN has it; the parsers of released lines drop what an operator lacks.
    """

    name: str
    types: str | tuple[str, ...]
    shape: str
    optional: bool = False
    released: bool = True


@dataclass(frozen=True)
class Attribute:
    """One attribute. `default` None: required.

    `cpu` and `npu` are the legal values where they are a fixed set (None: a rule decides, or any).
    `write` is what our passes write (None: decided per site). `minimum` bounds an int from below,
    and such an int fits into 32 bits. A float is finite as the float32 that a node holds.
    """

    name: str
    kind: Kind
    default: AttributeValue | None = None
    cpu: tuple[AttributeValue, ...] | None = None
    npu: tuple[AttributeValue, ...] | None = None
    write: AttributeValue | None = None
    minimum: int | None = None
    ge_kind: str = ""  # GE's type where it differs from `kind`: "bool"

    @property
    def required(self) -> bool:
        """Whether a node without this attribute is invalid."""
        return self.default is None

    @property
    def usual(self) -> AttributeValue | None:
        """What a caller who does not say means; None where every call has its own value."""
        if self.write is not None:
            return self.write
        if self.npu and (len(self.npu) == 1 or self.default is None):
            return self.npu[0]
        return self.default

    def problem(self, value: AttributeValue | None) -> str | None:
        """Why `value` is illegal on CPU; None when it is legal."""
        if value is None:
            return f"expected a {self.kind}, but it is missing"
        if not isinstance(value, _PYTHON_TYPES[self.kind]):
            return f"expected a {self.kind}, got {value!r}"
        if self.cpu is not None and value not in self.cpu:
            return f"expected {' or '.join(map(str, self.cpu))}, got {value!r}"
        if self.kind == "float" and not _finite_float32(value):
            return f"expected a finite float32, got {value!r}"
        if self.minimum is not None and isinstance(value, int):
            if value < self.minimum:
                return f"expected >= {self.minimum}, got {value!r}"
            if value > INT32_MAX:
                return f"expected <= {INT32_MAX}, got {value!r}"
        return None


def _finite_float32(value: AttributeValue) -> bool:
    try:
        return math.isfinite(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:  # of a number too large for its 32 bits
        return False


@dataclass(frozen=True)
class OpContract:
    """The whole contract of one ONNX operator type."""

    name: str
    domain: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    type_variables: tuple[tuple[str, tuple[str, ...]], ...]
    doc: str
    version: int = 1
    # The same call under other names, understood on input: (domain, op_type).
    spellings: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """(domain, op_type), the way a node names this operator."""
        return (self.domain, self.name)

    @property
    def ge_inputs(self) -> tuple[Tensor, ...]:
        """The inputs of the GE operator in released CANN lines."""
        return tuple(t for t in self.inputs if t.released)

    def input_index(self, name: str) -> int:
        """Position of input `name`."""
        return [t.name for t in self.inputs].index(name)

    def attribute(self, name: str) -> Attribute:
        """The attribute called `name`."""
        return next(a for a in self.attributes if a.name == name)

    def types_of(self, tensor: Tensor) -> tuple[str, ...]:
        """The onnx type strings legal for `tensor`, type variables resolved."""
        if isinstance(tensor.types, tuple):
            return tensor.types
        return dict(self.type_variables).get(tensor.types, (tensor.types,))

    def check_inputs(self, given: Sequence[str]) -> None:
        """Refuse a node that leaves out an input which is not optional.

        Args:
            given: the node's inputs, in the order of `inputs`; "" where one is left out.

        Raises:
            ContractError: naming the input.
        """
        for position, tensor in enumerate(self.inputs):
            if not tensor.optional and not "".join(given[position : position + 1]):
                raise ContractError(
                    f"{self.name}: input {tensor.name}: expected a tensor, but it is missing; give"
                    " every input that is not optional"
                )

    def check_attributes(self, values: Mapping[str, AttributeValue]) -> None:
        """Refuse attributes that are missing, unknown, of the wrong kind or illegal on CPU.

        Raises:
            ContractError: naming the attribute, what is legal and what was given.
        """
        known = {a.name: a for a in self.attributes}
        for name in values.keys() - known.keys():
            raise ContractError(f"{self.name}: no attribute {name!r}; known are {sorted(known)}")
        for attribute in self.attributes:
            problem = attribute.problem(values.get(attribute.name, attribute.default))
            if problem:
                raise ContractError(f"{self.name}: attribute {attribute.name}: {problem}")

    def complete(self, values: Mapping[str, AttributeValue]) -> dict[str, AttributeValue]:
        """All attributes, checked; those not in `values` as our passes or the NPU have them.

        Raises:
            ContractError: as `check_attributes`.
        """
        usual = {a.name: a.usual for a in self.attributes}
        filled = {k: v for k, v in usual.items() if v is not None} | dict(values)
        self.check_attributes(filled)
        return {a.name: filled[a.name] for a in self.attributes}

    def carried_to(self, other: OpContract, values: Mapping[str, AttributeValue]) -> None:
        """Refuse to write a call as another operator that lacks one of its attributes.

        What `other` lacks may be left out where it has the only legal, or the usual, value.

        Args:
            other: the operator the call is to be written as.
            values: the call's attributes by name.

        Raises:
            ContractError: naming the attribute, its value and the one that could be carried.
        """
        there = {a.name for a in other.attributes}
        for spec in self.attributes:
            value = values.get(spec.name)
            if spec.name in there or value is None or value == spec.usual:
                continue
            raise ContractError(
                f"{self.name}: {spec.name} {value!r} has no form in {other.name}; expected"
                f" {spec.usual!r}"
            )


@dataclass(frozen=True)
class PackedRow:
    """Byte layout of one packed row: nope int8 | rope (query dtype) | float32 scale per tile.

    656 bytes for 512/64/128 in a 16-bit query dtype, 784 in float32.
    """

    nope: int = 512
    rope: int = 64
    tile: int = 128
    itemsize: int = 2

    def __post_init__(self) -> None:
        if self.nope <= 0 or self.rope < 0 or self.tile <= 0 or self.nope % self.tile:
            raise ContractError(
                f"packed row: nope {self.nope}, rope {self.rope}, tile_size {self.tile}: expected"
                " nope > 0, rope >= 0 and tile_size dividing nope"
            )
        if self.itemsize not in (2, 4):
            raise ContractError(f"packed row: rope item size is 2 or 4 bytes, got {self.itemsize}")

    @property
    def tiles(self) -> int:
        """Number of scales in a row."""
        return self.nope // self.tile

    @property
    def rope_offset(self) -> int:
        """Byte offset of the rope part."""
        return self.nope

    @property
    def scale_offset(self) -> int:
        """Byte offset of the scales."""
        return self.nope + self.rope * self.itemsize

    @property
    def bytes(self) -> int:
        """D, the row's size in bytes."""
        return self.scale_offset + 4 * self.tiles

    @classmethod
    def of(cls, row_bytes: int, query_dim: int, rope: int, tile: int) -> PackedRow:
        """Deduce the layout from D, the query's last dim and two attributes; refuse what cannot be.

        Raises:
            ContractError: `rope` leaves no latent, `tile` does not divide it, or no item size of 2
                or 4 gives `row_bytes`.
        """
        nope = query_dim - rope
        if not 0 <= rope < query_dim:
            raise ContractError(
                f"rope_head_dim: expected 0..{query_dim - 1}, below the query's last dimension"
                f" {query_dim}, got {rope}"
            )
        if tile < 1 or nope % tile:
            raise ContractError(
                f"tile_size: expected a divisor of the latent's {nope} columns (query's last"
                f" dimension {query_dim} - rope_head_dim {rope}), got {tile}"
            )
        rows = [cls(nope, rope, tile, itemsize) for itemsize in ((2, 4) if rope else (2,))]
        for row in rows:
            if row.bytes == row_bytes:
                return row
        sizes = " or ".join(str(row.bytes) for row in rows)
        items = " (or 4)" if rope else ""
        raise ContractError(
            f"key: expected rows of {sizes} bytes ({nope} int8 + rope_head_dim {rope} * 2{items} +"
            f" {nope // tile} scales * 4, by tile_size {tile}), got {row_bytes}"
        )


@dataclass(frozen=True)
class Binding:
    """How one canonical node becomes one GE operator when the ATC flavour is written.

    `contract` carries the attribute order of the node type written into the ATC flavour, and the
    name of that type; `ge_outputs` names every output of the GE prototype (the canonical node has
    only the first). `of` is the canonical operator where `contract` is only another way to write
    it; `atc --binding` then chooses between the bindings of that operator.
    """

    name: str
    contract: OpContract
    atc_type: str
    ge_type: str
    ge_outputs: tuple[str, ...]
    since: str
    of: OpContract | None = None

    @property
    def canonical(self) -> OpContract:
        """The operator as files spell it in its own domain."""
        return self.of or self.contract


@dataclass(frozen=True)
class NpuLimits:
    """What the NPU kernels accept beyond attribute values (documented superset, A2 and A3)."""

    nope: int = 512
    rope: int = 64
    heads: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    query_types: tuple[str, ...] = (HALF, BF16)
    block_size_multiple: int = 16
    block_size_max: int = 1024
    indexer_heads: int = 64
    indexer_dim: int = 128
    sparse_count_max: int = 2048
