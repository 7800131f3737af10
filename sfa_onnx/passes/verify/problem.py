"""A site at one choice of sizes, and the questions that are put to it.

A `Draw` says what to ask: which keys exist, who selects them, how large scores are. `inputs` turns
it into arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import onnx
from numpy.typing import NDArray

from sfa_onnx.passes.candidate import Candidate, Operand, Role
from sfa_onnx.passes.verify.sizes.dims import Dims

__all__ = ["Draw", "Problem"]

Array = NDArray[Any]
Shapes = dict[str, tuple[int, ...]]
Selection = Literal["random", "shared", "single", "duplicates", "shuffled"]


@dataclass(frozen=True)
class Draw:
    """One question. `seed` makes it reproducible."""

    seed: int = 0
    query: Literal["random", "zero", "basis"] = "random"
    gain: float = 1.0  # multiplies the query
    width: float = 1.0  # spread of the keys
    codes: bool = False  # keys are distinct one-hot rows: the output tells which were read
    shift: float = 0.0  # added to every score, by one key and query component
    poison: float | None = None  # value scale of all rows outside every selection
    selection: Selection = "random"
    lengths: Literal["ragged", "full", "short", "edge"] = "ragged"
    visible: float = 0.6  # share of the mask that is visible
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
