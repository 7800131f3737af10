// Process-wide pool of scratch buffers, by powers of two. A buffer is taken for the length of one
// task or call, so there are never more of a size than were in use at the same time.
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "internal.h"

namespace sfa {
namespace {

struct alignas(64) Header {
  int order;  // the block, header included, has 2^order bytes
};

constexpr int kSlots = 128;  // idle buffers kept per size
constexpr int kMinOrder = 12, kMaxOrder = 40, kHugeOrder = 21;
Header* g_idle[kMaxOrder + 1][kSlots];
__thread int t_slot = -1;
int g_next_slot;
int64_t g_bytes;  // allocated and not freed

// Threads start to look at different places, so that each tends to get its own warm buffer back.
int start_slot() {
  if (t_slot < 0) t_slot = __atomic_fetch_add(&g_next_slot, 1, __ATOMIC_RELAXED) % kSlots;
  return t_slot;
}

Header* allocate(int order) {
  const size_t bytes = (size_t)1 << order;
  const bool huge = order >= kHugeOrder;
  void* memory = nullptr;
  if (posix_memalign(&memory, huge ? (size_t)1 << kHugeOrder : 64, bytes) != 0) return nullptr;
#if defined(__linux__)
  if (huge) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  ((Header*)memory)->order = order;
  __atomic_add_fetch(&g_bytes, (int64_t)bytes, __ATOMIC_RELAXED);
  return (Header*)memory;
}

void release(Header* h) {
  if (!h) return;
  __atomic_sub_fetch(&g_bytes, (int64_t)1 << h->order, __ATOMIC_RELAXED);
  free(h);
}

}  // namespace

void* pool_take(size_t bytes) {
  int order = kMinOrder;
  while (order <= kMaxOrder && ((size_t)1 << order) < bytes + sizeof(Header)) ++order;
  if (order > kMaxOrder) return nullptr;
  const int start = start_slot();
  for (int i = 0; i < kSlots; ++i) {
    Header** slot = &g_idle[order][(start + i) % kSlots];
    if (!__atomic_load_n(slot, __ATOMIC_RELAXED)) continue;
    if (Header* h = __atomic_exchange_n(slot, nullptr, __ATOMIC_ACQ_REL)) return h + 1;
  }
  Header* h = allocate(order);
  return h ? h + 1 : nullptr;
}

void pool_give(void* buffer) {
  if (!buffer) return;
  Header* h = (Header*)buffer - 1;
  const int start = start_slot();
  for (int i = 0; i < kSlots; ++i) {
    Header** slot = &g_idle[h->order][(start + i) % kSlots];
    Header* empty = nullptr;
    if (__atomic_compare_exchange_n(slot, &empty, h, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
      return;
    }
  }
  release(h);
}

}  // namespace sfa

extern "C" {

void sfa_core_trim(void) {
  for (auto& size : sfa::g_idle) {
    for (auto& slot : size) sfa::release(__atomic_exchange_n(&slot, nullptr, __ATOMIC_ACQ_REL));
  }
}

int64_t sfa_core_pool_bytes(void) { return __atomic_load_n(&sfa::g_bytes, __ATOMIC_RELAXED); }

}  // extern "C"
