// Small vector vocabulary on GCC vector extensions: SFA_LANES floats. Internal linkage on purpose,
// see fp32_path.h.
#ifndef SFA_ONNX_KERNELS_CORE_VEC_H_
#define SFA_ONNX_KERNELS_CORE_VEC_H_

#include <stdint.h>
#include <string.h>

namespace sfa {
namespace {

constexpr int W = SFA_LANES;
typedef float vf __attribute__((vector_size(SFA_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(SFA_LANES * 4)));

inline vf load(const float* p) { return *(const vf*)p; }
inline void store(float* p, vf v) { *(vf*)p = v; }
inline vf loadu(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void storeu(float* p, vf v) { memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return x - vf{}; }
// The first operand where it is NaN.
inline vf vmax(vf a, vf b) { return b > a ? b : a; }

// The nearest bfloat16, ties to even; NaN stays NaN.
inline vf round_bf16(vf x) {
  const vi u = (vi)x;
  const vf even = (vf)((u + 0x7fff + ((u >> 16) & 1)) & (int32_t)0xffff0000);
  return x == x ? even : x;
}

// A float of the same size, or the next larger one, that is no tie between two float16: what rounds
// to even then rounds ties away from zero. Infinities and NaN stay.
inline vf break_ties(vf x) {
  const vf finite = (vf)((vi)x | 1);
  return x - x == vf{} ? finite : x;
}

// 2^x for x <= 0, relative error 2^-24; NaN stays NaN, below -126 is 0.
inline vf exp2_fine(vf x) {
  const vf floor = splat(-127.0f), magic = splat(12582912.0f);
  x = x < floor ? floor : x;
  const vf shifted = x + magic;  // the integer nearest to x sits in the low mantissa bits
  const vf f = x - (shifted - magic);
  vf y = splat(0x1.41d332p-13f);
  y = y * f + splat(0x1.5f456ap-10f);
  y = y * f + splat(0x1.3b2dbcp-7f);
  y = y * f + splat(0x1.c6aed4p-5f);
  y = y * f + splat(0x1.ebfbdap-3f);
  y = y * f + splat(0x1.62e430p-1f);
  y = y * f + splat(1.0f);
  const vi exponent = ((vi)shifted + 127) << 23;
  return y * (vf)exponent;
}

}  // namespace
}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_VEC_H_
