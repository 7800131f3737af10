// What the softmax of a row leaves besides its output: sinks, and CANN's softmax_max and
// softmax_sum.
#define SFA_LANES 4
#include "internal.h"
#include "vec.h"

namespace sfa {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

float exp2_of(float x) { return exp2_fine(splat(x))[0]; }

bool is_nan(float x) { return x != x; }

void write(const sfa_core_params& p, int64_t at, float max, float sum) {
  if (!p.softmax_max) return;
  p.softmax_max[at] = max;
  p.softmax_sum[at] = sum;
}

// Largest score (log2) and sum of a head that sees keys, and what store() divides its values by.
struct Head {
  float m, l, divisor;
};

Head with_sink(float m, float l, float sink) {
  const float s = sink * kLog2E, lowest = -__builtin_inff();
  if (s == lowest) return {m, l, l};
  if (m == lowest) l = 0.0f;  // scores of -inf weigh nothing beside a sink; alone they are NaN
  const float top = s > m || is_nan(s) ? s : m;
  // A sink of +inf takes everything: the limit of ever larger ones.
  const float own = s == top ? 1.0f : exp2_of(s - top);
  const float keys = exp2_of(m - top), sum = l * keys + own;
  // The values are sums relative to m. Where they vanish beside the sink, so does the output.
  if (keys == 0.0f && !is_nan(sum)) return {top, sum, __builtin_inff()};
  return {top, sum, sum / keys};
}

}  // namespace

void finish_heads(const sfa_core_params& p, int64_t token, int first, int heads, int o_stride,
                  Partial* acc) {
  if (!p.sinks && !p.softmax_max) return;
  for (int h = 0; h < heads; ++h) {
    Head head = {acc->m[h], acc->l[h], acc->l[h]};
    if (p.sinks) head = with_sink(acc->m[h], acc->l[h], p.sinks[first + h]);
    write(p, token * p.num_heads + first + h, head.m * kLn2, head.l);
    acc->l[h] = head.divisor;
    if (head.divisor == __builtin_inff()) {
      memset(acc->o + (size_t)h * o_stride, 0, 4 * (size_t)o_stride);
    }
  }
}

void finish_empty(const sfa_core_params& p, int64_t token, int first, int heads, bool visible) {
  for (int h = first; h < first + heads; ++h) {
    const bool sink = p.sinks && visible;
    write(p, token * p.num_heads + h, sink ? p.sinks[h] : 0.0f, sink ? 1.0f : 0.0f);
  }
}

}  // namespace sfa
