// Attributes and shapes of an indexer call. Every size handed to the core describes real memory
// after this; the values inside lengths and tables are the core's to check.
#include "attributes.h"
#include "indexer.h"
#include "layouts.h"
#include "sequence_checks.h"

namespace sfa {
namespace {

// weights or query_dequant_scale: one number per query row and head.
bool PerHead(const SequenceChecks& check, const Tensor& t, const Tensor& query) {
  return check.Leading(t, query.rank - 1, query);
}

bool CheckScales(const SequenceChecks& check, const Tensor* in) {
  const Tensor& key = in[kIndexKey];
  if (!PerHead(check, in[kIndexQueryScale], in[kIndexQuery])) return false;
  return check.Leading(in[kIndexKeyScale], key.rank - 1, key);
}

void FillSizes(const SequenceSizes& sizes, const Tensor& query, sfa_core_indexer_params* p) {
  p->num_heads = static_cast<int32_t>(query.dims[query.rank - 2]);
  p->head_dim = static_cast<int32_t>(query.last());
  p->batch = sizes.batch;
  p->query_s = sizes.query_s;
  p->query_t = sizes.query_t;
  p->key_s = sizes.key_s;
  p->block_num = sizes.block_num;
  p->block_size = sizes.block_size;
  p->block_table_cols = sizes.block_table_cols;
}

void FillPointers(const Tensor* in, sfa_core_indexer_params* p) {
  p->query = in[kIndexQuery].data;
  p->key = in[kIndexKey].data;
  p->weights = in[kIndexWeights].data;
  p->query_scale = static_cast<const uint16_t*>(in[kIndexQueryScale].data);
  p->key_scale = static_cast<const uint16_t*>(in[kIndexKeyScale].data);
  p->block_table = Ints(in[kIndexBlockTable]);
  p->actual_seq_lengths_query = Ints(in[kIndexLengthsQuery]);
  p->actual_seq_lengths_key = Ints(in[kIndexLengthsKey]);
}

}  // namespace

bool ReadAttributes(const OrtApi* api, const OrtKernelInfo* info, IndexerOp op,
                    IndexerAttributes* out, Message* error) {
  *out = IndexerAttributes{};
  out->op = op;
  AttributeReader read(api, info, error);
  read.NameNode(NameOf(op));
  if (!ReadLayouts(&read, "layout_key", &out->layout_query, &out->layout_key, error)) return false;
  if (!read.IntInRange("sparse_count", 2048, 1, 1 << 30, &out->sparse_count) ||
      !read.IntOf2("sparse_mode", 3, 0, 3, &out->sparse_mode) ||
      !read.IntOf("pre_tokens", INT64_MAX, INT64_MAX) ||
      !read.IntOf("next_tokens", INT64_MAX, INT64_MAX)) {
    return false;
  }
  if (op == IndexerOp::kFloat) return read.IntOf2("return_values", 0, 0, 1, &out->return_values);
  return read.IntOf("query_quant_mode", kRequired, 0) && read.IntOf("key_quant_mode", kRequired, 0);
}

bool DescribeCall(const IndexerAttributes& attributes, const Tensor* in,
                  sfa_core_indexer_params* params, Message* error) {
  *params = sfa_core_indexer_params{};
  params->struct_size = sizeof *params;
  params->dtype = CoreType(in[kIndexQuery].type);
  params->weights_dtype = CoreType(in[kIndexWeights].type);
  params->layout_query = attributes.layout_query;
  params->layout_key = attributes.layout_key;
  params->sparse_mode = static_cast<int32_t>(attributes.sparse_mode);
  params->sparse_count = static_cast<int32_t>(attributes.sparse_count);
  params->rounding = attributes.rounding;
  const Tensor &query = in[kIndexQuery], &key = in[kIndexKey];
  SequenceChecks check(attributes.layout_query, attributes.layout_key, "layout_key", error);
  if (!check.Query(query, "[B,S1,Hi,Di] (layout_query BSND)", "[T,Hi,Di] (layout_query TND)") ||
      !check.Lengths(in[kIndexLengthsQuery], in[kIndexLengthsKey]) || !check.Key(key) ||
      !check.Dim(key, key.rank - 1, query.last(), "width, as the query's") ||
      !PerHead(check, in[kIndexWeights], query) ||
      (attributes.op == IndexerOp::kQuant && !CheckScales(check, in)) ||
      !check.BlockTable(in[kIndexBlockTable])) {
    return false;
  }
  if (query.last() == 0 || query.dims[query.rank - 2] == 0) {
    return check.About(query)->Add("expected at least one head and one column");
  }
  FillSizes(check.sizes, query, params);
  FillPointers(in, params);
  return true;
}

}  // namespace sfa
