// The indexer over int8 with AVX512-VNNI: four products per lane and instruction.
//
// VPDPBUSD multiplies unsigned by signed bytes, so keys are copied with 128 added, and the sums
// start at -128 times the sum of the head's query.
#include "indexer_avx512.h"

namespace sfa {
namespace {

struct ByteQuads {
  static constexpr bool kInts = true;
  typedef vi Acc;  // the intrinsics' own types may alias, which costs spills
  typedef vi Word;
  static constexpr int kPack = 4, kMaxV = 4, kSums = 24, kTile = 48;
  static bool raw(const IndexerGeom&) { return false; }
  static Acc start(const int32_t* p) { return *(const vi*)p; }
  static Word load(const uint32_t* p) { return *(const vi*)p; }
  static Word splat(const uint8_t* p) {
    int32_t quad;
    memcpy(&quad, p, 4);
    return quad - vi{};
  }
  static Acc dot(Acc acc, Word query, Word key) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)key, (__m512i)query);
  }
  static vf positive(Acc x) { return simd::relu((vf)_mm512_cvtepi32_ps((__m512i)x)); }
  static void widen(const uint8_t* row, int width, int, uint32_t* words) {
    in_pieces<64, 1>(row, width, 4, words, [](const uint8_t* x, uint32_t* at) {
      const __m512i sign = _mm512_set1_epi8((char)0x80);
      _mm512_storeu_si512(at, _mm512_xor_si512(_mm512_loadu_si512(x), sign));
    });
  }
  static int32_t widen_query(const uint8_t* row, int width, int, uint32_t* words) {
    words[words_of(width, 4) - 1] = 0;
    memcpy(words, row, (size_t)width);
    int32_t total = 0;
    for (int i = 0; i < width; ++i) total += (int8_t)row[i];
    return -128 * total;
  }
};

}  // namespace

const IndexerPath* indexer_avx512_vnni() {
  static constexpr IndexerPath path = indexer_table<ByteQuads>("avx512_vnni");
  return &path;
}

}  // namespace sfa
