#include "sequence_checks.h"

namespace sfa {
namespace {

typedef long long ll;

}  // namespace

Message* ShapeChecks::About(const Tensor& t) const {
  error_->Add("input %s: shape ", t.name);
  error_->AddShape(t.dims, t.rank);
  error_->Add(": ");
  return error_;
}

bool ShapeChecks::Rank(const Tensor& t, size_t rank, const char* expected) const {
  return t.rank == rank ||
         About(t)->Add("expected %zu dimensions %s, got %zu", rank, expected, t.rank);
}

bool ShapeChecks::Dim(const Tensor& t, size_t axis, int64_t expected, const char* meaning) const {
  return t.dims[axis] == expected || About(t)->Add("expected %lld in dimension %zu (%s), got %lld",
                                                   ll(expected), axis, meaning, ll(t.dims[axis]));
}

bool ShapeChecks::Need(const Tensor& t, const char* why) const {
  return t.present || error_->Add("input %s: expected, because %s, but it is absent", t.name, why);
}

bool ShapeChecks::Forbid(const Tensor& t, const char* why) const {
  return !t.present || About(t)->Add("expected to be absent: %s", why);
}

bool ShapeChecks::FitsInt32(const Tensor& t) const {
  for (size_t i = 0; i < t.rank; ++i) {
    if (t.dims[i] > INT32_MAX) return About(t)->Add("dimension %zu is above 2^31-1", i);
  }
  return true;
}

bool ShapeChecks::Leading(const Tensor& t, size_t rank, const Tensor& like) const {
  if (!Rank(t, rank, like.name)) return false;
  for (size_t i = 0; i < rank && i + 1 < like.rank; ++i) {
    if (!Dim(t, i, like.dims[i], like.name)) return false;
  }
  return true;
}

bool SequenceChecks::Query(const Tensor& query, const char* bsnd, const char* tnd) {
  if (!Rank(query, token_query_ ? 3 : 4, token_query_ ? tnd : bsnd) || !FitsInt32(query)) {
    return false;
  }
  sizes.query_s = token_query_ ? 0 : query.dims[1];
  sizes.query_t = token_query_ ? query.dims[0] : query.dims[0] * query.dims[1];
  sizes.batch = token_query_ ? 0 : query.dims[0];  // TND: number of lengths
  return true;
}

bool SequenceChecks::Lengths(const Tensor& query, const Tensor& key) {
  if (token_query_ && !Need(query, "layout_query is TND")) return false;
  if (layout_key_ != SFA_CORE_BSND && !key.present) {
    return error_->Add("input %s: expected, because %s is %s, but it is absent", key.name,
                       layout_name_, paged() ? "PA_BSND" : "TND");
  }
  if (query.present && !Rank(query, 1, "[B]")) return false;
  if (token_query_) {
    sizes.batch = query.dims[0];
    if (query.dims[0] == 0) return About(query)->Add("expected at least one sequence");
  }
  if (query.present && !Dim(query, 0, sizes.batch, "batch")) return false;
  return !key.present || (Rank(key, 1, "[B]") && Dim(key, 0, sizes.batch, "batch"));
}

bool SequenceChecks::KeyShape(const Tensor& t) const {
  const bool tnd = layout_key_ == SFA_CORE_TND;
  char expected[96];
  snprintf(expected, sizeof expected, "%s (%s %s)",
           tnd       ? "[T2,1,D]"
           : paged() ? "[block_num,block_size,1,D]"
                     : "[B,S2,1,D]",
           layout_name_,
           tnd       ? "TND"
           : paged() ? "PA_BSND"
                     : "BSND");
  if (!Rank(t, tnd ? 3 : 4, expected) || !FitsInt32(t)) return false;
  if (!Dim(t, t.rank - 2, 1, "one key head for all query heads")) return false;
  return tnd || paged() || Dim(t, 0, sizes.batch, "batch, as the query's");
}

bool SequenceChecks::Key(const Tensor& key) {
  if (!KeyShape(key)) return false;
  sizes.key_s = paged() ? 0 : key.dims[key.rank - 3];
  sizes.block_num = paged() ? key.dims[0] : 0;
  sizes.block_size = paged() ? key.dims[1] : 0;
  return !paged() || sizes.block_size > 0 || About(key)->Add("expected pages of at least one row");
}

bool SequenceChecks::BlockTable(const Tensor& table) {
  if (!paged()) {
    return !table.present ||
           About(table)->Add("expected to be absent: only %s PA_BSND has pages", layout_name_);
  }
  if (!table.present) {
    return error_->Add("input %s: expected, because %s is PA_BSND, but it is absent", table.name,
                       layout_name_);
  }
  if (!Rank(table, 2, "[B,pages per sequence]")) return false;
  sizes.block_table_cols = table.dims[1];
  if (table.dims[1] == 0) return About(table)->Add("expected at least one page per sequence");
  return Dim(table, 0, sizes.batch, "batch");
}

}  // namespace sfa
