// AVX512-BF16, nine heads and more: lanes are heads in Q.K and latent columns in P.V.
#ifndef SFA_ONNX_KERNELS_CORE_AVX512_BF16_WIDE_H_
#define SFA_ONNX_KERNELS_CORE_AVX512_BF16_WIDE_H_

#include "avx512_bf16_convert.h"
#include "avx512_bf16_plan.h"

namespace sfa {
namespace {

// ---- scores --------------------------------------------------------------------------------

// s[k][v] = (fresh ? 0 : s[k][v]) + scale[k] * sum_w keys[k][w] . q[w][v], over pairs w of columns.
template <int K, int V>
void score_tile(const uint32_t* keys, int pairs, const uint32_t* q, int lanes, const float* scale,
                bool fresh, float* s, Prefetch* pf) {
  __m512 acc[K][V];
#pragma GCC unroll 24
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[k][v] = _mm512_setzero_ps();
  }
  const auto step = [&](const uint32_t* key_pair,
                        const uint32_t* q_pair) __attribute__((always_inline)) {
    __m512bh qv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) qv[v] = (__m512bh)_mm512_load_si512(q_pair + 16 * v);
#pragma GCC unroll 24
    for (int k = 0; k < K; ++k) {
      const __m512bh key = (__m512bh)_mm512_set1_epi32((int)key_pair[k * kTileDwords]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[k][v] = _mm512_dpbf16_ps(acc[k][v], key, qv[v]);
    }
  };
  int w = 0;
  for (; w + 4 <= pairs; w += 4, q += 4 * lanes) {
    pf->some();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) step(keys + w + i, q + i * lanes);
  }
  for (; w < pairs; ++w, q += lanes) step(keys + w, q);
#pragma GCC unroll 24
  for (int k = 0; k < K; ++k) {
    const __m512 factor = _mm512_set1_ps(scale[k]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* at = s + (size_t)k * lanes + 16 * v;
      const __m512 old = fresh ? _mm512_setzero_ps() : _mm512_load_ps(at);
      _mm512_store_ps(at, _mm512_fmadd_ps(acc[k][v], factor, old));
    }
  }
}

using ScoreFn = void (*)(const uint32_t*, int, const uint32_t*, int, const float*, bool, float*,
                         Prefetch*);
struct ScoreStep {
  ScoreFn fn;
  int keys;
};

// The register tile for `left` keys (a multiple of kKeyPad): as near to 24 accumulators as the
// rest allows, none with fewer than 12 when that can be helped.
ScoreStep score_step(int vecs, int left) {
  switch (vecs) {
    case 1:
      if (left == 8) return {score_tile<8, 1>, 8};
      return left == 16 || left == 32 ? ScoreStep{score_tile<16, 1>, 16}
                                      : ScoreStep{score_tile<24, 1>, 24};
    case 2:
      return left % 12 == 0 ? ScoreStep{score_tile<12, 2>, 12} : ScoreStep{score_tile<8, 2>, 8};
    case 3:
      return {score_tile<8, 3>, 8};
    default:
      return left == 8                    ? ScoreStep{score_tile<4, 4>, 4}
             : left % 6 == 4 && left == 4 ? ScoreStep{score_tile<4, 4>, 4}
                                          : ScoreStep{score_tile<6, 4>, 6};
  }
}

// Adds one block of columns for `keys` decoded keys (a multiple of kKeyPad) and all heads.
void score_block(const Plan& p, int keys, int pairs, const uint32_t* q, bool fresh, float* s,
                 Prefetch* pf) {
  for (int lane = 0; lane < p.lanes;) {
    const int left = (p.lanes - lane) / 16;
    const int vecs = left == 5 || left == 6 ? 3 : left < 4 ? left : 4;
    for (int k = 0; k < keys;) {
      const ScoreStep step = score_step(vecs, keys - k);
      step.fn(p.tile + k * kTileDwords, pairs, q + lane, p.lanes, p.scale + k, fresh,
              s + (size_t)k * p.lanes + lane, pf);
      k += step.keys;
    }
    lane += 16 * vecs;
  }
}

// Decodes columns [d, d + 2 * pairs) of keys [first, first + keys) into the tile.
void decode_keys(const Plan& p, const Rows& rows, int first, int keys, int d, int pairs) {
  if (!p.packed) {
    for (int k = 0; k < keys; ++k) {
      memcpy(p.tile + k * kTileDwords, rows.nope[first + k] + 2 * d, 4 * (size_t)pairs);
      p.scale[k] = 1.0f;
    }
    return;
  }
  const Converter convert;
  const size_t scale_at = p.rope_bytes + 4 * (size_t)(d / p.g.tile);
  for (int k = 0; k < keys; ++k) {
    const uint8_t* src = rows.nope[first + k] + d;
    uint32_t* out = p.tile + k * kTileDwords;
    for (int w = 0; w < pairs; w += 32) {
      __m512i a, b;
      convert.to_bf16(_mm512_loadu_si512(src + 2 * w), &a, &b);
      _mm512_store_si512(out + w, a);
      _mm512_store_si512(out + w + 16, b);
    }
    memcpy(p.scale + k, rows.rope[first + k] + scale_at, 4);
  }
}

void decode_ropes(const Plan& p, const Rows& rows, int first, int keys, int from, int pairs) {
  for (int k = 0; k < keys; ++k) {
    rope_pairs(p, rows.rope[first + k], from, pairs, p.tile + k * kTileDwords);
    p.scale[k] = 1.0f;
  }
}

void scores(const Plan& p, const Rows& rows, Prefetch* pf) {
  for (int first = 0; first < rows.n; first += kQkKeys) {
    const int left = rows.n - first;
    const int keys = left < kQkKeys ? round_up(left, kKeyPad) : kQkKeys;
    float* s = p.s + (size_t)first * p.lanes;
    pf->tile();
    for (int d = 0; d < p.g.nope; d += 2 * p.block_pairs) {
      decode_keys(p, rows, first, keys, d, p.block_pairs);
      for (int pass = 0; pass < p.passes; ++pass) {
        const size_t row = (size_t)pass * p.g.nope / 2 + d / 2;
        score_block(p, keys, p.block_pairs, p.q + row * p.lanes, d == 0 && pass == 0, s, pf);
      }
    }
    for (int w = 0; w < p.rope_pairs; w += kTileDwords) {
      const int pairs = p.rope_pairs - w < kTileDwords ? p.rope_pairs - w : kTileDwords;
      decode_ropes(p, rows, first, keys, w, pairs);
      const size_t row = (size_t)p.passes * p.g.nope / 2 + w;
      score_block(p, keys, pairs, p.q + row * p.lanes, false, s, pf);
    }
  }
}

// ---- softmax -------------------------------------------------------------------------------

void softmax(const Plan& p, int n, Partial* out) {
  const __m512 scale = _mm512_set1_ps(p.g.scale_log2);
  for (int lane = 0; lane < p.lanes; lane += 16) {
    float* column = p.s + lane;
    __m512 m0 = _mm512_mul_ps(_mm512_load_ps(column), scale), m1 = m0;
    int k = 1;
    for (; k + 1 < n; k += 2) {
      m0 = _mm512_max_ps(m0, _mm512_mul_ps(_mm512_load_ps(column + (size_t)k * p.lanes), scale));
      m1 = _mm512_max_ps(m1,
                         _mm512_mul_ps(_mm512_load_ps(column + (size_t)(k + 1) * p.lanes), scale));
    }
    if (k < n) {
      m0 = _mm512_max_ps(m0, _mm512_mul_ps(_mm512_load_ps(column + (size_t)k * p.lanes), scale));
    }
    const __m512 m = _mm512_max_ps(m0, m1);
    __m512 l = _mm512_setzero_ps();
    for (k = 0; k < n; ++k) {
      float* at = column + (size_t)k * p.lanes;
      const __m512 e = exp2_fast(_mm512_fmsub_ps(_mm512_load_ps(at), scale, m));
      l = _mm512_add_ps(l, e);
      _mm512_store_ps(at, e);
    }
    _mm512_store_ps(column + (size_t)n * p.lanes, _mm512_setzero_ps());  // the odd key's partner
    const int heads = p.g.heads - lane < 16 ? p.g.heads - lane : 16;
    const __mmask16 mask = (__mmask16)((1u << heads) - 1);
    _mm512_mask_storeu_ps(out->m + lane, mask, m);
    _mm512_mask_storeu_ps(out->l + lane, mask, l);
  }
}

// ---- values --------------------------------------------------------------------------------

// o[h][0..63] = sum over key pairs of weights[pair][h] . values[pair][0..63], for H heads. The sum
// runs over the whole chunk in registers: streaming 64 KiB of values from L2 costs less than
// loading and storing the accumulators for every L1-sized piece.
template <int H>
void value_tile(const uint32_t* values, int pairs, const uint32_t* weights, int weight_stride,
                int stride, float* o, Prefetch* pf) {
  __m512 acc[H][4];
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[h][v] = _mm512_setzero_ps();
  }
  const auto step = [&](const uint32_t* columns, const uint32_t* weight_row)
                        __attribute__((always_inline)) {
                          __m512bh row[4];
#pragma GCC unroll 4
                          for (int v = 0; v < 4; ++v)
                            row[v] = (__m512bh)_mm512_load_si512(columns + 16 * v);
#pragma GCC unroll 8
                          for (int h = 0; h < H; ++h) {
                            const __m512bh weight = (__m512bh)_mm512_set1_epi32((int)weight_row[h]);
#pragma GCC unroll 4
                            for (int v = 0; v < 4; ++v)
                              acc[h][v] = _mm512_dpbf16_ps(acc[h][v], weight, row[v]);
                          }
                        };
  int w = 0;
  for (; w + 4 <= pairs; w += 4, values += 256, weights += 4 * weight_stride) {
    pf->some();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) step(values + 64 * i, weights + i * weight_stride);
  }
  for (; w < pairs; ++w, values += 64, weights += weight_stride) step(values, weights);
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) _mm512_store_ps(o + (size_t)h * stride + 16 * v, acc[h][v]);
  }
}

using ValueFn = void (*)(const uint32_t*, int, const uint32_t*, int, int, float*, Prefetch*);
constexpr ValueFn kValueFns[6] = {value_tile<1>, value_tile<2>, value_tile<3>,
                                  value_tile<4>, value_tile<5>, value_tile<6>};

// Probabilities times the scales of latent tile t, as bf16 pairs of keys:
// weights[head / 16][pair][head % 16].
void fold_scales(const Plan& p, const Rows& rows, int t) {
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const size_t scale_at = p.rope_bytes + 4 * (size_t)t;
  for (int w = 0; w < (rows.n + 1) / 2; ++w) {
    float scale[2] = {1.0f, 1.0f};
    if (p.packed) {
      memcpy(&scale[0], rows.rope[2 * w] + scale_at, 4);
      memcpy(&scale[1], rows.rope[2 * w + 1] + scale_at, 4);
    }
    const __m512 s0 = _mm512_set1_ps(scale[0]), s1 = _mm512_set1_ps(scale[1]);
    const float* row = p.s + (size_t)(2 * w) * p.lanes;
    for (int lane = 0; lane < p.lanes; lane += 16) {
      const __m512 a = _mm512_mul_ps(_mm512_load_ps(row + lane), s0);
      const __m512 b = _mm512_mul_ps(_mm512_load_ps(row + p.lanes + lane), s1);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      _mm512_store_si512(p.weights + (size_t)lane * (kChunk / 2) + 16 * w,
                         _mm512_permutexvar_epi16(interleave, both));
    }
  }
}

// Columns [d, d + 64) of all keys.
void decode_values(const Plan& p, const Rows& rows, int d) {
  const Converter convert;
  for (int k = 0; k < rows.n; k += 2) {
    uint32_t* out = p.values + 32 * k;
    if (p.packed) {
      pair_int8(convert, rows.nope[k] + d, rows.nope[k + 1] + d, out);
    } else {
      pair_bf16(rows.nope[k] + 2 * d, rows.nope[k + 1] + 2 * d, out);
    }
  }
}

void values(const Plan& p, const Rows& rows, Partial* out, Prefetch* pf) {
  pf->values();
  for (int d = 0; d < p.g.nope; d += 64) {
    if (d % p.g.tile == 0) fold_scales(p, rows, d / p.g.tile);
    decode_values(p, rows, d);
    for (int lane = 0; lane < p.g.heads; lane += 16) {
      const uint32_t* weights = p.weights + (size_t)lane * (kChunk / 2);
      const int heads = p.g.heads - lane < 16 ? p.g.heads - lane : 16, groups = (heads + 5) / 6;
      for (int i = 0; i < groups; ++i) {
        const int h = i * heads / groups, count = (i + 1) * heads / groups - h;
        kValueFns[count - 1](p.values, (rows.n + 1) / 2, weights + h, 16, p.g.o_stride,
                             out->o + (size_t)(lane + h) * p.g.o_stride + d, pf);
      }
    }
  }
}

}  // namespace
}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_AVX512_BF16_WIDE_H_
