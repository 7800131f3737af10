// One attention call: cuts the work into tasks, runs them on a path, merges partial results.
#include <string.h>

#include "internal.h"

struct sfa_core_call {
  sfa_core_params p;
  const sfa::Path* path;
  int32_t block_heads;  // heads per block (the last block may have fewer)
  int32_t blocks;       // blocks of heads
  int64_t chunks;       // chunks of the longest possible row
  bool split;           // tasks are (token, chunk) instead of tokens
  size_t scratch_bytes;
  sfa_core_error error;  // of the lowest token and slot so far
  int32_t lock;          // guards error
  char* partials;        // split only: [tokens, chunks, blocks] partials, then counters
  int32_t* left;         // [tokens] chunks that are not finished
  int32_t* counts;       // [tokens, chunks] keys that a chunk has seen
};

namespace sfa {
namespace {

using Call = sfa_core_call;

constexpr int64_t kSplitTokens = 16;  // fewer query tokens than this are cut along the keys too
constexpr size_t kSplitBytes = (size_t)256 << 20;

size_t align64(size_t n) { return (n + 63) & ~(size_t)63; }

Geom geom_of(const Call& c, int block) {
  const sfa_core_params& p = c.p;
  const int first = block * c.block_heads, left = p.num_heads - first;
  Geom g;
  g.heads = left < c.block_heads ? left : c.block_heads;
  g.nope = p.nope_dim;
  g.rope = p.rope_dim;
  g.tile = p.cache_dtype == SFA_CORE_I8 ? p.tile_size : p.nope_dim;
  g.query_dtype = p.query_dtype;
  g.cache_dtype = p.cache_dtype;
  g.o_stride = round_up(p.nope_dim, 64);
  g.scale_log2 = (float)((double)p.scale_value * 1.4426950408889634);
  g.rounded = p.rounding == SFA_CORE_ROUNDING_NPU && p.cache_dtype == SFA_CORE_I8 &&
              p.query_dtype != SFA_CORE_F32;
  return g;
}

size_t partial_floats(const Geom& g) {
  return 2 * (size_t)round_up(g.heads, 16) + (size_t)g.heads * g.o_stride;
}

Partial partial_at(const Geom& g, float* base) {
  const size_t head_floats = round_up(g.heads, 16);
  return {base, base + head_floats, base + 2 * head_floats};
}

// Scratch of one task: two row lists, two partials, then the path's own.
struct Scratch {
  Rows* rows[2];
  Partial acc, part;
  void* path;
};

size_t task_bytes(const Call& c) {
  const Geom g = geom_of(c, 0);
  return 2 * align64(sizeof(Rows)) + 2 * align64(4 * partial_floats(g)) + c.path->scratch_bytes(g);
}

Scratch lay_out(const Call& c, const Geom& g, char* base) {
  Scratch s;
  for (auto& rows : s.rows) {
    rows = (Rows*)base;
    base += align64(sizeof(Rows));
  }
  s.acc = partial_at(g, (float*)base);
  base += align64(4 * partial_floats(geom_of(c, 0)));
  s.part = partial_at(g, (float*)base);
  s.path = base + align64(4 * partial_floats(geom_of(c, 0)));
  return s;
}

// The partial of one chunk of a split token: one block after the other.
Partial shared_partial(const Call& c, int64_t token, int64_t chunk, int block) {
  const size_t full = align64(4 * partial_floats(geom_of(c, 0)));
  const size_t index = (token * c.chunks + chunk) * c.blocks + block;
  return partial_at(geom_of(c, block), (float*)(c.partials + index * full));
}

void record(Call* c, const sfa_core_error& e) {
  while (__atomic_exchange_n(&c->lock, 1, __ATOMIC_ACQUIRE)) {
  }
  const bool first = c->error.status == SFA_CORE_OK || e.token < c->error.token ||
                     (e.token == c->error.token && e.slot < c->error.slot);
  if (first) c->error = e;
  __atomic_store_n(&c->lock, 0, __ATOMIC_RELEASE);
}

char* out_row(const Call& c, int64_t token, int block) {
  const int64_t head = token * c.p.num_heads + (int64_t)block * c.block_heads;
  return (char*)c.p.out + head * c.p.nope_dim * dtype_size(c.p.query_dtype);
}

// The output of the first `heads` heads of a block, in a row without a key.
void zero_heads(const Call& c, int64_t token, int block, int heads, bool visible) {
  memset(out_row(c, token, block), 0, (size_t)heads * c.p.nope_dim * dtype_size(c.p.query_dtype));
  finish_empty(c.p, token, block * c.block_heads, heads, visible);
}

void store_heads(const Call& c, const Geom& g, int64_t token, int block, Partial* acc) {
  finish_heads(c.p, token, block * c.block_heads, g.heads, g.o_stride, acc);
  c.path->store(g, *acc, out_row(c, token, block));
}

// Slots of a row, and whether its mask would let a key through; sparse_mode 0 always would.
struct Extent {
  Lengths len;
  int64_t slots = 0;
  bool visible = false;

  Extent(const sfa_core_params& p, int64_t token) {
    if (!find_lengths(p, token, &len)) return;
    slots = slot_count(p, len);
    visible = p.sparse_mode == 0 || len.act_kv - len.act_q + len.s1 >= 0;
  }
};

void load_query(const Call& c, const Geom& g, int64_t token, int block, void* scratch) {
  const sfa_core_params& p = c.p;
  const int64_t head = token * p.num_heads + (int64_t)block * c.block_heads;
  const int64_t size = dtype_size(p.query_dtype);
  const bool packed = p.cache_dtype == SFA_CORE_I8;
  const int64_t width = packed ? p.nope_dim + p.rope_dim : p.nope_dim;
  const char* rope =
      p.rope_dim > 0 && !packed ? (const char*)p.query_rope + head * p.rope_dim * size : nullptr;
  c.path->load_query(g, (const char*)p.query + head * width * size, rope, scratch);
}

// All chunks of one token, folded in order.
int run_block(Call* c, int64_t token, const Extent& row, int block, char* memory) {
  const Geom g = geom_of(*c, block);
  const Lengths& len = row.len;
  Scratch s = lay_out(*c, g, memory);
  sfa_core_error err;
  bool any = false, warm = false;
  int status = resolve_rows(c->p, len, token, 0, s.rows[0], &err);
  for (int64_t first = 0, turn = 0; first < row.slots && status == SFA_CORE_OK; ++turn) {
    const Rows& rows = *s.rows[turn & 1];
    Rows* next = s.rows[~turn & 1];
    first += kChunk;
    const bool more = first < row.slots;
    next->n = 0;
    if (more) status = resolve_rows(c->p, len, token, first, next, &err);
    if (status != SFA_CORE_OK || rows.n == 0) continue;
    if (!any) load_query(*c, g, token, block, s.path);
    c->path->attend(g, rows, next->n ? next : nullptr, warm, s.path, any ? &s.part : &s.acc);
    warm = true;
    if (any) c->path->merge(g, &s.acc, s.part);
    any = true;
  }
  if (status != SFA_CORE_OK) {
    record(c, err);
    return status;
  }
  if (any) {
    store_heads(*c, g, token, block, &s.acc);
  } else {
    zero_heads(*c, token, block, g.heads, row.visible);
  }
  return SFA_CORE_OK;
}

int run_token(Call* c, int64_t token, char* memory) {
  const Extent row(c->p, token);
  if (row.slots == 0) {
    zero_heads(*c, token, 0, c->p.num_heads, row.visible);
    return SFA_CORE_OK;
  }
  for (int block = 0; block < c->blocks; ++block) {
    const int status = run_block(c, token, row, block, memory);
    if (status != SFA_CORE_OK) return status;
  }
  return SFA_CORE_OK;
}

// Folds the partials of a split token in chunk order: what run_block does on the way.
void finish_token(Call* c, int64_t token) {
  const int32_t* counts = c->counts + token * c->chunks;
  for (int block = 0; block < c->blocks; ++block) {
    const Geom g = geom_of(*c, block);
    Partial acc = {nullptr, nullptr, nullptr};
    for (int64_t chunk = 0; chunk < c->chunks; ++chunk) {
      if (counts[chunk] == 0) continue;
      const Partial part = shared_partial(*c, token, chunk, block);
      if (acc.m) {
        c->path->merge(g, &acc, part);
      } else {
        acc = part;
      }
    }
    if (acc.m) {
      store_heads(*c, g, token, block, &acc);
    } else {
      zero_heads(*c, token, block, g.heads, Extent(c->p, token).visible);
    }
  }
}

int run_chunk(Call* c, int64_t token, int64_t chunk, char* memory) {
  const Extent row(c->p, token);
  const Lengths& len = row.len;
  int status = SFA_CORE_OK, count = 0;
  if (chunk * kChunk < row.slots) {
    Scratch s = lay_out(*c, geom_of(*c, 0), memory);
    sfa_core_error err;
    status = resolve_rows(c->p, len, token, chunk * kChunk, s.rows[0], &err);
    // Whoever runs the next chunk reports its errors; here its rows are only announced.
    s.rows[1]->n = 0;
    if ((chunk + 1) * kChunk < row.slots) {
      sfa_core_error other;
      if (resolve_rows(c->p, len, token, (chunk + 1) * kChunk, s.rows[1], &other)) s.rows[1]->n = 0;
    }
    const Rows* next = s.rows[1]->n ? s.rows[1] : nullptr;
    if (status != SFA_CORE_OK) {
      record(c, err);
    } else {
      count = s.rows[0]->n;
    }
    for (int block = 0; block < c->blocks && count > 0; ++block) {
      const Geom g = geom_of(*c, block);
      Partial out = shared_partial(*c, token, chunk, block);
      load_query(*c, g, token, block, s.path);
      c->path->attend(g, *s.rows[0], next, false, s.path, &out);
    }
  }
  c->counts[token * c->chunks + chunk] = count;
  if (__atomic_sub_fetch(&c->left[token], 1, __ATOMIC_ACQ_REL) == 0) finish_token(c, token);
  return status;
}

// Cuts heads into equal blocks and decides whether tokens are cut into chunks.
int plan(Call* c, bool may_split, sfa_core_error* err) {
  const sfa_core_params& p = c->p;
  c->blocks = (int32_t)ceil_div(p.num_heads, kMaxHeads);
  c->block_heads = (int32_t)ceil_div(p.num_heads, c->blocks);
  c->path = usable_path(c->path, geom_of(*c, 0));
  c->scratch_bytes = task_bytes(*c);
  c->chunks = ceil_div(longest_row(p), kChunk);
  const size_t part = align64(4 * partial_floats(geom_of(*c, 0))) * c->blocks;
  const size_t partials = part * c->chunks * p.query_t;
  c->split = may_split && c->chunks > 1 && p.query_t < kSplitTokens && partials <= kSplitBytes;
  if (!c->split) return SFA_CORE_OK;
  const size_t counters = 4 * (size_t)p.query_t * (c->chunks + 1);
  c->partials = (char*)pool_take(partials + counters);
  if (!c->partials) return set_error(err, SFA_CORE_NO_MEMORY, "partials", partials, 0);
  c->left = (int32_t*)(c->partials + partials);
  c->counts = c->left + p.query_t;
  for (int64_t t = 0; t < p.query_t; ++t) c->left[t] = (int32_t)c->chunks;
  return SFA_CORE_OK;
}

int begin(const sfa_core_params* params, bool may_split, Call** call, sfa_core_error* err) {
  *call = nullptr;
  set_error(err, SFA_CORE_OK, "", 0, 0);
  if (params->struct_size != sizeof(sfa_core_params)) {
    return set_error(err, SFA_CORE_BAD_PARAM, "struct_size", params->struct_size,
                     sizeof(sfa_core_params));
  }
  int status = check_params(*params, err);
  if (status != SFA_CORE_OK) return status;
  const Path* path = find_path(params->isa);
  if (!path) return set_error(err, SFA_CORE_BAD_ISA, "SFA_ONNX_ISA", params->isa, 0);
  Call* c = (Call*)pool_take(sizeof(Call));
  if (!c) return set_error(err, SFA_CORE_NO_MEMORY, "call", sizeof(Call), 0);
  memset((void*)c, 0, sizeof(Call));
  c->p = *params;
  c->path = path;
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

int sfa_core_begin(const sfa_core_params* params, sfa_core_call** call, sfa_core_error* err) {
  return sfa::begin(params, true, call, err);
}

int64_t sfa_core_num_tasks(const sfa_core_call* call) {
  return call->split ? call->p.query_t * call->chunks : call->p.query_t;
}

int sfa_core_run_task(sfa_core_call* call, int64_t task) {
  char* memory = (char*)sfa::pool_take(call->scratch_bytes);
  if (!memory) {
    sfa_core_error err;
    sfa::set_error(&err, SFA_CORE_NO_MEMORY, "scratch", (int64_t)call->scratch_bytes, 0);
    sfa::record(call, err);
    return SFA_CORE_NO_MEMORY;
  }
  const int status = call->split
                         ? sfa::run_chunk(call, task / call->chunks, task % call->chunks, memory)
                         : sfa::run_token(call, task, memory);
  sfa::pool_give(memory);
  return status;
}

int sfa_core_end(sfa_core_call* call, sfa_core_error* err) {
  const int status = call->error.status;
  if (err) *err = call->error;
  sfa::pool_give(call->partials);
  sfa::pool_give(call);
  return status;
}

int sfa_core_run(const sfa_core_params* params, sfa_core_error* err) {
  sfa_core_call* call;
  const int status = sfa::begin(params, false, &call, err);
  if (status != SFA_CORE_OK) return status;
  const int64_t tasks = sfa_core_num_tasks(call);
  for (int64_t task = 0; task < tasks; ++task) sfa_core_run_task(call, task);
  return sfa_core_end(call, err);
}

}  // extern "C"
