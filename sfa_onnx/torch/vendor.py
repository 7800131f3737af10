"""The vendors' torch operators: their schemas as data, and how their calls become ours.

`data/vendor_schemas.json` holds every schema that was published, with the releases that have it and
where it was read. An adapter works by argument *names*, so that it serves any of them, also one
that a vendor's library has already registered.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Final

import torch

from sfa_onnx.errors import ContractError, UsageError
from sfa_onnx.operator.contract import OpContract
from sfa_onnx.operator.op import ALL_OPS, INT64_MAX, LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER
from sfa_onnx.torch.checks import HOLES_VARIABLE
from sfa_onnx.torch.compute import compute, compute_float8, form_of, shapes_of, usable
from sfa_onnx.torch.float8 import is_float8
from sfa_onnx.torch.form import Form, Result
from sfa_onnx.torch.tensors import check_no_gradient, in_forward_mode

__all__ = [
    "Adapter",
    "Known",
    "VendorOperator",
    "schema_in_torch",
    "vendor_operators",
    "vendor_schemas",
]

# Arguments with one legal value that some of the contracts leave out.
_FIXED: Final = {
    "pre_tokens": INT64_MAX,
    "next_tokens": INT64_MAX,
    "cmp_ratio": 1,  # keys of the indexer that stand for several tokens are another operator
    "return_value": False,  # of the quantised indexer
}
_IGNORED: Final = ("metadata",)  # how the NPU's cores share the work
# What a vendor's schema may ask of an operator whose node has no word for it.
_LSE: Final = "return_softmax_lse"
_KEPT: Final = 512  # ways to call one operator
# By which torch_npu says that bytes are an 8-bit float that torch lacks.
_TYPES_ATTENTION: Final = ("key_dtype", "value_dtype")
_TYPES_INDEXER: Final = ("query_dtype", "key_dtype")
# Arguments by which a vendor says what the contract says with another word.
_SPELLINGS: Final = {"return_value": "return_values"}


@dataclass(frozen=True)
class VendorOperator:
    """A published operator: "custom::x" (recipes), "npu::x" (torch_npu), "_C_ascend::x" (vLLM)."""

    namespace: str
    name: str
    op: OpContract
    schema: str  # "(Tensor query, ...) -> Tensor"
    releases: tuple[str, ...]  # of the package, oldest first; none for the recipes'
    source: str

    @property
    def qualified(self) -> str:
        """The name as torch's dispatcher has it."""
        return f"{self.namespace}::{self.name}"


@functools.cache
def vendor_schemas() -> tuple[VendorOperator, ...]:
    """Every schema of the data file; of one name the widest comes last."""
    text = resources.files("sfa_onnx.torch").joinpath("data/vendor_schemas.json").read_text("utf-8")
    ops = {op.name: op for op in ALL_OPS}
    return tuple(
        VendorOperator(
            entry["namespace"],
            entry["name"],
            ops[entry["operator"]],
            entry["schema"],
            tuple(entry["releases"]),
            entry["source"],
        )
        for entry in json.loads(text)
    )


def vendor_operators(
    release: str | None = None, vllm_release: str | None = None
) -> tuple[VendorOperator, ...]:
    """One schema per name: those of one release of a package, and the recipes'.

    Args:
        release: of torch_npu, as "2.9.0.post2".
        vllm_release: of vllm-ascend, as "0.18.0" (its release branches) or "main".

    None stands for the installed package's release where its schemas are known, else for the newest
    of each name.

    Raises:
        UsageError: the release is not among the data, or has none of the operators.
    """
    wanted = {
        namespace: _release_of(namespace, package, asked)
        for namespace, package, asked in (
            ("npu", "torch_npu", release),
            ("_C_ascend", "vllm_ascend", vllm_release),
        )
    }
    chosen = {}
    for entry in vendor_schemas():
        one = wanted.get(entry.namespace)
        if one is None or one in entry.releases:
            chosen[entry.qualified] = entry
    return tuple(chosen.values())


def _release_of(namespace: str, package: str, asked: str | None) -> str | None:
    known = {r for e in vendor_schemas() if e.namespace == namespace for r in e.releases}
    if asked is None:
        installed = _installed(package)
        return installed if installed in known else None
    if asked not in known:
        raise UsageError(
            f"no schemas of {package} {asked}: expected one of {', '.join(sorted(known))}"
        )
    return asked


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def schema_in_torch(qualified: str, overload: str = "") -> torch.FunctionSchema | None:
    """The schema of a name as registered now, whoever registered it."""
    try:
        return torch._C._get_schema(qualified, overload)
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Known:
    """A call seen before: a layer is called in the same form step after step."""

    core: Form
    places: tuple[int, ...]  # of the core's inputs among the values of the call
    attributes: Mapping[str, Any]
    single: bool  # one result, not a tuple


class Adapter:
    """A call under a vendor's name as tensors and attributes of the contract, and back."""

    def __init__(self, op: OpContract, schema: torch.FunctionSchema) -> None:
        self.op, self.schema = op, schema
        self.results = len(schema.returns)
        self._names = [a.name for a in schema.arguments]
        self._defaults = {a.name: a.default_value for a in schema.arguments}
        self._tensors = {t.name for t in op.inputs}
        self.lse_beyond_node = _LSE in self._names and _LSE not in {a.name for a in op.attributes}
        # What a schema does not mention has the one value that such an operator knows: attention of
        # the recipes, which have no attention_mode, is the absorbed form.
        self._attributes: dict[str, Any] = {a.name: a.usual for a in op.attributes}
        if self.lse_beyond_node:
            self._attributes[_LSE] = 0
        # torch_npu's and vLLM's; the recipes' operator is of int8 alone, as is ours.
        self.takes_float8 = (
            schema.name.endswith("::npu_kv_quant_sparse_flash_attention")
            or "query_dtype" in self._names
        )
        self._types = _TYPES_INDEXER if op is QUANT_LIGHTNING_INDEXER else _TYPES_ATTENTION
        self._words = [n for n in self._names if _SPELLINGS.get(n, n) not in self._tensors]
        self._inputs = [n for n in self._names if n in self._tensors]
        self._needed = [a.name for a in schema.arguments if str(a.type) == "Tensor"]
        self._forms: dict[tuple[Any, ...], Known] = {}

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Every argument by the vendor's name."""
        return {**self._defaults, **dict(zip(self._names, args, strict=False)), **kwargs}

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and attributes of the contract; return_softmax_lse too, if only the schema's.

        Raises:
            ContractError: a tensor is missing, or an argument is given that CPU and A2/A3 know
                nothing of.
        """
        given = self.given(args, kwargs)
        return self._tensors_of(given), self._attributes_of(given)

    def _tensors_of(self, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Those of the contract; torch lets None pass for a tensor that has to be given."""
        tensors = {n: t for n in self._inputs if (t := given[n]) is not None}
        for name in self._needed:
            if name not in tensors:
                raise ContractError(f"{name}: expected a tensor, got None")
        return tensors

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        rounding: str,
        tell: Callable[[Known, tuple[Result, ...]], None] | None = None,
    ) -> Any:
        """The CPU implementation; `tell` is called with the form of a call that others may have."""
        values = (*args, *kwargs.values())
        # What two calls of one form have in common: all but addresses.
        key: list[Hashable] = [rounding, os.environ.get(HOLES_VARIABLE), *kwargs]
        graded = torch.is_grad_enabled()
        plain = not (graded and in_forward_mode())
        for value in values:
            if isinstance(value, torch.Tensor):
                key += value.dtype, value.shape
                if not (value.is_cpu and value.is_contiguous()) or (graded and value.requires_grad):
                    plain = False
            else:
                key.append(value)
        form = self._forms.get(tuple(key)) if plain else None
        if form is None:
            return self._first(args, kwargs, rounding, tuple(key), tell)
        if tell is not None:
            tell(form, self._returned(form, values[0].dtype))
        results = form.core.run_at(values[0], [values[at].data_ptr() for at in form.places])
        if self.results == 1:
            return results[0]
        return self._shaped(results, values[0], form.attributes)

    def _first(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        rounding: str,
        key: tuple[Any, ...],
        tell: Callable[[Known, tuple[Result, ...]], None] | None,
    ) -> Any:
        """A call of a new form, or over tensors that are not used as they are."""
        given = self.given(args, kwargs)
        tensors, attributes = self._tensors_of(given), self._attributes_of(given)
        types = tuple(given.get(name) for name in self._types)
        if self.takes_float8 and is_float8(tensors, *types):
            values = compute_float8(self.op, tensors, attributes, types, rounding)
            return self._shaped(values, args[0], attributes)
        used = usable(tensors, attributes, rounding)
        core = form_of(self.op, used, attributes, rounding)
        if core is None:
            values = compute(self.op, used, attributes, rounding)
        else:
            values = core.run(used)
            if len(self._forms) >= _KEPT:
                self._forms.clear()
            names = [*self._names[: len(args)], *kwargs]
            places = tuple(names.index(n) for n in core.inputs)
            known = self._forms[key] = Known(core, places, attributes, self.results == 1)
            if tell is not None:
                tell(known, self._returned(known, args[0].dtype))
        return self._shaped(values, args[0], attributes)

    def _attributes_of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        attributes = dict(self._attributes)
        for word in self._words:
            name, value = _SPELLINGS.get(word, word), given[word]
            if name in attributes:
                attributes[name] = int(value) if isinstance(value, bool) else value
            elif word == "rounding" or word in _IGNORED:
                continue  # the first is of our own names: the caller's choice, no part of the node
            elif word in _FIXED:
                if value != _FIXED[word]:
                    raise ContractError(f"{word}: expected {_FIXED[word]}, got {value}")
            elif value is not None and not self.takes_float8:
                raise ContractError(
                    f"{word}: expected None (float8 and hifloat8, types of Ascend 950, are computed"
                    f" of the packed attention and the quantised indexer), got {value!r}"
                )
        return attributes

    def fake(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The same results without values.

        Raises:
            ContractError: a tensor wants a gradient, which a compiled graph would leave out.
        """
        tensors, attributes = self.bind(args, kwargs)
        if not torch.compiler.is_exporting():  # an exporter asks for no gradient, parameters do
            check_no_gradient(tensors)
        first = next(iter(tensors.values()))  # of a query's device, where there is one
        return self._shaped(shapes_of(self.op, tensors, attributes), first, attributes)

    def _shaped(
        self,
        values: tuple[torch.Tensor, ...],
        query: torch.Tensor,
        attributes: Mapping[str, Any],
    ) -> Any:
        """As many results as the schema has; what was not asked for is empty, as the vendor's."""
        if self.results == 1:
            return values[0]
        absent = self._absent(query.dtype, attributes)
        if not absent:
            return values
        return (values[0], *(query.new_empty((0,), dtype=dtype) for dtype in absent))

    def _absent(self, query: torch.dtype, attributes: Mapping[str, Any]) -> list[torch.dtype]:
        """Types of the results that were not asked for."""
        if attributes.get("return_values") or attributes.get(_LSE):
            return []
        return [query if self.op is LIGHTNING_INDEXER else torch.float32] * (self.results - 1)

    def _returned(self, known: Known, query: torch.dtype) -> tuple[Result, ...]:
        """What `_shaped` makes of such a call; the core writes to those that have a field."""
        made = [replace(r, dtype=r.dtype or query) for r in known.core.results]
        if self.results == 1:
            return (made[0],)
        absent = self._absent(query, known.attributes)
        return (made[0], *(Result("", (0,), d) for d in absent)) if absent else tuple(made)
