// The indexer of last resort: plain C++, four lanes of the compiler's baseline vectors.
#define SFA_LANES 4
#include "half.h"
#include "vec.h"

namespace sfa {
namespace {
namespace simd {

inline vf load_16(const uint8_t* p, int dtype) {
  return vf{load_as_f32(p, 0, dtype), load_as_f32(p, 1, dtype), load_as_f32(p, 2, dtype),
            load_as_f32(p, 3, dtype)};
}
inline vf load_bf16(const uint8_t* p) { return load_16(p, SFA_CORE_BF16); }
inline vf load_f16(const uint8_t* p) { return load_16(p, SFA_CORE_F16); }
inline vf round_f16(vf v) {
  for (int i = 0; i < W; ++i) v[i] = f16_f32(f32_f16(v[i]));
  return v;
}
inline vf relu(vf x) { return x < 0.0f ? vf{} : x; }
inline uint32_t bits(vi take) {
  uint32_t set = 0;
  for (int i = 0; i < W; ++i) set |= (uint32_t)(take[i] & 1) << i;
  return set;
}

}  // namespace simd
}  // namespace
}  // namespace sfa

#include "indexer_append.h"
#include "indexer_path.h"
#include "indexer_select.h"

namespace sfa {

const IndexerPath* indexer_scalar(bool int8) {
  static constexpr IndexerPath floats = indexer_table<FloatWords<2, 12, 24>>("scalar");
  static constexpr IndexerPath bytes = indexer_table<IntWords<2, 12>>("scalar");
  return int8 ? &bytes : &floats;
}

}  // namespace sfa
