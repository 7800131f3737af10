// Checks of a call that need no look at the indices, and the words for every error.
#include <stdio.h>
#include <string.h>

#include "internal.h"

namespace sfa {
namespace {

int check_scalars(const sfa_core_params& p, sfa_core_error* err) {
  const bool packed = p.cache_dtype == SFA_CORE_I8, paged = p.layout_kv == SFA_CORE_PA_BSND;
  const Range ranges[] = {
      {"query_dtype", p.query_dtype, SFA_CORE_F32, SFA_CORE_BF16},
      {"cache_dtype", p.cache_dtype, SFA_CORE_F32, SFA_CORE_I8},
      {"layout_query", p.layout_query, SFA_CORE_BSND, SFA_CORE_TND},
      {"layout_kv", p.layout_kv, SFA_CORE_BSND, SFA_CORE_PA_BSND},
      {"holes", p.holes, SFA_CORE_HOLES_ERROR, SFA_CORE_HOLES_STOP},
      {"rounding", p.rounding, SFA_CORE_ROUNDING_EXACT, SFA_CORE_ROUNDING_NPU},
      {"num_heads", p.num_heads, 1, 1 << 16},
      {"nope_dim", p.nope_dim, 1, 1 << 14},
      {"rope_dim", p.rope_dim, 0, 1 << 14},
      {"tile_size", packed ? p.tile_size : 1, 1, packed ? p.nope_dim : 1},
      {"sparse_block_size", p.sparse_block_size, 1, kInt},
      {"sparse_count", p.sparse_count, 0, kInt},
      {"batch", p.batch, 0, kInt},
      {"query_t", p.query_t, 0, kBig},
      {"query_s", p.layout_query == SFA_CORE_BSND ? p.query_s : 0, 0, kBig},
      {"kv_s", paged ? 0 : p.kv_s, 0, kBig},
      {"block_num", paged ? p.block_num : 0, 0, kBig},
      {"block_size", paged ? p.block_size : 1, 1, kInt},
      {"block_table_cols", paged ? p.block_table_cols : 1, 1, kInt},
  };
  const int status = check_ranges(ranges, sizeof(ranges) / sizeof(ranges[0]), err);
  if (status != SFA_CORE_OK) return status;
  if (p.sparse_mode != 0 && p.sparse_mode != 3) {
    return set_error(err, SFA_CORE_BAD_PARAM, "sparse_mode", p.sparse_mode, 3);
  }
  if (packed && p.nope_dim % p.tile_size != 0) {
    return set_error(err, SFA_CORE_BAD_PARAM, "tile_size", p.tile_size, p.nope_dim);
  }
  if (p.layout_query == SFA_CORE_BSND && !is_product(p.query_t, p.batch, p.query_s)) {
    return set_error(err, SFA_CORE_BAD_PARAM, "query_t", p.query_t, p.query_s);
  }
  if (p.query_t > 0 && p.sparse_count > kBig / p.query_t) {
    return set_error(err, SFA_CORE_BAD_PARAM, "sparse_count", p.sparse_count, kBig / p.query_t);
  }
  return SFA_CORE_OK;
}

int check_pointers(const sfa_core_params& p, sfa_core_error* err) {
  const bool packed = p.cache_dtype == SFA_CORE_I8, paged = p.layout_kv == SFA_CORE_PA_BSND;
  const bool any = p.query_t > 0, keys = any && p.sparse_count > 0;
  const struct {
    const char* name;
    bool missing;
  } rules[] = {
      {"query", any && !p.query},
      {"out", any && !p.out},
      {"sparse_indices", keys && !p.sparse_indices},
      {"query_rope", any && !packed && p.rope_dim > 0 && !p.query_rope},
      {"key_rope", keys && !packed && p.rope_dim > 0 && !p.key_rope},
      {"block_table", keys && paged && !p.block_table},
      {"softmax_max", any && !p.softmax_max && p.softmax_sum},
      {"softmax_sum", any && !p.softmax_sum && p.softmax_max},
      {"actual_seq_lengths_kv",
       p.layout_kv != SFA_CORE_BSND && p.batch && !p.actual_seq_lengths_kv},
      {"actual_seq_lengths_query",
       p.layout_query == SFA_CORE_TND && p.batch && !p.actual_seq_lengths_query},
  };
  for (const auto& rule : rules) {
    if (rule.missing) return set_error(err, SFA_CORE_BAD_PARAM, rule.name, 0, 1);
  }
  return SFA_CORE_OK;
}

int fail_batch(sfa_core_error* err, int status, const char* what, int64_t batch, int64_t value,
               int64_t limit) {
  set_error(err, status, what, value, limit);
  err->batch = (int32_t)batch;
  return status;
}

int check_prefix(const int32_t* sums, int64_t batch, int64_t total, bool query,
                 sfa_core_error* err) {
  const char* name = query ? "actual_seq_lengths_query" : "actual_seq_lengths_kv";
  int64_t previous = 0;
  for (int64_t b = 0; b < batch; ++b) {
    if (sums[b] < previous && b > 0) {
      const int status = query ? SFA_CORE_SEQ_Q_DECREASES : SFA_CORE_SEQ_KV_DECREASES;
      return fail_batch(err, status, name, b, sums[b], previous);
    }
    if (sums[b] < 0 || sums[b] > total) {
      return fail_batch(err, query ? SFA_CORE_BAD_SEQ_Q : SFA_CORE_BAD_SEQ_KV, name, b, sums[b],
                        total);
    }
    previous = sums[b];
  }
  return SFA_CORE_OK;
}

int check_counts(const int32_t* counts, int64_t batch, int64_t limit, bool query,
                 sfa_core_error* err) {
  if (!counts) return SFA_CORE_OK;
  for (int64_t b = 0; b < batch; ++b) {
    if (counts[b] < 0 || counts[b] > limit) {
      return fail_batch(err, query ? SFA_CORE_BAD_SEQ_Q : SFA_CORE_BAD_SEQ_KV,
                        query ? "actual_seq_lengths_query" : "actual_seq_lengths_kv", b, counts[b],
                        limit);
    }
  }
  return SFA_CORE_OK;
}

int check_paged(const sfa_core_params& p, sfa_core_error* err) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t len = p.actual_seq_lengths_kv[b];
    if (len < 0) {
      return fail_batch(err, SFA_CORE_BAD_SEQ_KV, "actual_seq_lengths_kv", b, len,
                        p.block_table_cols * p.block_size);
    }
    const int64_t need = ceil_div(len, p.block_size);
    if (need > p.block_table_cols) {
      return fail_batch(err, SFA_CORE_TABLE_TOO_SHORT, "actual_seq_lengths_kv", b, need,
                        p.block_table_cols);
    }
  }
  return SFA_CORE_OK;
}

}  // namespace

int set_error(sfa_core_error* err, int status, const char* what, int64_t value, int64_t limit) {
  if (err) *err = {status, -1, -1, -1, value, limit, what};
  return status;
}

int check_ranges(const Range* ranges, int n, sfa_core_error* err) {
  for (int i = 0; i < n; ++i) {
    if (ranges[i].value < ranges[i].lo) {
      return set_error(err, SFA_CORE_BAD_PARAM, ranges[i].name, ranges[i].value, ranges[i].lo);
    }
    if (ranges[i].value > ranges[i].hi) {
      return set_error(err, SFA_CORE_BAD_PARAM, ranges[i].name, ranges[i].value, ranges[i].hi);
    }
  }
  return SFA_CORE_OK;
}

int check_lengths(const sfa_core_params& p, sfa_core_error* err) {
  const int status = p.layout_query == SFA_CORE_TND
                         ? check_prefix(p.actual_seq_lengths_query, p.batch, p.query_t, true, err)
                         : check_counts(p.actual_seq_lengths_query, p.batch, p.query_s, true, err);
  if (status != SFA_CORE_OK) return status;
  switch (p.layout_kv) {
    case SFA_CORE_PA_BSND:
      return check_paged(p, err);
    case SFA_CORE_TND:
      return check_prefix(p.actual_seq_lengths_kv, p.batch, p.kv_s, false, err);
    default:
      return check_counts(p.actual_seq_lengths_kv, p.batch, p.kv_s, false, err);
  }
}

int check_params(const sfa_core_params& p, sfa_core_error* err) {
  int status = check_scalars(p, err);
  if (status == SFA_CORE_OK) status = check_pointers(p, err);
  return status == SFA_CORE_OK ? check_lengths(p, err) : status;
}

}  // namespace sfa

extern "C" {

int64_t sfa_core_row_bytes(int32_t nope_dim, int32_t rope_dim, int32_t tile_size,
                           int32_t rope_dtype) {
  return nope_dim + (int64_t)rope_dim * sfa::dtype_size(rope_dtype) + 4 * (nope_dim / tile_size);
}

int32_t sfa_core_describe(const sfa_core_error* err, char* buf, int32_t size) {
  const long long batch = err->batch, token = err->token, slot = err->slot, value = err->value,
                  limit = err->limit;
  const char* what = err->what ? err->what : "";
  int n;
  switch (err->status) {
    case SFA_CORE_OK:
      n = snprintf(buf, size, "no error");
      break;
    case SFA_CORE_BAD_PARAM:
      n = snprintf(buf, size, "%s is %lld, which is outside what the kernel takes (bound: %lld)",
                   what, value, limit);
      break;
    case SFA_CORE_NO_MEMORY:
      n = snprintf(buf, size, "out of memory: %lld bytes of scratch", value);
      break;
    case SFA_CORE_BAD_ISA:
      n = snprintf(buf, size,
                   "SFA_ONNX_ISA names a kernel path this machine lacks; it has: %s. Unset it, or "
                   "choose one of these",
                   sfa_core_isa_available());
      break;
    case SFA_CORE_SEQ_Q_DECREASES:
    case SFA_CORE_SEQ_KV_DECREASES:
      n = snprintf(
          buf, size,
          "%s[%lld] is %lld but the entry before it is %lld: prefix sums must not decrease", what,
          batch, value, limit);
      break;
    case SFA_CORE_TABLE_TOO_SHORT:
      n = snprintf(buf, size, "block_table has %lld columns, but %s[%lld] needs %lld pages", limit,
                   what, batch, value);
      break;
    case SFA_CORE_BAD_BLOCK:
      n = snprintf(buf, size,
                   "block_table[%lld][%lld] is %lld, but query row %lld needs that page and the "
                   "cache has pages 0..%lld",
                   batch, slot, value, token, limit - 1);
      break;
    case SFA_CORE_INDEX_HOLE:
      n = snprintf(buf, size,
                   "sparse_indices of query row %lld: slot %lld holds the valid index %lld after a "
                   "negative one at slot %lld; valid indices must come first",
                   token, slot, value, limit);
      break;
    case SFA_CORE_BAD_SLOT:
      n = snprintf(buf, size, "%s[%lld] is %lld, but the cache has rows 0..%lld", what, slot, value,
                   limit - 1);
      break;
    default:
      n = snprintf(buf, size, "%s[%lld] is %lld, allowed is 0..%lld", what, batch, value, limit);
  }
  return n < 0 ? 0 : n;
}

}  // extern "C"
