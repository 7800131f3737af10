// AVX512-BF16 + VBMI (Zen 4 and newer, Sapphire Rapids and newer): 16-bit queries over int8 or
// bf16 rows. Everything else falls back to the AVX-512F path.
#include <immintrin.h>

#define SFA_LANES 16
#include "half.h"
#include "vec.h"

namespace sfa {
namespace {
namespace simd {

inline void store_as(void* p, int dtype, vf v) {
  const __m256i half = dtype == SFA_CORE_F16 ? _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)
                                             : (__m256i)_mm512_cvtneps_pbh((__m512)v);
  _mm256_storeu_si256((__m256i*)p, half);
}

}  // namespace simd
}  // namespace
}  // namespace sfa

#include "avx512_bf16_half.h"
#include "avx512_bf16_narrow.h"
#include "avx512_bf16_wide.h"
#include "partial.h"

namespace sfa {
namespace {

bool bf16_supports(const Geom& g) {
  const bool types = g.query_dtype != SFA_CORE_F32 &&
                     (g.cache_dtype == SFA_CORE_I8 ||
                      (g.cache_dtype == SFA_CORE_BF16 && g.query_dtype == SFA_CORE_BF16));
  // A latent rounded to float16 is no bf16: such calls take the fp32 skeleton.
  if (g.rounded && g.query_dtype != SFA_CORE_BF16) return false;
  return types && g.tile % 64 == 0 && g.nope <= 4096 && g.rope <= kMaxRope;
}

size_t bf16_scratch_bytes(const Geom& g) { return Plan(g, nowhere()).bytes; }

void bf16_load_query(const Geom& g, const void* query, const void* query_rope, void* scratch) {
  const Plan p(g, scratch);
  const auto pack = g.heads <= kNarrowHeads ? pack_query_narrow
                    : g.heads <= kHalfHeads ? pack_query_half
                                            : pack_query;
  pack(p, query, query_rope);
}

// All at once, or in halves whose values are shared.
void attend_wide(Plan& p, const Rows& rows, Prefetch* prefetch, Partial* out) {
  const int most = p.shared ? kSharedKeys : kChunk;
  for (int begin = 0; begin < rows.n; begin += most) {
    const int n = rows.n - begin < most ? rows.n - begin : most;
    Partial* to = begin == 0 ? out : &p.other;
    scores(p, rows, begin, begin + n, prefetch);
    softmax(p, n, to);
    if (begin + n == rows.n) {
      prefetch->values();
    } else {
      prefetch->finish();
    }
    values(p, rows, n, to, prefetch);
    if (begin > 0) merge_partials(p.g, out, p.other);
  }
}

void bf16_attend(const Geom& g, const Rows& rows, const Rows* next, bool warm, void* scratch,
                 Partial* out) {
  Plan p(g, scratch);
  if (g.heads <= kNarrowHeads) return attend_few(p, rows, next, warm, out);
  Prefetch prefetch(p, rows, next, warm);
  if (g.heads <= kHalfHeads) {
    scores_half(p, rows, &prefetch);
    softmax_half(p, rows.n, out);
    values_half(p, rows, out, &prefetch);
  } else {
    attend_wide(p, rows, &prefetch, out);
  }
  prefetch.finish();
}

void bf16_store(const Geom& g, const Partial& acc, void* out) {
  for (int h = 0; h < g.heads; ++h) {
    const float* o = acc.o + (size_t)h * g.o_stride;
    char* row = (char*)out + (size_t)h * g.nope * 2;
    const __m512 inverse = _mm512_set1_ps(1.0f / acc.l[h]);
    for (int d = 0; d < g.nope; d += 64) {
      __m512 v[4];
      for (int i = 0; i < 4; ++i) v[i] = _mm512_mul_ps(_mm512_load_ps(o + d + 16 * i), inverse);
      natural_order(v);
      for (int i = 0; i < 4; ++i) simd::store_as(row + 2 * (d + 16 * i), g.query_dtype, (vf)v[i]);
    }
  }
}

}  // namespace

const Path* avx512_bf16_path() {
  static constexpr Path path = {SFA_CORE_ISA_AVX512_BF16, "avx512_bf16",   bf16_supports,
                                bf16_scratch_bytes,       bf16_load_query, bf16_attend,
                                merge_partials,           bf16_store};
  return &path;
}

}  // namespace sfa
