// Registration of our operators with CANN's ONNX parser.
//
// Only const char* and AscendString cross the border to CANN, so the library loads whatever string
// ABI it was built with; no protobuf is needed.
#include "register/register.h"

#include "kv_cache_pack.h"
#include "kv_cache_write.h"
#include "log.h"
#include "parse.h"

namespace sfa_onnx {
namespace {

domi::Status Parse(const ge::Operator& source, ge::Operator& target, const OpTable& table) {
  Node node;
  if (!ReadNode(source, table, &node)) return domi::FAILED;
  return SetAttributes(node, table, target) ? domi::SUCCESS : domi::FAILED;
}

domi::Status ParseKvQuant(const ge::Operator& source, ge::Operator& target) {
  return Parse(source, target, kKvQuantSparseFlashAttention);
}

// ops-transformer >= 9.1 has an experimental operator of the same type name and other meaning
// (grouped queries, per-channel scales); its prototype carries sparse_shard_size.
domi::Status ParseAntiquant(const ge::Operator& source, ge::Operator& target) {
  int64_t shard = 0;
  if (target.GetAttr("sparse_shard_size", shard) == ge::GRAPH_SUCCESS) {
    ge::AscendString name;
    (void)source.GetName(name);
    SFA_LOG_ERROR(name.GetString() == nullptr ? "?" : name.GetString(),
                  "the SparseFlashAttentionAntiquant found is the experimental namesake of "
                  "ops-transformer, not the recipes operator; put the recipes package first in "
                  "vendors/config.ini, or convert with --binding kv-quant");
    return domi::FAILED;
  }
  return Parse(source, target, kSparseFlashAttentionAntiquant);
}

// GE's operator has three outputs (attention_out, softmax_max, softmax_sum): the ONNX node uses the
// first; return_softmax_lse, false, leaves the others empty.
domi::Status ParseSparseFlashAttention(const ge::Operator& source, ge::Operator& target) {
  return Parse(source, target, kSparseFlashAttention);
}

domi::Status ParseLightningIndexer(const ge::Operator& source, ge::Operator& target) {
  return Parse(source, target, kLightningIndexer);
}

domi::Status ParseQuantLightningIndexer(const ge::Operator& source, ge::Operator& target) {
  return Parse(source, target, kQuantLightningIndexer);
}

}  // namespace
}  // namespace sfa_onnx

namespace domi {

REGISTER_CUSTOM_OP(sfa_onnx::kKvQuantSparseFlashAttention.ge_type)
    .FrameworkType(ONNX)
    .OriginOpType(sfa_onnx::OriginTypes(sfa_onnx::kKvQuantSparseFlashAttention))
    .ParseParamsByOperatorFn(sfa_onnx::ParseKvQuant)
    .ImplyType(ImplyType::TVM);

REGISTER_CUSTOM_OP(sfa_onnx::kSparseFlashAttentionAntiquant.ge_type)
    .FrameworkType(ONNX)
    .OriginOpType(sfa_onnx::OriginTypes(sfa_onnx::kSparseFlashAttentionAntiquant))
    .ParseParamsByOperatorFn(sfa_onnx::ParseAntiquant)
    .ImplyType(ImplyType::TVM);

REGISTER_CUSTOM_OP(sfa_onnx::kSparseFlashAttention.ge_type)
    .FrameworkType(ONNX)
    .OriginOpType(sfa_onnx::OriginTypes(sfa_onnx::kSparseFlashAttention))
    .ParseParamsByOperatorFn(sfa_onnx::ParseSparseFlashAttention)
    .ImplyType(ImplyType::TVM);

REGISTER_CUSTOM_OP(sfa_onnx::kLightningIndexer.ge_type)
    .FrameworkType(ONNX)
    .OriginOpType(sfa_onnx::OriginTypes(sfa_onnx::kLightningIndexer))
    .ParseParamsByOperatorFn(sfa_onnx::ParseLightningIndexer)
    .ImplyType(ImplyType::TVM);

REGISTER_CUSTOM_OP(sfa_onnx::kQuantLightningIndexer.ge_type)
    .FrameworkType(ONNX)
    .OriginOpType(sfa_onnx::OriginTypes(sfa_onnx::kQuantLightningIndexer))
    .ParseParamsByOperatorFn(sfa_onnx::ParseQuantLightningIndexer)
    .ImplyType(ImplyType::TVM);

REGISTER_CUSTOM_OP(sfa_onnx::kKvCachePack.ge_type)
    .FrameworkType(ONNX)
    .OriginOpType(sfa_onnx::OriginTypes(sfa_onnx::kKvCachePack))
    .ParseParamsByOperatorFn(sfa_onnx::ParseKvCachePack)
    .ParseOpToGraphFn(sfa_onnx::ExpandKvCachePack)
    .ImplyType(ImplyType::TVM);

REGISTER_CUSTOM_OP(sfa_onnx::kKvCacheWrite.ge_type)
    .FrameworkType(ONNX)
    .OriginOpType(sfa_onnx::OriginTypes(sfa_onnx::kKvCacheWrite))
    .ParseParamsByOperatorFn(sfa_onnx::ParseKvCacheWrite)
    .ParseOpToGraphFn(sfa_onnx::ExpandKvCacheWrite)
    .ImplyType(ImplyType::TVM);

}  // namespace domi
