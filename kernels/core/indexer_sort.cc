// From the best keys of a row, in any order, to its line of the output.
#include <string.h>

#include "indexer.h"

namespace sfa {
namespace {

// The inverse of order_of in indexer_select.h.
float score_of(int32_t order) {
  if (order == INT32_MIN + 1) return __builtin_nanf("");
  return bits_f32((uint32_t)(order ^ ((order >> 31) & 0x7fffffff)));
}

// Sorts by the byte of each entry at `shift`, equal ones staying as they are; false when all have
// the same byte and nothing was moved.
bool sort_by_byte(const uint64_t* from, uint64_t* to, int64_t n, int shift) {
  int64_t start[256] = {};
  for (int64_t i = 0; i < n; ++i) ++start[from[i] >> shift & 255];
  if (start[from[0] >> shift & 255] == n) return false;
  int64_t total = 0;
  for (auto& s : start) {
    const int64_t count = s;
    s = total;
    total += count;
  }
  for (int64_t i = 0; i < n; ++i) to[start[from[i] >> shift & 255]++] = from[i];
  return true;
}

}  // namespace

void write_best(Best* best, int32_t* keys, void* values, int dtype, void* spare) {
  const int64_t n = best->n;
  uint64_t* entries = (uint64_t*)spare;
  uint64_t* other = entries + best->want;
  bool ascending = true;
  for (int64_t i = 0; i < n; ++i) {
    // Ascending in this number: descending in the score, then ascending in the key.
    entries[i] = (uint64_t)(~(uint32_t)best->order[i] ^ 0x80000000u) << 32 | (uint32_t)best->key[i];
    ascending = ascending && (i == 0 || best->key[i] > best->key[i - 1]);
  }
  for (int shift = ascending ? 32 : 0; shift < 64 && n > 0; shift += 8) {
    if (!sort_by_byte(entries, other, n, shift)) continue;
    uint64_t* swap = entries;
    entries = other;
    other = swap;
  }
  for (int64_t i = 0; i < best->want; ++i) keys[i] = i < n ? (int32_t)entries[i] : -1;
  if (!values) return;
  for (int64_t i = 0; i < best->want; ++i) {
    const int32_t order = (int32_t)(~(uint32_t)(entries[i < n ? i : 0] >> 32) ^ 0x80000000u);
    store_from_f32(values, i, dtype, i < n ? score_of(order) : -__builtin_inff());
  }
}

}  // namespace sfa
