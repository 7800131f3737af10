// What this machine can do at best, and a clock around the kernel: compiled on the spot by
// benchmarks/kernel.py (g++ -O2 -shared -fPIC). Ceilings and kernel are timed by the same clock in
// the same process, so their ratio survives a busy or throttled machine.
#include <stdint.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

double now_ns() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

constexpr int kLoops = 20000;  // about 0.1 ms: one burst between two scheduler ticks

#if defined(__x86_64__)
// 24 independent accumulators cover every latency x throughput product in sight.
#define REPEAT24(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) \
    X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23)
#define REPEAT12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

__attribute__((target("avx512f,avx512bf16"))) double burst_bf16_512() {
  const double start = now_ns();
  for (int i = 0; i < kLoops; ++i) {
#define STEP(n) asm volatile("vdpbf16ps %%zmm30, %%zmm31, %%zmm" #n ::: "xmm" #n);
    REPEAT24(STEP)
#undef STEP
  }
  return 24.0 * kLoops * 64 / (now_ns() - start);
}

__attribute__((target("avx512f"))) double burst_fp32_512() {
  const double start = now_ns();
  for (int i = 0; i < kLoops; ++i) {
#define STEP(n) asm volatile("vfmadd231ps %%zmm30, %%zmm31, %%zmm" #n ::: "xmm" #n);
    REPEAT24(STEP)
#undef STEP
  }
  return 24.0 * kLoops * 32 / (now_ns() - start);
}

__attribute__((target("avx2,fma"))) double burst_fp32_256() {
  const double start = now_ns();
  for (int i = 0; i < 2 * kLoops; ++i) {
#define STEP(n) asm volatile("vfmadd231ps %%ymm14, %%ymm15, %%ymm" #n ::: "xmm" #n);
    REPEAT12(STEP)
#undef STEP
  }
  return 24.0 * kLoops * 16 / (now_ns() - start);
}
#elif defined(__aarch64__)
double burst_fp32_neon() {
  float32x4_t acc[24];
  for (auto& a : acc) a = vdupq_n_f32(0);
  float32x4_t x = vdupq_n_f32(1), y = vdupq_n_f32(1);
  const double start = now_ns();
  for (int i = 0; i < kLoops; ++i) {
    for (auto& a : acc) a = vfmaq_f32(a, x, y);
    asm volatile("" : "+w"(x), "+w"(y));
  }
  const double gflops = 24.0 * kLoops * 8 / (now_ns() - start);
  float32x4_t sum = acc[0];
  for (int i = 1; i < 24; ++i) sum = vaddq_f32(sum, acc[i]);
  volatile float sink = vgetq_lane_f32(sum, 0);
  (void)sink;
  return gflops;
}
#endif

// Reads every line of n rows, `ahead` rows prefetched.
uint64_t gather(const uint8_t* base, const int32_t* index, int64_t n, int64_t bytes, int ahead) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t* soon = base + (int64_t)index[i + ahead < n ? i + ahead : n - 1] * bytes;
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(soon + b, 0, 3);
    __builtin_prefetch(soon + bytes - 1, 0, 3);
    const uint8_t* row = base + (int64_t)index[i] * bytes;
    for (int64_t b = 0; b + 8 <= bytes; b += 64) {
      uint64_t word;
      memcpy(&word, row + b, 8);
      sum += word;
    }
  }
  return sum;
}

}  // namespace

// GFLOP/s of one short burst; 0 when this machine lacks the instruction.
EXPORT double bench_peak(const char* what) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(what, "bf16_512")) {
    return __builtin_cpu_supports("avx512bf16") ? burst_bf16_512() : 0;
  }
  if (!strcmp(what, "fp32_512")) return __builtin_cpu_supports("avx512f") ? burst_fp32_512() : 0;
  if (!strcmp(what, "fp32_256")) return __builtin_cpu_supports("fma") ? burst_fp32_256() : 0;
#elif defined(__aarch64__)
  if (!strcmp(what, "fp32_neon")) return burst_fp32_neon();
#endif
  return 0;
}

// Nanoseconds to read n random rows of `bytes`.
EXPORT double bench_gather(const uint8_t* base, const int32_t* index, int64_t n, int64_t bytes,
                           int ahead) {
  const double start = now_ns();
  volatile uint64_t sink = gather(base, index, n, bytes, ahead);
  (void)sink;
  return now_ns() - start;
}

// Nanoseconds of one call.
EXPORT double bench_call(int (*run)(const void*, void*), const void* params, void* error) {
  const double start = now_ns();
  if (run(params, error) != 0) return -1;
  return now_ns() - start;
}
