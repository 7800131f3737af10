// The operator's definition in double precision, row by row, without any cleverness.
#ifndef SFA_ONNX_KERNELS_TESTS_CORE_REFERENCE_H_
#define SFA_ONNX_KERNELS_TESTS_CORE_REFERENCE_H_

#include <vector>

#include "core_case.h"

namespace sfa_test {

// Cache rows that query row `token` attends to, in order; a legal call is assumed.
inline std::vector<int64_t> SelectedRows(const Case& c, int64_t token) {
  const sfa_core_params& p = c.p;
  const bool tnd = p.layout_query == SFA_CORE_TND;
  int64_t b = 0, s = token, actual_q = 0;
  if (tnd) {
    while (b < p.batch && token >= c.lengths_q[b]) ++b;
    if (b == p.batch) return {};
    const int64_t first = b ? c.lengths_q[b - 1] : 0;
    actual_q = c.lengths_q[b] - first;
    s = token - first;
  } else {
    b = token / p.query_s;
    s = token % p.query_s;
    actual_q = c.lengths_q[b];
    if (s >= actual_q) return {};
  }
  const bool packed_kv = p.layout_kv == SFA_CORE_TND;
  const int64_t start = packed_kv && b ? c.lengths_kv[b - 1] : 0;
  const int64_t length = c.lengths_kv[b] - start;
  const int64_t threshold = p.sparse_mode == 0 ? length : length - actual_q + s + 1;
  std::vector<int64_t> rows;
  for (int64_t j = 0; j < p.sparse_count && j * p.sparse_block_size < threshold; ++j) {
    const int64_t entry = c.indices[token * p.sparse_count + j];
    if (entry < 0) continue;
    for (int64_t t = entry * p.sparse_block_size;
         t < std::min((entry + 1) * p.sparse_block_size, threshold); ++t) {
      if (p.layout_kv == SFA_CORE_PA_BSND) {
        const int64_t page = c.table[b * p.block_table_cols + t / p.block_size];
        rows.push_back(page * p.block_size + t % p.block_size);
      } else {
        rows.push_back(packed_kv ? start + t : b * p.kv_s + t);
      }
    }
  }
  return rows;
}

// SFA_CORE_ROUNDING_NPU of one value: bfloat16 ties to even, float16 ties away from zero.
inline double RoundAsNpu(float x, int dtype) {
  if (dtype == SFA_CORE_F32 || x == 0) return x;
  if (dtype == SFA_CORE_BF16) return FloatOf(static_cast<uint32_t>(ToBFloat16(x)) << 16);
  const int exponent = std::max(ilogb(x), -14) - 10;
  return copysign(ldexp(floor(ldexp(fabs(x), -exponent) + 0.5), exponent), x);
}

// [nope | rope] of one cache row.
inline std::vector<double> KeyOf(const Case& c, int64_t row) {
  const sfa_core_params& p = c.p;
  std::vector<double> key(p.nope_dim + p.rope_dim);
  const int item = ItemSize(p.query_dtype);
  if (p.cache_dtype != SFA_CORE_I8) {
    for (int d = 0; d < p.nope_dim; ++d) {
      key[d] = Load(c.key.data() + (row * p.nope_dim + d) * item, p.query_dtype);
    }
    for (int d = 0; d < p.rope_dim; ++d) {
      key[p.nope_dim + d] = Load(c.key_rope.data() + (row * p.rope_dim + d) * item, p.query_dtype);
    }
    return key;
  }
  const char* at =
      c.key.data() + row * sfa_core_row_bytes(p.nope_dim, p.rope_dim, p.tile_size, p.query_dtype);
  const char* scales = at + p.nope_dim + p.rope_dim * item;
  for (int d = 0; d < p.nope_dim; ++d) {
    const double scale = Load(scales + 4 * (d / p.tile_size), SFA_CORE_F32);
    key[d] = static_cast<int8_t>(at[d]) * scale;
    if (p.rounding == SFA_CORE_ROUNDING_NPU) {
      const float product = static_cast<int8_t>(at[d]) * static_cast<float>(scale);
      key[d] = RoundAsNpu(product, p.query_dtype);
    }
  }
  for (int d = 0; d < p.rope_dim; ++d) {
    key[p.nope_dim + d] = Load(at + p.nope_dim + d * item, p.query_dtype);
  }
  return key;
}

inline std::vector<double> QueryOf(const Case& c, int64_t line) {
  const sfa_core_params& p = c.p;
  const int item = ItemSize(p.query_dtype);
  const bool packed = p.cache_dtype == SFA_CORE_I8;
  const int width = packed ? p.nope_dim + p.rope_dim : p.nope_dim;
  std::vector<double> query(p.nope_dim + p.rope_dim);
  for (int d = 0; d < width; ++d) {
    query[d] = Load(c.query.data() + (line * width + d) * item, p.query_dtype);
  }
  for (int d = width; d < p.nope_dim + p.rope_dim; ++d) {
    query[d] = Load(c.query_rope.data() + (line * p.rope_dim + d - width) * item, p.query_dtype);
  }
  return query;
}

// Whether the mask of a row would let a key through.
inline bool Visible(const Case& c, int64_t token) {
  const sfa_core_params& p = c.p;
  const bool tnd = p.layout_query == SFA_CORE_TND;
  int64_t b = tnd ? 0 : token / p.query_s, first = 0;
  if (tnd) {
    while (b < p.batch && token >= c.lengths_q[b]) first = c.lengths_q[b++];
    if (b == p.batch) return false;
  } else {
    first = b * p.query_s;
  }
  const int64_t actual_q = tnd ? c.lengths_q[b] - first : c.lengths_q[b], s = token - first;
  if (s >= actual_q) return false;
  const int64_t before = p.layout_kv == SFA_CORE_TND && b ? c.lengths_kv[b - 1] : 0;
  return p.sparse_mode == 0 || c.lengths_kv[b] - before - actual_q + s + 1 > 0;
}

struct Answer {
  std::vector<double> out;       // [query_t * heads, nope]
  std::vector<double> max, sum;  // [query_t * heads]
  std::vector<double> largest;   // weight of a row, normalised
};

inline Answer Reference(const Case& c) {
  const sfa_core_params& p = c.p;
  const size_t lines = p.query_t * p.num_heads;
  Answer answer = {std::vector<double>(lines * p.nope_dim), std::vector<double>(lines),
                   std::vector<double>(lines), std::vector<double>(lines)};
  std::vector<double>& out = answer.out;
  for (int64_t token = 0; token < p.query_t; ++token) {
    std::vector<std::vector<double>> keys;
    for (int64_t row : SelectedRows(c, token)) keys.push_back(KeyOf(c, row));
    for (int64_t line = token * p.num_heads; line < (token + 1) * p.num_heads; ++line) {
      const std::vector<double> query = QueryOf(c, line);
      std::vector<double> weight;
      double sink = -INFINITY, sum = 0;
      if (!c.sinks.empty()) sink = c.sinks[line % p.num_heads];
      if (keys.empty()) {
        const bool alone = !c.sinks.empty() && Visible(c, token);
        answer.max[line] = alone ? sink : 0;
        answer.sum[line] = alone;
        continue;
      }
      double top = sink;
      for (const auto& key : keys) {
        double score = 0;
        for (size_t d = 0; d < key.size(); ++d) score += query[d] * key[d];
        weight.push_back(score * p.scale_value);
        top = std::max(top, weight.back());
      }
      for (double& w : weight) sum += w = exp(w - top);
      answer.largest[line] = *std::max_element(weight.begin(), weight.end());
      sum += exp(sink - top);
      answer.largest[line] /= sum;
      answer.max[line] = top;
      answer.sum[line] = sum;
      for (size_t k = 0; k < keys.size(); ++k) {
        for (int d = 0; d < p.nope_dim; ++d) {
          out[line * p.nope_dim + d] += weight[k] / sum * keys[k][d];
        }
      }
    }
  }
  return answer;
}

}  // namespace sfa_test

#endif  // SFA_ONNX_KERNELS_TESTS_CORE_REFERENCE_H_
