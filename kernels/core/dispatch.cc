// Which paths this machine has, and which one a call takes.
#include <stdlib.h>
#include <string.h>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "internal.h"

namespace sfa {
namespace {

struct Name {
  int id;
  const char* name;
};
constexpr Name kNames[] = {
    {SFA_CORE_ISA_AVX512_BF16, "avx512_bf16"},
    {SFA_CORE_ISA_AVX512F, "avx512f"},
    {SFA_CORE_ISA_AVX2, "avx2"},
    {SFA_CORE_ISA_NEON_BF16, "neon_bf16"},
    {SFA_CORE_ISA_NEON, "neon"},
    {SFA_CORE_ISA_SCALAR, "scalar"},
};

#ifdef SFA_ONNX_EMULATED_AVX512  // by kernels/tests/emulated, on any x86
bool has_avx512() { return true; }
bool has_avx512_bf16() { return true; }
#elif defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi");
}
#endif

const Path* path_of(int id) {
  switch (id) {
#if defined(__x86_64__)
    case SFA_CORE_ISA_AVX512_BF16:
      return has_avx512_bf16() ? avx512_bf16_path() : nullptr;
    case SFA_CORE_ISA_AVX512F:
      return has_avx512() ? avx512f_path() : nullptr;
    case SFA_CORE_ISA_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("f16c")
                 ? avx2_path()
                 : nullptr;
#elif defined(__aarch64__)
    case SFA_CORE_ISA_NEON:
      return neon_path();
    case SFA_CORE_ISA_NEON_BF16: {
      constexpr unsigned long kHwcap2Bf16 = 1ul << 14;
      return (getauxval(AT_HWCAP2) & kHwcap2Bf16) ? neon_bf16_path() : nullptr;
    }
#endif
    case SFA_CORE_ISA_SCALAR:
      return scalar_path();
    default:
      return nullptr;
  }
}

const Path* best_path() {
  for (const Name& n : kNames) {
    if (const Path* path = path_of(n.id)) return path;
  }
  return nullptr;
}

}  // namespace

const Path* find_path(int id) {
  if (id != SFA_CORE_ISA_AUTO) return path_of(id);
  // Read every time: a process may force one path for one session and another for the next.
  const char* forced = getenv("SFA_ONNX_ISA");
  if (!forced || !*forced) return best_path();
  return path_of(sfa_core_isa_from_name(forced));
}

const Path* usable_path(const Path* path, const Geom& g) {
  if (path->supports(g)) return path;
  const int fallback = path->id == SFA_CORE_ISA_AVX512_BF16 ? SFA_CORE_ISA_AVX512F
                       : path->id == SFA_CORE_ISA_NEON_BF16 ? SFA_CORE_ISA_NEON
                                                            : SFA_CORE_ISA_SCALAR;
  return path_of(fallback);
}

}  // namespace sfa

extern "C" {

int32_t sfa_core_isa_from_name(const char* name) {
  for (const auto& n : sfa::kNames) {
    if (strcmp(n.name, name) == 0) return n.id;
  }
  return -1;
}

const char* sfa_core_isa(void) {
  const sfa::Path* path = sfa::find_path(SFA_CORE_ISA_AUTO);
  return path ? path->name : "";
}

const char* sfa_core_isa_available(void) {
  static char text[96];
  static int32_t state;  // 0 empty, 1 being written, 2 done
  int32_t empty = 0;
  if (__atomic_compare_exchange_n(&state, &empty, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    for (const auto& n : sfa::kNames) {
      if (!sfa::path_of(n.id)) continue;
      if (*text) strcat(text, ",");
      strcat(text, n.name);
    }
    __atomic_store_n(&state, 2, __ATOMIC_RELEASE);
  }
  while (__atomic_load_n(&state, __ATOMIC_ACQUIRE) != 2) {
  }
  return text;
}

}  // extern "C"
