// Small vector vocabulary on GCC vector extensions: SFA_LANES floats. Internal linkage on purpose,
// see fp32_path.h.
#ifndef SFA_ONNX_KERNELS_CORE_VEC_H_
#define SFA_ONNX_KERNELS_CORE_VEC_H_

#include <stdint.h>
#include <string.h>

#include "half.h"

namespace sfa {
namespace {

constexpr int W = SFA_LANES;
typedef float vf __attribute__((vector_size(SFA_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(SFA_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(SFA_LANES * 4)));  // sums that may wrap

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
  const vu u = (vu)x;
  const vf even = (vf)((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u);
  return x == x ? even : x;
}

// The same for numbers of moderate size, see `moderate`. The difference c - x is rounded to eight
// bits of x, and a tie among those has an even c. (Where c - x falls below the binade of c it is
// rounded more finely, to what is exact: x is then within 2^-16 of a power of two.)
inline vf round_bf16_moderate(vf x) {
  const vf c = x * 65536.0f;
  return c - (c - x);
}

// Whether int8 times this number is zero, or neither subnormal nor too large for the sums above.
inline bool moderate(float scale) {
  const uint32_t size = f32_bits(scale) & 0x7fffffff, least = 0x00800000, most = 0x71800000;
  return size - least <= most - least || size == 0;  // 2^-126 to 2^100
}

// A float of the same size, or the next larger one, that is no tie between two float16: what rounds
// to even then rounds ties away from zero. Infinities and NaN stay.
inline vf break_finite_ties(vf x) { return (vf)((vi)x | 1); }
inline vf break_ties(vf x) { return x - x == vf{} ? break_finite_ties(x) : x; }

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
