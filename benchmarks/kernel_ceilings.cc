// What this machine can do at best, and a clock around the kernel: compiled on the spot by
// benchmarks/kernel.py (g++ -O2 -shared -fPIC). Ceilings and kernel are timed by the same clock in
// the same process, so their ratio survives a busy or throttled machine.
#include <pthread.h>
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

// One thread is timed by its CPU time: what other processes take from it does not count.
double now_ns(clockid_t clock = CLOCK_THREAD_CPUTIME_ID) {
  timespec t;
  clock_gettime(clock, &t);
  return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

constexpr int kLoops = 20000;  // about 0.1 ms: one burst between two scheduler ticks

#if defined(__x86_64__)
// 24 independent accumulators cover every latency x throughput product in sight.
#define REPEAT24(X)                                                                             \
  X(0)                                                                                          \
  X(1)                                                                                          \
  X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) X(18) \
      X(19) X(20) X(21) X(22) X(23)
#define REPEAT12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

__attribute__((target("avx512f,avx512bf16"))) double burst_bf16_512() {
  const double start = now_ns();
  for (int i = 0; i < kLoops; ++i) {
#define STEP(n) asm volatile("vdpbf16ps %%zmm30, %%zmm31, %%zmm" #n::: "xmm" #n);
    REPEAT24(STEP)
#undef STEP
  }
  return 24.0 * kLoops * 64 / (now_ns() - start);
}

__attribute__((target("avx512f"))) double burst_fp32_512() {
  const double start = now_ns();
  for (int i = 0; i < kLoops; ++i) {
#define STEP(n) asm volatile("vfmadd231ps %%zmm30, %%zmm31, %%zmm" #n::: "xmm" #n);
    REPEAT24(STEP)
#undef STEP
  }
  return 24.0 * kLoops * 32 / (now_ns() - start);
}

// int8 products with AVX512-VNNI, operations as for floats: a multiply and an add.
__attribute__((target("avx512f,avx512vnni"))) double burst_int8_512() {
  const double start = now_ns();
  for (int i = 0; i < kLoops; ++i) {
#define STEP(n) asm volatile("vpdpbusd %%zmm30, %%zmm31, %%zmm" #n::: "xmm" #n);
    REPEAT24(STEP)
#undef STEP
  }
  return 24.0 * kLoops * 128 / (now_ns() - start);
}

// int16 products and their sums, as AVX2 multiplies int8.
__attribute__((target("avx2"))) double burst_int16_256() {
  const double start = now_ns();
  for (int i = 0; i < 2 * kLoops; ++i) {
#define STEP(n)                                 \
  asm volatile(                                 \
      "vpmaddwd %%ymm13, %%ymm14, %%ymm15\n"    \
      "vpaddd %%ymm15, %%ymm" #n ", %%ymm" #n:: \
          : "xmm" #n, "xmm15");
    REPEAT12(STEP)
#undef STEP
  }
  return 24.0 * kLoops * 32 / (now_ns() - start);
}

__attribute__((target("avx2,fma"))) double burst_fp32_256() {
  const double start = now_ns();
  for (int i = 0; i < 2 * kLoops; ++i) {
#define STEP(n) asm volatile("vfmadd231ps %%ymm14, %%ymm15, %%ymm" #n::: "xmm" #n);
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

// Reads every line of n rows, `ahead` rows prefetched into L1 or, for `far`, into L2.
uint64_t gather(const uint8_t* base, const int32_t* index, int64_t n, int64_t bytes, int ahead,
                bool far) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t* soon = base + (int64_t)index[i + ahead < n ? i + ahead : n - 1] * bytes;
    for (int64_t b = 0; b < bytes + 63; b += 64) {
      const uint8_t* line = soon + (b < bytes ? b : bytes - 1);
      far ? __builtin_prefetch(line, 0, 2) : __builtin_prefetch(line, 0, 3);
    }
    const uint8_t* row = base + (int64_t)index[i] * bytes;
    for (int64_t b = 0; b + 8 <= bytes; b += 64) {
      uint64_t word;
      memcpy(&word, row + b, 8);
      sum += word;
    }
  }
  return sum;
}

// A call of the core, shared by threads that start together.
struct Abi {
  int (*begin)(const void*, void**, void*);
  int64_t (*num_tasks)(const void*);
  int (*run_task)(void*, int64_t);
  int (*end)(void*, void*);
};

struct Team {
  const Abi* abi;
  void* call;
  int64_t tasks, next;
  int ready, go, done;
};

void work(Team* team) {
  for (;;) {
    const int64_t task = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
    if (task >= team->tasks) break;
    team->abi->run_task(team->call, task);
  }
  __atomic_add_fetch(&team->done, 1, __ATOMIC_ACQ_REL);
}

void* helper(void* arg) {
  Team* team = (Team*)arg;
  __atomic_add_fetch(&team->ready, 1, __ATOMIC_ACQ_REL);
  while (!__atomic_load_n(&team->go, __ATOMIC_ACQUIRE)) {
  }
  work(team);
  return nullptr;
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
  if (!strcmp(what, "int8_512")) {
    return __builtin_cpu_supports("avx512vnni") ? burst_int8_512() : 0;
  }
  if (!strcmp(what, "int16_256")) return __builtin_cpu_supports("avx2") ? burst_int16_256() : 0;
  if (!strcmp(what, "fp32_256")) return __builtin_cpu_supports("fma") ? burst_fp32_256() : 0;
#elif defined(__aarch64__)
  if (!strcmp(what, "fp32_neon")) return burst_fp32_neon();
#endif
  return 0;
}

// Nanoseconds to read n random rows of `bytes`.
EXPORT double bench_gather(const uint8_t* base, const int32_t* index, int64_t n, int64_t bytes,
                           int ahead, int far) {
  const double start = now_ns();
  volatile uint64_t sink = gather(base, index, n, bytes, ahead, far != 0);
  (void)sink;
  return now_ns() - start;
}

// Nanoseconds of one call on this thread; -1 after an error.
EXPORT double bench_call(int (*run)(const void*, void*), const void* params, void* error) {
  const double start = now_ns();
  if (run(params, error) != 0) return -1;
  return now_ns() - start;
}

// Nanoseconds of every task of one call, each kept in best[task] if it is less: short pieces fit
// between two scheduler ticks where the whole call does not. -1 after an error.
EXPORT int64_t bench_tasks(const Abi* abi, const void* params, void* error, double* best,
                           int64_t room) {
  void* call = nullptr;
  if (abi->begin(params, &call, error) != 0) return -1;
  const int64_t tasks = abi->num_tasks(call);
  for (int64_t i = 0; i < tasks; ++i) {
    const double start = now_ns();
    abi->run_task(call, i);
    const double took = now_ns() - start;
    if (i < room && took < best[i]) best[i] = took;
  }
  return abi->end(call, error) == 0 && tasks <= room ? tasks : -1;
}

// Wall-clock nanoseconds of one call whose tasks `threads` threads share; -1 after an error.
EXPORT double bench_call_threads(const Abi* abi, const void* params, void* error, int threads) {
  pthread_t helpers[64];
  if (threads < 1 || threads > 64) return -1;
  Team team = {};
  team.abi = abi;
  for (int i = 1; i < threads; ++i) pthread_create(&helpers[i], nullptr, helper, &team);
  while (__atomic_load_n(&team.ready, __ATOMIC_ACQUIRE) < threads - 1) {
  }
  const double start = now_ns(CLOCK_MONOTONIC);
  const bool ok = abi->begin(params, &team.call, error) == 0;
  if (ok) team.tasks = abi->num_tasks(team.call);
  __atomic_store_n(&team.go, 1, __ATOMIC_RELEASE);
  work(&team);
  while (__atomic_load_n(&team.done, __ATOMIC_ACQUIRE) < threads) {
  }
  const bool fine = ok && abi->end(team.call, error) == 0;
  const double elapsed = now_ns(CLOCK_MONOTONIC) - start;
  for (int i = 1; i < threads; ++i) pthread_join(helpers[i], nullptr);
  return fine ? elapsed : -1;
}
