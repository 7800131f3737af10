// sfa_onnx::KvCachePack: latent, rope (and scales) -> packed int8 rows.
#ifndef SFA_ONNX_KERNELS_ORT_KV_CACHE_PACK_H_
#define SFA_ONNX_KERNELS_ORT_KV_CACHE_PACK_H_

#include "ort_abi.h"

namespace sfa {

constexpr char kPackName[] = "KvCachePack";

enum PackInput { kNope, kRope, kScale, kClip, kPackInputs };

OrtStatusPtr CreatePack(const OrtApi* api, const OrtKernelInfo* info, void** kernel);
OrtStatusPtr ComputePack(void* kernel, OrtKernelContext* context);
void DestroyPack(void* kernel);

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_ORT_KV_CACHE_PACK_H_
