// The AVX-512 intrinsics that kernels/core uses, written in portable vector code.
//
// Only a test build sees this header instead of the compiler's: the AVX-512 paths can then be
// tested on machines without AVX-512. Roundings are the instructions' own (the dot product keeps
// its two products unfused and flushes denormals); speed is not.
#ifndef SFA_ONNX_KERNELS_TESTS_EMULATED_IMMINTRIN_H_
#define SFA_ONNX_KERNELS_TESTS_EMULATED_IMMINTRIN_H_

#include_next <immintrin.h>

#include "lanes.h"

// Only names that the kernels use: an unknown one fails to compile.
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_extracti64x4_epi64
#undef _mm512_insertf32x4
#undef _mm512_inserti64x4
#undef _mm512_permute_ps
#undef _mm512_roundscale_ps
#undef _mm512_setr_epi32
#undef _mm512_setr_epi64
#undef _mm512_shuffle_epi32
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_i32x4
#undef _mm512_slli_epi32
#undef _mm512_ternarylogic_epi32

#define _mm512_load_ps sfa_emulated::load
#define _mm512_load_si512 sfa_emulated::load_i
#define _mm512_loadu_si512 sfa_emulated::load_i
#define _mm512_store_ps sfa_emulated::store
#define _mm512_storeu_ps sfa_emulated::store
#define _mm512_store_si512 sfa_emulated::store_i
#define _mm512_storeu_si512 sfa_emulated::store_i
#define _mm512_mask_storeu_ps sfa_emulated::store_masked<float>
#define _mm512_mask_storeu_epi32 sfa_emulated::store_masked<uint32_t>
#define _mm512_maskz_loadu_epi16 sfa_emulated::load_masked<uint16_t, __m512i>
#define _mm_maskz_loadu_ps sfa_emulated::load_masked<float, __m128>
#define _mm512_setzero_ps() sfa_emulated::as<__m512>(sfa_emulated::set1<float>(0))
#define _mm512_setzero_si512() sfa_emulated::set1<int64_t>(0)
#define _mm512_set1_ps(x) sfa_emulated::as<__m512>(sfa_emulated::set1<float>(x))
#define _mm512_set1_epi8 sfa_emulated::set1<int8_t>
#define _mm512_set1_epi32 sfa_emulated::set1<int32_t>
#define _mm512_set1_epi64 sfa_emulated::set1<int64_t>
#define _mm512_broadcastq_epi64(x) sfa_emulated::set1<int64_t>(_mm_cvtsi128_si64(x))

#define _mm512_add_ps sfa_emulated::add
#define _mm512_sub_ps sfa_emulated::sub
#define _mm512_mul_ps sfa_emulated::mul
#define _mm512_div_ps sfa_emulated::div
#define _mm512_max_ps sfa_emulated::max
#define _mm512_fmadd_ps sfa_emulated::fmadd
#define _mm512_mask_mul_ps(s, m, a, b) sfa_emulated::blend<float>(m, s, sfa_emulated::mul(a, b))
#define _mm512_cmp_ps_mask(a, b, how) ((__mmask16)sfa_emulated::compare(a, b, how))
#define _mm512_roundscale_ps(a, how) sfa_emulated::nearest(a)
#define _mm512_scalef_ps sfa_emulated::scalef
#define _mm512_reduce_max_ps(a) sfa_emulated::fold<float>(a, fmaxf)
#define _mm512_reduce_add_ps(a) sfa_emulated::fold<float>(a, [](float x, float y) { return x + y; })
#define _mm512_cvtss_f32(a) sfa_emulated::extract<float>(a, 0)
#define _mm512_maskz_mov_ps(m, a) sfa_emulated::blend<float>(m, _mm512_setzero_ps(), a)
#define _mm512_mask_mov_epi32(s, m, a) sfa_emulated::blend<int32_t>(m, s, a)
#define _mm512_mask_blend_ps(m, a, b) sfa_emulated::blend<float>(m, a, b)

#define _mm512_add_epi8 sfa_emulated::add_bytes
#define _mm512_add_epi32 sfa_emulated::add_dwords
#define _mm512_max_epi32 sfa_emulated::max_dwords
#define _mm512_abs_epi8 sfa_emulated::abs_bytes
#define _mm512_slli_epi32 sfa_emulated::shift_left
#define _mm512_ternarylogic_epi32 sfa_emulated::logic
#define _mm512_test_epi8_mask sfa_emulated::test_bytes
#define _mm512_xor_si512 sfa_emulated::xor_bits
#define _mm512_dpbusd_epi32 sfa_emulated::dot_ints<uint8_t, int8_t>
#define _mm512_madd_epi16(a, b) \
  sfa_emulated::dot_ints<int16_t, int16_t>(_mm512_setzero_si512(), a, b)
#define _mm512_movepi32_mask sfa_emulated::signs
#define _mm512_maskz_compress_epi32 sfa_emulated::compress

#define _mm512_dpbf16_ps sfa_emulated::dot
#define _mm512_cvtneps_pbh sfa_emulated::round_bf16
#define _mm512_cvtne2ps_pbh sfa_emulated::round_bf16_both
#define _mm512_cvtph_ps sfa_emulated::from_f16
#define _mm512_cvtps_ph(x, how) sfa_emulated::to_f16(x)
#define _mm512_cvtepi32_ps sfa_emulated::convert<float, int32_t, __m512>
#define _mm512_cvtepi8_epi16 sfa_emulated::convert<int16_t, int8_t, __m512i>
#define _mm512_cvtepi8_epi32 sfa_emulated::convert<int32_t, int8_t, __m512i>
#define _mm512_cvtepu16_epi32 sfa_emulated::convert<int32_t, uint16_t, __m512i>

#define _mm512_unpacklo_epi8(a, b) sfa_emulated::unpack<uint8_t>(a, b, 0)
#define _mm512_unpackhi_epi8(a, b) sfa_emulated::unpack<uint8_t>(a, b, 1)
#define _mm512_unpacklo_epi16(a, b) sfa_emulated::unpack<uint16_t>(a, b, 0)
#define _mm512_unpackhi_epi16(a, b) sfa_emulated::unpack<uint16_t>(a, b, 1)
#define _mm512_unpacklo_epi32(a, b) sfa_emulated::unpack<uint32_t>(a, b, 0)
#define _mm512_unpackhi_epi32(a, b) sfa_emulated::unpack<uint32_t>(a, b, 1)
#define _mm512_unpacklo_epi64(a, b) sfa_emulated::unpack<uint64_t>(a, b, 0)
#define _mm512_unpackhi_epi64(a, b) sfa_emulated::unpack<uint64_t>(a, b, 1)
#define _mm512_unpacklo_ps(a, b) sfa_emulated::unpack<float>(a, b, 0)
#define _mm512_unpackhi_ps(a, b) sfa_emulated::unpack<float>(a, b, 1)
#define _mm512_unpacklo_pd(a, b) sfa_emulated::unpack<double>(a, b, 0)
#define _mm512_unpackhi_pd(a, b) sfa_emulated::unpack<double>(a, b, 1)

#define _mm512_maskz_permutexvar_epi8(m, index, x) \
  sfa_emulated::blend<uint8_t>(m, _mm512_setzero_si512(), sfa_emulated::permute<uint8_t>(index, x))
#define _mm512_maskz_permutex2var_epi8(m, x, index, y)    \
  sfa_emulated::blend<uint8_t>(m, _mm512_setzero_si512(), \
                               sfa_emulated::permute<uint8_t>(x, index, y))
#define _mm512_permutexvar_epi16 sfa_emulated::permute<uint16_t>
#define _mm512_permutexvar_epi32 sfa_emulated::permute<uint32_t>
#define _mm512_permutexvar_ps sfa_emulated::permute<uint32_t>
#define _mm512_permutex2var_epi64 sfa_emulated::permute<uint64_t>
#define _mm512_shuffle_f32x4 sfa_emulated::shuffle_quarters
#define _mm512_shuffle_i32x4 sfa_emulated::shuffle_quarters
#define _mm512_permute_ps sfa_emulated::shuffle_dwords
#define _mm512_shuffle_epi32(x, how) sfa_emulated::shuffle_dwords(x, (int)(how))

#define _mm512_insertf32x4 sfa_emulated::insert
#define _mm512_inserti64x4 sfa_emulated::insert
#define _mm512_extracti64x4_epi64 sfa_emulated::extract<__m256i>
#define _mm512_castsi512_si256(x) sfa_emulated::extract<__m256i>(x, 0)
#define _mm512_castps512_ps128(x) sfa_emulated::extract<__m128>(x, 0)
#define _mm512_castsi256_si512 sfa_emulated::widen<__m512i>
#define _mm512_castps128_ps512 sfa_emulated::widen<__m512>
#define _mm512_setr_epi32(...) \
  sfa_emulated::as<__m512i>(sfa_emulated::Lanes<int32_t>{{__VA_ARGS__}})
#define _mm512_setr_epi64(...) \
  sfa_emulated::as<__m512i>(sfa_emulated::Lanes<int64_t>{{__VA_ARGS__}})
#define _mm512_set_epi16 sfa_emulated::words_from_the_last

#endif  // SFA_ONNX_KERNELS_TESTS_EMULATED_IMMINTRIN_H_
