// The bf16 skeleton for machines whose dot product takes pairs of bf16 into float32 lanes. A path
// file defines SFA_LANES (then includes vec.h), SFA_TILE_VECS and, in sfa::simd,
//
//   Pairs                     a vector of SFA_LANES pairs
//   load_pairs(p)             SFA_LANES dwords
//   splat_pair(p)             one dword to all lanes
//   dot(acc, a, b)            acc + a.pair . b.pair, lane by lane
//   widen_i8(src, n, dst)     n (a multiple of 16) int8 -> bf16, exactly
//   scale_i8(src, n, scale, dst)   the same times scale, rounded to bf16
//   interleave(r0, r1, n, dst)   n (a multiple of 16) bf16 of two rows -> n pairs
//   store_as                  as in fp32_path.h
//
// Same flow and same exactness rules as avx512_bf16_wide.h (docs/kernel.md), without its tuning.
#include <string.h>

#include "half.h"
#include "internal.h"
#include "partial.h"
#include "store.h"
#include "vec.h"

namespace sfa {
namespace {

constexpr int kVecs = SFA_TILE_VECS;
constexpr int kTilePairs = 64;  // pairs of columns per decoded key
constexpr int kQkKeys = 48;     // keys per decoded tile of Q.K
constexpr int kColumns = 64;    // latent columns decoded at a time for P.V
constexpr int kTileKeys = 6;    // keys (or heads) per register tile

struct Plan {
  const Geom& g;
  bool packed;
  bool scaled;        // int8 rows whose scales go into scores and weights; else rounded, or bf16
  int lanes;          // heads rounded up to whole register tiles
  int passes;         // bf16 terms per query element: 2 for float16
  int block_pairs;    // pairs of latent columns per decoded tile
  int rope_pairs;     // after splitting
  uint32_t* tile;     // [kQkKeys, kTilePairs]
  uint32_t* values;   // [kChunk / 2, kColumns]
  uint32_t* weights;  // [kChunk / 2, lanes]
  float* s;           // [kChunk + 1, lanes]
  int32_t* best;      // [lanes] the key of the largest score
  float* unit;        // [lanes] what the weights of the present tile are multiples of
  uint32_t* q;        // [passes * nope / 2 + rope_pairs, lanes]
  size_t bytes;

  Plan(const Geom& geom, void* scratch) : g(geom) {
    packed = g.cache_dtype == SFA_CORE_I8;
    scaled = packed && !g.rounded;
    lanes = round_up(g.heads, W);
    passes = g.query_dtype == SFA_CORE_F16 ? 2 : 1;
    block_pairs = g.tile % 128 == 0 ? 64 : 32;
    rope_pairs = (g.rope + 1) / 2 * (passes == 2 ? 3 : 1);
    tile = (uint32_t*)scratch;
    values = tile + kQkKeys * kTilePairs;
    weights = values + kChunk / 2 * kColumns;
    s = (float*)(weights + (size_t)kChunk / 2 * lanes);
    best = (int32_t*)(s + (size_t)(kChunk + 1) * lanes);
    unit = (float*)(best + lanes);
    q = (uint32_t*)(unit + lanes);
    bytes =
        (size_t)((char*)(q + (size_t)(passes * g.nope / 2 + rope_pairs) * lanes) - (char*)scratch);
  }
};

bool bf16_supports(const Geom& g) {
  const bool types = g.query_dtype != SFA_CORE_F32 &&
                     (g.cache_dtype == SFA_CORE_I8 ||
                      (g.cache_dtype == SFA_CORE_BF16 && g.query_dtype == SFA_CORE_BF16));
  // A latent rounded to float16 is no bf16: such calls take the fp32 skeleton.
  if (g.rounded && g.query_dtype != SFA_CORE_BF16) return false;
  return types && g.tile % kColumns == 0;
}

size_t bf16_scratch_bytes(const Geom& g) { return Plan(g, nowhere()).bytes; }

// ---- query and rope ------------------------------------------------------------------------

// Element i as bf16: the element, or the high (part 0) or low (part 1) term of a float16.
uint16_t part_of(const Plan& p, const uint8_t* src, int i, int part) {
  if (p.passes == 1) {
    uint16_t bits;
    memcpy(&bits, src + 2 * i, 2);
    return bits;
  }
  const float x = load_as_f32(src, i, SFA_CORE_F16);
  const uint16_t high = f32_bf16(x);
  return part == 0 ? high : f32_bf16(x - bf16_f32(high));
}

// Pair w of `n` elements; an odd last one is paired with zero.
uint32_t pair_of(const Plan& p, const uint8_t* src, int n, int w, int part) {
  const uint32_t low = part_of(p, src, 2 * w, part);
  const uint32_t high = 2 * w + 1 < n ? part_of(p, src, 2 * w + 1, part) : 0;
  return high << 16 | low;
}

void pack_part(const Plan& p, const uint8_t* src, int64_t stride, int n, int part, uint32_t* q) {
  const int pairs = (n + 1) / 2;
  memset(q, 0, 4 * (size_t)pairs * p.lanes);
  for (int h = 0; h < p.g.heads; ++h) {
    for (int w = 0; w < pairs; ++w) {
      q[(size_t)w * p.lanes + h] = pair_of(p, src + 2 * h * stride, n, w, part);
    }
  }
}

void bf16_load_query(const Geom& g, const void* query, const void* query_rope, void* scratch) {
  const Plan p(g, scratch);
  const int64_t width = p.packed ? g.nope + g.rope : g.nope;
  uint32_t* q = p.q;
  for (int pass = 0; pass < p.passes; ++pass) {
    pack_part(p, (const uint8_t*)query, width, g.nope, pass, q);
    q += (size_t)g.nope / 2 * p.lanes;
  }
  if (g.rope == 0) return;
  const uint8_t* rope =
      p.packed ? (const uint8_t*)query + 2 * (size_t)g.nope : (const uint8_t*)query_rope;
  for (int third = 0; third < (p.passes == 2 ? 3 : 1); ++third) {
    pack_part(p, rope, p.packed ? width : g.rope, g.rope, third == 1, q);
    q += (size_t)(g.rope + 1) / 2 * p.lanes;
  }
}

// ---- scores --------------------------------------------------------------------------------

// Scale t of a packed row.
float scale_of(const Plan& p, const uint8_t* rope, int t) {
  return load_as_f32(rope + 2 * (size_t)p.g.rope, t, SFA_CORE_F32);
}

// s[k][v] = (fresh ? 0 : s[k][v]) + scale[k] * sum_w keys[k][w] . q[w][v]
template <int K, int V>
void score_tile(const uint32_t* keys, int pairs, const uint32_t* q, int lanes, const float* scale,
                bool fresh, float* s) {
  vf acc[K][V] = {};
  for (int w = 0; w < pairs; ++w) {
    simd::Pairs qv[V];
    for (int v = 0; v < V; ++v) qv[v] = simd::load_pairs(q + (size_t)w * lanes + v * W);
    for (int k = 0; k < K; ++k) {
      const simd::Pairs key = simd::splat_pair(keys + k * kTilePairs + w);
      for (int v = 0; v < V; ++v) acc[k][v] = simd::dot(acc[k][v], key, qv[v]);
    }
  }
  for (int k = 0; k < K; ++k) {
    for (int v = 0; v < V; ++v) {
      float* at = s + (size_t)k * lanes + v * W;
      const vf old = fresh ? vf{} : load(at);
      store(at, old + acc[k][v] * splat(scale[k]));
    }
  }
}

using ScoreFn = void (*)(const uint32_t*, int, const uint32_t*, int, const float*, bool, float*);

template <int V>
ScoreFn score_fn(int keys) {
  constexpr ScoreFn table[kTileKeys] = {score_tile<1, V>, score_tile<2, V>, score_tile<3, V>,
                                        score_tile<4, V>, score_tile<5, V>, score_tile<6, V>};
  return table[keys - 1];
}

ScoreFn score_fn(int keys, int vecs) {
  switch (vecs) {
    case 1:
      return score_fn<1>(keys);
    case 2:
      return score_fn<2>(keys);
    case 3:
      return score_fn<3>(keys);
    default:
      return score_fn<kVecs>(keys);
  }
}

void score_block(const Plan& p, int keys, int pairs, const uint32_t* q, const float* scale,
                 bool fresh, float* s) {
  for (int k = 0; k < keys; k += kTileKeys) {
    const int count = keys - k < kTileKeys ? keys - k : kTileKeys;
    for (int lane = 0; lane < p.lanes;) {
      const int left = (p.lanes - lane) / W, vecs = left < kVecs ? left : kVecs;
      score_fn(count, vecs)(p.tile + k * kTilePairs, pairs, q + lane, p.lanes, scale + k, fresh,
                            s + (size_t)k * p.lanes + lane);
      lane += vecs * W;
    }
  }
}

// `n` latent columns from d on of one packed row, without their scales or times them.
void decode_i8(const Plan& p, const uint8_t* nope, const uint8_t* rope, int d, int n,
               uint32_t* out) {
  if (p.scaled) {
    simd::widen_i8(nope + d, n, out);
  } else {
    simd::scale_i8(nope + d, n, scale_of(p, rope, d / p.g.tile), out);
  }
}

// One decoded block of latent columns against every pass of the query.
void score_latents(const Plan& p, const Rows& rows, int first, int keys, int d, float* s) {
  float scale[kQkKeys];
  for (int k = 0; k < keys; ++k) {
    uint32_t* out = p.tile + k * kTilePairs;
    const uint8_t* src = rows.nope[first + k];
    const uint8_t* rope = rows.rope[first + k];
    scale[k] = p.scaled ? scale_of(p, rope, d / p.g.tile) : 1.0f;
    if (p.packed) {
      decode_i8(p, src, rope, d, 2 * p.block_pairs, out);
    } else {
      memcpy(out, src + 2 * (size_t)d, 4 * (size_t)p.block_pairs);
    }
  }
  for (int pass = 0; pass < p.passes; ++pass) {
    const size_t row = (size_t)pass * p.g.nope / 2 + d / 2;
    score_block(p, keys, p.block_pairs, p.q + row * p.lanes, scale, d == 0 && pass == 0, s);
  }
}

void score_ropes(const Plan& p, const Rows& rows, int first, int keys, int from, float* s) {
  const int left = p.rope_pairs - from, pairs = left < kTilePairs ? left : kTilePairs;
  const int third = (p.g.rope + 1) / 2;
  float ones[kQkKeys];
  for (int k = 0; k < keys; ++k) {
    ones[k] = 1.0f;
    for (int w = 0; w < pairs; ++w) {
      const int part = (from + w) / third == 2;
      p.tile[k * kTilePairs + w] =
          pair_of(p, rows.rope[first + k], p.g.rope, (from + w) % third, part);
    }
  }
  const size_t row = (size_t)p.passes * p.g.nope / 2 + from;
  score_block(p, keys, pairs, p.q + row * p.lanes, ones, false, s);
}

// Always inline: GCC drops calls of functions that do nothing but prefetch.
inline __attribute__((always_inline)) void ask_for(const Plan& p, const Rows& rows, int first) {
  const int last = first + kQkKeys < rows.n ? first + kQkKeys : rows.n;
  const int bytes = p.packed ? p.g.nope + 2 * p.g.rope + 4 * (p.g.nope / p.g.tile) : 2 * p.g.nope;
  for (int k = first; k < last; ++k) {
    for (int b = 0; b < bytes; b += 64) __builtin_prefetch(rows.nope[k] + b, 0, 2);
    if (!p.packed) __builtin_prefetch(rows.rope[k], 0, 2);
  }
}

void scores(const Plan& p, const Rows& rows) {
  for (int first = 0; first < rows.n; first += kQkKeys) {
    const int keys = rows.n - first < kQkKeys ? rows.n - first : kQkKeys;
    float* s = p.s + (size_t)first * p.lanes;
    ask_for(p, rows, first + kQkKeys);
    for (int d = 0; d < p.g.nope; d += 2 * p.block_pairs) {
      score_latents(p, rows, first, keys, d, s);
    }
    for (int w = 0; w < p.rope_pairs; w += kTilePairs) score_ropes(p, rows, first, keys, w, s);
  }
}

void softmax(const Plan& p, int n, Partial* out) {
  const vf scale = splat(p.g.scale_log2);
  for (int lane = 0; lane < p.lanes; lane += W) {
    float* column = p.s + lane;
    vf m = load(column) * scale, l = {};
    // Stored scaled, so that the largest score less itself is zero.
    for (int k = 0; k < n; ++k) {
      const vf s = load(column + (size_t)k * p.lanes) * scale;
      store(column + (size_t)k * p.lanes, s);
      m = vmax(m, s);
    }
    vi best = {};
    for (int k = 0; k < n; ++k) {
      float* at = column + (size_t)k * p.lanes;
      const vf s = load(at), e = exp2_fine(s - m);
      best = s == m ? k - vi{} : best;
      l += e;
      store(at, e);
    }
    memcpy(p.best + lane, &best, sizeof best);
    store(column + (size_t)n * p.lanes, vf{});  // the partner of an odd last key
    const int heads = p.g.heads - lane < W ? p.g.heads - lane : W;
    memcpy(out->m + lane, &m, 4 * heads);
    memcpy(out->l + lane, &l, 4 * heads);
  }
}

// ---- values --------------------------------------------------------------------------------

// Upper half of each lane, rounded half-to-even.
inline vi round_high(vf x) {
  const vu u = (vu)x;
  return (vi)(u + 0x7fff + ((u >> 16) & 1));
}

// The mantissa of a scale, 1 <= |x| < 2, and 1 for zero: the unit of a head's weights in a tile, of
// the key with its largest score. Where that key takes the whole softmax, its weight then is a
// power of two; any other bf16 would be off by up to 2^-9 in all columns of the tile.
float mantissa(float scale) { return bits_f32((f32_bits(scale) & 0x007fffffu) | 0x3f800000u); }

void fold_scales(const Plan& p, const Rows& rows, int t) {
  for (int h = 0; h < p.lanes; ++h) {
    p.unit[h] = p.scaled ? mantissa(scale_of(p, rows.rope[p.best[h]], t)) : 1.0f;
  }
  for (int w = 0; w < (rows.n + 1) / 2; ++w) {
    const vf s0 = splat(p.scaled ? scale_of(p, rows.rope[2 * w], t) : 1.0f);
    const vf s1 = splat(p.scaled ? scale_of(p, rows.rope[2 * w + 1], t) : 1.0f);
    const float* row = p.s + (size_t)2 * w * p.lanes;
    for (int lane = 0; lane < p.lanes; lane += W) {
      const vf per_unit = splat(1.0f) / loadu(p.unit + lane);
      const vi low = round_high(load(row + lane) * (s0 * per_unit));
      const vi high = round_high(load(row + p.lanes + lane) * (s1 * per_unit));
      const vi both = (high & (int32_t)0xffff0000) | ((low >> 16) & 0xffff);
      memcpy(p.weights + (size_t)w * p.lanes + lane, &both, sizeof both);
    }
  }
}

void decode_values(const Plan& p, const Rows& rows, int d) {
  alignas(16) uint32_t r0[kColumns / 2], r1[kColumns / 2];
  for (int k = 0; k < rows.n; k += 2) {
    uint32_t* out = p.values + k / 2 * kColumns;
    if (p.packed) {
      decode_i8(p, rows.nope[k], rows.rope[k], d, kColumns, r0);
      decode_i8(p, rows.nope[k + 1], rows.rope[k + 1], d, kColumns, r1);
    } else {
      memcpy(r0, rows.nope[k] + 2 * (size_t)d, sizeof r0);
      memcpy(r1, rows.nope[k + 1] + 2 * (size_t)d, sizeof r1);
    }
    simd::interleave(r0, r1, kColumns, out);
  }
}

// o[h][v] = unit[h] * sum over the key pairs of the chunk of weights[pair][h] . values[pair][v]
template <int H>
void value_tile(const uint32_t* values, int pairs, const uint32_t* weights, const float* unit,
                int lanes, int stride, float* o) {
  vf acc[H][kVecs] = {};
  for (int w = 0; w < pairs; ++w, values += kColumns, weights += lanes) {
    simd::Pairs row[kVecs];
    for (int v = 0; v < kVecs; ++v) row[v] = simd::load_pairs(values + v * W);
    for (int h = 0; h < H; ++h) {
      const simd::Pairs weight = simd::splat_pair(weights + h);
      for (int v = 0; v < kVecs; ++v) acc[h][v] = simd::dot(acc[h][v], weight, row[v]);
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int v = 0; v < kVecs; ++v) {
      store(o + (size_t)h * stride + v * W, acc[h][v] * splat(unit[h]));
    }
  }
}

using ValueFn = void (*)(const uint32_t*, int, const uint32_t*, const float*, int, int, float*);
constexpr ValueFn kValueFns[kTileKeys] = {value_tile<1>, value_tile<2>, value_tile<3>,
                                          value_tile<4>, value_tile<5>, value_tile<6>};

void values(const Plan& p, const Rows& rows, Partial* out) {
  const int groups = (p.g.heads + kTileKeys - 1) / kTileKeys;
  for (int d = 0; d < p.g.nope; d += kColumns) {
    if (d == 0 || (p.scaled && d % p.g.tile == 0)) fold_scales(p, rows, d / p.g.tile);
    decode_values(p, rows, d);
    for (int group = 0; group < groups; ++group) {
      const int h = group * p.g.heads / groups, count = (group + 1) * p.g.heads / groups - h;
      for (int v = 0; v < kColumns; v += kVecs * W) {
        kValueFns[count - 1](p.values + v, (rows.n + 1) / 2, p.weights + h, p.unit + h, p.lanes,
                             p.g.o_stride, out->o + (size_t)h * p.g.o_stride + d + v);
      }
    }
  }
}

void bf16_attend(const Geom& g, const Rows& rows, const Rows* next, bool warm, void* scratch,
                 Partial* out) {
  const Plan p(g, scratch);
  if (!warm) ask_for(p, rows, 0);
  scores(p, rows);
  softmax(p, rows.n, out);
  if (next) ask_for(p, *next, 0);
  values(p, rows, out);
}

}  // namespace
}  // namespace sfa
