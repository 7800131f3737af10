#include "attention.h"

#include <stdlib.h>

namespace sfa {
namespace {

constexpr const char* kRoleNames[kRoles] = {
    "query",
    "key",
    "value",
    "sparse_indices",
    "key_dequant_scale",
    "value_dequant_scale",
    "block_table",
    "actual_seq_lengths_query",
    "actual_seq_lengths_kv",
    "query_rope",
    "key_rope",
    "sinks",
};

// A node's kernel: nothing but its attributes. Scratch belongs to the core, process-wide.
struct AttentionKernel {
  const OrtApi* api;
  AttentionAttributes attributes;
};

// `value` is never looked at: V is the latent part of the key rows.
OrtStatus* ReadInputs(const AttentionKernel& kernel, const OrtKernelContext* context, Tensor* in) {
  for (int role = 0; role < kRoles; ++role) in[role] = Tensor{};
  const Role* roles = InputsOf(kernel.attributes.op);
  for (int i = 0; i < kAttentionInputs; ++i) {
    const Role role = roles[i];
    if (role == kValue) continue;
    SFA_ORT_TRY(ReadInput(kernel.api, context, i, kRoleNames[role], &in[role]));
  }
  return nullptr;
}

// softmax_max and softmax_sum, [B,1,S1,N1] or [1,T,N1]; nothing, as CANN has it, when they are not
// asked for.
OrtStatus* SoftmaxOutputs(const AttentionKernel& kernel, OrtKernelContext* context,
                          const Tensor& query, sfa_core_params* params) {
  size_t outputs = 0;
  SFA_ORT_TRY(kernel.api->KernelContext_GetOutputCount(context, &outputs));
  int64_t shape[kMaxRank] = {};
  const size_t rank = SoftmaxShape(query.dims, query.rank, shape);
  float* data[kFloatOutputs] = {};
  for (size_t i = 1; i < kFloatOutputs && i < outputs; ++i) {
    OrtValue* out = nullptr;
    void* memory = nullptr;
    const int64_t nothing = 0;
    SFA_ORT_TRY(kernel.api->KernelContext_GetOutput(context, i,
                                                    kernel.attributes.lse ? shape : &nothing,
                                                    kernel.attributes.lse ? rank : 1, &out));
    if (out == nullptr) continue;
    SFA_ORT_TRY(kernel.api->GetTensorMutableData(out, &memory));
    if (kernel.attributes.lse) data[i] = static_cast<float*>(memory);
  }
  params->softmax_max = data[1];
  params->softmax_sum = data[2];
  return nullptr;
}

void RunTask(void* call, size_t task) {
  sfa_core_run_task(static_cast<sfa_core_call*>(call), static_cast<int64_t>(task));
}

// The pool's size cannot be asked for, so every task is its own batch and the pool's threads take
// them one by one.
OrtStatus* RunOnPool(const OrtApi* api, const OrtKernelContext* context,
                     const sfa_core_params& params) {
  sfa_core_error error = {};
  sfa_core_call* call = nullptr;
  if (sfa_core_begin(&params, &call, &error) != SFA_CORE_OK) return CoreError(api, error);
  const size_t tasks = static_cast<size_t>(sfa_core_num_tasks(call));
  OrtStatus* status = nullptr;
  if (tasks == 1) {
    RunTask(call, 0);
  } else if (tasks > 1) {
    status = api->KernelContext_ParallelFor(context, RunTask, tasks, tasks, call);
  }
  const int result = sfa_core_end(call, &error);
  if (status != nullptr || result == SFA_CORE_OK) return status;
  return CoreError(api, error);
}

}  // namespace

OrtStatusPtr CreateAttention(const OrtApi* api, const OrtKernelInfo* info, AttentionOp op,
                             int rounding, void** kernel) {
  Message error;
  AttentionAttributes attributes;
  if (!ReadAttributes(api, info, op, &attributes, &error)) return Refuse(api, error);
  attributes.rounding = rounding;
  auto* made = static_cast<AttentionKernel*>(malloc(sizeof(AttentionKernel)));
  if (made == nullptr) return api->CreateStatus(ORT_FAIL, "out of memory");
  *made = AttentionKernel{api, attributes};
  *kernel = made;
  return nullptr;
}

OrtStatusPtr ComputeAttention(void* kernel, OrtKernelContext* context) {
  const auto& self = *static_cast<const AttentionKernel*>(kernel);
  Tensor in[kRoles];
  SFA_ORT_TRY(ReadInputs(self, context, in));
  sfa_core_params params;
  Message error;
  if (!DescribeCall(self.attributes, in, &params, &error)) return Refuse(self.api, error);

  const Tensor& query = in[kQuery];
  int64_t shape[kMaxRank];
  for (size_t i = 0; i < query.rank; ++i) shape[i] = query.dims[i];
  shape[query.rank - 1] = params.nope_dim;
  OrtValue* out = nullptr;
  SFA_ORT_TRY(self.api->KernelContext_GetOutput(context, 0, shape, query.rank, &out));
  SFA_ORT_TRY(self.api->GetTensorMutableData(out, &params.out));
  if (self.attributes.op == AttentionOp::kFloatCache) {
    SFA_ORT_TRY(SoftmaxOutputs(self, context, query, &params));
  }
  if (params.num_heads == 0) return nullptr;  // nothing to write; the core wants a head
  return RunOnPool(self.api, context, params);
}

void DestroyAttention(void* kernel) { free(kernel); }

}  // namespace sfa
