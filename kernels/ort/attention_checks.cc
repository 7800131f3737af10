// Shapes of an attention call. Every size handed to the core describes real memory after this;
// the values inside lengths, tables and indices are the core's to check.
#include "attention.h"

namespace sfa {
namespace {

typedef long long ll;

struct Call {
  const AttentionAttributes& attributes;
  const Tensor* in;
  sfa_core_params* params;
  Message* error;

  bool packed() const { return attributes.op != AttentionOp::kFloatCache; }
  bool paged() const { return attributes.layout_kv == SFA_CORE_PA_BSND; }
  bool token_query() const { return attributes.layout_query == SFA_CORE_TND; }

  // "input key: shape [..]: " - the beginning of every complaint about a tensor.
  Message* About(const Tensor& t) const {
    error->Add("input %s: shape ", t.name);
    error->AddShape(t.dims, t.rank);
    error->Add(": ");
    return error;
  }
  bool Rank(const Tensor& t, size_t rank, const char* expected) const {
    return t.rank == rank ||
           About(t)->Add("expected %zu dimensions %s, got %zu", rank, expected, t.rank);
  }
  bool Dim(const Tensor& t, size_t axis, int64_t expected, const char* meaning) const {
    return t.dims[axis] == expected ||
           About(t)->Add("expected %lld in dimension %zu (%s), got %lld", ll(expected), axis,
                         meaning, ll(t.dims[axis]));
  }
  // Present or absent as it must be.
  bool Need(const Tensor& t, const char* why) const {
    return t.present || error->Add("input %s: expected, because %s, but it is absent", t.name, why);
  }
  bool Forbid(const Tensor& t, const char* why) const {
    return !t.present || About(t)->Add("expected to be absent: %s", why);
  }
};

bool FitsInt32(const Call& c, const Tensor& t) {
  for (size_t i = 0; i < t.rank; ++i) {
    if (t.dims[i] > INT32_MAX) {
      return c.About(t)->Add("dimension %zu is above 2^31-1", i);
    }
  }
  return true;
}

bool CheckQuery(const Call& c) {
  const Tensor& q = c.in[kQuery];
  const bool tnd = c.token_query();
  if (!c.Rank(q, tnd ? 3 : 4,
              tnd ? "[T,N1,C+R] (layout_query TND)" : "[B,S1,N1,C+R] (layout_query BSND)")) {
    return false;
  }
  if (!FitsInt32(c, q)) return false;
  sfa_core_params* p = c.params;
  p->query_s = tnd ? 0 : q.dims[1];
  p->query_t = tnd ? q.dims[0] : q.dims[0] * q.dims[1];
  p->batch = tnd ? 0 : q.dims[0];  // TND: number of lengths
  p->num_heads = static_cast<int32_t>(q.dims[q.rank - 2]);
  p->rope_dim = static_cast<int32_t>(c.packed() ? c.attributes.rope_head_dim : 0);
  p->nope_dim = static_cast<int32_t>(q.last() - p->rope_dim);
  if (p->nope_dim >= 1) return true;
  return c.About(q)->Add("expected a last dimension above rope_head_dim %d", p->rope_dim);
}

// Leading dimensions and N2 of a key-side tensor (key, key_rope).
bool CheckCacheShape(const Call& c, const Tensor& t) {
  const bool tnd = c.attributes.layout_kv == SFA_CORE_TND;
  const char* expected = tnd         ? "[T2,1,D] (layout_kv TND)"
                         : c.paged() ? "[block_num,block_size,1,D] (layout_kv PA_BSND)"
                                     : "[B,S2,1,D] (layout_kv BSND)";
  if (!c.Rank(t, tnd ? 3 : 4, expected) || !FitsInt32(c, t)) return false;
  if (!c.Dim(t, t.rank - 2, 1, "one key head for all query heads")) return false;
  return tnd || c.paged() || c.Dim(t, 0, c.params->batch, "batch, as the query's");
}

bool CheckPackedRow(const Call& c) {
  const Tensor& key = c.in[kKey];
  sfa_core_params* p = c.params;
  p->tile_size = static_cast<int32_t>(c.attributes.tile_size);
  if (p->nope_dim % p->tile_size != 0) {
    return c.error->Add(
        "attribute tile_size: expected a divisor of the nope width %d (query's"
        " last dimension less rope_head_dim), got %d",
        p->nope_dim, p->tile_size);
  }
  const int64_t bytes = sfa_core_row_bytes(p->nope_dim, p->rope_dim, p->tile_size, p->query_dtype);
  if (key.last() == bytes) return true;
  return c.About(key)->Add(
      "expected rows of %lld bytes (%d int8 nope + %d rope of %d bytes, the query's type + %d"
      " float32 scales), got %lld",
      ll(bytes), p->nope_dim, p->rope_dim, ItemSize(c.in[kQuery].type), p->nope_dim / p->tile_size,
      ll(key.last()));
}

// Same leading dimensions as `like`.
bool CheckLeading(const Call& c, const Tensor& t, const Tensor& like) {
  if (!c.Rank(t, like.rank, like.name)) return false;
  for (size_t i = 0; i + 1 < t.rank; ++i) {
    if (!c.Dim(t, i, like.dims[i], like.name)) return false;
  }
  return true;
}

bool CheckFloatCache(const Call& c) {
  const Tensor &query = c.in[kQuery], &key = c.in[kKey];
  const Tensor &q_rope = c.in[kQueryRope], &k_rope = c.in[kKeyRope];
  if (!c.Dim(key, key.rank - 1, query.last(), "latent width, as the query's")) return false;
  if (q_rope.present != k_rope.present) {
    return c.error->Add("inputs query_rope and key_rope: expected both or none, got only %s",
                        q_rope.present ? q_rope.name : k_rope.name);
  }
  if (!q_rope.present) return true;
  if (!CheckLeading(c, q_rope, query) || !CheckLeading(c, k_rope, key)) return false;
  if (!FitsInt32(c, q_rope)) return false;
  c.params->rope_dim = static_cast<int32_t>(q_rope.last());
  return c.Dim(k_rope, k_rope.rank - 1, q_rope.last(), "rope width, as query_rope's");
}

bool CheckKey(const Call& c) {
  const Tensor& key = c.in[kKey];
  sfa_core_params* p = c.params;
  if (!CheckCacheShape(c, key)) return false;
  p->kv_s = c.paged() ? 0 : key.dims[key.rank - 3];
  p->block_num = c.paged() ? key.dims[0] : 0;
  p->block_size = c.paged() ? key.dims[1] : 0;
  if (c.paged() && p->block_size == 0) {
    return c.About(key)->Add("expected pages of at least one row");
  }
  return c.packed() ? CheckPackedRow(c) : CheckFloatCache(c);
}

bool CheckIndices(const Call& c) {
  const Tensor &indices = c.in[kIndices], &query = c.in[kQuery];
  const size_t rank = query.rank;
  if (!c.Rank(indices, rank, rank == 3 ? "[T,1,K]" : "[B,S1,1,K]")) return false;
  for (size_t i = 0; i + 2 < rank; ++i) {
    if (!c.Dim(indices, i, query.dims[i], "as the query's")) return false;
  }
  if (!c.Dim(indices, rank - 2, 1, "one key head") || !FitsInt32(c, indices)) return false;
  c.params->sparse_count = static_cast<int32_t>(indices.last());
  return true;
}

bool CheckLengths(const Call& c) {
  const Tensor &query = c.in[kLengthsQuery], &kv = c.in[kLengthsKv];
  if (c.token_query() && !c.Need(query, "layout_query is TND")) return false;
  if (c.attributes.layout_kv != SFA_CORE_BSND &&
      !c.Need(kv, c.paged() ? "layout_kv is PA_BSND" : "layout_kv is TND")) {
    return false;
  }
  if (query.present && !c.Rank(query, 1, "[B]")) return false;
  if (c.token_query()) {
    c.params->batch = query.dims[0];
    if (query.dims[0] == 0) return c.About(query)->Add("expected at least one sequence");
  }
  if (query.present && !c.Dim(query, 0, c.params->batch, "batch")) return false;
  return !kv.present || (c.Rank(kv, 1, "[B]") && c.Dim(kv, 0, c.params->batch, "batch"));
}

bool CheckBlockTable(const Call& c) {
  const Tensor& table = c.in[kBlockTable];
  if (!c.paged()) return c.Forbid(table, "only layout_kv PA_BSND has pages");
  if (!c.Need(table, "layout_kv is PA_BSND")) return false;
  if (!c.Rank(table, 2, "[B,pages per sequence]")) return false;
  c.params->block_table_cols = table.dims[1];
  if (table.dims[1] == 0) return c.About(table)->Add("expected at least one page per sequence");
  return c.Dim(table, 0, c.params->batch, "batch");
}

const int32_t* Ints(const Tensor& t) {
  return t.present ? static_cast<const int32_t*>(t.data) : nullptr;
}

void FillPointers(const Call& c) {
  sfa_core_params* p = c.params;
  p->query = c.in[kQuery].data;
  p->key = c.in[kKey].data;
  p->query_rope = c.in[kQueryRope].present ? c.in[kQueryRope].data : nullptr;
  p->key_rope = c.in[kKeyRope].present ? c.in[kKeyRope].data : nullptr;
  p->sparse_indices = Ints(c.in[kIndices]);
  p->block_table = Ints(c.in[kBlockTable]);
  p->actual_seq_lengths_query = Ints(c.in[kLengthsQuery]);
  p->actual_seq_lengths_kv = Ints(c.in[kLengthsKv]);
}

}  // namespace

bool DescribeCall(const AttentionAttributes& attributes, const Tensor* in, sfa_core_params* params,
                  Message* error) {
  *params = sfa_core_params{};
  params->struct_size = sizeof *params;
  params->query_dtype = CoreType(in[kQuery].type);
  params->cache_dtype = CoreType(in[kKey].type);
  params->layout_query = attributes.layout_query;
  params->layout_kv = attributes.layout_kv;
  params->sparse_mode = static_cast<int32_t>(attributes.sparse_mode);
  params->sparse_block_size = static_cast<int32_t>(attributes.sparse_block_size);
  params->holes = attributes.holes;
  params->scale_value = attributes.scale_value;
  const Call c{attributes, in, params, error};
  const char* reserved = "reserved; the scales are inside the rows (quant_scale_repo_mode 1)";
  if (!c.Forbid(in[kKeyScale], reserved) || !c.Forbid(in[kValueScale], reserved)) return false;
  if (!CheckQuery(c) || !CheckLengths(c) || !CheckKey(c) || !CheckIndices(c) ||
      !CheckBlockTable(c)) {
    return false;
  }
  FillPointers(c);
  return true;
}

}  // namespace sfa
