// Merging and storing of partial results, shared by all paths; include after vec.h and simd::.
#ifndef SFA_ONNX_KERNELS_CORE_PARTIAL_H_
#define SFA_ONNX_KERNELS_CORE_PARTIAL_H_

#include "half.h"
#include "internal.h"
#include "vec.h"

namespace sfa {
namespace {

// acc = acc + add: both are sums relative to their own maximum.
void merge_partials(const Geom& g, Partial* acc, const Partial& add) {
  for (int h = 0; h < g.heads; ++h) {
    const float ma = acc->m[h], mb = add.m[h];
    const float m = ma > mb ? ma : mb;  // NaN in either reaches the factors below
    const float fa = exp2_fine(splat(ma - m))[0], fb = exp2_fine(splat(mb - m))[0];
    acc->m[h] = m;
    acc->l[h] = acc->l[h] * fa + add.l[h] * fb;
    float* oa = acc->o + (size_t)h * g.o_stride;
    const float* ob = add.o + (size_t)h * g.o_stride;
    const vf va = splat(fa), vb = splat(fb);
    for (int d = 0; d < g.nope; d += W) store(oa + d, load(oa + d) * va + load(ob + d) * vb);
  }
}

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

#endif  // SFA_ONNX_KERNELS_CORE_PARTIAL_H_
