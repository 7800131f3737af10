// The indexer on every path of this machine: exact where sums are, deterministic, safe on garbage.
//
// Built and run as test_core.cc is.
#include "harness.h"
#include "indexer_case.h"

namespace sfa_test {
namespace {

std::string Describe(const IndexerCase& c) {
  char text[256];
  const sfa_core_indexer_params& p = c.p;
  snprintf(text, sizeof text,
           "isa %d type %d/%d layouts %d/%d mode %d rounding %d heads %d width %d K %d rows %lld"
           " pages %lld x %lld keys %lld",
           p.isa, p.dtype, p.weights_dtype, p.layout_query, p.layout_key, p.sparse_mode, p.rounding,
           p.num_heads, p.head_dim, p.sparse_count, static_cast<long long>(p.query_t),
           static_cast<long long>(p.block_num), static_cast<long long>(p.block_size),
           static_cast<long long>(p.key_s));
  return text;
}

int RunThreaded(IndexerCase* c, int threads, uint64_t seed, sfa_core_error* error) {
  sfa_core_indexer_call* call = nullptr;
  const int status = sfa_core_indexer_begin(&c->p, &call, error);
  if (status != SFA_CORE_OK) return status;
  RunTasks(sfa_core_indexer_run_task, call, sfa_core_indexer_num_tasks(call), threads, seed);
  return sfa_core_indexer_end(call, error);
}

// How far a score may be from the reference: of the order of the sum's terms.
double Allowed(const IndexerCase& c, bool whole) {
  if (whole) return 0;
  const double terms = sqrt(c.p.num_heads * static_cast<double>(c.p.head_dim));
  return (c.p.dtype == SFA_CORE_I8 ? 2e-2 : 2e-5) * (10 + terms);
}

// One row of the output: the best keys of `scores`, within `allowed`; exactly them where it is 0.
bool RowIsRight(const IndexerCase& c, int64_t row, const std::vector<double>& scores,
                double allowed) {
  const int64_t count = c.p.sparse_count, seen = scores.size(), n = std::min(count, seen);
  const int32_t* got = c.indices.data() + row * count;
  std::vector<int32_t> best(seen);
  for (int64_t i = 0; i < seen; ++i) best[i] = static_cast<int32_t>(i);
  std::stable_sort(best.begin(), best.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  std::vector<bool> used(seen);
  for (int64_t i = 0; i < count; ++i) {
    const double value = Number(c.values.data(), row * count + i, c.value_dtype());
    if (i >= n) {
      if (got[i] != -1 || !(value < 0 && std::isinf(value))) return false;
      continue;
    }
    if (got[i] < 0 || got[i] >= seen || used[got[i]]) return false;
    used[got[i]] = true;
    if (allowed == 0 && got[i] != best[i]) return false;
    const double score = scores[got[i]];
    const double unit = c.value_dtype() == SFA_CORE_F32 ? 0 : fabs(score) / 128;
    if (fabs(score - scores[best[i]]) > 2 * allowed) return false;
    if (fabs(value - score) > allowed + unit) return false;
  }
  return true;
}

void CheckIndexer(IndexerCase c, bool whole, const std::vector<std::vector<double>>& expected,
                  uint64_t seed) {
  sfa_core_error error = {};
  c.Bind();
  const int status = sfa_core_indexer_run(&c.p, &error);
  CHECK(status == SFA_CORE_OK, "status %d, %s", status, Describe(c).c_str());
  if (status != SFA_CORE_OK) return;
  const double allowed = Allowed(c, whole);
  for (size_t row = 0; row < expected.size(); ++row) {
    CHECK(RowIsRight(c, row, expected[row], allowed), "row %zu, %s", row, Describe(c).c_str());
  }
  const std::vector<int32_t> alone = c.indices;
  const std::vector<char> values = c.values;
  std::fill(c.indices.begin(), c.indices.end(), 777);
  CHECK(RunThreaded(&c, 3, seed, &error) == SFA_CORE_OK, "%s", Describe(c).c_str());
  CHECK(alone == c.indices && values == c.values, "threads change the result, %s",
        Describe(c).c_str());
}

void CheckOnAllPaths(Random& r, const IndexerSizes& s) {
  IndexerCase c = MakeIndexerCase(r, s);
  std::vector<std::vector<double>> expected;
  for (int64_t row = 0; row < c.p.query_t; ++row) expected.push_back(ReferenceRow(c, row));
  for (int32_t path : Paths()) {
    c.p.isa = path;
    CheckIndexer(c, s.whole, expected, r());
  }
}

// The widths that models use, through whole tiles and tails.
void TestRealWidths(Random& r) {
  for (int dtype : {SFA_CORE_F32, SFA_CORE_F16, SFA_CORE_BF16, SFA_CORE_I8}) {
    for (int heads : {16, 32, 64}) {
      const IndexerSizes s = {
          heads, 128, 100, 1, 1, 333, dtype, SFA_CORE_BSND, SFA_CORE_PA_BSND, 0, 0, heads == 32};
      CheckOnAllPaths(r, s);
    }
  }
}

// NaN comes last, infinities at the ends, and zero heads beside them stay out of it.
void TestSpecialScores(Random& r) {
  const float special[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1.0f, -1.0f, 3.0f};
  for (int heads : {1, 3, 17}) {
    const IndexerSizes s = {heads,         2, 9, 1,   1, 8, SFA_CORE_F32, SFA_CORE_BSND,
                            SFA_CORE_BSND, 0, 0, true};
    IndexerCase c = MakeIndexerCase(r, s);
    c.lengths_q = {1};
    c.lengths_k = {8};
    for (int h = 0; h < heads; ++h) {
      Store(c.query.data() + 8 * h, SFA_CORE_F32, 1);
      Store(c.query.data() + 8 * h + 4, SFA_CORE_F32, 0);
      Store(c.weights.data() + ItemSize(c.p.weights_dtype) * h, c.p.weights_dtype, 1);
    }
    for (int k = 0; k < 8; ++k) {
      Store(c.key.data() + 8 * k, SFA_CORE_F32, special[k]);
      Store(c.key.data() + 8 * k + 4, SFA_CORE_F32, 0);
    }
    const std::vector<int32_t> expected = {1, 7, 5, 2, 3, 4, 6, 0, -1};
    for (int32_t path : Paths()) {
      c.p.isa = path;
      c.Bind();
      sfa_core_error error = {};
      CHECK(sfa_core_indexer_run(&c.p, &error) == SFA_CORE_OK, "heads %d", heads);
      CHECK(c.indices == expected, "heads %d isa %d: %d %d %d %d %d %d %d %d %d", heads, path,
            c.indices[0], c.indices[1], c.indices[2], c.indices[3], c.indices[4], c.indices[5],
            c.indices[6], c.indices[7], c.indices[8]);
    }
  }
}

// Scores that are all equal, or rise or fall along the keys, in pieces that end in any order.
void TestOrderedScores(Random& r) {
  constexpr int kKeys = 20000, kCount = 1000;
  const IndexerSizes s = {1, 2, kCount, 1, 1, kKeys, SFA_CORE_F32, SFA_CORE_BSND, SFA_CORE_BSND,
                          0, 0, true};
  IndexerCase c = MakeIndexerCase(r, s);
  c.lengths_q = {1};
  c.lengths_k = {kKeys};
  Store(c.query.data(), SFA_CORE_F32, 1);
  Store(c.query.data() + 4, SFA_CORE_F32, 0);
  Store(c.weights.data(), c.p.weights_dtype, 1);
  for (int slope : {0, 1, -1}) {
    for (int k = 0; k < kKeys; ++k) {
      Store(c.key.data() + 8 * k, SFA_CORE_F32, static_cast<float>(kKeys + slope * k));
      Store(c.key.data() + 8 * k + 4, SFA_CORE_F32, 0);
    }
    std::vector<int32_t> expected(kCount);
    for (int i = 0; i < kCount; ++i) expected[i] = slope > 0 ? kKeys - 1 - i : i;
    for (int32_t path : Paths()) {
      c.p.isa = path;
      c.Bind();
      for (int threads : {1, 3}) {
        sfa_core_error error = {};
        std::fill(c.indices.begin(), c.indices.end(), 777);
        CHECK(RunThreaded(&c, threads, r(), &error) == SFA_CORE_OK, "slope %d", slope);
        CHECK(c.indices == expected, "slope %d threads %d isa %d", slope, threads, path);
      }
    }
  }
}

// Values that are just legal, just illegal, or wrap around in careless products.
void SpoilIndexer(Random& r, const IndexerCase& c, std::vector<int32_t>* values) {
  if (values->empty() || Uniform(r, 0, 1)) return;
  const int64_t edges[] = {c.p.block_num, c.p.query_s, c.p.query_t, c.p.key_s, INT32_MIN,
                           INT32_MAX,     1 << 16,     1 << 28,     0};
  const int top = static_cast<int>(values->size()) - 1;
  for (int i = Uniform(r, 1, 3); i > 0; --i) {
    (*values)[Uniform(r, 0, top)] =
        static_cast<int32_t>(edges[Uniform(r, 0, 8)] + Uniform(r, -1, 1) * Uniform(r, 0, 1));
  }
}

void TestGarbage(Random& r, int rounds) {
  for (int i = 0; i < rounds; ++i) {
    IndexerSizes s = RandomIndexerSizes(r);
    s.heads = std::min(s.heads, 4);
    IndexerCase c = MakeIndexerCase(r, s);
    SpoilIndexer(r, c, &c.table);
    SpoilIndexer(r, c, &c.lengths_q);
    SpoilIndexer(r, c, &c.lengths_k);
    c.Bind();
    sfa_core_error first = {}, error = {};
    bool have_first = false;
    for (int32_t path : Paths()) {
      c.p.isa = path;
      RunThreaded(&c, 2, r(), &error);
      char text[512];
      CHECK(sfa_core_describe(&error, text, sizeof text) > 0, "no words for %d", error.status);
      if (!have_first) first = error;
      have_first = true;
      CHECK(error.status == first.status && error.token == first.token &&
                error.slot == first.slot && error.value == first.value,
            "paths refuse differently: %s", Describe(c).c_str());
    }
  }
}

}  // namespace
}  // namespace sfa_test

int main() {
  using namespace sfa_test;
  const int rounds = Number("SFA_TEST_ROUNDS", 100);
  Random r(Number("SFA_TEST_SEED", 1));
  for (int i = 0; i < rounds; ++i) CheckOnAllPaths(r, RandomIndexerSizes(r));
  TestRealWidths(r);
  TestSpecialScores(r);
  TestOrderedScores(r);
  TestGarbage(r, 3 * rounds);
  sfa_core_trim();
  CHECK(sfa_core_pool_bytes() == 0, "scratch is left");
  printf("indexer %s: %s\n", sfa_core_isa_available(), g_failures ? "FAILED" : "ok");
  return g_failures ? 1 : 0;
}
