// Merging of partial results, shared by all paths.
#ifndef SFA_ONNX_KERNELS_CORE_PARTIAL_H_
#define SFA_ONNX_KERNELS_CORE_PARTIAL_H_

#include "internal.h"
#include "vec.h"

namespace sfa {
namespace {

// acc = acc + add: both are sums relative to their own maximum.
void merge_partials(const Geom& g, Partial* acc, const Partial& add) {
  for (int h = 0; h < g.heads; ++h) {
    const float ma = acc->m[h], mb = add.m[h];
    const float m = ma > mb ? ma : mb;  // NaN in either reaches the factors below
    float* oa = acc->o + (size_t)h * g.o_stride;
    const float* ob = add.o + (size_t)h * g.o_stride;
    // A chunk whose scores are all -inf weighs nothing beside a finite one (alone it is NaN).
    const float lowest = -__builtin_inff();
    if (mb == lowest && ma > lowest) continue;
    if (ma == lowest && mb > lowest) {
      acc->m[h] = mb;
      acc->l[h] = add.l[h];
      for (int d = 0; d < g.nope; d += W) store(oa + d, load(ob + d));
      continue;
    }
    const float fa = exp2_fine(splat(ma - m))[0], fb = exp2_fine(splat(mb - m))[0];
    acc->m[h] = m;
    acc->l[h] = acc->l[h] * fa + add.l[h] * fb;
    const vf va = splat(fa), vb = splat(fb);
    for (int d = 0; d < g.nope; d += W) store(oa + d, load(oa + d) * va + load(ob + d) * vb);
  }
}

}  // namespace
}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_PARTIAL_H_
