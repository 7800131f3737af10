#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "attributes.h"
#include "layouts.h"

namespace sfa {
namespace {

constexpr int64_t kInt32Max = INT32_MAX;

// An NPU gives parity-dependent results on holes, so a validation on CPU must not pass them; for
// CPU-only use the environment may relax that.
bool ReadHoles(int* holes, Message* error) {
  const char* value = getenv("SFA_ONNX_HOLES");
  if (value == nullptr || *value == '\0' || strcmp(value, "error") == 0) {
    *holes = SFA_CORE_HOLES_ERROR;
  } else if (strcmp(value, "skip") == 0) {
    *holes = SFA_CORE_HOLES_SKIP;
  } else if (strcmp(value, "stop") == 0) {
    *holes = SFA_CORE_HOLES_STOP;
  } else {
    return error->Add("environment variable SFA_ONNX_HOLES: expected error, skip or stop, got '%s'",
                      value);
  }
  return true;
}

// What all three ops have. The band attributes exist only in CANN's built-ins.
bool ReadCommon(AttributeReader* read, AttentionAttributes* out, Message* error) {
  const bool required = out->op == AttentionOp::kAntiquant;
  if (!read->Float("scale_value", &out->scale_value)) return false;
  if (!read->OptionalExactFloat("scale_value_exact", &out->scale_value)) return false;
  if (!read->IntInRange("sparse_block_size", required ? kRequired : 1, 1, kInt32Max,
                        &out->sparse_block_size)) {
    return false;
  }
  if (!ReadLayouts(read, "layout_kv", &out->layout_query, &out->layout_kv, error)) return false;
  if (!read->IntOf2("sparse_mode", 3, 0, 3, &out->sparse_mode)) return false;
  if (out->op == AttentionOp::kAntiquant) return true;
  return read->IntOf("pre_tokens", INT64_MAX, INT64_MAX) &&
         read->IntOf("next_tokens", INT64_MAX, INT64_MAX);
}

}  // namespace

bool ReadAttributes(const OrtApi* api, const OrtKernelInfo* info, AttentionOp op,
                    AttentionAttributes* out, Message* error) {
  *out = AttentionAttributes{};
  out->op = op;
  AttributeReader read(api, info, error);
  read.NameNode(NameOf(op));
  if (!ReadHoles(&out->holes, error) || !ReadCommon(&read, out, error)) return false;
  if (op == AttentionOp::kFloatCache) {
    int64_t mode = 0;
    return read.IntOf2("attention_mode", 0, 0, 2, &mode) &&
           read.IntOf2("return_softmax_lse", 0, 0, 1, &out->lse);
  }
  // The older op's defaults (0) are no legal call: the attributes must be written out.
  const bool old = op == AttentionOp::kAntiquant;
  return read.IntOf("key_quant_mode", kRequired, 2) &&
         read.IntOf("value_quant_mode", kRequired, 2) && read.IntOf("attention_mode", 0, 2) &&
         read.IntOf("quant_scale_repo_mode", old ? 0 : 1, 1) &&
         read.IntInRange("tile_size", old ? 0 : 128, 1, kInt32Max, &out->tile_size) &&
         read.IntInRange("rope_head_dim", old ? 0 : 64, 0, kInt32Max, &out->rope_head_dim);
}

}  // namespace sfa
