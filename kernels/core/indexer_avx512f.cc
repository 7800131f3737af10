// The indexer with AVX-512 F/BW/DQ/VL: float words, and int8 as pairs of int16.
#include "indexer_avx512.h"

namespace sfa {
namespace {

// Two vectors, not four: the queries of 32 heads and a tile of keys fit the first-level cache.
using Floats = FloatWords<2, 24, 24>;

struct Int16Pairs {
  static constexpr bool kInts = true;
  typedef vi Acc;  // the intrinsics' own types may alias, which costs spills
  typedef vi Word;
  static constexpr int kPack = 2, kMaxV = 4, kSums = 24, kTile = 48;
  static bool raw(const IndexerGeom&) { return false; }
  static Acc start(const int32_t*) { return vi{}; }
  static Word load(const uint32_t* p) { return *(const vi*)p; }
  static Word splat(const uint8_t* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return pair - vi{};
  }
  static Acc dot(Acc acc, Word a, Word b) {
    return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
  }
  static vf positive(Acc x) { return simd::relu((vf)_mm512_cvtepi32_ps((__m512i)x)); }
  static void widen(const uint8_t* row, int width, int, uint32_t* words) {
    in_pieces<32, 1>(row, width, 2, words, [](const uint8_t* x, uint32_t* at) {
      _mm512_storeu_si512(at, _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)x)));
    });
  }
  static int32_t widen_query(const uint8_t* row, int width, int dtype, uint32_t* words) {
    widen(row, width, dtype, words);
    return 0;
  }
};

}  // namespace

const IndexerPath* indexer_avx512f(bool int8) {
  static constexpr IndexerPath floats = indexer_table<Floats>("avx512f");
  static constexpr IndexerPath bytes = indexer_table<Int16Pairs>("avx512f");
  return int8 ? &bytes : &floats;
}

}  // namespace sfa
