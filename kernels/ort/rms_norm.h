// npu::NPURmsNorm and npu::NPUAddRmsNorm: the vendor's fused norms, so that files for ATC run here.
#ifndef SFA_ONNX_KERNELS_ORT_RMS_NORM_H_
#define SFA_ONNX_KERNELS_ORT_RMS_NORM_H_

#include "ort_abi.h"

namespace sfa {

// Adds both, for every combination of types the NPU operators take, to a domain.
OrtStatus* AddRmsNorms(const OrtApi* api, OrtCustomOpDomain* domain);

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_ORT_RMS_NORM_H_
