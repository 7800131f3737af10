// The indexer with AVX2, FMA and F16C: float words, and int8 as pairs of int16.
#include <immintrin.h>

#define SFA_LANES 8
#include "half.h"
#include "vec.h"

namespace sfa {
namespace {
namespace simd {

inline vf load_f16(const uint8_t* p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
inline vf load_bf16(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return (vf)_mm256_slli_epi32(wide, 16);
}
inline vf round_f16(vf v) {
  return (vf)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
// The second operand where it is NaN.
inline vf relu(vf x) { return (vf)_mm256_max_ps(_mm256_setzero_ps(), (__m256)x); }
inline uint32_t bits(vi take) { return (uint32_t)_mm256_movemask_ps((__m256)take); }

// For every set of lanes its numbers, the lowest first, a byte each.
struct LaneSets {
  uint64_t lanes[256];
};
constexpr LaneSets lane_sets() {
  LaneSets sets = {};
  for (int set = 0; set < 256; ++set) {
    for (int lane = 0, at = 0; lane < 8; ++lane) {
      if (set >> lane & 1) sets.lanes[set] |= (uint64_t)lane << 8 * at++;
    }
  }
  return sets;
}
constexpr LaneSets kLaneSets = lane_sets();

// As in indexer_append.h, without a branch: which lanes are chosen is as good as random.
inline int64_t append(vi a, vi b, vi, uint32_t bits, int32_t* to_a, int32_t* to_b, int64_t n) {
  const __m256i from = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)kLaneSets.lanes[bits]));
  _mm256_storeu_si256((__m256i*)(to_a + n), _mm256_permutevar8x32_epi32((__m256i)a, from));
  _mm256_storeu_si256((__m256i*)(to_b + n), _mm256_permutevar8x32_epi32((__m256i)b, from));
  return n + __builtin_popcount(bits);
}

}  // namespace simd
}  // namespace
}  // namespace sfa

#include "indexer_path.h"
#include "indexer_select.h"

namespace sfa {
namespace {

using Floats = FloatWords<2, 12, 24>;

struct Int16Pairs {
  static constexpr bool kInts = true;
  typedef vi Acc;  // the intrinsics' own types may alias, which costs spills
  typedef vi Word;
  static constexpr int kPack = 2, kMaxV = 2, kSums = 12, kTile = 48;
  static bool raw(const IndexerGeom&) { return false; }
  static Acc start(const int32_t*) { return vi{}; }
  static Word load(const uint32_t* p) { return *(const vi*)p; }
  static Word splat(const uint8_t* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return pair - vi{};
  }
  static Acc dot(Acc acc, Word a, Word b) {
    return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
  }
  static vf positive(Acc x) { return simd::relu((vf)_mm256_cvtepi32_ps((__m256i)x)); }
  static void widen(const uint8_t* row, int width, int, uint32_t* words) {
    in_pieces<16, 1>(row, width, 2, words, [](const uint8_t* x, uint32_t* at) {
      _mm256_storeu_si256((__m256i*)at, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)x)));
    });
  }
  static int32_t widen_query(const uint8_t* row, int width, int dtype, uint32_t* words) {
    widen(row, width, dtype, words);
    return 0;
  }
};

}  // namespace

const IndexerPath* indexer_avx2(bool int8) {
  static constexpr IndexerPath floats = indexer_table<Floats>("avx2");
  static constexpr IndexerPath bytes = indexer_table<Int16Pairs>("avx2");
  return int8 ? &bytes : &floats;
}

}  // namespace sfa
