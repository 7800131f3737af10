// The plain way to append chosen lanes; needs simd::bits only.
#ifndef SFA_ONNX_KERNELS_CORE_INDEXER_APPEND_H_
#define SFA_ONNX_KERNELS_CORE_INDEXER_APPEND_H_

#include "vec.h"

namespace sfa {
namespace {
namespace simd {

// Appends the lanes of a and b whose bit is set to entries [n, ..) of two arrays with room for a
// whole vector; returns the new n.
inline int64_t append(vi a, vi b, vi, uint32_t bits, int32_t* to_a, int32_t* to_b, int64_t n) {
  if (bits == (1u << W) - 1) {
    memcpy(to_a + n, &a, sizeof a);
    memcpy(to_b + n, &b, sizeof b);
    return n + W;
  }
  int32_t as[W], bs[W];
  memcpy(as, &a, sizeof a);
  memcpy(bs, &b, sizeof b);
  for (; bits; bits &= bits - 1, ++n) {
    const int lane = __builtin_ctz(bits);
    to_a[n] = as[lane];
    to_b[n] = bs[lane];
  }
  return n;
}

}  // namespace simd
}  // namespace
}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_INDEXER_APPEND_H_
