// Which indexer path belongs to a path of the attention, by the type of the numbers.
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "indexer.h"

namespace sfa {

#ifdef SFA_ONNX_EMULATED_AVX512  // by kernels/tests/emulated: each of the two paths has its turn
static bool has_vnni(int id) { return id == SFA_CORE_ISA_AVX512_BF16; }
#elif defined(__x86_64__)
static bool has_vnni(int) { return __builtin_cpu_supports("avx512vnni"); }
#endif

const IndexerPath* indexer_path(int id, int dtype) {
  const bool int8 = dtype == SFA_CORE_I8, bf16 = dtype == SFA_CORE_BF16;
#if defined(__x86_64__)
  if (id == SFA_CORE_ISA_AVX512_BF16 && bf16) return indexer_avx512_bf16();
  if (id == SFA_CORE_ISA_AVX512_BF16 || id == SFA_CORE_ISA_AVX512F) {
    return int8 && has_vnni(id) ? indexer_avx512_vnni() : indexer_avx512f(int8);
  }
  if (id == SFA_CORE_ISA_AVX2) return indexer_avx2(int8);
#elif defined(__aarch64__)
  if (id == SFA_CORE_ISA_NEON_BF16 && bf16) return indexer_neon_bf16();
  if (id == SFA_CORE_ISA_NEON_BF16 || id == SFA_CORE_ISA_NEON) {
    constexpr unsigned long kHwcapDot = 1ul << 20;
    return int8 && (getauxval(AT_HWCAP) & kHwcapDot) ? indexer_neon_dot() : indexer_neon(int8);
  }
#endif
  (void)id;
  (void)bf16;
  return indexer_scalar(int8);
}

}  // namespace sfa
