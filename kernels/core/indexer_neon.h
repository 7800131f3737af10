// What the NEON paths of the indexer share: four lanes.
#ifndef SFA_ONNX_KERNELS_CORE_INDEXER_NEON_H_
#define SFA_ONNX_KERNELS_CORE_INDEXER_NEON_H_

#include <arm_neon.h>

#define SFA_LANES 4
#include "half.h"
#include "vec.h"

namespace sfa {
namespace {
namespace simd {

inline uint16x4_t load_u16(const uint8_t* p) {
  uint16x4_t v;
  memcpy(&v, p, 8);
  return v;
}
inline vf load_bf16(const uint8_t* p) { return (vf)vshll_n_u16(load_u16(p), 16); }
inline vf load_f16(const uint8_t* p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(load_u16(p))); }
inline vf round_f16(vf v) { return (vf)vcvt_f32_f16(vcvt_f16_f32((float32x4_t)v)); }
// NaN where x is.
inline vf relu(vf x) { return (vf)vmaxq_f32((float32x4_t)x, vdupq_n_f32(0)); }
inline uint32_t bits(vi take) {
  const uint32x4_t places = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32((uint32x4_t)take, places));
}

}  // namespace simd
}  // namespace
}  // namespace sfa

#include "indexer_append.h"
#include "indexer_path.h"
#include "indexer_select.h"

#endif  // SFA_ONNX_KERNELS_CORE_INDEXER_NEON_H_
