// KvCachePack on exactly sized memory: every byte written, none outside, whoever packs which row.
#include <stdio.h>

#include <thread>

#include "core_case.h"

namespace sfa_test {
namespace {

int g_failures = 0;

struct PackCase {
  sfa_core_pack_params p = {};
  Bytes nope, rope, out;
  std::vector<float> scale;
};

PackCase MakePack(Random& r) {
  PackCase c;
  sfa_core_pack_params& p = c.p;
  const int tiles[] = {1, 2, 7, 16, 128};
  p.struct_size = sizeof p;
  p.nope_dtype = Uniform(r, 0, 3);
  p.rope_dtype = Uniform(r, 0, 2);
  p.tile_size = tiles[Uniform(r, 0, 4)];
  p.nope_dim = p.tile_size * Uniform(r, 1, 4);
  p.rope_dim = Uniform(r, 0, 9);
  p.clip = Uniform(r, 0, 1) ? 1.0f : 0.7f;
  p.rows = Uniform(r, 0, 40);
  if (p.nope_dtype == SFA_CORE_I8) {
    c.nope = Bytes(p.rows * p.nope_dim);
    for (size_t i = 0; i < c.nope.size(); ++i) c.nope.data()[i] = static_cast<char>(r());
    for (int64_t i = 0; i < p.rows * p.nope_dim / p.tile_size; ++i) c.scale.push_back(0.5f + i);
  } else {
    c.nope = RandomFloats(r, p.rows * p.nope_dim, p.nope_dtype, 3);
  }
  c.rope = RandomFloats(r, p.rows * p.rope_dim, p.rope_dtype, 1);
  c.out = Bytes(p.rows * sfa_core_row_bytes(p.nope_dim, p.rope_dim, p.tile_size, p.rope_dtype));
  p.nope = c.nope.data();
  p.rope = p.rope_dim ? c.rope.data() : nullptr;
  p.scale = c.scale.data();
  p.out = c.out.data();
  return c;
}

double NopeAt(const PackCase& c, int64_t i) {
  return Load(c.nope.data() + i * ItemSize(c.p.nope_dtype), c.p.nope_dtype);
}

// The row's parts lie where they should, and what is quantised is near what it was.
bool RowIsRight(const PackCase& c, int64_t row) {
  const sfa_core_pack_params& p = c.p;
  const int item = ItemSize(p.rope_dtype), tiles = p.nope_dim / p.tile_size;
  const char* at =
      c.out.data() + row * sfa_core_row_bytes(p.nope_dim, p.rope_dim, p.tile_size, p.rope_dtype);
  const char* rope = at + p.nope_dim;
  if (memcmp(rope, c.rope.data() + row * p.rope_dim * item, p.rope_dim * item) != 0) return false;
  for (int d = 0; d < p.nope_dim; ++d) {
    const int tile = d / p.tile_size;
    const double scale = Load(rope + p.rope_dim * item + 4 * tile, SFA_CORE_F32);
    if (p.nope_dtype == SFA_CORE_I8) {
      if (at[d] != c.nope.data()[row * p.nope_dim + d]) return false;
      if (scale != c.scale[row * tiles + tile]) return false;
      continue;
    }
    double limit = 0;
    for (int i = tile * p.tile_size; i < (tile + 1) * p.tile_size; ++i) {
      limit = std::max(limit, fabs(NopeAt(c, row * p.nope_dim + i)) * p.clip);
    }
    const double want = std::min(std::max(NopeAt(c, row * p.nope_dim + d), -limit), limit);
    if (fabs(static_cast<int8_t>(at[d]) * scale - want) > 0.501 * limit / 127) return false;
  }
  return true;
}

bool PackOnThreads(const PackCase& c) {
  int failures = 0;
  std::vector<std::thread> pool;
  for (int t = 0; t < 3; ++t) {
    pool.emplace_back([&c, &failures, t] {
      for (int64_t row = t; row < c.p.rows; row += 3) {
        sfa_core_error error = {};
        if (sfa_core_pack(&c.p, row, 1, &error) != SFA_CORE_OK) {
          __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
        }
      }
    });
  }
  for (auto& thread : pool) thread.join();
  return failures == 0;
}

void TestPack(Random& r) {
  const PackCase c = MakePack(r);
  sfa_core_error error = {};
  bool ok = sfa_core_pack(&c.p, 0, c.p.rows, &error) == SFA_CORE_OK;
  for (int64_t row = 0; ok && row < c.p.rows; ++row) ok = RowIsRight(c, row);
  const std::vector<char> whole(c.out.data(), c.out.data() + c.out.size());
  memset(c.out.data(), 0x5a, c.out.size());
  ok = ok && PackOnThreads(c) && std::equal(whole.begin(), whole.end(), c.out.data());
  if (ok) return;
  printf("pack: nope %d x type %d, rope %d x type %d, tile %d, rows %lld\n", c.p.nope_dim,
         c.p.nope_dtype, c.p.rope_dim, c.p.rope_dtype, c.p.tile_size,
         static_cast<long long>(c.p.rows));
  ++g_failures;
}

}  // namespace
}  // namespace sfa_test

int main() {
  sfa_test::Random r(7);
  for (int i = 0; i < 300; ++i) sfa_test::TestPack(r);
  printf("pack: %s\n", sfa_test::g_failures ? "FAILED" : "ok");
  return sfa_test::g_failures ? 1 : 0;
}
