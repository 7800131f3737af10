// Normalising and storing of a token's result in natural column order; needs simd::store_as.
#ifndef SFA_ONNX_KERNELS_CORE_STORE_H_
#define SFA_ONNX_KERNELS_CORE_STORE_H_

#include "half.h"
#include "internal.h"
#include "vec.h"

namespace sfa {
namespace {

void store_partial(const Geom& g, const Partial& acc, void* out) {
  const int size = dtype_size(g.query_dtype);
  for (int h = 0; h < g.heads; ++h) {
    const float* o = acc.o + (size_t)h * g.o_stride;
    char* row = (char*)out + (size_t)h * g.nope * size;
    const float inverse = 1.0f / acc.l[h];
    int d = 0;
    for (; d + W <= g.nope; d += W) {
      simd::store_as(row + (size_t)d * size, g.query_dtype, load(o + d) * splat(inverse));
    }
    for (; d < g.nope; ++d) store_from_f32(row, d, g.query_dtype, o[d] * inverse);
  }
}

}  // namespace
}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_STORE_H_
