"""What the passes hand to each other: a candidate site, its operands and its replacement.

find -> regions; bind -> `Candidate` or `Refusal`; verify -> `VerifyRecord` or `Refusal`; splice.
The replacement is a complete little graph from the same entering values to the same outputs, so the
verifier compares region and replacement as black boxes, with roles only to choose inputs that show
differences.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx

from sfa_onnx.operator.contract import OpContract

__all__ = ["Candidate", "Domain", "Operand", "Refusal", "RefusedSite", "Role"]


class Role(enum.StrEnum):
    """What a value entering the region is to the attention."""

    QUERY = "query"  # nope part or nope+rope
    QUERY_ROPE = "query_rope"
    LATENT = "latent"  # float latent, or latent+rope
    KEY_ROPE = "key_rope"
    LATENT_INT8 = "latent_int8"
    PACKED = "packed"  # int8 rows: nope | rope bytes | scale bytes
    SCALE = "scale"  # float32 dequantisation scales per tile
    EXPANSION = "expansion"  # W of kv_b_proj (absorption)
    INDICES = "indices"
    INDEX_KEY = "index_key"  # rows that the indexer scores
    INDEX_WEIGHTS = "index_weights"  # one per query row and indexer head
    BLOCK_TABLE = "block_table"
    LENGTHS_KV = "lengths_kv"
    LENGTHS_QUERY = "lengths_query"
    MASK = "mask"  # bool, True = visible (or a float mask of two values; see Domain.values)
    SHAPE = "shape"  # only its shape matters
    CONSTANT = "constant"  # structural constant read from the file


@dataclass(frozen=True)
class Domain:
    """What may come in at an operand, given its producer; probes stay inside it.

    The verifier records `assumption` and `discharged_by` ("TopK /model/layers.0/indexer/TopK").
    """

    distinct: bool = False  # within a row (last axis)
    sorted_descending: bool = False
    low: int | None = None  # inclusive
    high: str | int | None = None  # exclusive: an axis label ("S2") or a number
    negative_allowed: bool = False
    valid_first: bool = False  # in a row, entries the attention sees precede those it masks
    values: tuple[float, ...] | None = None  # e.g. (0.0, -inf) for an additive mask
    along: int | None = None  # entries number this axis of the keys, each drawn by itself
    block: int = 1  # keys that an entry names
    apart: bool = False  # not the selection itself: one that widens or narrows it
    cumulative: bool = False  # lengths given as prefix sums, whatever the operator's layout
    assumption: str = ""
    discharged_by: str = ""


@dataclass(frozen=True)
class Operand:
    """One value entering the region. `axes` labels its dims: "B" "S1" "N1" "D" "S2" "K" "T" "".

    Merged dims carry labels joined with "*" in row-major order ("B*S1"); "1" is a broadcast dim.
    """

    value: str
    role: Role
    axes: tuple[str, ...]
    elem_type: int  # onnx.TensorProto.DataType
    domain: Domain = Domain()


@dataclass(frozen=True)
class Refusal:
    """Why a candidate is not fused: a true sentence, where it stopped, what would help."""

    reason: str
    stopped_at: str = ""
    hint: str = ""
    final: bool = False  # no other view of the site would help


@dataclass(frozen=True)
class RefusedSite:
    """A candidate that could not be bound: where it is, how far recognition got, and why it ended.

    `bound` lists what was understood before ("scores", "scale 0.13", "indices TopK ..."), in order.
    """

    anchor: int
    layer: str
    refusal: Refusal
    bound: tuple[str, ...] = ()
    family: str = ""
    terms: tuple[str, ...] = ()  # normal form of the result, and the identities that fired


@dataclass
class Candidate:
    """A bound site, ready to be verified and spliced.

    `nodes` are removed; `support` are upstream nodes that the verifier must also evaluate (shape
    chains, masks, constants) but that stay in the graph because others read them. Both are indices
    into the graph's nodes. A support node shared by two sites may be dead once both are replaced:
    splice deletes what nobody reads any more among the nodes and support of all sites.
    The replacement may read any operand and any value that `support` makes.
    `otherwise` binds the same attention with fewer assumptions, for when this view of it cannot be
    verified. `equal` pairs symbols that were taken for one size; `scales` are inputs that were
    taken for scales, which are not negative; `indices` is the output that lists what a selection
    chose, where there is one; `said` is what the record says of it besides what was run.
    """

    graph: onnx.GraphProto
    anchor: int
    op: OpContract
    family: str
    nodes: tuple[int, ...]
    support: tuple[int, ...]
    operands: tuple[Operand, ...]
    outputs: tuple[str, ...]
    replacement: list[onnx.NodeProto]
    replacement_initializers: list[onnx.TensorProto] = field(default_factory=list)
    sizes: dict[str, int | str] = field(default_factory=dict)  # axis label -> size or symbol
    layer: str = ""
    site_id: str = ""
    notes: list[str] = field(default_factory=list)
    otherwise: Callable[[], Candidate | None] | None = None
    equal: tuple[tuple[str, str], ...] = ()
    scales: tuple[str, ...] = ()
    indices: str = ""
    said: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()
