// The fp32 skeleton, written with GCC vector extensions. A path file defines, before including it,
//
//   SFA_LANES       floats per vector (then includes vec.h)
//   SFA_TILE_VECS   vectors per register tile (6 x SFA_TILE_VECS accumulators)
//   sfa::simd       load_i8 / load_bf16 / load_f16: SFA_LANES elements -> vf; store_as: the way
//                   back; round_f16: to float16 (ties to even) and back
//
// and gets load_query, attend, merge, store. The tile flow is described in docs/kernel.md:
// scores of the whole chunk first (lanes = heads), then softmax down the keys, then the values
// (lanes = latent columns). Latent tiles are decoded into L1 twice, once per product.
//
// Everything has internal linkage: each file that includes this is compiled for another machine.
#include <string.h>

#include "half.h"
#include "internal.h"
#include "partial.h"
#include "store.h"
#include "vec.h"

namespace sfa {
namespace {

constexpr int kVecs = SFA_TILE_VECS;
constexpr int kColumns = 128;  // latent columns decoded at a time
constexpr int kQkKeys = 48;    // keys per decoded tile of Q.K
constexpr int kPvKeys = 64;    // keys per decoded tile of P.V
constexpr int kTileKeys = 6;   // keys (or heads) per register tile

struct Buffers {
  float* q;     // [nope + rope, lanes]: one column per head
  float* s;     // [kChunk, lanes]: scores, then probabilities
  float* tile;  // [kPvKeys, kColumns]: decoded keys
  int lanes;    // heads rounded up to full vectors
};

int lanes_of(const Geom& g) { return round_up(g.heads, W); }

Buffers lay_out(const Geom& g, void* scratch) {
  Buffers b;
  b.lanes = lanes_of(g);
  b.tile = (float*)scratch;
  b.s = b.tile + kPvKeys * kColumns;
  b.q = b.s + (size_t)kChunk * b.lanes;
  return b;
}

size_t fp32_scratch_bytes(const Geom& g) {
  return 4 * ((size_t)kPvKeys * kColumns + (size_t)(kChunk + g.nope + g.rope) * lanes_of(g));
}

bool fp32_supports(const Geom&) { return true; }

// ---- decoding ------------------------------------------------------------------------------

struct AsItIs {
  static vf round(vf x) { return x; }
};
struct ToBFloat16 {
  static vf round(vf x) { return round_bf16(x); }
};
struct ToFloat16 {
  static vf round(vf x) { return simd::round_f16(break_ties(x)); }
};
// With scales as they are: a few instructions less for each of the many values.
struct ToBFloat16Moderate {
  static vf round(vf x) { return round_bf16_moderate(x); }
};
struct ToFloat16Moderate {
  static vf round(vf x) { return simd::round_f16(break_finite_ties(x)); }
};

// out[0, n) = float(src[0, n)) * scale, rounded
template <typename Rounding>
void decode_i8(const uint8_t* src, int n, float scale, float* out) {
  const vf factor = splat(scale);
  int i = 0;
  for (; i + W <= n; i += W) storeu(out + i, Rounding::round(simd::load_i8(src + i) * factor));
  if (i == n) return;
  uint8_t tail[W] = {};
  memcpy(tail, src + i, (size_t)(n - i));
  const vf last = Rounding::round(simd::load_i8(tail) * factor);
  memcpy(out + i, &last, 4 * (size_t)(n - i));
}

using DecodeFn = void (*)(const uint8_t*, int, float, float*);

DecodeFn decode_i8_fn(const Geom& g, float scale) {
  if (!g.rounded) return decode_i8<AsItIs>;
  if (g.query_dtype == SFA_CORE_BF16) {
    return moderate(scale) ? decode_i8<ToBFloat16Moderate> : decode_i8<ToBFloat16>;
  }
  return moderate(scale) ? decode_i8<ToFloat16Moderate> : decode_i8<ToFloat16>;
}

void decode_float(const uint8_t* src, int n, int dtype, float* out) {
  int i = 0;
  if (dtype == SFA_CORE_F32) {
    memcpy(out, src, 4 * (size_t)n);
    return;
  }
  if (dtype == SFA_CORE_BF16) {
    for (; i + W <= n; i += W) storeu(out + i, simd::load_bf16(src + 2 * i));
  } else {
    for (; i + W <= n; i += W) storeu(out + i, simd::load_f16(src + 2 * i));
  }
  for (; i < n; ++i) out[i] = load_as_f32(src, i, dtype);
}

// Latent columns [from, to) of one row.
void decode_nope(const Geom& g, const uint8_t* nope, const uint8_t* rope, int from, int to,
                 float* out) {
  if (g.cache_dtype != SFA_CORE_I8) {
    decode_float(nope + (size_t)from * dtype_size(g.cache_dtype), to - from, g.cache_dtype, out);
    return;
  }
  const uint8_t* scales = rope + (size_t)g.rope * dtype_size(g.query_dtype);
  for (int d = from; d < to;) {
    const int t = d / g.tile, end = (t + 1) * g.tile < to ? (t + 1) * g.tile : to;
    const float scale = load_as_f32(scales, t, SFA_CORE_F32);
    decode_i8_fn(g, scale)(nope + d, end - d, scale, out + (d - from));
    d = end;
  }
}

void decode_rope(const Geom& g, const uint8_t* rope, int from, int to, float* out) {
  const int dtype = g.cache_dtype == SFA_CORE_I8 ? g.query_dtype : g.cache_dtype;
  decode_float(rope + (size_t)from * dtype_size(dtype), to - from, dtype, out);
}

// Asks for the lines of rows [first, first + count).
// Always inline: GCC drops calls of functions that do nothing but prefetch.
inline __attribute__((always_inline)) void ask_for(const Geom& g, const Rows& rows, int first,
                                                   int count) {
  const int last = first + count < rows.n ? first + count : rows.n;
  const bool packed = g.cache_dtype == SFA_CORE_I8;
  const int rope = g.rope * dtype_size(packed ? g.query_dtype : g.cache_dtype);
  const int nope = g.nope * dtype_size(g.cache_dtype);
  const int bytes = packed ? nope + rope + 4 * (g.nope / g.tile) : nope;
  for (int k = first; k < last; ++k) {
    for (int b = 0; b < bytes; b += 64) __builtin_prefetch(rows.nope[k] + b, 0, 2);
    for (int b = 0; b < rope && !packed; b += 64) __builtin_prefetch(rows.rope[k] + b, 0, 2);
  }
}

// ---- query ---------------------------------------------------------------------------------

void pack_part(const Geom& g, const void* src, int64_t stride, int64_t offset, int n, int lanes,
               float* out) {
  memset(out, 0, 4 * (size_t)n * lanes);
  float row[kColumns];
  for (int h = 0; h < g.heads; ++h) {
    for (int from = 0; from < n; from += kColumns) {
      const int count = n - from < kColumns ? n - from : kColumns;
      const uint8_t* at =
          (const uint8_t*)src + (h * stride + offset + from) * dtype_size(g.query_dtype);
      decode_float(at, count, g.query_dtype, row);
      float* column = out + (size_t)from * lanes + h;
      for (int i = 0; i < count; ++i) column[(size_t)i * lanes] = row[i];
    }
  }
}

void fp32_load_query(const Geom& g, const void* query, const void* query_rope, void* scratch) {
  const Buffers b = lay_out(g, scratch);
  const bool packed = g.cache_dtype == SFA_CORE_I8;
  const int64_t width = packed ? g.nope + g.rope : g.nope;
  pack_part(g, query, width, 0, g.nope, b.lanes, b.q);
  float* rope = b.q + (size_t)g.nope * b.lanes;
  if (packed) {
    pack_part(g, query, width, g.nope, g.rope, b.lanes, rope);
  } else if (g.rope > 0) {
    pack_part(g, query_rope, g.rope, 0, g.rope, b.lanes, rope);
  }
}

// ---- scores --------------------------------------------------------------------------------

// s[k][v] += sum_d keys[k][d] * q[d][v] for K keys and V vectors of heads.
template <int K, int V>
void score_tile(const float* keys, int n, const float* q, int lanes, bool fresh, float* s) {
  vf acc[K][V];
  for (int k = 0; k < K; ++k) {
    for (int v = 0; v < V; ++v) acc[k][v] = fresh ? vf{} : load(s + (size_t)k * lanes + v * W);
  }
  for (int d = 0; d < n; ++d) {
    vf qv[V];
    for (int v = 0; v < V; ++v) qv[v] = load(q + (size_t)d * lanes + v * W);
    for (int k = 0; k < K; ++k) {
      const vf key = splat(keys[k * kColumns + d]);
      for (int v = 0; v < V; ++v) acc[k][v] += key * qv[v];
    }
  }
  for (int k = 0; k < K; ++k) {
    for (int v = 0; v < V; ++v) store(s + (size_t)k * lanes + v * W, acc[k][v]);
  }
}

using ScoreFn = void (*)(const float*, int, const float*, int, bool, float*);

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
      return score_fn < kVecs<3 ? kVecs : 3>(keys);
    default:
      return score_fn<kVecs>(keys);
  }
}

// Adds columns [d, d + n) of the query to the scores of `keys` decoded keys.
void score_block(const Buffers& b, int keys, int d, int n, float* s) {
  const float* q = b.q + (size_t)d * b.lanes;
  for (int k = 0; k < keys; k += kTileKeys) {
    const int count = keys - k < kTileKeys ? keys - k : kTileKeys;
    for (int lane = 0; lane < b.lanes;) {
      const int left = (b.lanes - lane) / W, vecs = left < kVecs ? left : kVecs;
      score_fn(count, vecs)(b.tile + k * kColumns, n, q + lane, b.lanes, d == 0,
                            s + (size_t)k * b.lanes + lane);
      lane += vecs * W;
    }
  }
}

void scores(const Geom& g, const Rows& rows, const Buffers& b) {
  for (int first = 0; first < rows.n; first += kQkKeys) {
    const int keys = rows.n - first < kQkKeys ? rows.n - first : kQkKeys;
    float* s = b.s + (size_t)first * b.lanes;
    ask_for(g, rows, first + kQkKeys, kQkKeys);
    for (int d = 0; d < g.nope; d += kColumns) {
      const int to = d + kColumns < g.nope ? d + kColumns : g.nope;
      for (int k = 0; k < keys; ++k) {
        decode_nope(g, rows.nope[first + k], rows.rope[first + k], d, to, b.tile + k * kColumns);
      }
      score_block(b, keys, d, to - d, s);
    }
    for (int d = 0; d < g.rope; d += kColumns) {
      const int to = d + kColumns < g.rope ? d + kColumns : g.rope;
      for (int k = 0; k < keys; ++k) {
        decode_rope(g, rows.rope[first + k], d, to, b.tile + k * kColumns);
      }
      score_block(b, keys, g.nope + d, to - d, s);
    }
  }
}

// ---- softmax -------------------------------------------------------------------------------

// Scores of the chunk become 2^(s * scale - m); m and l are written per head.
void softmax(const Geom& g, int n, const Buffers& b, Partial* out) {
  const vf scale = splat(g.scale_log2);
  for (int lane = 0; lane < b.lanes; lane += W) {
    float* column = b.s + lane;
    vf m = load(column) * scale;
    for (int k = 1; k < n; ++k) m = vmax(m, load(column + (size_t)k * b.lanes) * scale);
    vf l = {};
    for (int k = 0; k < n; ++k) {
      float* at = column + (size_t)k * b.lanes;
      const vf p = exp2_fine(load(at) * scale - m);
      l += p;
      store(at, p);
    }
    float tail[W];
    const int heads = g.heads - lane < W ? g.heads - lane : W;
    storeu(tail, m);
    memcpy(out->m + lane, tail, 4 * heads);
    storeu(tail, l);
    memcpy(out->l + lane, tail, 4 * heads);
  }
}

// ---- values --------------------------------------------------------------------------------

// o[h][v] += sum_k p[k][h] * values[k][v] for H heads and V vectors of columns.
template <int H, int V>
void value_tile(const float* values, int n, const float* p, int lanes, bool fresh, int stride,
                float* o) {
  vf acc[H][V];
  for (int h = 0; h < H; ++h) {
    for (int v = 0; v < V; ++v) acc[h][v] = fresh ? vf{} : load(o + (size_t)h * stride + v * W);
  }
  for (int k = 0; k < n; ++k) {
    vf row[V];
    for (int v = 0; v < V; ++v) row[v] = load(values + k * kColumns + v * W);
    for (int h = 0; h < H; ++h) {
      const vf weight = splat(p[(size_t)k * lanes + h]);
      for (int v = 0; v < V; ++v) acc[h][v] += weight * row[v];
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int v = 0; v < V; ++v) store(o + (size_t)h * stride + v * W, acc[h][v]);
  }
}

using ValueFn = void (*)(const float*, int, const float*, int, bool, int, float*);

ValueFn value_fn(int heads) {
  constexpr ValueFn table[kTileKeys] = {value_tile<1, kVecs>, value_tile<2, kVecs>,
                                        value_tile<3, kVecs>, value_tile<4, kVecs>,
                                        value_tile<5, kVecs>, value_tile<6, kVecs>};
  return table[heads - 1];
}

void values(const Geom& g, const Rows& rows, const Buffers& b, Partial* out) {
  const int groups = (g.heads + kTileKeys - 1) / kTileKeys;
  for (int first = 0; first < rows.n; first += kPvKeys) {
    const int keys = rows.n - first < kPvKeys ? rows.n - first : kPvKeys;
    for (int d = 0; d < g.nope; d += kColumns) {
      const int to = d + kColumns < g.nope ? d + kColumns : g.nope;
      const int width = round_up(to - d, kVecs * W);
      for (int k = 0; k < keys; ++k) {
        float* row = b.tile + k * kColumns;
        memset(row + (to - d), 0, 4 * (size_t)(width - (to - d)));
        decode_nope(g, rows.nope[first + k], rows.rope[first + k], d, to, row);
      }
      for (int group = 0; group < groups; ++group) {
        const int h = group * g.heads / groups, heads = (group + 1) * g.heads / groups - h;
        for (int v = 0; v < width; v += kVecs * W) {
          value_fn(heads)(b.tile + v, keys, b.s + (size_t)first * b.lanes + h, b.lanes, first == 0,
                          g.o_stride, out->o + (size_t)h * g.o_stride + d + v);
        }
      }
    }
  }
}

void fp32_attend(const Geom& g, const Rows& rows, const Rows* next, bool warm, void* scratch,
                 Partial* out) {
  const Buffers b = lay_out(g, scratch);
  if (!warm) ask_for(g, rows, 0, kQkKeys);
  scores(g, rows, b);
  softmax(g, rows.n, b, out);
  if (next) ask_for(g, *next, 0, kQkKeys);
  values(g, rows, b, out);
}

}  // namespace
}  // namespace sfa
