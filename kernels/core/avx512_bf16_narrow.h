// AVX512-BF16, one to four heads: lanes are columns in both products.
//
// With few heads the work is reading rows, so every row is decoded once, sixteen keys at a time,
// and kept in L1 for Q.K and P.V: the columns of a key are read as they lie, and the pairs of keys
// that P.V wants are made by interleaving two rows. The softmax is online: the accumulators are
// rescaled when a group of keys has a larger score than all before.
#ifndef SFA_ONNX_KERNELS_CORE_AVX512_BF16_NARROW_H_
#define SFA_ONNX_KERNELS_CORE_AVX512_BF16_NARROW_H_

#include "avx512_bf16_plan.h"

namespace sfa {
namespace {

constexpr int kNarrowHeads = 4;
constexpr int kGroup = 16;  // keys decoded together: one per lane of the softmax

// Query rows in the order of decoded keys: [head][pass][nope / 2] then the rope, padded to vectors.
void pack_query_narrow(const Plan& p, const void* query, const void* query_rope) {
  const int64_t width = p.packed ? p.g.nope + p.g.rope : p.g.nope;
  for (int h = 0; h < p.g.heads; ++h) {
    const uint8_t* nope = (const uint8_t*)query + 2 * h * width;
    uint32_t* q = p.q + (size_t)h * p.narrow_q;
    for (int pass = 0; pass < p.passes; ++pass) {
      for (int d = 0; d < p.g.nope; d += 64, q += 32) {
        __m512i a = load_part(p, nope + 2 * d, 32, pass);
        __m512i b = load_part(p, nope + 2 * d + 64, 32, pass);
        split_lanes(&a, &b);
        _mm512_store_si512(q, a);
        _mm512_store_si512(q + 16, b);
      }
    }
    const uint8_t* rope =
        p.packed ? nope + 2 * p.g.nope : (const uint8_t*)query_rope + 2 * (size_t)h * p.g.rope;
    memset(q, 0, 4 * (size_t)p.narrow_rope);
    const int third = (p.g.rope + 1) / 2;
    for (int part = 0; part < (p.passes == 2 ? 3 : 1); ++part) {
      for (int w = 0; w < third; w += 16) {
        const int count = third - w < 16 ? third - w : 16;
        _mm512_mask_storeu_epi32(q + part * third + w, (__mmask16)((1u << count) - 1),
                                 load_part(p, rope + 4 * w, p.g.rope - 2 * w, part == 1));
      }
    }
  }
}

// Sums the lanes of sixteen vectors: lane i of the result is the sum of v[i].
inline __m512 sum_lanes(__m512 v[16]) {
  for (int i = 0; i < 8; ++i) {
    const __m512 a = v[2 * i], b = v[2 * i + 1];
    v[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)v[2 * i], b = (__m512d)v[2 * i + 1];
    v[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
  // Every 128-bit lane of v[i] now holds partial sums of keys 4i..4i+3.
  for (int i = 0; i < 2; ++i) {
    const __m512 a = v[2 * i], b = v[2 * i + 1];
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88),
                       _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}

// Decodes one key into `out` and adds its H raw scores, lane by lane, to sums. The lines of row
// `soon` are asked for on the way, evenly and into L2: a run of prefetches into L1 would take its
// miss buffers away from the work at hand. The other lines are asked for by value_blocks.
template <int H>
inline void score_key(const Plan& p, const Converter& convert, const uint8_t* nope,
                      const uint8_t* rope, const uint8_t* soon, uint32_t* out, __m512 sums[H]) {
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) sums[h] = _mm512_setzero_ps();
  const uint8_t* scales = rope + p.rope_bytes;
  for (int d = 0; d < p.g.nope; scales += 4) {
    __m512 even[H], odd[H];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) even[h] = odd[h] = _mm512_setzero_ps();
    float scale = 1.0f;
    if (p.packed) memcpy(&scale, scales, 4);
    const Scaler scaler(scale);
    for (const int end = d + p.g.tile; d < end; d += 64) {
      __m512i a, b;
      if (p.packed) {
        if ((d & 64) == 0) _mm_prefetch((const char*)soon + d + 64, _MM_HINT_T1);
        if (p.g.rounded) {
          round_row(scaler, _mm512_loadu_si512(nope + d), &a, &b);
        } else {
          convert.to_bf16(_mm512_loadu_si512(nope + d), &a, &b);
        }
      } else {
        _mm_prefetch((const char*)soon + 2 * d, _MM_HINT_T1);
        a = _mm512_loadu_si512(nope + 2 * d);
        b = _mm512_loadu_si512(nope + 2 * d + 64);
        split_lanes(&a, &b);
      }
      _mm512_store_si512(out + d / 2, a);
      _mm512_store_si512(out + d / 2 + 16, b);
      for (int pass = 0; pass < p.passes; ++pass) {
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
          const uint32_t* q = p.q + (size_t)h * p.narrow_q + pass * (p.g.nope / 2) + d / 2;
          even[h] = _mm512_dpbf16_ps(even[h], (__m512bh)a, (__m512bh)_mm512_load_si512(q));
          odd[h] = _mm512_dpbf16_ps(odd[h], (__m512bh)b, (__m512bh)_mm512_load_si512(q + 16));
        }
      }
    }
    const __m512 factor = _mm512_set1_ps(p.scaled ? scale : 1.0f);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      sums[h] = _mm512_fmadd_ps(_mm512_add_ps(even[h], odd[h]), factor, sums[h]);
    }
  }
  if (p.packed) _mm_prefetch((const char*)soon + p.g.nope + 64, _MM_HINT_T1);
  const uint32_t* q = p.q + (size_t)p.passes * (p.g.nope / 2);
  alignas(64) uint32_t parts[kRopeRoom];
  if (p.passes == 2) rope_pairs(p, rope, parts);
  for (int w = 0; w < p.narrow_rope; w += 16) {
    const __m512i k =
        p.passes == 1 ? load_bf16(rope + 4 * w, p.g.rope - 2 * w) : _mm512_load_si512(parts + w);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const __m512i qh = _mm512_load_si512(q + (size_t)h * p.narrow_q + w);
      sums[h] = _mm512_dpbf16_ps(sums[h], (__m512bh)k, (__m512bh)qh);
    }
  }
}

// The rows that will be decoded `ahead` keys from now: of this chunk, else of the next.
struct Coming {
  const Rows* rows;
  int first, count;

  Coming(const Rows& now, const Rows* next, int at) : rows(&now), first(at) {
    if (at >= now.n) {
      rows = next;
      first = at - round_up(now.n, kGroup);
    }
    count = rows ? rows->n - first : 0;
    if (count > kGroup) count = kGroup;
  }

  // One line of either end of every row, in one burst: each may cost a page walk, and walks overlap
  // only when they are asked for together.
  void ask_pages(int row_bytes) const {
    for (int k = 0; k < count; ++k) {
      const char* at = (const char*)rows->nope[first + k];
      _mm_prefetch(at, _MM_HINT_T0);
      _mm_prefetch(at + row_bytes - 1, _MM_HINT_T0);
    }
  }

  // Row k, or `instead` when there is none.
  const uint8_t* row(int k, const uint8_t* instead) const {
    return k < count ? rows->nope[first + k] : instead;
  }
  void ask_all(const Plan& p, int k) const {
    for (int b = 64; b < p.row_bytes; b += 64) {
      _mm_prefetch((const char*)rows->nope[first + k] + b, _MM_HINT_T1);
    }
    ask_rope(p, k);
  }
  void ask_rope(const Plan& p, int k) const {
    if (p.packed || k >= count) return;
    for (size_t b = 0; b < p.rope_bytes; b += 64) {
      _mm_prefetch((const char*)rows->rope[first + k] + b, _MM_HINT_T1);
    }
  }
};

// Raw scores of sixteen keys, lanes = keys, per head.
template <int H>
void score_group(const Plan& p, const Rows& rows, int first, const Rows* next,
                 const uint8_t* soon[kGroup], __m512 s[H]) {
  const Converter convert;
  __m512 sums[H][kGroup];
  const Coming coming(rows, next, first + kGroup);
  Coming(rows, next, first + 2 * kGroup).ask_pages(p.row_bytes);
  for (int k = 0; k < kGroup; ++k) {
    coming.ask_rope(p, k);
    __m512 one[H];
    const uint8_t* nope = rows.nope[first + k];
    soon[k] = coming.row(k, nope);
    score_key<H>(p, convert, nope, rows.rope[first + k], soon[k],
                 p.tile + (size_t)k * (p.g.nope / 2), one);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) sums[h][k] = one[h];
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) s[h] = sum_lanes(sums[h]);
}

// Softmax of one head while the keys pass by: sums per lane, relative to m.
struct Online {
  __m512 m, l;
};

// Probabilities of a group from its scaled scores; returns the factor for what is accumulated.
inline float advance(__m512 s, bool fresh, Online* head, __m512* prob) {
  float factor = 1.0f;
  if (fresh) {
    head->m = _mm512_set1_ps(_mm512_reduce_max_ps(s));
    head->l = _mm512_setzero_ps();
  } else if (_mm512_cmp_ps_mask(s, head->m, _CMP_GT_OQ)) {
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(s));
    const __m512 down = exp2_fast(_mm512_sub_ps(head->m, top));
    head->l = _mm512_mul_ps(head->l, down);
    head->m = top;
    factor = _mm512_cvtss_f32(down);
  }
  *prob = exp2_fast(_mm512_sub_ps(s, head->m));
  head->l = _mm512_add_ps(head->l, *prob);
  return factor;
}

// o[h] = o[h] * factor[h] + unit . weights . values for the sixteen decoded keys, 64 * B columns at
// a time.
template <int H, int B>
void value_blocks(const Plan& p, int d, bool fresh, const float* factor, const uint8_t* const* soon,
                  Partial* out) {
  const int stride = p.g.nope / 2, t = p.scaled ? d / p.g.tile : 0;
  const uint32_t* w = p.weights + (size_t)t * H * (kGroup / 2);
  const float *unit = p.unit + t * H, *per_unit = p.per_unit + t * H;
  __m512 acc[H][4 * B];
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
    const float* o = out->o + (size_t)h * p.g.o_stride + d;
    const __m512 f = _mm512_set1_ps(factor[h] * per_unit[h]);
#pragma GCC unroll 8
    for (int v = 0; v < 4 * B; ++v) {
      acc[h][v] = fresh ? _mm512_setzero_ps() : _mm512_mul_ps(_mm512_load_ps(o + 16 * v), f);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kGroup / 2; ++i) {
    if (p.packed) {
      if ((d & 64) == 0) {
        _mm_prefetch((const char*)soon[2 * i] + d + 128, _MM_HINT_T1);
        _mm_prefetch((const char*)soon[2 * i + 1] + d + 128, _MM_HINT_T1);
      }
    } else {
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) {
        _mm_prefetch((const char*)soon[2 * i] + 2 * d + 128 * b + 64, _MM_HINT_T1);
        _mm_prefetch((const char*)soon[2 * i + 1] + 2 * d + 128 * b + 64, _MM_HINT_T1);
      }
    }
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) {
      const uint32_t* k0 = p.tile + (size_t)(2 * i) * stride + d / 2 + 32 * b;
      const uint32_t* k1 = k0 + stride;
      const __m512i a0 = _mm512_load_si512(k0), b0 = _mm512_load_si512(k0 + 16);
      const __m512i a1 = _mm512_load_si512(k1), b1 = _mm512_load_si512(k1 + 16);
      const __m512i v[4] = {_mm512_unpacklo_epi16(a0, a1), _mm512_unpackhi_epi16(a0, a1),
                            _mm512_unpacklo_epi16(b0, b1), _mm512_unpackhi_epi16(b0, b1)};
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        const __m512bh weight = (__m512bh)_mm512_set1_epi32((int)w[h * (kGroup / 2) + i]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          acc[h][4 * b + j] = _mm512_dpbf16_ps(acc[h][4 * b + j], weight, (__m512bh)v[j]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
    float* o = out->o + (size_t)h * p.g.o_stride + d;
#pragma GCC unroll 8
    for (int v = 0; v < 4 * B; ++v) {
      _mm512_store_ps(o + 16 * v, _mm512_mul_ps(acc[h][v], _mm512_set1_ps(unit[h])));
    }
  }
}

template <int H>
void value_group(const Plan& p, bool fresh, const float* factor, const uint8_t* const* soon,
                 Partial* out) {
  constexpr int kBlocks = H <= 2 ? 2 : 1;
  const int step = p.g.tile % 128 == 0 ? 64 * kBlocks : 64;
  for (int d = 0; d < p.g.nope; d += step) {
    if (step == 64) {
      value_blocks<H, 1>(p, d, fresh, factor, soon, out);
    } else {
      value_blocks<H, kBlocks>(p, d, fresh, factor, soon, out);
    }
  }
}

// Scales t..t+3 of sixteen keys: out[i] lane k is scale t + i of key k. `tiles` of them exist.
inline void group_scales(const Plan& p, const Rows& rows, int first, int t, int tiles,
                         __m512 out[4]) {
  const __mmask8 mask = (__mmask8)(tiles - t >= 4 ? 0xf : (1u << (tiles - t)) - 1);
  const size_t at = p.rope_bytes + 4 * (size_t)t;
  __m512 v[4];  // lane group L of v[i]: the scales of key 4L + i
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto key = [&](int lane) __attribute__((always_inline)) {
      return _mm_maskz_loadu_ps(mask, rows.rope[first + 4 * lane + i] + at);
    };
    v[i] = _mm512_castps128_ps512(key(0));
    v[i] = _mm512_insertf32x4(v[i], key(1), 1);
    v[i] = _mm512_insertf32x4(v[i], key(2), 2);
    v[i] = _mm512_insertf32x4(v[i], key(3), 3);
  }
  const __m512d a = (__m512d)_mm512_unpacklo_ps(v[0], v[1]);
  const __m512d b = (__m512d)_mm512_unpackhi_ps(v[0], v[1]);
  const __m512d c = (__m512d)_mm512_unpacklo_ps(v[2], v[3]);
  const __m512d d = (__m512d)_mm512_unpackhi_ps(v[2], v[3]);
  out[0] = (__m512)_mm512_unpacklo_pd(a, c);
  out[1] = (__m512)_mm512_unpackhi_pd(a, c);
  out[2] = (__m512)_mm512_unpacklo_pd(b, d);
  out[3] = (__m512)_mm512_unpackhi_pd(b, d);
}

// bf16 weights [tile][head][pair] of a group: probabilities times scales, in multiples of
// unit [tile][head]. `best` is the group's key of the largest score so far, if it has it.
template <int H>
void group_weights(const Plan& p, const Rows& rows, int first, const __m512 prob[H],
                   const int best[H]) {
  const int tiles = p.scaled ? p.g.nope / p.g.tile : 1;
  for (int t = 0; t < tiles; t += 4) {
    const int count = tiles - t < 4 ? tiles - t : 4;
    __m512 scale[4] = {_mm512_set1_ps(1.0f)};
    if (p.scaled) group_scales(p, rows, first, t, tiles, scale);
    for (int h = 0; h < H; ++h) {
      alignas(16) float unit[4] = {1.0f}, per_unit[4] = {1.0f};
      if (p.scaled) {
        const uint8_t* scales = rows.rope[first + best[h]] + p.rope_bytes + 4 * (size_t)t;
        const __m128 own = _mm_maskz_loadu_ps((__mmask8)((1u << count) - 1), scales);
        const __m128 whole = _mm512_castps512_ps128(mantissa(_mm512_castps128_ps512(own)));
        _mm_store_ps(unit, whole);
        _mm_store_ps(per_unit, _mm_div_ps(_mm_set1_ps(1.0f), whole));
      }
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) {
        p.unit[(t + i) * H + h] = unit[i];
        p.per_unit[(t + i) * H + h] = per_unit[i];
        const __m512 factor = _mm512_mul_ps(scale[i], _mm512_set1_ps(per_unit[i]));
        const __m256i pairs = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(prob[h], factor));
        _mm256_store_si256((__m256i*)(p.weights + (size_t)((t + i) * H + h) * (kGroup / 2)), pairs);
      }
    }
  }
}

template <int H>
void attend_narrow(const Plan& p, const Rows& rows, const Rows* next, bool warm, Partial* out) {
  if (!warm) {
    const Coming here(rows, nullptr, 0);
    here.ask_pages(p.row_bytes);
    Coming(rows, nullptr, kGroup).ask_pages(p.row_bytes);
    for (int k = 0; k < here.count; ++k) here.ask_all(p, k);
  }
  const __m512 log2 = _mm512_set1_ps(p.g.scale_log2), nothing = _mm512_set1_ps(-__builtin_inff());
  Online online[H];
  for (int first = 0; first < rows.n; first += kGroup) {
    __m512 s[H], prob[H];
    float factor[H];
    int best[H];
    const uint8_t* soon[kGroup];
    score_group<H>(p, rows, first, next, soon, s);
    const int keys = rows.n - first < kGroup ? rows.n - first : kGroup;
    const __mmask16 live = (__mmask16)((1u << keys) - 1);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const __m512 scaled = _mm512_mask_mul_ps(nothing, live, s[h], log2);
      factor[h] = advance(scaled, first == 0, &online[h], &prob[h]);
      best[h] = __builtin_ctz(_mm512_cmp_ps_mask(scaled, online[h].m, _CMP_EQ_OQ) | 1u << 15) & 15;
    }
    group_weights<H>(p, rows, first, prob, best);
    value_group<H>(p, first == 0, factor, soon, out);
  }
  for (int h = 0; h < H; ++h) {
    out->m[h] = _mm512_cvtss_f32(online[h].m);
    out->l[h] = _mm512_reduce_add_ps(online[h].l);
  }
}

void attend_few(const Plan& p, const Rows& rows, const Rows* next, bool warm, Partial* out) {
  switch (p.g.heads) {
    case 1:
      return attend_narrow<1>(p, rows, next, warm, out);
    case 2:
      return attend_narrow<2>(p, rows, next, warm, out);
    case 3:
      return attend_narrow<3>(p, rows, next, warm, out);
    default:
      return attend_narrow<4>(p, rows, next, warm, out);
  }
}

}  // namespace
}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_AVX512_BF16_NARROW_H_
