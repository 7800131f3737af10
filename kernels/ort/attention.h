// The sparse attention ops: what their nodes must look like and how a call reaches the core.
#ifndef SFA_ONNX_KERNELS_ORT_ATTENTION_H_
#define SFA_ONNX_KERNELS_ORT_ATTENTION_H_

#include "message.h"
#include "ort_abi.h"
#include "sfa_core.h"
#include "tensor.h"

namespace sfa {

// The three node types; two of them differ only in defaults and in pre_tokens / next_tokens.
enum class AttentionOp { kAntiquant, kKvQuant, kFloatCache };

// Positions in the table of roles below.
enum Role {
  kQuery,
  kKey,
  kValue,
  kIndices,
  kKeyScale,
  kValueScale,
  kBlockTable,
  kLengthsQuery,
  kLengthsKv,
  kQueryRope,
  kKeyRope,
  kRoles
};

// Input position -> role, in CANN's order (sfa_onnx/operator/op.py).
constexpr int kAttentionInputs = 9;
constexpr Role kPackedInputs[kAttentionInputs] = {
    kQuery, kKey, kValue, kIndices, kKeyScale, kValueScale, kBlockTable, kLengthsQuery, kLengthsKv,
};
constexpr Role kFloatInputs[kAttentionInputs] = {
    kQuery, kKey, kValue, kIndices, kBlockTable, kLengthsQuery, kLengthsKv, kQueryRope, kKeyRope,
};

constexpr const Role* InputsOf(AttentionOp op) {
  return op == AttentionOp::kFloatCache ? kFloatInputs : kPackedInputs;
}

constexpr const char* NameOf(AttentionOp op) {
  return op == AttentionOp::kAntiquant ? "NPUSparseFlashAttentionAntiquant"
         : op == AttentionOp::kKvQuant ? "NPUKvQuantSparseFlashAttention"
                                       : "NPUSparseFlashAttention";
}

struct AttentionAttributes {
  AttentionOp op;
  float scale_value;
  int64_t sparse_block_size;
  int64_t sparse_mode;
  int64_t tile_size;      // packed rows only
  int64_t rope_head_dim;  // packed rows only
  int layout_query;       // sfa_core_layout
  int layout_kv;
  int holes;  // sfa_core_holes
};

// Reads and checks the attributes; false with a message on the first illegal one.
bool ReadAttributes(const OrtApi* api, const OrtKernelInfo* info, AttentionOp op,
                    AttentionAttributes* out, Message* error);

// Checks ranks, shapes and which inputs are there, and describes the call to the core (`out` is
// left null). `in` is indexed by Role. No tensor memory is read.
bool DescribeCall(const AttentionAttributes& attributes, const Tensor* in, sfa_core_params* params,
                  Message* error);

OrtStatusPtr CreateAttention(const OrtApi* api, const OrtKernelInfo* info, AttentionOp op,
                             void** kernel);
OrtStatusPtr ComputeAttention(void* kernel, OrtKernelContext* context);
void DestroyAttention(void* kernel);

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_ORT_ATTENTION_H_
