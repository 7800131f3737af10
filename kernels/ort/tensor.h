// An input of a kernel call: shape, type and memory, read once through the C API.
#ifndef SFA_ONNX_KERNELS_ORT_TENSOR_H_
#define SFA_ONNX_KERNELS_ORT_TENSOR_H_

#include "message.h"
#include "ort_abi.h"
#include "sfa_core.h"

namespace sfa {

constexpr size_t kMaxRank = 16;

struct Tensor {
  const char* name;
  const void* data;
  ONNXTensorElementDataType type;
  size_t rank;
  int64_t dims[kMaxRank];
  bool present;  // false: an optional input that was left out

  int64_t last() const { return dims[rank - 1]; }
};

// Reads input `index` (named `name` in messages); one that is not connected is not present.
OrtStatus* ReadInput(const OrtApi* api, const OrtKernelContext* context, size_t index,
                     const char* name, Tensor* tensor);

// Bytes per element of a float type, and its number in the core.
int ItemSize(ONNXTensorElementDataType type);
int CoreType(ONNXTensorElementDataType type);

// A status with `message`'s text, or with the core's words for its error.
OrtStatus* Refuse(const OrtApi* api, const Message& message);
OrtStatus* CoreError(const OrtApi* api, const sfa_core_error& error);

}  // namespace sfa

// Leaves the function with the status when an API call fails.
#define SFA_ORT_TRY(call)                                    \
  do {                                                       \
    if (OrtStatus* sfa_status_ = (call)) return sfa_status_; \
  } while (0)

#endif  // SFA_ONNX_KERNELS_ORT_TENSOR_H_
