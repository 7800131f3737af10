// What AVX-512 instructions do to the lanes of a register, in portable vector code.
//
// Included by the emulated <immintrin.h> alone, behind the compiler's own, whose types it takes.
#ifndef SFA_ONNX_KERNELS_TESTS_EMULATED_LANES_H_
#define SFA_ONNX_KERNELS_TESTS_EMULATED_LANES_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace sfa_emulated {

// Lanes of a register, by element type.
template <typename T, int N = 64 / sizeof(T)>
struct Lanes {
  T at[N];
};

template <typename To, typename From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "registers of one size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <typename T, typename Register, typename Function>
inline Register each(Function function) {
  Lanes<T, sizeof(Register) / sizeof(T)> out;
  for (int i = 0; i < (int)(sizeof(Register) / sizeof(T)); ++i) out.at[i] = function(i);
  return as<Register>(out);
}

template <typename T, typename Register>
inline Lanes<T, sizeof(Register) / sizeof(T)> lanes(const Register& x) {
  return as<Lanes<T, sizeof(Register) / sizeof(T)>>(x);
}

// ---- memory and constants ----

inline __m512 load(const void* p) {
  __m512 x;
  memcpy(&x, p, 64);
  return x;
}
inline __m512i load_i(const void* p) { return as<__m512i>(load(p)); }
inline void store(void* p, __m512 x) { memcpy(p, &x, 64); }
inline void store_i(void* p, __m512i x) { memcpy(p, &x, 64); }

template <typename T, typename Mask, typename Register>
inline void store_masked(void* p, Mask mask, Register x) {
  const auto v = lanes<T>(x);
  for (size_t i = 0; i < sizeof(Register) / sizeof(T); ++i) {
    if (mask >> i & 1) memcpy((char*)p + i * sizeof(T), &v.at[i], sizeof(T));
  }
}
template <typename T, typename Register, typename Mask>
inline Register load_masked(Mask mask, const void* p) {
  return each<T, Register>([&](int i) {
    T x = 0;
    if (mask >> i & 1) memcpy(&x, (const char*)p + i * sizeof(T), sizeof(T));
    return x;
  });
}
template <typename T>
inline __m512i set1(T x) {
  return each<T, __m512i>([&](int) { return x; });
}

// ---- arithmetic ----

inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  const auto x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c);
  return each<float, __m512>([&](int i) { return __builtin_fmaf(x.at[i], y.at[i], z.at[i]); });
}
// Separate rounding of product and sum wherever the source says so.
inline __m512 mul(__m512 a, __m512 b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return each<float, __m512>([&](int i) { return x.at[i] * y.at[i]; });
}
inline __m512 max(__m512 a, __m512 b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return each<float, __m512>([&](int i) { return x.at[i] > y.at[i] ? x.at[i] : y.at[i]; });
}
inline uint64_t compare(__m512 a, __m512 b, int how) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  uint64_t mask = 0;
  for (int i = 0; i < 16; ++i) {
    const bool yes = how == _CMP_EQ_OQ ? x.at[i] == y.at[i] : x.at[i] > y.at[i];
    mask |= (uint64_t)yes << i;
  }
  return mask;
}
inline __m512 nearest(__m512 a) {
  const auto x = lanes<float>(a);
  return each<float, __m512>([&](int i) { return nearbyintf(x.at[i]); });
}
// A NaN times 2^-inf is zero, as the instruction has it.
inline __m512 scalef(__m512 a, __m512 n) {
  const auto x = lanes<float>(a), y = lanes<float>(n);
  return each<float, __m512>(
      [&](int i) { return y.at[i] == -INFINITY ? 0.0f : x.at[i] * exp2f(floorf(y.at[i])); });
}
template <typename T, typename Mask, typename Register>
inline Register blend(Mask mask, Register zero, Register one) {
  const auto a = lanes<T>(zero), b = lanes<T>(one);
  return each<T, Register>([&](int i) { return mask >> i & 1 ? b.at[i] : a.at[i]; });
}
template <typename T, typename Register, typename Function>
inline T fold(Register x, Function function) {
  const auto v = lanes<T>(x);
  T out = v.at[0];
  for (size_t i = 1; i < sizeof(Register) / sizeof(T); ++i) out = function(out, v.at[i]);
  return out;
}

// Products of 8-bit or 16-bit integers, `n` of them added to each lane.
template <typename A, typename B>
inline __m512i dot_ints(__m512i sum, __m512i a, __m512i b) {
  constexpr int n = 4 / sizeof(A);
  const auto s = lanes<int32_t>(sum);
  const auto x = lanes<A>(a);
  const auto y = lanes<B>(b);
  return each<int32_t, __m512i>([&](int i) {
    int32_t total = s.at[i];
    for (int j = 0; j < n; ++j) total += (int32_t)x.at[n * i + j] * y.at[n * i + j];
    return total;
  });
}

// ---- bfloat16 ----

inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline uint16_t to_bf16(float x) {
  uint32_t u;
  x = flush(x);
  memcpy(&u, &x, 4);
  if (x != x) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float x;
  memcpy(&x, &u, 4);
  return flush(x);
}
inline __m256bh round_bf16(__m512 x) {
  const auto v = lanes<float>(x);
  return each<uint16_t, __m256bh>([&](int i) { return to_bf16(v.at[i]); });
}
inline __m512bh round_bf16_both(__m512 high, __m512 low) {
  const auto h = lanes<float>(high), l = lanes<float>(low);
  return each<uint16_t, __m512bh>([&](int i) { return to_bf16(i < 16 ? l.at[i] : h.at[i - 16]); });
}
inline __m512 dot(__m512 sum, __m512bh a, __m512bh b) {
  const auto s = lanes<float>(sum);
  const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
  return each<float, __m512>([&](int i) {
    const float odd = from_bf16(x.at[2 * i + 1]) * from_bf16(y.at[2 * i + 1]);
    const float even = from_bf16(x.at[2 * i]) * from_bf16(y.at[2 * i]);
    return flush(flush(s.at[i] + odd) + even);
  });
}

// ---- moving lanes ----

// Two registers interleaved inside each 128-bit lane; from = 0: its lower half, 1: its upper.
template <typename T, typename Register>
inline Register unpack(Register a, Register b, int from) {
  constexpr int n = 16 / sizeof(T);
  const auto x = lanes<T>(a), y = lanes<T>(b);
  return each<T, Register>([&](int i) {
    const int at = i / n * n + from * n / 2 + i % n / 2;
    return i % 2 ? y.at[at] : x.at[at];
  });
}
// Lane i from lane index[i] of x, or of y when the index goes past it; U is unsigned, of T's size.
template <typename U, typename Register>
inline Register permute(Register x, __m512i index, Register y) {
  constexpr unsigned n = 64 / sizeof(U);
  const auto a = lanes<U>(x), b = lanes<U>(y), from = lanes<U>(index);
  return each<U, Register>([&](int i) {
    const unsigned at = from.at[i] & (2 * n - 1);
    return at < n ? a.at[at] : b.at[at - n];
  });
}
template <typename U, typename Register>
inline Register permute(__m512i index, Register x) {
  return permute<U>(x, index, x);
}
// 128-bit lanes: two of a, then two of b.
template <typename Register>
inline Register shuffle_quarters(Register a, Register b, int how) {
  struct Quarter {
    uint64_t low, high;
  };
  const auto x = lanes<Quarter>(a), y = lanes<Quarter>(b);
  return each<Quarter, Register>([&](int i) { return (i < 2 ? x : y).at[how >> 2 * i & 3]; });
}
// Inside each 128-bit lane, dword i from dword (how >> 2 i) & 3.
template <typename Register>
inline Register shuffle_dwords(Register x, int how) {
  const auto v = lanes<uint32_t>(x);
  return each<uint32_t, Register>(
      [&](int i) { return v.at[i / 4 * 4 + (how >> 2 * (i % 4) & 3)]; });
}
// `part` put over piece `at` of x, and taken out of it.
template <typename Register, typename Part>
inline Register insert(Register x, Part part, int at) {
  memcpy((char*)&x + at * sizeof part, &part, sizeof part);
  return x;
}
template <typename Part, typename Register>
inline Part extract(Register x, int at) {
  Part part;
  memcpy(&part, (const char*)&x + at * sizeof part, sizeof part);
  return part;
}
template <typename Register, typename Part>
inline Register widen(Part part) {
  return insert(as<Register>(Lanes<uint64_t>{}), part, 0);
}
template <typename To, typename From, typename Register, typename Part>
inline Register convert(Part part) {
  const auto v = lanes<From>(part);
  return each<To, Register>([&](int i) { return (To)v.at[i]; });
}
inline __m512i logic(__m512i a, __m512i b, __m512i c, int table) {
  const auto x = lanes<uint64_t>(a), y = lanes<uint64_t>(b), z = lanes<uint64_t>(c);
  return each<uint64_t, __m512i>([&](int i) {
    uint64_t out = 0;
    for (int row = 0; row < 8; ++row) {
      if (!(table >> row & 1)) continue;
      out |= (row & 4 ? x.at[i] : ~x.at[i]) & (row & 2 ? y.at[i] : ~y.at[i]) &
             (row & 1 ? z.at[i] : ~z.at[i]);
    }
    return out;
  });
}
inline uint64_t test_bytes(__m512i a, __m512i b) {
  const auto x = lanes<uint8_t>(a), y = lanes<uint8_t>(b);
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= (uint64_t)((x.at[i] & y.at[i]) != 0) << i;
  return mask;
}
inline __mmask16 signs(__m512i a) {
  const auto x = lanes<int32_t>(a);
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (uint32_t)(x.at[i] < 0) << i;
  return (__mmask16)mask;
}
// The lanes of x that are in the mask, side by side; then zeros.
inline __m512i compress(__mmask16 mask, __m512i x) {
  const auto v = lanes<int32_t>(x);
  Lanes<int32_t> out = {};
  for (int i = 0, n = 0; i < 16; ++i) {
    if (mask >> i & 1) out.at[n++] = v.at[i];
  }
  return as<__m512i>(out);
}
inline __m512 from_f16(__m256i x) {
  return insert(widen<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(x))),
                _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)), 1);
}
inline __m256i to_f16(__m512 x) {
  const __m128i low = _mm256_cvtps_ph(extract<__m256>(x, 0), _MM_FROUND_TO_NEAREST_INT);
  return _mm256_insertf128_si256(_mm256_castsi128_si256(low),
                                 _mm256_cvtps_ph(extract<__m256>(x, 1), _MM_FROUND_TO_NEAREST_INT),
                                 1);
}

}  // namespace sfa_emulated

#define SFA_EMULATE_BINARY(name, T, Register, expression)                    \
  inline Register name(Register a, Register b) {                             \
    const auto u = sfa_emulated::lanes<T>(a), v = sfa_emulated::lanes<T>(b); \
    return sfa_emulated::each<T, Register>([&](int i) {                      \
      const T x = u.at[i], y = v.at[i];                                      \
      return (T)(expression);                                                \
    });                                                                      \
  }
namespace sfa_emulated {
SFA_EMULATE_BINARY(add, float, __m512, x + y)
SFA_EMULATE_BINARY(sub, float, __m512, x - y)
SFA_EMULATE_BINARY(div, float, __m512, x / y)
SFA_EMULATE_BINARY(add_bytes, uint8_t, __m512i, x + y)
SFA_EMULATE_BINARY(add_dwords, uint32_t, __m512i, x + y)
SFA_EMULATE_BINARY(xor_bits, uint64_t, __m512i, x ^ y)
SFA_EMULATE_BINARY(max_dwords, int32_t, __m512i, x > y ? x : y)
inline __m512i abs_bytes(__m512i a) {
  const auto v = lanes<int8_t>(a);
  return each<uint8_t, __m512i>([&](int i) { return (uint8_t)abs(v.at[i]); });
}
inline __m512i shift_left(__m512i a, int n) {
  const auto v = lanes<uint32_t>(a);
  return each<uint32_t, __m512i>([&](int i) { return v.at[i] << n; });
}
template <typename... Words>
inline __m512i words_from_the_last(Words... words) {
  const int16_t given[] = {(int16_t)words...};
  return each<int16_t, __m512i>([&](int i) { return given[31 - i]; });
}
}  // namespace sfa_emulated
#undef SFA_EMULATE_BINARY

#endif  // SFA_ONNX_KERNELS_TESTS_EMULATED_LANES_H_
