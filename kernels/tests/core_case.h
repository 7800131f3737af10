// Random attention calls on exactly sized memory, and their answer in double precision.
//
// Every tensor ends where its allocation ends and begins at an odd address, so that one byte read
// too many is seen by AddressSanitizer and an aligned load by UndefinedBehaviorSanitizer.
#ifndef SFA_ONNX_KERNELS_TESTS_CORE_CASE_H_
#define SFA_ONNX_KERNELS_TESTS_CORE_CASE_H_

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "sfa_core.h"

namespace sfa_test {

using Random = std::mt19937_64;

inline int Uniform(Random& r, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(r);
}

// Memory of exactly `bytes` bytes behind an odd start.
class Bytes {
 public:
  explicit Bytes(size_t bytes = 0)
      : size_(bytes), raw_(static_cast<char*>(malloc(bytes + 1)), free) {
    memset(raw_.get(), 0, bytes + 1);
  }
  char* data() const { return raw_.get() + 1; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  std::shared_ptr<char> raw_;
};

inline int ItemSize(int dtype) { return dtype == SFA_CORE_F32 ? 4 : dtype == SFA_CORE_I8 ? 1 : 2; }

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float FloatOf(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// IEEE half of a value that is normal and in range, rounded to nearest even.
inline uint16_t ToHalf(float x) {
  const uint32_t bits = BitsOf(x), sign = bits >> 16 & 0x8000;
  if (fabsf(x) < 6.2e-5f) return static_cast<uint16_t>(sign);
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)));
}

inline double FromHalf(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double special = mantissa ? NAN : INFINITY;
  const double value = exponent == 31 ? special
                       : exponent     ? ldexp(1024 + mantissa, exponent - 25)
                                      : ldexp(mantissa, -24);
  return h & 0x8000 ? -value : value;
}

inline uint16_t ToBFloat16(float x) {
  const uint32_t bits = BitsOf(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void Store(char* at, int dtype, float x) {
  const uint16_t half = dtype == SFA_CORE_F16 ? ToHalf(x) : ToBFloat16(x);
  if (dtype == SFA_CORE_F32) {
    memcpy(at, &x, 4);
  } else {
    memcpy(at, &half, 2);
  }
}

inline double Load(const char* at, int dtype) {
  if (dtype == SFA_CORE_F32) {
    float x;
    memcpy(&x, at, 4);
    return x;
  }
  uint16_t half;
  memcpy(&half, at, 2);
  return dtype == SFA_CORE_F16 ? FromHalf(half) : FloatOf(static_cast<uint32_t>(half) << 16);
}

struct Case {
  sfa_core_params p = {};
  Bytes query, query_rope, key, key_rope, out;
  // int32 tensors: the ABI wants aligned int pointers, still of exact size.
  std::vector<int32_t> indices, table, lengths_q, lengths_kv;
  std::vector<float> sinks, softmax_max, softmax_sum;  // empty: not asked for
  int64_t rows = 0;                                    // of the cache

  // Points the parameters at the memory; call after changing or copying it.
  void Bind() {
    p.query = query.data();
    p.query_rope = query_rope.size() ? query_rope.data() : nullptr;
    p.key = key.data();
    p.key_rope = key_rope.size() ? key_rope.data() : nullptr;
    p.sparse_indices = indices.data();
    p.block_table = table.empty() ? nullptr : table.data();
    p.actual_seq_lengths_query = lengths_q.empty() ? nullptr : lengths_q.data();
    p.actual_seq_lengths_kv = lengths_kv.empty() ? nullptr : lengths_kv.data();
    p.out = out.data();
    p.sinks = sinks.empty() ? nullptr : sinks.data();
    p.softmax_max = softmax_max.empty() ? nullptr : softmax_max.data();
    p.softmax_sum = softmax_sum.empty() ? nullptr : softmax_sum.data();
  }
};

struct Sizes {
  int heads, nope, rope, tile, count, block_tokens, batch, s1, s2;
  int query_dtype, cache_dtype, layout_query, layout_kv, mode;
};

inline Sizes RandomSizes(Random& r) {
  Sizes s;
  const int tiles[] = {1, 3, 16, 64, 128};
  s.tile = tiles[Uniform(r, 0, 4)];
  s.nope = s.tile * Uniform(r, 1, 5);
  s.rope = Uniform(r, 0, 2) ? Uniform(r, 0, 70) : 0;
  s.heads = Uniform(r, 0, 3) ? Uniform(r, 1, 20) : Uniform(r, 21, 130);
  s.count = Uniform(r, 0, 3) ? Uniform(r, 0, 70) : Uniform(r, 500, 1100);
  s.block_tokens = Uniform(r, 0, 1) ? 1 : Uniform(r, 1, 16);
  s.batch = Uniform(r, 1, 3);
  s.s1 = Uniform(r, 1, 3);
  s.s2 = Uniform(r, 0, 3) ? Uniform(r, 1, 90) : Uniform(r, 600, 1300);
  s.query_dtype = Uniform(r, 0, 2);
  s.cache_dtype = Uniform(r, 0, 1) ? SFA_CORE_I8 : s.query_dtype;
  s.layout_query = Uniform(r, 0, 1);
  s.layout_kv = Uniform(r, 0, 1) ? SFA_CORE_PA_BSND : s.layout_query;
  s.mode = Uniform(r, 0, 1) * 3;
  return s;
}

inline Bytes RandomFloats(Random& r, int64_t count, int dtype, float scale) {
  std::normal_distribution<float> normal(0, scale);
  Bytes bytes(static_cast<size_t>(count) * ItemSize(dtype));
  for (int64_t i = 0; i < count; ++i) Store(bytes.data() + i * ItemSize(dtype), dtype, normal(r));
  return bytes;
}

inline Bytes RandomRows(Random& r, int64_t rows, const Sizes& s) {
  const int64_t width = sfa_core_row_bytes(s.nope, s.rope, s.tile, s.query_dtype);
  Bytes bytes(static_cast<size_t>(rows * width));
  std::normal_distribution<float> normal(0, 1);
  for (int64_t i = 0; i < rows; ++i) {
    char* row = bytes.data() + i * width;
    for (int d = 0; d < s.nope; ++d) row[d] = static_cast<char>(Uniform(r, -128, 127));
    char* rope = row + s.nope;
    for (int d = 0; d < s.rope; ++d) {
      Store(rope + d * ItemSize(s.query_dtype), s.query_dtype, normal(r));
    }
    char* scales = rope + s.rope * ItemSize(s.query_dtype);
    for (int t = 0; t < s.nope / s.tile; ++t) {
      Store(scales + 4 * t, SFA_CORE_F32, 0.01f * (normal(r) + (t % 2 ? 1 : -1)));
    }
  }
  return bytes;
}

// Lengths, tables and indices of a legal call.
inline void FillIntegers(Random& r, const Sizes& s, Case* c) {
  const bool paged = s.layout_kv == SFA_CORE_PA_BSND;
  int total_q = 0, total_kv = 0;
  std::vector<int> q(s.batch), kv(s.batch);
  for (int b = 0; b < s.batch; ++b) {
    q[b] = Uniform(r, 0, s.s1);
    kv[b] = Uniform(r, 0, s.s2);
    total_q += q[b];
    total_kv += kv[b];
    c->lengths_q.push_back(s.layout_query == SFA_CORE_TND ? total_q : q[b]);
    c->lengths_kv.push_back(s.layout_kv == SFA_CORE_TND ? total_kv : kv[b]);
  }
  if (paged) {
    const int64_t pages = c->p.block_num;
    for (int64_t i = 0; i < s.batch * c->p.block_table_cols; ++i) {
      c->table.push_back(pages ? Uniform(r, 0, static_cast<int>(pages) - 1) : -1);
    }
  }
  c->indices.assign(c->p.query_t * s.count, -1);
  for (int64_t t = 0; t < c->p.query_t; ++t) {
    const int valid = Uniform(r, 0, s.count), top = s.s2 / s.block_tokens + 1;
    for (int j = 0; j < valid; ++j) c->indices[t * s.count + j] = Uniform(r, 0, top);
  }
}

// Sinks that matter, that rule, and that do nothing.
inline void FillSinks(Random& r, Case* c) {
  std::normal_distribution<float> normal(0, 1);
  for (int h = 0; h < c->p.num_heads; ++h) {
    const int kind = Uniform(r, 0, 9);
    c->sinks.push_back(kind == 0 ? -INFINITY : kind == 1 ? 300.0f * normal(r) : 3.0f * normal(r));
  }
}

inline Case MakeCase(Random& r, const Sizes& s) {
  Case c;
  sfa_core_params& p = c.p;
  p.struct_size = sizeof p;
  p.query_dtype = s.query_dtype;
  p.cache_dtype = s.cache_dtype;
  p.layout_query = s.layout_query;
  p.layout_kv = s.layout_kv;
  p.sparse_mode = s.mode;
  p.scale_value = 1.0f / sqrtf(static_cast<float>(s.nope + s.rope));
  p.num_heads = s.heads;
  p.nope_dim = s.nope;
  p.rope_dim = s.rope;
  p.tile_size = s.cache_dtype == SFA_CORE_I8 ? s.tile : 0;
  p.sparse_block_size = s.block_tokens;
  p.sparse_count = s.count;
  p.batch = s.batch;
  p.query_s = s.layout_query == SFA_CORE_BSND ? s.s1 : 0;
  p.query_t = static_cast<int64_t>(s.batch) * s.s1;
  if (s.layout_kv == SFA_CORE_PA_BSND) {
    p.block_size = Uniform(r, 1, 40);
    p.block_table_cols = (s.s2 + p.block_size - 1) / p.block_size;
    p.block_num = Uniform(r, 1, 12);
    c.rows = p.block_num * p.block_size;
  } else {
    c.rows = static_cast<int64_t>(s.batch) * s.s2;
    p.kv_s = s.layout_kv == SFA_CORE_TND ? c.rows : s.s2;
  }
  FillIntegers(r, s, &c);
  const bool packed = s.cache_dtype == SFA_CORE_I8;
  const int64_t lines = p.query_t * s.heads;
  c.query = RandomFloats(r, lines * (packed ? s.nope + s.rope : s.nope), s.query_dtype, 1);
  c.key = packed ? RandomRows(r, c.rows, s) : RandomFloats(r, c.rows * s.nope, s.query_dtype, 1);
  if (!packed && s.rope) {
    c.query_rope = RandomFloats(r, lines * s.rope, s.query_dtype, 1);
    c.key_rope = RandomFloats(r, c.rows * s.rope, s.query_dtype, 1);
  }
  c.out = Bytes(static_cast<size_t>(lines) * s.nope * ItemSize(s.query_dtype));
  p.rounding = Uniform(r, 0, 1);
  if (!Uniform(r, 0, 2)) FillSinks(r, &c);
  if (Uniform(r, 0, 1)) {
    c.softmax_max.assign(lines, -77);
    c.softmax_sum.assign(lines, -77);
  }
  c.Bind();
  return c;
}

}  // namespace sfa_test

#endif  // SFA_ONNX_KERNELS_TESTS_CORE_CASE_H_
