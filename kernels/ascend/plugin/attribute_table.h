// Written by sfa_onnx.ascend.handover.package_tables from sfa_onnx/operator/op.py; do not edit.
// clang-format off
#ifndef SFA_ONNX_ASCEND_ATTRIBUTE_TABLE_H_
#define SFA_ONNX_ASCEND_ATTRIBUTE_TABLE_H_

#include <cstddef>

#include "attributes.h"

namespace sfa_onnx {

struct InputSpec {
  const char* name;
  bool required;
};

struct AttributeSpec {
  const char* name;
  int type;      // as ONNX writes it
  bool ge_bool;  // GE's attribute is a bool where ONNX has an INT
};

struct OpTable {
  const char* onnx_type;
  const char* domain;
  const char* ge_type;
  const InputSpec* inputs;
  size_t input_count;
  const AttributeSpec* attributes;
  size_t attribute_count;
  const char* const* companions;  // attributes for this plug-in only, never given to GE
  size_t companion_count;
  size_t output_count;
};

constexpr InputSpec kKvQuantSparseFlashAttentionInputs[] = {
    {"query", true},
    {"key", true},
    {"value", true},
    {"sparse_indices", true},
    {"key_dequant_scale", false},
    {"value_dequant_scale", false},
    {"block_table", false},
    {"actual_seq_lengths_query", false},
    {"actual_seq_lengths_kv", false},
};
constexpr AttributeSpec kKvQuantSparseFlashAttentionAttributes[] = {
    {"scale_value", kFloat, false},
    {"key_quant_mode", kInt, false},
    {"value_quant_mode", kInt, false},
    {"sparse_block_size", kInt, false},
    {"layout_query", kString, false},
    {"layout_kv", kString, false},
    {"sparse_mode", kInt, false},
    {"pre_tokens", kInt, false},
    {"next_tokens", kInt, false},
    {"attention_mode", kInt, false},
    {"quant_scale_repo_mode", kInt, false},
    {"tile_size", kInt, false},
    {"rope_head_dim", kInt, false},
};
constexpr const char* kKvQuantSparseFlashAttentionCompanions[] = {"scale_value_exact"};
constexpr OpTable kKvQuantSparseFlashAttention = {"NPUKvQuantSparseFlashAttention", "npu", "KvQuantSparseFlashAttention",
    kKvQuantSparseFlashAttentionInputs, 9, kKvQuantSparseFlashAttentionAttributes, 13, kKvQuantSparseFlashAttentionCompanions, 1, 1};

constexpr InputSpec kSparseFlashAttentionAntiquantInputs[] = {
    {"query", true},
    {"key", true},
    {"value", true},
    {"sparse_indices", true},
    {"key_dequant_scale", false},
    {"value_dequant_scale", false},
    {"block_table", false},
    {"actual_seq_lengths_query", false},
    {"actual_seq_lengths_kv", false},
};
constexpr AttributeSpec kSparseFlashAttentionAntiquantAttributes[] = {
    {"scale_value", kFloat, false},
    {"sparse_block_size", kInt, false},
    {"key_quant_mode", kInt, false},
    {"value_quant_mode", kInt, false},
    {"layout_query", kString, false},
    {"layout_kv", kString, false},
    {"sparse_mode", kInt, false},
    {"attention_mode", kInt, false},
    {"quant_scale_repo_mode", kInt, false},
    {"tile_size", kInt, false},
    {"rope_head_dim", kInt, false},
};
constexpr const char* kSparseFlashAttentionAntiquantCompanions[] = {"scale_value_exact"};
constexpr OpTable kSparseFlashAttentionAntiquant = {"NPUSparseFlashAttentionAntiquant", "npu", "SparseFlashAttentionAntiquant",
    kSparseFlashAttentionAntiquantInputs, 9, kSparseFlashAttentionAntiquantAttributes, 11, kSparseFlashAttentionAntiquantCompanions, 1, 1};

constexpr InputSpec kSparseFlashAttentionInputs[] = {
    {"query", true},
    {"key", true},
    {"value", true},
    {"sparse_indices", true},
    {"block_table", false},
    {"actual_seq_lengths_query", false},
    {"actual_seq_lengths_kv", false},
    {"query_rope", false},
    {"key_rope", false},
};
constexpr AttributeSpec kSparseFlashAttentionAttributes[] = {
    {"scale_value", kFloat, false},
    {"sparse_block_size", kInt, false},
    {"layout_query", kString, false},
    {"layout_kv", kString, false},
    {"sparse_mode", kInt, false},
    {"pre_tokens", kInt, false},
    {"next_tokens", kInt, false},
    {"attention_mode", kInt, false},
    {"return_softmax_lse", kInt, true},
};
constexpr const char* kSparseFlashAttentionCompanions[] = {"scale_value_exact"};
constexpr OpTable kSparseFlashAttention = {"NPUSparseFlashAttention", "npu", "SparseFlashAttention",
    kSparseFlashAttentionInputs, 9, kSparseFlashAttentionAttributes, 9, kSparseFlashAttentionCompanions, 1, 3};

constexpr InputSpec kLightningIndexerInputs[] = {
    {"query", true},
    {"key", true},
    {"weights", true},
    {"actual_seq_lengths_query", false},
    {"actual_seq_lengths_key", false},
    {"block_table", false},
};
constexpr AttributeSpec kLightningIndexerAttributes[] = {
    {"layout_query", kString, false},
    {"layout_key", kString, false},
    {"sparse_count", kInt, false},
    {"sparse_mode", kInt, false},
    {"pre_tokens", kInt, false},
    {"next_tokens", kInt, false},
    {"return_values", kInt, true},
};
constexpr OpTable kLightningIndexer = {"NPULightningIndexer", "npu", "LightningIndexer",
    kLightningIndexerInputs, 6, kLightningIndexerAttributes, 7, nullptr, 0, 2};

constexpr InputSpec kQuantLightningIndexerInputs[] = {
    {"query", true},
    {"key", true},
    {"weights", true},
    {"query_dequant_scale", true},
    {"key_dequant_scale", true},
    {"actual_seq_lengths_query", false},
    {"actual_seq_lengths_key", false},
    {"block_table", false},
};
constexpr AttributeSpec kQuantLightningIndexerAttributes[] = {
    {"query_quant_mode", kInt, false},
    {"key_quant_mode", kInt, false},
    {"layout_query", kString, false},
    {"layout_key", kString, false},
    {"sparse_count", kInt, false},
    {"sparse_mode", kInt, false},
    {"pre_tokens", kInt, false},
    {"next_tokens", kInt, false},
};
constexpr OpTable kQuantLightningIndexer = {"NPUQuantLightningIndexer", "npu", "QuantLightningIndexer",
    kQuantLightningIndexerInputs, 8, kQuantLightningIndexerAttributes, 8, nullptr, 0, 1};

constexpr InputSpec kKvCachePackInputs[] = {
    {"nope", true},
    {"rope", false},
    {"scale", false},
    {"clip", false},
};
constexpr AttributeSpec kKvCachePackAttributes[] = {
    {"tile_size", kInt, false},
};
constexpr const char* kKvCachePackCompanions[] = {"rope_dtype"};
constexpr OpTable kKvCachePack = {"KvCachePack", "sfa_onnx", "PartitionedCall",
    kKvCachePackInputs, 4, kKvCachePackAttributes, 1, kKvCachePackCompanions, 1, 1};

constexpr InputSpec kKvCacheWriteInputs[] = {
    {"pages", true},
    {"rows", true},
    {"slot_mapping", true},
};
constexpr OpTable kKvCacheWrite = {"KvCacheWrite", "sfa_onnx", "PartitionedCall",
    kKvCacheWriteInputs, 3, nullptr, 0, nullptr, 0, 1};

}  // namespace sfa_onnx

#endif  // SFA_ONNX_ASCEND_ATTRIBUTE_TABLE_H_
