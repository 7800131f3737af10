// Checks of an indexer call that need no look at the block table.
#include "indexer.h"

namespace sfa {
namespace {

// Layouts, sizes and lengths, as the attention's functions take them.
sfa_core_params sequences_of(const sfa_core_indexer_params& p) {
  sfa_core_params s = {};
  s.layout_query = p.layout_query;
  s.layout_kv = p.layout_key;
  s.sparse_mode = p.sparse_mode;
  s.sparse_block_size = 1;
  s.sparse_count = INT32_MAX;  // slot_count: all visible keys
  s.batch = p.batch;
  s.query_s = p.query_s;
  s.query_t = p.query_t;
  s.kv_s = p.key_s;
  s.block_num = p.block_num;
  s.block_size = p.block_size;
  s.block_table_cols = p.block_table_cols;
  s.block_table = p.block_table;
  s.actual_seq_lengths_query = p.actual_seq_lengths_query;
  s.actual_seq_lengths_kv = p.actual_seq_lengths_key;
  return s;
}

int check_scalars(const sfa_core_indexer_params& p, sfa_core_error* err) {
  const bool int8 = p.dtype == SFA_CORE_I8, paged = p.layout_key == SFA_CORE_PA_BSND;
  const Range ranges[] = {
      {"dtype", p.dtype, SFA_CORE_F32, SFA_CORE_I8},
      {"weights_dtype", p.weights_dtype, int8 ? SFA_CORE_F16 : SFA_CORE_F32,
       int8 ? SFA_CORE_F16 : SFA_CORE_BF16},
      {"layout_query", p.layout_query, SFA_CORE_BSND, SFA_CORE_TND},
      {"layout_key", p.layout_key, SFA_CORE_BSND, SFA_CORE_PA_BSND},
      {"rounding", p.rounding, SFA_CORE_ROUNDING_EXACT, SFA_CORE_ROUNDING_NPU},
      {"num_heads", p.num_heads, 1, 1 << 16},
      {"head_dim", p.head_dim, 1, 1 << 14},
      {"sparse_count", p.sparse_count, 1, kInt},
      {"batch", p.batch, 0, kInt},
      {"query_t", p.query_t, 0, kBig},
      {"query_s", p.layout_query == SFA_CORE_BSND ? p.query_s : 0, 0, kBig},
      {"key_s", paged ? 0 : p.key_s, 0, kBig},
      {"block_num", paged ? p.block_num : 0, 0, kBig},
      {"block_size", paged ? p.block_size : 1, 1, kInt},
      {"block_table_cols", paged ? p.block_table_cols : 1, 1, kInt},
  };
  const int status = check_ranges(ranges, sizeof(ranges) / sizeof(ranges[0]), err);
  if (status != SFA_CORE_OK) return status;
  if (p.sparse_mode != 0 && p.sparse_mode != 3) {
    return set_error(err, SFA_CORE_BAD_PARAM, "sparse_mode", p.sparse_mode, 3);
  }
  if (p.layout_query == SFA_CORE_BSND && !is_product(p.query_t, p.batch, p.query_s)) {
    return set_error(err, SFA_CORE_BAD_PARAM, "query_t", p.query_t, p.query_s);
  }
  if (p.query_t > 0 && p.sparse_count > kBig / p.query_t) {
    return set_error(err, SFA_CORE_BAD_PARAM, "sparse_count", p.sparse_count, kBig / p.query_t);
  }
  return SFA_CORE_OK;
}

int check_pointers(const sfa_core_indexer_params& p, sfa_core_error* err) {
  const bool any = p.query_t > 0, paged = p.layout_key == SFA_CORE_PA_BSND;
  const bool int8 = p.dtype == SFA_CORE_I8;
  const bool keys = any && (paged ? p.block_num : p.key_s) > 0;
  const struct {
    const char* name;
    bool missing;
  } rules[] = {
      {"query", any && !p.query},
      {"key", keys && !p.key},
      {"weights", any && !p.weights},
      {"query_dequant_scale", any && int8 && !p.query_scale},
      {"key_dequant_scale", keys && int8 && !p.key_scale},
      {"sparse_indices", any && !p.sparse_indices},
      {"block_table", any && paged && !p.block_table},
      {"actual_seq_lengths_key",
       p.layout_key != SFA_CORE_BSND && p.batch && !p.actual_seq_lengths_key},
      {"actual_seq_lengths_query",
       p.layout_query == SFA_CORE_TND && p.batch && !p.actual_seq_lengths_query},
  };
  for (const auto& rule : rules) {
    if (rule.missing) return set_error(err, SFA_CORE_BAD_PARAM, rule.name, 0, 1);
  }
  return SFA_CORE_OK;
}

}  // namespace

int check_indexer(const sfa_core_indexer_params& p, sfa_core_params* sequences,
                  sfa_core_error* err) {
  int status = check_scalars(p, err);
  if (status == SFA_CORE_OK) status = check_pointers(p, err);
  if (status != SFA_CORE_OK) return status;
  *sequences = sequences_of(p);
  status = check_lengths(*sequences, err);
  // The attention's name of the same lengths.
  const bool key = status != SFA_CORE_BAD_SEQ_Q && status != SFA_CORE_SEQ_Q_DECREASES;
  if (status != SFA_CORE_OK && err && key) err->what = "actual_seq_lengths_key";
  return status;
}

}  // namespace sfa
