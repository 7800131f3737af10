"""Written by sfa_onnx.ascend.package_tables from sfa_onnx/op.py; do not edit."""

OPS = (
    {
        "onnx_type": "NPUKvQuantSparseFlashAttention",
        "domain": "npu",
        "ge_type": "KvQuantSparseFlashAttention",
        # (name, required)
        "inputs": (
            ("query", True),
            ("key", True),
            ("value", True),
            ("sparse_indices", True),
            ("key_dequant_scale", False),
            ("value_dequant_scale", False),
            ("block_table", False),
            ("actual_seq_lengths_query", False),
            ("actual_seq_lengths_kv", False),
        ),
        # (name, ONNX kind, GE's attribute is a bool)
        "attributes": (
            ("scale_value", "float", False),
            ("key_quant_mode", "int", False),
            ("value_quant_mode", "int", False),
            ("sparse_block_size", "int", False),
            ("layout_query", "string", False),
            ("layout_kv", "string", False),
            ("sparse_mode", "int", False),
            ("pre_tokens", "int", False),
            ("next_tokens", "int", False),
            ("attention_mode", "int", False),
            ("quant_scale_repo_mode", "int", False),
            ("tile_size", "int", False),
            ("rope_head_dim", "int", False),
        ),
        "companions": (
            "scale_value_exact",
        ),
    },
    {
        "onnx_type": "NPUSparseFlashAttentionAntiquant",
        "domain": "npu",
        "ge_type": "SparseFlashAttentionAntiquant",
        # (name, required)
        "inputs": (
            ("query", True),
            ("key", True),
            ("value", True),
            ("sparse_indices", True),
            ("key_dequant_scale", False),
            ("value_dequant_scale", False),
            ("block_table", False),
            ("actual_seq_lengths_query", False),
            ("actual_seq_lengths_kv", False),
        ),
        # (name, ONNX kind, GE's attribute is a bool)
        "attributes": (
            ("scale_value", "float", False),
            ("sparse_block_size", "int", False),
            ("key_quant_mode", "int", False),
            ("value_quant_mode", "int", False),
            ("layout_query", "string", False),
            ("layout_kv", "string", False),
            ("sparse_mode", "int", False),
            ("attention_mode", "int", False),
            ("quant_scale_repo_mode", "int", False),
            ("tile_size", "int", False),
            ("rope_head_dim", "int", False),
        ),
        "companions": (
            "scale_value_exact",
        ),
    },
    {
        "onnx_type": "NPUSparseFlashAttention",
        "domain": "npu",
        "ge_type": "SparseFlashAttention",
        # (name, required)
        "inputs": (
            ("query", True),
            ("key", True),
            ("value", True),
            ("sparse_indices", True),
            ("block_table", False),
            ("actual_seq_lengths_query", False),
            ("actual_seq_lengths_kv", False),
            ("query_rope", False),
            ("key_rope", False),
        ),
        # (name, ONNX kind, GE's attribute is a bool)
        "attributes": (
            ("scale_value", "float", False),
            ("sparse_block_size", "int", False),
            ("layout_query", "string", False),
            ("layout_kv", "string", False),
            ("sparse_mode", "int", False),
            ("pre_tokens", "int", False),
            ("next_tokens", "int", False),
            ("attention_mode", "int", False),
            ("return_softmax_lse", "int", True),
        ),
        "companions": (
            "scale_value_exact",
        ),
    },
    {
        "onnx_type": "NPULightningIndexer",
        "domain": "npu",
        "ge_type": "LightningIndexer",
        # (name, required)
        "inputs": (
            ("query", True),
            ("key", True),
            ("weights", True),
            ("actual_seq_lengths_query", False),
            ("actual_seq_lengths_key", False),
            ("block_table", False),
        ),
        # (name, ONNX kind, GE's attribute is a bool)
        "attributes": (
            ("layout_query", "string", False),
            ("layout_key", "string", False),
            ("sparse_count", "int", False),
            ("sparse_mode", "int", False),
            ("pre_tokens", "int", False),
            ("next_tokens", "int", False),
            ("return_values", "int", True),
        ),
        "companions": (
        ),
    },
    {
        "onnx_type": "NPUQuantLightningIndexer",
        "domain": "npu",
        "ge_type": "QuantLightningIndexer",
        # (name, required)
        "inputs": (
            ("query", True),
            ("key", True),
            ("weights", True),
            ("query_dequant_scale", True),
            ("key_dequant_scale", True),
            ("actual_seq_lengths_query", False),
            ("actual_seq_lengths_key", False),
            ("block_table", False),
        ),
        # (name, ONNX kind, GE's attribute is a bool)
        "attributes": (
            ("query_quant_mode", "int", False),
            ("key_quant_mode", "int", False),
            ("layout_query", "string", False),
            ("layout_key", "string", False),
            ("sparse_count", "int", False),
            ("sparse_mode", "int", False),
            ("pre_tokens", "int", False),
            ("next_tokens", "int", False),
        ),
        "companions": (
        ),
    },
)
