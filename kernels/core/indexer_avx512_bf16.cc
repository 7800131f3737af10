// The indexer over bfloat16 with AVX512-BF16: two products per lane and instruction.
#include "indexer_avx512.h"

namespace sfa {
namespace {

struct BFloat16Pairs {
  static constexpr bool kInts = false;
  typedef vf Acc;
  typedef vi Word;
  static constexpr int kPack = 2, kMaxV = 4, kSums = 24, kTile = 48;
  static bool raw(const IndexerGeom& g) { return g.width % 2 == 0; }
  static Acc start(const int32_t*) { return vf{}; }
  static Word load(const uint32_t* p) { return *(const vi*)p; }
  static Word splat(const uint8_t* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return pair - vi{};
  }
  static Acc dot(Acc acc, Word a, Word b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
  static vf positive(Acc x) { return simd::relu(x); }
  static void widen(const uint8_t* row, int width, int, uint32_t* words) {
    words[words_of(width, 2) - 1] = 0;
    memcpy(words, row, 2 * (size_t)width);
  }
  static int32_t widen_query(const uint8_t* row, int width, int dtype, uint32_t* words) {
    widen(row, width, dtype, words);
    return 0;
  }
};

}  // namespace

const IndexerPath* indexer_avx512_bf16() {
  static constexpr IndexerPath path = indexer_table<BFloat16Pairs>("avx512_bf16");
  return &path;
}

}  // namespace sfa
