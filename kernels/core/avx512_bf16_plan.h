// Buffers, query packing and prefetching of the AVX512-BF16 path.
#ifndef SFA_ONNX_KERNELS_CORE_AVX512_BF16_PLAN_H_
#define SFA_ONNX_KERNELS_CORE_AVX512_BF16_PLAN_H_

#include <immintrin.h>
#include <string.h>

#include "avx512_bf16_convert.h"
#include "internal.h"

namespace sfa {
namespace {

constexpr int kTileDwords = 64;   // pairs of columns decoded at a time for five to eight heads
constexpr int kQkKeys = 48;       // keys per decoded tile of Q.K, at most
constexpr int kKeyPad = 8;        // tiles are padded to a multiple of so many keys
constexpr int kQkLanes = 32;      // heads that meet a tile of keys together
constexpr int kSharedKeys = 256;  // keys whose decoded values are kept, see Plan::shared

// Where everything lies in the scratch, and what shape the columns take.
//
// A float16 query is the exact sum of two bf16 (`passes` = 2): high and low part each meet every
// key. Its rope becomes three parts, (high, low, high) against (high, high, low) of the key.
struct Plan {
  const Geom& g;
  bool packed;  // int8 rows; else bf16 rows
  bool scaled;  // int8 rows whose scales go into scores and weights; else rounded, or bf16
  // Rounded rows cost twice the decoding. With few heads that shows, so values are interleaved from
  // the decoded keys while these are in L1, for half a chunk at a time: a whole one would fill L2.
  bool shared;
  int lanes;        // heads rounded up to vectors
  int passes;       // bf16 terms per query element
  int block_pairs;  // pairs of latent columns decoded at a time: 64, or 32 for narrow tiles
  int tile_keys;    // keys per decoded tile of Q.K
  int key_dwords;   // decoded key: latent and rope pairs
  int q_rows;       // rows of q
  int rope_pairs;   // pairs of rope columns after splitting
  size_t rope_bytes;
  int row_bytes;     // contiguous bytes that belong to a key
  uint32_t* tile;    // [tile_keys, key_dwords] decoded keys
  uint32_t* values;  // [kChunk / 2, 64] decoded, interleaved values; shared: of all columns,
                     // [nope / 64, kSharedKeys / 2, 64]
  Partial other;     // shared: of the second half
  float* scale;      // [latent tiles, kQkKeys]
  int32_t* best;     // [lanes] the key of the largest score
  float* unit;       // [lanes] what the weights of a tile are multiples of; few heads: of all tiles
  float* per_unit;   // [lanes] 1 / unit
  uint32_t* weights;  // [lanes / 16, kChunk / 2, 16] probabilities times scales
  float* s;           // [kChunk + 48, lanes]
  uint32_t* q;        // [passes * nope / 2 + rope_pairs, lanes]
  int narrow_rope;    // few heads: rope pairs, padded to vectors
  int narrow_q;       // few heads: dwords per head of q
  size_t bytes;

  Plan(const Geom& geom, void* scratch) : g(geom) {
    packed = g.cache_dtype == SFA_CORE_I8;
    scaled = packed && !g.rounded;
    shared = g.rounded && g.heads > 8 && g.heads <= kQkLanes;
    lanes = round_up(g.heads, 16);
    passes = g.query_dtype == SFA_CORE_F16 ? 2 : 1;
    block_pairs = g.tile % 128 == 0 ? 64 : 32;
    rope_pairs = (g.rope + 1) / 2 * (passes == 2 ? 3 : 1);
    rope_bytes = (size_t)g.rope * 2;
    row_bytes = packed ? g.nope + (int)rope_bytes + 4 * (g.nope / g.tile) : 2 * g.nope;
    char* at = (char*)scratch;
    narrow_rope = round_up(rope_pairs, 16);
    narrow_q = passes * g.nope / 2 + narrow_rope;
    key_dwords = g.nope / 2 + round_up(rope_pairs, 16);
    q_rows = passes * g.nope / 2 + narrow_rope;
    // Few heads: the decoded keys and their query should share L1. Many: reuse the query longer.
    tile_keys = lanes <= kQkLanes ? 12 : kQkKeys;
    const size_t half_dwords = (size_t)kQkKeys * kTileDwords;
    const size_t tile_dwords = (size_t)(tile_keys + kKeyPad) * key_dwords;
    tile = (uint32_t*)take(&at, 4 * (tile_dwords > half_dwords ? tile_dwords : half_dwords));
    values = (uint32_t*)take(&at, 2 * (size_t)(shared ? kSharedKeys * g.nope : 64 * kChunk));
    other = {nullptr, nullptr, nullptr};
    if (shared) {
      other.m = (float*)take(&at, 4 * (size_t)lanes);
      other.l = (float*)take(&at, 4 * (size_t)lanes);
      other.o = (float*)take(&at, 4 * (size_t)g.heads * g.o_stride);
    }
    scale = (float*)take(&at, 4 * (size_t)(g.nope / (2 * block_pairs)) * kQkKeys);
    best = (int32_t*)take(&at, 4 * (size_t)lanes);
    const int units =
        g.heads <= 4 && g.nope / g.tile * g.heads > lanes ? g.nope / g.tile * g.heads : lanes;
    unit = (float*)take(&at, 4 * (size_t)units);
    per_unit = (float*)take(&at, 4 * (size_t)units);
    weights = (uint32_t*)take(&at, 2 * (size_t)lanes * kChunk);
    s = (float*)take(&at, 4 * (size_t)(kChunk + 48) * lanes);
    q = (uint32_t*)take(&at, 4 * (size_t)q_rows * lanes);
    bytes = (size_t)(at - (char*)scratch);
  }

  // Row `row` of the query for heads lane..: groups of kQkLanes heads lie one after the other.
  uint32_t* q_at(int row, int lane) const {
    const int group = lane / kQkLanes * kQkLanes;
    return q + (size_t)group * q_rows + (size_t)row * q_width(lane) + (lane - group);
  }
  int q_width(int lane) const {
    const int left = lanes - lane / kQkLanes * kQkLanes;
    return left < kQkLanes ? left : kQkLanes;
  }

 private:
  static char* take(char** at, size_t bytes) {
    char* here = *at;
    *at += (bytes + 63) & ~(size_t)63;
    return here;
  }
};

// exp2 for x <= 0 with relative error 3e-6, far below the rounding of the bf16 weights; exactly 1
// for 0.
inline __attribute__((always_inline)) __m512 exp2_fast(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(0x1.3a02ccp-7f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.c9fc46p-5f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.ec0378p-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.62e12cp-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

// bf16 high part of 16 floats, and what it leaves.
inline __m256i split_high(__m512 x, __m256i* low) {
  const __m256i high = (__m256i)_mm512_cvtneps_pbh(x);
  const __m512 back = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
  *low = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(x, back));
  return high;
}

// 32 elements of a query or rope row as bf16; the first `count` are read.
inline __m512i load_bf16(const uint8_t* src, int count) {
  const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
  return _mm512_maskz_loadu_epi16(mask, src);
}

inline void load_f16_split(const uint8_t* src, int count, __m512i* high, __m512i* low) {
  const __m512i raw = load_bf16(src, count);
  __m256i l0, l1;
  const __m256i h0 = split_high(_mm512_cvtph_ps(_mm512_castsi512_si256(raw)), &l0);
  const __m256i h1 = split_high(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(raw, 1)), &l1);
  *high = _mm512_inserti64x4(_mm512_castsi256_si512(h0), h1, 1);
  *low = _mm512_inserti64x4(_mm512_castsi256_si512(l0), l1, 1);
}

// Part `part` (0 high, 1 low) of 32 elements in the query's type.
inline __m512i load_part(const Plan& p, const uint8_t* src, int count, int part) {
  if (p.passes == 1) return load_bf16(src, count);
  __m512i high, low;
  load_f16_split(src, count, &high, &low);
  return part == 0 ? high : low;
}

// Scale t of a packed row.
inline float scale_of(const Plan& p, const uint8_t* rope, int t) {
  float scale;
  memcpy(&scale, rope + p.rope_bytes + 4 * (size_t)t, 4);
  return scale;
}

// The mantissa of a scale, 1 <= |x| < 2, and 1 for zero.
//
// A row's weight is probability x scale in bf16, one error of up to 2^-9 that all columns of a tile
// share. Where one key takes the whole softmax nothing averages it out, so weights are kept as
// multiples of that key's mantissa: its own weight is a power of two, without an error.
inline __m512 mantissa(__m512 scale) {
  const __m512i one = _mm512_set1_epi32(0x3f800000), bits = _mm512_set1_epi32(0x007fffff);
  return (__m512)_mm512_ternarylogic_epi32((__m512i)scale, bits, one, 0xea);  // scale & bits | one
}

// 64 latent columns of one row, in the order of to_bf16 (packed) or as they lie.
inline void load_columns(const Plan& p, const Converter& convert, const uint8_t* nope,
                         const uint8_t* rope, int d, __m512i* a, __m512i* b) {
  if (p.g.rounded) {
    round_row(Scaler(scale_of(p, rope, d / p.g.tile)), _mm512_loadu_si512(nope + d), a, b);
  } else if (p.packed) {
    convert.to_bf16(_mm512_loadu_si512(nope + d), a, b);
  } else {
    *a = _mm512_loadu_si512(nope + 2 * d);
    *b = _mm512_loadu_si512(nope + 2 * d + 64);
  }
}

constexpr int kMaxRope = 1024;
constexpr int kRopeRoom = 3 * kMaxRope / 2 + 32;  // dwords that rope_pairs may write

// All pairs of a key's rope as the query's rope meets them; up to 15 zero dwords follow.
void rope_pairs(const Plan& p, const uint8_t* rope, uint32_t* out) {
  const int width = (p.g.rope + 1) / 2;
  for (int w = 0; w < width; w += 16) {
    const uint8_t* src = rope + 4 * (size_t)w;
    const int count = p.g.rope - 2 * w;
    if (p.passes == 1) {
      _mm512_storeu_si512(out + w, load_bf16(src, count));
      continue;
    }
    __m512i high, low;
    load_f16_split(src, count, &high, &low);
    const __mmask16 live = (__mmask16)(width - w < 16 ? (1u << (width - w)) - 1 : 0xffffu);
    _mm512_mask_storeu_epi32(out + w, live, high);
    _mm512_mask_storeu_epi32(out + width + w, live, high);
    _mm512_storeu_si512(out + 2 * width + w, low);
  }
}

// ---- query ---------------------------------------------------------------------------------

// Columns [0, n) of all heads, part `part`, into q rows [row, row + n / 2): one dword per head.
// Within each 32 pairs, pair r goes to row converted_position(r) when `permuted`.
void pack_columns(const Plan& p, const uint8_t* src, int64_t stride, int n, int part, bool permuted,
                  int first_row) {
  for (int lane = 0; lane < p.lanes; lane += 16) {
    for (int d = 0; d < n; d += 32) {
      __m512i r[16];
      for (int h = 0; h < 16; ++h) {
        r[h] = lane + h < p.g.heads ? load_part(p, src + 2 * ((lane + h) * stride + d), n - d, part)
                                    : _mm512_setzero_si512();
      }
      transpose16(r);
      for (int i = 0; i < 16 && d / 2 + i < (n + 1) / 2; ++i) {
        const int pair = d / 2 + i;
        const int row = permuted ? pair / 32 * 32 + converted_position(pair % 32) : pair;
        _mm512_store_si512(p.q_at(first_row + row, lane), r[i]);
      }
    }
  }
}

void pack_query(const Plan& p, const void* query, const void* query_rope) {
  const int64_t width = p.packed ? p.g.nope + p.g.rope : p.g.nope;
  const uint8_t* nope = (const uint8_t*)query;
  int row = 0;
  for (int pass = 0; pass < p.passes; ++pass, row += p.g.nope / 2) {
    pack_columns(p, nope, width, p.g.nope, pass, p.packed, row);
  }
  if (p.g.rope == 0) return;
  const uint8_t* rope = p.packed ? nope + 2 * p.g.nope : (const uint8_t*)query_rope;
  const int64_t stride = p.packed ? width : p.g.rope;
  for (int third = 0; third < (p.passes == 2 ? 3 : 1); ++third) {
    pack_columns(p, rope, stride, p.g.rope, third == 1 ? 1 : 0, false, row);
    row += (p.g.rope + 1) / 2;
  }
}

// ---- prefetching ---------------------------------------------------------------------------

// Asks for rows before they are decoded, evenly between the dot products and into L2: a run of
// prefetches into L1 would take its miss buffers away from the work at hand. Only the first line of
// a row goes to L1, sixteen rows in a burst: each may cost a page walk, and walks overlap only when
// they are asked for together.
//
// The rows are needed during Q.K, but asked for all the time: `lead` rows of the next chunk during
// P.V, the rest of this one tile by tile.
class Prefetch {
 public:
  // `warm`: the first `lead` rows were asked for during the chunk before.
  Prefetch(const Plan& p, const Rows& rows, const Rows* next, bool warm)
      : p_(p), rows_(rows), next_(next), lead_(p.lanes < 64 ? 272 : kQkKeys) {
    // A cold chunk starts with its first tile and must then keep the pace of the decoder.
    position_ = warm ? lead_ : 0;
    const int tile = p.lanes <= 16 && p.g.heads <= 8 ? kQkKeys : p.tile_keys;
    pace_ = warm && lead_ > kQkKeys ? tile / 2 : tile;
    if (warm) return;
    aim(rows_, 0, kQkKeys);
    while (row_ != end_) some();
    position_ = kQkKeys;
  }

  // Before a tile of Q.K: the rows to ask for during it.
  void tile() {
    finish();
    aim(rows_, position_, position_ + pace_);
    position_ += pace_;
  }
  // Before P.V.
  void values() {
    finish();
    if (next_) aim(*next_, 0, lead_);
  }
  // Asks at once for what the last aim left over.
  void finish() {
    while (row_ != end_) some();
  }

  inline __attribute__((always_inline)) void some() {
    if (row_ == end_) return;
    if (offset_ == 0) {
      if (burst_-- == 0) {
        burst_ = kBurst - 1;
        int64_t rows = end_ - row_ < kBurst ? end_ - row_ : kBurst;
        asm("" : "+r"(rows));  // hides the small bound: unrolled, this would bloat every tile
        for (int64_t i = 0; i < rows; ++i) {
          _mm_prefetch((const char*)row_[i], _MM_HINT_T0);
          if (!rope_) continue;
          _mm_prefetch((const char*)rope_[i], _MM_HINT_T0);
          _mm_prefetch((const char*)rope_[i] + 127, _MM_HINT_T0);
        }
        if (rope_) rope_ += kBurst;
      }
      offset_ = 64;
    }
    const char* at = (const char*)*row_ + offset_;
    _mm_prefetch(at, _MM_HINT_T1);
    _mm_prefetch(at + 64, _MM_HINT_T1);
    _mm_prefetch(at + 128, _MM_HINT_T1);
    _mm_prefetch(at + 192, _MM_HINT_T1);
    offset_ += 256;
    if (offset_ >= bytes_) {
      _mm_prefetch((const char*)*row_ + bytes_ - 1, _MM_HINT_T1);
      offset_ = 0;
      ++row_;
    }
  }

 private:
  static constexpr int kBurst = 16;

  void aim(const Rows& rows, int first, int last) {
    if (last > rows.n) last = rows.n;
    if (first >= last) return;
    row_ = rows.nope + first;
    end_ = rows.nope + last;
    offset_ = burst_ = 0;
    bytes_ = p_.row_bytes;
    rope_ = p_.packed ? nullptr : rows.rope + first;
  }

  const Plan& p_;
  const Rows& rows_;
  const Rows* const next_;
  const int lead_;
  int position_, pace_;
  const uint8_t* const* row_ = nullptr;
  const uint8_t* const* end_ = nullptr;
  const uint8_t* const* rope_ = nullptr;  // ropes of a float cache lie elsewhere
  int offset_ = 0, bytes_ = 0, burst_ = 0;
};

}  // namespace
}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_AVX512_BF16_PLAN_H_
