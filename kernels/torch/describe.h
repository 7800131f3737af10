// What a call looks like to the table of known forms.
#ifndef SFA_ONNX_KERNELS_TORCH_DESCRIBE_H_
#define SFA_ONNX_KERNELS_TORCH_DESCRIBE_H_

#include "sfa_torch.h"

namespace sfa_torch {

constexpr int kValues = 48;      // arguments of a call
constexpr size_t kBytes = 2048;  // of a description

struct Description {
  char bytes[kBytes];
  size_t size = 0;
  const void* address[kValues];  // of the tensors among the values, else null
  int values = 0;
  bool graded = false;  // gradients are on
};

// False: the call is none for the table (a tensor that is not plain, a value of another kind, too
// much of it). No Python error is left behind.
bool describe(const sfa_torch_api& api, sfa_py* setting, sfa_py* args, sfa_py* kwargs,
              Description* d);

}  // namespace sfa_torch

#endif  // SFA_ONNX_KERNELS_TORCH_DESCRIBE_H_
