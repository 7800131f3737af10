// A real onnxruntime, found at run time, as far as the fuzzer needs it.
#ifndef SFA_ONNX_KERNELS_TESTS_FUZZ_RUNTIME_H_
#define SFA_ONNX_KERNELS_TESTS_FUZZ_RUNTIME_H_

#include <string>
#include <vector>

#include "../../ort/ort_abi.h"

namespace sfa_fuzz {

// An input: its memory is exactly as large as type and dims say.
struct Fed {
  std::string name;
  int type = 0;  // ONNXTensorElementDataType
  std::vector<int64_t> dims;
  std::vector<uint8_t> bytes;
};

// Opens a model in a session with our operators, and runs it once. The text of the refusal, or "".
// The library comes from the environment variable SFA_FUZZ_ONNXRUNTIME.
std::string OpenAndRun(const std::string& model, bool npu_rounding, std::vector<Fed>& feeds,
                       const std::vector<std::string>& outputs);

}  // namespace sfa_fuzz

#endif  // SFA_ONNX_KERNELS_TESTS_FUZZ_RUNTIME_H_
