// KvCacheWrite on exactly sized memory: chosen rows written, nothing else, garbage refused whole.
#include "harness.h"

namespace sfa_test {
namespace {

struct WriteCase {
  sfa_core_write_params p = {};
  Bytes pages, rows, out;
  std::vector<int32_t> slots;
};

WriteCase MakeWrite(Random& r, bool garbage) {
  WriteCase c;
  sfa_core_write_params& p = c.p;
  p.struct_size = sizeof p;
  p.slots = Uniform(r, garbage ? 0 : 1, 30);
  p.row_bytes = Uniform(r, 1, 70);
  p.rows = Uniform(r, 0, 40);
  for (Bytes* b : {&c.pages, &c.out}) *b = Bytes(p.slots * p.row_bytes);
  c.rows = Bytes(p.rows * p.row_bytes);
  for (Bytes* b : {&c.pages, &c.rows}) {
    for (size_t i = 0; i < b->size(); ++i) b->data()[i] = static_cast<char>(r());
  }
  const int32_t extremes[] = {INT32_MIN, -1, 30, 1 << 20, INT32_MAX};
  for (int64_t i = 0; i < p.rows; ++i) {
    const bool odd = garbage && !Uniform(r, 0, 9);
    c.slots.push_back(odd ? extremes[Uniform(r, 0, 4)]
                          : Uniform(r, -3, static_cast<int>(p.slots) - 1));
  }
  p.pages = c.pages.data();
  p.new_rows = c.rows.data();
  p.slot_mapping = c.slots.data();
  p.out = c.out.data();
  return c;
}

std::vector<char> Expected(const WriteCase& c) {
  std::vector<char> want(c.pages.data(), c.pages.data() + c.pages.size());
  for (size_t i = 0; i < c.slots.size(); ++i) {
    if (c.slots[i] < 0) continue;
    memcpy(want.data() + c.slots[i] * c.p.row_bytes, c.rows.data() + i * c.p.row_bytes,
           c.p.row_bytes);
  }
  return want;
}

void CheckWrite(WriteCase c, bool in_place) {
  bool legal = true;
  for (int32_t slot : c.slots) legal = legal && slot < c.p.slots;
  const std::vector<char> before(c.pages.data(), c.pages.data() + c.pages.size());
  const std::vector<char> want = legal ? Expected(c) : before;
  if (in_place) c.p.out = c.pages.data();
  sfa_core_error error = {};
  const int status = sfa_core_cache_write(&c.p, &error);
  CHECK(status == (legal ? SFA_CORE_OK : SFA_CORE_BAD_SLOT), "status %d", status);
  const char* out = static_cast<const char*>(c.p.out);
  CHECK((!legal && !in_place) || std::equal(want.begin(), want.end(), out), "in place %d",
        in_place);
}

}  // namespace
}  // namespace sfa_test

int main() {
  using namespace sfa_test;
  Random r(11);
  for (int i = 0; i < 600; ++i) {
    const WriteCase c = MakeWrite(r, i % 2);
    CheckWrite(c, false);
    CheckWrite(c, true);
  }
  printf("cache_write: %s\n", g_failures ? "FAILED" : "ok");
  return g_failures ? 1 : 0;
}
