// Process-wide pool of scratch buffers. A buffer is taken for the length of one task, so there are
// never more of them than threads that ran at the same time, plus one per open call.
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "internal.h"

namespace sfa {
namespace {

struct alignas(64) Header {
  size_t bytes;
};

constexpr int kSlots = 512;
constexpr size_t kHugePage = (size_t)2 << 20;
Header* g_slots[kSlots];
__thread int t_slot = -1;
int g_next_slot;

int start_slot() {
  if (t_slot < 0) t_slot = __atomic_fetch_add(&g_next_slot, 1, __ATOMIC_RELAXED) % kSlots;
  return t_slot;
}

}  // namespace

void* pool_take(size_t bytes) {
  const int start = start_slot();
  for (int i = 0; i < kSlots; ++i) {
    Header** slot = &g_slots[(start + i) % kSlots];
    if (!__atomic_load_n(slot, __ATOMIC_RELAXED)) continue;
    Header* h = __atomic_exchange_n(slot, nullptr, __ATOMIC_ACQ_REL);
    if (!h) continue;
    if (h->bytes >= bytes) return h + 1;
    free(h);  // too small for today's calls: replaced below
    break;
  }
  const size_t total = bytes + sizeof(Header);
  const bool huge = total >= kHugePage / 2;
  const size_t align = huge ? kHugePage : 64, room = (total + align - 1) / align * align;
  void* memory = nullptr;
  if (posix_memalign(&memory, align, room) != 0) return nullptr;
#if defined(__linux__)
  if (huge) madvise(memory, room, MADV_HUGEPAGE);
#endif
  Header* h = (Header*)memory;
  h->bytes = room - sizeof(Header);
  return h + 1;
}

void pool_give(void* buffer) {
  if (!buffer) return;
  Header* h = (Header*)buffer - 1;
  const int start = start_slot();
  for (int i = 0; i < kSlots; ++i) {
    Header** slot = &g_slots[(start + i) % kSlots];
    Header* expected = nullptr;
    if (__atomic_compare_exchange_n(slot, &expected, h, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_RELAXED)) {
      return;
    }
  }
  free(h);
}

}  // namespace sfa

extern "C" void sfa_core_trim(void) {
  for (auto& slot : sfa::g_slots) free(__atomic_exchange_n(&slot, nullptr, __ATOMIC_ACQ_REL));
}
