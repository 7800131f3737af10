// Scalar conversions between float32 and the two 16-bit types, for tails and the scalar path.
// Everything is static: each path file is compiled with its own instruction set.
#ifndef SFA_ONNX_KERNELS_CORE_HALF_H_
#define SFA_ONNX_KERNELS_CORE_HALF_H_

#include <stdint.h>
#include <string.h>

#include "sfa_core.h"

namespace sfa {

static inline float bits_f32(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t f32_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static inline float bf16_f32(uint16_t h) { return bits_f32((uint32_t)h << 16); }

// Half-to-even; NaN stays a quiet NaN.
static inline uint16_t f32_bf16(float f) {
  const uint32_t u = f32_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float f16_f32(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, mag = h & 0x7fffu;
  if (mag >= 0x7c00u) return bits_f32(sign | 0x7f800000u | (mag & 0x3ffu) << 13);
  // Multiplying by 2^112 moves the exponent bias and renormalises subnormals.
  return bits_f32(sign | f32_bits(bits_f32(mag << 13) * 0x1p112f));
}

static inline uint16_t f32_f16(float f) {
  const uint32_t u = f32_bits(f), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (mag >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
  if (mag < 0x38800000u) {  // subnormal: let the adder round to multiples of 2^-24
    return (uint16_t)(sign | (f32_bits(bits_f32(mag) + 0.5f) - 0x3f000000u));
  }
  return (uint16_t)(sign | ((mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13));
}

// Element i of a possibly unaligned array of `dtype`.
static inline float load_as_f32(const void* base, int64_t i, int dtype) {
  if (dtype == SFA_CORE_F32) {
    float f;
    memcpy(&f, (const char*)base + 4 * i, 4);
    return f;
  }
  uint16_t h;
  memcpy(&h, (const char*)base + 2 * i, 2);
  return dtype == SFA_CORE_F16 ? f16_f32(h) : bf16_f32(h);
}

static inline void store_from_f32(void* base, int64_t i, int dtype, float f) {
  if (dtype == SFA_CORE_F32) {
    memcpy((char*)base + 4 * i, &f, 4);
    return;
  }
  const uint16_t h = dtype == SFA_CORE_F16 ? f32_f16(f) : f32_bf16(f);
  memcpy((char*)base + 2 * i, &h, 2);
}

}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_HALF_H_
