// The indexer over int8 with the dot products of armv8.2 (Kunpeng 920 has them).
#include "indexer_neon.h"

namespace sfa {
namespace {

struct ByteQuads {
  static constexpr bool kInts = true;
  typedef int32x4_t Acc;
  typedef int8x16_t Word;
  static constexpr int kPack = 4, kMaxV = 4, kSums = 24, kTile = 48;
  static bool raw(const IndexerGeom& g) { return g.width % 4 == 0; }
  static Acc start(const int32_t*) { return vdupq_n_s32(0); }
  static Word load(const uint32_t* p) { return vreinterpretq_s8_u32(vld1q_u32(p)); }
  static Word splat(const uint8_t* p) {
    uint32_t quad;
    memcpy(&quad, p, 4);
    return vreinterpretq_s8_u32(vdupq_n_u32(quad));
  }
  static Acc dot(Acc acc, Word a, Word b) { return vdotq_s32(acc, a, b); }
  static vf positive(Acc x) { return simd::relu((vf)vcvtq_f32_s32(x)); }
  static void widen(const uint8_t* row, int width, int, uint32_t* words) {
    words[words_of(width, 4) - 1] = 0;
    memcpy(words, row, (size_t)width);
  }
  static int32_t widen_query(const uint8_t* row, int width, int dtype, uint32_t* words) {
    widen(row, width, dtype, words);
    return 0;
  }
};

}  // namespace

const IndexerPath* indexer_neon_dot() {
  static constexpr IndexerPath path = indexer_table<ByteQuads>("neon_dot");
  return &path;
}

}  // namespace sfa
