// Fuzzed bytes as small numbers: what a case is made from. Past the end everything is zero.
#ifndef SFA_ONNX_KERNELS_TESTS_FUZZ_READER_H_
#define SFA_ONNX_KERNELS_TESTS_FUZZ_READER_H_

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

namespace sfa_fuzz {

// What must hold; a failure is a crash that the fuzzer keeps.
#define FUZZ_CHECK(condition)                                                        \
  do {                                                                               \
    if (!(condition)) {                                                              \
      fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
      abort();                                                                       \
    }                                                                                \
  } while (0)

class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  uint8_t Byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }

  bool Flag() { return Byte() & 1; }

  int64_t Whole() {
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value |= static_cast<uint64_t>(Byte()) << (8 * i);
    return static_cast<int64_t>(value);
  }

  // In [low, high], of one byte.
  int Uniform(int low, int high) { return low + Byte() % (high - low + 1); }

  // A number of 32 bits that nobody would give: the limits of types, and what lies beside them.
  int64_t Wild() {
    const int64_t kinds[] = {
        -1, 0, 1, INT32_MAX, INT32_MIN, 1 << 14, 1 << 16, (1 << 14) + 1, 1000, (1 << 16) + 1};
    const int which = Uniform(0, 11);
    return which < 10 ? kinds[which] : static_cast<int32_t>(Whole());
  }

  // The same, of 64 bits.
  int64_t Wild64() {
    const int64_t kinds[] = {INT64_MAX, INT64_MIN, int64_t{1} << 62, int64_t{1} << 40,
                             (int64_t{1} << 40) + 1};
    const int which = Uniform(0, 9);
    return which < 5 ? kinds[which] : which < 8 ? Wild() : Whole();
  }

  // `count` bytes, exactly as many as there must be; drawn from a seed of the input, some replaced.
  std::vector<uint8_t> Bytes(size_t count) {
    std::vector<uint8_t> bytes(count);
    uint64_t state = static_cast<uint64_t>(Whole()) | 1;
    for (auto& b : bytes) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      b = static_cast<uint8_t>(state >> 32);
    }
    for (int i = Uniform(0, 7); i > 0 && count > 0; --i) {
      const size_t at = (static_cast<size_t>(Byte()) << 8 | Byte()) % count;
      bytes[at] = Byte();
    }
    return bytes;
  }

  size_t left() const { return left_; }

 private:
  const uint8_t* data_;
  size_t left_;
};

}  // namespace sfa_fuzz

#endif  // SFA_ONNX_KERNELS_TESTS_FUZZ_READER_H_
