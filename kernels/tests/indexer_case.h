// Random indexer calls on exactly sized memory, and their scores in double precision.
#ifndef SFA_ONNX_KERNELS_TESTS_INDEXER_CASE_H_
#define SFA_ONNX_KERNELS_TESTS_INDEXER_CASE_H_

#include "core_case.h"

namespace sfa_test {

struct IndexerCase {
  sfa_core_indexer_params p = {};
  Bytes query, key, weights;
  // 16-bit and 32-bit tensors: the ABI wants aligned pointers, still of exact size.
  std::vector<uint16_t> query_scale, key_scale;
  std::vector<int32_t> table, lengths_q, lengths_k, indices;
  std::vector<char> values;

  void Bind() {
    p.query = query.data();
    p.key = key.data();
    p.weights = weights.data();
    p.query_scale = query_scale.data();
    p.key_scale = key_scale.data();
    p.block_table = table.empty() ? nullptr : table.data();
    p.actual_seq_lengths_query = lengths_q.empty() ? nullptr : lengths_q.data();
    p.actual_seq_lengths_key = lengths_k.empty() ? nullptr : lengths_k.data();
    p.sparse_indices = indices.data();
    p.sparse_values = values.data();
  }
  int value_dtype() const { return p.dtype == SFA_CORE_I8 ? SFA_CORE_F32 : p.dtype; }
};

struct IndexerSizes {
  int heads, width, count, batch, s1, s2, dtype, layout_query, layout_key, mode, rounding;
  bool whole;  // small whole numbers: all sums are exact, and there are many ties
};

inline IndexerSizes RandomIndexerSizes(Random& r) {
  IndexerSizes s;
  s.heads = Uniform(r, 0, 3) ? Uniform(r, 1, 20) : Uniform(r, 21, 140);
  s.width = Uniform(r, 0, 2) ? Uniform(r, 1, 40) : 16 * Uniform(r, 1, 9);
  s.count = Uniform(r, 0, 3) ? Uniform(r, 1, 70) : Uniform(r, 71, 1500);
  s.batch = Uniform(r, 1, 3);
  s.s1 = Uniform(r, 0, 3) ? Uniform(r, 1, 3) : Uniform(r, 16, 20);
  s.s2 = Uniform(r, 0, 4) ? Uniform(r, 1, 200) : Uniform(r, 4000, 9000);
  if (s.s2 > 1000) s.heads = std::min(s.heads, 12), s.width = std::min(s.width, 24), s.s1 = 2;
  s.dtype = Uniform(r, 0, 3);
  s.layout_query = Uniform(r, 0, 1);
  s.layout_key = Uniform(r, 0, 1) ? SFA_CORE_PA_BSND : s.layout_query;
  s.mode = Uniform(r, 0, 1) * 3;
  s.whole = Uniform(r, 0, 1);
  s.rounding = s.dtype == SFA_CORE_I8 && !s.whole ? Uniform(r, 0, 1) : SFA_CORE_ROUNDING_EXACT;
  return s;
}

inline Bytes RandomNumbers(Random& r, int64_t count, int dtype, bool whole) {
  if (!whole && dtype != SFA_CORE_I8) return RandomFloats(r, count, dtype, 1);
  Bytes bytes(static_cast<size_t>(count) * ItemSize(dtype));
  for (int64_t i = 0; i < count; ++i) {
    char* at = bytes.data() + i * ItemSize(dtype);
    const int x = whole ? Uniform(r, -2, 2) : Uniform(r, -128, 127);
    if (dtype == SFA_CORE_I8) {
      *at = static_cast<char>(x);
    } else {
      Store(at, dtype, static_cast<float>(x));
    }
  }
  return bytes;
}

inline std::vector<uint16_t> RandomScales(Random& r, int64_t count, bool whole) {
  std::vector<uint16_t> scales(count);
  for (auto& s : scales) s = ToHalf(whole ? 1 << Uniform(r, 0, 2) : Uniform(r, 1, 99) / 100.0f);
  return scales;
}

inline void FillLengths(Random& r, const IndexerSizes& s, IndexerCase* c) {
  int total_q = 0, total_k = 0;
  for (int b = 0; b < s.batch; ++b) {
    const int q = Uniform(r, 0, s.s1), k = Uniform(r, 0, 3) ? Uniform(r, 0, s.s2) : s.s2;
    total_q += q;
    total_k += k;
    c->lengths_q.push_back(s.layout_query == SFA_CORE_TND ? total_q : q);
    c->lengths_k.push_back(s.layout_key == SFA_CORE_TND ? total_k : k);
  }
  if (s.layout_key != SFA_CORE_PA_BSND) return;
  for (int64_t i = 0; i < s.batch * c->p.block_table_cols; ++i) {
    c->table.push_back(Uniform(r, 0, static_cast<int>(c->p.block_num) - 1));
  }
}

inline IndexerCase MakeIndexerCase(Random& r, const IndexerSizes& s) {
  IndexerCase c;
  sfa_core_indexer_params& p = c.p;
  p.struct_size = sizeof p;
  p.dtype = s.dtype;
  p.weights_dtype = s.dtype == SFA_CORE_I8 ? SFA_CORE_F16 : Uniform(r, 0, 2);
  p.layout_query = s.layout_query;
  p.layout_key = s.layout_key;
  p.sparse_mode = s.mode;
  p.rounding = s.rounding;
  p.num_heads = s.heads;
  p.head_dim = s.width;
  p.sparse_count = s.count;
  p.batch = s.batch;
  p.query_s = s.layout_query == SFA_CORE_BSND ? s.s1 : 0;
  p.query_t = static_cast<int64_t>(s.batch) * s.s1;
  int64_t rows = static_cast<int64_t>(s.batch) * s.s2;
  if (s.layout_key == SFA_CORE_PA_BSND) {
    p.block_size = Uniform(r, 1, 40);
    p.block_table_cols = (s.s2 + p.block_size - 1) / p.block_size;
    p.block_num = Uniform(r, 1, 12);
    rows = p.block_num * p.block_size;
  } else {
    p.key_s = s.layout_key == SFA_CORE_TND ? rows : s.s2;
  }
  FillLengths(r, s, &c);
  const int64_t heads = p.query_t * s.heads, out = p.query_t * s.count;
  c.query = RandomNumbers(r, heads * s.width, s.dtype, s.whole);
  c.key = RandomNumbers(r, rows * s.width, s.dtype, s.whole);
  c.weights = RandomNumbers(r, heads, p.weights_dtype, s.whole);
  if (s.dtype == SFA_CORE_I8) {
    c.query_scale = RandomScales(r, heads, s.whole);
    c.key_scale = RandomScales(r, rows, s.whole);
  }
  c.indices.assign(out, 12345);
  c.values.assign(out * ItemSize(c.value_dtype()), 0);
  c.Bind();
  return c;
}

inline double Number(const char* base, int64_t i, int dtype) {
  return dtype == SFA_CORE_I8 ? static_cast<int8_t>(base[i])
                              : Load(base + i * ItemSize(dtype), dtype);
}

inline double RoundHalf(double x) { return FromHalf(ToHalf(static_cast<float>(x))); }

// Cache row of one key of one batch, or of its first key's row in contiguous layouts.
inline int64_t KeyRow(const IndexerCase& c, int64_t batch, int64_t token) {
  const sfa_core_indexer_params& p = c.p;
  if (p.layout_key == SFA_CORE_PA_BSND) {
    const int64_t page = c.table[batch * p.block_table_cols + token / p.block_size];
    return page * p.block_size + token % p.block_size;
  }
  const int64_t first = p.layout_key == SFA_CORE_BSND ? batch * p.key_s
                        : batch > 0                   ? c.lengths_k[batch - 1]
                                                      : 0;
  return first + token;
}

inline double ReferenceScore(const IndexerCase& c, int64_t row, int64_t key) {
  const sfa_core_indexer_params& p = c.p;
  const bool int8 = p.dtype == SFA_CORE_I8, half = int8 && p.rounding == SFA_CORE_ROUNDING_NPU;
  double score = 0;
  for (int h = 0; h < p.num_heads; ++h) {
    const int64_t head = row * p.num_heads + h;
    double dot = 0, weight = Number(c.weights.data(), head, p.weights_dtype);
    for (int d = 0; d < p.head_dim; ++d) {
      dot += Number(c.query.data(), head * p.head_dim + d, p.dtype) *
             Number(c.key.data(), key * p.head_dim + d, p.dtype);
    }
    if (int8) weight *= FromHalf(c.query_scale[head]);
    dot = std::max(dot, 0.0);
    if (half) dot = RoundHalf(dot / 1024), weight = RoundHalf(weight);
    score += weight * dot;
  }
  return int8 ? score * FromHalf(c.key_scale[key]) : score;
}

// Scores of all keys that a row sees, in the order of its sequence; empty for a padding row.
inline std::vector<double> ReferenceRow(const IndexerCase& c, int64_t row) {
  const sfa_core_indexer_params& p = c.p;
  int64_t batch = 0, position = row, act_q = 0;
  if (p.layout_query == SFA_CORE_BSND) {
    batch = row / p.query_s;
    position = row % p.query_s;
    act_q = c.lengths_q[batch];
  } else {
    while (batch < p.batch && c.lengths_q[batch] <= row) ++batch;
    if (batch == p.batch) return {};
    const int64_t start = batch > 0 ? c.lengths_q[batch - 1] : 0;
    position = row - start;
    act_q = c.lengths_q[batch] - start;
  }
  if (position >= act_q) return {};
  int64_t keys = c.lengths_k[batch];
  if (p.layout_key == SFA_CORE_TND && batch > 0) keys -= c.lengths_k[batch - 1];
  if (p.sparse_mode == 3) keys += position + 1 - act_q;
  std::vector<double> scores;
  for (int64_t k = 0; k < keys; ++k) scores.push_back(ReferenceScore(c, row, KeyRow(c, batch, k)));
  return scores;
}

}  // namespace sfa_test

#endif  // SFA_ONNX_KERNELS_TESTS_INDEXER_CASE_H_
