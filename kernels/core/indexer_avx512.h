// What the AVX-512 paths of the indexer share: sixteen lanes of F/BW/DQ/VL.
#ifndef SFA_ONNX_KERNELS_CORE_INDEXER_AVX512_H_
#define SFA_ONNX_KERNELS_CORE_INDEXER_AVX512_H_

#include <immintrin.h>

#define SFA_LANES 16
#include "half.h"
#include "vec.h"

namespace sfa {
namespace {
namespace simd {

inline vf load_f16(const uint8_t* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline vf load_bf16(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return (vf)_mm512_slli_epi32(wide, 16);
}
inline vf round_f16(vf v) {
  return (vf)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
// The second operand where it is NaN.
inline vf relu(vf x) { return (vf)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x); }
inline uint32_t bits(vi take) { return _mm512_movepi32_mask((__m512i)take); }

// As in indexer_append.h.
inline int64_t append(vi a, vi b, vi, uint32_t bits, int32_t* to_a, int32_t* to_b, int64_t n) {
  const __mmask16 mask = (__mmask16)bits;
  _mm512_storeu_si512(to_a + n, _mm512_maskz_compress_epi32(mask, (__m512i)a));
  _mm512_storeu_si512(to_b + n, _mm512_maskz_compress_epi32(mask, (__m512i)b));
  return n + __builtin_popcount(bits);
}

}  // namespace simd
}  // namespace
}  // namespace sfa

#include "indexer_path.h"
#include "indexer_select.h"

#endif  // SFA_ONNX_KERNELS_CORE_INDEXER_AVX512_H_
