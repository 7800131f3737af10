// sfa_onnx::KvCachePack: quantise (or copy) latents and write packed rows. Bit-equal with
// sfa_onnx/kv_cache.py, whose docstring numbers the steps; built with -ffp-contract=off so that
// every step is one IEEE operation.
#include <math.h>
#include <string.h>

#include "half.h"
#include "internal.h"

namespace sfa {
namespace {

constexpr float kInv127 = 1.0f / 127.0f;  // 0x3c010204
constexpr uint32_t kNan = 0x7fc00000u;

// Half-to-even for |y| < 2^22.
inline float round_even(float y) {
  const float magic = 12582912.0f;
  return (y + magic) - magic;
}

// Widens one tile, returns max |x|; NaN when any is NaN.
float widen(const void* src, int64_t first, int n, int dtype, float* x) {
  float amax = 0.0f;
  bool nan = false;
  for (int i = 0; i < n; ++i) {
    x[i] = load_as_f32(src, first + i, dtype);
    const float a = fabsf(x[i]);
    nan |= a != a;
    amax = a > amax ? a : amax;
  }
  return nan ? bits_f32(kNan) : amax;
}

// Quantises one tile and returns its scale.
float quantise_tile(const float* x, int n, float amax, float clip, int8_t* q) {
  const float limit = amax * clip;
  memset(q, 0, (size_t)n);
  if (!(limit <= 3.402823466e38f)) return bits_f32(kNan);
  const float scale = limit * kInv127;
  const float r = 1.0f / scale;
  if (!(r <= 3.402823466e38f)) return 0.0f;
  for (int i = 0; i < n; ++i) {
    const float low = x[i] < -limit ? -limit : x[i];
    const float clipped = low > limit ? limit : low;
    q[i] = (int8_t)round_even(clipped * r);
  }
  return scale;
}

constexpr int kTileMax = 1 << 14;

void pack_row(const sfa_core_pack_params& p, int64_t row, float* x, uint8_t* out) {
  const int rope_size = dtype_size(p.rope_dtype), tiles = p.nope_dim / p.tile_size;
  uint8_t* rope = out + p.nope_dim;
  uint8_t* scales = rope + (size_t)p.rope_dim * rope_size;
  if (p.rope_dim > 0) {
    const size_t bytes = (size_t)p.rope_dim * rope_size;
    memcpy(rope, (const uint8_t*)p.rope + row * bytes, bytes);
  }
  if (p.nope_dtype == SFA_CORE_I8) {
    memcpy(out, (const uint8_t*)p.nope + row * p.nope_dim, p.nope_dim);
    memcpy(scales, (const uint8_t*)p.scale + row * tiles * 4, 4 * (size_t)tiles);
    return;
  }
  for (int t = 0; t < tiles; ++t) {
    const int64_t first = row * p.nope_dim + (int64_t)t * p.tile_size;
    const float amax = widen(p.nope, first, p.tile_size, p.nope_dtype, x);
    const float scale =
        quantise_tile(x, p.tile_size, amax, p.clip, (int8_t*)out + (int64_t)t * p.tile_size);
    memcpy(scales + 4 * t, &scale, 4);
  }
}

int check_pack(const sfa_core_pack_params& p, int64_t first, int64_t count, sfa_core_error* err) {
  const bool quantised = p.nope_dtype == SFA_CORE_I8, any = count > 0;
  const bool inside = p.rows >= 0 && first >= 0 && count >= 0 && first <= p.rows - count;
  const struct {
    const char* name;
    bool bad;
    int64_t value, limit;
  } rules[] = {
      {"struct_size", p.struct_size != sizeof p, p.struct_size, sizeof p},
      {"nope_dtype", p.nope_dtype < 0 || p.nope_dtype > SFA_CORE_I8, p.nope_dtype, SFA_CORE_I8},
      {"rope_dtype", p.rope_dtype < 0 || p.rope_dtype > SFA_CORE_BF16, p.rope_dtype, SFA_CORE_BF16},
      {"nope_dim", p.nope_dim < 1 || p.nope_dim > kTileMax, p.nope_dim, kTileMax},
      {"rope_dim", p.rope_dim < 0 || p.rope_dim > kTileMax, p.rope_dim, kTileMax},
      {"tile_size", p.tile_size < 1 || p.nope_dim % (p.tile_size < 1 ? 1 : p.tile_size) != 0,
       p.tile_size, p.nope_dim},
      {"clip", !quantised && !(p.clip > 0.0f && p.clip <= 3.402823466e38f), 0, 0},
      {"rows", !inside, first < 0 || first > p.rows ? first : count, p.rows},
      {"nope", any && !p.nope, 0, 1},
      {"rope", any && p.rope_dim > 0 && !p.rope, 0, 1},
      {"scale", any && quantised && !p.scale, 0, 1},
      {"out", any && !p.out, 0, 1},
  };
  for (const auto& rule : rules) {
    if (rule.bad) return set_error(err, SFA_CORE_BAD_PARAM, rule.name, rule.value, rule.limit);
  }
  return set_error(err, SFA_CORE_OK, "", 0, 0);
}

}  // namespace
}  // namespace sfa

extern "C" int sfa_core_pack(const sfa_core_pack_params* params, int64_t first, int64_t count,
                             sfa_core_error* err) {
  const sfa_core_pack_params& p = *params;
  const int status = sfa::check_pack(p, first, count, err);
  if (status != SFA_CORE_OK) return status;
  float* x = (float*)sfa::pool_take(4 * (size_t)p.tile_size);
  if (!x) return sfa::set_error(err, SFA_CORE_NO_MEMORY, "tile", 4 * (int64_t)p.tile_size, 0);
  const int64_t bytes = sfa_core_row_bytes(p.nope_dim, p.rope_dim, p.tile_size, p.rope_dtype);
  for (int64_t row = first; row < first + count; ++row) {
    sfa::pack_row(p, row, x, (uint8_t*)p.out + row * bytes);
  }
  sfa::pool_give(x);
  return SFA_CORE_OK;
}
