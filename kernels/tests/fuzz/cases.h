// Calls of the core from fuzzed bytes: sizes that describe the memory truly, as its contract asks,
// and everything else - values, lengths, tables, indices, illegal scalars - as the bytes say.
#ifndef SFA_ONNX_KERNELS_TESTS_FUZZ_CASES_H_
#define SFA_ONNX_KERNELS_TESTS_FUZZ_CASES_H_

#include <algorithm>
#include <cstdlib>
#include <string>

#include "../../core/sfa_core.h"
#include "reader.h"

namespace sfa_fuzz {

using Memory = std::vector<uint8_t>;
using Ints = std::vector<int32_t>;

inline size_t Width(int dtype) { return dtype == SFA_CORE_F32 ? 4 : dtype == SFA_CORE_I8 ? 1 : 2; }

// The paths of this machine, one of which a case takes; those built without checks are none.
inline int32_t SomePath(Reader& r) {
  static const std::vector<int32_t> paths = [] {
    std::vector<int32_t> found = {SFA_CORE_ISA_AUTO};
    const std::string names = sfa_core_isa_available();
    for (size_t at = 0; at < names.size();) {
      const size_t end = std::min(names.find(',', at), names.size());
      const std::string name = names.substr(at, end - at);
      const char* unchecked = getenv("SFA_FUZZ_UNCHECKED");
      if (!unchecked || !*unchecked || name.find(unchecked) != 0) {
        found.push_back(sfa_core_isa_from_name(name.c_str()));
      }
      at = end + 1;
    }
    return found;
  }();
  const int pick = r.Uniform(0, 255);
  return pick == 255 ? 99 : paths[static_cast<size_t>(pick) % paths.size()];
}

// Mostly legal: small numbers around what is there, and now and then a wild one.
inline Ints SomeInts(Reader& r, size_t count, int around) {
  Ints values(count);
  for (auto& v : values) {
    const int b = r.Byte();
    v = b < 8 ? -1 : b < 12 ? static_cast<int32_t>(r.Wild()) : b % (around + 2);
  }
  return values;
}

// Lengths of a batch: counts, or prefix sums.
inline Ints SomeLengths(Reader& r, int batch, int most, bool sums) {
  Ints lengths;
  int total = 0;
  for (int b = 0; b < batch; ++b) {
    const int byte = r.Byte();
    if (byte >= 250) {
      lengths.push_back(static_cast<int32_t>(r.Wild()));
      continue;
    }
    const int own = byte % (most + 1);
    total += own;
    lengths.push_back(sums ? total : own);
  }
  return lengths;
}

// As many whole numbers or floats as the bytes hold.
template <class T>
std::vector<T> As(const Memory& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

inline int32_t* OrNull(Ints& values) { return values.empty() ? nullptr : values.data(); }

// The key side of a call: how its rows lie.
struct Keys {
  int64_t rows = 0, s = 0, pages = 0, page = 0, columns = 0;
  Ints table, lengths;
};

inline Keys SomeKeys(Reader& r, int layout, int batch, int most) {
  Keys k;
  if (layout == SFA_CORE_PA_BSND) {
    k.page = r.Uniform(1, 33);
    k.pages = r.Uniform(0, 9);
    k.columns = most / k.page + r.Uniform(0, 1) + 1;
    k.rows = k.page * k.pages;
    k.table = SomeInts(r, static_cast<size_t>(batch * k.columns), static_cast<int>(k.pages));
  } else {
    k.rows = static_cast<int64_t>(batch) * most;
    k.s = layout == SFA_CORE_TND ? k.rows : most;
  }
  const bool given = layout != SFA_CORE_BSND || r.Flag();
  if (given) k.lengths = SomeLengths(r, batch, most, layout == SFA_CORE_TND);
  return k;
}

struct Attention {
  sfa_core_params p = {};
  Memory query, query_rope, key, key_rope, out;
  Keys keys;
  Ints indices, lengths;
  std::vector<float> sinks, most, sum;

  explicit Attention(Reader& r) {
    const int batch = r.Uniform(0, 3), s1 = r.Uniform(0, 3);
    Scalars(r, batch, s1);
    const int64_t tokens = p.query_t, heads = tokens * p.num_heads;
    const bool packed = p.cache_dtype == SFA_CORE_I8;
    const size_t size = Width(p.query_dtype);
    const int64_t row =
        packed ? sfa_core_row_bytes(p.nope_dim, p.rope_dim, p.tile_size, p.query_dtype)
               : static_cast<int64_t>(p.nope_dim) * static_cast<int64_t>(Width(p.cache_dtype));
    query = r.Bytes(static_cast<size_t>(heads * (p.nope_dim + (packed ? p.rope_dim : 0))) * size);
    key = r.Bytes(static_cast<size_t>(keys.rows * row));
    if (!packed) {
      query_rope = r.Bytes(static_cast<size_t>(heads * p.rope_dim) * size);
      key_rope = r.Bytes(static_cast<size_t>(keys.rows * p.rope_dim) * Width(p.cache_dtype));
    }
    out.assign(static_cast<size_t>(heads * p.nope_dim) * size, 0xEE);
    const int most_index = static_cast<int>(keys.rows / p.sparse_block_size) + 1;
    indices = SomeInts(r, static_cast<size_t>(tokens * p.sparse_count), most_index);
    if (r.Flag()) Extras(r, static_cast<size_t>(heads));
    Bind();
  }

  void Bind() {
    p.query = query.data();
    p.query_rope = query_rope.empty() ? nullptr : query_rope.data();
    p.key = key.data();
    p.key_rope = key_rope.empty() ? nullptr : key_rope.data();
    p.sparse_indices = indices.data();
    p.block_table = OrNull(keys.table);
    p.actual_seq_lengths_query = OrNull(lengths);
    p.actual_seq_lengths_kv = OrNull(keys.lengths);
    p.out = out.data();
    p.sinks = sinks.empty() ? nullptr : sinks.data();
    p.softmax_max = most.empty() ? nullptr : most.data();
    p.softmax_sum = sum.empty() ? nullptr : sum.data();
  }

 private:
  void Scalars(Reader& r, int batch, int s1) {
    const int tiles[] = {1, 3, 16, 64, 128};
    const int scales[] = {0, 1, 0x3d800000, 0x7f800000, 0x7fc00000};
    p.struct_size = sizeof p;
    p.isa = SomePath(r);
    p.query_dtype = r.Uniform(0, 2);
    p.cache_dtype = r.Flag() ? static_cast<int>(SFA_CORE_I8) : p.query_dtype;
    p.layout_query = r.Uniform(0, 1);
    p.layout_kv = r.Flag() ? static_cast<int>(SFA_CORE_PA_BSND) : p.layout_query;
    p.sparse_mode = r.Flag() ? 3 : 0;
    p.holes = r.Uniform(0, 2);
    p.rounding = r.Uniform(0, 1);
    memcpy(&p.scale_value, &scales[r.Uniform(0, 4)], 4);
    p.num_heads = r.Uniform(0, 3) ? r.Uniform(1, 9) : r.Uniform(10, 140);
    p.tile_size = tiles[r.Uniform(0, 4)];
    p.nope_dim = p.tile_size * r.Uniform(1, 4);
    p.rope_dim = r.Flag() ? r.Uniform(0, 66) : 0;
    p.sparse_block_size = r.Flag() ? 1 : r.Uniform(1, 16);
    p.sparse_count = r.Uniform(0, 7) ? r.Uniform(0, 40) : 500 + r.Uniform(0, 40);
    p.batch = batch;
    p.query_s = s1;
    p.query_t = static_cast<int64_t>(batch) * s1;
    keys = SomeKeys(r, p.layout_kv, batch, r.Uniform(0, 60));
    p.kv_s = keys.s;
    p.block_num = keys.pages;
    p.block_size = keys.page;
    p.block_table_cols = keys.columns;
    if (p.layout_query == SFA_CORE_TND || r.Flag()) {
      lengths = SomeLengths(r, batch, s1, p.layout_query == SFA_CORE_TND);
    }
  }

  void Extras(Reader& r, size_t heads) {
    sinks = As<float>(r.Bytes(4 * static_cast<size_t>(p.num_heads)));
    most.assign(heads, -77);
    sum.assign(heads, -77);
  }
};

struct Indexer {
  sfa_core_indexer_params p = {};
  Memory query, key, weights, values;
  std::vector<uint16_t> query_scale, key_scale;
  Keys keys;
  Ints lengths, indices;

  explicit Indexer(Reader& r) {
    const int batch = r.Uniform(0, 3), s1 = r.Uniform(0, 18);
    Scalars(r, batch, s1);
    const int64_t tokens = p.query_t, heads = tokens * p.num_heads;
    const bool int8 = p.dtype == SFA_CORE_I8;
    query = r.Bytes(static_cast<size_t>(heads * p.head_dim) * Width(p.dtype));
    key = r.Bytes(static_cast<size_t>(keys.rows * p.head_dim) * Width(p.dtype));
    weights = r.Bytes(static_cast<size_t>(heads) * Width(p.weights_dtype));
    if (int8) {
      query_scale = As<uint16_t>(r.Bytes(2 * static_cast<size_t>(heads)));
      key_scale = As<uint16_t>(r.Bytes(2 * static_cast<size_t>(keys.rows)));
    }
    indices.assign(static_cast<size_t>(tokens * p.sparse_count), 12345);
    if (r.Flag()) values.assign(indices.size() * (int8 ? 4 : Width(p.dtype)), 0xEE);
    Bind();
  }

  void Bind() {
    p.query = query.data();
    p.key = key.data();
    p.weights = weights.data();
    p.query_scale = query_scale.data();
    p.key_scale = key_scale.data();
    p.block_table = OrNull(keys.table);
    p.actual_seq_lengths_query = OrNull(lengths);
    p.actual_seq_lengths_key = OrNull(keys.lengths);
    p.sparse_indices = indices.data();
    p.sparse_values = values.empty() ? nullptr : values.data();
  }

 private:
  void Scalars(Reader& r, int batch, int s1) {
    p.struct_size = sizeof p;
    p.isa = SomePath(r);
    p.dtype = r.Uniform(0, 3);
    p.weights_dtype = p.dtype == SFA_CORE_I8 ? static_cast<int>(SFA_CORE_F16) : r.Uniform(0, 2);
    p.layout_query = r.Uniform(0, 1);
    p.layout_key = r.Flag() ? static_cast<int>(SFA_CORE_PA_BSND) : p.layout_query;
    p.sparse_mode = r.Flag() ? 3 : 0;
    p.rounding = p.dtype == SFA_CORE_I8 ? r.Uniform(0, 1) : 0;
    p.num_heads = r.Uniform(0, 3) ? r.Uniform(1, 9) : r.Uniform(10, 140);
    p.head_dim = r.Flag() ? r.Uniform(1, 40) : 16 * r.Uniform(1, 9);
    p.sparse_count = r.Uniform(0, 7) ? r.Uniform(1, 40) : 300 + r.Byte();
    p.batch = batch;
    p.query_s = s1;
    p.query_t = static_cast<int64_t>(batch) * s1;
    keys = SomeKeys(r, p.layout_key, batch, r.Uniform(0, 100));
    p.key_s = keys.s;
    p.block_num = keys.pages;
    p.block_size = keys.page;
    p.block_table_cols = keys.columns;
    if (p.layout_query == SFA_CORE_TND || r.Flag()) {
      lengths = SomeLengths(r, batch, s1, p.layout_query == SFA_CORE_TND);
    }
  }
};

}  // namespace sfa_fuzz

#endif  // SFA_ONNX_KERNELS_TESTS_FUZZ_CASES_H_
