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

// As to_bf16 and pair_int8, but each int8 times its scale, rounded to bf16 (SFA_CORE_ROUNDING_NPU).
//
// One byte permutation puts int8 values into the top bytes of dwords in whatever order is wanted,
// so that converting them to float gives 2^24 times the value: exact, and undone by the scale.
struct DwordOrder {
  alignas(64) uint8_t byte[64];  // source of byte 4i + 3 of the result; the others become zero
};

// Quarter v of to_bf16: low and high half of a, then of b.
constexpr DwordOrder make_row_order(int v) {
  DwordOrder order = {};
  for (int i = 0; i < 16; ++i) {
    const int lane = v % 2 * 2 + i / 8;
    order.byte[4 * i + 3] = (uint8_t)(16 * lane + v / 2 * 8 + i % 8);
  }
  return order;
}

// Half v % 2 of vector v / 2 of pair_int8; bit 6 chooses the second row.
constexpr DwordOrder make_pair_order(int v) {
  DwordOrder order = {};
  for (int i = 0; i < 16; ++i) {
    const int lane = v % 2 * 2 + i / 8;
    order.byte[4 * i + 3] = (uint8_t)(64 * (i % 2) + 16 * lane + v / 2 * 4 + i / 2 % 4);
  }
  return order;
}

constexpr DwordOrder kRowOrder[4] = {make_row_order(0), make_row_order(1), make_row_order(2),
                                     make_row_order(3)};
constexpr DwordOrder kPairOrder[8] = {make_pair_order(0), make_pair_order(1), make_pair_order(2),
                                      make_pair_order(3), make_pair_order(4), make_pair_order(5),
                                      make_pair_order(6), make_pair_order(7)};

constexpr uint64_t kTopBytes = 0x8888888888888888ull;
constexpr float kTinyScale = 0x1p-100f;  // 2^-24 times less is no normal number

struct Scaler {
  __m512 factor;  // of 2^24 times the value
  bool tiny;

  inline __attribute__((always_inline)) explicit Scaler(float scale)
      : factor(_mm512_set1_ps(scale * 0x1p-24f)), tiny(__builtin_fabsf(scale) < kTinyScale) {
    if (__builtin_expect(tiny, 0)) factor = _mm512_set1_ps(scale);
  }
  // For two rows that take turns.
  inline __attribute__((always_inline)) Scaler(float first, float second) {
    tiny = __builtin_fabsf(first) < kTinyScale || __builtin_fabsf(second) < kTinyScale;
    const float down = __builtin_expect(tiny, 0) ? 1.0f : 0x1p-24f;
    factor =
        _mm512_mask_blend_ps(0xaaaa, _mm512_set1_ps(first * down), _mm512_set1_ps(second * down));
  }

  inline __attribute__((always_inline)) __m512 scaled(__m512i bytes) const {
    __m512 x = _mm512_cvtepi32_ps(bytes);
    if (__builtin_expect(tiny, 0)) x = _mm512_mul_ps(x, _mm512_set1_ps(0x1p-24f));
    return _mm512_mul_ps(x, factor);
  }
};

inline __attribute__((always_inline)) __m512i round_quarters(const Scaler& scaler, __m512i low,
                                                             __m512i high) {
  return (__m512i)_mm512_cvtne2ps_pbh(scaler.scaled(high), scaler.scaled(low));
}

// 64 int8 of one row, in the order of to_bf16.
inline __attribute__((always_inline)) void round_row(const Scaler& scaler, __m512i x, __m512i* a,
                                                     __m512i* b) {
  const auto quarter = [&](int v) __attribute__((always_inline)) {
    return _mm512_maskz_permutexvar_epi8(kTopBytes, _mm512_load_si512(kRowOrder[v].byte), x);
  };
  *a = round_quarters(scaler, quarter(0), quarter(1));
  *b = round_quarters(scaler, quarter(2), quarter(3));
}

// Columns of 64 from two rows, in the order of pair_int8.
inline __attribute__((always_inline)) void round_pair(const Scaler& scaler, const uint8_t* r0,
                                                      const uint8_t* r1, uint32_t* out) {
  const __m512i x0 = _mm512_loadu_si512(r0), x1 = _mm512_loadu_si512(r1);
  const auto half = [&](int v) __attribute__((always_inline)) {
    const __m512i order = _mm512_load_si512(kPairOrder[v].byte);
    return _mm512_maskz_permutex2var_epi8(kTopBytes, x0, order, x1);
  };
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    _mm512_store_si512(out + 16 * v, round_quarters(scaler, half(2 * v), half(2 * v + 1)));
  }
}

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
