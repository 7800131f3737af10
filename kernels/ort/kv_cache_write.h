// sfa_onnx::KvCacheWrite: new rows into a paged cache, in place where the runtime lets us.
#ifndef SFA_ONNX_KERNELS_ORT_KV_CACHE_WRITE_H_
#define SFA_ONNX_KERNELS_ORT_KV_CACHE_WRITE_H_

#include "ort_abi.h"

namespace sfa {

// Adds the op to a domain, for every type of row. `in_place`: the runtime (1.18 or newer) asks
// which outputs may lie in an input's memory.
OrtStatus* AddKvCacheWrite(const OrtApi* api, OrtCustomOpDomain* domain, bool in_place);

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_ORT_KV_CACHE_WRITE_H_
