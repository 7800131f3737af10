// Output shapes at session load, symbolic dimensions kept.
#ifndef SFA_ONNX_KERNELS_ORT_SHAPE_INFERENCE_H_
#define SFA_ONNX_KERNELS_ORT_SHAPE_INFERENCE_H_

#include "attention.h"
#include "ort_abi.h"

namespace sfa {

OrtStatusPtr InferAttention(const OrtApi* api, OrtShapeInferContext* context, AttentionOp op);
OrtStatusPtr InferIndexer(const OrtApi* api, OrtShapeInferContext* context);
// The first output is like the first input.
OrtStatusPtr InferSameAsFirst(const OrtApi* api, OrtShapeInferContext* context);
OrtStatusPtr InferPack(const OrtApi* api, OrtShapeInferContext* context);

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_ORT_SHAPE_INFERENCE_H_
