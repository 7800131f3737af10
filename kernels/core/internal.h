// What the pieces of the core share: the geometry of a call, the rows of one key chunk, and the
// table of functions that an instruction-set path fills in.
#ifndef SFA_ONNX_KERNELS_CORE_INTERNAL_H_
#define SFA_ONNX_KERNELS_CORE_INTERNAL_H_

#include <stddef.h>
#include <stdint.h>

#include "sfa_core.h"

namespace sfa {

constexpr int kChunk = SFA_CORE_CHUNK;
constexpr int kMaxHeads = 128;  // heads handled together; more heads are cut into such blocks
constexpr int kRowPad = 32;     // readable pointers past the last row of a chunk

// Everything about a call that a path needs, for one block of heads.
struct Geom {
  int heads;         // 1..kMaxHeads
  int nope;          // width of the latent and of the output
  int rope;          // width of the rotary part, may be 0
  int tile;          // latent columns per scale (int8), else nope
  int query_dtype;   // also the type of rope in packed rows
  int cache_dtype;   // SFA_CORE_I8: packed rows
  int o_stride;      // floats from one head to the next in Partial::o, multiple of 64
  float scale_log2;  // scale_value * log2(e)
  bool rounded;      // int8 * scale is rounded to query_dtype, a 16-bit type
};

// The rows of one chunk. Entries [n, n + kRowPad) repeat the last row so that tiles may be padded.
struct Rows {
  int n;
  const uint8_t* nope[kChunk + kRowPad];
  const uint8_t* rope[kChunk + kRowPad];  // packed rows: the scales follow the rope
};

// Unnormalised result over some keys: o = sum 2^(s - m) v, l = sum 2^(s - m).
struct Partial {
  float* m;  // [heads]
  float* l;  // [heads]
  float* o;  // [heads, o_stride]
};

// One instruction-set path. All functions are re-entrant; `scratch` is 64-byte aligned and keeps
// its content from load_query to the last attend of the same token.
struct Path {
  int id;  // sfa_core_isa_id
  const char* name;
  bool (*supports)(const Geom& g);
  size_t (*scratch_bytes)(const Geom& g);
  // Packs the heads of one query token. Packed op: `query` holds nope | rope and stride counts
  // both; float op: rope comes from `query_rope`.
  void (*load_query)(const Geom& g, const void* query, const void* query_rope, void* scratch);
  // Attention of the loaded token over rows.n >= 1 keys. `next` (may be null) will be read soon;
  // `warm` says that `rows` was announced so.
  void (*attend)(const Geom& g, const Rows& rows, const Rows* next, bool warm, void* scratch,
                 Partial* out);
  // acc = acc + add, both unnormalised.
  void (*merge)(const Geom& g, Partial* acc, const Partial& add);
  // Normalises and converts to query_dtype: out [heads, nope], dense.
  void (*store)(const Geom& g, const Partial& acc, void* out);
};

// A head whose keys are all summed: takes the sink in, writes softmax_max and softmax_sum, and
// leaves in acc->l what its values are to be divided by. Heads [first, first + heads) of a block.
void finish_heads(const sfa_core_params& p, int64_t token, int first, int heads, int o_stride,
                  Partial* acc);
// The same for heads without a key; `visible`: the mask would have let one through.
void finish_empty(const sfa_core_params& p, int64_t token, int first, int heads, bool visible);

inline int dtype_size(int dtype) {
  return dtype == SFA_CORE_F32 ? 4 : dtype == SFA_CORE_I8 ? 1 : 2;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int round_up(int a, int b) { return (a + b - 1) / b * b; }

// Path tables of the files that this build contains.
const Path* scalar_path();
const Path* avx2_path();
const Path* avx512f_path();
const Path* avx512_bf16_path();
const Path* neon_path();
const Path* neon_bf16_path();

// The path for sfa_core_isa_id `id` (AUTO: environment, then best), or null when this machine
// lacks it.
const Path* find_path(int id);
// The path that runs geometry `g` when `path` was chosen: itself, or the next one that can.
const Path* usable_path(const Path* path, const Geom& g);

// All tasks of one piece of work, on the calling thread and up to `threads` - 1 helpers.
void run_tasks(void (*run)(void* context, int64_t task), void* context, int64_t tasks, int threads);

// A process-wide pool of 64-byte aligned buffers.
void* pool_take(size_t bytes);
void pool_give(void* buffer);

int set_error(sfa_core_error* err, int status, const char* what, int64_t value, int64_t limit);

// One validated call; see call.cc.
struct Lengths {
  int64_t act_q, act_kv;  // valid lengths of the batch
  int64_t base_row;       // first cache row of the batch (contiguous layouts)
  int64_t s1;             // position of the token inside its batch
  int64_t batch;
};

// Number of key slots that token looks at (a multiple of sparse_block_size), 0 for an empty row.
int64_t slot_count(const sfa_core_params& p, const Lengths& len);
// The largest slot_count that a token can have.
int64_t longest_row(const sfa_core_params& p);
// Fills `rows` with the usable rows among slots [first, first + kChunk). Nothing is read through
// an unchecked value; on error `err` says why and the status is returned.
int resolve_rows(const sfa_core_params& p, const Lengths& len, int64_t token, int64_t first,
                 Rows* rows, sfa_core_error* err);
// False for a padding row (its output is zero).
bool find_lengths(const sfa_core_params& p, int64_t token, Lengths* len);
int check_params(const sfa_core_params& p, sfa_core_error* err);

// An aligned address where scratch is laid out only to be measured: no arithmetic on null.
inline char* nowhere() { return (char*)64; }

// Pieces of check_params: numbers between bounds; lengths, prefix sums and the width of the table.
struct Range {
  const char* name;
  int64_t value, lo, hi;
};
constexpr int64_t kBig = (int64_t)1 << 40;  // no tensor has so many
constexpr int64_t kInt = (int64_t)1 << 30;
// Whether a * b == total; the product may be beyond 64 bits.
inline bool is_product(int64_t total, int64_t a, int64_t b) {
  int64_t product;
  return !__builtin_mul_overflow(a, b, &product) && product == total;
}
int check_ranges(const Range* ranges, int n, sfa_core_error* err);
int check_lengths(const sfa_core_params& p, sfa_core_error* err);

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_INTERNAL_H_
