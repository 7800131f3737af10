"""Every rule of the checker in one line each, by stage."""

from __future__ import annotations

from typing import Final

__all__ = ["RULES"]

# Parse: the parser refuses.
_PARSE: Final = {
    "arg-last-index": "ArgMax / ArgMin with select_last_index",
    "bitshift-direction": "BitShift without LEFT or RIGHT",
    "cast-to": "Cast without target",
    "clip-without-bounds": "Clip with neither min nor max",
    "com-microsoft": "a fusion left by onnxruntime's optimiser",
    "concat-axis": "Concat without axis",
    "constant-dtype": "a constant of a dtype the parser does not know or make constants of",
    "constant-no-data": "a constant that holds nothing",
    "duplicate-name": "two nodes of one graph with one name, generated names included",
    "einsum-equation": "Einsum without equation",
    "external-key": "an external_data entry that is no number, or read as the length",
    "external-location": "external data without a location",
    "function-call": "a model-local function: not expanded",
    "gap-in-branch": "an omitted input inside a branch of an If",
    "gathernd-batch-dims": "GatherND with batch_dims",
    "if-attributes": "If with other attributes than its two branches",
    "input-dtype": "a graph input, or an input of a fused operator, of a dtype not taken",
    "isinf-one-sign": "IsInf for one sign only",
    "no-graph-input": "a graph without inputs",
    "no-graph-output": "a graph without outputs",
    "opset-imports": "not exactly one opset import (before 9.2)",
    "opset-missing": "a domain no import spells",
    "output-without-producer": "an output nothing writes",
    "plugin-attributes": "attributes our plug-in refuses",
    "plugin-interface": "inputs or outputs our plug-in refuses",
    "plugin-not-open": "a plug-in missing from that release's open sources: unknown",
    "prototype-not-open": "a GE prototype missing from the open repositories: unknown",
    "qdq-op": "QuantizeLinear and its relatives",
    "reduce-no-axes": "ReduceSum without axes where the plug-in needs them",
    "reduce-inputs": "a reduction with more than two inputs",
    "split-num-outputs": "Split by num_outputs where the plug-in cannot divide (or dies)",
    "split-output-count": "Split whose outputs and sizes disagree",
    "surplus-inputs": "more inputs than the GE prototype: refused by 9.2, dropped before",
    "transpose-without-perm": "Transpose that leaves perm to the default",
    "trilu-inputs": "Trilu with more than two inputs",
    "unregistered-op": "an op or opset version without a plug-in",
    "unsqueeze-axes": "Unsqueeze before opset 13 without axes",
}
# Meaning: accepted, but another graph comes out.
_MEANING: Final = {
    "attribute-ignored": "an attribute the plug-in never reads",
    "cast-dtype": "Cast to a dtype the plug-in maps to undefined",
    "constant-form": "Constant given otherwise than as a tensor: empty",
    "constant-of-shape-value": "ConstantOfShape whose value lies in a typed field: lost",
    "constant-output": "an output that depends on constants alone: gone",
    "empty-output": "an unnamed output: wired into every omitted input",
    "external-absolute": "external data at an absolute path",
    "external-in-branch": "external data inside a branch: its path stays relative",
    "external-length": "external data whose length is not that of its dims",
    "external-missing": "external data in a file that is not there",
    "external-short": "external data beyond the end of its file",
    "gathernd-negative": "GatherND with negative indices: not wrapped",
    "gemm-alpha": "Gemm without C: alpha is dropped",
    "missing-input": "a required input left out: stays open",
    "missing-producer": "an input nothing writes: stays open",
    "mod-sign": "Mod on negative operands: fmod makes no difference",
    "nested-branch-value": "a value from two graphs further out: not handed on to a nested If",
    "raw-data-short": "raw_data shorter than the dims say",
    "reduce-axes": "a reduction whose axes this CANN line reads elsewhere: lost",
    "scale-six-digits": "a scale without its exact companion: rounded to 6 digits",
    "scatterelements-reduction": "ScatterElements with a reduction: ignored up to 9.0",
    "scatternd-reduction": "ScatterND with a reduction: ignored",
    "shape-slice": "Shape with start or end: ignored",
    "softmax-coercion": "Softmax before opset 13",
    "sparse-initializer": "a sparse initializer: not read",
    "two-producers": "a value written twice",
}
# Operator: host checks of the fused operators.
_OPERATOR: Final = {
    "attribute-missing": "a required attribute is missing",
    "attribute-value": "an attribute value the NPU operator does not accept",
    "block-table": "a block table missing, superfluous or of the wrong shape",
    "empty": "a dim of 0",
    "heads": "a number of heads the kernel is not built for",
    "indices-shape": "sparse_indices of another shape than the query asks for",
    "key-heads": "more than one key head",
    "layout": "key and query layouts that do not go together",
    "lengths": "lengths of another shape than one number per batch",
    "lengths-missing": "lengths a layout cannot do without",
    "output": "an output declared otherwise than the operator gives it",
    "page-size": "a page size the kernel does not take",
    "rank": "a rank that is not the layout's",
    "reserved-input": "a reserved input that is given",
    "rope-missing": "rope inputs left out",
    "row-size": "rows of another size than the kernel's",
    "scale-missing": "int8 values without scales",
    "value-shape": "a value tensor that is not the key",
}
# Graph: later stages, speed, memory.
_GRAPH: Final = {
    "custom-op-on-a3": "the documented conflict about custom ops from ONNX on A3",
    "data-dependent-shape": "an op whose output size depends on values",
    "device-memory": "weights against the memory of one device",
    "einsum": "Einsum: no engine known",
    "expert-gather": "expert weights gathered at run time",
    "input-dtype-documented": "graph inputs beyond the dtypes the manual lists",
    "input-shape": "open dims: --input_shape is needed",
    "int64-hot": "big int64 tensors that are computed with",
    "int8-input-dynamic": "an int8 graph input with open dims",
    "precision-mode": "bfloat16 under the default precision mode",
    "recipes-package": "a binding that needs a package no longer published",
    "scatter-dtype": "a scatter over a dtype no definition lists",
    "scatternd-copies-cache": "ScatterND on a graph input: the whole cache is copied",
    "topk-bf16": "TopK over bfloat16",
    "topk-computed-k": "TopK whose k is computed",
    "topk-int32-indices": "TopK's indices used as int64",
}
# Support: which engine.
_SUPPORT: Final = {
    "engine-ai-cpu": "an op that runs on AI CPU",
    "engine-documented": "a product table says yes, no listing shows it",
    "engine-nowhere": "types that no engine lists",
    "engine-reshape": "Reshape, which may run on AI CPU from 9.1 on",
    "engine-unknown": "nobody lists or documents an engine",
}

RULES: Final[dict[str, str]] = {**_PARSE, **_MEANING, **_OPERATOR, **_GRAPH, **_SUPPORT}
