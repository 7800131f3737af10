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
  kSinks,
  kRoles
};

// Input position -> role, in CANN's order (sfa_onnx/operator/op.py).
constexpr int kAttentionInputs = 10;
constexpr Role kPackedInputs[kAttentionInputs] = {
    kQuery,      kKey,        kValue,        kIndices,   kKeyScale,
    kValueScale, kBlockTable, kLengthsQuery, kLengthsKv, kSinks,
};
constexpr Role kFloatInputs[kAttentionInputs] = {
    kQuery,        kKey,       kValue,     kIndices, kBlockTable,
    kLengthsQuery, kLengthsKv, kQueryRope, kKeyRope, kSinks,
};

constexpr const Role* InputsOf(AttentionOp op) {
  return op == AttentionOp::kFloatCache ? kFloatInputs : kPackedInputs;
}

constexpr const char* NameOf(AttentionOp op) {
  return op == AttentionOp::kAntiquant ? "NPUSparseFlashAttentionAntiquant"
         : op == AttentionOp::kKvQuant ? "NPUKvQuantSparseFlashAttention"
                                       : "NPUSparseFlashAttention";
}

// The float-cache op has softmax_max and softmax_sum after its output.
constexpr int kFloatOutputs = 3;

struct AttentionAttributes {
  AttentionOp op;
  float scale_value;
  int64_t sparse_block_size;
  int64_t sparse_mode;
  int64_t tile_size;      // packed rows only
  int64_t rope_head_dim;  // packed rows only
  int layout_query;       // sfa_core_layout
  int layout_kv;
  int holes;     // sfa_core_holes
  int rounding;  // sfa_core_rounding, the session's
  int64_t lse;   // return_softmax_lse: softmax_max and softmax_sum hold values, else nothing
};

// Reads and checks the attributes; false with a message on the first illegal one.
bool ReadAttributes(const OrtApi* api, const OrtKernelInfo* info, AttentionOp op,
                    AttentionAttributes* out, Message* error);

// Checks ranks, shapes and which inputs are there, and describes the call to the core (`out` is
// left null). `in` is indexed by Role. No tensor memory is read.
bool DescribeCall(const AttentionAttributes& attributes, const Tensor* in, sfa_core_params* params,
                  Message* error);

// [B,S1,N1,C] -> [B,1,S1,N1], [T,N1,C] -> [1,T,N1]; returns the rank.
inline size_t SoftmaxShape(const int64_t* query, size_t rank, int64_t* shape) {
  const size_t batched = rank == 4;
  if (batched) shape[0] = query[0];
  shape[batched] = 1;
  shape[batched + 1] = query[batched];
  shape[batched + 2] = query[batched + 1];
  return rank;
}

OrtStatusPtr CreateAttention(const OrtApi* api, const OrtKernelInfo* info, AttentionOp op,
                             int rounding, void** kernel);
OrtStatusPtr ComputeAttention(void* kernel, OrtKernelContext* context);
void DestroyAttention(void* kernel);

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_ORT_ATTENTION_H_
