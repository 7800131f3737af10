"""The host checks of the fused operators, against what the model says about their inputs.

The set enforced is the documented one, which the executed checks of some releases fall short of
(the recipes' operator never runs half of its own). Dims and dtypes the model leaves open are not
judged. The facts come from the contract tables; where a rule is not in a table it is named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx

from sfa_onnx.ascend.checks.context import Context, Node
from sfa_onnx.ascend.checks.facts import dtype_name
from sfa_onnx.ascend.checks.finding import Finding, Severity
from sfa_onnx.ascend.checks.view import Dims, contract_of
from sfa_onnx.files.onnx_attrs import attribute
from sfa_onnx.operator.contract import AttributeValue, OpContract
from sfa_onnx.operator.op import (
    BINDINGS,
    DOMAIN_OWN,
    KV_CACHE_PACK,
    LIGHTNING_INDEXER,
    NPU,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION_ANTIQUANT,
    PackedRow,
)

__all__ = ["operators"]

_T = onnx.TensorProto
_INDEXERS: Final = (LIGHTNING_INDEXER.name, QUANT_LIGHTNING_INDEXER.name)
_RANK: Final = {"BSND": 4, "TND": 3, "PA_BSND": 4}
_HINTS: Final = {
    "attribute-value": "write a value the operator accepts",
    "block-table": "page keys with a block table [B, blocks per sequence], others without",
    "empty": "convert for sizes of at least 1",
    "indices-shape": "one row of selected keys per query token, one key head",
    "input-dtype": "Cast the input to a dtype the operator takes",
    "key-heads": "fuse the latent (MQA) form, which has one key head",
    "layout": "give queries and keys one layout, or page the keys (PA_BSND)",
    "lengths": "one int32 number per batch",
    "lengths-missing": "give the lengths as a graph input or constant",
    "output": "let the output be what the operator gives, and Cast behind it",
    "page-size": "choose another page size when converting the cache (kv-cache --block-size)",
    "rank": "reshape the tensor to the layout's rank",
    "rope-missing": "`sfa-onnx atc` gives such sites a rope of zeros: exact",
    "row-size": "the CPU kernel takes other sizes, the NPU operator does not",
    "sinks": "multiply the output by sigmoid(log-sum-exp - sink) behind the operator, over a"
    " contiguous float cache",
    "scale-missing": "give one float32 scale per tile",
    "value-shape": "pass the key tensor as value",
}
_CAST_HINT: Final = "`sfa-onnx atc --npu-dtype bf16|fp16` casts float32 queries"


class Site:
    """One fused node: inputs and attributes by the contract's names."""

    def __init__(self, ctx: Context, node: Node, op: OpContract):
        self.ctx, self.node, self.op = ctx, node, op
        names = [t.name for t in op.inputs]
        self._inputs = dict(zip(names, node.proto.input, strict=False))

    def given(self, name: str) -> bool:
        """Whether the input is connected."""
        return bool(self._inputs.get(name))

    def dims(self, name: str) -> Dims | None:
        """Dims of an input, None when absent or unknown."""
        source = self._inputs.get(name)
        return self.ctx.view.shape(self.node.scope, source) if source else None

    def dim(self, name: str, axis: int) -> int | None:
        """One dim as a number, None when unknown."""
        dims = self.dims(name)
        if dims is None or not -len(dims) <= axis < len(dims):
            return None
        value = dims[axis]
        return value if isinstance(value, int) else None

    def dtype(self, name: str) -> int:
        """elem_type of an input, 0 when absent or unknown."""
        source = self._inputs.get(name)
        return self.ctx.view.dtype(self.node.scope, source) if source else 0

    def attr(self, name: str) -> AttributeValue | None:
        """An attribute, or its default; None when the contract has no such attribute."""
        default = next((a.default for a in self.op.attributes if a.name == name), None)
        value: AttributeValue | None = attribute(self.node.proto, name, default)
        return value

    def error(
        self, rule: str, message: str, hint: str = "", severity: Severity = "error"
    ) -> Finding:
        """A finding of the operator stage."""
        text, hint = f"{self.node.op_type}: {message}", hint or _HINTS.get(rule, "")
        name = self.node.name
        return Finding(rule, severity, "operator", text, name, "", hint, False, "contract")


def operators(ctx: Context) -> Iterator[Finding]:
    """Every host check of every fused node."""
    for node in ctx.nodes():
        op = contract_of(node.proto)
        if op is None or ctx.builtin(node):
            continue
        by_type = {b.atc_type: b.contract for b in BINDINGS}
        site = Site(ctx, node, by_type.get(node.op_type, op))
        yield from _attributes(site)
        yield from _dtypes(site)
        if op.domain == DOMAIN_OWN:
            yield from _pack(site) if op is KV_CACHE_PACK else ()
            continue
        yield from _layouts(site)
        yield from _batch(site)
        yield from _output(site)
        if op is SPARSE_FLASH_ATTENTION_ANTIQUANT:
            yield from _antiquant(site)
        elif op is SPARSE_FLASH_ATTENTION:
            yield from _float_cache(site)
        elif site.op.name in _INDEXERS:
            yield from _indexer(site)


def _attributes(site: Site) -> Iterator[Finding]:
    given = {a.name for a in site.node.proto.attribute}
    for attr in site.op.attributes:
        if attr.required and attr.name not in given:
            message = f"required attribute {attr.name} is missing; nothing gives it a value"
            yield site.error("attribute-missing", message, f"write {attr.name}")
            continue
        value = site.attr(attr.name)
        if attr.npu is not None and value not in attr.npu:
            legal = ", ".join(map(str, attr.npu))
            message = f"{attr.name} = {value}: the NPU operator accepts {legal}"
            yield site.error("attribute-value", message, f"set {attr.name} to one of {legal}")
    count = site.attr("sparse_count")
    if isinstance(count, int) and not 1 <= count <= NPU.sparse_count_max:
        message = f"sparse_count = {count}: expected 1 to {NPU.sparse_count_max}"
        yield site.error("attribute-value", message)


def _dtypes(site: Site) -> Iterator[Finding]:
    """Dtypes per input; the query's type variable is narrowed to what the NPU takes."""
    variable: dict[str, int] = {}
    for tensor in site.op.inputs:
        elem = site.dtype(tensor.name)
        if not elem:
            continue
        legal = site.op.types_of(tensor)
        if isinstance(tensor.types, str) and site.op.domain != DOMAIN_OWN:
            legal = tuple(t for t in legal if t in NPU.query_types)
            first = variable.setdefault(tensor.types, elem)
            if first != elem:
                message = f"{tensor.name} is {dtype_name(elem)}, but query is {dtype_name(first)}"
                yield site.error("input-dtype", message, "give both the same dtype")
                continue
        if f"tensor({_onnx_name(elem)})" not in legal:
            wanted = " or ".join(t.removeprefix("tensor(").rstrip(")") for t in legal)
            message = f"{tensor.name} is {dtype_name(elem)}: expected {wanted}"
            yield site.error("input-dtype", message, _CAST_HINT if elem == _T.FLOAT else "")


def _onnx_name(elem_type: int) -> str:
    return str(_T.DataType.Name(elem_type)).lower()


def _layouts(site: Site) -> Iterator[Finding]:
    query, kv = site.attr("layout_query"), site.attr("layout_kv") or site.attr("layout_key")
    if kv != "PA_BSND" and kv != query:
        message = f"key layout {kv} with query layout {query}: they must agree unless keys are"
        yield site.error("layout", f"{message} paged (PA_BSND)")
    for name, layout in (("query", query), ("key", kv)):
        dims, rank = site.dims(name), _RANK.get(str(layout))
        if dims is not None and rank is not None and len(dims) != rank:
            message = f"{name} has rank {len(dims)}: layout {layout} asks for {rank}"
            yield site.error("rank", message)
    if query == "TND" and not site.given("actual_seq_lengths_query"):
        message = "layout_query TND needs actual_seq_lengths_query (prefix sums)"
        yield site.error("lengths-missing", message)
    lengths = "actual_seq_lengths_kv" if "layout_kv" in _names(site) else "actual_seq_lengths_key"
    if kv in ("PA_BSND", "TND") and not site.given(lengths):
        yield site.error("lengths-missing", f"key layout {kv} needs {lengths}")
    yield from _paging(site, str(kv))


def _names(site: Site) -> set[str]:
    return {a.name for a in site.op.attributes}


def _paging(site: Site, layout: str) -> Iterator[Finding]:
    if layout != "PA_BSND":
        if site.given("block_table"):
            message = f"block_table is given, but the key layout is {layout}: PA_BSND only"
            yield site.error("block-table", message, "drop block_table or set PA_BSND")
        return
    if not site.given("block_table"):
        yield site.error("block-table", "key layout PA_BSND needs block_table")
    dims = site.dims("block_table")
    if dims is not None and (len(dims) != 2 or dims[1] == 0):
        message = f"block_table has shape {list(dims)}: expected [B, blocks per sequence]"
        yield site.error("block-table", message)
    size, sbs = site.dim("key", 1), site.attr("sparse_block_size") or 1
    if size is None or len(site.dims("key") or ()) != 4:
        return
    multiple, most = NPU.block_size_multiple, NPU.block_size_max
    if not 1 <= size <= most or size % multiple or (isinstance(sbs, int) and sbs and size % sbs):
        message = f"page size {size}: expected a multiple of {multiple}"
        message += f" (and of sparse_block_size {sbs}), at most {most}"
        yield site.error("page-size", message)


def _batch(site: Site) -> Iterator[Finding]:
    """Sizes that must agree across inputs, and dims that must not be zero."""
    dims = site.dims("query") or ()
    if 0 in dims:
        yield site.error("empty", f"query has shape {list(dims)}: no dim may be 0")
    tnd = site.attr("layout_query") == "TND"
    batch = site.dim("actual_seq_lengths_query", 0) if tnd else site.dim("query", 0)
    for tensor in site.op.inputs:
        if not tensor.name.startswith("actual_seq_lengths"):
            continue
        shape = site.dims(tensor.name)
        if shape is not None and len(shape) != 1:
            message = f"{tensor.name} has shape {list(shape)}: expected one number per batch"
            yield site.error("lengths", message)
        count = site.dim(tensor.name, 0)
        if count is not None and (count == 0 or (batch is not None and count != batch)):
            message = f"{tensor.name} has {count} entries for a batch of {batch}"
            yield site.error("lengths", message)
    rows = site.dim("block_table", 0)
    if None not in (rows, batch) and rows != batch:
        yield site.error("block-table", f"block_table has {rows} rows for a batch of {batch}")
    heads = site.dim("key", -2)
    if heads is not None and heads != 1:
        message = f"the key has {heads} heads: MLA keys have exactly 1"
        yield site.error("key-heads", message)


def _output(site: Site) -> Iterator[Finding]:
    """What the model declares of the first output, where it declares anything."""
    view, name = site.ctx.view, "".join(site.node.proto.output[:1])
    elem, dims = view.dtype(site.node.scope, name), view.shape(site.node.scope, name)
    attention = site.op.outputs[0].name == "attention_out"
    wanted = site.dtype("query") if attention else int(_T.INT32)
    if elem and wanted and elem != wanted:
        message = f"output {name!r} is {dtype_name(elem)}: the operator gives {dtype_name(wanted)}"
        yield site.error("output", message)
    size = dims[-1] if attention and dims else None
    if isinstance(size, int) and size != NPU.nope:
        yield site.error("output", f"output rows have {size} elements: expected {NPU.nope}")


def _heads(site: Site) -> Iterator[Finding]:
    heads = site.dim("query", -2)
    legal = (*NPU.heads, 48) if "950" in site.ctx.soc_version else NPU.heads
    if heads is not None and heads not in legal:
        message = f"{heads} query heads: expected one of {', '.join(map(str, legal))}"
        yield site.error("heads", message, "`sfa-onnx atc` pads them with zeros: exact")


def _indices(site: Site) -> Iterator[Finding]:
    dims, query = site.dims("sparse_indices"), site.dims("query")
    if dims is None or query is None:
        return
    want = (*query[:-2], 1)
    pairs = zip(dims[:-1], want, strict=False)
    clash = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
    if len(dims) != len(query) or clash:
        message = f"sparse_indices has shape {list(dims)}: expected {[*want, 'K']}"
        yield site.error("indices-shape", message)


def _sinks(site: Site) -> Iterator[Finding]:
    """No released CANN has them."""
    if not site.given("sinks"):
        return
    message = "sinks: only CANN's development line has them, on Ascend 950; a released one"
    yield site.error("sinks", f"{message} drops the input without a word")
    dims, heads = site.dims("sinks"), site.dim("query", -2)
    one = dims[0] if dims is not None and len(dims) == 1 else None
    if dims is not None and (len(dims) != 1 or (isinstance(one, int) and one != (heads or one))):
        message = f"sinks has shape {list(dims)}: expected one per query head"
        yield site.error("sinks", message, "give a float32 vector [N1]")


def _antiquant(site: Site) -> Iterator[Finding]:
    row = PackedRow(NPU.nope, NPU.rope)
    yield from _heads(site)
    yield from _sinks(site)
    yield from _indices(site)
    for name, want in (("query", row.nope + row.rope), ("key", row.bytes)):
        dim = site.dim(name, -1)
        if dim is not None and dim != want:
            message = f"{name} rows have {dim} elements: the kernel is built for {want}"
            yield site.error("row-size", message)
    for name in ("key_dequant_scale", "value_dequant_scale"):
        if site.given(name):
            message = (
                f"{name} is given, but the scales lie in the packed rows: the kernel ignores it"
            )
            yield site.error("reserved-input", message, "leave the input out")
    if site.dtype("key") and site.dtype("value") not in (0, site.dtype("key")):
        yield site.error("input-dtype", "value and key have different dtypes")
    key, value = site.dims("key"), site.dims("value")
    if None not in (key, value) and key != value:
        message = f"value has shape {list(value or ())}, key {list(key or ())}: pass the key twice"
        yield site.error("value-shape", message, severity="warning")
    if "950" in site.ctx.soc_version and site.attr("sparse_block_size") != 1:
        yield site.error("attribute-value", "sparse_block_size must be 1 on Ascend 950")


def _float_cache(site: Site) -> Iterator[Finding]:
    yield from _heads(site)
    yield from _sinks(site)
    if site.attr("return_softmax_lse") and site.attr("layout_kv") == "PA_BSND":
        message = "return_softmax_lse with paged keys: CANN gives softmax_max and softmax_sum only"
        message += " for contiguous ones"
        yield site.error("attribute-value", message, "keep the cache contiguous (BSND, TND)")
    yield from _indices(site)
    for name, want in (("query", NPU.nope), ("key", NPU.nope), ("query_rope", NPU.rope)):
        dim = site.dim(name, -1)
        if dim is not None and dim != want:
            yield site.error("row-size", f"{name} rows have {dim} elements: expected {want}")
    dim = site.dim("key_rope", -1)
    if dim is not None and dim != NPU.rope:
        yield site.error("row-size", f"key_rope rows have {dim} elements: expected {NPU.rope}")
    for name in ("query_rope", "key_rope"):
        if not site.given(name):
            message = f"{name} is not given: attention_mode 2 (absorbed MLA) needs it"
            yield site.error("rope-missing", message)


def _indexer(site: Site) -> Iterator[Finding]:
    heads, dim = site.dim("query", -2), site.dim("query", -1)
    if heads is not None and heads != NPU.indexer_heads:
        message = f"{heads} index heads: expected {NPU.indexer_heads}"
        yield site.error("heads", message, _pad_or_leave(heads, NPU.indexer_heads))
    for name in ("query", "key"):
        dim = site.dim(name, -1)
        if dim is not None and dim != NPU.indexer_dim:
            message = f"{name} rows have {dim} elements: expected {NPU.indexer_dim}"
            yield site.error("row-size", message, _pad_or_leave(dim, NPU.indexer_dim))


def _pad_or_leave(size: int, most: int) -> str:
    """What to do with an indexer of other sizes than the kernel's."""
    if size < most:
        return "pad with zeros (of weight zero), which is exact"
    return (
        "the kernel has no more (a mask of padding takes one): `sfa-onnx fuse --no-indexer` or"
        " `--target ascend` keeps the selection in standard operators"
    )


def _pack(site: Site) -> Iterator[Finding]:
    row = PackedRow(NPU.nope, NPU.rope)
    for name, want in (("nope", row.nope), ("rope", row.rope)):
        dim = site.dim(name, -1)
        if dim is not None and dim != want:
            message = f"{name} has {dim} elements: the NPU operators read rows of {want}"
            yield site.error("row-size", message)
    if site.dtype("nope") == _T.INT8 and not site.given("scale"):
        yield site.error("scale-missing", "an int8 nope needs its scales")
    if site.dtype("rope") == _T.FLOAT:
        message = "a float32 rope gives rows of 784 bytes, which no NPU operator reads"
        yield site.error("row-size", message, "cast the rope to bf16 or fp16")
