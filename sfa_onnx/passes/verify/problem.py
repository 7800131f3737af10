"""A site at one choice of sizes, and the questions that are put to it.

A `Draw` says what to ask: which keys exist, who selects them, how large scores are. `inputs` turns
it into arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import onnx
from numpy.typing import NDArray

from sfa_onnx.files.onnx_attrs import attributes
from sfa_onnx.passes.candidate import Candidate, Operand, Role
from sfa_onnx.passes.verify.sizes.dims import Dims

__all__ = ["LONELY", "Draw", "Problem", "inputs_as"]

Array = NDArray[Any]
Shapes = dict[str, tuple[int, ...]]
Lonely = Literal["", "no index", "no key"]
LONELY: Final[tuple[Lonely, ...]] = ("no index", "no key")
Selection = Literal["random", "shared", "single", "duplicates", "shuffled"]


@dataclass(frozen=True)
class Draw:
    """One question. `seed` makes it reproducible."""

    seed: int = 0
    query: Literal["random", "zero", "basis"] = "random"
    gain: float = 1.0  # multiplies the query
    width: float = 1.0  # spread of the keys
    codes: bool = False  # keys are distinct one-hot rows: the output shows which were read
    shift: float = 0.0  # added to every score, by one key and query component
    poison: float | None = None  # value scale of all rows outside every selection
    selection: Selection = "random"
    lengths: Literal["ragged", "full", "short", "edge"] = "ragged"
    visible: float = 0.6  # share of the mask that is visible
    lonely: Lonely = ""  # the first row selects no key, or sees none of those it selects
    part: Literal["", "nope", "scale", "rope"] = ""  # of packed rows: the part that is asked about
    power: int = 0  # of packed rows: ropes and scales are multiples of 2**power


@dataclass(frozen=True)
class Problem:
    """A site's operands at concrete shapes.

    Attributes:
        attributes: the fused operator's attributes (layouts, sparse_mode, sparse_block_size).
        constants: values of operands that are read from the file.
        others: other shapes to probe.
    """

    candidate: Candidate
    shapes: Shapes
    dims: Dims
    attributes: dict[str, Any]
    constants: dict[str, Array] = field(default_factory=dict)
    others: tuple[tuple[Shapes, Dims], ...] = ()

    def resized(self, shapes: Shapes, dims: Dims) -> Problem:
        """The same site at other shapes."""
        return replace(self, shapes=shapes, dims=dims)

    def first(self, *roles: Role) -> Operand | None:
        """The first operand with one of these roles."""
        return next((o for o in self.candidate.operands if o.role in roles), None)

    def all(self, role: Role) -> list[Operand]:
        """Every operand with this role."""
        return [o for o in self.candidate.operands if o.role is role]

    @property
    def paged(self) -> bool:
        """Whether keys lie in pages that a block table maps."""
        return self.first(Role.BLOCK_TABLE) is not None

    @property
    def rope_dtype(self) -> Any:
        """Type of the rope bytes in packed rows: the query's own type."""
        query = self.first(Role.QUERY)
        kind = onnx.TensorProto.FLOAT if query is None else query.elem_type
        return onnx.helper.tensor_dtype_to_np_dtype(kind)

    @property
    def indices(self) -> Operand:
        """The operand that selects keys."""
        return self.all(Role.INDICES)[0]


def _attributes(candidate: Candidate) -> dict[str, Any]:
    """Attributes of the fused node in the replacement."""
    node = next(n for n in candidate.replacement if n.op_type == candidate.op.name)
    return attributes(node)


def inputs_as(candidate: Candidate) -> dict[str, Any]:
    """The attributes, with the layout in which the *graph* takes its inputs.

    A graph that separates sequences by prefix sums takes packed ones, whatever the fused node
    is given: rows of no sequence would be drawn else.
    """
    found = _attributes(candidate)
    packed = {o.role for o in candidate.operands if o.domain.cumulative}
    paged = any(o.role is Role.BLOCK_TABLE for o in candidate.operands)
    if Role.LENGTHS_QUERY in packed:
        found["layout_query"] = "TND"
    if Role.LENGTHS_KV in packed and not paged:
        found["layout_kv"] = "TND"
    chosen = [o.domain.block for o in candidate.operands if o.role is Role.INDICES]
    if chosen and chosen[0] > 1:  # the graph selects blocks, the operator may be given tokens
        found["sparse_block_size"] = chosen[0]
    return found
