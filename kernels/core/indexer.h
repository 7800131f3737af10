// What the pieces of the lightning indexer share: the geometry of a call, the best keys of a row so
// far, and the table of functions that an instruction-set path fills in.
#ifndef SFA_ONNX_KERNELS_CORE_INDEXER_H_
#define SFA_ONNX_KERNELS_CORE_INDEXER_H_

#include "half.h"
#include "internal.h"

namespace sfa {

constexpr int kMaxTile = 48;   // keys whose scores exist at a time
constexpr int kBestPad = 64;   // writable entries of Best past `room`
constexpr int kScorePad = 16;  // readable scores past a tile

struct IndexerGeom {
  int heads, width;  // Hi, Di
  int dtype;         // of query and key
  bool half;         // I8: relu / 1024 is rounded to float16
};

// Keys of one tile: addresses (repeated past the last, so that tiles may be padded) and scales.
struct KeyTile {
  int n;
  int64_t first;  // position of the first key in its sequence
  const uint8_t* row[kMaxTile + kRowPad];
  uint16_t scale[kMaxTile + kRowPad];  // I8: float16
};

// The best `want` of the keys seen so far, and some that may still be: a buffer that is cut down to
// `want` when it is full. Scores are kept as integers that compare as scores do (order_of).
struct Best {
  int32_t* order;  // [room + kBestPad], NaN is INT32_MIN + 1
  int32_t* key;    // [room + kBestPad]
  int64_t n, room, want;
  int32_t floor;  // only what lies above it is of interest
  int64_t bound;  // what the last cut has shown, see bound_of
};

constexpr int32_t kNoFloor = INT32_MIN;  // below every score, NaN included

// `want` keys are better than, or as good as, the score `floor` at key `last`: the larger a bound,
// the less it leaves of interest.
constexpr int64_t bound_of(int32_t floor, int32_t last) {
  return (int64_t)((uint64_t)(uint32_t)floor << 32 | (uint32_t)(INT32_MAX - (int64_t)last));
}
constexpr int64_t kNoBound = bound_of(kNoFloor, INT32_MAX);

// What scores of keys from `first` on must lie above.
inline int32_t floor_of(int64_t bound, int64_t first) {
  const int32_t floor = (int32_t)(bound >> 32);
  const int64_t last = INT32_MAX - (int64_t)(uint32_t)bound;
  return floor == kNoFloor || first > last ? floor : floor - 1;
}

// One path for one kind of numbers. All functions are re-entrant.
struct IndexerPath {
  const char* name;
  int tile;  // keys per call of `scores`, at most kMaxTile
  size_t (*scratch_bytes)(const IndexerGeom& g);
  // Packs one query row: query [heads, width], weights [heads] with all scales in them.
  void (*load_query)(const IndexerGeom& g, const void* query, const float* weights, void* scratch);
  // Scores of the tile's keys, out [tile.n + kScorePad]; `ahead` (may be null) will be read soon.
  void (*scores)(const IndexerGeom& g, const KeyTile& tile, const KeyTile* ahead, void* scratch,
                 float* out);
  // Adds keys [first, first + n) to the best.
  void (*collect)(const float* scores, int n, int64_t first, Best* best);
  // Cuts the buffer down to `want` entries: the largest scores, among equal ones the lowest keys.
  void (*keep_best)(Best* best);
  // Adds those of `from` that lie above `floor`; `to` has room for all of them.
  void (*join)(const Best& from, int32_t floor, Best* to);
};

// Path tables of the files that this build contains.
const IndexerPath* indexer_scalar(bool int8);
const IndexerPath* indexer_avx2(bool int8);
const IndexerPath* indexer_avx512f(bool int8);
const IndexerPath* indexer_avx512_vnni();  // int8
const IndexerPath* indexer_avx512_bf16();  // bfloat16
const IndexerPath* indexer_neon(bool int8);
const IndexerPath* indexer_neon_dot();   // int8
const IndexerPath* indexer_neon_bf16();  // bfloat16

// The path for numbers of `dtype` when sfa_core_isa_id `id` was chosen (see find_path).
const IndexerPath* indexer_path(int id, int dtype);

int check_indexer(const sfa_core_indexer_params& p, sfa_core_params* sequences,
                  sfa_core_error* err);

// Sorts the best (at most `want`) and writes one row: keys and, where `values` is not null, scores
// as `dtype`; then -1 and -infinity. `spare` has room for 2 * want entries of 8 bytes.
void write_best(Best* best, int32_t* keys, void* values, int dtype, void* spare);

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_INDEXER_H_
