// AVX512-BF16, nine heads and more: lanes are heads in Q.K and latent columns in P.V.
#ifndef SFA_ONNX_KERNELS_CORE_AVX512_BF16_WIDE_H_
#define SFA_ONNX_KERNELS_CORE_AVX512_BF16_WIDE_H_

#include "avx512_bf16_convert.h"
#include "avx512_bf16_plan.h"

namespace sfa {
namespace {

// Steps of Q.K per turn of its loop. Sanitizers take minutes to instrument the unrolled kernels.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kSteps = 1;
constexpr bool kKnownStrides = false;
#else
constexpr int kSteps = 8;
constexpr bool kKnownStrides = true;
#endif

// ---- scores --------------------------------------------------------------------------------

// s[k][v] = scale_log2 * (sum over latent tiles t of scale[t][k] * keys[k][t] . q[t][v], plus the
// rope's part), for K keys and V vectors of heads. Both the products of a tile and the scores stay
// in registers.
//
// S is the number of dwords from key to key, 0 when only known at run time: constant distances keep
// the addresses of a step out of the general registers.
template <int K, int V, int S>
void score_tile(const Plan& p, const uint32_t* keys, const float* scale, int lane, float* s,
                Prefetch* pf) {
  __m512 sum[K][V], acc[K][V];
  constexpr int width = 16 * V;
  const int stride = S ? S : p.key_dwords;
  const auto run = [&](const uint32_t* key, const uint32_t* q, int pairs,
                       __m512(&to)[K][V]) __attribute__((always_inline)) {
    const auto step = [&](const uint32_t* key_pair,
                          const uint32_t* q_pair) __attribute__((always_inline)) {
      __m512bh qv[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) qv[v] = (__m512bh)_mm512_load_si512(q_pair + 16 * v);
#pragma GCC unroll 12
      for (int k = 0; k < K; ++k) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)key_pair[k * stride]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) to[k][v] = _mm512_dpbf16_ps(to[k][v], pair, qv[v]);
      }
    };
    int w = 0;
    for (; w + kSteps <= pairs; w += kSteps, key += kSteps, q += kSteps * width) {
      pf->some();
#pragma GCC unroll 8
      for (int i = 0; i < kSteps; ++i) step(key + i, q + i * width);
    }
    for (; w < pairs; ++w, ++key, q += width) step(key, q);
  };
#pragma GCC unroll 12
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[k][v] = _mm512_setzero_ps();
  }
  const int half = p.g.nope / 2;
  run(keys + half, p.q_at(p.passes * half, lane), p.rope_pairs, sum);
  for (int w = 0; w < half; w += p.block_pairs, scale += kQkKeys) {
#pragma GCC unroll 12
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[k][v] = _mm512_setzero_ps();
    }
    for (int pass = 0; pass < p.passes; ++pass) {
      run(keys + w, p.q_at(pass * half + w, lane), p.block_pairs, acc);
    }
#pragma GCC unroll 12
    for (int k = 0; k < K; ++k) {
      const __m512 factor = _mm512_set1_ps(scale[k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[k][v] = _mm512_fmadd_ps(acc[k][v], factor, sum[k][v]);
    }
  }
  const __m512 log2 = _mm512_set1_ps(p.g.scale_log2);
#pragma GCC unroll 12
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      _mm512_store_ps(s + (size_t)k * p.lanes + 16 * v, _mm512_mul_ps(sum[k][v], log2));
    }
  }
}

using ScoreFn = void (*)(const Plan&, const uint32_t*, const float*, int, float*, Prefetch*);

template <int S>
ScoreFn score_fn(int vecs, int keys) {
  if (vecs == 2) return keys == 6 ? score_tile<6, 2, S> : score_tile<4, 2, S>;
  return keys == 12 ? score_tile<12, 1, S> : keys == 8 ? score_tile<8, 1, S> : score_tile<4, 1, S>;
}

ScoreFn score_fn(const Plan& p, int vecs, int keys) {
  switch (kKnownStrides ? p.key_dwords : 0) {
    case 288:  // latent 512, rope 64
      return score_fn<kKnownStrides ? 288 : 0>(vecs, keys);
    case 352:  // the same with a float16 query
      return score_fn<kKnownStrides ? 352 : 0>(vecs, keys);
    default:
      return score_fn<0>(vecs, keys);
  }
}

// All heads against `keys` decoded keys (padded to a multiple of 4).
void score_block(const Plan& p, int keys, float* s, Prefetch* pf) {
  for (int lane = 0; lane < p.lanes; lane += kQkLanes) {
    const int vecs = p.q_width(lane) / 16;
    for (int k = 0; k < keys;) {
      const int left = keys - k;
      const int step = vecs == 2 ? (left % 6 == 0 || left > 8 ? 6 : 4)
                                 : (left % 12 == 0 || left > 16 ? 12
                                    : left % 8 == 0             ? 8
                                                                : 4);
      score_fn(p, vecs, step)(p, p.tile + (size_t)k * p.key_dwords, p.scale + k, lane,
                              s + (size_t)k * p.lanes + lane, pf);
      k += step;
    }
  }
}

// Decodes keys [first, first + keys) into the tile.
void decode_keys(const Plan& p, const Rows& rows, int first, int keys) {
  const Converter convert;
  const int half = p.g.nope / 2;
  for (int k = 0; k < keys; ++k) {
    const uint8_t *nope = rows.nope[first + k], *rope = rows.rope[first + k];
    uint32_t* out = p.tile + (size_t)k * p.key_dwords;
    for (int w = 0; w < half; w += 32) {
      __m512i a, b;
      load_columns(p, convert, nope, rope, 2 * w, &a, &b);
      _mm512_store_si512(out + w, a);
      _mm512_store_si512(out + w + 16, b);
    }
    rope_pairs(p, rope, out + half);
    float* scale = p.scale + k;
    for (int d = 0; d < p.g.nope; d += 2 * p.block_pairs, scale += kQkKeys) {
      *scale = p.scaled ? scale_of(p, rope, d / p.g.tile) : 1.0f;
    }
  }
}

// The decoded keys of the tile as pairs of values, the first of which is pair `pair`.
void share_values(const Plan& p, int pair, int keys) {
  for (int k = 0; k < keys; k += 2, ++pair) {
    const uint32_t* r0 = p.tile + (size_t)k * p.key_dwords;
    const uint32_t* r1 = r0 + p.key_dwords;
    for (int d = 0; d < p.g.nope; d += 64, r0 += 32, r1 += 32) {
      const __m512i a0 = _mm512_load_si512(r0), b0 = _mm512_load_si512(r0 + 16);
      const __m512i a1 = _mm512_load_si512(r1), b1 = _mm512_load_si512(r1 + 16);
      uint32_t* out = p.values + ((size_t)(d / 64) * (kSharedKeys / 2) + pair) * 64;
      _mm512_store_si512(out, _mm512_unpacklo_epi16(a0, a1));
      _mm512_store_si512(out + 16, _mm512_unpackhi_epi16(a0, a1));
      _mm512_store_si512(out + 32, _mm512_unpacklo_epi16(b0, b1));
      _mm512_store_si512(out + 48, _mm512_unpackhi_epi16(b0, b1));
    }
  }
}

// Keys [begin, end).
void scores(const Plan& p, const Rows& rows, int begin, int end, Prefetch* pf) {
  for (int first = begin; first < end; first += p.tile_keys) {
    const int left = end - first;
    const int keys = left < p.tile_keys ? round_up(left, 4) : p.tile_keys;
    pf->tile();
    decode_keys(p, rows, first, keys);
    if (p.shared) share_values(p, (first - begin) / 2, keys);
    score_block(p, keys, p.s + (size_t)(first - begin) * p.lanes, pf);
  }
}

// ---- softmax -------------------------------------------------------------------------------

void softmax(const Plan& p, int n, Partial* out) {
  for (int lane = 0; lane < p.lanes; lane += 16) {
    float* column = p.s + lane;
    __m512 m0 = _mm512_load_ps(column), m1 = m0;
    int k = 1;
    for (; k + 1 < n; k += 2) {
      m0 = _mm512_max_ps(m0, _mm512_load_ps(column + (size_t)k * p.lanes));
      m1 = _mm512_max_ps(m1, _mm512_load_ps(column + (size_t)(k + 1) * p.lanes));
    }
    if (k < n) m0 = _mm512_max_ps(m0, _mm512_load_ps(column + (size_t)k * p.lanes));
    const __m512 m = _mm512_max_ps(m0, m1);
    __m512 l = _mm512_setzero_ps();
    __m512i best = _mm512_setzero_si512(), key = best;
    for (k = 0; k < n; ++k) {
      float* at = column + (size_t)k * p.lanes;
      const __m512 s = _mm512_load_ps(at), e = exp2_fast(_mm512_sub_ps(s, m));
      best = _mm512_mask_mov_epi32(best, _mm512_cmp_ps_mask(s, m, _CMP_EQ_OQ), key);
      key = _mm512_add_epi32(key, _mm512_set1_epi32(1));
      l = _mm512_add_ps(l, e);
      _mm512_store_ps(at, e);
    }
    _mm512_store_si512(p.best + lane, best);
    _mm512_store_ps(column + (size_t)n * p.lanes, _mm512_setzero_ps());  // the odd key's partner
    const int heads = p.g.heads - lane < 16 ? p.g.heads - lane : 16;
    const __mmask16 mask = (__mmask16)((1u << heads) - 1);
    _mm512_mask_storeu_ps(out->m + lane, mask, m);
    _mm512_mask_storeu_ps(out->l + lane, mask, l);
  }
}

// ---- values --------------------------------------------------------------------------------

// o[h][0..63] = unit[h] * sum over key pairs of weights[pair][h] . values[pair][0..63], for H
// heads. The sum runs over the whole chunk in registers: streaming 64 KiB of values from L2 costs
// less than loading and storing the accumulators for every L1-sized piece. S dwords lie between the
// weights of two pairs.
template <int H, int S>
void value_tile(const uint32_t* values, int pairs, const uint32_t* weights, const float* unit,
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
  for (; w + 4 <= pairs; w += 4, values += 256, weights += 4 * S) {
    pf->some();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) step(values + 64 * i, weights + i * S);
  }
  for (; w < pairs; ++w, values += 64, weights += S) step(values, weights);
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) {
    const __m512 factor = _mm512_set1_ps(unit[h]);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      _mm512_store_ps(o + (size_t)h * stride + 16 * v, _mm512_mul_ps(acc[h][v], factor));
    }
  }
}

using ValueFn = void (*)(const uint32_t*, int, const uint32_t*, const float*, int, float*,
                         Prefetch*);
template <int S>
constexpr ValueFn kValueFns[6] = {value_tile<1, S>, value_tile<2, S>, value_tile<3, S>,
                                  value_tile<4, S>, value_tile<5, S>, value_tile<6, S>};

// What the weights of latent tile t are multiples of: see mantissa().
void choose_units(const Plan& p, const Rows& rows, int t) {
  for (int lane = 0; lane < p.lanes; lane += 16) {
    __m512 unit = _mm512_set1_ps(1.0f);
    if (p.scaled) {
      alignas(64) float scale[16];
      for (int h = 0; h < 16; ++h) scale[h] = scale_of(p, rows.rope[p.best[lane + h]], t);
      unit = mantissa(_mm512_load_ps(scale));
    }
    _mm512_store_ps(p.unit + lane, unit);
    _mm512_store_ps(p.per_unit + lane, _mm512_div_ps(_mm512_set1_ps(1.0f), unit));
  }
}

// Probabilities times the scales of latent tile t, as bf16 pairs of keys:
// weights[head / 16][pair][head % 16].
void fold_scales(const Plan& p, const Rows& rows, int n, int t) {
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  choose_units(p, rows, t);
  for (int w = 0; w < (n + 1) / 2; ++w) {
    const __m512 s0 = _mm512_set1_ps(p.scaled ? scale_of(p, rows.rope[2 * w], t) : 1.0f);
    const __m512 s1 = _mm512_set1_ps(p.scaled ? scale_of(p, rows.rope[2 * w + 1], t) : 1.0f);
    const float* row = p.s + (size_t)(2 * w) * p.lanes;
    for (int lane = 0; lane < p.lanes; lane += 16) {
      const __m512 per_unit = _mm512_load_ps(p.per_unit + lane);
      const __m512 f0 = _mm512_mul_ps(s0, per_unit), f1 = _mm512_mul_ps(s1, per_unit);
      const __m512 a = _mm512_mul_ps(_mm512_load_ps(row + lane), f0);
      const __m512 b = _mm512_mul_ps(_mm512_load_ps(row + p.lanes + lane), f1);
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
    if (p.g.rounded) {
      const int t = d / p.g.tile;
      const Scaler scaler(scale_of(p, rows.rope[k], t), scale_of(p, rows.rope[k + 1], t));
      round_pair(scaler, rows.nope[k] + d, rows.nope[k + 1] + d, out);
    } else if (p.packed) {
      pair_int8(convert, rows.nope[k] + d, rows.nope[k + 1] + d, out);
    } else {
      pair_bf16(rows.nope[k] + 2 * d, rows.nope[k + 1] + 2 * d, out);
    }
  }
}

// `n` keys: those of `rows`, or those whose values are shared.
void values(const Plan& p, const Rows& rows, int n, Partial* out, Prefetch* pf) {
  for (int d = 0; d < p.g.nope; d += 64) {
    if (d == 0 || (p.scaled && d % p.g.tile == 0)) fold_scales(p, rows, n, d / p.g.tile);
    const uint32_t* columns = p.values;
    if (p.shared) {
      columns += (size_t)(d / 64) * (kSharedKeys / 2) * 64;
    } else {
      decode_values(p, rows, d);
    }
    for (int lane = 0; lane < p.g.heads; lane += 16) {
      const uint32_t* weights = p.weights + (size_t)lane * (kChunk / 2);
      const int heads = p.g.heads - lane < 16 ? p.g.heads - lane : 16, groups = (heads + 5) / 6;
      for (int i = 0; i < groups; ++i) {
        const int h = i * heads / groups, count = (i + 1) * heads / groups - h;
        kValueFns<16>[count - 1](columns, (n + 1) / 2, weights + h, p.unit + lane + h, p.g.o_stride,
                                 out->o + (size_t)(lane + h)* p.g.o_stride + d, pf);
      }
    }
  }
}

}  // namespace
}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_AVX512_BF16_WIDE_H_
