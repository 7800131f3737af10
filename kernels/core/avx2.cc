// AVX2 + FMA + F16C: the fp32 skeleton with eight lanes.
#include <immintrin.h>

#define SFA_LANES 8
#define SFA_TILE_VECS 2
#include "half.h"
#include "vec.h"

namespace sfa {
namespace {
namespace simd {

inline vf load_i8(const uint8_t* p) {
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline vf load_bf16(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return (vf)_mm256_slli_epi32(wide, 16);
}
inline vf load_f16(const uint8_t* p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
inline void store_as(void* p, int dtype, vf v) {
  if (dtype == SFA_CORE_F32) {
    _mm256_storeu_ps((float*)p, (__m256)v);
  } else if (dtype == SFA_CORE_F16) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  } else {
    for (int i = 0; i < W; ++i) store_from_f32(p, i, dtype, v[i]);
  }
}
inline vf round_f16(vf v) {
  return (vf)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace simd
}  // namespace
}  // namespace sfa

#include "fp32_path.h"

namespace sfa {

const Path* avx2_path() {
  static constexpr Path path = {SFA_CORE_ISA_AVX2, "avx2",      fp32_supports,  fp32_scratch_bytes,
                                fp32_load_query,   fp32_attend, merge_partials, store_partial};
  return &path;
}

}  // namespace sfa
