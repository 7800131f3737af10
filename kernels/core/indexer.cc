// One indexer call: rows, or pieces of rows, are scored and their best keys kept.
//
// A row on its own is one task. Few rows are also cut along the keys: each piece keeps its own best
// and adds them to the row's under a lock; the last one writes the row. Scores and keys have a
// total order, so the best sparse_count are the same whoever finds them, and a piece may leave out
// what other pieces have already beaten.
#include "indexer.h"

#include <string.h>

namespace sfa {
namespace {

constexpr int64_t kSplitRows = 16;    // fewer rows than this are also cut along the keys
constexpr int64_t kPiece = 4096;      // keys per piece
constexpr int64_t kLeastRoom = 4096;  // entries of a buffer of candidates

// The best of a row that several tasks work on.
struct SharedBest {
  Best best;
  int64_t bound;  // the largest that any piece has found
  int32_t lock;
  int32_t left;  // pieces that are not finished
};

size_t align64(size_t n) { return (n + 63) & ~(size_t)63; }
size_t best_bytes(int64_t room) { return 2 * align64(4 * (room + kBestPad)); }

void place_best(Best* best, int64_t room, int64_t want, char* memory) {
  *best = {(int32_t*)memory, (int32_t*)(memory + best_bytes(room) / 2), 0, room, want, kNoFloor,
           kNoBound};
}

}  // namespace
}  // namespace sfa

struct sfa_core_indexer_call {
  sfa_core_indexer_params p;
  sfa_core_params sequences;  // what the functions for lengths and tables take
  const sfa::IndexerPath* path;
  sfa::IndexerGeom geom;
  int64_t pieces;  // per row
  int64_t room;    // of a buffer of candidates
  size_t task_bytes;
  sfa_core_error error;     // of the lowest row and column so far
  int32_t lock;             // guards error
  sfa::SharedBest* shared;  // [query_t] when pieces > 1
};

namespace sfa {
namespace {

using Call = sfa_core_indexer_call;

void enter(int32_t* lock) {
  while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE)) {
  }
}
void leave(int32_t* lock) { __atomic_store_n(lock, 0, __ATOMIC_RELEASE); }

void record(Call* c, const sfa_core_error& e) {
  enter(&c->lock);
  const bool first = c->error.status == SFA_CORE_OK || e.token < c->error.token ||
                     (e.token == c->error.token && e.slot < c->error.slot);
  if (first) c->error = e;
  leave(&c->lock);
}

// Memory of one task.
struct Scratch {
  KeyTile* tiles[2];
  float* scores;
  float* weights;
  Best best;
  void* spare;
  void* path;
  size_t bytes;

  Scratch(const Call& c, char* base) {
    char* at = base;
    const auto take = [&at](size_t n) {
      char* p = at;
      at += align64(n);
      return p;
    };
    for (auto& tile : tiles) tile = (KeyTile*)take(sizeof(KeyTile));
    scores = (float*)take(4 * (kMaxTile + kScorePad));
    weights = (float*)take(4 * (size_t)c.p.num_heads);
    place_best(&best, c.room, c.p.sparse_count, take(best_bytes(c.room)));
    spare = take(16 * (size_t)c.p.sparse_count);
    path = take(c.path->scratch_bytes(c.geom));
    bytes = (size_t)(at - base);
  }
};

int bad_block(const Call& c, const Lengths& len, int64_t row, int64_t column, int32_t block,
              sfa_core_error* err) {
  set_error(err, SFA_CORE_BAD_BLOCK, "block_table", block, c.p.block_num);
  err->batch = (int32_t)len.batch;
  err->token = row;
  err->slot = column;
  return err->status;
}

// Addresses of keys [first, first + n) of the row's sequence.
int resolve_tile(const Call& c, const Lengths& len, int64_t row, int64_t first, int n,
                 KeyTile* tile, sfa_core_error* err) {
  const sfa_core_indexer_params& p = c.p;
  const int64_t bytes = (int64_t)p.head_dim * dtype_size(p.dtype);
  const bool paged = p.layout_key == SFA_CORE_PA_BSND;
  tile->n = n;
  tile->first = first;
  for (int i = 0; i < n;) {
    int64_t at = len.base_row + first + i, run = n - i;
    if (paged) {
      const int64_t column = (first + i) / p.block_size, offset = (first + i) % p.block_size;
      const int32_t block = p.block_table[len.batch * p.block_table_cols + column];
      if (block < 0 || block >= p.block_num) return bad_block(c, len, row, column, block, err);
      at = block * p.block_size + offset;
      if (run > p.block_size - offset) run = p.block_size - offset;
    }
    const uint8_t* key = (const uint8_t*)p.key + at * bytes;
    for (int64_t j = 0; j < run; ++j) tile->row[i + j] = key + j * bytes;
    if (p.dtype == SFA_CORE_I8) memcpy(tile->scale + i, p.key_scale + at, 2 * run);
    i += (int)run;
  }
  if (n == c.path->tile) return SFA_CORE_OK;  // no padding
  for (int i = n; i < n + kRowPad; ++i) tile->row[i] = tile->row[n - 1];
  return SFA_CORE_OK;
}

void load_row(const Call& c, int64_t row, Scratch* s) {
  const sfa_core_indexer_params& p = c.p;
  const int64_t head = row * p.num_heads;
  for (int i = 0; i < p.num_heads; ++i) {
    float w = load_as_f32(p.weights, head + i, p.weights_dtype);
    if (p.dtype == SFA_CORE_I8) w *= load_as_f32(p.query_scale, head + i, SFA_CORE_F16);
    s->weights[i] = c.geom.half ? f16_f32(f32_f16(w)) : w;
  }
  const char* query = (const char*)p.query + head * p.head_dim * dtype_size(p.dtype);
  c.path->load_query(c.geom, query, s->weights, s->path);
}

// Scores keys [first, last) of a row and leaves their best in s->best. `shared` (may be null) is
// asked what other pieces have found.
int score_keys(const Call& c, const Lengths& len, int64_t row, int64_t first, int64_t last,
               const SharedBest* shared, Scratch* s, sfa_core_error* err) {
  const auto resolve = [&](int64_t from, KeyTile* tile) {
    const int n = (int)(last - from < c.path->tile ? last - from : c.path->tile);
    return resolve_tile(c, len, row, from, n, tile, err);
  };
  int status = resolve(first, s->tiles[0]);
  for (int turn = 0; first < last && status == SFA_CORE_OK; ++turn) {
    const KeyTile& tile = *s->tiles[turn & 1];
    KeyTile* ahead = s->tiles[~turn & 1];
    const int64_t next = first + tile.n;
    if (next < last) status = resolve(next, ahead);
    if (status != SFA_CORE_OK) return status;
    c.path->scores(c.geom, tile, next < last ? ahead : nullptr, s->path, s->scores);
    if (shared) {
      const int32_t floor = floor_of(__atomic_load_n(&shared->bound, __ATOMIC_RELAXED), first);
      if (floor > s->best.floor) s->best.floor = floor;
    }
    c.path->collect(s->scores, tile.n, first, &s->best);
    first = next;
  }
  if (status == SFA_CORE_OK) c.path->keep_best(&s->best);
  return status;
}

void write_row(const Call& c, int64_t row, Best* best, void* spare) {
  const int dtype = c.p.dtype == SFA_CORE_I8 ? SFA_CORE_F32 : c.p.dtype;
  const int64_t at = row * c.p.sparse_count;
  char* values = (char*)c.p.sparse_values;
  if (values) values += at * dtype_size(dtype);
  write_best(best, c.p.sparse_indices + at, values, dtype, spare);
}

int64_t visible_keys(const Call& c, int64_t row, Lengths* len) {
  return find_lengths(c.sequences, row, len) ? slot_count(c.sequences, *len) : 0;
}

int run_row(Call* c, int64_t row, Scratch* s) {
  Lengths len;
  const int64_t keys = visible_keys(*c, row, &len);
  if (keys > 0) {
    sfa_core_error err;
    load_row(*c, row, s);
    const int status = score_keys(*c, len, row, 0, keys, nullptr, s, &err);
    if (status != SFA_CORE_OK) {
      record(c, err);
      return status;
    }
  }
  write_row(*c, row, &s->best, s->spare);
  return SFA_CORE_OK;
}

void raise_bound(const Best& best, SharedBest* shared) {
  if (best.bound > shared->bound) {
    __atomic_store_n(&shared->bound, best.bound, __ATOMIC_RELAXED);
  }
}

// Adds the best of a piece, whose keys ascend, to those of the row.
void add_best(const IndexerPath& path, const Best& piece, SharedBest* shared) {
  if (piece.n == 0) return;
  Best* best = &shared->best;
  enter(&shared->lock);
  raise_bound(piece, shared);
  if (best->n + piece.n > best->room) {
    path.keep_best(best);
    raise_bound(*best, shared);
  }
  path.join(piece, floor_of(shared->bound, piece.key[0]), best);
  leave(&shared->lock);
}

int run_piece(Call* c, int64_t row, int64_t piece, Scratch* s) {
  Lengths len;
  SharedBest* shared = &c->shared[row];
  const int64_t keys = visible_keys(*c, row, &len), first = piece * kPiece;
  const int64_t last = first + kPiece < keys ? first + kPiece : keys;
  int status = SFA_CORE_OK;
  if (first < last) {
    sfa_core_error err;
    load_row(*c, row, s);
    status = score_keys(*c, len, row, first, last, shared, s, &err);
    if (status == SFA_CORE_OK) {
      add_best(*c->path, s->best, shared);
    } else {
      record(c, err);
    }
  }
  if (__atomic_sub_fetch(&shared->left, 1, __ATOMIC_ACQ_REL) == 0) {
    c->path->keep_best(&shared->best);
    write_row(*c, row, &shared->best, s->spare);
  }
  return status;
}

int make_shared(Call* c, sfa_core_error* err) {
  // Room for the best and those of one more piece: the sooner it is full, the sooner pieces learn
  // what no longer counts.
  const int64_t rows = c->p.query_t, want = c->p.sparse_count;
  const int64_t room = c->room < 2 * want ? c->room : 2 * want;
  const size_t head = align64(sizeof(SharedBest) * rows), each = best_bytes(room);
  char* memory = (char*)pool_take(head + each * rows);
  if (!memory) {
    return set_error(err, SFA_CORE_NO_MEMORY, "best keys", (int64_t)(head + each * rows), 0);
  }
  c->shared = (SharedBest*)memory;
  for (int64_t row = 0; row < rows; ++row) {
    SharedBest* shared = &c->shared[row];
    place_best(&shared->best, room, want, memory + head + each * row);
    shared->lock = 0;
    shared->bound = kNoBound;
    shared->left = (int32_t)c->pieces;
  }
  return SFA_CORE_OK;
}

int plan(Call* c, bool may_split, sfa_core_error* err) {
  const sfa_core_indexer_params& p = c->p;
  c->geom = {p.num_heads, p.head_dim, p.dtype,
             p.dtype == SFA_CORE_I8 && p.rounding == SFA_CORE_ROUNDING_NPU};
  const int64_t longest = longest_row(c->sequences), want = p.sparse_count;
  // Four times what is wanted, but never more than there are keys.
  const int64_t room = 4 * want > kLeastRoom ? 4 * want : kLeastRoom;
  const int64_t enough = (longest < want ? want : longest) + kMaxTile;
  c->room = room < enough ? room : enough;
  c->pieces = ceil_div(longest, kPiece);
  if (!may_split || p.query_t >= kSplitRows || c->pieces < 1) c->pieces = 1;
  c->task_bytes = Scratch(*c, nowhere()).bytes;
  return c->pieces > 1 ? make_shared(c, err) : SFA_CORE_OK;
}

int begin(const sfa_core_indexer_params* params, bool may_split, Call** call, sfa_core_error* err) {
  *call = nullptr;
  set_error(err, SFA_CORE_OK, "", 0, 0);
  if (params->struct_size != sizeof(sfa_core_indexer_params)) {
    return set_error(err, SFA_CORE_BAD_PARAM, "struct_size", params->struct_size,
                     sizeof(sfa_core_indexer_params));
  }
  sfa_core_params sequences;
  int status = check_indexer(*params, &sequences, err);
  if (status != SFA_CORE_OK) return status;
  const Path* path = find_path(params->isa);
  if (!path) return set_error(err, SFA_CORE_BAD_ISA, "SFA_ONNX_ISA", params->isa, 0);
  Call* c = (Call*)pool_take(sizeof(Call));
  if (!c) return set_error(err, SFA_CORE_NO_MEMORY, "call", sizeof(Call), 0);
  memset((void*)c, 0, sizeof(Call));
  c->p = *params;
  c->sequences = sequences;
  c->path = indexer_path(path->id, params->dtype);
  set_error(&c->error, SFA_CORE_OK, "", 0, 0);
  status = plan(c, may_split, err);
  if (status != SFA_CORE_OK) {
    pool_give(c);
    return status;
  }
  *call = c;
  return SFA_CORE_OK;
}

}  // namespace
}  // namespace sfa

extern "C" {

int sfa_core_indexer_begin(const sfa_core_indexer_params* params, sfa_core_indexer_call** call,
                           sfa_core_error* err) {
  return sfa::begin(params, true, call, err);
}

int64_t sfa_core_indexer_num_tasks(const sfa_core_indexer_call* call) {
  return call->p.query_t * call->pieces;
}

int sfa_core_indexer_run_task(sfa_core_indexer_call* call, int64_t task) {
  char* memory = (char*)sfa::pool_take(call->task_bytes);
  if (!memory) {
    sfa_core_error err;
    sfa::set_error(&err, SFA_CORE_NO_MEMORY, "scratch", (int64_t)call->task_bytes, 0);
    sfa::record(call, err);
    return SFA_CORE_NO_MEMORY;
  }
  sfa::Scratch scratch(*call, memory);
  const int status = call->pieces > 1
                         ? sfa::run_piece(call, task / call->pieces, task % call->pieces, &scratch)
                         : sfa::run_row(call, task, &scratch);
  sfa::pool_give(memory);
  return status;
}

int sfa_core_indexer_end(sfa_core_indexer_call* call, sfa_core_error* err) {
  const int status = call->error.status;
  if (err) *err = call->error;
  sfa::pool_give(call->shared);
  sfa::pool_give(call);
  return status;
}

int sfa_core_indexer_run(const sfa_core_indexer_params* params, sfa_core_error* err) {
  sfa_core_indexer_call* call;
  const int status = sfa::begin(params, false, &call, err);
  if (status != SFA_CORE_OK) return status;
  const int64_t tasks = sfa_core_indexer_num_tasks(call);
  for (int64_t task = 0; task < tasks; ++task) sfa_core_indexer_run_task(call, task);
  return sfa_core_indexer_end(call, err);
}

}  // extern "C"
