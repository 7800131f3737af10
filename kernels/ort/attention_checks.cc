// Shapes of an attention call. Every size handed to the core describes real memory after this;
// the values inside lengths, tables and indices are the core's to check.
#include "attention.h"
#include "sequence_checks.h"

namespace sfa {
namespace {

typedef long long ll;

struct Call {
  const AttentionAttributes& attributes;
  const Tensor* in;
  sfa_core_params* params;
  SequenceChecks check;
  Message* error;

  bool packed() const { return attributes.op != AttentionOp::kFloatCache; }
};

bool CheckQuery(Call* c) {
  const Tensor& q = c->in[kQuery];
  if (!c->check.Query(q, "[B,S1,N1,C+R] (layout_query BSND)", "[T,N1,C+R] (layout_query TND)")) {
    return false;
  }
  sfa_core_params* p = c->params;
  p->num_heads = static_cast<int32_t>(q.dims[q.rank - 2]);
  p->rope_dim = static_cast<int32_t>(c->packed() ? c->attributes.rope_head_dim : 0);
  p->nope_dim = static_cast<int32_t>(q.last() - p->rope_dim);
  if (p->nope_dim >= 1) return true;
  return c->check.About(q)->Add("expected a last dimension above rope_head_dim %d", p->rope_dim);
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
  return c.check.About(key)->Add(
      "expected rows of %lld bytes (%d int8 nope + %d rope of %d bytes, the query's type + %d"
      " float32 scales), got %lld",
      ll(bytes), p->nope_dim, p->rope_dim, ItemSize(c.in[kQuery].type), p->nope_dim / p->tile_size,
      ll(key.last()));
}

bool CheckFloatCache(const Call& c) {
  const Tensor &query = c.in[kQuery], &key = c.in[kKey];
  const Tensor &q_rope = c.in[kQueryRope], &k_rope = c.in[kKeyRope];
  const SequenceChecks& check = c.check;
  if (!check.Dim(key, key.rank - 1, query.last(), "latent width, as the query's")) return false;
  if (q_rope.present != k_rope.present) {
    return c.error->Add("inputs query_rope and key_rope: expected both or none, got only %s",
                        q_rope.present ? q_rope.name : k_rope.name);
  }
  if (!q_rope.present) return true;
  if (!check.Leading(q_rope, query.rank, query) || !check.Leading(k_rope, key.rank, key)) {
    return false;
  }
  if (!check.FitsInt32(q_rope)) return false;
  c.params->rope_dim = static_cast<int32_t>(q_rope.last());
  return check.Dim(k_rope, k_rope.rank - 1, q_rope.last(), "rope width, as query_rope's");
}

bool CheckIndices(const Call& c) {
  const Tensor &indices = c.in[kIndices], &query = c.in[kQuery];
  const size_t rank = query.rank;
  const SequenceChecks& check = c.check;
  if (!check.Rank(indices, rank, rank == 3 ? "[T,1,K]" : "[B,S1,1,K]")) return false;
  for (size_t i = 0; i + 2 < rank; ++i) {
    if (!check.Dim(indices, i, query.dims[i], "as the query's")) return false;
  }
  if (!check.Dim(indices, rank - 2, 1, "one key head") || !check.FitsInt32(indices)) return false;
  c.params->sparse_count = static_cast<int32_t>(indices.last());
  return true;
}

void FillSizes(const Call& c) {
  const SequenceSizes& sizes = c.check.sizes;
  sfa_core_params* p = c.params;
  p->batch = sizes.batch;
  p->query_s = sizes.query_s;
  p->query_t = sizes.query_t;
  p->kv_s = sizes.key_s;
  p->block_num = sizes.block_num;
  p->block_size = sizes.block_size;
  p->block_table_cols = sizes.block_table_cols;
}

bool CheckSinks(const Call& c) {
  const Tensor& sinks = c.in[kSinks];
  if (!sinks.present) return true;
  return c.check.Rank(sinks, 1, "[N1]") &&
         c.check.Dim(sinks, 0, c.params->num_heads, "one per query head");
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
  p->sinks = c.in[kSinks].present ? static_cast<const float*>(c.in[kSinks].data) : nullptr;
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
  params->rounding = attributes.rounding;
  params->scale_value = attributes.scale_value;
  Call c{attributes, in, params,
         SequenceChecks(attributes.layout_query, attributes.layout_kv, "layout_kv", error), error};
  const char* reserved = "reserved; the scales are inside the rows (quant_scale_repo_mode 1)";
  if (!c.check.Forbid(in[kKeyScale], reserved) || !c.check.Forbid(in[kValueScale], reserved)) {
    return false;
  }
  if (!CheckQuery(&c) || !c.check.Lengths(in[kLengthsQuery], in[kLengthsKv]) ||
      !c.check.Key(in[kKey]) || !(c.packed() ? CheckPackedRow(c) : CheckFloatCache(c)) ||
      !CheckIndices(c) || !c.check.BlockTable(in[kBlockTable]) || !CheckSinks(c)) {
    return false;
  }
  FillSizes(c);
  FillPointers(c);
  return true;
}

}  // namespace sfa
