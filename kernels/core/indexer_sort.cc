// From the best keys of a row, in any order, to its line of the output.
#include <string.h>

#include "indexer.h"

namespace sfa {
namespace {

constexpr int kMostDigit = 10;  // bits that are sorted by at a time: the counters stay in L1
constexpr int kLeastDigit = 4;
constexpr int kMostTurns = 63 / kMostDigit + 1;

// The inverse of order_of in indexer_select.h.
float score_of(int32_t order) {
  if (order == INT32_MIN + 1) return __builtin_nanf("");
  return bits_f32((uint32_t)(order ^ ((order >> 31) & 0x7fffffff)));
}

int bits_of(uint64_t x) { return x ? 64 - __builtin_clzll(x) : 0; }

// Entries that ascend in score descending, then key: score below the best << key bits | key.
struct Entries {
  uint64_t* at;
  int32_t top;   // the best score's order
  int key_bits;  // of the highest key
  int bits;      // of the largest entry
  bool ordered;  // keys ascend already: a stable sort by score leaves them so

  Entries(const Best& best, uint64_t* memory) : at(memory), ordered(true) {
    int32_t lowest = INT32_MAX, highest_key = 0;
    top = INT32_MIN;
    for (int64_t i = 0; i < best.n; ++i) {
      top = best.order[i] > top ? best.order[i] : top;
      lowest = best.order[i] < lowest ? best.order[i] : lowest;
      highest_key = best.key[i] > highest_key ? best.key[i] : highest_key;
    }
    key_bits = bits_of((uint64_t)highest_key);
    bits = best.n ? key_bits + bits_of((uint64_t)((int64_t)top - lowest)) : 0;
    for (int64_t i = 0; i < best.n; ++i) {
      at[i] = (uint64_t)((int64_t)top - best.order[i]) << key_bits | (uint32_t)best.key[i];
      ordered = ordered && (i == 0 || best.key[i] > best.key[i - 1]);
    }
  }

  int32_t key(int64_t i) const { return (int32_t)(at[i] & (((uint64_t)1 << key_bits) - 1)); }
  int32_t order(int64_t i) const { return (int32_t)(top - (int64_t)(at[i] >> key_bits)); }

  // Sorts the n entries, by digits of one width; `other` has room for them.
  void sort(int64_t n, uint64_t* other) {
    const int first = ordered ? key_bits : 0, wide = bits_of((uint64_t)n);
    const int most = wide > kMostDigit ? kMostDigit : wide < kLeastDigit ? kLeastDigit : wide;
    const int turns = (bits - first + most - 1) / most;
    if (turns == 0) return;
    const int digit = (bits - first + turns - 1) / turns;
    const uint64_t mask = ((uint64_t)1 << digit) - 1;
    int32_t starts[kMostTurns << kMostDigit];
    count(n, first, turns, digit, starts);
    for (int turn = 0; turn < turns; ++turn) {
      int32_t* start = starts + (turn << digit);
      const int shift = first + turn * digit;
      uint64_t *const from = at, *const to = other;
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t entry = from[i];
        to[start[entry >> shift & mask]++] = entry;
      }
      at = to;
      other = from;
    }
  }

 private:
  // Where entries with each digit start, [turns][1 << digit]; all turns are counted together.
  void count(int64_t n, int first, int turns, int digit, int32_t* starts) const {
    const uint64_t mask = ((uint64_t)1 << digit) - 1;
    memset(starts, 0, sizeof *starts * (size_t)turns << digit);
    for (int turn = 0; turn < turns; ++turn) {
      int32_t* const own = starts + (turn << digit);
      const int shift = first + turn * digit;
      for (int64_t i = 0; i < n; ++i) ++own[at[i] >> shift & mask];
    }
    for (int turn = 0; turn < turns; ++turn) {
      int32_t total = 0;
      for (uint64_t x = 0; x <= mask; ++x) {
        int32_t* start = &starts[(turn << digit) + x];
        const int32_t own = *start;
        *start = total;
        total += own;
      }
    }
  }
};

}  // namespace

void write_best(Best* best, int32_t* keys, void* values, int dtype, void* spare) {
  const int64_t n = best->n;
  Entries entries(*best, (uint64_t*)spare);
  entries.sort(n, (uint64_t*)spare + best->want);
  for (int64_t i = 0; i < best->want; ++i) keys[i] = i < n ? entries.key(i) : -1;
  if (!values) return;
  for (int64_t i = 0; i < best->want; ++i) {
    store_from_f32(values, i, dtype, i < n ? score_of(entries.order(i)) : -__builtin_inff());
  }
}

}  // namespace sfa
