// NEON fp32 (every aarch64, Kunpeng 920 included): the fp32 skeleton with four lanes.
#include <arm_neon.h>

#define SFA_LANES 4
#define SFA_TILE_VECS 4
#include "half.h"
#include "vec.h"

namespace sfa {
namespace {
namespace simd {

inline vf load_i8(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  return (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
inline uint16x4_t load_u16(const uint8_t* p) {
  uint16x4_t v;
  memcpy(&v, p, 8);
  return v;
}
inline vf load_bf16(const uint8_t* p) { return (vf)vshll_n_u16(load_u16(p), 16); }
inline vf load_f16(const uint8_t* p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(load_u16(p))); }
inline void store_as(void* p, int dtype, vf v) {
  if (dtype == SFA_CORE_F32) {
    memcpy(p, &v, 16);
  } else if (dtype == SFA_CORE_F16) {
    const float16x4_t half = vcvt_f16_f32((float32x4_t)v);
    memcpy(p, &half, 8);
  } else {
    for (int i = 0; i < W; ++i) store_from_f32(p, i, dtype, v[i]);
  }
}
inline vf round_f16(vf v) { return (vf)vcvt_f32_f16(vcvt_f16_f32((float32x4_t)v)); }

}  // namespace simd
}  // namespace
}  // namespace sfa

#include "fp32_path.h"

namespace sfa {

const Path* neon_path() {
  static constexpr Path path = {SFA_CORE_ISA_NEON, "neon",      fp32_supports,  fp32_scratch_bytes,
                                fp32_load_query,   fp32_attend, merge_partials, store_partial};
  return &path;
}

}  // namespace sfa
