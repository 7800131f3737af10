// What the C++ tests share: checks that count failures, settings, the paths of this machine, and
// running the tasks of a call on threads.
#ifndef SFA_ONNX_KERNELS_TESTS_HARNESS_H_
#define SFA_ONNX_KERNELS_TESTS_HARNESS_H_

#include <stdio.h>

#include <string>
#include <thread>

#include "core_case.h"

namespace sfa_test {

inline int g_failures = 0;

#define CHECK(condition, ...)                                \
  do {                                                       \
    if (!(condition)) {                                      \
      printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      printf(__VA_ARGS__);                                   \
      printf("\n");                                          \
      ++sfa_test::g_failures;                                \
    }                                                        \
  } while (0)

inline int Number(const char* name, int fallback) {
  const char* text = getenv(name);
  return text ? atoi(text) : fallback;
}

inline std::vector<int32_t> Paths() {
  std::vector<int32_t> paths;
  std::string names = sfa_core_isa_available();
  for (size_t at = 0; at < names.size();) {
    const size_t end = std::min(names.find(',', at), names.size());
    paths.push_back(sfa_core_isa_from_name(names.substr(at, end - at).c_str()));
    at = end + 1;
  }
  return paths;
}

// Runs tasks [0, count) in a random order on some threads, as a runtime's pool would.
template <class Call>
void RunTasks(int (*run)(Call*, int64_t), Call* call, int64_t count, int threads, uint64_t seed) {
  std::vector<int64_t> tasks(count);
  for (int64_t i = 0; i < count; ++i) tasks[i] = i;
  Random r(seed);
  std::shuffle(tasks.begin(), tasks.end(), r);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      for (size_t i = t; i < tasks.size(); i += threads) run(call, tasks[i]);
    });
  }
  for (auto& thread : pool) thread.join();
}

}  // namespace sfa_test

#endif  // SFA_ONNX_KERNELS_TESTS_HARNESS_H_
