// The attention core on every path of this machine: right, deterministic, and safe on garbage.
//
// Built with sanitizers by scripts/test-cpp.sh and run under qemu-user by scripts/test-aarch64.sh.
// SFA_TEST_ROUNDS scales the work; SFA_TEST_SEED chooses other cases.
#include "core_reference.h"
#include "harness.h"

namespace sfa_test {
namespace {

std::string Describe(const Case& c) {
  char text[256];
  const sfa_core_params& p = c.p;
  snprintf(text, sizeof text,
           "isa %d q %d cache %d layouts %d/%d mode %d heads %d nope %d rope %d tile %d sbs %d K %d"
           " T %lld pages %lld x %lld rounding %d sinks %d softmax %d",
           p.isa, p.query_dtype, p.cache_dtype, p.layout_query, p.layout_kv, p.sparse_mode,
           p.num_heads, p.nope_dim, p.rope_dim, p.tile_size, p.sparse_block_size, p.sparse_count,
           static_cast<long long>(p.query_t), static_cast<long long>(p.block_num),
           static_cast<long long>(p.block_size), p.rounding, p.sinks != nullptr,
           p.softmax_max != nullptr);
  return text;
}

int RunThreaded(const Case& c, int threads, uint64_t seed, sfa_core_error* error) {
  sfa_core_call* call = nullptr;
  const int status = sfa_core_begin(&c.p, &call, error);
  if (status != SFA_CORE_OK) return status;
  RunTasks(sfa_core_run_task, call, sfa_core_num_tasks(call), threads, seed);
  return sfa_core_end(call, error);
}

// Worst error of a (token, head), relative to the larger of its norm and 5 % of the largest.
double WorstError(const Case& c, const std::vector<double>& expected) {
  const int width = c.p.nope_dim, item = ItemSize(c.p.query_dtype);
  const size_t lines = expected.size() / width;
  std::vector<double> norms(lines), errors(lines);
  double largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double got = Load(c.out.data() + i * item, c.p.query_dtype);
    norms[i / width] += expected[i] * expected[i];
    errors[i / width] += (got - expected[i]) * (got - expected[i]);
    largest = std::max(largest, norms[i / width]);
  }
  double worst = 0;
  for (size_t i = 0; i < lines; ++i) {
    if (norms[i] == 0) {
      worst = std::max(worst, errors[i] == 0 ? 0.0 : 1.0);  // an empty row is exactly zero
    } else {
      worst = std::max(worst, sqrt(errors[i] / std::max(norms[i], 0.0025 * largest)));
    }
  }
  return worst;
}

// Worst error of softmax_max and softmax_sum; a row without a key has them exactly.
double WorstSoftmax(const Case& c, const Answer& expected) {
  double worst = 0;
  for (size_t i = 0; i < c.softmax_max.size(); ++i) {
    const double max = expected.max[i], sum = expected.sum[i];
    const bool exact = expected.largest[i] == 0 && (sum == 0 || sum == 1);
    const double error = std::max(fabs(c.softmax_max[i] - max) / (1 + fabs(max)),
                                  fabs(c.softmax_sum[i] - sum) / std::max(1.0, sum));
    if (exact && error > 1e-6) return error + 1;
    worst = std::max(worst,
                     c.softmax_max[i] == max ? fabs(c.softmax_sum[i] - sum) / (sum + !sum) : error);
  }
  return worst;
}

void CheckCase(Case c, const Answer& expected, uint64_t seed) {
  c.Bind();  // to this copy's own softmax_max and softmax_sum
  sfa_core_error error = {};
  const int status = sfa_core_run(&c.p, &error);
  CHECK(status == SFA_CORE_OK, "status %d, %s", status, Describe(c).c_str());
  if (status != SFA_CORE_OK) return;
  // In a wide output roundings average out; a narrow one may show a whole unit of bfloat16.
  const double limit = c.p.query_dtype == SFA_CORE_F32 ? 1e-5 : c.p.nope_dim >= 64 ? 4e-3 : 8e-3;
  const double worst = WorstError(c, expected.out), softmax = WorstSoftmax(c, expected);
  CHECK(worst <= limit, "error %.2e, %s", worst, Describe(c).c_str());
  CHECK(softmax <= 2e-4, "softmax error %.2e, %s", softmax, Describe(c).c_str());
  const std::vector<float> max = c.softmax_max, sum = c.softmax_sum;
  const std::vector<char> alone(c.out.data(), c.out.data() + c.out.size());
  memset(c.out.data(), 0x5a, c.out.size());
  CHECK(RunThreaded(c, 3, seed, &error) == SFA_CORE_OK, "%s", Describe(c).c_str());
  CHECK(std::equal(alone.begin(), alone.end(), c.out.data()), "threads change bits, %s",
        Describe(c).c_str());
  CHECK(max == c.softmax_max && sum == c.softmax_sum, "threads change bits of the softmax, %s",
        Describe(c).c_str());
}

void TestAgainstReference(Random& r, int rounds) {
  for (int i = 0; i < rounds; ++i) {
    Case c = MakeCase(r, RandomSizes(r));
    const Answer expected = Reference(c);
    for (int32_t path : Paths()) {
      c.p.isa = path;
      CheckCase(c, expected, r());
    }
  }
}

// The widths that models use, at sizes that pass through whole tiles, tails and two chunks.
void TestRealWidths(Random& r) {
  const int dtypes[] = {SFA_CORE_F32, SFA_CORE_F16, SFA_CORE_BF16};
  for (int dtype : dtypes) {
    for (int cache : {static_cast<int>(SFA_CORE_I8), dtype}) {
      for (int heads : {1, 8, 16, 128}) {
        const Sizes s = {heads, 512,   64,    128,           heads < 128 ? 700 : 70, 1, 1, 1,
                         900,   dtype, cache, SFA_CORE_BSND, SFA_CORE_PA_BSND,       0};
        Case c = MakeCase(r, s);
        const Answer expected = Reference(c);
        for (int32_t path : Paths()) {
          c.p.isa = path;
          CheckCase(c, expected, r());
        }
      }
    }
  }
}

// Distance to the float64 answer in units of half the last place of the output's type. Where the
// winning key has a zero, the others shine through: no place is taken for smaller than 2^-24.
double HalfPlaces(double got, double expected, int dtype) {
  const int least = dtype == SFA_CORE_F16 ? -14 : -17, digits = dtype == SFA_CORE_F16 ? 10 : 7;
  const int exponent = std::max(expected == 0 ? least : ilogb(expected), least) - digits - 1;
  return fabs(got - expected) / ldexp(1, exponent);
}

// Where one key takes the whole softmax, every path gives that key's latent rounded once.
void TestOneHot(Random& r) {
  for (int dtype : {SFA_CORE_F16, SFA_CORE_BF16}) {
    for (int heads : {1, 3, 6, 16, 40}) {
      const Sizes s = {heads,
                       512,
                       64,
                       128,
                       700,
                       1,
                       1,
                       1,
                       900,
                       dtype,
                       SFA_CORE_I8,
                       SFA_CORE_BSND,
                       SFA_CORE_PA_BSND,
                       0};
      Case c = MakeCase(r, s);
      c.sinks.clear();
      c.p.scale_value = 40;  // scores of thousands
      c.Bind();
      const Answer expected = Reference(c);
      for (int32_t path : Paths()) {
        c.p.isa = path;
        sfa_core_error error = {};
        CHECK(sfa_core_run(&c.p, &error) == SFA_CORE_OK, "%s", Describe(c).c_str());
        double worst = 0;
        for (size_t i = 0; i < expected.out.size(); ++i) {
          if (expected.largest[i / 512] < 1 - 1e-9) continue;
          const double got = Load(c.out.data() + 2 * i, dtype);
          worst = std::max(worst, HalfPlaces(got, expected.out[i], dtype));
        }
        CHECK(worst <= 1.01, "%.4f half places, %s", worst, Describe(c).c_str());
      }
    }
  }
}

// The largest legal value of every length and table entry is taken, the next one is refused.
void TestEdges(Random& r) {
  for (int layouts = 0; layouts < 4; ++layouts) {
    const int layout_q = layouts % 2, layout_kv = layouts < 2 ? layout_q : SFA_CORE_PA_BSND;
    const Sizes s = {2,  32,           8,           16,       20,        1, 2, 2,
                     20, SFA_CORE_F32, SFA_CORE_I8, layout_q, layout_kv, 0};
    Case c = MakeCase(r, s);
    const bool paged = layout_kv == SFA_CORE_PA_BSND;
    const int room = paged ? static_cast<int>(c.p.block_table_cols * c.p.block_size) : 20;
    c.lengths_q =
        layout_q == SFA_CORE_TND ? std::vector<int32_t>{2, 4} : std::vector<int32_t>{2, 2};
    c.lengths_kv =
        layout_kv == SFA_CORE_TND ? std::vector<int32_t>{20, 40} : std::vector<int32_t>{room, room};
    for (size_t i = 0; i < c.indices.size(); ++i) c.indices[i] = static_cast<int32_t>(i % 20);
    if (paged) std::fill(c.table.begin(), c.table.end(), c.p.block_num - 1);
    const auto status = [&c](std::vector<int32_t>* values, size_t at, int64_t value) {
      const int32_t before = (*values)[at];
      (*values)[at] = static_cast<int32_t>(value);
      c.Bind();
      sfa_core_error error = {};
      const int got = sfa_core_run(&c.p, &error);
      (*values)[at] = before;
      return got;
    };
    CHECK(status(&c.lengths_q, 1, c.lengths_q[1]) == SFA_CORE_OK, "layouts %d", layouts);
    CHECK(status(&c.lengths_q, 1, c.lengths_q[1] + 1) == SFA_CORE_BAD_SEQ_Q, "layouts %d", layouts);
    CHECK(status(&c.lengths_q, 0, -1) != SFA_CORE_OK, "layouts %d", layouts);
    CHECK(status(&c.lengths_kv, 0, -1) != SFA_CORE_OK, "layouts %d", layouts);
    CHECK(status(&c.lengths_kv, 1, c.lengths_kv[1] + 1) ==
              (paged ? SFA_CORE_TABLE_TOO_SHORT : SFA_CORE_BAD_SEQ_KV),
          "layouts %d", layouts);
    if (!paged) continue;
    CHECK(status(&c.table, 0, c.p.block_num) == SFA_CORE_BAD_BLOCK, "layouts %d", layouts);
    CHECK(status(&c.table, 0, -1) == SFA_CORE_BAD_BLOCK, "layouts %d", layouts);
  }
}

// Values that are just legal, just illegal, or wrap around in careless products.
int32_t Garbage(Random& r, const Case& c) {
  const int64_t s2 =
      c.p.layout_kv == SFA_CORE_PA_BSND ? c.p.block_table_cols * c.p.block_size : c.p.kv_s;
  const int64_t edges[] = {c.p.block_num, c.p.query_s, c.p.query_t, s2,      s2 / 2,  c.rows,
                           INT32_MIN,     INT32_MAX,   1 << 16,     1 << 28, 1 << 30, 0};
  return static_cast<int32_t>(edges[Uniform(r, 0, 11)] + Uniform(r, 0, 1) * Uniform(r, -2, 1));
}

void Spoil(Random& r, const Case& c, std::vector<int32_t>* values) {
  if (values->empty() || Uniform(r, 0, 1)) return;
  const int top = static_cast<int>(values->size()) - 1;
  const int count = Uniform(r, 0, 1) ? top + 1 : Uniform(r, 1, 3);
  for (int i = 0; i < count; ++i) (*values)[Uniform(r, 0, top)] = Garbage(r, c);
}

// Nothing to assert about the result but that all paths refuse the same calls, for the same
// reason: what is tested is that no address outside the tensors is ever touched.
void TestGarbage(Random& r, int rounds) {
  for (int i = 0; i < rounds; ++i) {
    Sizes s = RandomSizes(r);
    s.heads = std::min(s.heads, 20);
    Case c = MakeCase(r, s);
    Spoil(r, c, &c.indices);
    Spoil(r, c, &c.table);
    Spoil(r, c, &c.lengths_q);
    Spoil(r, c, &c.lengths_kv);
    if (!Uniform(r, 0, 4)) c.p.sparse_block_size = 1 << Uniform(r, 4, 30);
    c.p.holes = Uniform(r, 0, 2);
    c.Bind();
    sfa_core_error first = {}, error = {};
    bool have_first = false;
    for (int32_t path : Paths()) {
      c.p.isa = path;
      RunThreaded(c, 2, r(), &error);
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
  TestAgainstReference(r, rounds);
  TestRealWidths(r);
  TestOneHot(r);
  TestEdges(r);
  TestGarbage(r, 5 * rounds);
  sfa_core_trim();
  printf("paths %s: %s\n", sfa_core_isa_available(), g_failures ? "FAILED" : "ok");
  return g_failures ? 1 : 0;
}
