// The lightning indexers: what their nodes must look like and how a call reaches the core.
#ifndef SFA_ONNX_KERNELS_ORT_INDEXER_H_
#define SFA_ONNX_KERNELS_ORT_INDEXER_H_

#include "message.h"
#include "ort_abi.h"
#include "sfa_core.h"
#include "tensor.h"

namespace sfa {

enum class IndexerOp { kFloat, kQuant };

// Positions in CANN's order (sfa_onnx/operator/op.py). The float op has no scales.
enum IndexerRole {
  kIndexQuery,
  kIndexKey,
  kIndexWeights,
  kIndexQueryScale,
  kIndexKeyScale,
  kIndexLengthsQuery,
  kIndexLengthsKey,
  kIndexBlockTable,
  kIndexRoles
};

constexpr int IndexerInputs(IndexerOp op) { return op == IndexerOp::kQuant ? 8 : 6; }
constexpr IndexerRole IndexerRoleOf(IndexerOp op, size_t index) {
  const size_t role = op == IndexerOp::kQuant || index < 3 ? index : index + 2;
  return static_cast<IndexerRole>(role);
}
constexpr const char* NameOf(IndexerOp op) {
  return op == IndexerOp::kQuant ? "NPUQuantLightningIndexer" : "NPULightningIndexer";
}

struct IndexerAttributes {
  IndexerOp op;
  int64_t sparse_count;
  int64_t sparse_mode;
  int64_t return_values;  // float op only
  int layout_query;       // sfa_core_layout
  int layout_key;
  int rounding;  // sfa_core_rounding, the session's
};

// Reads and checks the attributes; false with a message on the first illegal one.
bool ReadAttributes(const OrtApi* api, const OrtKernelInfo* info, IndexerOp op,
                    IndexerAttributes* out, Message* error);

// Checks ranks, shapes and which inputs are there, and describes the call to the core (outputs are
// left null). `in` is indexed by IndexerRole. No tensor memory is read.
bool DescribeCall(const IndexerAttributes& attributes, const Tensor* in,
                  sfa_core_indexer_params* params, Message* error);

OrtStatusPtr CreateIndexer(const OrtApi* api, const OrtKernelInfo* info, IndexerOp op, int rounding,
                           void** kernel);
OrtStatusPtr ComputeIndexer(void* kernel, OrtKernelContext* context);
void DestroyIndexer(void* kernel);

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_ORT_INDEXER_H_
