// The path of last resort: plain C++, four lanes of the compiler's baseline vectors.
#define SFA_LANES 4
#define SFA_TILE_VECS 2
#include "half.h"
#include "vec.h"

namespace sfa {
namespace {
namespace simd {

inline vf load_i8(const uint8_t* p) {
  return vf{(float)(int8_t)p[0], (float)(int8_t)p[1], (float)(int8_t)p[2], (float)(int8_t)p[3]};
}
inline vf load_16(const uint8_t* p, int dtype) {
  return vf{load_as_f32(p, 0, dtype), load_as_f32(p, 1, dtype), load_as_f32(p, 2, dtype),
            load_as_f32(p, 3, dtype)};
}
inline vf load_bf16(const uint8_t* p) { return load_16(p, SFA_CORE_BF16); }
inline vf load_f16(const uint8_t* p) { return load_16(p, SFA_CORE_F16); }
inline void store_as(void* p, int dtype, vf v) {
  for (int i = 0; i < W; ++i) store_from_f32(p, i, dtype, v[i]);
}
inline vf round_f16(vf v) {
  for (int i = 0; i < W; ++i) v[i] = f16_f32(f32_f16(v[i]));
  return v;
}

}  // namespace simd
}  // namespace
}  // namespace sfa

#include "fp32_path.h"

namespace sfa {

const Path* scalar_path() {
  static constexpr Path path = {SFA_CORE_ISA_SCALAR, "scalar",        fp32_supports,
                                fp32_scratch_bytes,  fp32_load_query, fp32_attend,
                                merge_partials,      store_partial};
  return &path;
}

}  // namespace sfa
