// C ABI of the sparse-MLA attention core. No framework type appears here: the ONNX Runtime
// binding, ctypes tests and benchmarks all call the same functions.
//
// One attention call:
//
//   sfa_core_params p = {.struct_size = sizeof p, ...};
//   sfa_core_call* call;  sfa_core_error err;
//   int st = sfa_core_begin(&p, &call, &err);            // checks scalars, lengths, tables
//   if (st == SFA_CORE_OK) {
//     for (int64_t t = 0; t < sfa_core_num_tasks(call); ++t)  // any threads, any order
//       sfa_core_run_task(call, t);
//     st = sfa_core_end(call, &err);                      // always, also after an error
//   }
//
// Work is cut into fixed chunks of SFA_CORE_CHUNK key slots whose partial results are merged in
// chunk order whoever computes them, so the output depends on neither thread count, task order nor
// batch composition. All tensors are dense, row-major and need no alignment. Scratch comes from a
// process-wide pool inside the core: nothing is allocated once it is warm.
//
// Who checks what. The caller checks shapes, ranks, dtypes and attribute values of its framework
// and passes sizes that describe the memory truly. The core checks every *value* it reads
// (lengths, prefix sums, block table entries, sparse indices) before it forms an address.
#ifndef SFA_ONNX_KERNELS_CORE_SFA_CORE_H_
#define SFA_ONNX_KERNELS_CORE_SFA_CORE_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SFA_CORE_API __attribute__((visibility("default")))
#else
#define SFA_CORE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { SFA_CORE_CHUNK = 512 };  // key slots per partial result

typedef enum sfa_core_dtype {
  SFA_CORE_F32 = 0,
  SFA_CORE_F16 = 1,
  SFA_CORE_BF16 = 2,
  SFA_CORE_I8 = 3,
} sfa_core_dtype;

typedef enum sfa_core_layout {
  SFA_CORE_BSND = 0,
  SFA_CORE_TND = 1,
  SFA_CORE_PA_BSND = 2,  // key/value side only
} sfa_core_layout;

// What to do with a negative index that a usable one follows among the slots looked at.
typedef enum sfa_core_holes {
  SFA_CORE_HOLES_ERROR = 0,
  SFA_CORE_HOLES_SKIP = 1,  // leave the negative entries out
  SFA_CORE_HOLES_STOP = 2,  // the first negative entry ends the row
} sfa_core_holes;

// What becomes of int8 * scale of packed rows before it meets query and weights.
typedef enum sfa_core_rounding {
  SFA_CORE_ROUNDING_EXACT = 0,  // nothing
  SFA_CORE_ROUNDING_NPU = 1,    // rounded to query_dtype as CANN's kernel does: bfloat16 ties to
                                // even, float16 ties away from zero, float32 not at all
} sfa_core_rounding;

typedef enum sfa_core_isa_id {
  SFA_CORE_ISA_AUTO = 0,  // SFA_ONNX_ISA when set, else the best path of this machine
  SFA_CORE_ISA_SCALAR = 1,
  SFA_CORE_ISA_AVX2 = 2,
  SFA_CORE_ISA_AVX512F = 3,
  SFA_CORE_ISA_AVX512_BF16 = 4,
  SFA_CORE_ISA_NEON = 5,
  SFA_CORE_ISA_NEON_BF16 = 6,
} sfa_core_isa_id;

typedef enum sfa_core_status {
  SFA_CORE_OK = 0,
  SFA_CORE_BAD_PARAM = 1,         // field `what` is out of its range: value, limit
  SFA_CORE_NO_MEMORY = 2,         // value = bytes asked for
  SFA_CORE_BAD_ISA = 3,           // SFA_ONNX_ISA (or params.isa) names no path this machine has
  SFA_CORE_BAD_SEQ_Q = 4,         // actual_seq_lengths_query[batch] = value, allowed <= limit
  SFA_CORE_BAD_SEQ_KV = 5,        // actual_seq_lengths_kv[batch] = value, allowed <= limit
  SFA_CORE_SEQ_Q_DECREASES = 6,   // prefix sum of batch = value, previous = limit
  SFA_CORE_SEQ_KV_DECREASES = 7,  // prefix sum of batch = value, previous = limit
  SFA_CORE_TABLE_TOO_SHORT = 8,   // batch needs `value` block_table columns, has `limit`
  SFA_CORE_BAD_BLOCK = 9,    // block_table[batch][slot] = value, allowed [0, limit); token needs it
  SFA_CORE_INDEX_HOLE = 10,  // sparse_indices[token][slot] = value is usable after a negative one
                             // at slot `limit`
  SFA_CORE_BAD_SLOT = 11,    // slot_mapping[slot] = value, the cache has `limit` rows
} sfa_core_status;

typedef struct sfa_core_error {
  int32_t status;    // sfa_core_status
  int32_t batch;     // -1 when it does not apply
  int64_t token;     // row of query (b*S1+s1 or packed t), -1 when it does not apply
  int64_t slot;      // entry of sparse_indices or column of block_table, -1 when it does not apply
  int64_t value;     // the offending value
  int64_t limit;     // what it was compared with
  const char* what;  // static text: name of the field or tensor, never NULL after an error
} sfa_core_error;

// One call of NPUSparseFlashAttentionAntiquant (cache_dtype I8) or NPUSparseFlashAttention.
typedef struct sfa_core_params {
  uint32_t struct_size;  // sizeof(sfa_core_params)
  int32_t isa;           // sfa_core_isa_id
  int32_t query_dtype;   // F32 | F16 | BF16; also the type of out and of rope in packed rows
  int32_t cache_dtype;   // I8: packed rows; F32 | F16 | BF16: float latent (+ rope) cache
  int32_t layout_query;  // BSND | TND
  int32_t layout_kv;     // BSND | TND | PA_BSND
  int32_t sparse_mode;   // 0 | 3
  int32_t holes;         // sfa_core_holes
  float scale_value;
  int32_t reserved;  // 0

  int32_t num_heads;          // N1 >= 1
  int32_t nope_dim;           // width of the latent and of the output, >= 1
  int32_t rope_dim;           // >= 0
  int32_t tile_size;          // I8: latent columns per scale, divides nope_dim; else ignored
  int32_t sparse_block_size;  // tokens per index, >= 1
  int32_t sparse_count;       // K, entries per query token, >= 0

  int64_t batch;             // B
  int64_t query_s;           // S1 (BSND); ignored for TND
  int64_t query_t;           // number of query rows: B*S1 (BSND) or T (TND)
  int64_t kv_s;              // S2 (BSND) or T2 (TND: total rows); ignored for PA_BSND
  int64_t block_num;         // PA_BSND: pages in the cache
  int64_t block_size;        // PA_BSND: rows per page
  int64_t block_table_cols;  // PA_BSND: columns of block_table

  const void* query;              // I8: [query_t, N1, nope+rope]; float cache: [query_t, N1, nope]
  const void* query_rope;         // float cache: [query_t, N1, rope], NULL when rope_dim is 0
  const void* key;                // I8: packed rows [rows, D] with D = sfa_core_row_bytes(...);
                                  // float cache: [rows, nope]
  const void* key_rope;           // float cache: [rows, rope], NULL when rope_dim is 0
  const int32_t* sparse_indices;  // [query_t, K]
  const int32_t* block_table;     // [B, block_table_cols], PA_BSND only
  const int32_t* actual_seq_lengths_query;  // [B] or NULL (BSND: S1); TND: prefix sums, required
  const int32_t* actual_seq_lengths_kv;     // [B] or NULL (BSND: S2); TND kv: prefix sums;
                                            // PA_BSND: required
  void* out;                                // [query_t, N1, nope], query_dtype

  int32_t rounding;    // sfa_core_rounding; no effect on float caches
  int32_t reserved2;   // 0
  const float* sinks;  // [N1] or NULL: one more score per head, without a value
  // Both or neither: the largest score of a row and the sum of exp(score - largest), sink included,
  // after scale_value. [query_t, N1], which is CANN's [B, 1, S1, N1] and [1, T, N1] alike. A row
  // without a key has zeros; with sinks (sink, 1), but zeros still where the causal mask of
  // sparse_mode 3 leaves no key at all and past the valid query length.
  float* softmax_max;
  float* softmax_sum;
} sfa_core_params;

typedef struct sfa_core_call sfa_core_call;

// Checks everything that needs no look at the indices, cuts the work and takes shared scratch.
// On success *call must go to sfa_core_end. `params` is copied; the tensors must outlive the call.
SFA_CORE_API int sfa_core_begin(const sfa_core_params* params, sfa_core_call** call,
                                sfa_core_error* err);

// Number of independent tasks, >= 0. Few query tokens are also cut into key chunks.
SFA_CORE_API int64_t sfa_core_num_tasks(const sfa_core_call* call);

// Runs task `task` once, from any thread. Errors are kept in the call (the lowest token's wins)
// and reported by sfa_core_end; the status is returned too so that a caller may stop early.
SFA_CORE_API int sfa_core_run_task(sfa_core_call* call, int64_t task);

// Releases the call. Returns the error of the lowest token, or SFA_CORE_OK. Tasks that never ran
// leave their output rows unwritten. On an error the content of out is unspecified.
SFA_CORE_API int sfa_core_end(sfa_core_call* call, sfa_core_error* err);

// begin + all tasks on the calling thread + end.
SFA_CORE_API int sfa_core_run(const sfa_core_params* params, sfa_core_error* err);

// The same on the calling thread and up to `threads` - 1 helpers of the core's own, for hosts
// without a thread pool. The helpers stay for later calls and sleep between them; a second call at
// the same time runs on its own thread only.
SFA_CORE_API int sfa_core_run_threads(const sfa_core_params* params, int32_t threads,
                                      sfa_core_error* err);

// One call of NPULightningIndexer (float dtypes) or NPUQuantLightningIndexer (I8): for every query
// row the sparse_count visible keys of the largest
//
//   score = key_scale * sum_h weights[h] * query_scale[h] * relu(query[h] . key)    (scales: I8
//   only)
//
// in descending order, ties by lower key, then -1. Scores are float32 sums. A NaN is the smallest
// of all, below -infinity; -0 equals +0. begin, tasks and end are used as above; the result depends
// on neither threads nor task order. Of the scores only a tile and O(sparse_count) per row are
// kept.
typedef struct sfa_core_indexer_params {
  uint32_t struct_size;   // sizeof(sfa_core_indexer_params)
  int32_t isa;            // sfa_core_isa_id
  int32_t dtype;          // F32 | F16 | BF16 | I8: query and key
  int32_t weights_dtype;  // F32 | F16 | BF16; I8: F16
  int32_t layout_query;   // BSND | TND
  int32_t layout_key;     // BSND | TND | PA_BSND
  int32_t sparse_mode;    // 0 | 3
  int32_t rounding;   // sfa_core_rounding, I8 only. NPU: weights * query_scale and relu / 1024 are
                      // rounded to float16, ties to even, and scores are smaller by 1024
  int32_t num_heads;  // Hi >= 1
  int32_t head_dim;   // Di >= 1
  int32_t sparse_count;  // K >= 1
  int32_t reserved;      // 0

  int64_t batch;             // B
  int64_t query_s;           // S1 (BSND); ignored for TND
  int64_t query_t;           // number of query rows: B*S1 (BSND) or T (TND)
  int64_t key_s;             // S2 (BSND) or T2 (TND: total rows); ignored for PA_BSND
  int64_t block_num;         // PA_BSND: pages in the cache
  int64_t block_size;        // PA_BSND: rows per page
  int64_t block_table_cols;  // PA_BSND: columns of block_table

  const void* query;                        // [query_t, Hi, Di]
  const void* key;                          // [rows, Di]
  const void* weights;                      // [query_t, Hi]
  const uint16_t* query_scale;              // I8: float16 [query_t, Hi]
  const uint16_t* key_scale;                // I8: float16 [rows]
  const int32_t* block_table;               // [B, block_table_cols], PA_BSND only
  const int32_t* actual_seq_lengths_query;  // as for the attention
  const int32_t* actual_seq_lengths_key;
  int32_t* sparse_indices;  // [query_t, K]
  void* sparse_values;      // [query_t, K] or NULL: scores in `dtype` (I8: float32), tail -infinity
} sfa_core_indexer_params;

typedef struct sfa_core_indexer_call sfa_core_indexer_call;

SFA_CORE_API int sfa_core_indexer_begin(const sfa_core_indexer_params* params,
                                        sfa_core_indexer_call** call, sfa_core_error* err);
SFA_CORE_API int64_t sfa_core_indexer_num_tasks(const sfa_core_indexer_call* call);
SFA_CORE_API int sfa_core_indexer_run_task(sfa_core_indexer_call* call, int64_t task);
SFA_CORE_API int sfa_core_indexer_end(sfa_core_indexer_call* call, sfa_core_error* err);
SFA_CORE_API int sfa_core_indexer_run(const sfa_core_indexer_params* params, sfa_core_error* err);
SFA_CORE_API int sfa_core_indexer_run_threads(const sfa_core_indexer_params* params,
                                              int32_t threads, sfa_core_error* err);

// Bytes of one packed row: nope + rope * itemsize(rope_dtype) + 4 * nope / tile.
SFA_CORE_API int64_t sfa_core_row_bytes(int32_t nope_dim, int32_t rope_dim, int32_t tile_size,
                                        int32_t rope_dtype);

// sfa_onnx::KvCachePack: rows of nope (+ rope, + scale) -> packed rows. All tensors dense.
typedef struct sfa_core_pack_params {
  uint32_t struct_size;  // sizeof(sfa_core_pack_params)
  int32_t nope_dtype;    // F32 | F16 | BF16: quantised per tile; I8: copied with `scale`
  int32_t rope_dtype;    // F32 | F16 | BF16, copied bit by bit
  int32_t nope_dim, rope_dim, tile_size;
  float clip;  // factor on each tile's amax; 1 = no clipping
  int32_t reserved;
  int64_t rows;
  const void* nope;    // [rows, nope]
  const void* rope;    // [rows, rope], NULL when rope_dim is 0
  const float* scale;  // [rows, nope/tile], I8 only
  void* out;           // [rows, row_bytes]
} sfa_core_pack_params;

// Packs rows [first, first + count). Disjoint ranges may run on different threads.
SFA_CORE_API int sfa_core_pack(const sfa_core_pack_params* params, int64_t first, int64_t count,
                               sfa_core_error* err);

// sfa_onnx::KvCacheWrite: the rows of a paged cache, some of them replaced.
typedef struct sfa_core_write_params {
  uint32_t struct_size;  // sizeof(sfa_core_write_params)
  int32_t reserved;
  int64_t slots;                // rows of the cache: block_num * block_size
  int64_t row_bytes;            // >= 1
  int64_t rows;                 // new rows
  const void* pages;            // [slots, row_bytes]
  const void* new_rows;         // [rows, row_bytes]
  const int32_t* slot_mapping;  // [rows]: where each goes; negative: nowhere; equal: the last wins
  void* out;                    // [slots, row_bytes]; `pages` itself: only the new rows are touched
} sfa_core_write_params;

// Nothing is written when a slot lies past the cache.
SFA_CORE_API int sfa_core_cache_write(const sfa_core_write_params* params, sfa_core_error* err);

// Name of the path that ISA_AUTO takes ("avx512_bf16", ... "scalar"); "" when SFA_ONNX_ISA names
// one this machine lacks.
SFA_CORE_API const char* sfa_core_isa(void);
// Comma-separated names of all paths this machine has, best first.
SFA_CORE_API const char* sfa_core_isa_available(void);
SFA_CORE_API int32_t sfa_core_isa_from_name(const char* name);  // -1 when unknown

// Writes one readable sentence about `err` into buf (always terminated); returns its length.
SFA_CORE_API int32_t sfa_core_describe(const sfa_core_error* err, char* buf, int32_t size);

// Frees the pooled scratch that no call is using.
SFA_CORE_API void sfa_core_trim(void);
// Bytes of scratch that the pool holds, in use or idle.
SFA_CORE_API int64_t sfa_core_pool_bytes(void);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // SFA_ONNX_KERNELS_CORE_SFA_CORE_H_
