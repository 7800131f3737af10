#include "indexer.h"

#include <stdlib.h>

namespace sfa {
namespace {

constexpr const char* kRoleNames[kIndexRoles] = {
    "query",
    "key",
    "weights",
    "query_dequant_scale",
    "key_dequant_scale",
    "actual_seq_lengths_query",
    "actual_seq_lengths_key",
    "block_table",
};

struct IndexerKernel {
  const OrtApi* api;
  IndexerAttributes attributes;
};

OrtStatus* ReadInputs(const IndexerKernel& kernel, const OrtKernelContext* context, Tensor* in) {
  const IndexerOp op = kernel.attributes.op;
  for (int role = 0; role < kIndexRoles; ++role) in[role] = Tensor{};
  for (int i = 0; i < IndexerInputs(op); ++i) {
    const IndexerRole role = IndexerRoleOf(op, i);
    SFA_ORT_TRY(ReadInput(kernel.api, context, i, kRoleNames[role], &in[role]));
  }
  return nullptr;
}

OrtStatus* MakeOutput(const OrtApi* api, OrtKernelContext* context, size_t index,
                      const Tensor& query, int64_t count, void** data) {
  int64_t shape[kMaxRank];
  for (size_t i = 0; i < query.rank; ++i) shape[i] = query.dims[i];
  shape[query.rank - 2] = 1;
  shape[query.rank - 1] = count;
  OrtValue* out = nullptr;
  SFA_ORT_TRY(api->KernelContext_GetOutput(context, index, shape, query.rank, &out));
  // An optional output that nobody reads.
  if (out == nullptr) return nullptr;
  return api->GetTensorMutableData(out, data);
}

// The second output has shape [0], as CANN has it, where return_values does not ask for it.
OrtStatus* MakeOutputs(const IndexerKernel& kernel, OrtKernelContext* context, const Tensor& query,
                       sfa_core_indexer_params* params) {
  const int64_t count = kernel.attributes.sparse_count;
  size_t outputs = 0;
  SFA_ORT_TRY(kernel.api->KernelContext_GetOutputCount(context, &outputs));
  void* indices = nullptr;
  SFA_ORT_TRY(MakeOutput(kernel.api, context, 0, query, count, &indices));
  params->sparse_indices = static_cast<int32_t*>(indices);
  if (outputs < 2) return nullptr;
  if (kernel.attributes.return_values != 1) {
    const int64_t none = 0;
    OrtValue* out = nullptr;
    return kernel.api->KernelContext_GetOutput(context, 1, &none, 1, &out);
  }
  void* values = nullptr;
  SFA_ORT_TRY(MakeOutput(kernel.api, context, 1, query, count, &values));
  params->sparse_values = values;
  return nullptr;
}

void RunTask(void* call, size_t task) {
  sfa_core_indexer_run_task(static_cast<sfa_core_indexer_call*>(call), static_cast<int64_t>(task));
}

// Every task is its own batch, as for the attention.
OrtStatus* RunOnPool(const OrtApi* api, const OrtKernelContext* context,
                     const sfa_core_indexer_params& params) {
  sfa_core_error error = {};
  sfa_core_indexer_call* call = nullptr;
  if (sfa_core_indexer_begin(&params, &call, &error) != SFA_CORE_OK) return CoreError(api, error);
  const size_t tasks = static_cast<size_t>(sfa_core_indexer_num_tasks(call));
  OrtStatus* status = nullptr;
  if (tasks == 1) {
    RunTask(call, 0);
  } else if (tasks > 1) {
    status = api->KernelContext_ParallelFor(context, RunTask, tasks, tasks, call);
  }
  const int result = sfa_core_indexer_end(call, &error);
  if (status != nullptr || result == SFA_CORE_OK) return status;
  return CoreError(api, error);
}

}  // namespace

OrtStatusPtr CreateIndexer(const OrtApi* api, const OrtKernelInfo* info, IndexerOp op, int rounding,
                           void** kernel) {
  Message error;
  IndexerAttributes attributes;
  if (!ReadAttributes(api, info, op, &attributes, &error)) return Refuse(api, error);
  attributes.rounding = rounding;
  auto* made = static_cast<IndexerKernel*>(malloc(sizeof(IndexerKernel)));
  if (made == nullptr) return api->CreateStatus(ORT_FAIL, "out of memory");
  *made = IndexerKernel{api, attributes};
  *kernel = made;
  return nullptr;
}

OrtStatusPtr ComputeIndexer(void* kernel, OrtKernelContext* context) {
  const auto& self = *static_cast<const IndexerKernel*>(kernel);
  Tensor in[kIndexRoles];
  SFA_ORT_TRY(ReadInputs(self, context, in));
  sfa_core_indexer_params params;
  Message error;
  if (!DescribeCall(self.attributes, in, &params, &error)) return Refuse(self.api, error);
  SFA_ORT_TRY(MakeOutputs(self, context, in[kIndexQuery], &params));
  return RunOnPool(self.api, context, params);
}

void DestroyIndexer(void* kernel) { free(kernel); }

}  // namespace sfa
