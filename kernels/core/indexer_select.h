// Keeping the best keys of a row: an exact, streaming top-k in O(k) memory.
//
// Scores go past in tiles; what lies above the floor is appended to a buffer of several times k.
// When that is full, the k-th largest is found by narrowing the range of scores and counting, the
// buffer is cut down to k, and the floor rises. Of n scores in random order only about
// k log(n / k) are ever stored. Needs simd::bits (lane mask to integer) and simd::append.
#ifndef SFA_ONNX_KERNELS_CORE_INDEXER_SELECT_H_
#define SFA_ONNX_KERNELS_CORE_INDEXER_SELECT_H_

#include "indexer.h"
#include "indexer_path.h"
#include "vec.h"

namespace sfa {
namespace {

inline vi loadi(const int32_t* p) {
  vi v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void storei(int32_t* p, vi v) { memcpy(p, &v, sizeof v); }
inline vi splati(int32_t x) { return x - vi{}; }

inline vi iota() {
  vi v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

// Integers in the order of the scores: NaN first, then -infinity; -0 is +0.
inline vi order_of(vf score) {
  const vi bits = (vi)(score + vf{});
  const vi order = bits ^ ((bits >> 31) & 0x7fffffff);
  return score == score ? order : splati(INT32_MIN + 1);
}

inline int64_t sum(vi v) {
  int64_t total = 0;
  for (int i = 0; i < W; ++i) total += v[i];
  return total;
}

// Entries whose order exceeds `mid`.
int64_t count_above(const Best& b, int32_t mid) {
  const vi limit = splati(mid);
  vi c0 = {}, c1 = {};
  int64_t i = 0, tail = 0;
  for (; i + 2 * W <= b.n; i += 2 * W) {
    c0 -= loadi(b.order + i) > limit;
    c1 -= loadi(b.order + i + W) > limit;
  }
  for (; i < b.n; ++i) tail += b.order[i] > mid;
  return sum(c0 + c1) + tail;
}

// Entries that equal `order` and whose key is at most `key`.
int64_t count_equal(const Best& b, int32_t order, int32_t key) {
  vi count = {};
  int64_t i = 0, tail = 0;
  for (; i + W <= b.n; i += W) {
    count -= (loadi(b.order + i) == splati(order)) & (loadi(b.key + i) <= splati(key));
  }
  for (; i < b.n; ++i) tail += b.order[i] == order && b.key[i] <= key;
  return sum(count) + tail;
}

void bounds(const Best& b, int32_t* low, int32_t* high) {
  *low = INT32_MAX;
  *high = INT32_MIN;
  for (int64_t i = 0; i < b.n; ++i) {
    *low = b.order[i] < *low ? b.order[i] : *low;
    *high = b.order[i] > *high ? b.order[i] : *high;
  }
}

// Keeps what lies above `floor`, and of what equals it the keys up to `last`.
void cut(Best* b, int32_t floor, int32_t last) {
  const vi limit = splati(floor), last_key = splati(last);
  int32_t *const orders = b->order, *const keys = b->key;
  const int64_t n = b->n;
  int64_t end = 0;
  for (int64_t i = 0; i < n; i += W) {
    const vi order = loadi(orders + i), key = loadi(keys + i);
    vi take = (order > limit) | ((order == limit) & (key <= last_key));
    if (n - i < W) take &= iota() < splati((int32_t)(n - i));
    // Never writes past i + W: no entry is overwritten before it was read.
    end = simd::append(order, key, take, simd::bits(take), orders, keys, end);
  }
  b->n = end;
  b->floor = floor;
  b->bound = bound_of(floor, last);
}

// A key such that `count` of the entries that equal `order` are at or before it.
int32_t last_of_equal(const Best& b, int32_t order, int64_t count) {
  int64_t low = INT32_MAX, high = 0, few = 0, many = 0;  // entries before low, and up to high
  for (int64_t i = 0; i < b.n; ++i) {
    const bool equal = b.order[i] == order;
    low = equal && b.key[i] < low ? b.key[i] : low;
    high = equal && b.key[i] > high ? b.key[i] : high;
    many += equal;
  }
  bool halve = false;
  while (many > count) {
    const int64_t span = high - low;
    const double share = halve ? 0.5 : (double)(count - few) / (double)(many - few);
    const int64_t step = (int64_t)((double)span * share),
                  mid = low + (step < span ? step : span - 1);
    const int64_t upto = count_equal(b, order, (int32_t)mid);
    if (upto >= count) {
      high = mid;
      many = upto;
    } else {
      low = mid + 1;
      few = upto;
    }
    halve = 2 * (high - low) > span;
  }
  return (int32_t)high;
}

void keep_best(Best* b) {
  if (b->n <= b->want) return;
  int32_t lowest, highest;
  bounds(*b, &lowest, &highest);
  int64_t low = lowest, high = highest;  // the want-th largest lies in [low, high]
  int64_t many = b->n, few = 0;          // at or above low, above high
  bool halve = false;
  while (low < high) {
    // Where the count would pass `want` if it fell evenly; after a step that gained little, half.
    const int64_t span = high - low;
    const double share = halve ? 0.5 : (double)(many - b->want) / (double)(many - few);
    const int64_t step = (int64_t)((double)span * share),
                  mid = low + (step < span ? step : span - 1);
    const int64_t above = count_above(*b, (int32_t)mid);
    if (above == b->want) {
      cut(b, (int32_t)mid, -1);
      return;
    }
    if (above < b->want) {
      high = mid;
      few = above;
    } else {
      low = mid + 1;
      many = above;
    }
    halve = 2 * (high - low) > span;
  }
  const int32_t order = (int32_t)low;
  const int64_t equal = b->want - count_above(*b, order);
  cut(b, order, last_of_equal(*b, order, equal));
}

void collect(const float* scores, int n, int64_t first, Best* b) {
  if (b->n + n > b->room) keep_best(b);
  const vi floor = splati(b->floor);
  int32_t *const orders = b->order, *const keys = b->key;
  int64_t end = b->n;  // not in memory: what is stored might change it, as the compiler sees it
  for (int i = 0; i < n; i += W) {
    const vi order = order_of(loadu(scores + i));
    vi take = order > floor;
    if (n - i < W) take &= iota() < splati(n - i);
    const vi key = iota() + splati((int32_t)(first + i));
    end = simd::append(order, key, take, simd::bits(take), orders, keys, end);
  }
  b->n = end;
}

void join(const Best& from, int32_t floor, Best* to) {
  const vi limit = splati(floor);
  const int32_t *const orders = from.order, *const keys = from.key;
  const int64_t n = from.n;
  int64_t end = to->n;
  for (int64_t i = 0; i < n; i += W) {
    const vi order = loadi(orders + i), key = loadi(keys + i);
    vi take = order > limit;
    if (n - i < W) take &= iota() < splati((int32_t)(n - i));
    end = simd::append(order, key, take, simd::bits(take), to->order, to->key, end);
  }
  to->n = end;
}

template <class D>
constexpr IndexerPath indexer_table(const char* name) {
  return {name, D::kTile, scratch_bytes<D>, load_query<D>, scores<D>, collect, keep_best, join};
}

}  // namespace
}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_INDEXER_SELECT_H_
