// From untrusted lengths, block tables and indices to row addresses.
#include <string.h>

#include "internal.h"

namespace sfa {
namespace {

int64_t visible(const sfa_core_params& p, const Lengths& len) {
  return p.sparse_mode == 3 ? len.act_kv - len.act_q + len.s1 + 1 : len.act_kv;
}

// Walks the index entries of one row that a chunk covers and collects addresses.
class Collector {
 public:
  Collector(const sfa_core_params& p, const Lengths& len, int64_t token, Rows* rows)
      : p_(p),
        len_(len),
        token_(token),
        rows_(rows),
        limit_(visible(p, len)),
        nope_bytes_(p.cache_dtype == SFA_CORE_I8
                        ? sfa_core_row_bytes(p.nope_dim, p.rope_dim, p.tile_size, p.query_dtype)
                        : (int64_t)p.nope_dim * dtype_size(p.cache_dtype)),
        rope_bytes_((int64_t)p.rope_dim * dtype_size(p.cache_dtype)) {
    rows->n = 0;
    if (p.layout_kv != SFA_CORE_PA_BSND) return;
    table_ = p.block_table + len.batch * p.block_table_cols;
    const int64_t bs = p.block_size;
    if ((bs & (bs - 1)) == 0) shift_ = __builtin_ctzll(bs);
  }

  int run(int64_t first, int64_t count, sfa_core_error* err) {
    const int32_t* idx = p_.sparse_indices + token_ * p_.sparse_count;
    const int64_t sbs = p_.sparse_block_size, last = first + count;
    int64_t negative = first_negative(idx, first / sbs);
    if (negative >= 0 && p_.holes == SFA_CORE_HOLES_STOP) return SFA_CORE_OK;
    int64_t j = first / sbs;
    if (sbs == 1 && negative < 0)
      j += table_ ? plain<true>(idx + j, count) : plain<false>(idx + j, count);
    for (; j * sbs < last; ++j) {
      const int64_t v = idx[j];
      if (v < 0) {
        if (p_.holes == SFA_CORE_HOLES_STOP) break;
        if (negative < 0) negative = j;
        continue;
      }
      if (v * sbs >= limit_) continue;
      if (negative >= 0 && p_.holes == SFA_CORE_HOLES_ERROR) return hole(j, v, negative, err);
      const int64_t from = j * sbs < first ? first - j * sbs : 0;
      int64_t to = (j + 1) * sbs > last ? last - j * sbs : sbs;
      if (to > limit_ - v * sbs) to = limit_ - v * sbs;
      for (int64_t k = from; k < to; ++k) {
        if (!add(v * sbs + k)) return bad_block(v * sbs + k, err);
      }
    }
    return SFA_CORE_OK;
  }

 private:
  // Collects single tokens up to the first entry that needs a closer look; returns their number.
  template <bool kPaged>
  int64_t plain(const int32_t* idx, int64_t count) {
    const uint64_t limit = (uint64_t)limit_, blocks = (uint64_t)p_.block_num;
    const int64_t base = len_.base_row, size = p_.block_size, bytes = nope_bytes_;
    const int64_t rope_bytes = key_rope_ ? rope_bytes_ : bytes;
    // A cache without rows may lie at NULL, which has no place behind it.
    const uint8_t* const rope = key_rope_ ? key_rope_ : key_ ? key_ + p_.nope_dim : nullptr;
    const int32_t* const table = table_;
    const uint8_t* const key = key_;
    Rows* const rows = rows_;
    const int shift = shift_;
    if (kPaged && shift < 0) return 0;
    int64_t j = 0;
    for (; j < count; ++j) {
      const int64_t tok = idx[j];
      if ((uint64_t)tok >= limit) break;
      int64_t row = base + tok;
      if (kPaged) {
        const int64_t block = table[tok >> shift];
        if ((uint64_t)block >= blocks) break;
        row = block * size + (tok & (size - 1));
      }
      rows->nope[j] = key + row * bytes;
      rows->rope[j] = rope + row * rope_bytes;
    }
    rows->n = (int)j;
    return j;
  }

  static int64_t first_negative(const int32_t* idx, int64_t n) {
    int32_t any = 0;
    for (int64_t j = 0; j < n; ++j) any |= idx[j];
    if (any >= 0) return -1;
    int64_t j = 0;
    while (idx[j] >= 0) ++j;
    return j;
  }

  int hole(int64_t slot, int64_t value, int64_t negative, sfa_core_error* err) const {
    set_error(err, SFA_CORE_INDEX_HOLE, "sparse_indices", value, negative);
    err->batch = (int32_t)len_.batch;
    err->token = token_;
    err->slot = slot;
    return err->status;
  }

  int bad_block(int64_t tok, sfa_core_error* err) const {
    const int64_t col = column(tok);
    set_error(err, SFA_CORE_BAD_BLOCK, "block_table", table_[col], p_.block_num);
    err->batch = (int32_t)len_.batch;
    err->token = token_;
    err->slot = col;
    return err->status;
  }

  int64_t column(int64_t tok) const { return shift_ >= 0 ? tok >> shift_ : tok / p_.block_size; }

  // False when the token's page is none of the cache's.
  inline __attribute__((always_inline)) bool add(int64_t tok) {
    int64_t row = len_.base_row + tok;
    if (table_) {
      const int64_t col = column(tok), block = table_[col];
      if ((uint64_t)block >= (uint64_t)p_.block_num) return false;
      row = block * p_.block_size + (tok - col * p_.block_size);
    }
    const uint8_t* nope = key_ + row * nope_bytes_;
    const int n = rows_->n++;
    rows_->nope[n] = nope;
    rows_->rope[n] = key_rope_ ? key_rope_ + row * rope_bytes_ : nope + p_.nope_dim;
    return true;
  }

  const sfa_core_params& p_;
  const Lengths& len_;
  const int64_t token_;
  Rows* const rows_;
  const uint8_t* const key_ = (const uint8_t*)p_.key;
  // Rope of float caches; null when it follows the latent, or is empty.
  const uint8_t* const key_rope_ =
      p_.cache_dtype == SFA_CORE_I8 ? nullptr : (const uint8_t*)p_.key_rope;
  const int64_t limit_, nope_bytes_, rope_bytes_;
  const int32_t* table_ = nullptr;
  int shift_ = -1;
};

// Batch of packed token t: the first whose inclusive prefix sum exceeds t, or `batch` when past
// the last.
int64_t find_batch(const sfa_core_params& p, int64_t t) {
  int64_t lo = 0, hi = p.batch;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (p.actual_seq_lengths_query[mid] > t) {
      hi = mid;
    } else {
      lo = mid + 1;
    }
  }
  return lo;
}

}  // namespace

bool find_lengths(const sfa_core_params& p, int64_t token, Lengths* len) {
  const int32_t* sq = p.actual_seq_lengths_query;
  const int32_t* skv = p.actual_seq_lengths_kv;
  int64_t b;
  if (p.layout_query == SFA_CORE_TND) {
    b = find_batch(p, token);
    if (b == p.batch) return false;
    const int64_t start = b > 0 ? sq[b - 1] : 0;
    len->s1 = token - start;
    len->act_q = sq[b] - start;
  } else {
    b = token / p.query_s;
    len->s1 = token % p.query_s;
    len->act_q = sq ? sq[b] : p.query_s;
  }
  len->batch = b;
  if (p.layout_kv == SFA_CORE_TND) {
    len->base_row = b > 0 ? skv[b - 1] : 0;
    len->act_kv = skv[b] - len->base_row;
  } else {
    len->base_row = p.layout_kv == SFA_CORE_BSND ? b * p.kv_s : 0;
    len->act_kv = skv ? skv[b] : p.kv_s;
  }
  return len->s1 < len->act_q;
}

int64_t slot_count(const sfa_core_params& p, const Lengths& len) {
  const int64_t limit = visible(p, len);
  if (limit <= 0) return 0;
  const int64_t entries = ceil_div(limit, p.sparse_block_size);
  return (entries < p.sparse_count ? entries : p.sparse_count) * p.sparse_block_size;
}

int64_t longest_row(const sfa_core_params& p) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    Lengths len;
    len.act_kv = p.actual_seq_lengths_kv ? p.actual_seq_lengths_kv[b] : p.kv_s;
    if (p.layout_kv == SFA_CORE_TND && b > 0) len.act_kv -= p.actual_seq_lengths_kv[b - 1];
    len.act_q = 1;
    len.s1 = 0;
    const int64_t slots = slot_count(p, len);
    if (slots > longest) longest = slots;
  }
  return longest;
}

int resolve_rows(const sfa_core_params& p, const Lengths& len, int64_t token, int64_t first,
                 Rows* rows, sfa_core_error* err) {
  const int64_t left = slot_count(p, len) - first;
  Collector collector(p, len, token, rows);
  const int status = collector.run(first, left < kChunk ? left : kChunk, err);
  if (status != SFA_CORE_OK || rows->n == 0) return status;
  for (int i = rows->n; i < rows->n + kRowPad; ++i) {
    rows->nope[i] = rows->nope[rows->n - 1];
    rows->rope[i] = rows->rope[rows->n - 1];
  }
  return SFA_CORE_OK;
}

}  // namespace sfa
