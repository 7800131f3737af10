// libFuzzer on the core's C ABI: whatever lengths, tables, indices and values say, no address is
// formed outside the tensors, illegal scalars are refused before any memory is looked at, errors
// have words, and results depend on neither the order of tasks nor their threads.
#include "cases.h"

namespace sfa_fuzz {
namespace {

void CheckWords(const sfa_core_error& err, int status) {
  FUZZ_CHECK(status == err.status);
  char text[64];
  memset(text, 'x', sizeof text);
  sfa_core_describe(&err, text, sizeof text);
  FUZZ_CHECK(memchr(text, 0, sizeof text) != nullptr);
  if (status != SFA_CORE_OK) FUZZ_CHECK(err.what != nullptr && text[0] != '\0');
}

template <class Params, class Call>
struct Functions {
  int (*begin)(const Params*, Call**, sfa_core_error*);
  int64_t (*tasks)(const Call*);
  int (*task)(Call*, int64_t);
  int (*end)(Call*, sfa_core_error*);
  int (*threads)(const Params*, int32_t, sfa_core_error*);
};

constexpr Functions<sfa_core_params, sfa_core_call> kAttention = {
    sfa_core_begin, sfa_core_num_tasks, sfa_core_run_task, sfa_core_end, sfa_core_run_threads};
constexpr Functions<sfa_core_indexer_params, sfa_core_indexer_call> kIndexer = {
    sfa_core_indexer_begin, sfa_core_indexer_num_tasks, sfa_core_indexer_run_task,
    sfa_core_indexer_end, sfa_core_indexer_run_threads};

// Runs the tasks from the last to the first, some of them not at all.
template <class Params, class Call>
int Backwards(const Functions<Params, Call>& f, const Params& p, bool all, sfa_core_error* err) {
  Call* call = nullptr;
  int status = f.begin(&p, &call, err);
  if (status != SFA_CORE_OK) {
    CheckWords(*err, status);
    return status;
  }
  const int64_t count = f.tasks(call);
  FUZZ_CHECK(count >= 0);
  for (int64_t t = count; t-- > 0;) {
    if (all || t % 2 == 0) f.task(call, t);
  }
  status = f.end(call, err);
  CheckWords(*err, status);
  return status;
}

// The same call on threads gives the same bytes, or the same refusal.
template <class Case, class Params, class Call>
void Run(const Functions<Params, Call>& f, Case& c, Memory* out, bool all, int threads) {
  sfa_core_error err = {}, again = {};
  const int status = Backwards(f, c.p, all, &err);
  if (!all) return;
  const Memory first = *out;
  FUZZ_CHECK(f.threads(&c.p, threads, &again) == status);
  if (status == SFA_CORE_OK) FUZZ_CHECK(*out == first);
  if (status != SFA_CORE_OK) FUZZ_CHECK(err.token == again.token && err.slot == again.slot);
}

// One scalar becomes what no tensor could have: refused, and the tensors may be missing then.
template <class Params, class Call>
void Illegal(Reader& r, const Functions<Params, Call>& f, Params p, int32_t Params::* field) {
  const int64_t values[] = {-1, INT32_MIN, -2 - r.Byte()};
  p.*field = static_cast<int32_t>(values[r.Uniform(0, 2)]);
  sfa_core_error err = {};
  Call* call = nullptr;
  const int status = f.begin(&p, &call, &err);
  FUZZ_CHECK(status == SFA_CORE_BAD_PARAM || status == SFA_CORE_BAD_ISA);
  CheckWords(err, status);
}

// Another length of queries than the number of rows says.
template <class Params, class Call>
void Longer(Reader& r, const Functions<Params, Call>& f, Params p) {
  p.query_s = r.Wild64();
  if (p.layout_query != SFA_CORE_BSND || p.query_s * __int128{p.batch} == p.query_t) return;
  sfa_core_error err = {};
  Call* call = nullptr;
  const int status = f.begin(&p, &call, &err);
  FUZZ_CHECK(status == SFA_CORE_BAD_PARAM || status == SFA_CORE_BAD_ISA);
  CheckWords(err, status);
}

void FuzzAttention(Reader& r) {
  Attention c(r);
  if (r.Uniform(0, 15) == 0) return Longer(r, kAttention, c.p);
  if (r.Uniform(0, 15) == 0) {
    using P = sfa_core_params;
    int32_t P::* const fields[] = {&P::num_heads,    &P::nope_dim,          &P::rope_dim,
                                   &P::sparse_count, &P::sparse_block_size, &P::query_dtype,
                                   &P::cache_dtype,  &P::layout_query,      &P::layout_kv,
                                   &P::holes,        &P::rounding,          &P::sparse_mode};
    return Illegal(r, kAttention, c.p, fields[r.Uniform(0, 11)]);
  }
  Run(kAttention, c, &c.out, r.Uniform(0, 7) != 0, r.Uniform(1, 3));
}

void FuzzIndexer(Reader& r) {
  Indexer c(r);
  if (r.Uniform(0, 15) == 0) return Longer(r, kIndexer, c.p);
  if (r.Uniform(0, 15) == 0) {
    using P = sfa_core_indexer_params;
    int32_t P::* const fields[] = {&P::num_heads,  &P::head_dim,      &P::sparse_count,
                                   &P::dtype,      &P::weights_dtype, &P::layout_query,
                                   &P::layout_key, &P::rounding,      &P::sparse_mode};
    return Illegal(r, kIndexer, c.p, fields[r.Uniform(0, 8)]);
  }
  Run(kIndexer, c, &c.values, r.Uniform(0, 7) != 0, r.Uniform(1, 3));
  sfa_core_error err = {};
  if (sfa_core_indexer_run(&c.p, &err) != SFA_CORE_OK) return;
  for (const int32_t index : c.indices) FUZZ_CHECK(index >= -1 && index < 1 << 20);
}

void FuzzPack(Reader& r) {
  sfa_core_pack_params p = {};
  p.struct_size = sizeof p;
  p.nope_dtype = r.Uniform(0, 3);
  p.rope_dtype = r.Uniform(0, 2);
  p.tile_size = r.Uniform(1, 40);
  p.nope_dim = p.tile_size * r.Uniform(1, 5);
  p.rope_dim = r.Uniform(0, 40);
  p.clip = r.Flag() ? 1.0f : 0.01f * static_cast<float>(r.Byte());
  p.rows = r.Uniform(0, 6);
  const size_t rows = static_cast<size_t>(p.rows);
  const Memory nope = r.Bytes(rows * static_cast<size_t>(p.nope_dim) * Width(p.nope_dtype));
  const Memory rope = r.Bytes(rows * static_cast<size_t>(p.rope_dim) * Width(p.rope_dtype));
  const auto scale = As<float>(r.Bytes(rows * static_cast<size_t>(p.nope_dim / p.tile_size) * 4));
  const int64_t row = sfa_core_row_bytes(p.nope_dim, p.rope_dim, p.tile_size, p.rope_dtype);
  Memory out(rows * static_cast<size_t>(row));
  p.nope = nope.data();
  p.rope = p.rope_dim ? rope.data() : nullptr;
  p.scale = p.nope_dtype == SFA_CORE_I8 ? scale.data() : nullptr;
  p.out = out.data();
  const int64_t first = r.Flag() ? 0 : r.Wild64(), count = r.Flag() ? p.rows : r.Wild64();
  sfa_core_error err = {};
  const bool inside = first >= 0 && count >= 0 && first <= p.rows && count <= p.rows - first;
  const int status = sfa_core_pack(&p, first, count, &err);
  CheckWords(err, status);
  if (!inside) FUZZ_CHECK(status == SFA_CORE_BAD_PARAM);
}

void FuzzWrite(Reader& r) {
  sfa_core_write_params p = {};
  p.struct_size = sizeof p;
  p.slots = r.Uniform(0, 40);
  p.row_bytes = r.Uniform(1, 70);
  p.rows = r.Uniform(0, 12);
  const size_t row = static_cast<size_t>(p.row_bytes);
  Memory pages = r.Bytes(static_cast<size_t>(p.slots) * row), out(pages.size());
  const Memory rows = r.Bytes(static_cast<size_t>(p.rows) * row);
  const Ints slots = SomeInts(r, static_cast<size_t>(p.rows), static_cast<int>(p.slots));
  p.pages = pages.data();
  p.new_rows = rows.data();
  p.slot_mapping = slots.data();
  p.out = out.data();
  sfa_core_error err = {}, again = {};
  const int status = sfa_core_cache_write(&p, &err);
  CheckWords(err, status);
  p.out = pages.data();  // in place: the same pages
  FUZZ_CHECK(sfa_core_cache_write(&p, &again) == status);
  if (status == SFA_CORE_OK) FUZZ_CHECK(out == pages);
}

}  // namespace
}  // namespace sfa_fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  sfa_fuzz::Reader r(data, size);
  switch (r.Byte() % 8) {
    case 0:
      sfa_fuzz::FuzzPack(r);
      break;
    case 1:
      sfa_fuzz::FuzzWrite(r);
      break;
    case 2:
    case 3:
    case 4:
      sfa_fuzz::FuzzIndexer(r);
      break;
    default:
      sfa_fuzz::FuzzAttention(r);
  }
  return 0;
}
