// NEON with bf16 dot products (Neoverse V1/N2, newer Kunpeng): the bf16 skeleton with four lanes.
#include <arm_neon.h>

#define SFA_LANES 4
#define SFA_TILE_VECS 4
#include "half.h"
#include "vec.h"

namespace sfa {
namespace {
namespace simd {

using Pairs = bfloat16x8_t;

inline Pairs load_pairs(const uint32_t* p) { return vreinterpretq_bf16_u32(vld1q_u32(p)); }
inline Pairs splat_pair(const uint32_t* p) { return vreinterpretq_bf16_u32(vld1q_dup_u32(p)); }
inline vf dot(vf acc, Pairs a, Pairs b) { return (vf)vbfdotq_f32((float32x4_t)acc, a, b); }

// The upper halves of eight floats are exact bf16: int8 needs no more bits.
inline uint16x8_t high_halves(int16x8_t x) {
  const float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(x)));
  const float32x4_t high = vcvtq_f32_s32(vmovl_s16(vget_high_s16(x)));
  return vuzp2q_u16(vreinterpretq_u16_f32(low), vreinterpretq_u16_f32(high));
}

inline void widen_i8(const uint8_t* src, int n, uint32_t* dst) {
  uint16_t* out = (uint16_t*)dst;
  for (int i = 0; i < n; i += 16) {
    const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(src + i));
    vst1q_u16(out + i, high_halves(vmovl_s8(vget_low_s8(x))));
    vst1q_u16(out + i + 8, high_halves(vmovl_s8(vget_high_s8(x))));
  }
}

inline void scale_i8(const uint8_t* src, int n, float scale, uint32_t* dst) {
  uint16_t* out = (uint16_t*)dst;
  for (int i = 0; i < n; i += 8) {
    const int16x8_t x = vmovl_s8(vreinterpret_s8_u8(vld1_u8(src + i)));
    const float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(x)));
    const float32x4_t high = vcvtq_f32_s32(vmovl_s16(vget_high_s16(x)));
    const bfloat16x8_t both = vcvtq_low_bf16_f32(vmulq_n_f32(low, scale));
    vst1q_u16(out + i, vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(both, vmulq_n_f32(high, scale))));
  }
}

inline void interleave(const uint32_t* r0, const uint32_t* r1, int n, uint32_t* dst) {
  const uint16_t *a = (const uint16_t*)r0, *b = (const uint16_t*)r1;
  uint16_t* out = (uint16_t*)dst;
  for (int i = 0; i < n; i += 8) {
    const uint16x8_t x = vld1q_u16(a + i), y = vld1q_u16(b + i);
    vst1q_u16(out + 2 * i, vzip1q_u16(x, y));
    vst1q_u16(out + 2 * i + 8, vzip2q_u16(x, y));
  }
}

inline void store_as(void* p, int dtype, vf v) {
  if (dtype == SFA_CORE_F16) {
    const float16x4_t half = vcvt_f16_f32((float32x4_t)v);
    memcpy(p, &half, 8);
  } else {
    for (int i = 0; i < W; ++i) store_from_f32(p, i, dtype, v[i]);
  }
}

}  // namespace simd
}  // namespace
}  // namespace sfa

#include "bf16_path.h"

namespace sfa {

const Path* neon_bf16_path() {
  static constexpr Path path = {SFA_CORE_ISA_NEON_BF16, "neon_bf16",     bf16_supports,
                                bf16_scratch_bytes,     bf16_load_query, bf16_attend,
                                merge_partials,         store_partial};
  return &path;
}

}  // namespace sfa
