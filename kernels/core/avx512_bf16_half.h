// AVX512-BF16, five to eight heads: as the wide kernel, but a vector of scores holds eight heads of
// two neighbouring keys (lane 2h + b: head h, key 2i + b), so that no lane idles in Q.K and the
// probabilities come out as the pairs of keys that P.V wants.
#ifndef SFA_ONNX_KERNELS_CORE_AVX512_BF16_HALF_H_
#define SFA_ONNX_KERNELS_CORE_AVX512_BF16_HALF_H_

#include "avx512_bf16_plan.h"
#include "avx512_bf16_wide.h"

namespace sfa {
namespace {

constexpr int kHalfHeads = 8;

// Where dword c of a decoded row goes when two rows are interleaved, inside blocks of 16.
constexpr int paired_position(int c) {
  const int block = c / 16 * 16, e = c % 16;
  return block + (e % 4 < 2 ? 0 : 8) + e / 4 * 2 + e % 2;
}

// Rewrites the wide query [row, 16 heads] as [paired row, 8 heads, twice].
void pack_query_half(const Plan& p, const void* query, const void* query_rope) {
  pack_query(p, query, query_rope);
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const int rows = p.passes * p.g.nope / 2 + p.rope_pairs;
  memset(p.q + (size_t)rows * 16, 0, 64 * (size_t)(round_up(rows, 16) - rows));
  for (int block = 0; block < rows; block += 16) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(p.q + (size_t)(block + i) * 16);
    for (int i = 0; i < 16; ++i) {
      _mm512_store_si512(p.q + (size_t)(block + paired_position(i)) * 16,
                         _mm512_permutexvar_epi32(twice, r[i]));
    }
  }
}

// As score_tile, for K pairs of keys.
template <int K>
void score_pairs(const uint64_t* keys, int columns, const uint32_t* q, const float* scale,
                 bool fresh, float* s, Prefetch* pf) {
  __m512 acc[K];
#pragma GCC unroll 24
  for (int k = 0; k < K; ++k) acc[k] = _mm512_setzero_ps();
  for (int w = 0; w < columns; w += 4, q += 64) {
    pf->some();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512bh heads = (__m512bh)_mm512_load_si512(q + 16 * i);
#pragma GCC unroll 24
      for (int k = 0; k < K; ++k) {
        const __m512i pair = _mm512_set1_epi64((int64_t)keys[k * kTileDwords + w + i]);
        acc[k] = _mm512_dpbf16_ps(acc[k], (__m512bh)pair, heads);
      }
    }
  }
#pragma GCC unroll 24
  for (int k = 0; k < K; ++k) {
    uint64_t both;
    memcpy(&both, scale + 2 * k, 8);
    const __m512 factor = (__m512)_mm512_set1_epi64((int64_t)both);
    const __m512 old = fresh ? _mm512_setzero_ps() : _mm512_load_ps(s + 16 * k);
    _mm512_store_ps(s + 16 * k, _mm512_fmadd_ps(acc[k], factor, old));
  }
}

void score_block_half(const Plan& p, int pairs, int columns, const uint32_t* q, bool fresh,
                      float* s, Prefetch* pf) {
  const uint64_t* tile = (const uint64_t*)p.tile;
  for (int k = 0; k < pairs;) {
    const int left = pairs - k;
    const int step = left == 8 ? 8 : left == 16 || left == 32 ? 16 : 24;
    const auto fn = step == 8 ? score_pairs<8> : step == 16 ? score_pairs<16> : score_pairs<24>;
    fn(tile + k * kTileDwords, columns, q, p.scale + 2 * k, fresh, s + 16 * k, pf);
    k += step;
  }
}

inline void store_paired(__m512i v0, __m512i v1, uint64_t* out) {
  _mm512_store_si512(out, _mm512_unpacklo_epi32(v0, v1));
  _mm512_store_si512(out + 8, _mm512_unpackhi_epi32(v0, v1));
}

void decode_key_pairs(const Plan& p, const Rows& rows, int first, int keys, int d, int columns) {
  const Converter convert;
  for (int k = 0; k < keys; k += 2) {
    const uint8_t *r0 = rows.nope[first + k], *r1 = rows.nope[first + k + 1];
    uint64_t* out = (uint64_t*)p.tile + k / 2 * kTileDwords;
    for (int w = 0; w < columns; w += 32, out += 32) {
      __m512i a0, b0, a1, b1;
      load_columns(p, convert, r0, rows.rope[first + k], d + 2 * w, &a0, &b0);
      load_columns(p, convert, r1, rows.rope[first + k + 1], d + 2 * w, &a1, &b1);
      store_paired(a0, a1, out);
      store_paired(b0, b1, out + 16);
    }
    for (int i = k; i < k + 2; ++i) {
      p.scale[i] = p.scaled ? scale_of(p, rows.rope[first + i], d / p.g.tile) : 1.0f;
    }
  }
}

void decode_rope_pairs(const Plan& p, const Rows& rows, int first, int keys, int from,
                       int columns) {
  alignas(64) uint32_t r0[kRopeRoom] = {}, r1[kRopeRoom] = {};
  for (int k = 0; k < keys; k += 2) {
    rope_pairs(p, rows.rope[first + k], r0);
    rope_pairs(p, rows.rope[first + k + 1], r1);
    uint64_t* out = (uint64_t*)p.tile + k / 2 * kTileDwords;
    for (int w = 0; w < columns; w += 16) {
      store_paired(_mm512_load_si512(r0 + from + w), _mm512_load_si512(r1 + from + w), out + w);
    }
    p.scale[k] = p.scale[k + 1] = 1.0f;
  }
}

void scores_half(const Plan& p, const Rows& rows, Prefetch* pf) {
  for (int first = 0; first < rows.n; first += kQkKeys) {
    const int left = rows.n - first;
    const int keys = left < kQkKeys ? round_up(left, 2 * kKeyPad) : kQkKeys;
    float* s = p.s + (size_t)first / 2 * 16;
    pf->tile();
    for (int d = 0; d < p.g.nope; d += 2 * p.block_pairs) {
      decode_key_pairs(p, rows, first, keys, d, p.block_pairs);
      for (int pass = 0; pass < p.passes; ++pass) {
        const size_t row = (size_t)pass * p.g.nope / 2 + d / 2;
        score_block_half(p, keys / 2, p.block_pairs, p.q + row * 16, d == 0 && pass == 0, s, pf);
      }
    }
    for (int w = 0; w < p.narrow_rope; w += kTileDwords) {
      const int columns = p.narrow_rope - w < kTileDwords ? p.narrow_rope - w : kTileDwords;
      decode_rope_pairs(p, rows, first, keys, w, columns);
      const size_t row = (size_t)p.passes * p.g.nope / 2 + w;
      score_block_half(p, keys / 2, columns, p.q + row * 16, false, s, pf);
    }
  }
}

void softmax_half(const Plan& p, int n, Partial* out) {
  const __m512 log2 = _mm512_set1_ps(p.g.scale_log2);
  const int pairs = (n + 1) / 2;
  __m512 m = _mm512_set1_ps(-__builtin_inff());
  // Stored scaled, so that the largest score less itself is zero.
  for (int k = 0; k < pairs; ++k) {
    const __m512 s = _mm512_mul_ps(_mm512_load_ps(p.s + 16 * k), log2);
    _mm512_store_ps(p.s + 16 * k, s);
    m = _mm512_max_ps(m, s);
  }
  m = _mm512_max_ps(m, _mm512_permute_ps(m, 0xb1));  // both keys of a pair
  __m512 l = _mm512_setzero_ps();
  __m512i best = _mm512_set1_epi32(-1);
  __m512i key = _mm512_setr_epi32(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1);
  for (int k = 0; k < pairs; ++k) {
    const __mmask16 live = 2 * k + 1 < n ? 0xffff : 0x5555;
    const __m512 s = _mm512_load_ps(p.s + 16 * k);
    const __m512 e = _mm512_maskz_mov_ps(live, exp2_fast(_mm512_sub_ps(s, m)));
    best = _mm512_mask_mov_epi32(best, _mm512_cmp_ps_mask(s, m, _CMP_EQ_OQ), key);
    key = _mm512_add_epi32(key, _mm512_set1_epi32(2));
    l = _mm512_add_ps(l, e);
    _mm512_store_ps(p.s + 16 * k, e);
  }
  l = _mm512_add_ps(l, _mm512_permute_ps(l, 0xb1));
  best = _mm512_max_epi32(best, _mm512_shuffle_epi32(best, (_MM_PERM_ENUM)0xb1));
  best = _mm512_max_epi32(best, _mm512_setzero_si512());
  alignas(64) float top[16], sum[16];
  alignas(64) int32_t keys[16];
  _mm512_store_ps(top, m);
  _mm512_store_ps(sum, l);
  _mm512_store_si512(keys, best);
  for (int h = 0; h < p.lanes; ++h) p.best[h] = h < kHalfHeads ? keys[2 * h] : 0;
  for (int h = 0; h < p.g.heads; ++h) {
    out->m[h] = top[2 * h];
    out->l[h] = sum[2 * h];
  }
}

// weights[pair][8 heads]
void fold_scales_half(const Plan& p, const Rows& rows, int t) {
  choose_units(p, rows, t);
  const __m512 per_head = _mm512_load_ps(p.per_unit);
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512 per_unit = _mm512_permutexvar_ps(twice, per_head);
  for (int w = 0; w < (rows.n + 1) / 2; ++w) {
    __m512 prob = _mm512_load_ps(p.s + 16 * w);
    if (p.scaled) {
      const __m128 s0 = _mm_set_ss(scale_of(p, rows.rope[2 * w], t));
      const __m128 s1 = _mm_set_ss(scale_of(p, rows.rope[2 * w + 1], t));
      const __m512 both = (__m512)_mm512_broadcastq_epi64((__m128i)_mm_unpacklo_ps(s0, s1));
      prob = _mm512_mul_ps(prob, _mm512_mul_ps(both, per_unit));
    }
    _mm256_store_si256((__m256i*)(p.weights + 8 * w), (__m256i)_mm512_cvtneps_pbh(prob));
  }
}

void values_half(const Plan& p, const Rows& rows, Partial* out, Prefetch* pf) {
  pf->values();
  const int groups = p.g.heads > 6 ? 2 : 1;
  for (int d = 0; d < p.g.nope; d += 64) {
    if (d == 0 || (p.scaled && d % p.g.tile == 0)) fold_scales_half(p, rows, d / p.g.tile);
    decode_values(p, rows, d);
    for (int i = 0; i < groups; ++i) {
      const int h = i * p.g.heads / groups, count = (i + 1) * p.g.heads / groups - h;
      kValueFns<8>[count - 1](p.values, (rows.n + 1) / 2, p.weights + h, p.unit + h, p.g.o_stride,
                              out->o + (size_t)h* p.g.o_stride + d, pf);
    }
  }
}

}  // namespace
}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_AVX512_BF16_HALF_H_
