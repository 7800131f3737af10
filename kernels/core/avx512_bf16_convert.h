// int8 -> bf16 without rounding, and the pair interleaving that vdpbf16ps wants. AVX512-BF16 only.
//
// Every int8 value is a bf16 value. Low and high byte of |x| = 1..128 come from two 128-entry byte
// tables (vpermi2b), the sign is or-ed in, zeros are masked: 8 instructions for 64 elements where
// widening to float and rounding back takes 10 slower ones.
#ifndef SFA_ONNX_KERNELS_CORE_AVX512_BF16_CONVERT_H_
#define SFA_ONNX_KERNELS_CORE_AVX512_BF16_CONVERT_H_

#include <immintrin.h>
#include <stdint.h>

namespace sfa {
namespace {

struct ByteTables {
  alignas(64) uint8_t low[128], high[128];
};

constexpr ByteTables make_tables() {
  ByteTables t = {};
  for (int v = 1; v <= 128; ++v) {
    int exponent = 0;
    while ((v >> (exponent + 1)) != 0) ++exponent;
    const int mantissa = (v << (7 - exponent)) & 0x7f;  // seven bits hold 1..128 exactly
    const int bits = (127 + exponent) << 7 | mantissa;
    t.low[v - 1] = (uint8_t)(bits & 0xff);
    t.high[v - 1] = (uint8_t)(bits >> 8);
  }
  return t;
}

constexpr ByteTables kTables = make_tables();

struct Converter {
  __m512i low0, low1, high0, high1, sign, minus_one;

  Converter()
      : low0(_mm512_load_si512(kTables.low)),
        low1(_mm512_load_si512(kTables.low + 64)),
        high0(_mm512_load_si512(kTables.high)),
        high1(_mm512_load_si512(kTables.high + 64)),
        sign(_mm512_set1_epi8((char)0x80)),
        minus_one(_mm512_set1_epi8(-1)) {}

  // 64 int8 -> 64 bf16. a: elements 16L+0..7 of each 128-bit lane L, b: 16L+8..15.
  inline __attribute__((always_inline)) void to_bf16(__m512i x, __m512i* a, __m512i* b) const {
    const __mmask64 nonzero = _mm512_test_epi8_mask(x, x);
    const __m512i index = _mm512_add_epi8(_mm512_abs_epi8(x), minus_one);
    const __m512i low = _mm512_maskz_permutex2var_epi8(nonzero, low0, index, low1);
    __m512i high = _mm512_maskz_permutex2var_epi8(nonzero, high0, index, high1);
    high = _mm512_ternarylogic_epi32(high, x, sign, 0xf8);  // high | (x & sign)
    *a = _mm512_unpacklo_epi8(low, high);
    *b = _mm512_unpackhi_epi8(low, high);
  }
};

// Position, inside a block of 32 dwords, of the pair of columns (2r, 2r + 1) after to_bf16.
constexpr int converted_position(int r) { return (r % 8 < 4 ? 0 : 16) + 4 * (r / 8) + r % 4; }

// 64 bf16 in order (a, b) -> the order of to_bf16.
inline __attribute__((always_inline)) void split_lanes(__m512i* a, __m512i* b) {
  const __m512i even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
  const __m512i odd = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
  const __m512i x = *a, y = *b;
  *a = _mm512_permutex2var_epi64(x, even, y);
  *b = _mm512_permutex2var_epi64(x, odd, y);
}

// Columns of 64 from two rows -> four vectors of (row 0, row 1) pairs. Element 16L + 4v + j sits in
// vector v, dword 4L + j, for int8 and bf16 rows alike.
inline __attribute__((always_inline)) void pair_int8(const Converter& c, const uint8_t* r0,
                                                     const uint8_t* r1, uint32_t* out) {
  const __m512i x0 = _mm512_loadu_si512(r0), x1 = _mm512_loadu_si512(r1);
  __m512i v[4];
  c.to_bf16(_mm512_unpacklo_epi8(x0, x1), &v[0], &v[1]);
  c.to_bf16(_mm512_unpackhi_epi8(x0, x1), &v[2], &v[3]);
  for (int i = 0; i < 4; ++i) _mm512_store_si512(out + 16 * i, v[i]);
}

inline __attribute__((always_inline)) void pair_bf16(const uint8_t* r0, const uint8_t* r1,
                                                     uint32_t* out) {
  __m512i e0 = _mm512_loadu_si512(r0), o0 = _mm512_loadu_si512(r0 + 64);
  __m512i e1 = _mm512_loadu_si512(r1), o1 = _mm512_loadu_si512(r1 + 64);
  split_lanes(&e0, &o0);
  split_lanes(&e1, &o1);
  _mm512_store_si512(out, _mm512_unpacklo_epi16(e0, e1));
  _mm512_store_si512(out + 16, _mm512_unpackhi_epi16(e0, e1));
  _mm512_store_si512(out + 32, _mm512_unpacklo_epi16(o0, o1));
  _mm512_store_si512(out + 48, _mm512_unpackhi_epi16(o0, o1));
}

// The inverse order for 64 accumulated columns: four vectors -> columns 0..63 in order.
inline __attribute__((always_inline)) void natural_order(__m512 v[4]) {
  const __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44);  // lanes 0,1 of v0, then of v1
  const __m512 b = _mm512_shuffle_f32x4(v[2], v[3], 0x44);
  const __m512 c = _mm512_shuffle_f32x4(v[0], v[1], 0xee);  // lanes 2,3
  const __m512 d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_f32x4(a, b, 0x88);
  v[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
  v[2] = _mm512_shuffle_f32x4(c, d, 0x88);
  v[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}

// 16x16 transpose of dwords.
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

}  // namespace
}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_AVX512_BF16_CONVERT_H_
