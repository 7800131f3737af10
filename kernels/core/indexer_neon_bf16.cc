// The indexer over bfloat16 with bf16 dot products (Neoverse V1/N2, newer Kunpeng).
#include "indexer_neon.h"

namespace sfa {
namespace {

struct BFloat16Pairs {
  static constexpr bool kInts = false;
  typedef float32x4_t Acc;
  typedef bfloat16x8_t Word;
  static constexpr int kPack = 2, kMaxV = 4, kSums = 24, kTile = 48;
  static bool raw(const IndexerGeom& g) { return g.width % 2 == 0; }
  static Acc start(const int32_t*) { return vdupq_n_f32(0); }
  static Word load(const uint32_t* p) { return vreinterpretq_bf16_u32(vld1q_u32(p)); }
  static Word splat(const uint8_t* p) {
    uint32_t pair;
    memcpy(&pair, p, 4);
    return vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  }
  static Acc dot(Acc acc, Word a, Word b) { return vbfdotq_f32(acc, a, b); }
  static vf positive(Acc x) { return simd::relu((vf)x); }
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

const IndexerPath* indexer_neon_bf16() {
  static constexpr IndexerPath path = indexer_table<BFloat16Pairs>("neon_bf16");
  return &path;
}

}  // namespace sfa
