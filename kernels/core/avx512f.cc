// AVX-512 F/BW/DQ/VL: the fp32 skeleton with sixteen lanes.
#include <immintrin.h>

#define SFA_LANES 16
#define SFA_TILE_VECS 4
#include "half.h"
#include "vec.h"

namespace sfa {
namespace {
namespace simd {

inline vf load_i8(const uint8_t* p) {
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline vf load_bf16(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return (vf)_mm512_slli_epi32(wide, 16);
}
inline vf load_f16(const uint8_t* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline void store_as(void* p, int dtype, vf v) {
  if (dtype == SFA_CORE_F32) {
    _mm512_storeu_ps((float*)p, (__m512)v);
  } else if (dtype == SFA_CORE_F16) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  } else {
    for (int i = 0; i < W; ++i) store_from_f32(p, i, dtype, v[i]);
  }
}
inline vf round_f16(vf v) {
  return (vf)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace simd
}  // namespace
}  // namespace sfa

#include "fp32_path.h"

namespace sfa {

const Path* avx512f_path() {
  static constexpr Path path = {SFA_CORE_ISA_AVX512F, "avx512f",       fp32_supports,
                                fp32_scratch_bytes,   fp32_load_query, fp32_attend,
                                merge_partials,       store_partial};
  return &path;
}

}  // namespace sfa
