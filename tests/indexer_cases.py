"""Random, legal calls of the lightning indexers in every layout, and one-node models of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from sfa_onnx.operator import reference
from sfa_onnx.operator.op import LIGHTNING_INDEXER, SPARSE_FLASH_ATTENTION, OpContract
from tests.attention_cases import make_case
from tests.op_models import elem_type, node_model

Inputs = dict[str, np.ndarray]
Attributes = dict[str, Any]


def indexer_call(
    op: OpContract,
    layouts: tuple[str, str],
    dtype: Any,
    seed: int = 0,
    *,
    weights: Any = None,
    whole: bool = False,
    heads: int = 3,
    width: int = 16,
    lengths: bool = True,
    **given: Any,
) -> tuple[Inputs, Attributes]:
    """Inputs and attributes of a call with ragged lengths and shuffled pages.

    Args:
        op: one of the two indexers.
        layouts: of query and key.
        dtype: of query and key; the quantised indexer has int8.
        seed: of the numbers.
        weights: their dtype, if not the query's.
        whole: small whole numbers, so that all sums are exact and many scores are equal.
        heads: Hi.
        width: Di.
        lengths: whether BSND has lengths.
        given: attributes other than the usual ones.
    """
    mode = {"sparse_mode": given.get("sparse_mode", 3), "lengths": lengths, "seed": seed}
    case = make_case(
        SPARSE_FLASH_ATTENTION, layouts, dtype=np.float32, rope=0, heads=heads, nope=width, **mode
    )
    r = np.random.default_rng(seed)
    query, key = case.inputs["query"], case.inputs["key"]
    names = ("actual_seq_lengths_query", "block_table")
    inputs = {n: case.inputs[n] for n in names if n in case.inputs}
    if "actual_seq_lengths_kv" in case.inputs:
        inputs["actual_seq_lengths_key"] = case.inputs["actual_seq_lengths_kv"]

    def numbers(shape: tuple[int, ...], kind: Any) -> np.ndarray:
        if whole:
            return r.integers(-2, 3, shape).astype(kind)
        if kind == np.int8:
            return r.integers(-127, 128, shape).astype(np.int8)
        return r.standard_normal(shape).astype(kind)

    quantised = op is not LIGHTNING_INDEXER
    kind = np.int8 if quantised else dtype
    inputs |= {"query": numbers(query.shape, kind), "key": numbers(key.shape, kind)}
    inputs["weights"] = numbers(query.shape[:-1], np.float16 if quantised else weights or dtype)
    if quantised:
        for name, shape in (("query", query.shape[:-1]), ("key", key.shape[:-1])):
            scale = 2.0 ** r.integers(-1, 2, shape) if whole else r.uniform(0.1, 1, shape)
            inputs[f"{name}_dequant_scale"] = scale.astype(np.float16)
    given = {"layout_query": layouts[0], "layout_key": layouts[1], "sparse_count": 9} | given
    if not quantised:
        given.setdefault("return_values", 1)
    return inputs, op.complete(given)


def indexer_model(op: OpContract, inputs: Inputs, attributes: Attributes) -> onnx.ModelProto:
    """A model that is one node, with symbols for dims; two outputs where return_values is 1."""
    infos = [
        helper.make_tensor_value_info(n, elem_type(a.dtype), [f"{n}{i}" for i in range(a.ndim)])
        for n, a in inputs.items()
    ]
    names = [t.name if t.name in inputs else "" for t in op.inputs]
    model = node_model(op, names, infos, attributes)
    dims = [None] * inputs["query"].ndim
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("sparse_indices", TensorProto.INT32, dims)
    )
    if attributes.get("return_values"):
        model.graph.node[0].output.append("sparse_values")
        kind = elem_type(inputs["query"].dtype)
        model.graph.output.append(helper.make_tensor_value_info("sparse_values", kind, dims))
    return model


def select(op: OpContract, inputs: Inputs, attributes: Attributes, **kw: Any) -> np.ndarray:
    """The reference's sparse_indices."""
    arguments = [inputs.get(t.name) for t in op.inputs]
    if op is LIGHTNING_INDEXER:
        return reference.lightning_indexer(*arguments, **attributes)[0]
    return reference.quant_lightning_indexer(*arguments, **kw, **attributes)
