// A call on several threads, for hosts that bring no thread pool of their own. Helpers are started
// once, when first asked for, and sleep between calls after a short time of watching.
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

#include "internal.h"

// The versions that manylinux2014 has: glibc 2.34 moved these functions and gave them new ones.
// Older systems find them in libpthread, which every Python has loaded. Static tests keep the plain
// names.
#if defined(SFA_ONNX_OLD_GLIBC)
#if defined(__x86_64__)
#define SFA_OLD(name) __asm__(".symver " #name "," #name "@GLIBC_2.2.5")
#else
#define SFA_OLD(name) __asm__(".symver " #name "," #name "@GLIBC_2.17")
#endif
SFA_OLD(pthread_create);
SFA_OLD(pthread_detach);
SFA_OLD(pthread_mutex_trylock);
SFA_OLD(pthread_sigmask);
#endif

namespace sfa {
namespace {

constexpr int kMaxHelpers = 255;
// How long a helper watches for the next call before it sleeps: calls that follow each other
// closely are not kept waiting, and what a host does between two distant ones has the core to
// itself.
constexpr int64_t kWatch = 200 * 1000, kWatchClose = 1000 * 1000;  // nanoseconds

struct Job {
  void (*run)(void* context, int64_t task);
  void* context;
  int64_t tasks;
  int64_t next;     // the next task nobody has taken
  int32_t wanted;   // helpers that may still join
  int32_t working;  // helpers inside
  int core;         // the caller's
};

pthread_mutex_t g_turn = PTHREAD_MUTEX_INITIALIZER;  // one call has the helpers at a time
pthread_mutex_t g_lock = PTHREAD_MUTEX_INITIALIZER;  // guards g_sleeping with g_wake
pthread_cond_t g_wake = PTHREAD_COND_INITIALIZER;
Job g_job;
uint64_t g_number;  // of the last job; a helper that has seen it waits for the next
int g_helpers, g_sleeping;
bool g_fork_known;

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

inline void breathe() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class T>
T load(const T* at) {
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

int this_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Some kernels wake a helper on its caller's core and part the two only after tens of milliseconds.
void leave_core(int core) {
#if defined(__linux__)
  cpu_set_t may, others;
  if (core < 0 || core >= CPU_SETSIZE || sched_getcpu() != core) return;
  if (sched_getaffinity(0, sizeof may, &may) != 0 || !CPU_ISSET(core, &may)) return;
  others = may;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
  sched_setaffinity(0, sizeof may, &may);
#endif
}

void take_tasks(Job* job) {
  for (;;) {
    const int64_t task = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
    if (task >= job->tasks) return;
    job->run(job->context, task);
  }
}

// Sleeps once nothing has come for `watch` nanoseconds. Returns how long to watch the next time.
int64_t wait_for_job(uint64_t seen, int64_t watch) {
  const int64_t start = now();
  for (int64_t spent = 0; spent < watch; spent = now() - start) {
    for (int i = 0; i < 64; ++i) {
      if (load(&g_number) != seen) return kWatchClose;
      breathe();
    }
  }
  pthread_mutex_lock(&g_lock);
  ++g_sleeping;
  while (load(&g_number) == seen) pthread_cond_wait(&g_wake, &g_lock);
  --g_sleeping;
  pthread_mutex_unlock(&g_lock);
  return now() - start < kWatchClose ? kWatchClose : kWatch;
}

// A helper joins only while it is wanted: the caller takes the places back before it leaves.
bool join(Job* job) {
  int32_t wanted = load(&job->wanted);
  while (wanted > 0) {
    __atomic_fetch_add(&job->working, 1, __ATOMIC_ACQ_REL);
    if (__atomic_compare_exchange_n(&job->wanted, &wanted, wanted - 1, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_ACQUIRE)) {
      return true;
    }
    __atomic_fetch_sub(&job->working, 1, __ATOMIC_ACQ_REL);
  }
  return false;
}

void* help(void* first_seen) {
  uint64_t seen = (uint64_t)(uintptr_t)first_seen;
  int64_t watch = kWatch;
  for (;;) {
    watch = wait_for_job(seen, watch);
    seen = load(&g_number);
    leave_core(load(&g_job.core));
    if (!join(&g_job)) continue;
    take_tasks(&g_job);
    __atomic_fetch_sub(&g_job.working, 1, __ATOMIC_ACQ_REL);
  }
  return nullptr;
}

// A forked child has none of the helpers, and nobody who would unlock.
void after_fork() {
  g_helpers = g_sleeping = 0;
  g_job = Job{};
  pthread_mutex_init(&g_turn, nullptr);
  pthread_mutex_init(&g_lock, nullptr);
  pthread_cond_init(&g_wake, nullptr);
}

// Signals are the host's business: helpers take none.
void start_helpers(int count) {
  if (g_helpers >= count) return;
  if (!g_fork_known) g_fork_known = pthread_atfork(nullptr, nullptr, after_fork) == 0;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (g_helpers < count && g_fork_known) {
    pthread_t thread;
    if (pthread_create(&thread, nullptr, help, (void*)(uintptr_t)g_number) != 0) break;
    pthread_detach(thread);
    ++g_helpers;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void publish(int helpers) {
  __atomic_store_n(&g_job.wanted, helpers, __ATOMIC_RELEASE);
  pthread_mutex_lock(&g_lock);
  __atomic_fetch_add(&g_number, 1, __ATOMIC_ACQ_REL);
  const bool asleep = g_sleeping > 0;
  pthread_mutex_unlock(&g_lock);
  if (asleep) pthread_cond_broadcast(&g_wake);
}

void run_alone(void (*run)(void*, int64_t), void* context, int64_t tasks) {
  for (int64_t task = 0; task < tasks; ++task) run(context, task);
}

}  // namespace

void run_tasks(void (*run)(void* context, int64_t task), void* context, int64_t tasks,
               int threads) {
  int helpers = threads - 1 < tasks - 1 ? threads - 1 : (int)(tasks - 1);
  if (helpers > kMaxHelpers) helpers = kMaxHelpers;
  // Two callers at once: the second has its own thread, which is enough to be right.
  if (helpers < 1 || pthread_mutex_trylock(&g_turn) != 0) return run_alone(run, context, tasks);
  start_helpers(helpers);
  g_job.run = run, g_job.context = context, g_job.tasks = tasks, g_job.next = 0;
  __atomic_store_n(&g_job.core, this_core(), __ATOMIC_RELAXED);
  publish(helpers < g_helpers ? helpers : g_helpers);
  take_tasks(&g_job);
  __atomic_store_n(&g_job.wanted, 0, __ATOMIC_RELEASE);
  // A helper that shares this core cannot end before it has it.
  for (int turn = 1; load(&g_job.working) != 0; ++turn)
    turn & 1023 ? breathe() : (void)sched_yield();
  pthread_mutex_unlock(&g_turn);
}

}  // namespace sfa

extern "C" int sfa_core_run_threads(const sfa_core_params* params, int32_t threads,
                                    sfa_core_error* err) {
  if (threads <= 1) return sfa_core_run(params, err);
  sfa_core_call* call = nullptr;
  const int status = sfa_core_begin(params, &call, err);
  if (status != SFA_CORE_OK) return status;
  const auto run = [](void* c, int64_t task) { sfa_core_run_task((sfa_core_call*)c, task); };
  sfa::run_tasks(run, call, sfa_core_num_tasks(call), threads);
  return sfa_core_end(call, err);
}

extern "C" int sfa_core_indexer_run_threads(const sfa_core_indexer_params* params, int32_t threads,
                                            sfa_core_error* err) {
  if (threads <= 1) return sfa_core_indexer_run(params, err);
  sfa_core_indexer_call* call = nullptr;
  const int status = sfa_core_indexer_begin(params, &call, err);
  if (status != SFA_CORE_OK) return status;
  const auto run = [](void* c, int64_t task) {
    sfa_core_indexer_run_task((sfa_core_indexer_call*)c, task);
  };
  sfa::run_tasks(run, call, sfa_core_indexer_num_tasks(call), threads);
  return sfa_core_indexer_end(call, err);
}
