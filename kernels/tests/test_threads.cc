// Calls on the core's own helpers: the same bits whoever helps, from several callers at once, after
// sleeps and in a forked child; and helpers that rest when nobody calls.
#include <sched.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "harness.h"

namespace sfa_test {
namespace {

constexpr int kLong = 5 * 1000;  // microseconds after which every helper sleeps

// One token over many keys: several tasks, so that helpers have something to take.
Case MakeSplitCase(Random& r) {
  const Sizes s = {
      4, 64, 16, 32, 2600, 1, 1, 1, 2700, SFA_CORE_F32, SFA_CORE_I8, SFA_CORE_BSND, SFA_CORE_BSND,
      0};
  return MakeCase(r, s);
}

std::vector<char> Alone(Case* c) {
  c->Bind();
  sfa_core_error error = {};
  CHECK(sfa_core_run(&c->p, &error) == SFA_CORE_OK, "status %d", error.status);
  return std::vector<char>(c->out.data(), c->out.data() + c->out.size());
}

bool Same(Case* c, int threads, const std::vector<char>& expected) {
  memset(c->out.data(), 0x5a, c->out.size());
  sfa_core_error error = {};
  return sfa_core_run_threads(&c->p, threads, &error) == SFA_CORE_OK &&
         std::equal(expected.begin(), expected.end(), c->out.data());
}

// Callers that meet: one has the helpers, the others do their work themselves.
void TestCallers(Random& r, int rounds) {
  std::vector<std::thread> callers;
  std::vector<Case> cases;
  std::vector<std::vector<char>> expected;
  for (int i = 0; i < 3; ++i) cases.push_back(MakeSplitCase(r));
  for (Case& c : cases) expected.push_back(Alone(&c));
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&, i] {
      for (int round = 0; round < rounds; ++round) {
        const bool same = Same(&cases[i], 2 + round % 3, expected[i]);
        CHECK(same, "caller %d, round %d", i, round);
        if (round % 8 == i) usleep(kLong);
      }
    });
  }
  for (auto& caller : callers) caller.join();
}

double Seconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void TestRest(Random& r) {
  Case c = MakeSplitCase(r);
  const std::vector<char> expected = Alone(&c);
  for (int i = 0; i < 20; ++i) CHECK(Same(&c, 3, expected), "call %d", i);
  usleep(10 * kLong);
  const double before = Seconds(CLOCK_PROCESS_CPUTIME_ID);
  usleep(20 * kLong);
  const double spent = Seconds(CLOCK_PROCESS_CPUTIME_ID) - before;
  CHECK(spent < 0.01, "%.3f s of processor in 0.1 s without a call", spent);
}

void TestChild(Random& r) {
  Case c = MakeSplitCase(r);
  const std::vector<char> expected = Alone(&c);
  CHECK(Same(&c, 3, expected), "before");
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    _exit(Same(&c, 3, expected) && Same(&c, 2, expected) ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(status == 0, "child ended with %d", status);
  CHECK(Same(&c, 3, expected), "after");
}

#if defined(__linux__)
// A caller that may run on one core only: its helpers, made later, have none but that.
void TestOneCore(Random& r) {
  cpu_set_t all, one;
  Case c = MakeSplitCase(r);
  const std::vector<char> expected = Alone(&c);
  if (sched_getaffinity(0, sizeof all, &all) != 0) return;
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  sched_setaffinity(0, sizeof one, &one);
  for (int i = 0; i < 20; ++i) CHECK(Same(&c, 8, expected), "call %d", i);
  sched_setaffinity(0, sizeof all, &all);
  for (int i = 0; i < 20; ++i) CHECK(Same(&c, 8, expected), "call %d", i);
}
#endif

}  // namespace
}  // namespace sfa_test

int main() {
  using namespace sfa_test;
  const int rounds = Number("SFA_TEST_ROUNDS", 100);
  Random r(Number("SFA_TEST_SEED", 1));
  TestCallers(r, rounds);
  TestRest(r);
  TestChild(r);
#if defined(__linux__)
  TestOneCore(r);
#endif
  sfa_core_trim();
  printf("threads: %s\n", g_failures ? "FAILED" : "ok");
  return g_failures ? 1 : 0;
}
